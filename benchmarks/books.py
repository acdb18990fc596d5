"""What splats cost at four times the length that the bundled model was made for, on books.

    python benchmarks/books.py --books FOLDER --out FOLDER

extends the model's 512 positions to 2,048 and fine-tunes it at that length, exact; fits and distils splats for what
comes out, without and with kept keys; and scores them on a book that none has seen, by position up to 4,096, and on
passkeys. The training text tells a number every now and then, in the words of `gsa_jax.evaluation.passkey`: what the
model cannot do at all, its splats cannot keep. Prints the `gsa` commands and what they find. A command whose result is
there is not repeated.

May be changed here: the text, and the options of the commands.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from quality import MODEL, has_splats, make, train

from gsa_jax.evaluation.passkey import QUESTION, REMEMBER
from gsa_jax.text_files import DOCUMENT_SEPARATOR

RESULTS = Path(__file__).parent / "results" / "books.json"
HELD_OUT = "peter_pan_pg16.txt"
CHAPTERS = 17
"""Of `HELD_OUT`, each a document."""
PASSAGE = 40
"""Sentences of a document of the training text; some 2,000 tokens."""
TOLD = 8
"""How often a document says its number."""

LENGTH = "--context 2048 --batch-size 2 --optimizer.warmup-steps 20"
FINETUNE = f"--max-positions 2048 {LENGTH} --steps 300 --optimizer.learning-rate 1e-3"
FITS = {
    "S = 64, W = 64": "--num-splats 64 --window 64 --kept 0 --importance norm",
    "S = 32, W = 64, M = 64": "--num-splats 32 --window 64 --kept 64 --importance learned",
    "W = 32, M = 128": "--num-splats 0 --window 32 --kept 128 --importance learned",
}
DISTILL = f"{LENGTH} --steps 150 --optimizer.splat-learning-rate 0.02"


def main() -> None:
    """Makes the texts, trains, scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help=f"folder of text files, one of them {HELD_OUT}")
    parser.add_argument("--out", type=Path, required=True, help="folder for texts, checkpoints and runs")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    told, held_out = given.out / "told.txt", given.out / "held-out.txt"
    books = {path.name: path.read_text(encoding="utf-8") for path in sorted(given.books.glob("*.txt"))}
    chapters = re.split(r"\n(?=Chapter \d+ )", books.pop(HELD_OUT))[-CHAPTERS:]  # they are listed first
    held_out.write_text(DOCUMENT_SEPARATOR.join(chapters), encoding="utf-8")
    told.write_text(DOCUMENT_SEPARATOR.join(_with_numbers(list(books.values()))), encoding="utf-8")

    plain = given.out / "plain"
    make(plain, f"convert {MODEL} {plain}")
    exact = train(given.out / "exact", f"finetune {plain}", f"--text {told} {FINETUNE}")
    longer = "--max-positions 4096 --position-extension"
    scores = {
        "2,048 positions": "",
        "4,096 positions, interpolated": f"{longer} interpolate",
        "4,096 positions, tiled": f"{longer} tile",
        "passkey": f"--task passkey --context 512 {longer} tile",
    }
    results: dict[str, dict[str, Any]] = {}
    for fit, attach in FITS.items():
        folder = given.out / re.sub(r"\W+", "-", fit)
        make(folder / "fitted", f"fit-init {exact} {folder / 'fitted'} --text {told} {attach}")
        splats = folder / "fitted"
        if has_splats(splats):
            splats = train(folder / "distilled", f"distill {splats}", f"--text {told} {DISTILL}")
        for number, (name, options) in enumerate(scores.items()):
            out = folder / f"scores-{number}.json"
            make(out, f"eval {splats} --json {out} --text {held_out} {options}")
            found = json.loads(out.read_text(encoding="utf-8"))
            values = {key: value for key, value in found.items() if key not in ("checkpoint", "text")}
            results.setdefault(fit, {})[name] = values
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _with_numbers(books: list[str]) -> list[str]:
    """Documents of `PASSAGE` sentences with a number of five digits in each, told `TOLD` times."""
    draws = np.random.default_rng(1)
    documents = []
    for book in books:
        sentences = re.split(r"(?<=[.!?])\s+", book)
        for start in range(0, len(sentences) - PASSAGE, PASSAGE):
            passage = sentences[start : start + PASSAGE]
            sentence = f"{QUESTION} {draws.integers(10_000, 100_000)}{REMEMBER}".strip()
            for place in sorted(draws.choice(PASSAGE, TOLD, replace=False), reverse=True):
                passage.insert(place, sentence)
            documents.append(" ".join(passage))
    return documents


if __name__ == "__main__":
    main()
