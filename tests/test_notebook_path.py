"""The steps of docs/scale.md for a notebook with eight TPU chips, as they stand there, on eight simulated devices.

May be changed here: what is made smaller, so that it takes minutes. The lines themselves are the document's.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gsa_jax.train.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALLER = {"--steps": 20, "--batch-size": 8, "--context": 64, "--max-new-tokens": 8}


def notebook_lines() -> list[str]:
    """What is typed into the notebook, one command each, without the marks and without `pip install`."""
    section = re.search(r"^## A notebook with TPUs$(.*?)^## ", (ROOT / "docs/scale.md").read_text(), re.M | re.S)
    assert section is not None
    cells = re.findall(r"^ +!((?:.*\\\n)*.*)$", section[1], re.M)
    return [re.sub(r"\s*\\\n\s*", " ", cell) for cell in cells if not cell.startswith("pip install ")]


def smaller(line: str) -> str:
    for option, value in SMALLER.items():
        line = re.sub(rf"{option} \d+", f"{option} {value}", line)
    return line


def test_every_line_runs(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "COLUMNS": "120",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    (tmp_path / "gsa-jax").symlink_to(ROOT)
    lines = [smaller(line) for line in notebook_lines()]
    commands = [line for line in lines if " gsa train distill" in line and "--dry-run" not in line]
    assert len(commands) == 2 and len(set(commands)) == 1, "the run is begun, and its line repeated"
    said, stopped = [], False
    for line in lines:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if line in commands and not stopped:
            wait_for_step(tmp_path / "run", process)
            process.send_signal(signal.SIGTERM)  # as `timeout` does, which the line begins with
            stopped = True
        out = process.communicate(timeout=600)[0]
        assert process.returncode == 0, (line, out)
        said.append(out)
    assert said[0].startswith("8 cpu")
    first, second = (out for line, out in zip(lines, said, strict=True) if line in commands)
    assert "told to stop, and saved" in first
    assert "20 steps done" in second
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert steps == list(range(1, 21))
    assert (tmp_path / "hf/model.safetensors").is_file()


def wait_for_step(run: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        if (run / "metrics.jsonl").exists() and any(record["kind"] == "train" for record in read_metrics(run)):
            return
        time.sleep(0.05)
