"""Draws docs/recall.svg from benchmarks/results/recall.json: `python benchmarks/plot_recall.py`.

May be changed here: the figure.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
STYLES = {
    "kept, questions": ("kept keys, learned at questions", "o", "-", "#1d4ed8"),
    "kept, learned": ("kept keys, learned", "P", "-.", "#0891b2"),
    "kept, norm": ("kept keys, by norm", "s", "--", "#60a5fa"),
    "both": ("splats and kept keys", "D", "-", "#047857"),
    "splats": ("splats", "^", "-", "#c2410c"),
    "based": ("Based's Taylor features", "v", "-.", "#7c3aed"),
    "window": ("window", "x", ":", "#4b5563"),
}
"""Label, marker, line and colour of each kind."""


def draw(written: dict[str, Any]) -> None:
    """A column for each context, a row for each density: accuracy against the state's share of the exact cache.

    Lines and full markers: the rest of the model as it was. Hollow markers: all of it trained with its new attention.
    """
    matplotlib.rcParams["svg.hashsalt"] = "gsa-jax"
    matplotlib.rcParams["svg.fonttype"] = "none"
    contexts = sorted(map(int, written["exact"]))
    densities = list(written["exact"][str(contexts[0])]["accuracy"])
    figure = Figure(figsize=(3.4 * len(contexts), 6.6), facecolor="white", layout="constrained")
    panels = figure.subplots(len(densities), len(contexts), sharex=True, sharey=True, squeeze=False)
    for line, density in zip(panels, densities, strict=True):
        for axes, context in zip(line, contexts, strict=True):
            for kind, (label, marker, dashes, colour) in STYLES.items():
                rows = [row for row in written["results"] if (row["context"], row["kind"]) == (context, kind)]
                tuned = [row for row in rows if row["stage"] == "tuned"]
                x, y = [row["share"] for row in tuned], [100 * row["accuracy"][density] for row in tuned]
                axes.plot(x, y, marker=marker, linestyle="", markeredgecolor=colour, markerfacecolor="white", zorder=3)
                last = {row["size"]: row for row in rows if row["stage"] != "tuned"}
                points = sorted((row["share"], 100 * row["accuracy"][density]) for row in last.values())
                x, y = zip(*points, strict=True) if points else ((), ())
                axes.plot(x, y, label=label, marker=marker, linestyle=dashes, color=colour, markersize=5)
            axes.axhline(95, color="#9ca3af", linewidth=0.8)
            axes.axvline(1 / 8, color="#9ca3af", linewidth=0.8)
            pairs = context // int(density.split("/")[1])
            axes.set_title(f"{context} tokens, {pairs} pairs", fontsize=10)
            axes.set_xscale("log", base=2)
            axes.set_xticks([1 / 32, 1 / 16, 1 / 8, 1 / 4], ["1/32", "1/16", "1/8", "1/4"])
            axes.set_xlim(1 / 40, 1 / 2.2)
            axes.set_ylim(0, 102)
            axes.grid(alpha=0.25)
        line[0].set_ylabel("questions answered, %")
    figure.supxlabel(
        "state, as a share of the exact cache's bytes (grey lines: 1/8, and 95 %; hollow: all of the model trained)",
        fontsize=10,
    )
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    figure.savefig(ROOT / "docs" / "recall.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads((ROOT / "benchmarks" / "results" / "recall.json").read_text(encoding="utf-8")))
