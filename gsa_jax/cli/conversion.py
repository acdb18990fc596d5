"""`gsa convert`, `gsa export` and `gsa verify`.

May be changed here: their options and what they print.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from gsa_jax.cli.base import Command, SplatCommand, TextCommand, json_report, print_table, progress, status
from gsa_jax.errors import InputError

if TYPE_CHECKING:
    from gsa_jax.convert.verify import Comparison


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(SplatCommand):
    """Convert a PyTorch GPT-Neo or GPT-2 into a checkpoint; options of splats attach some to a source that has none."""

    source: tyro.conf.Positional[str]
    """Hugging Face folder, or hub id (owner/name)."""
    out: tyro.conf.Positional[Path]
    """Checkpoint folder to make."""
    splats_from: Path | None = None
    """Folder of splats that were trained for this model, as `gsa export --splats-only` makes it."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the parameters; as the source stores them by default."""
    allow_nonfinite: bool = False
    """Convert NaN and infinite weights as well."""
    tokenizer: Path | None = None
    """Folder with the tokenizer of a source that has none."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    subfolder: str | None = None
    """Folder inside of the source that holds the model."""

    def run(self) -> int:
        from gsa_jax.convert import convert

        splats = self.splat_config(None)
        if splats is not None and self.splats_from is not None:
            raise InputError("--splats-from brings a configuration of its own; leave the other options of splats out")
        report = convert(
            self.source,
            self.out,
            splats=self.splats_from or splats,
            dtype=self.dtype,
            allow_nonfinite=self.allow_nonfinite,
            tokenizer=self.tokenizer,
            revision=self.revision,
            subfolder=self.subfolder,
            progress=lambda names: progress(names, "reading tensors"),
        )
        print_table(
            f"{self.source} -> {self.out}",
            ["what", "value"],
            [
                ["tensors", f"{report.tensors}"],
                ["parameters", f"{report.parameters:,}"],
                ["bytes", f"{report.bytes:,}"],
                ["dtypes", ", ".join(f"{count} x {dtype}" for dtype, count in report.dtypes.items())],
                ["dialect", report.dialect],
                ["splats", f"{report.splats} ({report.splat_parameters:,} parameters)"],
                ["tokenizer", ", ".join(report.tokenizer) or "none in the source"],
                ["ignored", f"{len(report.ignored)} tensors"],
                *(["taken out of", container] for container in report.containers),
                *([["wrappers left out", ", ".join(report.wrappers)]] if report.wrappers else []),
                *([["files left behind", ", ".join(report.left_behind)]] if report.left_behind else []),
            ],
        )
        for warning in report.warnings:
            print(f"gsa: warning: {warning}; no text will end or start with it", file=sys.stderr)
        if report.ignored:
            print_table("ignored", ["tensor", "why"], [[name, why] for name, why in report.ignored.items()])
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a checkpoint as a Hugging Face folder; with splats, it has the PyTorch code that computes through them."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    out: tyro.conf.Positional[Path]
    """Hugging Face folder to make."""
    exact: bool = False
    """Write the plain model (GPT-Neo, GPT-2) with exact attention, whose splats lie in it unused."""
    splats_only: bool = False
    """Write the splats alone, for `gsa convert --splats-from` to put beside the model again."""

    def run(self) -> int:
        from gsa_jax.convert import export

        with status("writing"):
            report = export(self.checkpoint, self.out, exact=self.exact, splats_only=self.splats_only)
        print_table(
            f"{self.checkpoint} -> {self.out}",
            ["what", "value"],
            [
                ["what", report.holds],
                ["tensors", f"{report.tensors}"],
                ["bytes", f"{report.bytes:,}"],
                ["dialect of splats", report.dialect],
            ],
        )
        if report.holds == "model with splats":
            print(f"load it with: AutoModelForCausalLM.from_pretrained({str(self.out)!r}, trust_remote_code=True)")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(TextCommand):
    """Compare a checkpoint's logits with those of its PyTorch source."""

    source: tyro.conf.Positional[str]
    """Hugging Face folder, or hub id, that was converted."""
    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    text: tuple[Path, ...] = ()
    """Files of documents to compare on, besides random ids."""
    revision: str | None = None
    """Branch, tag or commit of the hub's repository."""
    subfolder: str | None = None
    """Folder inside of the source that holds the model."""
    json: Path | None = None
    """File to make with all numbers."""

    def run(self) -> int:
        from gsa_jax.convert.verify import verify

        with status("running both models"), json_report(self.json) as write:
            comparisons = verify(
                self.source,
                self.checkpoint,
                text=self.text_files() if self.text else None,
                revision=self.revision,
                subfolder=self.subfolder,
            )
            rows = [{**dataclasses.asdict(found), "agrees": found.agrees} for found in comparisons]
            write({"source": self.source, "checkpoint": str(self.checkpoint), "comparisons": rows})
        print_table(
            f"{self.checkpoint} against {self.source}",
            ["oracle", "input", "tokens", "max abs", "rel. RMS", "tolerance", "top-1", "loss", "its loss", ""],
            [_comparison_row(comparison) for comparison in comparisons],
        )
        return 0 if all(comparison.agrees for comparison in comparisons) else 1


def _comparison_row(comparison: Comparison) -> list[str]:
    return [
        comparison.oracle,
        comparison.inputs,
        f"{comparison.tokens:,}",
        f"{comparison.max_abs:.1e}",
        f"{comparison.relative_rms:.1e}",
        f"{comparison.tolerance:.0e}",
        f"{comparison.top1_agreement:.2%}",
        f"{comparison.loss:.5f}",
        f"{comparison.oracle_loss:.5f}",
        "agrees" if comparison.agrees else "DIFFERS",
    ]
