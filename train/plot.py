"""A picture of a run: its loss, and its arms on held-out text.

May be changed here: what is drawn. The numbers are those of `metrics.jsonl`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from gsa_jax.errors import InputError, first_line
from gsa_jax.files import refuse_foreign, replace_text
from gsa_jax.train.metrics import METRICS_FILE, Record, read_metrics

PLOT_FILE = "metrics.svg"

_POINTS = 200
"""Of the curve of the loss; each is a mean over steps."""


def require_matplotlib() -> Any:
    """`matplotlib.figure.Figure`. Raises `InputError` if it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("drawing needs matplotlib; pip install 'gsa-jax[plot]'") from None
    return Figure


def plot_run(folder: Path) -> Path:
    """Draws a run's metrics into `metrics.svg` in its folder, anew each time.

    Raises:
        InputError: there are no metrics, matplotlib is not installed, or the file cannot be written.
    """
    figure_class = require_matplotlib()
    refuse_foreign(folder, [PLOT_FILE])  # which is written, wherever a link leads
    records = read_metrics(folder)
    trained = [record for record in records if record["kind"] == "train"]
    scored = [record for record in records if record["kind"] == "eval"]
    if not trained:
        raise InputError(f"{folder}: no step has been made yet; there is nothing to draw")
    figure = figure_class(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    out = folder / PLOT_FILE
    try:
        _draw_loss(panels[0], trained)
        if scored:
            _draw_arms(panels[1], scored)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    except (KeyError, TypeError, ValueError) as error:  # no such field, no number, no finite one
        raise InputError(f"{folder / METRICS_FILE}: not to be drawn ({first_line(error)})") from None
    try:
        replace_text(out, drawing.getvalue())
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from None
    return out


def _draw_loss(axes: Any, trained: list[Record]) -> None:
    parts = np.array_split(
        np.array([[record["step"], record["loss"]] for record in trained]), min(_POINTS, len(trained))
    )
    steps, losses = np.array([part.mean(axis=0) for part in parts]).T
    axes.plot(steps, losses, color="black", linewidth=1)
    axes.set(xlabel="step", ylabel="loss", title="training", ylim=_limits(losses))


def _draw_arms(axes: Any, scored: list[Record]) -> None:
    prefix = "perplexity_ratio/"
    arms = [name.removeprefix(prefix) for name in scored[0] if name.startswith(prefix) and not name.endswith("/exact")]
    steps = [record["step"] for record in scored]
    for arm in arms:
        axes.plot(steps, [record[prefix + arm] - 1 for record in scored], marker="o", markersize=3, label=arm)
    if arms:
        # Linear up to 1 %, then logarithmic: arms 0.2 % and 1000 % above can be told apart, and some lie below.
        axes.set_yscale("symlog", linthresh=0.01)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set(ylabel="perplexity above exact")
        axes.axhline(0, color="black", linewidth=0.8, label="exact")
        axes.legend()
    else:
        axes.plot(steps, np.exp([record["cross_entropy/exact"] for record in scored]), marker="o", color="black")
        axes.set(ylabel="perplexity")
    axes.set(xlabel="step", title=f"held-out text, {scored[-1]['tokens']:,} tokens")


def _limits(losses: np.ndarray) -> tuple[float, float]:
    """What the losses after the first few lie in: the first are often far above the rest."""
    later = losses[len(losses) // 20 :]
    margin = 0.05 * (later.max() - later.min()) or 0.1
    return later.min() - margin, later.max() + margin
