"""`--track`: libraries have each record of a run once, and neither kills nor restarts show.

May be changed here: how a run is cut into pieces. TensorBoard and Weights & Biases (offline) are the real ones, whose
files are read back; Trackio, which needs a newer client of the hub than transformers 4 allows, is a stand-in that notes
what it is called with.
"""

import json
import os
import struct
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gsa_jax.errors import InputError
from gsa_jax.train.metrics import MetricsLog, Record, read_metrics
from gsa_jax.train.tracking import TRACKED_FILE, open_tracking

SETTINGS = {"recipe": "distill", "optimizer": {"learning_rate": 0.5}}

Numbers = dict[tuple[str, int], float]
"""By name and step."""


def records(first: int, last: int) -> list[Record]:
    """Of these steps, an evaluation after each third one among them."""
    found: list[Record] = []
    for step in range(first, last + 1):
        if step:
            found.append({"kind": "train", "step": step, "loss": 3 / (step + 1), "tokens": 100 * step})
        if step % 3 == 0:
            found.append({"kind": "eval", "step": step, "cross_entropy/exact": 2 - step / 100, "text": "not a number"})
    return found


def expected(last: int) -> Numbers:
    return {
        (f"{record['kind']}/{name}", record["step"]): pytest.approx(value, rel=1e-6)
        for record in records(0, last)
        for name, value in record.items()
        if name not in ("kind", "step", "text")
    }


def part_of_a_run(folder: Path, library: str | None, *, after: int, last: int) -> None:
    tracking = None if library is None else open_tracking(library, folder, SETTINGS)
    with MetricsLog(folder, after=after, tracking=tracking) as log:
        for record in records(after + 1, last):
            log.write(record)


def killed_twice(folder: Path, library: str) -> None:
    """Steps 5 to 7, and 6 once more, are computed again."""
    part_of_a_run(folder, library, after=-1, last=7)
    time.sleep(1.1)  # event files of the same second have the same name
    part_of_a_run(folder, library, after=4, last=6)
    time.sleep(1.1)
    part_of_a_run(folder, library, after=5, last=9)


def tracked_later(folder: Path, library: str) -> None:
    part_of_a_run(folder, None, after=-1, last=5)
    part_of_a_run(folder, library, after=4, last=9)


RUNS = pytest.mark.parametrize("run", [killed_twice, tracked_later], ids=lambda run: run.__name__)


def in_tensorboard(folder: Path) -> Numbers:
    """As TensorBoard shows it."""
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    events = [(name, event) for name in accumulator.Tags()["scalars"] for event in accumulator.Scalars(name)]
    found = {(name, event.step): event.value for name, event in events}
    assert len(found) == len(events), "a number is there twice"
    return found


def tracked_now_and_then(folder: Path, library: str) -> None:
    part_of_a_run(folder, library, after=-1, last=3)
    part_of_a_run(folder, None, after=3, last=7)
    time.sleep(1.1)
    part_of_a_run(folder, library, after=7, last=9)


@pytest.mark.parametrize("run", [killed_twice, tracked_later, tracked_now_and_then], ids=lambda run: run.__name__)
def test_tensorboard_has_each_number_once(tmp_path, run):
    run(tmp_path, "tensorboard")
    assert in_tensorboard(tmp_path) == expected(9)
    assert read_metrics(tmp_path) == records(0, 9)


def in_wandb(folder: Path) -> tuple[Numbers, set[str]]:
    """What `wandb sync` would send, and the names of the runs: records in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    found: Numbers = {}
    runs = set()
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        content, place, whole = file.read_bytes(), 7, b""
        while place + 7 <= len(content):
            if 32768 - place % 32768 < 7:  # the rest of a block is padding
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack("<IHB", content[place : place + 7])
            whole += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind not in (1, 4):  # there is more of it
                continue
            message, whole = Message.FromString(whole), b""
            if message.HasField("run"):
                runs.add(message.run.run_id)
                assert message.run.project == "gsa-jax" and message.run.display_name == folder.name
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in message.history.item}
            for name, value in row.items():
                if not name.startswith("_"):
                    assert (name, row["_step"]) not in found, "a number is there twice"
                    found[name, row["_step"]] = value
    return found, runs


@pytest.mark.slow
@RUNS
def test_weights_and_biases_have_each_number_once_in_one_run(tmp_path, monkeypatch, run):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run(tmp_path, "wandb")
    wandb.teardown()  # its files are whole when its process has ended
    found, runs = in_wandb(tmp_path)
    assert found == expected(9) and len(runs) == 1
    assert runs == {json.loads((tmp_path / TRACKED_FILE).read_text())["wandb"]["run"]}


@pytest.fixture
def trackio(monkeypatch) -> list[dict[str, Any]]:
    """A stand-in that notes its runs: what they were begun with, what they were given, and that they were ended."""
    runs: list[dict[str, Any]] = []

    def init(project: str, name: str, *, config: dict[str, Any], resume: str) -> types.SimpleNamespace:
        run = {"project": project, "name": name, "config": config, "resume": resume, "given": [], "ended": False}
        runs.append(run)
        return types.SimpleNamespace(
            log=lambda numbers, step: run["given"].append((step, numbers)), finish=lambda: run.update(ended=True)
        )

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init))
    return runs


@RUNS
def test_trackio_is_given_each_number_once_in_one_run(tmp_path, trackio, run):
    run(tmp_path, "trackio")
    given = [(name, step, value) for run in trackio for step, row in run["given"] for name, value in row.items()]
    assert {(name, step): value for name, step, value in given} == expected(9) and len(given) == len(expected(9))
    assert len({run["name"] for run in trackio}) == 1 and trackio[0]["name"].startswith(tmp_path.name)
    for begun in trackio:
        assert (begun["project"], begun["config"], begun["resume"]) == ("gsa-jax", SETTINGS, "allow") and begun["ended"]


@pytest.mark.parametrize(
    ("library", "package", "pip"),
    [
        ("tensorboard", "tensorboardX", r"'gsa-jax\[track\]'"),
        ("trackio", "trackio", "trackio"),
        ("wandb", "wandb", "wandb"),
    ],
)
def test_a_library_that_is_not_installed_is_one_line_and_the_records_stay(tmp_path, monkeypatch, library, package, pip):
    part_of_a_run(tmp_path, None, after=-1, last=2)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [x for x in sys.meta_path if getattr(x, "__name__", "") == "PathFinder"])
    with pytest.raises(InputError, match=rf"^[^\n]*needs {package}; pip install {pip}$"):
        open_tracking(library, tmp_path, SETTINGS)
    assert read_metrics(tmp_path) == records(0, 2)


@pytest.mark.parametrize("note", ["{", "[]", '{"trackio": 3}', '{"trackio": {"run": "a", "last": [1]}}'])
def test_a_damaged_note_is_one_line(tmp_path, trackio, note):
    (tmp_path / TRACKED_FILE).write_text(note)
    with pytest.raises(InputError, match=rf"^[^\n]*{TRACKED_FILE}: [^\n]*; remove it to begin a new run there$"):
        open_tracking("trackio", tmp_path, SETTINGS)
