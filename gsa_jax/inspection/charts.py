"""The charts, as Vega-Lite through Altair. Those of a head name their datasets, to be filled later.

Colours are those of Okabe and Ito (2008), "Color Universal Design", which people tell apart whatever kind of colour
blindness they have. May be changed here: what a chart looks like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from gsa_jax.evaluation.perplexity import Evaluation
from gsa_jax.fitting.diagnosis import Diagnostics
from gsa_jax.inspection.measuring import TokenLosses
from gsa_jax.inspection.packing import visible

NEAR_COLOR, KEPT_COLOR, FAR_COLOR = "#0072B2", "#009E73", "#D98200"
EXACT_COLOR, INK = "#4D4D4D", "#1A1A1A"
_QUERY_COLOR, _KEY_COLOR = "#56B4E9", "#8C8C8C"

LESS_TO_MORE = ["#5E3C99", "#B2ABD2", "#FFFFFF", "#FDB863", "#C85A00"]
"""Of differences."""

_WEIGHT_COLORS = ["#FFFFFF", "#9ECAE1", "#2171B5", "#08306B"]

_KINDS = ["near", "kept", "far"]
_ROW = 18
"""Pixels of a row of a chart of heads."""

MOST_BARS = 10

_SIDE = 520
"""Pixels across a plane."""

_FIT = alt.AutoSizeParams(type="fit-x", contains="padding")

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
    """Queries, keys and splats of a head in their plane; of datasets `points`, `circles` and `tokens`."""
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
    marks = (
        _tokens(alt.Chart(alt.NamedData("points")), "position", ("token", "context"))
        .mark_point(clip=True, filled=True, size=28, opacity=0.8)
        .encode(
            x,
            y,
            color=alt.Color(
                "kind:N",
                title=None,
                scale=alt.Scale(domain=["query", "key", "kept key"], range=[_QUERY_COLOR, _KEY_COLOR, KEPT_COLOR]),
            ),
            shape=alt.Shape(
                "kind:N",
                title=None,
                scale=alt.Scale(domain=["query", "key", "kept key"], range=["circle", "triangle-up", "diamond"]),
            ),
            size=alt.condition("datum.kind == 'kept key'", alt.value(110), alt.value(28)),
            tooltip=[alt.Tooltip("kind:N", title="a"), alt.Tooltip("context:N"), alt.Tooltip("position:Q")],
        )
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
    return _framed(alt.layer(circles, marks, centers), frame)


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
            scale=alt.Scale(clamp=True, domain=[-0.3, -0.03, 0, 0.03, 0.3], range=LESS_TO_MORE, interpolate="rgb"),
            legend=alt.Legend(values=[-0.3, 0, 0.3], gradientLength=180, format="~g"),
        )
    else:
        color = alt.Color(
            f"{field}:Q",
            title="weight",
            scale=alt.Scale(domain=[0, 0.02, 0.2, 1], range=_WEIGHT_COLORS, interpolate="rgb"),
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
    base = _tokens(alt.Chart(alt.NamedData("pairs")), "query", ("query_token", "query_context"))
    base = _tokens(base, "key", ("key_token", "key_context")).encode(
        alt.X(
            "key:O",
            title="key",
            axis=alt.Axis(**axis, labelAngle=-90),
        ),
        alt.Y("query:O", title="query", axis=alt.Axis(**axis)),
    )
    cells = base.mark_rect(aria=False).encode(
        color,
        tooltip=[
            alt.Tooltip("query_context:N", title="query"),
            alt.Tooltip("key_context:N", title="key"),
            alt.Tooltip("how:N", title="seen"),
            alt.Tooltip("exact:Q", format=".4f"),
            alt.Tooltip("weights:Q", title="with splats", format=".4f"),
        ],
    )
    row = base.transform_filter("datum.query == chosen").mark_rect(
        filled=False, stroke=INK, strokeWidth=0.5, aria=False
    )
    return alt.layer(cells, row).add_params(chosen).properties(width=360, height=360, title=title)


def splat_bars() -> Any:
    """The splats that carry most of a token's weight, `MOST_BARS` at most; of a dataset `bars`."""
    return (
        alt.Chart(alt.NamedData("bars"))
        .mark_bar(color=FAR_COLOR, size=_ROW - 5)
        .encode(
            alt.X("weight:Q", title="weight that goes through it", axis=alt.Axis(format="%", tickCount=4)),
            alt.Y("splat:N", title=None, sort=None),
            tooltip=[alt.Tooltip("splat:N"), alt.Tooltip("weight:Q", format=".2%")],
        )
        .properties(width="container", height=_ROW * MOST_BARS, autosize=_FIT)
    )


def masses(diagnostics: Diagnostics) -> Any:
    """How each head's weight is spread over near, kept and far keys, exactly and with splats."""
    rows = []
    for head in diagnostics.heads:
        for attention, kept, far in (
            ("exact", head.exact_kept_mass, head.exact_far_mass),
            ("splats", head.kept_mass, head.far_mass),
        ):
            shares = zip(_KINDS, (1 - kept - far, kept, far), strict=True)
            rows += [
                {"head": f"{_short(head)} {attention}", "kind": kind, "mass": mass, "order": n}
                for n, (kind, mass) in enumerate(shares)
            ]
    return (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar()
        .encode(
            alt.X("mass:Q", title="share of the weight", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
            alt.Y("head:N", title=None, sort=None),
            alt.Color(
                "kind:N",
                title=None,
                scale=alt.Scale(domain=_KINDS, range=[NEAR_COLOR, KEPT_COLOR, FAR_COLOR]),
            ),
            alt.Order("order:Q"),
            tooltip=[alt.Tooltip("head:N"), alt.Tooltip("kind:N"), alt.Tooltip("mass:Q", format=".2%")],
        )
        .properties(width="container", height=_ROW * 2 * len(diagnostics.heads), autosize=_FIT)
    )


def usage(diagnostics: Diagnostics) -> Any:
    """How many splats each head uses."""
    rows = [
        {"head": _short(head), "usage": head.usage, "dead": head.dead_splats, "splats": head.num_splats}
        for head in diagnostics.heads
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(alt.Y("head:N", title=None, sort=None))
    tooltip = [
        alt.Tooltip("head:N"),
        alt.Tooltip("usage:Q", title="in use", format=".1f"),
        alt.Tooltip("dead:Q", title="hardly used"),
        alt.Tooltip("splats:Q"),
    ]
    there = base.mark_bar(color="#E6E6E6").encode(alt.X("splats:Q"), tooltip=tooltip)
    used = base.mark_bar(color=FAR_COLOR).encode(alt.X("usage:Q", title="splats in use"), tooltip=tooltip)
    said = base.mark_text(align="left", dx=4, color=INK, fontSize=11).encode(alt.X("usage:Q"), alt.Text("label:N"))
    said = said.transform_calculate(
        label="format(datum.usage, '.0f') + (datum.dead ? ', ' + datum.dead + ' hardly used' : '')"
    )
    return alt.layer(there, used, said).properties(
        width="container", height=_ROW * len(diagnostics.heads), autosize=_FIT
    )


def entropies(diagnostics: Diagnostics) -> Any:
    """How spread out each head's attention is, exactly and with splats."""
    rows = [
        {"head": _short(head), "attention": attention, "entropy": entropy}
        for head in diagnostics.heads
        for attention, entropy in (("exact", head.exact_entropy), ("with splats", head.entropy))
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        alt.X("entropy:Q", title="0: a single key, 1: all keys alike", scale=alt.Scale(domain=[0, 1])),
        alt.Y("head:N", title=None, sort=None),
    )
    between = base.mark_line(color=INK).encode(alt.Detail("head:N"))
    ends = base.mark_point(filled=True, size=90, opacity=1).encode(
        color=alt.Color(
            "attention:N",
            title=None,
            scale=alt.Scale(domain=["exact", "with splats"], range=[EXACT_COLOR, FAR_COLOR]),
        ),
        shape=alt.Shape(
            "attention:N", title=None, scale=alt.Scale(domain=["exact", "with splats"], range=["square", "circle"])
        ),
        tooltip=[alt.Tooltip("head:N"), alt.Tooltip("attention:N"), alt.Tooltip("entropy:Q", format=".3f")],
    )
    return alt.layer(between, ends).properties(width="container", height=_ROW * len(diagnostics.heads), autosize=_FIT)


def arms(evaluation: Evaluation) -> Any:
    """Perplexity of the arms that see something, relative to the exact model, with intervals."""
    rows = []
    for arm in evaluation.arms:
        if arm.name in ("exact", "none"):  # which is far away from all others
            continue
        low, high = arm.perplexity_ratio.interval or (arm.perplexity_ratio.value,) * 2
        rows.append({"arm": arm.name, "ratio": arm.perplexity_ratio.value, "low": low, "high": high})
    base = alt.Chart(alt.InlineData(values=rows)).encode(alt.Y("arm:N", title=None, sort=None))
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    room = 0.05 * (max(high, 1) - min(low, 1))
    scale = alt.Scale(nice=False, zero=False, domain=[min(low, 1) - room, max(high, 1) + room])
    spread = base.mark_rule(color=INK, strokeWidth=2).encode(alt.X("low:Q", scale=scale), alt.X2("high:Q"))
    value = base.mark_point(filled=True, size=80, opacity=1, color=FAR_COLOR).encode(
        alt.X("ratio:Q", scale=scale, title="perplexity, times the exact model's", axis=alt.Axis(tickCount=5)),
        tooltip=[
            alt.Tooltip(f"{name}:{kind}") for name, kind in (("arm", "N"), ("ratio", "Q"), ("low", "Q"), ("high", "Q"))
        ],
    )
    one = (
        alt.Chart(alt.InlineData(values=[{"one": 1}]))
        .mark_rule(color=EXACT_COLOR, strokeDash=[4, 3])
        .encode(alt.X("one:Q", scale=scale))
    )
    return alt.layer(one, spread, value).properties(width="container", height=_ROW * (len(rows) + 1), autosize=_FIT)


EXTRA_SHOWN = 0.5
"""Nats at which the colour of a token is full."""

_LINE = 72
"""Characters of a line of text in a figure."""


def colored_text(losses: TokenLosses) -> Any:
    """A row of text on which the colour says what splats cost."""
    rows, line, column = [], 0, 0
    for token, extra in zip(losses.tokens[1:], (losses.splats - losses.exact).tolist(), strict=True):
        text = visible(token)
        if column + len(text) > _LINE:
            line, column = line + 1, 0
        rows.append({"from": column, "to": column + len(text), "line": line, "token": text.strip(), "extra": extra})
        column += len(text)
    base = alt.Chart(alt.InlineData(values=rows)).encode(alt.Y("line:O", axis=None))
    boxes = base.mark_rect().encode(
        alt.X("from:Q", axis=None, scale=alt.Scale(domain=[0, _LINE], nice=False)),
        alt.X2("to:Q"),
        alt.Color("extra:Q", title="nats lost to splats", scale=extra_scale()),
    )
    words = base.mark_text(font="DejaVu Sans Mono, monospace", fontSize=11, align="center", color=INK).encode(
        alt.X("middle:Q"), alt.Text("token:N")
    )
    words = words.transform_calculate(middle="(datum.from + datum.to) / 2")
    return alt.layer(boxes, words).properties(width=_LINE * 8, height={"step": _ROW})


def extra_scale() -> alt.Scale:
    """Colours of a difference of losses in nats."""
    return alt.Scale(domain=[-EXTRA_SHOWN, 0, EXTRA_SHOWN], range=LESS_TO_MORE[1:-1], interpolate="rgb", clamp=True)


def _short(head: Any) -> str:
    return f"L{head.layer} H{head.head}"
