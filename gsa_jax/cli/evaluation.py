"""`gsa eval`.

May be changed here: its options and what it prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from gsa_jax.cli.base import Command, print_table, progress

if TYPE_CHECKING:
    from gsa_jax.evaluation import Evaluation
    from gsa_jax.scores import Estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Measure what splats cost: perplexity beside the exact model, with controls and 95 % intervals."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder, with splats."""
    text: Path
    """UTF-8 file of documents that the model has not been trained on."""
    window: int | None = None
    """Tokens that splat layers see exactly; 0 for splats alone. By default the checkpoint's."""
    context: int | None = None
    """Tokens of a window of text. By default all that the model has positions for."""
    max_documents: int | None = None
    """Use the first so many documents."""
    json: Path | None = None
    """File to make with all numbers."""

    def run(self) -> int:
        from gsa_jax.evaluation import evaluate
        from gsa_jax.files import new_file

        with new_file(self.json) if self.json else contextlib.nullcontext() as staging:
            evaluation = evaluate(
                self.checkpoint,
                self.text,
                window=self.window,
                context=self.context,
                max_documents=self.max_documents,
                progress=lambda batches: progress(batches, "scoring"),
            )
            if staging is not None:
                staging.write_text(json.dumps(dataclasses.asdict(evaluation), indent=2) + "\n", encoding="utf-8")
        _print_evaluation(evaluation)
        return 0


def _print_evaluation(evaluation: Evaluation) -> None:
    print_table(
        f"{evaluation.checkpoint}: {evaluation.num_splats} splats and a window of {evaluation.window} tokens "
        f"in layers {', '.join(map(str, evaluation.layers))}",
        ["model", "cross-entropy", "perplexity", "bits/byte", "ratio to exact"],
        [
            [
                arm.name,
                f"{arm.cross_entropy.value:.4f}",
                _show(arm.perplexity, 3),
                f"{arm.bits_per_byte.value:.4f}",
                _show(arm.perplexity_ratio, 4),
            ]
            for arm in evaluation.arms
        ],
    )
    names = [arm.name for arm in evaluation.arms]
    print_table(
        "perplexity (exact) and ratios to it, by position in the window of text",
        ["positions", "tokens", *names],
        [
            [
                f"{bucket.first}-{bucket.last}",
                f"{bucket.tokens:,}",
                f"{math.exp(bucket.cross_entropy['exact'].value):.3f}",
                *(f"{bucket.perplexity_ratio[name].value:.4f}" for name in names[1:]),
            ]
            for bucket in evaluation.buckets
        ],
    )
    for note in evaluation.notes:
        print(note)
    documents = "1 document" if evaluation.documents == 1 else f"{evaluation.documents:,} documents"
    print(f"{documents}, {evaluation.tokens:,} tokens, {evaluation.bytes:,} bytes; context {evaluation.context}")
    if evaluation.gap_closed is not None:
        print(f"share of the gap from window-only to exact that the splats close: {_show(evaluation.gap_closed, 3)}")
    elif not evaluation.notes:
        print("window-only is no worse than exact: there is no gap that splats could close")


def _show(estimate: Estimate, digits: int) -> str:
    shown = f"{estimate.value:z.{digits}f}"
    if estimate.interval is None:
        return shown
    low, high = estimate.interval
    return f"{shown} [{low:z.{digits}f}, {high:z.{digits}f}]"
