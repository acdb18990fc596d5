"""Charts of one head, whose datasets are named and filled later: its plane, its maps of weights, its splats.

May be changed here: what these charts show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from gsa_jax.inspection.style import (
    FAR_COLOR,
    FIT,
    INK,
    KEPT_COLOR,
    KEY_COLOR,
    LESS_TO_MORE,
    QUERY_COLOR,
    ROW,
    WEIGHT_COLORS,
)

MOST_BARS = 10

_SIDE = 520
"""Pixels across a plane."""


def _tokens(chart: Any, field: str, names: Sequence[str]) -> Any:
    """Looks up what is known of the token at a position."""
    source = alt.LookupData(data=alt.NamedData("tokens"), key="position", fields=["token", "context"])
    return chart.transform_lookup(lookup=field, from_=source, as_=list(names))


def _plane_axes() -> tuple[dict[str, Any], dict[str, Any]]:
    """Axes of a plane, which reach as far as `_framed` says."""
    names = "across", "up"
    x, y = (
        {
            "scale": alt.Scale(domainMin=alt.ExprRef(f"-{name}"), domainMax=alt.ExprRef(name), nice=False, zero=False),
            "title": f"{which} principal component",
            "axis": alt.Axis(tickCount=7),
        }
        for name, which in zip(names, ("first", "second"), strict=True)
    )
    return x, y


def _framed(chart: Any, frame: tuple[float, float]) -> Any:
    """A chart of a plane that reaches so far across and up, with the same unit."""
    params = (alt.param(name=name, value=value) for name, value in zip(("across", "up"), frame, strict=True))
    return chart.add_params(*params).properties(width=_SIDE, height=round(_SIDE * frame[1] / frame[0]))


def atlas(frame: tuple[float, float] = (1.0, 1.0)) -> Any:
    """Queries, keys and splats of a head in their plane; of datasets `points`, `circles` and `tokens`. The token at
    the position `chosen` has rings."""
    across, up = _plane_axes()
    x, y = alt.X("x:Q", **across), alt.Y("y:Q", **up)
    hovered = alt.selection_point(name="hovered", on="pointerover", fields=["splat"], empty=False, clear="pointerout")
    circles = (
        alt.Chart(alt.NamedData("circles"))
        .transform_calculate(angle="sequence(0, 6.5, 0.2)")
        .transform_flatten(["angle"])
        .transform_calculate(
            edge_x="datum.x + datum.sigma * cos(datum.angle)", edge_y="datum.y + datum.sigma * sin(datum.angle)"
        )
        .mark_line(clip=True, color=FAR_COLOR, interpolate="linear")
        .encode(
            alt.X("edge_x:Q", **across),
            alt.Y("edge_y:Q", **up),
            alt.Detail("splat:N"),
            alt.Order("angle:Q"),
            opacity=alt.condition(hovered, alt.value(1), alt.value(0.4)),
            strokeWidth=alt.condition(hovered, alt.value(2.5), alt.value(1)),
        )
    )
    chosen = alt.param(name="chosen", value=-1)
    points = _tokens(alt.Chart(alt.NamedData("points")), "position", ("token", "context"))
    ring = (
        points.transform_filter("datum.position == chosen")
        .mark_point(clip=True, size=260, stroke=INK, strokeWidth=2, opacity=1, aria=False)
        .encode(x, y)
    )
    marks = points.mark_point(clip=True, filled=True, size=28, opacity=0.8).encode(
        x,
        y,
        color=alt.Color(
            "kind:N",
            title=None,
            scale=alt.Scale(domain=["query", "key", "kept key"], range=[QUERY_COLOR, KEY_COLOR, KEPT_COLOR]),
        ),
        shape=alt.Shape(
            "kind:N",
            title=None,
            scale=alt.Scale(domain=["query", "key", "kept key"], range=["circle", "triangle-up", "diamond"]),
        ),
        size=alt.condition("datum.kind == 'kept key'", alt.value(110), alt.value(28)),
        tooltip=[alt.Tooltip("kind:N", title="a"), alt.Tooltip("context:N"), alt.Tooltip("position:Q")],
    )
    centers = (
        alt.Chart(alt.NamedData("circles"))
        .mark_circle(clip=True, color=FAR_COLOR, opacity=0.85, stroke="white", strokeWidth=0.7)
        .encode(
            x,
            y,
            size=alt.Size(
                "share:Q",
                title="splat, by its share of the far weight",
                scale=alt.Scale(range=[8, 420]),
                legend=alt.Legend(
                    format="%",
                    tickCount=3,
                    orient="top",
                    titleLimit=300,
                    symbolFillColor=FAR_COLOR,
                    symbolStrokeColor=FAR_COLOR,
                ),
            ),
            tooltip=[
                alt.Tooltip("splat:N"),
                alt.Tooltip("share:Q", title="share of far weight", format=".1%"),
                alt.Tooltip("sigma:Q", format=".2f"),
            ],
        )
        .add_params(hovered)
    )
    return _framed(alt.layer(circles, marks, centers, ring).add_params(chosen), frame)


def moves(last: int, frame: tuple[float, float] = (1.0, 1.0)) -> Any:
    """Where the splats of a head have been, from stage 0 to the last one, in the same plane; of a dataset `moves`."""
    across, up = _plane_axes()
    base = alt.Chart(alt.NamedData("moves")).encode(alt.X("x:Q", **across), alt.Y("y:Q", **up))
    paths = base.mark_line(clip=True, color=FAR_COLOR, opacity=0.7, strokeWidth=1.2).encode(
        alt.Detail("splat:N"), alt.Order("stage:Q")
    )
    ends = (
        base.transform_filter(f"datum.stage == 0 || datum.stage == {last}")
        .mark_circle(clip=True, stroke=FAR_COLOR, strokeWidth=1.2, opacity=1, size=42)
        .encode(
            fill=alt.condition("datum.stage == 0", alt.value("white"), alt.value(FAR_COLOR)),
            tooltip=[alt.Tooltip("splat:N"), alt.Tooltip("moved:Q", title="moved, in sigmas", format=".2f")],
        )
    )
    return _framed(alt.layer(paths, ends), frame)


MAPS = {"exact": "exact attention", "weights": "with splats", "difference": "difference"}
"""Fields of a dataset `pairs`, and their titles."""


def heatmap(field: str, title: str) -> Any:
    """Weights of all queries and keys of a passage: `exact`, `weights` or their `difference`; of datasets `pairs` and
    `tokens`."""
    chosen = alt.param(name="chosen", value=-1)
    if field == "difference":
        color = alt.Color(
            "difference:Q",
            title="splats minus exact",
            scale=alt.Scale(clamp=True, domain=[-0.05, -0.005, 0, 0.005, 0.05], range=LESS_TO_MORE, interpolate="rgb"),
            legend=alt.Legend(values=[-0.05, 0, 0.05], gradientLength=180, format="~g"),
        )
    else:
        color = alt.Color(
            f"{field}:Q",
            title="weight",
            scale=alt.Scale(domain=[0, 0.02, 0.2, 1], range=WEIGHT_COLORS, interpolate="rgb"),
            legend=alt.Legend(values=[0, 0.2, 0.5, 1], gradientLength=180, format="~g"),
        )
    # Of an axis of positions, labels are tokens; the first dataset of that name has them.
    axis = {
        "labelExpr": "data('tokens')[datum.value] ? data('tokens')[datum.value].token : ''",
        "ticks": False,
        "labelOverlap": "greedy",
        "labelLimit": 64,
        "labelFontSize": 10,
    }
    x = alt.X("key:O", title="key", axis=alt.Axis(**axis, labelAngle=-90))
    y = alt.Y("query:O", title="query", axis=alt.Axis(**axis))
    pairs = alt.Chart(alt.NamedData("pairs"))
    cells = _tokens(pairs, "query", ("query_token", "query_context"))
    cells = _tokens(cells, "key", ("key_token", "key_context"))
    cells = cells.mark_rect(aria=False).encode(
        x,
        y,
        color,
        tooltip=[
            alt.Tooltip("query_context:N", title="query"),
            alt.Tooltip("key_context:N", title="key"),
            alt.Tooltip("how:N", title="seen"),
            alt.Tooltip("exact:Q", format=".4f"),
            alt.Tooltip("weights:Q", title="with splats", format=".4f"),
        ],
    )
    # Beside the row's last cell, since a line would hide rows of a pixel.
    arrow = pairs.transform_filter("datum.query == chosen && datum.key == chosen").encode(x, y)
    arrow = arrow.mark_point(shape="triangle-left", filled=True, size=60, xOffset=8, color=INK, opacity=1, aria=False)
    return alt.layer(cells, arrow).add_params(chosen).properties(width=360, height=360, title=title)


def splat_bars() -> Any:
    """The splats that carry most of a token's weight, `MOST_BARS` at most; of a dataset `bars`."""
    return (
        alt.Chart(alt.NamedData("bars"))
        .mark_bar(color=FAR_COLOR, size=ROW - 5)
        .encode(
            alt.X("weight:Q", title="weight that goes through it", axis=alt.Axis(format="%", tickCount=4)),
            alt.Y("splat:N", title=None, sort=None),
            tooltip=[alt.Tooltip("splat:N"), alt.Tooltip("weight:Q", format=".2%")],
        )
        .properties(width="container", height=ROW * MOST_BARS, autosize=FIT)
    )
