"""What a run writes down: records that survive a kill and a restart, and the picture of them.

May be changed here: what is recorded. A record that the test wrote is the oracle for what is read back.
"""

import builtins
import errno
import json
import os
import re
import resource
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from gsa_jax.errors import InputError
from gsa_jax.train.metrics import METRICS_FILE, MetricsLog, Record, read_metrics
from gsa_jax.train.plot import plot_run

ARMS = {"exact": 1.0, "hybrid": 1.05, "window-only": 1.4, "none": 9.0}


def trained(step: int) -> Record:
    return {"kind": "train", "step": step, "loss": 3.0 / (step + 1), "gradient_norm": 0.1 * step, "tokens": 100 * step}


def scored(step: int, arms: dict[str, float]) -> Record:
    record: Record = {"kind": "eval", "step": step, "documents": 2, "tokens": 1234}
    for name, ratio in arms.items():
        record |= {f"cross_entropy/{name}": 2.0 * ratio, f"perplexity_ratio/{name}": ratio + 0.01 * step * (ratio != 1)}
    return record


def write(folder: Path, records: list[Record], *, after: int = -1) -> None:
    with MetricsLog(folder, after=after) as log:
        for record in records:
            log.write(record)


def test_records_are_read_back_as_they_were_written_each_as_soon_as_it_is(tmp_path):
    records = [scored(0, ARMS), *map(trained, range(1, 6)), scored(5, ARMS)]
    with MetricsLog(tmp_path, after=-1) as log:
        for count, record in enumerate(records, 1):
            log.write(record)
            assert read_metrics(tmp_path) == records[:count]
    assert [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == records


@pytest.mark.parametrize(("after", "kept"), [(-1, 0), (0, 1), (3, 4), (5, 8)])
def test_a_restart_drops_what_it_will_write_again(tmp_path, after, kept):
    """Evaluations follow the step that they belong to, and go with it."""
    before = [scored(0, ARMS), trained(1), trained(2), trained(3), trained(4), scored(4, ARMS), trained(5), trained(5)]
    write(tmp_path, before)
    write(tmp_path, [trained(after + 1)], after=after)
    assert read_metrics(tmp_path) == [*before[:kept], trained(after + 1)]


def test_a_line_that_a_kill_cut_off_is_left_out_at_every_place(tmp_path):
    records = [trained(1), trained(2)]
    write(tmp_path, records)
    content = (tmp_path / METRICS_FILE).read_text()
    first = content.index("\n") + 1
    for cut in range(len(content)):
        (tmp_path / METRICS_FILE).write_text(content[:cut])
        assert read_metrics(tmp_path) == ([trained(1)] if cut >= first else [])
        write(tmp_path, [trained(3)], after=2)
        assert read_metrics(tmp_path) == [*([trained(1)] if cut >= first else []), trained(3)]


def test_a_restart_that_cannot_write_keeps_the_records(tmp_path, monkeypatch):
    write(tmp_path, [trained(1)])

    def half(path, *_, **__):
        path.write_bytes(b'{"kind"')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(InputError, match=rf"{METRICS_FILE}: cannot be written .*No space"):
        MetricsLog(tmp_path, after=1)
    assert read_metrics(tmp_path) == [trained(1)]


def test_a_file_that_can_take_no_more_is_named(tmp_path):
    """A limit on the size of files stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(InputError, match=rf"^[^\n]*{METRICS_FILE}: cannot be written .*too large"),
            MetricsLog(tmp_path, after=-1) as log,
        ):
            log.write(trained(1))
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / METRICS_FILE).stat().st_size + 9, hard))
            log.write(trained(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_metrics(tmp_path) == [trained(1)]


def test_files_without_records_are_named(tmp_path):
    with pytest.raises(InputError, match=rf"{METRICS_FILE}: cannot be read .*No such file.*the folder of a run"):
        read_metrics(tmp_path)
    (tmp_path / METRICS_FILE).write_text(json.dumps(trained(1)) + "\n{broken\n" + json.dumps(trained(2)) + "\n")
    with pytest.raises(InputError, match=rf"{METRICS_FILE}: not JSON lines .*remove the broken line"):
        read_metrics(tmp_path)


@pytest.fixture
def without(monkeypatch):
    """Makes a package look as if it were not installed."""

    def hide(package: str) -> None:
        found = builtins.__import__

        def missing(name, *rest):
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            return found(name, *rest)

        monkeypatch.setattr(builtins, "__import__", missing)

    return hide


def test_a_package_that_is_not_installed_is_one_line(tmp_path, without):
    write(tmp_path, [trained(1)])
    without("matplotlib")
    with pytest.raises(InputError, match=r"^[^\n]*matplotlib; pip install 'gsa-jax\[plot\]'$"):
        plot_run(tmp_path)


def texts(path: Path) -> list[str]:
    """What an SVG says: matplotlib draws letters as shapes, and notes each text in a comment."""
    content = path.read_text(encoding="utf-8")
    assert ET.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    return re.findall(r"<!-- (.*?) -->", content)


def test_a_picture_names_the_arms_and_the_tokens_they_were_scored_on(tmp_path):
    write(tmp_path, [scored(0, ARMS), *map(trained, range(1, 400)), scored(399, ARMS)])
    path = plot_run(tmp_path)
    assert path.parent == tmp_path
    found = texts(path)
    for label in (*ARMS, "training", "loss", "step", "perplexity above exact", "held-out text, 1,234 tokens"):
        assert label in found
    first = path.read_bytes()
    assert plot_run(tmp_path) == path
    assert re.sub(rb'id="\w+"|#\w+', b"", path.read_bytes()) == re.sub(rb'id="\w+"|#\w+', b"", first)


def test_a_picture_of_a_plain_model_and_of_a_run_without_held_out_text(tmp_path):
    plain, alone = tmp_path / "plain", tmp_path / "alone"
    for folder in (plain, alone):
        folder.mkdir()
    write(plain, [scored(0, {"exact": 1.0}), trained(1), scored(1, {"exact": 1.0})])
    assert {"perplexity", "held-out text, 1,234 tokens"} <= set(texts(plot_run(plain)))
    write(alone, [trained(1)])
    assert not any("held-out" in text for text in texts(plot_run(alone)))


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(InputError, match="give the folder of a run"):
        plot_run(tmp_path)
    write(tmp_path, [scored(0, ARMS)])
    with pytest.raises(InputError, match="no step has been made yet"):
        plot_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS_FILE]
