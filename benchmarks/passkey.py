"""What splats and kept keys remember of a number that was told once, with a model that can do the task.

    python benchmarks/passkey.py --text TRAIN --eval-text VALID --out FOLDER

The bundled model cannot say a number that it was told. So it is taught: fine-tuned, exact, on texts in which a number
is told once and asked for at the end, made by `gsa_jax.evaluation.passkey` of other stories and with other numbers than
those it is asked for; first in short rows, then in longer ones, and with its positions tiled to four times as many, in
rows as long as these. Then splats are fitted and distilled for it, without and with kept keys, and asked at 1, 2 and 4
times the length that the model came with.
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

from gsa_jax.attention import state_bytes
from gsa_jax.config import read_config
from gsa_jax.evaluation.passkey import QUESTION, REMEMBER, make_items
from gsa_jax.text import read_documents, start_token
from gsa_jax.text_files import DOCUMENT_SEPARATOR
from gsa_jax.tokenizer_folder import open_tokenizer
from gsa_jax.train.data import TOKEN_DTYPE, TOKEN_SUFFIX

RESULTS = Path(__file__).parent / "results" / "passkey.json"
TEACH = "--optimizer.warmup-steps 20 --optimizer.learning-rate 1e-3"
LONGER = "--optimizer.warmup-steps 20 --optimizer.learning-rate 5e-4"
LESSONS = (
    (128, 16, 700, 0.1, TEACH),
    (256, 8, 300, 0.1, TEACH),
    (512, 4, 700, 0.1, TEACH),
    (1024, 2, 600, 0.1, f"{TEACH} --max-positions 2048 --position-extension tile"),
    (2048, 2, 1600, 0.1, LONGER),
    (2048, 2, 800, 0, LONGER),
)
"""Tokens of a row, rows of a step, steps, share of the texts that end where their row ends, and the training.

Positions are tiled: what was learned of the first 512 holds in the next from the start, while interpolated ones are new
everywhere. The last lesson is for answers that end shortly before the row does: with one text in ten at the very end,
the model said 88 % there and 8 % eight tokens before it.
"""
SHORTEST = 40
"""Tokens of the shortest text with a number in a lesson."""
DISTILL = "--steps 400 --batch-size 2 --optimizer.warmup-steps 20 --optimizer.splat-learning-rate 0.02"
FITS = {
    "S = 64, W = 64": "--num-splats 64 --window 64 --kept 0 --importance norm",
    "S = 64, W = 64, M = 8": "--num-splats 64 --window 64 --kept 8 --importance learned",
    "S = 64, W = 64, M = 32": "--num-splats 64 --window 64 --kept 32 --importance learned",
    "S = 32, W = 64, M = 64": "--num-splats 32 --window 64 --kept 64 --importance learned",
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
    model, lesson = given.out / "plain", given.out
    make(model, f"convert {MODEL} {model}")
    for number, (context, rows, steps, whole, training) in enumerate(LESSONS, 1):
        lesson, run = given.out / f"told-{number}", given.out / f"taught-{number}"
        if not (run / "model").exists():
            write_lesson(given.text, lesson, context, rows * steps, whole)
        options = f"--text {lesson}.bin --context {context} --batch-size {rows} --steps {steps} {training}"
        model = train(run, f"finetune {model}", options)
    results = {}
    for name, options in FITS.items():
        folder = given.out / re.sub(r"\W+", "-", name)
        make(folder / "fitted", f"fit-init {model} {folder / 'fitted'} --text {lesson}.txt {options}")
        splats = train(folder / "distilled", f"distill {folder / 'fitted'}", f"--text {lesson}.bin {DISTILL}")
        out = folder / "scores.json"
        make(out, f"eval {splats} --task passkey --text {given.eval_text} --context 512 --json {out}")
        found = json.loads(out.read_text(encoding="utf-8"))
        found["state_bytes"] = state_bytes(read_config(splats / "config.json"))
        results[name] = {key: value for key, value in found.items() if key not in ("checkpoint", "text")}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def write_lesson(text: Path, out: Path, context: int, count: int, whole: float) -> None:
    """Rows of texts that each hold a number, the question for it and the answer, as token ids; some also as text.

    Texts have all lengths, and the last of a row is cut off where the row ends: answers that all stood at the end of
    their rows would be learned by their position, and not in a row that is shorter by one. As `gsa train` cuts rows,
    each begins with the last token of the one before, which stands for its start token.
    """
    model, tokenizer, documents = read_config(MODEL / "config.json"), open_tokenizer(MODEL), read_documents(text)
    draws, start = np.random.default_rng(context), start_token(model)
    asked, remember = (len(tokenizer.encode(words)) for words in (QUESTION, REMEMBER))
    starts, lengths = np.concatenate([_texts(draws, context, whole) for _ in range(count)]).T
    items = make_items(documents, tokenizer, model, context, len(lengths), seed=context)
    answers = items.keys[np.arange(len(lengths)), items.told]
    parts = []
    for at, length, prompt, key, depth in zip(starts, lengths, items.prompts, answers, items.depth, strict=True):
        parts.append([start] if at else [])
        if length < SHORTEST:
            parts.append(prompt[1:length])
            continue
        until = depth + asked + len(key) + remember
        before, told, after = prompt[1:depth], prompt[depth:until], prompt[until:-asked]
        without = context - length
        first = int(draws.integers(max(without - len(after), 0), min(without, len(before)) + 1))
        parts += [before[first:], told, after[without - first :], prompt[-asked:], key]
    np.concatenate([[start], *parts]).astype(TOKEN_DTYPE).tofile(out.with_suffix(TOKEN_SUFFIX))
    texts = DOCUMENT_SEPARATOR.join(tokenizer.decode(prompt[1:].tolist()) for prompt in items.prompts[:200])
    out.with_suffix(".txt").write_text(texts, encoding="utf-8")


def _texts(draws: np.random.Generator, context: int, whole: float) -> list[tuple[int, int]]:
    """Where each text of a row starts, and its tokens."""
    texts, start = [], 0
    while start < context:
        left = context - start
        length = left if left < SHORTEST or draws.random() < whole else int(draws.integers(SHORTEST, left + 1))
        texts.append((start, length))
        start += length
    return texts


if __name__ == "__main__":
    main()
