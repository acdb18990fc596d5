"""The look that all charts share: colours, type and lines, and how a chart becomes Vega-Lite.

Colours are those of Okabe and Ito (2008), "Color Universal Design", which people tell apart whatever kind of colour
blindness they have. May be changed here: how charts look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

NEAR_COLOR, KEPT_COLOR, FAR_COLOR = "#0072B2", "#009E73", "#D98200"
EXACT_COLOR, INK = "#4D4D4D", "#1A1A1A"
QUERY_COLOR, KEY_COLOR = "#56B4E9", "#8C8C8C"

LESS_TO_MORE = ["#5E3C99", "#B2ABD2", "#FFFFFF", "#FDB863", "#C85A00"]
"""Of differences."""

WEIGHT_COLORS = ["#FFFFFF", "#9ECAE1", "#2171B5", "#08306B"]

ROW = 18
"""Pixels of a row of a chart of rows."""

FIT = alt.AutoSizeParams(type="fit-x", contains="padding")
"""As wide as the page lets a chart be."""

Rows = Sequence[dict[str, Any]]


def specification(chart: Any, datasets: Mapping[str, Rows] | None = None) -> dict[str, Any]:
    """A whole chart as Vega-Lite, with the page's type and lines.

    Args:
        datasets: rows by the names that the chart has for them. Altair would check each row of them, for minutes.
    """
    spec = _styled(chart).to_dict()
    if datasets:
        spec["datasets"] = {**spec.get("datasets", {}), **datasets}
    return spec


def _styled(chart: Any) -> Any:
    return (
        chart.configure(font="system-ui, 'DejaVu Sans', sans-serif", background="white")
        .configure_axis(
            labelColor=INK, titleColor=INK, labelFontSize=12, titleFontSize=12, gridColor="#E6E6E6", titleFontWeight=500
        )
        .configure_legend(
            labelColor=INK,
            titleColor=INK,
            labelFontSize=12,
            titleFontSize=12,
            orient="bottom",
            titleFontWeight=500,
        )
        .configure_title(color=INK, fontSize=13, anchor="start", fontWeight=600)
        .configure_view(stroke="#CCCCCC")
    )
