"""Output folders and files that are either whole or absent.

May be changed here: how a result is staged and what a full disk says. Everything that writes for a user goes through
`new_folder` or `new_file`, and what a run writes again and again through `replace_text`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from gsa_jax.errors import InputError


@contextlib.contextmanager
def new_folder(out: Path, *, needed_bytes: int) -> Iterator[Path]:
    """Gives a staging folder beside `out` that becomes `out` if the block succeeds and vanishes if it does not.

    Raises:
        InputError: `out` exists, its parent cannot be written, or the disk holds less than `needed_bytes`, before or
            while the block runs.
    """
    with _staged(out, needed_bytes) as staging:
        yield staging
        staging.chmod(0o755)  # mkdtemp makes folders that only their owner may read
        os.rename(staging, out)


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """Gives the path of a file to write, which becomes `out` if the block succeeds and vanishes if it does not.

    Raises:
        InputError: `out` exists, its parent cannot be written, or the disk is full.
    """
    with _staged(out, 0) as staging:
        yield staging / out.name
        os.rename(staging / out.name, out)


@contextlib.contextmanager
def _staged(out: Path, needed_bytes: int) -> Iterator[Path]:
    refuse_existing(out)
    new_parents = [parent for parent in out.parents if not os.path.exists(parent)]
    staging = None
    try:
        staging = _make_staging(out, needed_bytes)
        yield staging
    except Exception as error:
        if is_disk_full(error):
            raise InputError(f"{out}: the disk is full; nothing was written") from error
        raise
    finally:
        if staging is not None:
            _remove(staging)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # it stays if the result is in it
                parent.rmdir()


def _remove(folder: Path) -> None:
    """Removes a folder, also from under the writers of a save that failed: they end soon, but add files meanwhile."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def replace_text(path: Path, text: str) -> None:
    """Writes a file anew: a kill finds the old one or the new one, never half of one. Raises `OSError` if it cannot."""
    staged = path.with_name(f".{path.name}.partial")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def refuse_existing(out: Path) -> None:
    """Raises `InputError` if there is something at `out`; for callers who would rather know before they download."""
    if os.path.lexists(out):
        raise InputError(f"{out} exists already; choose another output or remove it first")


def refuse_foreign(folder: Path, names: Iterable[str] = (".",)) -> None:
    """Raises `InputError` if what is read of a folder is not its own: a link that leads out of it, a pipe, a device.

    A folder from a stranger could otherwise have any file of the reader copied, and uploaded with a model. Snapshots in
    the cache of `huggingface_hub` are links to the files in its `blobs`, and may be.

    Args:
        names: of files in it, and of folders that are read as a whole; those that are not there are passed over.
            Everything in it if they are left out.
    """
    real = Path(os.path.realpath(folder))
    own = [real, *(parent.parent / "blobs" for parent in real.parents if parent.name == "snapshots")]
    for name in names:
        for path in itertools.chain([folder / name], (folder / name).rglob("*")):  # looked into after it was looked at
            if path.is_symlink() and not any(Path(os.path.realpath(path)).is_relative_to(place) for place in own):
                raise InputError(f"{path}: is a link that leads out of its folder; put a copy in its place: cp -RL")
            try:
                mode = path.stat().st_mode
            except FileNotFoundError:
                continue
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from None
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise InputError(f"{path}: neither a file nor a folder; remove it")


def refuse_full_disk(out: Path, needed_bytes: int) -> None:
    """Raises `InputError` if the disk of `out` holds less; for callers who would rather know before they read."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise InputError(f"{out}: the disk is full: {needed_bytes:,} bytes needed, {free:,} free")


def _make_staging(out: Path, needed_bytes: int) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        refuse_full_disk(out, needed_bytes)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out}: cannot be created ({error.strerror})") from None


def is_disk_full(error: BaseException) -> bool:
    """Whether this is a full disk, told by the operating system or, in words only, by TensorStore under Orbax."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left on device" in str(error)
