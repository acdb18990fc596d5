"""A model on disk: one folder with Orbax weights, the configuration and the tokenizer.

    FOLDER/
      config.json        Hugging Face's fields, and `splats`; written last, so a folder without it is not a checkpoint
      weights/           Orbax: a flat dict from Hugging Face's tensor names to arrays
      config.carried.json  fields of the source's config.json that this model has no use for; in config.json as well
      conversion.json    where it came from and what was left behind
      tokenizer files    as the source had them

May be changed here: this layout. How tensors become a model is `gsa_jax.parameters`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from gsa_jax.config import DTYPES, GPTNeoConfig, carried_fields, read_config
from gsa_jax.errors import InputError, first_line, listed
from gsa_jax.files import new_folder
from gsa_jax.generation_config import read_generation_config
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.parameters import build_model, expected_shapes, shape_problems
from gsa_jax.sharding import require_backend, same_path_everywhere, wait_for_all, whole_on_host
from gsa_jax.splat_config import Window
from gsa_jax.tokenizer import Tokenizer, light_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE = "config.json"
WEIGHTS_FOLDER = "weights"
REPORT_FILE = "conversion.json"
CARRIED_FILE = "config.carried.json"

_VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
"""Any of which is a tokenizer, with the files beside it."""

TOKENIZER_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "generation_config.json",
)
"""Files, and a folder, that travel with the weights, unchanged, as far as the source has them."""

OWN_FILES = (REPORT_FILE, CARRIED_FILE)
"""Files of a checkpoint that go along to one that is made of it, and that no Hugging Face folder has."""


def save(
    out: Path,
    config: GPTNeoConfig,
    tensors: Mapping[str, np.ndarray | jax.Array],
    *,
    copied: Iterable[Path],
    reports: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes a checkpoint folder, all or nothing; where several processes train a model, all of them call this.

    Args:
        out: the folder to make; must not exist.
        tensors: the parameters by their names; on a mesh, each process may hold parts of them.
        copied: files to put beside, such as `tokenizer_files(source)`.
        reports: JSON files to put beside, by their names.

    Raises:
        InputError: the folder exists or cannot be written, or the disk is full.
    """
    whole = {name: whole_on_host(tensor) for name, tensor in tensors.items()}
    is_first = jax.process_index() == 0
    needed = sum(tensor.nbytes for tensor in whole.values())
    with new_folder(out, needed_bytes=needed) if is_first else contextlib.nullcontext(out) as staging:
        staging = same_path_everywhere(staging)
        if is_first:
            copy_files(copied, staging)
            for name, report in (reports or {}).items():
                (staging / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        # An interrupt lands in the main thread, which waits here for the other one. Raised inside of Orbax, it would
        # leave threads that go on writing into a folder that is being removed.
        with ThreadPoolExecutor(max_workers=1) as executor:
            executor.submit(_write_weights, staging.resolve() / WEIGHTS_FOLDER, whole).result()
        (staging / CONFIG_FILE).write_text(
            json.dumps(_carried(staging) | config.to_hf(), indent=2) + "\n", encoding="utf-8"
        )
        wait_for_all("model written")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that travel with its weights."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


def travelling_files(folder: Path) -> list[Path]:
    """The files that go from a checkpoint to one that is made of it: those of its tokenizer, and `OWN_FILES`."""
    return [*tokenizer_files(folder), *(folder / name for name in OWN_FILES if (folder / name).is_file())]


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary in a folder."""
    return any((folder / name).exists() for name in _VOCABULARIES)


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copies files, and folders of files, into a folder."""
    for file in files:
        if file.is_dir():
            shutil.copytree(file, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)


def _carried(folder: Path) -> dict[str, Any]:
    """Fields that `config.json` has beside the model's own."""
    file = folder / CARRIED_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: damaged ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: damaged (no fields in it)")
    return carried_fields(values)


def is_hub_id(source: str) -> bool:
    """Whether this could name a model of a hub: `owner/name`."""
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and not source.startswith((".", "~"))


def _write_weights(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    context = ocp.Context()
    # Orbax would copy every host array before it writes the first.
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = 256 * 2**20
    # Compressed copies pile up in memory until their file is full, and weights hardly get smaller.
    context.array.saving.use_compression = False
    with context:
        ocp.save(str(folder), tensors)


DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, FileNotFoundError)
"""What Orbax and TensorStore raise on damaged or missing files; everything else has another cause."""


def refuse_unreadable(folder: Path) -> None:
    """Raises `InputError` if this user may not read something in a folder, which Orbax would take for damage."""
    for path in (folder, *folder.rglob("*")):
        if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            raise InputError(f"{path}: cannot be read (no permission)")


def load_tensors(folder: str | Path) -> tuple[GPTNeoConfig, dict[str, np.ndarray]]:
    """Configuration and parameters of a checkpoint folder, in the dtypes they were stored in.

    Raises:
        InputError: the folder is not a checkpoint, is damaged, or its tensors do not fit its configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        remedy = (
            f"; if it is on a hub, fetch it first: gsa convert {folder} OUT, or, if it is a checkpoint there, "
            f"hf download {folder} --local-dir OUT"
        )
        raise InputError(f"{folder}: no such checkpoint folder{remedy if is_hub_id(str(folder)) else ''}")
    if not (folder / WEIGHTS_FOLDER).is_dir():
        remedy = f"; convert it first: gsa convert {folder} OUT" if (folder / CONFIG_FILE).exists() else ""
        raise InputError(f"{folder}: not a gsa-jax checkpoint (no {WEIGHTS_FOLDER}/ in it){remedy}")
    config = read_config(folder / CONFIG_FILE)
    require_backend()
    refuse_unreadable(folder / WEIGHTS_FOLDER)
    try:
        stored = ocp.load(str(folder.resolve() / WEIGHTS_FOLDER))
        tensors = {name: np.asarray(tensor) for name, tensor in stored.items()}
    except DAMAGE as error:
        raise InputError(f"{folder / WEIGHTS_FOLDER}: damaged checkpoint ({first_line(error)})") from error
    problems = shape_problems(expected_shapes(config), {name: tensor.shape for name, tensor in tensors.items()})
    if problems:
        raise InputError(f"{folder}: tensors do not fit the configuration: {listed(problems)}")
    return config, tensors


def load(
    folder: str | Path,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike | None = None,
    remat: bool = False,
    window: Window | None = None,
    kept: int | None = None,
    attention_implementation: str = "auto",
) -> GPTNeoForCausalLM:
    """The model of a checkpoint folder, with what its `generation_config.json` says of generation.

    Args:
        dtype: of the computation.
        param_dtype: of the parameters; as the folder has them if None.
        remat: recompute each block in the backward pass instead of keeping its activations.
        window: tokens that splat layers attend to exactly, instead of as many as the checkpoint says; `"all"` makes
            them exact, 0 leaves them splats and kept keys.
        kept: keys beyond the window that each head of a splat layer sees exactly, instead of as many as the checkpoint
            says; with `window="all"` there are none.
        attention_implementation: what computes exact attention: `auto`, `xla`, `splash` (TPU) or `cudnn` (NVIDIA GPU).

    Raises:
        InputError: the folder is not a checkpoint, is damaged, or its tensors do not fit its configuration; it has
            no splats and the window is finite; keys are to be kept with an infinite one; or its
            `generation_config.json` cannot be used.
    """
    config, tensors = load_tensors(folder)
    return model_of(
        folder,
        config,
        tensors,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
        window=window,
        kept=kept,
        attention_implementation=attention_implementation,
    )


def model_of(
    folder: str | Path,
    config: GPTNeoConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    dtype: jax.typing.DTypeLike,
    param_dtype: jax.typing.DTypeLike | None,
    remat: bool,
    window: Window | None,
    kept: int | None,
    attention_implementation: str,
) -> GPTNeoForCausalLM:
    """What `load` gives, of parameters that have been read: from a checkpoint folder, or a Hugging Face one."""
    try:
        computed_in = jnp.dtype(dtype).name
    except TypeError:
        raise InputError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}") from None
    config = dataclasses.replace(
        config.with_window(window, kept),
        dtype=computed_in,
        remat=remat,
        attention_implementation=attention_implementation,
    )
    model = build_model(config, tensors, param_dtype=param_dtype)
    model.generation_config = read_generation_config(Path(folder), config)
    return model


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint or Hugging Face folder, as everything in this package uses it.

    It gives the ids and texts that `load_tokenizer`'s gives under transformers 4, and is there in hundredths of a
    second where the folder has a `tokenizer.json`; `gsa_jax.tokenizer` says when `transformers` is needed all the same.

    Raises:
        InputError: the folder has none, or it cannot be read.
    """
    folder = _with_tokenizer(folder)
    # The model says how long a text may be, in an error; the tokenizer would say so too, in a warning.
    return light_tokenizer(folder) or _from_transformers(folder, model_max_length=sys.maxsize)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint or Hugging Face folder, of `transformers`, with all that those can do.

    Importing `transformers` takes seconds; `open_tokenizer` does without where it can.

    Raises:
        InputError: the folder has none, or it cannot be read.
    """
    return _from_transformers(_with_tokenizer(folder))


def _with_tokenizer(folder: str | Path) -> Path:
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise InputError(
            f"{folder}: no tokenizer in it (tokenizer.json, or vocab.json and merges.txt); copy its files there, or "
            "convert the model again with --tokenizer FOLDER"
        )
    return folder


def _from_transformers(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise InputError(f"{folder}: its tokenizer cannot be read ({first_line(error)})") from error
