"""Reading a PyTorch checkpoint folder, one tensor at a time.

May be changed here: which files of a folder are read, and what is refused at first sight. A format is a function from a
file to its tensors' shapes and a way to read one of them; nothing here knows what a tensor is for. Where a folder comes
from is `gsa_jax.convert.hub`; PyTorch's own format is `gsa_jax.convert.torch_files`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from gsa_jax.checkpoint import CONFIG_FILE
from gsa_jax.config import GPTNeoConfig, read_config
from gsa_jax.convert.hub import find_folder
from gsa_jax.convert.torch_files import open_torch_file
from gsa_jax.errors import InputError, listed

_FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

WEIGHT_STEMS = ("model.safetensors", "pytorch_model.bin")
"""Names of weight files, in the order in which they are looked for; with `.index.json`, of lists of shards."""

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

_IMPOSTORS = (
    (b"version https://git-lfs", "a git-lfs pointer in place of the file; fetch it first: git lfs pull"),
    (b"<!doctype", "an HTML page in place of the file; download it again"),
    (b"<html", "an HTML page in place of the file; download it again"),
)


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """A tensor in a file, not yet read.

    Attributes:
        dtype: numpy's name for it.
        file: that holds it.
        read: reads it into memory.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened Hugging Face folder.

    Attributes:
        files: that hold the tensors, and their index if there is one.
        containers: a phrase for each file whose state dict stood in another dict: what it was taken out of.
    """

    folder: Path
    config: GPTNeoConfig
    tensors: dict[str, SourceTensor]
    files: tuple[Path, ...]
    containers: tuple[str, ...]


def open_source(source: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Source:
    """Opens a local Hugging Face folder, or downloads one named by a hub id (`owner/name`).

    Looks for `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin` and
    `pytorch_model.bin.index.json`, in this order.

    Args:
        revision: of the hub's repository: a branch, a tag or a commit.
        subfolder: of the folder or repository, that holds the model.

    Raises:
        InputError: there is no such folder, or what it holds cannot be read as a GPT-Neo checkpoint.
    """
    folder = find_folder(str(source), check_config, WEIGHT_STEMS, revision=revision, subfolder=subfolder)
    config = check_config(folder)
    files = _weight_files(folder)
    tensors: dict[str, SourceTensor] = {}
    containers: list[str] = []
    for file in files:
        if file.suffix == ".json":
            continue
        refuse_impostor(file)
        if file.stat().st_size == 0:
            raise InputError(f"{file}: the file is empty")
        opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file, containers)
        for name, tensor in opened.items():
            if name in tensors:
                raise InputError(f"{file}: tensor {name} is in {tensors[name].file.name} as well")
            tensors[name] = tensor
    if not tensors:
        raise InputError(f"{folder}: its weight files hold no tensors")
    return Source(folder, config, tensors, tuple(files), tuple(containers))


def check_config(folder: Path) -> GPTNeoConfig:
    """The configuration of a Hugging Face folder.

    Raises:
        InputError: it cannot be used, or this is an adapter for another model.
    """
    adapter = next((name for name in _ADAPTER_FILES if (folder / name).exists()), None)
    if adapter is not None:
        raise InputError(
            f"{folder}: holds an adapter ({adapter}), not a model; merge it into its model first (PEFT: "
            "merge_and_unload, then save_pretrained), then convert the result"
        )
    if (folder / CONFIG_FILE).is_file():
        refuse_impostor(folder / CONFIG_FILE)
    return read_config(folder / CONFIG_FILE)


def refuse_impostor(file: Path) -> None:
    """Raises `InputError` if a file cannot be read, or is what stands in for files that were not fetched."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    for beginning, what in _IMPOSTORS:
        if head.lstrip().lower().startswith(beginning):
            raise InputError(f"{file}: {what}")


def _weight_files(folder: Path) -> list[Path]:
    for stem in WEIGHT_STEMS:
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            refuse_impostor(index)
            return [*_shards(index), index]
    raise InputError(f"{folder}: no weights in it (model.safetensors or pytorch_model.bin, whole or with an index)")


def _shards(index: Path) -> list[Path]:
    names = shard_names(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(f"{index}: shards are missing: {listed(missing)}")
    return [index.parent / name for name in names]


def shard_names(index: Path) -> list[str]:
    """Names of the files that an index of shards lists, all of them beside it."""
    try:
        weight_map: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: not an index of shards (no weight_map in it)") from None
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InputError(f"{index}: names shards that do not stand beside it: {listed(outside)}")
    return names


def _open_safetensors(file: Path) -> dict[str, SourceTensor]:
    def read(name: str) -> np.ndarray:
        # Opened anew for each tensor, so that pages of tensors already read do not stay mapped.
        with safe_open(file, framework="numpy") as handle:
            return handle.get_tensor(name)

    try:
        with safe_open(file, framework="numpy") as handle:
            tensors = {}
            for name in handle.keys():  # noqa: SIM118 (the handle is no dict)
                view = handle.get_slice(name)
                stored = str(view.get_dtype())
                tensors[name] = SourceTensor(
                    tuple(view.get_shape()), _FLOAT_DTYPES.get(stored, stored), file, functools.partial(read, name)
                )
            return tensors
    except SafetensorError as error:
        raise InputError(f"{file}: truncated or not a safetensors file ({error})") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error})") from error


def _open_torch(file: Path, containers: list[str]) -> dict[str, SourceTensor]:
    opened = open_torch_file(file)
    if opened.opened:
        left = f"; left behind: {', '.join(opened.left)}" if opened.left else ""
        containers.append(f"{file.name}: {'.'.join(opened.opened)}{left}")
    return {
        name: SourceTensor(tensor.shape, tensor.dtype, file, functools.partial(opened.read, name))
        for name, tensor in opened.tensors.items()
    }
