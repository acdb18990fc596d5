"""Does a checkpoint compute what its PyTorch source computes?

May be changed here: what is compared, and how close is close enough. Both models run in float32; the oracle is
`transformers`, reading the source folder by itself.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gsa_jax.checkpoint import load_tensors
from gsa_jax.config import GPTNeoConfig
from gsa_jax.convert.donors import LAYOUTS
from gsa_jax.convert.importer import plan_source, read_tensors
from gsa_jax.convert.reader import Source, open_source
from gsa_jax.errors import InputError
from gsa_jax.hf_fields import DONORS, SPLAT_MODEL_TYPE
from gsa_jax.loss import mean_next_token_loss
from gsa_jax.parameters import TOKEN_EMBEDDING, build_model, is_splat
from gsa_jax.text import read_documents, text_rows
from gsa_jax.text_files import Text, as_text_files
from gsa_jax.tokenizer_folder import open_tokenizer

_TOLERANCE = 1e-4
"""Relative RMS between two float32 computations with the same weights; rounding alone stays far below."""

_NARROWED_TOLERANCE = {"bfloat16": 5e-2, "float16": 5e-3}
"""The same when the checkpoint stores its weights in fewer bits than the source."""

_RANDOM_TOKENS = 128
_TEXT_CONTEXT = 512
_MAX_TEXT_ROWS = 8

_NOT_READ_BY_FLAX = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx")
"""Fields of a GPT-2 that Hugging Face's Flax model does not read: it computes with the defaults."""

Oracle = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Logits of the checkpoint against those of one oracle on one input.

    Attributes:
        oracle: what the checkpoint was compared with.
        inputs: `"random ids"` or the text file.
        tokens: compared, padding left out.
        max_abs: largest difference of a logit.
        relative_rms: RMS of the difference over the RMS of the oracle's logits, after the mean of each position is
            subtracted from both, because softmax ignores it.
        top1_agreement: share of positions where both prefer the same token.
        loss: mean next-token cross-entropy of the checkpoint, nats.
        oracle_loss: that of the oracle.
        tolerance: `relative_rms` up to which the two agree.
    """

    oracle: str
    inputs: str
    tokens: int
    max_abs: float
    relative_rms: float
    top1_agreement: float
    loss: float
    oracle_loss: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return bool(np.isfinite(self.relative_rms)) and self.relative_rms <= self.tolerance


def verify(
    source: str | Path,
    checkpoint: str | Path,
    *,
    text: Text | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> list[Comparison]:
    """Compares a checkpoint's logits with Hugging Face PyTorch's and, if it is installed, Hugging Face Flax's.

    Both are computed with exact attention, unless the source is an export with splats: then they are computed through
    the splats, in PyTorch by this package's own copy of the export's code.

    Args:
        source: the Hugging Face folder, or hub id, that the checkpoint was converted from, or exported to.
        checkpoint: the checkpoint folder.
        text: documents, as `gsa_jax.text_files` reads them, to compare on besides random ids; the first 8
            rows of 512 tokens at most.
        revision: of a hub's repository: a branch, a tag or a commit.
        subfolder: of the source, that holds the model.

    Raises:
        InputError: PyTorch is not installed, a folder or the text cannot be used, or the two have different shapes.
    """
    opened = open_source(source, revision=revision, subfolder=subfolder)
    config, tensors = load_tensors(checkpoint)
    planned = plan_source(opened)
    theirs = planned.config
    if opened.model_type != SPLAT_MODEL_TYPE:
        config = config.with_window("all")  # with all keys exact, whatever the checkpoint is used with
        theirs = dataclasses.replace(theirs, splats=config.splats)
    if theirs != config:
        raise InputError(f"{checkpoint}: has another configuration than {opened.folder}; was it converted from there?")
    inputs = [("random ids", *_random_ids(config))]
    if text is not None:
        inputs.append((as_text_files(text).name, *_text_ids(text, config, checkpoint)))
    tolerance = _tolerance(
        {opened.tensors[piece.tensor].dtype for piece in planned.sources.values()},
        {str(tensor.dtype) for tensor in tensors.values()},
    )
    graphdef, params = nnx.split(build_model(config, tensors, param_dtype=jnp.float32))
    forward = jax.jit(lambda params, ids, mask: nnx.merge(graphdef, params)(ids, mask))
    comparisons = []
    for name, oracle in _oracles(opened, read_tensors(opened, planned)):
        for label, ids, mask in inputs:
            ours = np.asarray(forward(params, ids, mask))
            comparisons.append(_compare(name, label, tolerance, ids, mask, ours, oracle(ids, mask)))
    return comparisons


def _compare(
    name: str, label: str, tolerance: float, ids: np.ndarray, mask: np.ndarray, ours: np.ndarray, theirs: np.ndarray
) -> Comparison:
    real, reference = ours[mask].astype(np.float64), theirs[mask].astype(np.float64)
    difference = real - reference
    centred = reference - reference.mean(axis=-1, keepdims=True)
    centred_difference = difference - difference.mean(axis=-1, keepdims=True)
    scale = np.sqrt(np.mean(centred**2))
    return Comparison(
        oracle=name,
        inputs=label,
        tokens=int(mask.sum()),
        max_abs=float(np.abs(difference).max()),
        relative_rms=float(np.sqrt(np.mean(centred_difference**2)) / scale),
        top1_agreement=float(np.mean(real.argmax(-1) == reference.argmax(-1))),
        loss=float(mean_next_token_loss(jnp.asarray(ours), jnp.asarray(ids), jnp.asarray(mask))),
        oracle_loss=float(mean_next_token_loss(jnp.asarray(theirs), jnp.asarray(ids), jnp.asarray(mask))),
        tolerance=tolerance,
    )


def _tolerance(source_dtypes: set[str], checkpoint_dtypes: set[str]) -> float:
    narrowed = checkpoint_dtypes - source_dtypes
    return max([_NARROWED_TOLERANCE.get(dtype, _TOLERANCE) for dtype in narrowed], default=_TOLERANCE)


def _random_ids(config: GPTNeoConfig) -> tuple[np.ndarray, np.ndarray]:
    """Two rows, the second one padded on the left."""
    length = min(_RANDOM_TOKENS, config.max_position_embeddings)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, length), dtype=np.int32)
    mask = np.ones(ids.shape, bool)
    mask[1, : length // 3] = False
    return ids, mask


def _text_ids(text: Text, config: GPTNeoConfig, checkpoint: str | Path) -> tuple[np.ndarray, np.ndarray]:
    context = min(_TEXT_CONTEXT, config.max_position_embeddings)
    rows = text_rows(read_documents(text, _MAX_TEXT_ROWS), open_tokenizer(checkpoint), config, context)
    return rows.input_ids[:_MAX_TEXT_ROWS], rows.attention_mask[:_MAX_TEXT_ROWS]


def _oracles(source: Source, tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, Oracle]]:
    try:
        import torch
        import transformers
    except ImportError:
        raise InputError("gsa verify runs the PyTorch model; install it with: pip install 'gsa-jax[torch]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    through_splats = source.model_type == SPLAT_MODEL_TYPE
    donor = source.config.donor
    model_class: Any = getattr(transformers, DONORS[donor].architecture)
    config_class: Any = model_class.config_class
    if through_splats:
        from gsa_jax.convert.pytorch.configuration_gsa import GSAConfig as config_class
        from gsa_jax.convert.pytorch.modeling_gsa import GSAForCausalLM as model_class
    names = ""
    try:
        config = config_class.from_pretrained(source.folder)
    except (ValueError, TypeError, OSError):  # its layers or its bytes are as only `gsa_jax.config` reads them
        config = config_class.from_dict(source.config.to_hf())
        names = ", configuration by our names"
    # The other implementations of GPT-2's attention leave out what scales it in some configurations.
    config._attn_implementation = "eager"
    loaded: Any = model_class.from_pretrained(source.folder, config=config, output_loading_info=True)
    model, info = loaded
    if info["missing_keys"] or any(parameter.is_meta for parameter in model.parameters()):
        # transformers fills tensors that it does not find with random numbers. It misses names behind a wrapper
        # (`module.`), which only `gsa_jax.convert.names` strips. And if the source holds the tied head in place of the
        # embedding, the embedding is left without data.
        used = {name: tensor for name, tensor in tensors.items() if through_splats or not is_splat(name)}
        stored = LAYOUTS[source.model_type].write(used)
        own = {name: torch.tensor(np.asarray(tensor, np.float32)) for name, tensor in stored.items()}
        model = model_class(model.config)
        model.load_state_dict({**own, "lm_head.weight": own[TOKEN_EMBEDDING]}, strict=True)
        names += ", weights by our names"
    model = model.float().eval()

    def run_torch(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        with torch.no_grad():
            output = model(
                torch.from_numpy(ids).long(),
                attention_mask=torch.from_numpy(mask).long(),
                position_ids=torch.from_numpy(positions).long(),
            )
        return output.logits.numpy()

    what = ", through splats" if through_splats else ""
    yield f"PyTorch (transformers {transformers.__version__}){what}{names}", run_torch
    if through_splats or int(transformers.__version__.split(".")[0]) >= 5:
        return  # Flax models are gone from there, and know no splats
    usual = {**DONORS[donor].defaults, **DONORS[donor].fixed}
    if any(getattr(source.config, name) != usual.get(name, False) for name in _NOT_READ_BY_FLAX):
        return
    # Imported by name, because a type checker may look at transformers 5.
    module = importlib.import_module(f"transformers.models.{donor}.modeling_flax_{donor}")
    flax_class = getattr(module, f"Flax{DONORS[donor].architecture}")
    bridge = importlib.import_module("transformers.modeling_flax_pytorch_utils")
    flax_model = flax_class(model.config)
    flax_params = bridge.convert_pytorch_state_dict_to_flax(model.state_dict(), flax_model)

    def run_flax(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        output = flax_model(ids, attention_mask=mask.astype(np.int32), position_ids=positions, params=flax_params)
        return np.asarray(output.logits)

    yield f"Flax (transformers {transformers.__version__}){names}", run_flax
