"""Reading a PyTorch checkpoint folder, one tensor at a time.

May be changed here: file formats. A format is a function from a file to its tensors' shapes and a way to read one of
them; nothing here knows what a tensor is for. Where a folder comes from is `gsa_jax.convert.hub`, which files of it are
read `gsa_jax.convert.folder`, and PyTorch's own format `gsa_jax.convert.torch_files`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from gsa_jax.config import CONFIG_FILE, GPTNeoConfig, read_config_values
from gsa_jax.convert.folder import check_config, refuse_checkpoint, refuse_stand_in, weight_files
from gsa_jax.convert.hub import FoundFolder, find_folder
from gsa_jax.convert.torch_files import open_torch_file
from gsa_jax.errors import InputError
from gsa_jax.files import refuse_foreign
from gsa_jax.tokenizer_folder import TOKENIZER_FILES

_FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
        values: all fields of its `config.json`.
        files: that hold the tensors, and their index if there is one.
        containers: a phrase for each file whose state dict stood in another dict: what it was taken out of.
        hub_id: `owner/name`, if the folder came from a hub.
    """

    folder: Path
    config: GPTNeoConfig
    values: dict[str, Any]
    tensors: dict[str, SourceTensor]
    files: tuple[Path, ...]
    containers: tuple[str, ...]
    hub_id: str | None

    @property
    def model_type(self) -> str:
        """How the tensors are named and stored."""
        return self.values["model_type"]


def open_source(source: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Source:
    """Opens a local Hugging Face folder, or downloads one named by a hub id (`owner/name`).

    Looks for `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin` and
    `pytorch_model.bin.index.json`, in this order.

    Args:
        revision: of the hub's repository: a branch, a tag or a commit.
        subfolder: of the folder or repository, that holds the model.

    Raises:
        InputError: there is no such folder, or what it holds cannot be read as a checkpoint of a donor.
    """
    return open_folder(find_folder(str(source), revision=revision, subfolder=subfolder))


def open_folder(found: FoundFolder) -> Source:
    """The same of a folder that has been found.

    Raises:
        InputError: what it holds cannot be read as a checkpoint of a donor.
    """
    folder = found.path
    refuse_checkpoint(folder, {path.name for path in folder.iterdir()})
    config, values = check_config(folder), read_config_values(folder / CONFIG_FILE)
    files = weight_files(folder)
    refuse_foreign(folder, [*(file.name for file in files), *TOKENIZER_FILES])
    tensors: dict[str, SourceTensor] = {}
    containers: list[str] = []
    for file in files:
        if file.suffix == ".json":
            continue
        refuse_stand_in(file)
        if file.stat().st_size == 0:
            raise InputError(f"{file}: the file is empty")
        opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file, containers)
        for name, tensor in opened.items():
            if name in tensors:
                raise InputError(f"{file}: tensor {name} is in {tensors[name].file.name} as well")
            tensors[name] = tensor
    if not tensors:
        raise InputError(f"{folder}: its weight files hold no tensors")
    return Source(folder, config, values, tensors, tuple(files), tuple(containers), found.hub_id)


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
