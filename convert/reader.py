"""Reading a PyTorch checkpoint folder, one tensor at a time.

May be changed here: file formats and where a folder comes from. A format is a function from a file to its tensors'
shapes and a way to read one of them; nothing here knows what a tensor is for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from gsa_jax.config import GPTNeoConfig, read_config
from gsa_jax.errors import InputError, first_line

_FLOAT_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
    """An opened Hugging Face folder."""

    folder: Path
    config: GPTNeoConfig
    tensors: dict[str, SourceTensor]


def open_source(source: str | Path) -> Source:
    """Opens a local Hugging Face folder, or downloads one named by a hub id (`owner/name`).

    Looks for `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin` and
    `pytorch_model.bin.index.json`, in this order.

    Raises:
        InputError: there is no such folder, or what it holds cannot be read as a GPT-Neo checkpoint.
    """
    folder = _resolve(str(source))
    config = read_config(folder / "config.json")
    tensors: dict[str, SourceTensor] = {}
    for file in _weight_files(folder):
        if file.stat().st_size == 0:
            raise InputError(f"{file}: the file is empty")
        opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
        for name, tensor in opened.items():
            if name in tensors:
                raise InputError(f"{file}: tensor {name} is in {tensors[name].file.name} as well")
            tensors[name] = tensor
    if not tensors:
        raise InputError(f"{folder}: its weight files hold no tensors")
    return Source(folder, config, tensors)


def _resolve(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{source}: is a file; give the folder that holds config.json and the weights")
    parts = source.split("/")
    if len(parts) != 2 or not all(parts) or source.startswith((".", "~")):
        raise InputError(f"{source}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.txt"]))
    except Exception as error:  # the hub's client lets errors of its HTTP library through, another one in each version
        raise InputError(f"{source}: no such folder, and not to be had from the hub ({first_line(error)})") from error


def _weight_files(folder: Path) -> list[Path]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return _shards(index)
    raise InputError(f"{folder}: no weights in it (model.safetensors or pytorch_model.bin, whole or with an index)")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: not an index of shards (no weight_map in it)") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(f"{index}: shards are missing: {', '.join(missing)}")
    return [index.parent / name for name in names]


def _open_safetensors(file: Path) -> dict[str, SourceTensor]:
    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            # Opened anew for each tensor, so that pages of tensors already read do not stay mapped.
            with safe_open(file, framework="numpy") as handle:
                return handle.get_tensor(name)

        return read

    try:
        with safe_open(file, framework="numpy") as handle:
            tensors = {}
            for name in handle.keys():  # noqa: SIM118 (the handle is no dict)
                view = handle.get_slice(name)
                stored = str(view.get_dtype())
                tensors[name] = SourceTensor(
                    tuple(view.get_shape()), _FLOAT_DTYPES.get(stored, stored), file, reader(name)
                )
            return tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: truncated or not a safetensors file ({error})") from error


def _open_pickle(file: Path) -> dict[str, SourceTensor]:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{file}: reading a .bin file needs PyTorch; install it with: pip install 'gsa-jax[torch]'"
        ) from None
    try:
        # Files of torch >= 1.6 are archives and can be mapped; older ones have to be read whole.
        state = torch.load(file, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(file))
    except Exception as error:  # there is no telling what an unpickler stumbles over in a damaged file
        raise InputError(f"{file}: truncated, or not a file that PyTorch loads safely ({first_line(error)})") from error
    if not isinstance(state, dict) or not state:
        raise InputError(f"{file}: not a state dict but a {type(state).__name__}")
    strangers = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise InputError(f"{file}: not a state dict: {', '.join(strangers[:5])} hold no tensors")

    def reader(tensor: Any) -> Callable[[], np.ndarray]:
        tensor = tensor.detach()  # an `nn.Parameter` refuses to become an array

        def read() -> np.ndarray:
            if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16 of its own
                return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
            return tensor.numpy()

        return read

    return {
        str(name): SourceTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), file, reader(tensor))
        for name, tensor in state.items()
    }
