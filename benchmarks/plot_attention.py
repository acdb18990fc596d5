"""Draws what `attention.py` measured: seconds per call by length, both axes logarithmic.

May be changed here: how the picture looks. It reads on light and dark pages because it brings its own background.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

COLOURS = ["#c2410c", "#1d4ed8", "#15803d", "#6b7280"]
MARKERS = ["o", "s", "^", "D"]


def measured(entries: list[dict[str, Any]]) -> dict[int, float]:
    """Seconds per call by length, without what was left out."""
    return {entry["length"]: entry["seconds_per_call"] for entry in entries if entry["run"]}


def plot(results: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Writes the picture, one panel per pass, in the format of the file's name."""
    matplotlib.rcParams["svg.hashsalt"] = "gsa-jax"
    figure = Figure(figsize=(10, 4.6), facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True)
    for axes, (which, by_contender) in zip(panels, results.items(), strict=True):
        for (name, entries), colour, marker in zip(by_contender.items(), COLOURS, MARKERS, strict=True):
            seconds = measured(entries)
            width = 2.4 if colour == COLOURS[0] else 1.4
            axes.plot(list(seconds), list(seconds.values()), marker, ls="-", lw=width, ms=5, color=colour, label=name)
        lengths = [entry["length"] for entry in next(iter(by_contender.values()))]
        axes.set(title=which, xlabel="tokens", xscale="log", yscale="log")
        axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(color="#e5e7eb", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds per call")
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
