"""`gsa eval`.

May be changed here: its options and what it prints.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from gsa_jax.cli.base import TextCommand, json_report, print_table, progress
from gsa_jax.errors import InputError
from gsa_jax.splat_config import describe

if TYPE_CHECKING:
    from gsa_jax.evaluation.passkey import Passkey
    from gsa_jax.evaluation.perplexity import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(TextCommand):
    """Measure what splats cost: a model with splats beside the exact one, with controls and 95 % intervals.

    Of a checkpoint without splats, the exact model alone is measured.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder, with splats or without."""
    text: tuple[Path, ...]
    """Files of documents that the model has not been trained on: UTF-8 text, .jsonl or .parquet, .gz as well."""
    task: Literal["perplexity", "passkey"] = "perplexity"
    """Predict the text; or find a number hidden in it, at 1, 2, 4 and 8 times the training length."""
    window: int | Literal["all"] | None = None
    """Tokens that splat layers see exactly: a number, or 0 for none. By default the checkpoint's."""
    kept: int | None = None
    """Keys beyond the window that each head of a splat layer sees exactly. By default the checkpoint's."""
    context: int | None = None
    """Tokens of a row of text, by default all that the model has positions for; in passkey, the training length, by
    default all that the checkpoint has positions for."""
    max_documents: int | None = None
    """Use the first so many documents."""
    max_positions: int | None = None
    """Give all models so many positions."""
    position_extension: Literal["interpolate", "tile"] | None = None
    """How: stretch the position embedding, which is the default, or repeat it."""
    reference: Path | None = None
    """Checkpoint folder of the exact model to compare with. By default the checkpoint without its splats."""
    items: int | None = None
    """Of passkey, for each length: a multiple of 10, by default 50."""
    json: Path | None = None
    """File to make with all numbers."""

    def run(self) -> int:
        from gsa_jax.evaluation import evaluate, evaluate_passkey
        from gsa_jax.evaluation.passkey import Passkey

        options = self._options()
        with json_report(self.json) as write:
            run_task = evaluate_passkey if self.task == "passkey" else evaluate
            found = run_task(self.checkpoint, self.text_files(), **options)
            write(dataclasses.asdict(found))
        if isinstance(found, Passkey):
            _print_passkey(found)
        else:
            _print_evaluation(found)
        return 0

    def _options(self) -> dict[str, Any]:
        """Arguments of the task's function: those that are given, and the progress bar."""
        if self.position_extension is not None and self.max_positions is None:
            raise InputError("--position-extension does nothing alone; say how many positions: --max-positions N")
        if self.items is not None and self.task != "passkey":
            raise InputError(f"--items belongs to --task passkey; leave it out of {self.task}")
        names = (
            "window",
            "kept",
            "context",
            "max_documents",
            "max_positions",
            "position_extension",
            "reference",
            "items",
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given | {"progress": lambda batches: progress(batches, "scoring")}


def _print_evaluation(evaluation: Evaluation) -> None:
    from gsa_jax.evaluation.intervals import perplexity

    splats = evaluation.splats
    layers = ", ".join(map(str, evaluation.layers))
    has = "without splats" if splats is None else f"{describe(splats)} in layers {layers}"
    print_table(
        f"{evaluation.checkpoint}: {has}",
        ["model", "cross-entropy", "perplexity", "bits/byte", "ratio to exact"],
        [
            [
                arm.name,
                f"{arm.cross_entropy.value:.4f}",
                arm.perplexity.shown(3),
                f"{arm.bits_per_byte.value:.4f}",
                arm.perplexity_ratio.shown(4),
            ]
            for arm in evaluation.arms
        ],
    )
    names = [arm.name for arm in evaluation.arms]
    print_table(
        "perplexity (exact) and ratios to it, by position in the row of text",
        ["positions", "tokens", *names],
        [
            [
                f"{bucket.first}-{bucket.last}",
                f"{bucket.tokens:,}",
                f"{perplexity(bucket.cross_entropy['exact'].value):.3f}",
                *(f"{bucket.perplexity_ratio[name].value:.4f}" for name in names[1:]),
            ]
            for bucket in evaluation.buckets
        ],
    )
    for note in evaluation.notes:
        print(note)
    documents = "1 document" if evaluation.documents == 1 else f"{evaluation.documents:,} documents"
    print(f"{documents}, {evaluation.tokens:,} tokens, {evaluation.bytes:,} bytes; context {evaluation.context}")
    if splats is None:
        return
    print(f"splat layers remember {evaluation.state_bytes:,} bytes of a text of any length")
    gaps = {
        "window-only": (
            evaluation.gap_closed,
            "splats and kept keys close" if splats.keeps else "splats close",
        ),
        "without-splats": (evaluation.closed_by_splats, "splats close"),
        "without-kept": (evaluation.closed_by_kept, "kept keys close"),
    }
    for arm, (share, what) in gaps.items():
        if share is not None:
            print(f"share of the gap from {arm} to exact that {what}: {share.shown(3)}")
        elif arm in names:
            print(f"{arm} is no worse than exact: there is no gap to close")


def _print_passkey(passkey: Passkey) -> None:
    print_table(
        f"{passkey.checkpoint}: {describe(passkey.splats)} in layers {', '.join(map(str, passkey.layers))}",
        ["tokens", "model", f"chosen of {passkey.candidates}", "said", "nats for being told"],
        [
            [
                f"{row.length:,} ({row.multiple}x)",
                arm.name,
                arm.chosen.shown(3),
                arm.said.shown(3),
                arm.margin.shown(3),
            ]
            for row in passkey.rows
            for arm in row.arms
        ],
    )
    for note in passkey.notes:
        print(note)
    print(f"{passkey.items} items of each length; by chance {1 / passkey.candidates:.3f} of them are chosen rightly")
