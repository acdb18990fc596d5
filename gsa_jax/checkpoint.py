"""A model on disk: one folder with Orbax weights, the configuration and the tokenizer.

    FOLDER/
      config.json        Hugging Face's fields, and `splats`; written last, so a folder without it is not a checkpoint
      weights/           Orbax: a flat dict from Hugging Face's tensor names to arrays
      conversion.json    where it came from and what was left behind
      tokenizer files    as the source had them

May be changed here: this layout, and how tensors become a model. The name of a tensor is its path in the model in
Hugging Face's words, e.g. `transformer.h.0.attn.attention.q_proj.weight`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from gsa_jax.config import GPTNeoConfig, read_config
from gsa_jax.errors import InputError, first_line
from gsa_jax.model import GPTNeoForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE = "config.json"
WEIGHTS_FOLDER = "weights"
REPORT_FILE = "conversion.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
"""Files that travel with the weights, unchanged, as far as the source has them."""

_HF_LEAF_NAMES = {"scale": "weight", "embedding": "weight"}
"""The leaves that Flax calls differently than PyTorch: of a layer norm and of an embedding."""


def _tensor_name(path: tuple[Any, ...]) -> str:
    *modules, leaf = (str(part) for part in path)
    return ".".join([*modules, _HF_LEAF_NAMES.get(leaf, leaf)])


def named_parameters(model: GPTNeoForCausalLM) -> dict[str, jax.Array]:
    """The parameters of a model by Hugging Face's names, splats included."""
    return {_tensor_name(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def expected_shapes(config: GPTNeoConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that a model of this configuration has; allocates nothing."""
    model = nnx.eval_shape(lambda: GPTNeoForCausalLM(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {_tensor_name(path): tuple(leaf.get_value().shape) for path, leaf in flat}


def build_model(
    config: GPTNeoConfig,
    tensors: Mapping[str, np.ndarray | jax.Array],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike | None = None,
    remat: bool = False,
) -> GPTNeoForCausalLM:
    """A model with these parameters, without initialising others first.

    Args:
        tensors: exactly the parameters of `expected_shapes(config)`, in any floating dtype.
        dtype: of the computation.
        param_dtype: of the parameters; as `tensors` has them if None.

    Raises:
        InputError: tensors are missing, left over or of another shape; all of them are listed.
    """
    problems = shape_problems(expected_shapes(config), {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if problems:
        raise InputError("tensors do not fit the configuration: " + "; ".join(problems))
    model = nnx.eval_shape(lambda: GPTNeoForCausalLM(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
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


def save_tensors(folder: Path, config: GPTNeoConfig, tensors: Mapping[str, np.ndarray | jax.Array]) -> None:
    """Writes weights and configuration into an existing folder, configuration last; all processes call this."""
    # An interrupt lands in the main thread, which waits here for the other one. Raised inside of Orbax, it would leave
    # threads that go on writing into a folder that is being removed.
    with ThreadPoolExecutor(max_workers=1) as executor:
        executor.submit(_write_weights, folder.resolve() / WEIGHTS_FOLDER, dict(tensors)).result()
    (folder / CONFIG_FILE).write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")


def _write_weights(folder: Path, tensors: dict[str, np.ndarray | jax.Array]) -> None:
    context = ocp.Context()
    # Orbax would copy every host array before it writes the first.
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = 256 * 2**20
    # Compressed copies pile up in memory until their file is full, and weights hardly get smaller.
    context.array.saving.use_compression = False
    with context:
        ocp.save(str(folder), tensors)


def load_tensors(folder: str | Path) -> tuple[GPTNeoConfig, dict[str, np.ndarray]]:
    """Configuration and parameters of a checkpoint folder, in the dtypes they were stored in.

    Raises:
        InputError: the folder is not a checkpoint, is damaged, or its tensors do not fit its configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder")
    if not (folder / WEIGHTS_FOLDER).is_dir():
        remedy = f"; convert it first: gsa convert {folder} OUT" if (folder / CONFIG_FILE).exists() else ""
        raise InputError(f"{folder}: not a gsa-jax checkpoint (no {WEIGHTS_FOLDER}/ in it){remedy}")
    config = read_config(folder / CONFIG_FILE)
    try:
        stored = ocp.load(str(folder.resolve() / WEIGHTS_FOLDER))
        tensors = {name: np.asarray(tensor) for name, tensor in stored.items()}
    except Exception as error:  # Orbax and TensorStore have no common class for what a damaged file leads to
        raise InputError(f"{folder / WEIGHTS_FOLDER}: damaged checkpoint ({first_line(error)})") from error
    problems = shape_problems(expected_shapes(config), {name: tensor.shape for name, tensor in tensors.items()})
    if problems:
        raise InputError(f"{folder}: tensors do not fit the configuration: " + "; ".join(problems))
    return config, tensors


def load(
    folder: str | Path,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike | None = None,
    remat: bool = False,
    window: int | Literal["all"] | None = None,
) -> GPTNeoForCausalLM:
    """The model of a checkpoint folder; arguments as for `build_model`.

    Args:
        window: tokens that splat layers attend to exactly, instead of as many as the checkpoint says; `"all"` makes
            them exact, 0 leaves them nothing but splats.

    Raises:
        InputError: the folder is not a checkpoint, is damaged, or its tensors do not fit its configuration; or it has
            no splats and the window is finite.
    """
    config, tensors = load_tensors(folder)
    if window is not None:
        config = config.with_window(None if window == "all" else window)
    return build_model(config, tensors, dtype=dtype, param_dtype=param_dtype, remat=remat)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint or Hugging Face folder.

    Raises:
        InputError: the folder has none, or it cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(f"{folder}: no tokenizer in it (tokenizer.json, or vocab.json and merges.txt)")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise InputError(f"{folder}: its tokenizer cannot be read ({first_line(error)})") from error
