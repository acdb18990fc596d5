"""A run that is interrupted and started again computes, bit for bit, what it would have computed without.

May be changed here: how runs are interrupted. The oracle is the same run without an interruption.
"""

import contextlib
import dataclasses
import gzip
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gsa_jax import SplatConfig
from gsa_jax.checkpoint import load_tensors
from gsa_jax.errors import InputError
from gsa_jax.text_files import DOCUMENT_SEPARATOR
from gsa_jax.train import loop
from gsa_jax.train.config import Distill, Finetune, OptimizerConfig, Pretrain, TrainConfig
from gsa_jax.train.loop import train
from gsa_jax.train.metrics import Record, read_metrics
from helpers.texts import STORIES, TOLD
from helpers.tiny_checkpoints import tiny_checkpoint
from helpers.train_command import command

SPLATS = SplatConfig(num_splats=3, window=4, layers="all", norm_gain=True, far_gain=True)
STEPS = 60

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion_throughout")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, story_neo) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), story_neo, splats=SPLATS)


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory) -> Finetune:
    """With everything in its state that a state can have."""
    return Finetune(
        checkpoint=tiny,
        out=tmp_path_factory.mktemp("runs") / "whole",
        text=TOLD,
        eval_text=STORIES,
        steps=STEPS,
        batch_size=4,
        context=24,
        eval_every=25,
        eval_documents=1,
        save_every=1,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5, weight_decay=0.1, accumulate=2, ema_decay=0.9),
        teacher_weight=0.5,
    )


@pytest.fixture(scope="module")
def whole(config) -> tuple[list[Record], dict[str, np.ndarray]]:
    """The uninterrupted run: what it recorded, and its result."""
    return results(config)


def results(config: TrainConfig) -> tuple[list[Record], dict[str, np.ndarray]]:
    outcome = train(config)
    assert (outcome.step, outcome.status) == (config.steps, "finished")
    timed = ("tokens_per_s", "seconds_per_step")
    records = [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(config.out)]
    return records, load_tensors(outcome.model)[1]


def assert_same(found, expected) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert found[1][name].tobytes() == tensor.tobytes(), name


def interrupt(config: TrainConfig, by: signal.Signals, when: Callable[[], bool]) -> subprocess.CompletedProcess[str]:
    """Runs the command until something is so, then sends a signal."""
    with subprocess.Popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not when():
            time.sleep(0.0005)
        process.send_signal(by)
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def steps_made(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def test_killed_at_random_steps_and_while_saving_then_terminated(tmp_path, config, whole):
    config = dataclasses.replace(config, out=tmp_path / "run")
    draws = random.Random(0)
    at = draws.randrange(3, 15)
    assert interrupt(config, signal.SIGKILL, lambda: steps_made(config.out) >= at).returncode == -9

    def saving() -> bool:
        staged = list((config.out / "steps").glob("*tmp*"))
        return steps_made(config.out) >= 25 and bool(staged)

    assert interrupt(config, signal.SIGKILL, saving).returncode == -9
    assert 25 <= steps_made(config.out) < STEPS
    at = draws.randrange(32, 45)
    ended = interrupt(config, signal.SIGTERM, lambda: steps_made(config.out) >= at)
    assert ended.returncode == 0, ended
    assert f"saved after step {steps_made(config.out)};" in ended.stdout
    assert at <= steps_made(config.out) < STEPS
    assert_same(results(config), whole)


class _Stop(Exception):
    """An interruption from inside."""


def stopped_after(config: TrainConfig, step: int) -> None:
    def report(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == step:
            raise _Stop

    with pytest.raises(_Stop):
        train(config, report=report)


def test_told_to_stop_at_a_step_that_is_scored(tmp_path, config, whole, monkeypatch):
    """It is scored when the run goes on, and once."""
    stopped = dataclasses.replace(config, out=tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_termination", lambda: contextlib.nullcontext(lambda step: step == 50))
        assert (train(stopped).step, train(stopped).step) == (50, STEPS)
    assert_same(results(stopped), whole)


@pytest.mark.parametrize("recipe", ["pretrain", "distill"])
def test_recipes_go_on_bit_for_bit(tmp_path, config, recipe, tiny):
    shared = dict(text=TOLD, steps=6, batch_size=2, context=24, save_every=2, optimizer=OptimizerConfig())
    make = {
        "pretrain": lambda out: Pretrain(out=out, tokenizer=tiny, dtype="bfloat16", remat=True, **shared),
        "distill": lambda out: Distill(out=out, checkpoint=tiny, objective="output", **shared),
    }[recipe]
    expected = results(make(tmp_path / "whole"))
    interrupted = make(tmp_path / "run")
    stopped_after(interrupted, 5)
    assert_same(results(interrupted), expected)


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, config, whole):
    config = dataclasses.replace(config, out=tmp_path / "run")
    stopped_after(config, 8)
    newest = max((int(path.name) for path in (config.out / "steps").iterdir() if path.name.isdigit()), default=0)
    for file in (config.out / "steps" / str(newest) / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-40])
    notes = []
    train(config, report=lambda record: notes.append(record["text"]) if record["kind"] == "note" else None)
    assert any("passed over, damaged" in note and str(newest) in note for note in notes), notes
    assert f"going on from step {newest - 1}" in notes
    assert_same(results(config), whole)


def test_another_configuration_is_refused_and_the_differences_listed(config, whole):
    kept = read_metrics(config.out)
    other = dataclasses.replace(
        config, batch_size=8, optimizer=dataclasses.replace(config.optimizer, b2=0.5), eval_every=1, save_every=7
    )
    with pytest.raises(InputError) as refused:
        train(other)
    for words in ("batch_size was 4 and is 8", "optimizer.b2 was 0.95 and is 0.5", "another configuration"):
        assert words in str(refused.value)
    assert "eval_every" not in str(refused.value) and "save_every" not in str(refused.value)
    assert read_metrics(config.out) == kept


def test_a_run_that_has_ended_goes_on_as_a_longer_one_would_have(tmp_path, tiny):
    """From another place, and with its text and checkpoint in other places, the text gzipped and in two files."""

    def run(out: Path, steps: int, **changes) -> Finetune:
        optimizer = OptimizerConfig(schedule="constant", learning_rate=1e-2, ema_decay=0.9)
        shared = {"checkpoint": tiny, "text": TOLD, "batch_size": 2, "context": 24, "optimizer": optimizer}
        return Finetune(out=out, steps=steps, save_every=4, eval_every=100, **shared | changes)

    expected = results(run(tmp_path / "whole", 9))
    short = results(run(tmp_path / "run", 5))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    shutil.copytree(tiny, tmp_path / "elsewhere")
    parts = []
    first, _, second = TOLD.read_bytes().partition(DOCUMENT_SEPARATOR.encode())
    for name, part in (("a.txt.gz", first), ("b.txt.gz", second)):
        parts.append(tmp_path / name)
        parts[-1].write_bytes(gzip.compress(part))
    notes = []
    longer = run(tmp_path / "moved", 9, checkpoint=tmp_path / "elsewhere", text=tuple(parts))
    train(longer, report=lambda record: notes.append(record["text"]) if record["kind"] == "note" else None)
    assert notes == ["steps was 5 and is 9", "going on from step 5"]
    assert_same(results(longer), expected)
    kept = load_tensors(tmp_path / "moved" / "model-5")[1]
    assert all(kept[name].tobytes() == tensor.tobytes() for name, tensor in short[1].items())


def test_the_resolved_configuration_is_beside_every_checkpoint(config, whole):
    run = json.loads((config.out / "run.json").read_text())
    assert run["recipe"] == "finetune" and run["optimizer"]["b2"] == 0.95 and run["model"]["splats"]["num_splats"] == 3
    steps = [path for path in (config.out / "steps").iterdir() if path.name.isdigit()]
    assert sorted(int(path.name) for path in steps) == [STEPS - 1, STEPS]
    for step in steps:
        assert json.loads((step / "config" / "data.json").read_text()) == run


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, config):
    wild = dataclasses.replace(
        config,
        out=tmp_path / "run",
        optimizer=OptimizerConfig(learning_rate=1e36, schedule="linear", warmup_steps=50, clip_norm=0),
        teacher_weight=0.0,
    )
    with pytest.raises(InputError, match=r"step [2-9]: the loss is .*nan") as stopped:
        train(wild)
    newest = max(int(path.name) for path in (wild.out / "steps").iterdir() if path.name.isdigit())
    assert f"last good checkpoint: {wild.out / 'steps' / str(newest)}" in str(stopped.value)
    assert not (wild.out / "model").exists()


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path, config):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a run"):
        train(dataclasses.replace(config, out=folder))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    shutil.rmtree(folder)
