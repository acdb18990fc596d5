"""Charts of a whole model: where its heads' weight goes, how they use their splats, and what that costs.

May be changed here: what these charts show.
"""

from __future__ import annotations

from typing import Any

import altair as alt

from gsa_jax.evaluation.perplexity import Evaluation
from gsa_jax.fitting.diagnosis import Diagnostics
from gsa_jax.inspection.measuring import TokenLosses
from gsa_jax.inspection.packing import visible
from gsa_jax.inspection.style import EXACT_COLOR, FAR_COLOR, FIT, INK, KEPT_COLOR, LESS_TO_MORE, NEAR_COLOR, ROW

_KINDS = ["near", "kept", "far"]


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
        .properties(width="container", height=ROW * 2 * len(diagnostics.heads), autosize=FIT)
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
    return alt.layer(there, used, said).properties(width="container", height=ROW * len(diagnostics.heads), autosize=FIT)


def entropies(diagnostics: Diagnostics) -> Any:
    """How spread out each head's attention is, exactly and with splats."""
    rows = [
        {"head": _short(head), "attention": attention, "entropy": entropy}
        for head in diagnostics.heads
        for attention, entropy in (("exact", head.exact_entropy), ("with splats", head.entropy))
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        alt.X(
            "entropy:Q",
            title="0: a single key, 1: all keys alike",
            scale=alt.Scale(domain=[0, 1]),
            axis=alt.Axis(tickCount=5),
        ),
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
    return alt.layer(between, ends).properties(width="container", height=ROW * len(diagnostics.heads), autosize=FIT)


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
    return alt.layer(one, spread, value).properties(width="container", height=ROW * (len(rows) + 1), autosize=FIT)


EXTRA_SHOWN = 0.5
"""Nats at which the colour of a token is full."""

_LINE = 72
"""Characters of a line of text in a figure."""

_FONT_SIZE = 13
_ADVANCE = 0.602 * _FONT_SIZE
"""Pixels from one character to the next, in DejaVu Sans Mono and most fonts of its kind."""


def colored_text(losses: TokenLosses) -> Any:
    """A row of text on which the colour says what splats cost."""
    rows, line, column = [], 0, 0
    for token, extra in zip(losses.tokens[1:], (losses.splats - losses.exact).tolist(), strict=True):
        text = visible(token)
        if column + len(text) > _LINE:
            line, column = line + 1, 0
        start, column = column, column + len(text)
        word = text.lstrip(" ")  # SVG drops spaces at the beginning
        rows.append(
            {"from": start, "word": column - len(word), "to": column, "line": line, "token": word, "extra": extra}
        )
        if "\n" in token:
            line, column = line + 1, 0
    base = alt.Chart(alt.InlineData(values=rows)).encode(alt.Y("line:O", axis=None))
    boxes = base.mark_rect().encode(
        alt.X("from:Q", axis=None, scale=alt.Scale(domain=[0, _LINE], nice=False)),
        alt.X2("to:Q"),
        alt.Color("extra:Q", title="nats lost to splats", scale=extra_scale()),
    )
    words = base.mark_text(font="DejaVu Sans Mono, monospace", fontSize=_FONT_SIZE, align="left", color=INK).encode(
        alt.X("word:Q"), alt.Text("token:N")
    )
    return alt.layer(boxes, words).properties(width=_LINE * _ADVANCE, height={"step": ROW})


def extra_scale() -> alt.Scale:
    """Colours of a difference of losses in nats."""
    return alt.Scale(domain=[-EXTRA_SHOWN, 0, EXTRA_SHOWN], range=LESS_TO_MORE[1:-1], interpolate="rgb", clamp=True)


def _short(head: Any) -> str:
    return f"L{head.layer} H{head.head}"
