"""What the recipes are: where a run starts, which parameters it trains, and by which objective.

May be changed here: recipes. Their options are `gsa_jax.train.config`, the objectives `gsa_jax.train.objectives`;
everything after the start is the same for all of them, `gsa_jax.train.loop`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gsa_jax.checkpoint import load_tensors
from gsa_jax.config import AttentionImplementation, GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.parameters import build_model, expected_shapes, extend_positions, is_splat, named_parameters
from gsa_jax.sharding import check_mesh
from gsa_jax.text import context_length
from gsa_jax.train.config import MODELS, Distill, Finetune, Pretrain, TrainConfig
from gsa_jax.train.memory import MemoryReport, memory_reports
from gsa_jax.train.objectives import Build, Objective, cross_entropy, output_error, prediction_divergence
from gsa_jax.train.optimizer import make_optimizer


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        model: configuration of the model that is trained.
        shapes: of all its parameters, by their names.
        stored: parameters of the checkpoint that it starts from, as they are in it; None if there is none.
        tensors: all parameters, on the host; None if they are drawn at random.
        is_trained: by a parameter's name.
        has_teacher: whether the objective needs a copy of the parameters at the start. An objective that compares with
            the parameters that stay as they are does not.
        objective: what is minimised.
        tokenizer: folder that has it.
    """

    model: GPTNeoConfig
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, np.ndarray] | None
    tensors: Mapping[str, np.ndarray] | None
    is_trained: Callable[[str], bool]
    has_teacher: bool
    objective: Objective
    tokenizer: Path


def prepare(config: TrainConfig) -> Start:
    """Reads what a run starts from.

    Raises:
        InputError: the checkpoint cannot be used, or does not suit the recipe.
    """
    match config:
        case Pretrain():
            return _pretrain(config)
        case Distill():
            return _distill(config)
        case Finetune():
            return _finetune(config)
    raise TypeError(f"{type(config).__name__} is not a recipe")


def memory_of_step(config: TrainConfig, meshes: list[dict[str, int]]) -> list[MemoryReport]:
    """What a step of the run would take on a device of each mesh that divides the model and the batch.

    Raises:
        InputError: as `prepare`; or the first mesh, the one that is asked for, does not divide.
    """
    start = prepare(config)
    fitting = meshes[:1]
    for mesh in meshes[1:]:
        with contextlib.suppress(InputError):
            check_mesh(mesh, start.model, config.batch_size // config.optimizer.accumulate)
            fitting.append(mesh)
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in start.shapes.items()}
    return memory_reports(
        start.model,
        start.objective,
        make_optimizer(config.optimizer, config.steps),
        fitting,
        rows=config.batch_size,
        context=context_length(start.model, config.context),
        dtype=config.dtype,
        remat=config.remat,
        accumulate=config.optimizer.accumulate,
        ema=config.optimizer.ema_decay is not None,
        trained=start.is_trained,
        teacher=shapes if start.has_teacher else None,
    )


def random_tensors(model: GPTNeoConfig, key: jax.Array) -> dict[str, jax.Array]:
    """Initial parameters, float32; to be called inside of `jit`, so that each device makes its own part."""
    return named_parameters(GPTNeoForCausalLM(model, rngs=nnx.Rngs(key)))


def _pretrain(config: Pretrain) -> Start:
    model = MODELS[config.model]
    return Start(
        model=model,
        shapes=expected_shapes(model),
        stored=None,
        tensors=None,
        is_trained=lambda name: True,
        has_teacher=False,
        objective=cross_entropy(_build(config, model)),
        tokenizer=config.tokenizer,
    )


def _distill(config: Distill) -> Start:
    model, tensors = load_tensors(config.checkpoint)
    _require_splats(config.checkpoint, model)
    exact = dataclasses.replace(model, splats=None)
    make = {"output": output_error, "logits": prediction_divergence}[config.objective]
    return Start(
        model=model,
        shapes=expected_shapes(model),
        stored=tensors,
        tensors=tensors,
        is_trained=is_splat,
        has_teacher=False,
        objective=make(_build(config, model), _build(config, exact)),
        tokenizer=config.checkpoint,
    )


def _finetune(config: Finetune) -> Start:
    model, stored = load_tensors(config.checkpoint)
    tensors = stored
    if config.max_positions is not None:
        model, tensors = extend_positions(model, stored, config.max_positions, config.position_extension)
    if config.train == "splats":
        _require_splats(config.checkpoint, model)
    student = _build(config, model)
    if config.teacher_weight:
        exact = dataclasses.replace(model, splats=None)
        objective = prediction_divergence(student, _build(config, exact), config.teacher_weight)
    else:
        objective = cross_entropy(student)
    trained = {"all": "", "attention": ".attn.", "splats": ".splat_"}[config.train]
    return Start(
        model=model,
        shapes=expected_shapes(model),
        stored=stored,
        tensors={name: np.asarray(tensor) for name, tensor in tensors.items()},
        is_trained=lambda name: trained in name,
        has_teacher=bool(config.teacher_weight),
        objective=objective,
        tokenizer=config.checkpoint,
    )


def _build(config: TrainConfig, model: GPTNeoConfig) -> Build:
    """A function that makes the model from named parameters, and ignores those that the model does not have."""
    model = dataclasses.replace(
        model,
        dtype=config.dtype,
        remat=config.remat,
        attention_implementation=_attention_implementation(config),
    )
    names = expected_shapes(model)

    def build(params: Mapping[str, jax.Array]) -> GPTNeoForCausalLM:
        return build_model(model, {name: params[name] for name in names})

    return build


def _attention_implementation(config: TrainConfig) -> AttentionImplementation:
    """`auto`, where bits are to repeat on a GPU, is ours: there, cuDNN's backward pass holds a matrix of all scores."""
    repeats_bits = config.deterministic and jax.default_backend() == "gpu"
    asked = config.attention_implementation
    return "xla" if repeats_bits and asked == "auto" else asked


def _require_splats(checkpoint: Path, model: GPTNeoConfig) -> None:
    if model.splats is None or not model.splats.has_splats:
        raise InputError(f"{checkpoint}: has no splats to train; attach and fit them first: gsa fit-init")
    if model.splats.window == "all":
        raise InputError(f"{checkpoint}: its window is all tokens, so its splats are unused; fit it with --window W")
