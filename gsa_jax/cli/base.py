"""What commands share: the base class, options of splats, reports in JSON, progress and tables.

May be changed here: how results and progress look, and the options that name a `SplatConfig`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gsa_jax.errors import InputError
from gsa_jax.splat_config import SPLAT_PRESETS, SplatConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from gsa_jax.text_files import TextFiles

PLAIN_WIDTH = 120
"""Columns of a table that is not printed on a terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its fields are its options."""

    debug: bool = False
    """Show a traceback when something fails."""

    def run(self) -> int:
        """Does the work and returns the exit code."""
        raise AssertionError("a command defines run()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCommand(Command):
    """A command that reads text."""

    text: tuple[Path, ...]
    """Files of documents: UTF-8 text, .jsonl or .parquet; the first two also gzipped (.gz)."""
    text_field: str = "text"
    """Field of .jsonl and .parquet files that holds the text."""

    def text_files(self) -> TextFiles:
        """What the options name."""
        from gsa_jax.text_files import TextFiles

        return TextFiles(self.text, self.text_field)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplatCommand(Command):
    """A command that says which splats a model has."""

    preset: Literal["hybrid", "seed-phase1"] | None = None
    """hybrid: 32 splats, a window of 64 and 64 kept keys in global layers; seed-phase1: 2 splats, no window, in all."""
    num_splats: int | None = None
    """Splats per head."""
    window: int | Literal["all"] | None = None
    """Tokens seen exactly: a number, 0 for none, or `all`, which leaves the splats unused."""
    kept: int | None = None
    """Keys beyond the window that each head sees exactly."""
    importance: Literal["norm", "learned"] | None = None
    """What makes a key one to keep: its norm, or weights that are fitted to the text."""
    layers: Literal["global", "all"] | None = None
    """Layers that have splats."""
    terms: tuple[Literal["log_amplitudes", "norm_gain", "far_gain"], ...] = ()
    """Optional parameters of the far score."""

    def splat_config(self, default: SplatConfig | None) -> SplatConfig | None:
        """The preset or else the default, with what the other options say; None if nothing is given at all."""
        base = default if self.preset is None else SPLAT_PRESETS[self.preset]
        options = ("num_splats", "window", "kept", "importance", "layers")
        given: dict[str, Any] = {name: getattr(self, name) for name in options if getattr(self, name) is not None}
        given |= dict.fromkeys(self.terms, True)
        if base is not None:
            return dataclasses.replace(base, **given)
        if given and self.num_splats is None:
            first = next(iter(given))
            option = "terms" if first in self.terms else first.replace("_", "-")
            raise InputError(f"--{option}: how many splats? Give --num-splats or --preset as well")
        return SplatConfig(**given) if given else None


@contextlib.contextmanager
def json_report(out: Path | None) -> Iterator[Callable[..., None]]:
    """Gives a function that writes what `--json` asks for, with options of `json.dumps`; without a file, nothing.

    The file is refused before the work begins, and is whole or absent.
    """
    from gsa_jax.files import new_file

    with contextlib.nullcontext() if out is None else new_file(out) as staging:

        def write(values: Any, **options: Any) -> None:
            if staging is not None:
                staging.write_text(json.dumps(values, indent=2, **options) + "\n", encoding="utf-8")

        yield write


def progress(names: Iterable[str], label: str) -> Iterable[str]:
    """Shows on a terminal how far an iteration has come."""
    from rich.progress import track

    console = progress_console()
    return track(names, description=label, console=console, transient=True, disable=not console.is_terminal)


def status(label: str) -> Status:
    """Shows on a terminal that something is going on; its `update` says what now."""
    return progress_console().status(label)


def progress_console() -> Console:
    """Where progress is shown: on stderr, moving only if that is a terminal.

    Left to itself, rich takes a pipe for a terminal wherever the environment asks for colours, as in notebooks.
    """
    from rich.console import Console

    return Console(stderr=True, force_terminal=bool(sys.stderr and sys.stderr.isatty()))


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table as wide as the terminal, or `PLAIN_WIDTH`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH, force_terminal=False)
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
