"""`gsa fit-init` and `gsa diagnose`.

May be changed here: their options and what they print.
"""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from gsa_jax.cli.base import SplatCommand, TextCommand, json_report, print_table, progress, status
from gsa_jax.errors import InputError
from gsa_jax.splat_config import describe

if TYPE_CHECKING:
    from gsa_jax.splat_config import SplatConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitInit(SplatCommand, TextCommand):
    """Start splats where the queries and keys of a model are."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder, with splats, which are replaced, or without."""
    out: tyro.conf.Positional[Path]
    """Checkpoint folder to make."""
    seed: int = 0
    """Of the clustering and of the tokens that are looked at."""
    state_budget: str | None = None
    """Bytes that the splat layers may remember of one text, such as `500kB` or `1MB`: splats, windows and kept keys of
    each layer are chosen for it."""

    only_importance: bool = False
    """Leave the splats as they are, and learn for them what makes a key important; after a distillation, say."""

    def run(self) -> int:
        from gsa_jax.config import CONFIG_FILE, read_config
        from gsa_jax.files import refuse_existing
        from gsa_jax.fitting.fitted import default_splats, fit_importance_anew, fit_init

        if self.only_importance and self.state_budget is not None:
            raise InputError(
                "--only-importance keeps the splats that --state-budget would choose; leave one of them out"
            )
        started = time.perf_counter()
        refuse_existing(self.out)
        splats = self.splat_config(default_splats(read_config(self.checkpoint / CONFIG_FILE)))
        if self.state_budget is not None:
            splats = self._spend(parse_bytes(self.state_budget), splats)
        report = (fit_importance_anew if self.only_importance else fit_init)(
            self.checkpoint,
            self.out,
            self.text_files(),
            splats=splats,
            seed=self.seed,
            progress=lambda layers: progress(layers, "fitting layers"),
        )
        if report.heads:
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

    def _spend(self, budget: int, splats: SplatConfig | None) -> SplatConfig:
        from gsa_jax.fitting.budget import spend

        for name in ("num_splats", "window", "kept"):
            if getattr(self, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} is what --state-budget chooses; leave one of the two out")
        assert splats is not None, "there is a default"
        found = spend(
            self.checkpoint,
            self.text_files(),
            budget,
            splats=splats,
            seed=self.seed,
            progress=lambda steps: progress(steps, "spending the budget"),
        )
        print_table(
            f"{sum(layer.bytes for layer in found.layers):,} of {budget:,} bytes; a layer's price is what an error of "
            "its output of attention costs in nats per token",
            ["layer", "price", "splats", "window", "kept", "bytes", "error"],
            [
                [
                    f"{layer.layer}",
                    f"{layer.price:.3f}",
                    *(f"{number}" for number in layer.splats),
                    f"{layer.bytes:,}",
                    f"{layer.error:.2%}",
                ]
                for layer in found.layers
            ],
        )
        print(
            f"on text that nothing was chosen by, the loss rises by {found.rise:.4f} nats per token; with the best "
            f"that is the same for all layers ({found.uniform.num_splats} splats, a window of {found.uniform.window}, "
            f"{found.uniform.kept} kept keys) by {found.uniform_rise:.4f}"
        )
        if found.rise >= found.uniform_rise:
            print("so the same for all layers is taken")
        return found.splats


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> int:
    """A number of bytes such as `500kB` or `1MiB`.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    unit = _UNITS.get(match[2].lower() or "b") if match else None
    if match is None or unit is None:
        raise InputError(f"{text!r} is no number of bytes; write it as 500000, 500kB or 1MB")
    return int(float(match[1]) * unit)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnose(TextCommand):
    """Show how the splats of a checkpoint are doing, head by head."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    window: int | Literal["all"] | None = None
    """Tokens seen exactly; as the checkpoint says by default."""
    kept: int | None = None
    """Keys beyond the window that each head sees exactly; as the checkpoint says by default."""
    json: Path | None = None
    """File to make with all numbers."""

    def run(self) -> int:
        from gsa_jax.fitting import diagnose

        with status("measuring"), json_report(self.json) as write:
            diagnostics = diagnose(self.checkpoint, self.text_files(), window=self.window, kept=self.kept)
            write(diagnostics.to_json())
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
