"""The records of a run in TensorBoard, Trackio or Weights & Biases: `gsa train --track`.

May be changed here: which libraries there are, and how each is told that a run goes on. A library is imported when a
run asks for it. Each record is given to it once, whatever a run that was killed computes again, and from the beginning
of the run, even if only a restart asked for it.
"""

from __future__ import annotations

import abc
import importlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gsa_jax.errors import InputError, first_line
from gsa_jax.files import replace_text
from gsa_jax.json_files import read_json
from gsa_jax.train.config import Tracker

EVENTS_FOLDER = "tensorboard"
TRACKED_FILE = "tracked.json"
"""By library: the name of the run there, and the last record that was given to it."""

_PROJECT = "gsa-jax"

Record = dict[str, Any]
"""A line of `metrics.jsonl`."""


class Tracking(abc.ABC):
    """Gives records to a library.

    Args:
        last: step and kind of the last record that it has; kinds follow one another as "train", "eval".
    """

    def __init__(self, last: tuple[int, bool]) -> None:
        self._last = last

    def log(self, record: Record) -> None:
        """Gives the numbers of a record, each named `kind/name`, unless the library has them."""
        place = record["step"], record["kind"] == "eval"
        if place <= self._last:
            return
        numbers = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if name not in ("step", "kind") and isinstance(value, int | float)
        }
        self._last = place
        self._give(record["step"], numbers)

    @abc.abstractmethod
    def _give(self, step: int, numbers: Mapping[str, float]) -> None: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Waits until everything is written."""


def require_library(library: Tracker) -> Any:
    """The library's module. Raises `InputError` if it is not installed."""
    package, pip = ("tensorboardX", "'gsa-jax[track]'") if library == "tensorboard" else (library, library)
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise InputError(f"--track needs {package}; pip install {pip}") from None


def open_tracking(library: Tracker, folder: Path, settings: Mapping[str, Any]) -> Tracking:
    """What `gsa train --track` asks for.

    Args:
        folder: of the run.
        settings: of the run, for the library to show.

    Raises:
        InputError: the library is not installed, or does not take the run.
    """
    if library == "tensorboard":
        return _TensorBoard(folder)
    return _RunOfALibrary(library, folder, settings)


class _TensorBoard(Tracking):
    """Event files. Which records a kill kept from them cannot be known, so TensorBoard is told to forget them all, and
    a run that goes on gives every one again."""

    def __init__(self, folder: Path) -> None:
        super().__init__((-1, True))
        self._writer = require_library("tensorboard").SummaryWriter(str(folder / EVENTS_FOLDER), purge_step=0)

    def _give(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _RunOfALibrary(Tracking):
    """A run of Trackio or of Weights & Biases, which forget nothing: what they have, they are not given again."""

    def __init__(self, library: Tracker, folder: Path, settings: Mapping[str, Any]) -> None:
        module = require_library(library)
        self._file, self._library = folder / TRACKED_FILE, library
        self._tracked = _read(self._file)
        known = self._tracked.setdefault(library, {"run": uuid.uuid4().hex[:8], "last": [-1, True]})
        super().__init__(tuple(known["last"]))
        options: dict[str, Any] = {"config": dict(settings), "resume": "allow"}
        if library == "wandb":
            options |= {"project": os.environ.get("WANDB_PROJECT", _PROJECT), "name": folder.name}
            options |= {"id": known["run"], "dir": str(folder)}
            try:
                self._run = module.init(**options)
            except module.Error as error:
                raise InputError(f"wandb does not take the run ({first_line(error)})") from error
        else:
            self._run = module.init(project=_PROJECT, name=f"{folder.name}-{known['run']}", **options)

    def _give(self, step: int, numbers: Mapping[str, float]) -> None:
        # Noted first: rather a record that is missing after a kill than one that is there twice.
        self._tracked[self._library]["last"] = list(self._last)
        try:
            replace_text(self._file, json.dumps(self._tracked) + "\n")
        except OSError as error:
            raise InputError(f"{self._file}: cannot be written ({error.strerror})") from None
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def _read(file: Path) -> dict[str, Any]:
    remedy = "remove it to begin a new run there"
    try:
        tracked = read_json(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); {remedy}") from None
    match tracked:
        case dict() if all(map(_is_known, tracked.values())):
            return tracked
    raise InputError(f"{file}: does not say what was tracked; {remedy}")


def _is_known(of_library: Any) -> bool:
    match of_library:
        case {"run": str(), "last": [int(), bool()]}:
            return True
    return False
