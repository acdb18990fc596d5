"""The checkpoints of a training run: saved in the background, whole or absent, checked when they are read.

    FOLDER/STEP/
      state/        Orbax: a flat dict from names such as `params.transformer.wte.weight` to arrays
      data/         data.json: where the data iterator stood
      config/       data.json: the resolved configuration of the run
      checksums/    data.json: of every array and of the iterator's state
    FOLDER/STEP.damaged/    a checkpoint that could not be read and was passed over; for a person to look at or remove

May be changed here: this layout, which checkpoints are kept, and what counts as damaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from orbax.checkpoint import v1 as ocp

from gsa_jax.checkpoint import DAMAGE, refuse_claims, refuse_unreadable
from gsa_jax.errors import InputError, first_line, listed
from gsa_jax.files import is_disk_full
from gsa_jax.json_files import read_json
from gsa_jax.parameters import shape_problems


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run goes on from.

    Attributes:
        step: number of steps that led to this state.
        state: pytree as it was saved, bit for bit, with the shardings that were asked for.
        data: state of the data iterator.
        passed_over: a line for each newer checkpoint that was damaged: where it is now, and what is wrong with it.
    """

    step: int
    state: Any
    data: dict[str, Any]
    passed_over: list[str]


class RunCheckpoints:
    """The newest checkpoints of a run. A context manager; leaving it waits for the save under way.

    Every process of a run makes the same calls in the same order. An error of a save in the background is raised by
    the next call of `save`, `wait`, `latest` or `close`; after that, the object saves no more.

    Args:
        folder: where the checkpoints are; made if absent. What killed saves left in it is removed.
        keep: how many are kept, the newest ones. An older one goes only when a newer one is complete.

    Raises:
        InputError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        if keep < 1:
            raise InputError(f"{keep} checkpoints to keep; it takes at least 1 to go on from")
        self._folder = folder.resolve()
        self._failed = False
        try:
            self._checkpointer = ocp.training.Checkpointer(
                str(self._folder),
                context=_context(),
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise InputError(f"{folder}: cannot hold checkpoints ({error.strerror or first_line(error)})") from error
        except DAMAGE as error:  # Orbax looks at what all of them say of themselves
            raise InputError(
                f"{folder}: one of its _CHECKPOINT_METADATA is damaged ({first_line(error)}); remove that checkpoint"
            ) from error

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint that is complete; waits for a save under way."""
        self.wait()
        return self._newest()

    def save(self, step: int, state: Any, data: dict[str, Any], config: dict[str, Any], *, wait: bool = False) -> None:
        """Saves a checkpoint in the background; a step that is saved already is left as it is.

        Returns as soon as the state is copied, so that its buffers may be donated.

        Args:
            step: later than that of any checkpoint in the folder.
            state: pytree of arrays.
            data: JSON, state of the data iterator.
            config: JSON, written for people to read; `restore` does not look at it.
            wait: return only when the checkpoint is complete.

        Raises:
            InputError: the disk is full or cannot be written, now or in the save before; the older checkpoints stay.
            ValueError: there is a later checkpoint, so this run has not gone on from it.
        """
        latest = self.latest
        if step == latest:
            return
        if latest is not None and step < latest:
            raise ValueError(f"step {step} cannot be saved after step {latest}")
        named = _named_leaves(state)
        with self._naming_the_last_good_one():
            self._checkpointer.save_checkpointables_async(
                step,
                {"state": named, "data": data, "config": config, "checksums": _checksums(named, data)},
                force=True,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
            InputError: it failed because the disk is full or cannot be written.
        """
        if not self._failed:
            with self._naming_the_last_good_one():
                self._checkpointer.wait()

    def close(self) -> None:
        """Waits for the save under way and gives back its threads; raises as `wait` does, but no error twice."""
        if self._failed:
            with contextlib.suppress(Exception):
                self._checkpointer.close()
        else:
            with self._naming_the_last_good_one():
                self._checkpointer.close()

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is whole; None if there is none at all.

        Newer ones that are damaged are renamed to `STEP.damaged`, out of the way of the steps that come again.

        Args:
            abstract_state: pytree of `jax.ShapeDtypeStruct`, with shardings unless all is to be on one device. They may
                differ from those it was saved with.

        Raises:
            InputError: there are checkpoints, but all are damaged; or a readable one has other arrays than asked for.
        """
        steps = sorted((checkpoint.step for checkpoint in self._checkpointer.checkpoints), reverse=True)
        damage: dict[int, str] = {}
        for step in steps:
            try:
                state, data = self._load(step, abstract_state)
            except _DamagedError as error:
                damage[step] = str(error)
                continue
            return Restored(step, state, data, [self._set_aside(bad, reason) for bad, reason in damage.items()])
        if damage:
            listed = "; ".join(f"step {step}: {reason}" for step, reason in damage.items())
            raise InputError(f"{self._folder}: every checkpoint is damaged ({listed}); start in another folder")
        return None

    def _load(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        folder = self._folder / str(step)
        abstract = {name: _placed(leaf) for name, leaf in _named_leaves(abstract_state).items()}
        # One process may meet damage where the others read on. It must not leave them in a barrier of Orbax: each reads
        # for itself, and they agree before and after the one call that Orbax counts in every process.
        alone = _context()
        alone.multiprocessing.active_processes = {jax.process_index()}
        alone.multiprocessing.primary_host = jax.process_index()
        with alone, _damage_in_any_process():
            refuse_unreadable(folder)
            data, checksums = (read_json(folder / name / "data.json") for name in ("data", "checksums"))
            stored = ocp.checkpointables_metadata(str(folder)).metadata.get("state")
            if stored is None:
                raise ValueError("the list of its arrays cannot be read")
            refuse_claims(stored, folder)
            misfits = _misfits(abstract, stored)
        if misfits:
            raise InputError(f"{folder}: does not fit this run: {listed(misfits, 10)}")
        with alone, _damage_in_any_process():
            named = ocp.load_checkpointables(str(folder), {"state": abstract})["state"]
        changed = _changed(checksums, _checksums(named, data))
        if changed:
            raise _DamagedError(f"{changed} is not what was saved")
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [named[name] for name in abstract]), data

    def _set_aside(self, step: int, reason: str) -> str:
        source, target = self._folder / str(step), self._folder / f"{step}.damaged"
        if jax.process_index() == 0:
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
        multihost_utils.sync_global_devices(f"set aside {step}")
        self._checkpointer.reload()
        return f"{target}: passed over, damaged ({reason})"

    def _newest(self) -> int | None:
        newest = self._checkpointer.latest
        return newest.step if newest else None

    @contextlib.contextmanager
    def _naming_the_last_good_one(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            self._checkpointer.reload()
            newest = self._newest()
            left = "no checkpoint was saved" if newest is None else f"last good checkpoint: step {newest}"
            if is_disk_full(error):
                raise InputError(f"{self._folder}: the disk is full; {left}") from error
            if isinstance(error, OSError):
                raise InputError(f"{self._folder}: cannot be written ({first_line(error)}); {left}") from error
            raise


def saved_parameters(folder: Path, wanted: Callable[[str], bool]) -> dict[int, dict[str, np.ndarray]]:
    """By step, in order: the trained parameters whose names are wanted, or their moving average where one is kept.

    Nothing else of the checkpoints is read; those set aside as damaged are left out.

    Raises:
        InputError: a checkpoint cannot be read.
    """
    steps = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.exists() else []
    context = _context()
    context.pytree.loading.partial_load = True
    found = {}
    for step in steps:
        path = folder.resolve() / str(step)
        refuse_unreadable(path)
        try:
            with context:
                stored = ocp.checkpointables_metadata(str(path)).metadata["state"]
                tree = "ema." if any(name.startswith("ema.") for name in stored) else "params."
                leaves = {name: leaf for name, leaf in stored.items() if name.startswith(tree)}
                abstract = {
                    name: _placed(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
                    for name, leaf in leaves.items()
                    if wanted(name.removeprefix(tree))
                }
                state = ocp.load_checkpointables(str(path), {"state": abstract})["state"] if abstract else {}
        except DAMAGE as error:
            raise InputError(f"{path}: damaged ({first_line(_innermost(error))}); remove it") from error
        found[step] = {name.removeprefix(tree): np.asarray(tensor) for name, tensor in state.items()}
    return found


class _DamagedError(Exception):
    """A checkpoint that cannot be read, or not as it was saved."""


@contextlib.contextmanager
def _damage_in_any_process() -> Iterator[None]:
    reason = other = None
    try:
        yield
    except InputError as error:
        other = error
    except DAMAGE as error:
        reason = first_line(_innermost(error))
    except Exception as error:  # raised again, once the other processes have heard of it
        other = error
    found = multihost_utils.process_allgather(np.asarray([reason is not None, other is not None]))
    damaged, stopped = np.any(np.reshape(found, (-1, 2)), axis=0)
    if other is not None:
        raise other
    if stopped:
        raise InputError("another process cannot read the checkpoint, though it is not damaged")
    if damaged:
        raise _DamagedError(reason or "it is damaged for another process")


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    for name in ("data", "config", "checksums"):
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)  # a dict would become a pytree of scalars
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.array.saving.use_compression = False  # weights hardly get smaller
    return context


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two leaves of the state have the same name")
    return named


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Without a sharding, Orbax would ask for the devices that the state was saved from.
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _misfits(abstract: dict[str, jax.ShapeDtypeStruct], stored: dict[str, Any]) -> list[str]:
    problems = shape_problems(
        {name: tuple(leaf.shape) for name, leaf in abstract.items()},
        {name: tuple(leaf.shape) for name, leaf in stored.items()},
    )
    for name, leaf in abstract.items():
        if name in stored and stored[name].dtype != leaf.dtype:
            problems.append(f"{name} has dtype {stored[name].dtype}, expected {leaf.dtype}")
    return problems


def _checksums(named: dict[str, Any], data: Any) -> dict[str, int]:
    # All sums are computed in one program. On several devices, each program for one array would contain an exchange
    # between devices, and two such programs that devices start in different orders wait for each other forever.
    sums = jax.device_get(_bit_sums(named))
    data_sum = zlib.crc32(json.dumps(data, sort_keys=True).encode())
    return {**{name: int(value) for name, value in sums.items()}, "data/data.json": data_sum}


def _changed(saved: Any, found: dict[str, int]) -> str | None:
    if saved == found:
        return None
    # The checksums are read from a file, which may be damaged as well.
    differing = [name for name, value in found.items() if isinstance(saved, dict) and saved.get(name) != value]
    return differing[0] if differing else "checksums/data.json"


@jax.jit
def _bit_sums(named: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {name: _bit_sum(array) for name, array in named.items()}


def _bit_sum(array: Array) -> UInt32[Array, ""]:
    """Sum of the words of an array, each multiplied by an odd number that depends on its place.

    The factors are odd so that a single flipped bit always changes the sum modulo 2^32. The sum is computed where the
    array lies. Unlike a checksum of files, it is the same however the array is sharded.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, f"uint{8 * min(array.dtype.itemsize, 4)}").astype(jnp.uint32)
    place = jnp.uint32(0)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
