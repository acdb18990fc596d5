"""`gsa fit-init` and `gsa diagnose`.

May be changed here: their options and what they print.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Literal

import tyro

from gsa_jax.cli.base import Command, SplatCommand, describe, print_table, progress, status


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitInit(SplatCommand):
    """Start splats where the queries and keys of a model are."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder, with splats, which are replaced, or without."""
    out: tyro.conf.Positional[Path]
    """Checkpoint folder to make."""
    text: Path
    """UTF-8 file of documents to calibrate on."""
    seed: int = 0
    """Of the clustering and of the tokens that are looked at."""

    def run(self) -> int:
        from gsa_jax.checkpoint import CONFIG_FILE
        from gsa_jax.config import read_config
        from gsa_jax.files import refuse_existing
        from gsa_jax.fitting.placing import default_splats, fit_init

        started = time.perf_counter()
        refuse_existing(self.out)
        stored = read_config(self.checkpoint / CONFIG_FILE)
        report = fit_init(
            self.checkpoint,
            self.out,
            self.text,
            splats=self.splat_config(default_splats(stored)),
            seed=self.seed,
            progress=lambda layers: progress(layers, "fitting layers"),
        )
        print_table(
            f"{self.checkpoint} -> {self.out}",
            ["layer", "head", "sigma", "far gain", "entropy: exact", "splats", "splats in use", "dead splats"],
            [
                [
                    f"{head.layer}",
                    f"{head.head}",
                    f"{head.sigma:.3f}",
                    "" if head.far_gain is None else f"{head.far_gain:.2f}",
                    f"{head.teacher_entropy:.3f}",
                    f"{head.entropy:.3f}",
                    f"{head.usage:.1f}",
                    f"{head.dead_splats}",
                ]
                for head in report.heads
            ],
        )
        if report.importances:
            print_table(
                "what makes a key one to keep: share of the weight that is misplaced, on held-out rows",
                ["layer", "head", "nothing kept", "first tokens", "norm", "learned", "chosen"],
                [
                    [
                        f"{head.layer}",
                        f"{head.head}",
                        f"{head.nothing_kept:.2%}",
                        f"{head.first_tokens:.2%}",
                        f"{head.norm:.2%}",
                        f"{head.learned:.2%}",
                        head.chosen,
                    ]
                    for head in report.importances
                ],
            )
        print(f"{report.tokens:,} tokens in {time.perf_counter() - started:.1f} s, compilation included")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnose(Command):
    """Show how the splats of a checkpoint are doing, head by head."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    text: Path
    """UTF-8 file of documents to measure on."""
    window: int | Literal["all"] | None = None
    """Tokens seen exactly; as the checkpoint says by default."""
    kept: int | None = None
    """Keys beyond the window that each head sees exactly; as the checkpoint says by default."""
    json: Path | None = None
    """File to make with all numbers."""

    def run(self) -> int:
        from gsa_jax.files import new_file
        from gsa_jax.fitting import diagnose

        with status("measuring"), new_file(self.json) if self.json else contextlib.nullcontext() as staging:
            diagnostics = diagnose(self.checkpoint, self.text, window=self.window, kept=self.kept)
            if staging is not None:
                staging.write_text(json.dumps(diagnostics.to_json(), indent=2) + "\n", encoding="utf-8")
        print_table(
            f"{self.checkpoint}: {describe(diagnostics.splats)}; {diagnostics.tokens:,} tokens, "
            f"loss {diagnostics.loss:.4f}; of each pair the exact model's number comes first",
            [
                "layer",
                "head",
                "sigma",
                "entropy",
                "far mass",
                "splats in use",
                "dead",
                "gradient: centers",
                "scales",
                "",
            ],
            [
                [
                    f"{head.layer}",
                    f"{head.head}",
                    f"{head.sigma:.3f}",
                    f"{head.exact_entropy:.3f} {head.entropy:.3f}",
                    f"{head.exact_far_mass:.1%} {head.far_mass:.1%}",
                    f"{head.usage:.1f} of {head.num_splats}",
                    f"{head.dead_splats}",
                    f"{head.centers_gradient:.1e}",
                    f"{head.log_scales_gradient:.1e}",
                    "DEAD" if head.is_dead else "",
                ]
                for head in diagnostics.heads
            ],
        )
        for head in diagnostics.heads:
            if head.kept_words:
                words = ", ".join(
                    f"{word.word} ({word.times} times, {word.tokens:.0f} tokens)" for word in head.kept_words
                )
                print(f"layer {head.layer}, head {head.head} keeps: {words}")
        return 0
