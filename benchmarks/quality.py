"""What attention through splats costs in quality, row by row of docs/results.md.

    python benchmarks/quality.py ROW --text TRAIN --eval-text VALID --out FOLDER

runs the `gsa` commands of a row on the bundled model, or on that of the run that `--model` names, prints each of them
and what it found, and adds the row to benchmarks/results/quality.json. Commands whose result is there are not repeated;
trainings go on where they stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from gsa_jax.config import read_config

RESULTS = Path(__file__).parent / "results" / "quality.json"
MODEL = Path(__file__).parents[1] / "gsa_jax" / "assets" / "story-neo"

TOKENS_A_STEP = 2048
DISTILL = "--steps 400 --optimizer.warmup-steps 20"
LONG = "--steps 800 --optimizer.warmup-steps 40 --optimizer.splat-learning-rate 0.02"
SHORT = "--steps 150 --optimizer.warmup-steps 20"
FINETUNE = "--optimizer.warmup-steps 20 --optimizer.learning-rate 5e-4 --teacher-weight 0.5"
NO_TERMS = "--preset seed-phase1 --layers global"
HARD = "--num-splats 64 --window 16"
NOTHING_KEPT = "--kept 0 --importance norm"
KEPT = "--kept 32"
AGAIN = "--steps 400 --optimizer.warmup-steps 20 --optimizer.splat-learning-rate 0.01"


@dataclasses.dataclass(frozen=True)
class Row:
    """Options of a row's commands; without `finetune_steps`, splats are only distilled.

    Attributes:
        attach: of `fit-init`; of `convert` if the row is to start from random splats.
        again: of a second distillation, after importance is learned anew for what the first made of the splats. (After
            the fine-tuning it would be worse for it: 1.00136 instead of 1.00131 in row `kept-64`.)
        documents: of the held-out text, the first so many; all if None.
    """

    attach: str
    distill: str = DISTILL
    again: str | None = None
    finetune_steps: int | None = 400
    random: bool = False
    documents: int | None = None


def _kept(attach: str) -> Row:
    return Row(f"{attach} --importance learned", LONG, AGAIN, finetune_steps=800)


def _ablation(attach: str = HARD, distill: str = SHORT, *, random: bool = False) -> Row:
    return Row(f"{attach} {NOTHING_KEPT}", distill, finetune_steps=None, random=random, documents=60)


ROWS = {
    "mix": _kept("--num-splats 32 --window 64 --kept 64"),
    "kept-64": _kept(f"--num-splats 64 --window 64 {KEPT}"),
    "kept-16": _kept(f"{HARD} {KEPT}"),
    "kept-4": _kept(f"--num-splats 64 --window 4 {KEPT}"),
    "kept-0": _kept(f"--num-splats 128 --window 0 {KEPT}"),
    "kept-two": _kept(f"--num-splats 2 --window 64 {KEPT}"),
    "hybrid": Row(f"--num-splats 64 --window 64 {NOTHING_KEPT}", LONG, finetune_steps=800),
    "hard": Row(f"{HARD} {NOTHING_KEPT}"),
    "pure": Row(f"--num-splats 128 --window 0 {NOTHING_KEPT}", LONG),
    "pure-long": Row(f"--num-splats 128 --window 0 {NOTHING_KEPT}", LONG, finetune_steps=800),
    "two-16": Row(f"--num-splats 2 --window 16 {NOTHING_KEPT}"),
    "two-0": Row(f"--num-splats 2 --window 0 {NOTHING_KEPT}"),
    # What matters, on the hard row: fewer steps, distilled only.
    "short": _ablation(),
    "random-centres": _ablation(HARD + " --terms norm_gain far_gain", random=True),
    "no-norm-gain": _ablation(f"{NO_TERMS} {HARD} --terms far_gain"),
    "no-far-gain": _ablation(f"{NO_TERMS} {HARD} --terms norm_gain"),
    "no-terms": _ablation(f"{NO_TERMS} {HARD}"),
    "amplitudes": _ablation(HARD + " --terms log_amplitudes"),
    "by-output": _ablation(distill=SHORT + " --objective output"),
}


def main() -> None:
    """Runs one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--text", type=Path, required=True, help="training text")
    parser.add_argument("--eval-text", type=Path, required=True, help="held-out text")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and runs")
    parser.add_argument("--model", type=Path, help="RUN/model of `gsa train`, instead of the bundled model")
    parser.add_argument("--seed", type=int, default=0, help="of centres, and of the order of the text")
    given = parser.parse_args()
    name = given.row if not given.seed else f"{given.row}, seed {given.seed}"
    row, folder, seed = ROWS[given.row], given.out / name.replace(", seed ", "-"), f"--seed {given.seed}"
    text, held_out = f"--text {given.text}", f"--text {given.eval_text}"

    plain, fitted = given.model or given.out / "plain", folder / "fitted"
    make(plain, f"convert {MODEL} {plain}")
    training = f"{text} --batch-size {TOKENS_A_STEP // read_config(plain / 'config.json').max_position_embeddings}"
    if row.documents is not None:
        held_out += f" --max-documents {row.documents}"
    attach = f"convert {MODEL} {fitted}" if row.random else f"fit-init {plain} {fitted} {text}"
    make(fitted, f"{attach} {row.attach}" + ("" if row.random else f" {seed}"))
    found = {"fitted": scores(fitted, folder / "fitted.json", held_out)}
    distilled = train(folder / "distilled", f"distill {fitted}", f"{training} {row.distill} {seed}")
    found["distilled"] = scores(distilled, folder / "distilled.json", held_out)
    if row.again is not None:
        anew = folder / "importance"
        make(anew, f"fit-init {distilled} {anew} {text} --only-importance {seed}")
        distilled = train(folder / "distilled-again", f"distill {anew}", f"{training} {row.again} {seed}")
        found["distilled again"] = scores(distilled, folder / "distilled-again.json", held_out)
    if row.finetune_steps is not None:
        # The control has the same tokens, the same objective and the same teacher.
        options = f"{training} --steps {row.finetune_steps} {FINETUNE} {seed}"
        control = f"exact-{row.finetune_steps}" + (f"-{given.seed}" if given.seed else "")
        exact = train(given.out / control, f"finetune {plain}", options)
        tuned = train(folder / "finetuned", f"finetune {distilled}", options)
        found["finetuned"] = scores(tuned, folder / "finetuned.json", f"{held_out} --reference {exact}")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    name = f"{given.model.parent.name}: {name}" if given.model else name
    results[name] = {"options": dataclasses.asdict(row), **found}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for stage, of_stage in found.items():
        print(stage, json.dumps(of_stage))


def train(run: Path, what: str, options: str) -> Path:
    """The model of a run of `gsa train`."""
    make(run / "model", f"train {what} {run} {options}")
    return run / "model"


def has_splats(checkpoint: Path) -> bool:
    """Whether there is something to distil."""
    splats = read_config(checkpoint / "config.json").splats
    return splats is not None and splats.has_splats


def scores(checkpoint: Path, out: Path, options: str) -> dict[str, Any]:
    """Perplexity ratios of the arms, with their intervals, and the share of the gap that is closed."""
    make(out, f"eval {checkpoint} --json {out} {options}")
    values = json.loads(out.read_text(encoding="utf-8"))
    return {
        "tokens": values["tokens"],
        "exact_perplexity": values["arms"][0]["perplexity"]["value"],
        "ratios": {arm["name"]: arm["perplexity_ratio"] for arm in values["arms"][1:]},
        "state_bytes": values["state_bytes"],
        "gap_closed": {name: values[name] for name in ("gap_closed", "closed_by_splats", "closed_by_kept")},
    }


def make(result: Path, command: str) -> None:
    """Runs a `gsa` command unless its result is there."""
    if result.exists():
        return
    result.parent.mkdir(parents=True, exist_ok=True)
    print(f"\n$ gsa {command}", flush=True)
    subprocess.run([sys.executable, "-m", "gsa_jax.cli", *shlex.split(command)], check=True)


if __name__ == "__main__":
    main()
