"""What splats and kept keys remember of a number that was told once, with a model that can do the task.

    python benchmarks/passkey.py --text TRAIN --eval-text VALID --out FOLDER

The bundled model cannot say a number that it was told. So it is taught: fine-tuned, exact, on stories in which a
number is told once and asked for at the end, in the words of `gsa_jax.evaluation.passkey`, first short ones, then
longer ones, and with its positions interpolated to four times as many, ones as long as these. It is 23 million tokens
of lessons, an hour or more on two CPU cores. Then splats are fitted and distilled for it, without and with kept keys,
and asked at 1, 2 and 4 times the length that the model came with.
Writes benchmarks/results/passkey.json; commands whose result is there are not repeated.

May be changed here: the lessons, and which splats are fitted.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
from quality import MODEL, make, train

from gsa_jax.evaluation.passkey import QUESTION, REMEMBER
from gsa_jax.text import read_documents
from gsa_jax.text_files import DOCUMENT_SEPARATOR

RESULTS = Path(__file__).parent / "results" / "passkey.json"
TEACH = "--batch-size 4 --optimizer.warmup-steps 20 --optimizer.learning-rate 1e-3"
LONGER = "--batch-size 2 --optimizer.warmup-steps 20 --optimizer.learning-rate 5e-4"
LESSONS = (
    (2, f"--steps 600 {TEACH}"),
    (5, f"--steps 600 {TEACH}"),
    (12, f"--steps 800 {TEACH}"),
    (30, f"--steps 3000 {TEACH}"),
    (30, f"--steps 3000 {TEACH}"),
    (60, f"--steps 800 {LONGER} --max-positions 2048 --position-extension interpolate"),
    (115, f"--steps 800 {LONGER}"),
)
"""Sentences around the number, some 14 tokens each, and the training; 30 fill 512 positions, 115 fill 2,048."""
SENTENCES = 240_000
"""Of all documents of a lesson together."""
DISTILL = "--steps 400 --batch-size 2 --optimizer.warmup-steps 20 --optimizer.splat-learning-rate 0.02"
FITS = {
    "S = 64, W = 64": "--num-splats 64 --window 64 --kept 0 --importance norm",
    "S = 64, W = 64, M = 8": "--num-splats 64 --window 64 --kept 8 --importance learned",
    "S = 64, W = 64, M = 32": "--num-splats 64 --window 64 --kept 32 --importance learned",
    "S = 64, W = 64, M = 32, by norm": "--num-splats 64 --window 64 --kept 32 --importance norm",
}


def main() -> None:
    """Teaches, fits, asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="training text: stories")
    parser.add_argument("--eval-text", type=Path, required=True, help="held-out stories, to hide numbers in")
    parser.add_argument("--out", type=Path, required=True, help="folder for texts, checkpoints and runs")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model, lesson = given.out / "plain", given.text
    make(model, f"convert {MODEL} {model}")
    for number, (sentences, training) in enumerate(LESSONS, 1):
        lesson = given.out / f"told-{number}.txt"
        write_lesson(read_documents(given.text), lesson, sentences, seed=number)
        model = train(given.out / f"taught-{number}", f"finetune {model}", f"--text {lesson} {training}")
    results = {}
    for name, options in FITS.items():
        folder = given.out / re.sub(r"\W+", "-", name)
        make(folder / "fitted", f"fit-init {model} {folder / 'fitted'} --text {lesson} {options}")
        splats = train(folder / "distilled", f"distill {folder / 'fitted'}", f"--text {lesson} {DISTILL}")
        out = folder / "scores.json"
        make(out, f"eval {splats} --task passkey --text {given.eval_text} --context 512 --json {out}")
        found = json.loads(out.read_text(encoding="utf-8"))
        results[name] = {key: value for key, value in found.items() if key not in ("checkpoint", "text")}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def write_lesson(documents: list[str], path: Path, sentences: int, seed: int) -> None:
    """Documents of so many sentences with a number told between two of them, and asked for at the end."""
    draws = np.random.default_rng(seed)
    pool = [sentence for document in documents for sentence in re.split(r"(?<=[.!?])\s+", document) if sentence]
    told = []
    for _ in range(SENTENCES // sentences):
        start = int(draws.integers(len(pool) - sentences))
        around, number = pool[start : start + sentences], draws.integers(10_000, 100_000)
        around.insert(int(draws.integers(sentences + 1)), f"{QUESTION} {number}{REMEMBER}".strip())
        told.append(" ".join(around) + f"{QUESTION} {number}")
    path.write_text(DOCUMENT_SEPARATOR.join(told), encoding="utf-8")


if __name__ == "__main__":
    main()
