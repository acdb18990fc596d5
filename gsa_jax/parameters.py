"""A model as named tensors: a flat dict from Hugging Face's names to arrays.

May be changed here: how parameters are named, how a model is made of them, and how more positions follow from those a
model has. The name of a tensor is its path in the model in Hugging Face's words, e.g.
`transformer.h.0.attn.attention.q_proj.weight`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gsa_jax.attention import splat_shapes
from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError, listed
from gsa_jax.model import GPTNeoForCausalLM

Tensor = TypeVar("Tensor", np.ndarray, jax.Array)

_HF_LEAF_NAMES = {"scale": "weight", "embedding": "weight"}
"""The leaves that Flax calls differently than PyTorch: of a layer norm and of an embedding."""

_FIRST_LAYER = "transformer.h.0."

TOKEN_EMBEDDING = "transformer.wte.weight"
POSITION_EMBEDDING = "transformer.wpe.weight"

PositionExtension = Literal["interpolate", "tile"]
"""`interpolate` stretches the embedding over the new length: all positions lie between trained ones, and neighbours
closer together (Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation",
who do so to rotary positions). `tile` repeats it: short texts give what they gave before (as Beltagy et al. 2020,
"Longformer", section 5)."""


def attention_tensor(layer: int, leaf: str) -> str:
    """The name of a tensor of a layer's attention, such as `v_proj.weight` or `splat_centers`."""
    return f"transformer.h.{layer}.attn.attention.{leaf}"


def is_splat(name: str) -> bool:
    """Whether a tensor of this name belongs to the splats."""
    return ".splat_" in name


def without_splats(config: GPTNeoConfig, tensors: Mapping[str, Tensor]) -> tuple[GPTNeoConfig, dict[str, Tensor]]:
    """Configuration and parameters of the exact model with the same weights."""
    kept = {name: tensor for name, tensor in tensors.items() if not is_splat(name)}
    return dataclasses.replace(config, splats=None), kept


def _tensor_name(path: tuple[Any, ...]) -> str:
    *modules, leaf = (str(part) for part in path)
    return ".".join([*modules, _HF_LEAF_NAMES.get(leaf, leaf)])


def _abstract_model(config: GPTNeoConfig) -> GPTNeoForCausalLM:
    return nnx.eval_shape(lambda: GPTNeoForCausalLM(config, rngs=nnx.Rngs(0)))


def named_parameters(model: GPTNeoForCausalLM) -> dict[str, jax.Array]:
    """The parameters of a model by Hugging Face's names, splats included."""
    return {_tensor_name(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def expected_shapes(config: GPTNeoConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that a model of this configuration has; allocates nothing.

    A configuration may claim any number of layers, and tracing one takes long: layers differ in their splats alone.
    """
    one_layer = dataclasses.replace(config, num_layers=1, attention_types=((("global",), 1),), splats=None)
    flat = nnx.to_flat_state(nnx.state(_abstract_model(one_layer), nnx.Param))
    shapes = {_tensor_name(path): tuple(leaf.get_value().shape) for path, leaf in flat}
    block = {name: shapes.pop(name) for name in list(shapes) if name.startswith(_FIRST_LAYER)}
    expected, with_splats = {}, set(config.splat_layers)
    for layer in range(config.num_layers):
        of_layer = {f"transformer.h.{layer}.{name.removeprefix(_FIRST_LAYER)}": shape for name, shape in block.items()}
        if layer in with_splats:
            of_layer |= {attention_tensor(layer, leaf): shape for leaf, shape in splat_shapes(config, layer).items()}
        expected |= dict(sorted(of_layer.items()))
    return expected | shapes


def build_model(
    config: GPTNeoConfig,
    tensors: Mapping[str, np.ndarray | jax.Array],
    *,
    param_dtype: jax.typing.DTypeLike | None = None,
) -> GPTNeoForCausalLM:
    """A model with these parameters, without initialising others first.

    Args:
        tensors: exactly the parameters of `expected_shapes(config)`, in any floating dtype.
        param_dtype: of the parameters; as `tensors` has them if None. The computation has `config.dtype`.

    Raises:
        InputError: tensors are missing, left over or of another shape.
    """
    problems = shape_problems(expected_shapes(config), {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if problems:
        raise InputError("tensors do not fit the configuration: " + listed(problems))
    graphdef, abstract = nnx.split(_abstract_model(config))
    flat = []
    for path, leaf in nnx.to_flat_state(abstract):
        tensor = tensors[_tensor_name(path)]
        flat.append((path, leaf.replace(jnp.asarray(tensor, dtype=param_dtype or tensor.dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def shape_problems(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    *,
    labels: Mapping[str, str] | None = None,
) -> list[str]:
    """What tells two sets of named shapes apart, a phrase for each tensor; `labels` renames those that were found."""
    labels = labels or {}
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    for name, shape in found.items():
        label = labels.get(name, name)
        if name not in expected:
            problems.append(f"unexpected {label} {list(shape)}")
        elif shape != expected[name]:
            problems.append(f"{label} has shape {list(shape)}, expected {list(expected[name])}")
    return problems


def extend_positions(
    config: GPTNeoConfig,
    tensors: Mapping[str, np.ndarray | jax.Array],
    max_positions: int,
    method: PositionExtension,
) -> tuple[GPTNeoConfig, dict[str, np.ndarray | jax.Array]]:
    """The same model with `max_positions` positions; unchanged if it has that many already.

    In the new embedding `[max_positions, E]`, `interpolate` keeps the first and the last vector and interpolates
    linearly between neighbouring old vectors; `tile` starts again with the first vector after the last one. The
    interpolation is computed in float32 and returned in the dtype of the tensor.

    Raises:
        InputError: `max_positions` is smaller than the number of positions now, or the method is unknown.
    """
    positions = config.max_position_embeddings
    if method not in get_args(PositionExtension):
        raise InputError(f"position_extension = {method!r}: must be one of {', '.join(get_args(PositionExtension))}")
    if max_positions < positions:
        raise InputError(
            f"max_positions = {max_positions}: the model has {positions} positions already; give at least as many"
        )
    if max_positions == positions:
        return config, dict(tensors)
    rows = np.asarray(tensors[POSITION_EMBEDDING])
    if method == "tile":
        longer = rows[np.arange(max_positions) % positions]
    else:
        place = np.arange(max_positions) * (positions - 1) / (max_positions - 1)
        below = np.minimum(place.astype(int), max(positions - 2, 0))
        share = (place - below).astype(np.float32)[:, None]
        wide = rows.astype(np.float32)
        longer = ((1 - share) * wide[below] + share * wide[np.minimum(below + 1, positions - 1)]).astype(rows.dtype)
    config = dataclasses.replace(config, max_position_embeddings=max_positions)
    return config, {**tensors, POSITION_EMBEDDING: longer}
