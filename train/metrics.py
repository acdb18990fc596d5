"""What a run reports: `metrics.jsonl`, one JSON object per line, which a library shows if asked for.

May be changed here: how records are written. A record is `{"step": n, "kind": "train" | "eval", ...}`; the other fields
come from `gsa_jax.train.loop` and `gsa_jax.train.evaluator`. Libraries that show them are in `gsa_jax.train.tracking`.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import TracebackType

from gsa_jax.errors import InputError
from gsa_jax.files import refuse_foreign, replace_text
from gsa_jax.json_files import parse_json
from gsa_jax.train.tracking import Record, Tracking

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends records to a run's files; a context manager.

    Args:
        folder: of the run.
        after: a run that goes on from this step drops the records of later ones, which it will write again.
        tracking: is given the records as well, from the run's beginning.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, folder: Path, *, after: int, tracking: Tracking | None = None) -> None:
        path = folder / METRICS_FILE
        kept = [record for record in read_metrics(folder) if record["step"] <= after] if path.exists() else []
        self.scored = max((record["step"] for record in kept if record["kind"] == "eval"), default=-1)
        self._path = path
        self._tracking = tracking
        try:
            replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        for record in kept:
            self._track(record)

    def write(self, record: Record) -> None:
        """Appends a record, and flushes it, so that a killed run loses none.

        Raises:
            InputError: the file cannot be written, e.g. because the disk is full.
        """
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self._path}: cannot be written ({error.strerror})") from None
        self._track(record)

    def _track(self, record: Record) -> None:
        if self._tracking is not None:
            self._tracking.log(record)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # it tries once more to write what could not be written
            self._file.close()
        if self._tracking is not None:
            self._tracking.close()


def read_metrics(folder: Path) -> list[Record]:
    """The records of a run; a last line that was cut off by a kill is left out.

    Raises:
        InputError: the folder has none, or they cannot be read.
    """
    path = folder / METRICS_FILE
    refuse_foreign(folder, [METRICS_FILE])
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        records = [parse_json(line) for line in lines[:-1]]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the folder of a run") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON lines ({error}); remove the broken line") from None
    for number, record in enumerate(records, 1):
        match record:
            case {"step": int(), "kind": str()}:
                continue
        raise InputError(f"{path}, line {number}: not a record of a run; remove the line")
    return records
