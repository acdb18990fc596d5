"""What `gsa inspect` refuses, in one line, leaving nothing behind."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gsa_jax import SplatConfig
from helpers.texts import STORIES
from helpers.tiny_checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def tiny(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), story_neo, splats=SplatConfig(num_splats=5, window=8))


def test_bad_input(tiny: Path, story_neo: Path, tmp_path: Path, run_gsa: Callable) -> None:
    plain = tiny_checkpoint(tmp_path / "plain", story_neo)
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time.")
    empty = tmp_path / "empty.txt"
    empty.touch()
    there = tmp_path / "there.html"
    there.write_text("mine")
    before = set(tmp_path.iterdir())
    out = tmp_path / "report.html"
    run_gsa("inspect", tmp_path / "nowhere", "--out", out).assert_refused(tmp_path / "nowhere")
    run_gsa("inspect", plain, "--out", out).assert_refused("no splats", "gsa fit-init")
    run_gsa("inspect", story_neo, "--out", out).assert_refused(story_neo)
    run_gsa("inspect", tiny, "--out", out, "--window", "all").assert_refused("leaves the splats unused", "--window")
    run_gsa("inspect", tiny, "--out", out, "--text", short, "--window", 64).assert_refused("longer text")
    run_gsa("inspect", tiny, "--out", out, "--text", empty).assert_refused(empty)
    run_gsa("inspect", tiny, "--out", short / "report.html").assert_refused(short, "cannot be created")
    run_gsa("inspect", tiny, "--out", out, "--figures", short / "figures").assert_refused(short, "cannot be created")
    run_gsa("inspect", tiny, "--out", out, "--text", tmp_path / "none.txt").assert_refused("none.txt: no such file")
    run_gsa("inspect", tiny, "--out", out, "--compare", plain).assert_refused(plain, "cannot be compared")
    run_gsa("inspect", tiny, "--out", there, "--text", STORIES).assert_refused(there, "exists already")
    run_gsa("inspect", tiny, "--out", out, "--figures", tmp_path).assert_refused(tmp_path, "exists already")
    run_gsa("inspect", tiny, "--out", out, "--figures", out).assert_refused(out, "is to be made for the figures")
    inside = tmp_path / "new" / "report.html"
    run_gsa("inspect", tiny, "--out", inside, "--figures", tmp_path / "new").assert_refused(inside, "another place")
    assert set(tmp_path.iterdir()) == before
    assert there.read_text() == "mine"


@pytest.mark.parametrize("library", ["altair", "vl_convert"])
def test_a_missing_library(
    library: str, tiny: Path, tmp_path: Path, run_gsa: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("gsa_jax.inspection.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    run_gsa("inspect", tiny, "--out", tmp_path / "report.html").assert_refused(
        library, "pip install 'gsa-jax[inspect]'"
    )
    assert not list(tmp_path.iterdir())
