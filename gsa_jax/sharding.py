"""How a model is spread over devices, as the host sees it: the mesh, and where each array lives.

May be changed here: what is laid along the axes of the mesh. Three axes:

    data     rows of the batch
    fsdp     rows of the batch, and one side of each matrix, which is gathered where it is used
    tensor   heads with their splats, and the width of the MLP

Everything works without a mesh: then arrays are plain arrays. What a program says about arrays on a mesh while it is
compiled is `gsa_jax.ops.partition`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError, first_line
from gsa_jax.ops.partition import BATCH, MESH_AXES, TABLE

_SPECS = {
    r"\.(q_proj|k_proj|v_proj|c_fc)\.weight": P("tensor", "fsdp"),
    r"\.(out_proj|c_proj)\.weight": P("fsdp", "tensor"),
    r"\.(q_proj|k_proj|v_proj|c_fc)\.bias": P("tensor"),
    r"\.(wte|wpe)\.weight": TABLE,
    r"\.splat_\w+": P("tensor"),
}
"""Ends of Hugging Face's tensor names, with weights `[out, in]`; everything else is on every device."""


def require_backend() -> None:
    """Raises `InputError` if JAX finds no device of the kind that it was told to use."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the latter from a platform whose plugin is not installed
        raise InputError(
            f"JAX cannot use the platform it was told to (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}): "
            f"{first_line(error)}; install its plugin, or set JAX_PLATFORMS=cpu"
        ) from error


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of these devices, with axes of these sizes, whose product is the number of devices.

    Args:
        devices: all of all processes if None.
    """
    axes = tuple(sizes[axis] for axis in MESH_AXES)
    return jax.make_mesh(axes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def check_mesh(sizes: Mapping[str, int], config: GPTNeoConfig, rows: int) -> None:
    """Raises `InputError` if a mesh does not divide the model, or the rows that are computed at a time.

    Args:
        sizes: of the axes; `mesh.shape`.
        rows: of the batch, over all devices; of each part of it, where gradients are accumulated.
    """
    split = sizes["data"] * sizes["fsdp"]
    if rows % split:
        raise InputError(
            f"mesh data x fsdp = {split} does not divide the {rows} rows of a batch; take a multiple of {split}"
        )
    for axis, what, number in (
        ("tensor", "num_heads", config.num_heads),
        ("tensor", "the MLP's width", config.mlp_dim),
        ("fsdp", "hidden_size", config.hidden_size),
    ):
        if number % sizes[axis]:
            fitting = max(size for size in range(1, sizes[axis]) if number % size == 0)
            raise InputError(f"mesh {axis} = {sizes[axis]} does not divide {what} = {number}; {axis} = {fitting} would")


def partition_spec(name: str, shape: tuple[int, ...]) -> P:
    """How the parameter of this Hugging Face name is cut; `P()` for arrays that a parameter's name does not fit."""
    for end, spec in _SPECS.items():
        if re.search(end + "$", name) and len(spec) <= len(shape):
            return spec
    return P()


def shardings(mesh: Mesh | jax.sharding.AbstractMesh, tree: Any) -> Any:
    """A `NamedSharding` for each array of a pytree of arrays or their shapes.

    An array is cut as the parameter whose name is the innermost dict key on its path, so moments and averages of
    parameters are cut as the parameters are; counters are on every device.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        return NamedSharding(mesh, partition_spec(names[-1] if names else "", tuple(leaf.shape)))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def shard_tensors(mesh: Mesh, tensors: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Parameters from arrays on the host, which every process has; each device gets its own part and no more."""
    where = shardings(mesh, dict(tensors))
    return {
        name: jax.make_array_from_callback(tensor.shape, where[name], tensor.__getitem__)
        for name, tensor in tensors.items()
    }


def batch_share(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """`(index, count)`: a process reads part `index` of `count` equal parts of each batch's rows.

    Processes that hold different heads of the same rows (`tensor` reaches across them) read the same part.

    Args:
        process: its number; that of this process if None.

    Raises:
        InputError: two processes would have only some of their rows in common, or different numbers of rows.
    """
    process = jax.process_index() if process is None else process
    rows: dict[int, set[int]] = {}
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        rows.setdefault(device.process_index, set()).add(data * mesh.shape["fsdp"] + fsdp)
    parts = sorted({tuple(sorted(of_process)) for of_process in rows.values()})
    if len(set().union(*parts)) < sum(map(len, parts)) or len(set(map(len, parts))) > 1:
        raise InputError(
            f"mesh {dict(mesh.shape)} gives two processes some common rows and some of their own, or different "
            "numbers of rows; "
            "let tensor divide the devices of a process, or the other way round"
        )
    return parts.index(tuple(sorted(rows[process]))), len(parts)


def shard_batch(mesh: Mesh, local_batch: Any) -> Any:
    """Arrays of all processes' rows, from those of this process (see `batch_share`)."""
    where = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, np.asarray(x)), local_batch)


def whole_on_host(array: Array | np.ndarray) -> np.ndarray:
    """All of an array in the memory of every process; all processes call this."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def wait_for_all(what: str) -> None:
    """Returns when every process has called this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def same_path_everywhere(path: Path) -> Path:
    """The path that process 0 gives; all processes call this."""
    if jax.process_count() == 1:
        return path
    name = np.zeros(4096, np.uint8)
    encoded = np.frombuffer(str(path.resolve()).encode(), np.uint8)
    name[: len(encoded)] = encoded
    return Path(bytes(np.asarray(multihost_utils.broadcast_one_to_all(name))).rstrip(b"\0").decode())
