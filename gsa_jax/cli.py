"""The command `gsa`.

May be changed here: commands, their options and how results are printed. Each command is a dataclass whose fields are
its options and whose `run` calls one library function; nothing is computed here. Heavy imports wait until a command
runs, so that `gsa --help` answers at once.

Exit codes: 0 done, 1 `verify` found a difference, 2 bad input (one line on stderr; a traceback with `--debug`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gsa_jax.errors import InputError

if TYPE_CHECKING:
    from gsa_jax.convert.verify import Comparison

_PLAIN_WIDTH = 120
"""Columns of a table that is not printed on a terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Command:
    debug: bool = False
    """Show a traceback when something fails."""

    def run(self) -> int:
        raise AssertionError("a command defines run()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(_Command):
    """Convert a PyTorch GPT-Neo into a checkpoint."""

    source: tyro.conf.Positional[str]
    """Hugging Face folder, or hub id (owner/name)."""
    out: tyro.conf.Positional[Path]
    """Checkpoint folder to make."""
    num_splats: int | None = None
    """Splats per head to attach to a source that has none."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the parameters; as the source stores them by default."""
    allow_nonfinite: bool = False
    """Convert NaN and infinite weights as well."""

    def run(self) -> int:
        from gsa_jax.convert import convert

        report = convert(
            self.source,
            self.out,
            num_splats=self.num_splats,
            dtype=self.dtype,
            allow_nonfinite=self.allow_nonfinite,
            progress=lambda names: _progress(names, "reading tensors"),
        )
        _print_table(
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
            ],
        )
        if report.ignored:
            _print_table("ignored", ["tensor", "why"], [[name, why] for name, why in report.ignored.items()])
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(_Command):
    """Write a checkpoint as a Hugging Face folder."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    out: tyro.conf.Positional[Path]
    """Hugging Face folder to make."""

    def run(self) -> int:
        from gsa_jax.convert import export

        with _status("writing"):
            report = export(self.checkpoint, self.out)
        _print_table(
            f"{self.checkpoint} -> {self.out}",
            ["what", "value"],
            [
                ["tensors", f"{report.tensors}"],
                ["bytes", f"{report.bytes:,}"],
                ["dialect of splats", report.dialect],
            ],
        )
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(_Command):
    """Compare a checkpoint's logits with those of its PyTorch source."""

    source: tyro.conf.Positional[str]
    """Hugging Face folder, or hub id, that was converted."""
    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    text: Path | None = None
    """UTF-8 file to compare on, besides random ids."""

    def run(self) -> int:
        from gsa_jax.convert.verify import verify

        with _status("running both models"):
            comparisons = verify(self.source, self.checkpoint, text=self.text)
        _print_table(
            f"{self.checkpoint} against {self.source}",
            ["oracle", "input", "tokens", "max abs", "rel. RMS", "tolerance", "top-1", "loss", "its loss", ""],
            [_comparison_row(comparison) for comparison in comparisons],
        )
        return 0 if all(comparison.agrees for comparison in comparisons) else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(_Command):
    """Continue prompts."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction]
    """Text to continue; repeat the option for a batch."""
    max_new_tokens: int = 200
    """Tokens to add at most."""
    temperature: float = 0.0
    """0 takes the most likely token, 1 draws from the model's distribution."""
    top_k: int | None = None
    """Draw from this many of the most likely tokens."""
    top_p: float | None = None
    """Draw from the smallest set of tokens with this probability."""
    seed: int = 0
    """Of the draws."""
    num_samples: int = 1
    """Continuations of each prompt."""
    stream: bool = False
    """Print the text as it comes (one prompt, one sample)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""

    def run(self) -> int:
        from gsa_jax.checkpoint import load, load_tokenizer
        from gsa_jax.generation import generate_stream
        from gsa_jax.sampling import make_sampler

        sampler = make_sampler(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        if self.num_samples < 1:
            raise InputError(f"--num-samples {self.num_samples}: must be >= 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise InputError(f"--num-samples {self.num_samples}: all the same at temperature 0; raise --temperature")
        if self.stream and (len(self.prompt) > 1 or self.num_samples > 1):
            raise InputError("--stream prints one text; give one --prompt and one sample")
        model = load(self.checkpoint, dtype=self.dtype, param_dtype=self.dtype)
        tokenizer = load_tokenizer(self.checkpoint)
        prompts = [tokenizer.encode(text) for text in self.prompt for _ in range(self.num_samples)]
        rows: list[list[int]] = [[] for _ in prompts]
        started, printed, decoded = time.perf_counter(), "", 0
        for tokens in generate_stream(
            model,
            prompts,
            max_new_tokens=self.max_new_tokens,
            sampler=sampler,
            seed=self.seed,
            tokens_per_step=1 if self.stream else self.max_new_tokens,
        ):
            if self.stream and not decoded:  # not before the request has been checked
                print(self.prompt[0], end="", flush=True)
            decoded += tokens.size
            for row, new in zip(rows, tokens.tolist(), strict=True):
                row.extend(new)
            if self.stream:
                text = tokenizer.decode(rows[0], skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                    print(text[len(printed) :], end="", flush=True)
                    printed = text
        if self.stream:
            print()
        else:
            texts = [text for text in self.prompt for _ in range(self.num_samples)]
            for number, (prompt, row) in enumerate(zip(texts, rows, strict=True)):
                if len(rows) > 1:
                    print(f"--- {number + 1} of {len(rows)}")
                print(prompt + tokenizer.decode(row, skip_special_tokens=True))
        seconds = time.perf_counter() - started
        print(f"{decoded} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
        return 0


def _drop_late_callbacks(unraisable: sys.UnraisableHookArgs) -> None:
    """Prints what a callback raised, unless it only says that Orbax was quicker to fail than TensorStore.

    After a failed read or write Orbax closes its event loop, while threads of TensorStore still want to report to it.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


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


def _progress(names: Iterable[str], label: str) -> Iterable[str]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(names, description=label, console=console, transient=True, disable=not console.is_terminal)


def _status(label: str) -> AbstractContextManager[object]:
    """Shows on a terminal that something is going on."""
    from rich.console import Console

    return Console(stderr=True).status(label)


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


_COMMANDS: dict[str, Any] = {"convert": Convert, "export": Export, "verify": Verify, "generate": Generate}


def main() -> None:
    """Entry point of `gsa`; exits with the code of the command."""
    command: _Command = tyro.extras.subcommand_cli_from_dict(
        _COMMANDS, prog="gsa", description="GPT-Neo in JAX/Flax, with attention through Gaussian splats."
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not command.debug:
        for logger in ("absl", "asyncio"):  # where Orbax and its event loop report what is raised to us anyway
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        sys.unraisablehook = _drop_late_callbacks
    # A terminated command unwinds like an interrupted one, so that half-written output is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(command.run())
    except InputError as error:
        if command.debug:
            raise
        print(f"gsa: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
