"""A fine-tuning run that is killed at random moments, twenty times: `python benchmarks/soak_training.py FOLDER`.

The bundled model with its trained splats is fine-tuned twice by the same command: once in peace, and once killed
(SIGKILL) at moments drawn from the time of a start, of steps and of saves, and started again each time. Both must end
with the same parameters and the same metrics, bit for bit. Moments are drawn from a clock, so no two runs of this
script are alike; `killed.jsonl` in FOLDER says when it struck.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import gsa_jax
from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert import convert
from gsa_jax.train.metrics import read_metrics

_TIMED = ("tokens_per_s", "seconds_per_step")


def _command(checkpoint: Path, out: Path, steps: int) -> list[str]:
    text = gsa_jax.assets.story_neo().with_name("told.txt")
    options = ["--text", text, "--steps", steps, "--batch-size", 2, "--context", 64, "--save-every", 1]
    options += ["--teacher-weight", 0.5, "--optimizer.ema-decay", 0.9]
    return [sys.executable, "-m", "gsa_jax.cli", "train", "finetune", *map(str, [checkpoint, out, *options])]


def _steps_made(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count('"train"') if path.exists() else 0


def _killed(command: list[str], out: Path, draws: random.Random, pause: float) -> dict[str, Any]:
    """Runs the command until so many more steps are made, and a moment longer; or kills it before its first step."""
    before, more = _steps_made(out), draws.choice([0, 0, 1, 1, 2, 3])
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        started = time.monotonic()
        # Records of steps after the last checkpoint are written anew, so these are counted from the lower number.
        while process.poll() is None and _steps_made(out) < before + more:
            time.sleep(0.002)
        time.sleep(draws.random() * pause)
        ended = process.poll()
        process.kill()
    staged = any("tmp" in path.name for path in (out / "steps").glob("*")) if (out / "steps").exists() else False
    seconds = round(time.monotonic() - started, 2)
    return {"steps": _steps_made(out), "seconds": seconds, "while_saving": staged, "ended": ended}


def _result(out: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    records = [{k: v for k, v in record.items() if k not in _TIMED} for record in read_metrics(out)]
    return records, load_tensors(out / "model")[1]


def main() -> None:
    """Prints what the docstring of this file says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to make; holds both runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="to fine-tune instead of the bundled model")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between a step and a kill, at most")
    options = parser.parse_args()
    folder: Path = options.folder
    checkpoint: Path = options.checkpoint or folder / "checkpoint"
    folder.mkdir(parents=True)
    if options.checkpoint is None:
        source = gsa_jax.assets.story_neo()
        convert(source, checkpoint, splats=source.with_name("story-neo-splats"))
    subprocess.run(_command(checkpoint, folder / "whole", options.steps), check=True)
    command, out = _command(checkpoint, folder / "killed", options.steps), folder / "killed"
    draws = random.Random(options.seed)
    with (folder / "killed.jsonl").open("w", encoding="utf-8") as log:
        for kill in range(1, options.kills + 1):
            struck = {"kill": kill, **_killed(command, out, draws, options.pause)}
            print(json.dumps(struck), file=log, flush=True)
            print(json.dumps(struck), flush=True)
            if struck["ended"] is not None:
                sys.exit(f"it ended by itself, with {struck['ended']}, after {kill - 1} kills; give more --steps")
    subprocess.run(command, check=True)
    (records, tensors), (expected_records, expected) = _result(out), _result(folder / "whole")
    differing = [name for name in expected if tensors[name].tobytes() != expected[name].tobytes()]
    if tensors.keys() != expected.keys() or differing or records != expected_records:
        print(f"DIFFERS: {differing or 'metrics'}")
        sys.exit(1)
    print(f"killed {options.kills} times, and bit-identical: {len(expected)} tensors, {len(records)} records")


if __name__ == "__main__":
    main()
