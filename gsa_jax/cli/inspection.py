"""`gsa inspect`.

May be changed here: its options and what it prints.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from gsa_jax.cli.base import TextCommand, progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(TextCommand):
    """Make a page that shows a checkpoint's splats: where they are, what each head sees, and where it costs something.

    The page is one file that loads nothing, to be opened in a browser.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder with splats, or the run folder of a training, whose saved steps are shown as well."""
    out: Path
    """File of HTML to make."""
    text: tuple[Path, ...] = ()
    """Files of documents to look at: UTF-8 text, .jsonl or .parquet, .gz as well. By default stories that come with the
    package."""
    compare: Path | None = None
    """Checkpoint or run folder with the same splats at another time: the page shows how they moved from there."""
    figures: Path | None = None
    """Folder to make with each chart as SVG and PNG."""
    window: int | Literal["all"] | None = None
    """Tokens seen exactly; as the checkpoint says by default."""
    kept: int | None = None
    """Keys beyond the window that each head sees exactly; as the checkpoint says by default."""

    def run(self) -> int:
        from gsa_jax.inspection import inspect

        inspect(
            self.checkpoint,
            self.out,
            text=self.text_files() if self.text else None,
            compare=self.compare,
            figures=self.figures,
            window=self.window,
            kept=self.kept,
            progress=lambda batches: progress(batches, "scoring"),
        )
        print(f"{self.out}: {self.out.stat().st_size:,} bytes; open it in a browser")
        if self.figures is not None:
            print(f"{self.figures}: {len(list(self.figures.iterdir())):,} files")
        return 0
