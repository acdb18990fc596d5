"""What `gsa train` and `gsa tokenize` refuse: one line, exit code 2, nothing left.

May be changed here: which inputs are bad, and what their line has to name.
"""

from pathlib import Path

import numpy as np
import pytest

from gsa_jax import SplatConfig
from gsa_jax.cli.training import _told
from helpers.texts import STORIES
from helpers.tiny_checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, story_neo) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("splats"), story_neo, splats=SplatConfig(num_splats=2, window=4))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, story_neo) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("plain"), story_neo)


BAD_OPTIONS = {
    "no steps": (("--steps", 0), "steps = 0: must be >= 1"),
    "warm-up": (("--steps", 5, "--optimizer.warmup-steps", 5), "warmup_steps = 5"),
    "not a rate": (("--optimizer.learning-rate", "nan"), "learning_rate = nan: must be finite"),
    "decay": (("--optimizer.ema-decay", 1), "ema_decay = 1.0: must be in [0, 1)"),
    "accumulate": (("--optimizer.accumulate", 3), "accumulate = 3: must divide batch_size = 8"),
    "context": (("--context", 10_000), "context = 10000: must be >= 2 and at most"),
    "short text": (("--context", 30, "--text", "short"), "are less than a row of 30"),
    "empty text": (("--text", "empty"), "no text in it"),
    "no text": (("--text", "missing"), "no such file"),
    "no name of a text": (("--text",), "no text given; name at least one file"),
    "a name that is too long": (("--text", "x" * 300), "cannot be read (File name too long)"),
    "no tracker": (("--track", "trackio"), "--track needs trackio; pip install trackio"),
    "vocabulary": (("--text", "foreign.bin"), "token id 1024 is outside of the vocabulary of 1024"),
    "odd file": (("--text", "odd.bin"), "3 bytes are not uint16 token ids"),
    "eval text": (("--eval-text", "missing"), "no such file"),
    "devices": (("--mesh.fsdp", 2), "does not divide the 1 devices"),
    "a negative seed": (("--seed", -1), "seed = -1: must be a whole number from 0 to 4294967295"),
    "a seed of more bits": (("--seed", 2**32), "seed = 4294967296: must be a whole number"),
    "half a place": (("--num-processes", 2), "go together; give all three or none"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_and_text(tmp_path, run_gsa, tiny, case):
    options, words = BAD_OPTIONS[case]
    (tmp_path / "short").write_text("Once upon a time.")
    (tmp_path / "empty").write_text(" \n")
    np.array([1, 1024, 3], "<u2").tofile(tmp_path / "foreign.bin")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    files = ("short", "empty", "missing", "foreign.bin", "odd.bin")
    options = [tmp_path / option if option in files else option for option in options]
    text = [] if "--text" in options else ["--text", STORIES]
    run_gsa("train", "distill", tiny, tmp_path / "run", *text, *options).assert_refused(words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("nonsense",), "train nonsense: unknown preset; known: pretrain, pretrain-125M"),
        (("distill", "PLAIN", "RUN"), "has no splats to train; attach and fit them first: gsa fit-init"),
        (("finetune", "PLAIN", "RUN", "--train", "splats"), "has no splats to train"),
        (("finetune", "TINY", "RUN", "--max-positions", 3), "max_positions = 3: the model has"),
        (("distill", "nowhere", "RUN"), "nowhere: no such checkpoint folder"),
        (("finetune", "TINY", "RUN", "--teacher-weight", 2), "teacher_weight = 2.0: must be in [0, 1]"),
        (("pretrain", "RUN", "--tokenizer", "nowhere"), "nowhere: no tokenizer in it"),
    ],
)
def test_recipes(tmp_path, run_gsa, tiny, plain, command, words):
    names = {"TINY": tiny, "PLAIN": plain, "RUN": tmp_path / "run"}
    arguments = [names.get(part, part) for part in command]
    run_gsa("train", *arguments, "--text", STORIES).assert_refused(words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("out", "words"), [("tokens.txt", "ends in .bin"), ("there.bin", "there.bin exists already")])
def test_tokenize(tmp_path, run_gsa, tiny, out, words):
    (tmp_path / "there.bin").touch()
    run_gsa("tokenize", tiny, STORIES, tmp_path / out).assert_refused(words)
    assert [path.name for path in tmp_path.iterdir()] == ["there.bin"]


def test_a_loss_beyond_what_a_float_holds_is_shown():
    assert _told({"kind": "eval", "step": 3, "cross_entropy/exact": 800.0}) == "step 3: exact perplexity inf"


def test_a_dry_run_shows_memory_and_writes_nothing(tmp_path, run_gsa, tiny):
    shown = run_gsa("train", "distill", tiny, tmp_path / "run", "--text", "any", "--mesh.fsdp", 4, "--dry-run")
    assert shown.code == 0 and not (tmp_path / "run").exists()
    for words in ("1 x 4 x 1", "4 x 1 x 1", "GiB on each device", "activations"):
        assert words in shown.out
    refused = run_gsa("train", "distill", tiny, tmp_path / "run", "--text", "any", "--mesh.tensor", 3, "--dry-run")
    refused.assert_refused("mesh tensor = 3 does not divide num_heads = 4")
