"""A model on disk: one folder with Orbax weights, the configuration and the tokenizer.

    FOLDER/
      config.json        Hugging Face's fields, and `splats`; written last, so a folder without it is not a checkpoint
      weights/           Orbax: a flat dict from Hugging Face's tensor names to arrays
      config.carried.json  fields of the source's config.json that this model has no use for; in config.json as well
      conversion.json    where it came from and what was left behind
      tokenizer files    as the source had them

May be changed here: this layout. How tensors become a model is `gsa_jax.parameters`; which files are a tokenizer,
and how it is opened, is `gsa_jax.tokenizer_folder`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from gsa_jax.config import CONFIG_FILE, DTYPES, GPTNeoConfig, carried_fields, read_config
from gsa_jax.errors import InputError, first_line, listed
from gsa_jax.files import new_folder, refuse_foreign
from gsa_jax.generation_config import read_generation_config
from gsa_jax.json_files import read_json
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.parameters import build_model, expected_shapes, shape_problems
from gsa_jax.sharding import require_backend, same_path_everywhere, wait_for_all, whole_on_host
from gsa_jax.splat_config import Window
from gsa_jax.tokenizer_folder import TOKENIZER_FILES, tokenizer_files

WEIGHTS_FOLDER = "weights"
REPORT_FILE = "conversion.json"
CARRIED_FILE = "config.carried.json"

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


def travelling_files(folder: Path) -> list[Path]:
    """The files that go from a checkpoint to one that is made of it: those of its tokenizer, and `OWN_FILES`."""
    return [*tokenizer_files(folder), *(folder / name for name in OWN_FILES if (folder / name).is_file())]


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
        values = read_json(file) if file.is_file() else {}
    except (ValueError, OSError) as error:
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


DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, FileNotFoundError, RecursionError)
"""What Orbax and TensorStore raise on damaged or missing files; everything else has another cause."""


def refuse_unreadable(folder: Path) -> None:
    """Raises `InputError` if this user may not read something in a folder, which Orbax would take for damage."""
    for path in (folder, *folder.rglob("*")):
        if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            raise InputError(f"{path}: cannot be read (no permission)")


_CLAIMED = 2**28
"""Bytes of arrays that files may claim to hold, beside `_COMPRESSED` times their own size."""
_COMPRESSED = 16


def refuse_claims(arrays: Any, folder: Path) -> None:
    """Raises `ValueError` if arrays, by what Orbax says of them, would take far more memory than their files.

    TensorStore makes an array of the shape that its file claims, and chunks of theirs, before it looks for the content.
    """
    total = 0
    for name, array in arrays.items():
        size = math.prod(array.shape)
        chunk = array.storage_metadata.chunk_shape if array.storage_metadata else None
        if chunk is not None and math.prod(chunk) > max(size, 1):
            raise ValueError(f"{name} {list(array.shape)} has chunks of {list(chunk)}")
        total += size * np.dtype(array.dtype).itemsize
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if total > _CLAIMED + _COMPRESSED * stored:
        raise ValueError(f"arrays of {total:,} bytes in files of {stored:,}")


def load_tensors(folder: str | Path) -> tuple[GPTNeoConfig, dict[str, np.ndarray]]:
    """Configuration and parameters of a checkpoint folder, in the dtypes they were stored in.

    Raises:
        InputError: the folder is not a checkpoint, is damaged, or its tensors do not fit its configuration.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):  # unlike Path.is_dir, False of a folder that may not be looked at
        remedy = (
            f"; if it is on a hub, fetch it first: gsa convert {folder} OUT, or, if it is a checkpoint there, "
            f"hf download {folder} --local-dir OUT"
        )
        raise InputError(f"{folder}: no such checkpoint folder{remedy if is_hub_id(str(folder)) else ''}")
    if not os.path.isdir(folder / WEIGHTS_FOLDER):
        remedy = f"; convert it first: gsa convert {folder} OUT" if os.path.exists(folder / CONFIG_FILE) else ""
        raise InputError(f"{folder}: not a gsa-jax checkpoint (no {WEIGHTS_FOLDER}/ in it){remedy}")
    refuse_foreign(folder, [CONFIG_FILE, WEIGHTS_FOLDER, *TOKENIZER_FILES, *OWN_FILES])
    config = read_config(folder / CONFIG_FILE)
    require_backend()
    refuse_unreadable(folder / WEIGHTS_FOLDER)
    weights = folder.resolve() / WEIGHTS_FOLDER
    try:
        claimed = ocp.metadata(str(weights)).metadata
        refuse_claims(claimed, weights)
        shapes = {name: tuple(tensor.shape) for name, tensor in claimed.items()}
        problems = shape_problems(expected_shapes(config), shapes)
        tensors = {} if problems else {name: np.asarray(tensor) for name, tensor in ocp.load(str(weights)).items()}
    except DAMAGE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / WEIGHTS_FOLDER}: damaged checkpoint ({first_line(error)})") from error
    if problems:
        raise InputError(f"{folder}: tensors do not fit the configuration: {listed(problems)}")
    odd = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype.name not in DTYPES]
    if odd:
        raise InputError(f"{folder}: tensors are none of {', '.join(DTYPES)}: {listed(odd)}")
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
