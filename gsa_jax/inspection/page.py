"""The page: one file of HTML that holds its charts, its numbers and the scripts that draw them.

A policy in it forbids the browser to load anything. May be changed here: what is on the page; how it looks is in
`page.html.j2`.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
from importlib.resources import files
from typing import Any

import altair
import jinja2
import numpy as np
import vl_convert
from markupsafe import Markup

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.evaluation.intervals import Estimate
from gsa_jax.evaluation.perplexity import Evaluation
from gsa_jax.hf_fields import DONORS
from gsa_jax.inspection import head_charts, model_charts, packing, style
from gsa_jax.inspection.measuring import HeadPicture, Inspection, TokenLosses

LARGEST = 5_000_000
"""Bytes of a page."""

_BESIDE = 500
"""Bytes of a head beside its data, at most: its lines of lists and tables."""

VEGA_LITE = ".".join(altair.VEGALITE_VERSION.lstrip("v").split(".")[:2])
"""The version that the charts are written for."""

_ARMS = {
    "exact": "all keys exactly: the plain model",
    "hybrid": "as configured: the model of this page",
    "without-splats": "window and kept keys alone",
    "without-kept": "window and splats alone",
    "window-only": "the window alone",
    "none": "nothing: attention of these layers gives 0",
}

_HURT = 15
"""Tokens listed that splats cost the most."""


def render(found: Inspection) -> str:
    """The page, with as many heads as it holds within `LARGEST`, of all layers alike.

    Raises:
        InputError: it does not hold a single one.
    """
    shares = {(head.layer, head.head): head.shares for head in found.diagnostics.heads}
    packed = [packing.head_data(head, shares[head.layer, head.head]) for head in found.heads]
    largest = max(len(_json(data)) for data in packed) + _BESIDE
    room = LARGEST - len(_render(found, found.heads[:1], packed[:1]).encode())
    if room < 0:
        raise InputError(f"the page would be larger than {LARGEST:,} bytes; give a smaller --window or --kept")
    count = min(len(packed), 1 + room // largest)
    chosen = np.linspace(0, len(packed) - 1, count).round().astype(int).tolist()
    return _render(found, tuple(found.heads[n] for n in chosen), [packed[n] for n in chosen])


def _render(found: Inspection, heads: tuple[HeadPicture, ...], packed: list[dict[str, Any]]) -> str:
    page = {
        "tokens": packing.token_rows(found.tokens),
        "heads": packed,
        "first": _first(found, heads),
        "unit": packing.UNIT,
        "colors": {"near": style.NEAR_COLOR, "kept": style.KEPT_COLOR, "far": style.FAR_COLOR},
        "differences": style.LESS_TO_MORE,
    }
    drawn = {
        "atlas": head_charts.atlas(),
        **{field: head_charts.heatmap(field, title) for field, title in head_charts.MAPS.items()},
        "bars": head_charts.splat_bars(),
        "masses": model_charts.masses(found.diagnostics),
        "usage": model_charts.usage(found.diagnostics),
        "entropies": model_charts.entropies(found.diagnostics),
        "arms": model_charts.arms(found.evaluation),
    }
    if len(found.stages) > 1:
        drawn["moves"] = head_charts.moves(len(found.stages) - 1)
    template = files("gsa_jax.inspection").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(template).render(
        version=importlib.metadata.version("gsa-jax"),
        found=found,
        title=DONORS[found.config.donor].title,
        evaluation=found.evaluation,
        heads=heads,
        splats=_splats(found.config),
        facts=_facts(found),
        arms=[_arm(arm, found.evaluation) for arm in found.evaluation.arms],
        losses=[_colored(losses) for losses in found.losses],
        hurt=_hurt(found.losses),
        moved=_moved(heads),
        extra_shown=f"{model_charts.EXTRA_SHOWN:g}",
        most_bars=head_charts.MOST_BARS,
        colors=page["colors"],
        less=style.LESS_TO_MORE[1],
        more=style.LESS_TO_MORE[-2],
        scripts=Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)),
        page=_json(page),
        specs=_json({name: style.specification(chart) for name, chart in drawn.items()}),
    )


def _first(found: Inspection, heads: tuple[HeadPicture, ...]) -> int:
    """The head that is shown first: the one with most weight through splats."""
    masses = {(head.layer, head.head): head.far_mass for head in found.diagnostics.heads}
    return int(np.argmax([masses[head.layer, head.head] for head in heads]))


def _json(value: Any) -> Markup:
    """JSON that can stand in a script: nothing in it ends the script."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


def _splats(config: GPTNeoConfig) -> str:
    kinds = {own for own in config.layer_splats.values() if own.num_splats}
    return "; or ".join(
        f"{own.num_splats} splats, a window of {own.window} tokens and {own.kept or 'no'} kept keys for each head"
        for own in sorted(kinds)
    )


def _facts(found: Inspection) -> list[tuple[str, str, str]]:
    """Numbers for the top of the page: value, name, and what it says."""
    arms = {arm.name: arm for arm in found.evaluation.arms}
    heads = found.diagnostics.heads
    facts = [
        (
            _number(arms["hybrid"].perplexity_ratio, 4),
            "perplexity, times the exact model's",
            "1 would be no loss at all",
        )
    ]
    if found.evaluation.gap_closed is not None:
        facts.append(
            (
                f"{found.evaluation.gap_closed.value:.0%}",
                "of the gap closed",
                "between the window alone and exact attention",
            )
        )
    used = statistics.median(head.usage / head.num_splats for head in heads)
    dead = sum(head.is_dead for head in heads)
    return [
        *facts,
        (f"{np.mean([head.far_mass for head in heads]):.1%}", "of the weight is far", "it goes through splats"),
        (f"{used:.0%}", "of the splats in use", "in the median head"),
        (f"{dead} of {len(heads)}", "heads dead", "training cannot move their splats"),
    ]


def _number(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f}"


def _arm(arm: Any, evaluation: Evaluation) -> dict[str, str]:
    low, high = arm.perplexity_ratio.interval or (None, None)
    return {
        "name": arm.name,
        "sees": _ARMS[arm.name],
        "perplexity": _number(arm.perplexity, 3),
        "bits": _number(arm.bits_per_byte, 4),
        "ratio": _number(arm.perplexity_ratio, 4),
        "interval": "" if low is None or high is None or arm.name == "exact" else f"{low:.4f} to {high:.4f}",
    }


def _colored(losses: TokenLosses) -> list[dict[str, str]]:
    """Tokens with the colour of what splats cost, white to full."""
    shown = []
    for token, exact, splats in zip(losses.tokens[1:], losses.exact.tolist(), losses.splats.tolist(), strict=True):
        extra = splats - exact
        share = min(abs(extra) / model_charts.EXTRA_SHOWN, 1)
        end = style.LESS_TO_MORE[-2] if extra > 0 else style.LESS_TO_MORE[1]
        mixed = (round(255 + share * (int(end[n : n + 2], 16) - 255)) for n in (1, 3, 5))
        shown.append(
            {
                "token": packing.visible(token),
                "color": "#" + "".join(f"{part:02x}" for part in mixed),
                "title": f"{extra:+.2f} nats: exact {exact:.2f}, with splats {splats:.2f}",
                "breaks": "\n" in token,
            }
        )
    return shown


def _hurt(losses: tuple[TokenLosses, ...]) -> list[dict[str, str]]:
    """The tokens that splats cost the most, in their sentences."""
    rows = []
    for of_row in losses:
        around = packing.token_rows(of_row.tokens)
        rows += [
            (splats - exact, exact, splats, around[place]["context"])
            for place, (exact, splats) in enumerate(zip(of_row.exact.tolist(), of_row.splats.tolist(), strict=True), 1)
        ]
    return [
        {"extra": f"{extra:+.2f}", "exact": f"{exact:.2f}", "splats": f"{splats:.2f}", "context": context}
        for extra, exact, splats, context in sorted(rows, reverse=True)[:_HURT]
    ]


def _moved(heads: tuple[HeadPicture, ...]) -> list[dict[str, str]]:
    return [
        {
            "name": packing.head_name(head),
            "median": f"{np.median(head.moved):.2f}",
            "most": f"{head.moved.max():.2f}",
            "sigma": f"{np.exp(np.mean(np.log(head.plane.sigma[-1] / head.plane.sigma[0]))):.3f}",
        }
        for head in heads
    ]
