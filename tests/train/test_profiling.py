"""`--profile`: a trace of the steps after those that compile, which the profiler's own reader opens.

May be changed here: how many steps a run has.
"""

import dataclasses
from pathlib import Path

import pytest
from jax.profiler import ProfileData

from gsa_jax.checkpoint import load_tensors
from gsa_jax.train.config import Finetune, OptimizerConfig
from gsa_jax.train.loop import train
from gsa_jax.train.profiling import STEP_NAME
from helpers.bits import assert_same_tensors
from helpers.texts import TOLD
from helpers.tiny_checkpoints import tiny_checkpoint

pytestmark = [
    pytest.mark.usefixtures("standard_promotion_throughout"),
    # Of jax's reader of traces under Python 3.13, which ends the process where the warning is made an error.
    pytest.mark.filterwarnings("ignore:builtin type event_:DeprecationWarning"),
]


def steps_recorded(run: Path) -> list[list[int]]:
    """The steps of each trace that is there, and that each of them took time."""
    found = []
    for file in sorted((run / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")):
        events = [e for p in ProfileData.from_file(str(file)).planes for line in p.lines for e in line.events]
        steps = [event for event in events if event.name == STEP_NAME]
        assert all(event.duration_ns > 0 for event in steps)
        assert len(events) > 10 * len(steps), "what the steps are made of is in it as well"
        found.append(sorted(int(dict(event.stats)["step_num"]) for event in steps))
    return found


def notes_of(config: Finetune) -> list[str]:
    notes = []
    train(config, report=lambda record: notes.append(record["text"]) if record["kind"] == "note" else None)
    return notes


def config(tmp_path: Path, story_neo: Path) -> Finetune:
    return Finetune(
        checkpoint=tiny_checkpoint(tmp_path / "tiny", story_neo),
        out=tmp_path / "run",
        text=(TOLD,),
        steps=9,
        batch_size=2,
        context=16,
        save_every=100,
        optimizer=OptimizerConfig(schedule="constant"),
        profile=True,
    )


def test_five_steps_after_two_are_recorded(tmp_path, story_neo):
    run = config(tmp_path, story_neo)
    assert notes_of(run) == [f"steps 3 to 7 are recorded in {run.out / 'profile'}"]
    assert steps_recorded(run.out) == [[3, 4, 5, 6, 7]]


@pytest.mark.slow
def test_nothing_is_learnt_otherwise_and_a_run_that_goes_on_has_a_trace_of_its_own(tmp_path, story_neo):
    run = config(tmp_path, story_neo)
    plain = dataclasses.replace(run, out=tmp_path / "plain", profile=False)
    assert len(notes_of(run)) == 1
    assert notes_of(plain) == [] and not (plain.out / "profile").exists()
    assert_same_tensors(load_tensors(run.out / "model")[1], load_tensors(plain.out / "model")[1])
    assert notes_of(dataclasses.replace(run, steps=11))[-1].startswith("nothing was recorded")
    longer = dataclasses.replace(run, steps=14)
    assert notes_of(longer)[-1] == f"steps 14 to 14 are recorded in {run.out / 'profile'}"
    assert steps_recorded(run.out) == [[3, 4, 5, 6, 7], [14]]
