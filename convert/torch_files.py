"""Files that `torch.save` wrote, read without PyTorch: where each tensor of a state dict lies.

Two formats: archives of PyTorch 1.6 and later, in which each storage is a record, uncompressed; and what came before,
a pickle after which the storages stand one after the other.

May be changed here: what of a file is looked at. What its pickle may hold is `gsa_jax.convert.unpickler`.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from gsa_jax.convert.unpickler import DTYPES, MAX_BYTES, PickleError, StoredTensor, unpickle
from gsa_jax.errors import InputError, first_line

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
"""What a file from before the archives begins with."""

_RECORD = b"PK\x03\x04"
"""What a record of an archive begins with, and so the archive."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a record in an archive: the signature, then how long its name and its extra field are."""

CONTAINERS = ("model", "state_dict", "module", "model_state_dict")
"""Entries under which trainers put the weights, beside the state of their optimizer."""


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """A state dict in a file.

    Attributes:
        tensors: by name.
        offsets: where each storage begins in the file, by its key.
        opened: the entries that the state dict was taken out of, outermost first.
        left: other entries that stood beside it.
    """

    file: Path
    tensors: dict[str, StoredTensor]
    offsets: dict[str, int]
    opened: tuple[str, ...]
    left: tuple[str, ...]

    def read(self, name: str) -> np.ndarray:
        """Copies a tensor into memory; nothing of the file stays mapped."""
        tensor = self.tensors[name]
        dtype = jnp.dtype(tensor.dtype)
        if not tensor.span:
            return np.empty(tensor.shape, dtype)
        start = self.offsets[tensor.storage.key] + tensor.offset * dtype.itemsize
        mapped = np.memmap(self.file, np.uint8, "r", start, (tensor.span * dtype.itemsize,))
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.array(np.ndarray(tensor.shape, dtype, mapped.data, strides=strides), order="C")


def open_torch_file(file: Path) -> TorchFile:
    """Finds the tensors of a file that `torch.save` wrote; reads nothing but its pickle.

    Raises:
        InputError: the file is damaged, or holds anything but a state dict.
        OSError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            read = _read_archive if stream.read(4) == _RECORD else _read_legacy
            stream.seek(0)
            content, offsets = read(stream)
    except PickleError as error:
        raise InputError(f"{file}: {error}") from error
    state, opened, left = _take_out(file, content)
    strangers = [str(name)[:100] for name, value in state.items() if not isinstance(value, StoredTensor)]
    if strangers:
        raise InputError(
            f"{file}: not a state dict: {', '.join(strangers[:5])} hold no tensors; save the weights alone instead: "
            "torch.save(model.state_dict(), 'pytorch_model.bin')"
        )
    return TorchFile(file, {str(name): tensor for name, tensor in state.items()}, offsets, opened, left)


def _take_out(file: Path, content: Any) -> tuple[dict[Any, Any], tuple[str, ...], tuple[str, ...]]:
    """The state dict, the entries it was taken out of, and those that are left behind."""
    opened: list[str] = []
    left: list[str] = []
    while True:
        if isinstance(content, StoredTensor) or not isinstance(content, dict) or not content:
            raise InputError(f"{file}: not a state dict but a {type(content).__name__}, or an empty one")
        inner = [name for name in CONTAINERS if isinstance(content.get(name), dict)]
        if not inner:
            return content, tuple(opened), tuple(left)
        if len(inner) > 1:
            raise InputError(f"{file}: holds two models, {' and '.join(inner)}; save one of them alone instead")
        opened.append(inner[0])
        left.extend(str(name)[:100] for name in content if name != inner[0])
        content = content[inner[0]]


def _read_archive(stream: IO[bytes]) -> tuple[Any, dict[str, int]]:
    """The content of an archive, and where the storages of its tensors begin."""
    try:
        named = [info for info in zipfile.ZipFile(stream).infolist() if "/" in info.filename]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
        # What `zipfile` raises on archives that are damaged or of a kind that it does not know.
        raise PickleError(f"truncated or damaged ({first_line(error)})") from error
    records = {info.filename.partition("/")[2]: info for info in named}
    if len(records) < len(named):
        raise PickleError("damaged (two records of its archive have one name)")
    if "data.pkl" not in records:
        raise PickleError("an archive, but none that torch.save wrote (no data.pkl in it)")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in named):
        raise PickleError("its records are compressed or encrypted; save it anew instead, with torch.save")
    size = records["data.pkl"].file_size
    if size > MAX_BYTES:
        raise PickleError(f"its pickle has {size:,} bytes, expected {MAX_BYTES:,} at most")
    if "byteorder" in records:
        stream.seek(_place(stream, records, "byteorder", 3))
        if stream.read(3) == b"big":
            raise PickleError("it was saved on a big-endian machine; save it anew on another one instead")
    stream.seek(_place(stream, records, "data.pkl", size))
    content, storages = unpickle(io.BytesIO(stream.read(size)))
    return content, {key: _place(stream, records, f"data/{key}", storage.bytes) for key, storage in storages.items()}


def _place(stream: IO[bytes], records: Mapping[str, zipfile.ZipInfo], name: str, size: int) -> int:
    """Where a record of `size` bytes at least begins."""
    record, end = records.get(name), stream.seek(0, os.SEEK_END)
    if record is not None and record.compress_size >= size and 0 <= record.header_offset <= end:
        stream.seek(record.header_offset)
        header = stream.read(_LOCAL_HEADER.size)
        if len(header) == _LOCAL_HEADER.size and header[:4] == _RECORD:
            _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            start = record.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            if start + size <= end:
                return start
    raise PickleError(f"truncated or damaged ({name[:40]!a} is not there, or not whole)")


def _read_legacy(stream: IO[bytes]) -> tuple[Any, dict[str, int]]:
    """The same for a file from before the archives."""
    pickles = io.BytesIO(stream.read(MAX_BYTES))
    if unpickle(pickles)[0] != _MAGIC_NUMBER or unpickle(pickles)[0] != _PROTOCOL:
        raise PickleError("truncated, or not written by torch.save")
    unpickle(pickles)  # what machine it was saved on; numbers are little-endian, whatever it says
    content, storages = unpickle(pickles)
    keys, _ = unpickle(pickles)
    end = stream.seek(0, os.SEEK_END)
    start, offsets = pickles.tell(), {}
    for key in keys if isinstance(keys, list) else ():
        storage = storages.get(key) if isinstance(key, str) else None
        stream.seek(start)
        count = int.from_bytes(stream.read(8), "little")
        if storage is None or count * DTYPES[storage.dtype] != storage.bytes or start + 8 + storage.bytes > end:
            raise PickleError(f"truncated or damaged (storage {len(offsets)} of {len(storages)} is not whole)")
        offsets[key] = start + 8
        start += 8 + storage.bytes
    if offsets.keys() != storages.keys():
        raise PickleError(f"truncated or damaged ({len(offsets)} of {len(storages)} storages are there)")
    return content, offsets
