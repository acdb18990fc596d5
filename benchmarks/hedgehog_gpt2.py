"""GPT-2 with splats beside the published conversion of GPT-2 by Hedgehog, on WikiText-103.

    python benchmarks/hedgehog_gpt2.py --model GPT2 --text TRAIN --eval-text TEST --out FOLDER

`GPT2` is a Hugging Face folder or hub id (the published row: GPT-2 of 124M parameters), `TRAIN` and `TEST` are texts of
WikiText-103. As in Zhang et al. (2024), "The Hedgehog & the Porcupine": the exact model is scored as it is and
fine-tuned on the text; the linear attention is distilled against the frozen exact one and then fine-tuned by
cross-entropy, for as many steps as the exact model; perplexity is per token of GPT-2's own vocabulary, in rows of its
whole context. Splats are placed before they are distilled, once beside a window and kept keys (hybrid, the preset) and
once alone (pure, as Hedgehog's features are). Runs the `gsa` commands, prints each of them and one table, and writes
FOLDER/hedgehog_gpt2.json. A command whose result is there is not repeated; trainings go on where they stopped.

The real row has not been run: neither GPT-2's weights nor WikiText-103 were at hand. This script is tested from end to
end with a small random GPT-2 and a small text.

May be changed here: the options of the commands.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import side_by_side
from quality import NOTHING_KEPT, make, scores, train

PUBLISHED = {"GPT-2, fine-tuned": 15.8, "Hedgehog, fine-tuned": 16.7}
"""Perplexities of the paper, of other runs on other machines: to be compared as ratios alone."""


def main() -> None:
    """Runs every stage, prints the table, writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id of a GPT-2")
    parser.add_argument("--text", type=Path, required=True, help="training text of WikiText-103")
    parser.add_argument("--eval-text", type=Path, required=True, help="test text of WikiText-103")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, runs and results")
    parser.add_argument("--hybrid", default="--preset hybrid", help="of fit-init, for the hybrid")
    parser.add_argument(
        "--pure", default=f"--num-splats 128 --window 0 {NOTHING_KEPT}", help="of fit-init, for splats alone"
    )
    steps = "--batch-size 8 --optimizer.warmup-steps 100"
    parser.add_argument(
        "--distill", default=f"--steps 2000 {steps} --optimizer.splat-learning-rate 0.02", help="of train distill"
    )
    parser.add_argument(
        "--finetune",
        default=f"--steps 10000 {steps} --optimizer.learning-rate 6e-4 --optimizer.weight-decay 0.01",
        help="of train finetune, of the exact model as well",
    )
    parser.add_argument("--eval-options", default="", help="of eval, such as --max-documents N")
    given = parser.parse_args()
    out, text, held_out = given.out, f"--text {given.text}", f"--text {given.eval_text} {given.eval_options}"

    plain = out / "plain"
    make(plain, f"convert {given.model} {plain}")
    exact = train(out / "exact", f"finetune {plain}", f"{text} {given.finetune}")
    found: dict[str, dict[str, Any]] = {
        "exact": scores(plain, out / "exact.json", held_out),
        "exact, fine-tuned": scores(exact, out / "exact-finetuned.json", held_out),
    }
    for mode in ("hybrid", "pure"):
        folder = out / mode
        fitted = folder / "fitted"
        make(fitted, f"fit-init {plain} {fitted} {text} {getattr(given, mode)}")
        found[f"{mode}, placed"] = scores(fitted, folder / "fitted.json", held_out)
        distilled = train(folder / "distilled", f"distill {fitted}", f"{text} {given.distill}")
        found[f"{mode}, distilled"] = scores(distilled, folder / "distilled.json", held_out)
        tuned = train(folder / "finetuned", f"finetune {distilled}", f"{text} {given.finetune}")
        of_exact = f"{held_out} --reference {exact}"
        found[f"{mode}, fine-tuned"] = scores(tuned, folder / "finetuned.json", of_exact)
    rows = [[name, *_cells(name, row)] for name, row in found.items()]
    rows += [
        [f"published: {name}", f"{value:.1f}", f"{value / PUBLISHED['GPT-2, fine-tuned']:.3f}", "", ""]
        for name, value in PUBLISHED.items()
    ]
    columns = ["", "perplexity", "to exact", "interval", "window alone"]
    options = {name: str(value) for name, value in vars(given).items()}
    written = {"options": options, "rows": found, "published": PUBLISHED}
    side_by_side.report(f"{given.model} on {given.eval_text.name}", columns, rows, written, out / "hedgehog_gpt2.json")


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    """Perplexity; its ratio to the exact model, trained alike; the ratio's interval; and that of the window alone."""
    exact, ratios = row["exact_perplexity"], row["ratios"]
    if name.startswith("exact"):
        return [f"{exact:.3f}", "1", "", ""]
    own = ratios["hybrid"]
    interval = "" if own["interval"] is None else " to ".join(f"{end:.4f}" for end in own["interval"])
    window_only = f"{ratios['window-only']['value']:.4f}" if "window-only" in ratios else ""
    return [f"{exact * own['value']:.3f}", f"{own['value']:.4f}", interval, window_only]


if __name__ == "__main__":
    main()
