"""What the page's script takes of a head: attention weights as compressed 16-bit numbers, points as rows of a chart.

May be changed here: how numbers are written into the page; its script in `page.html.j2` reads them.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt16

from gsa_jax.inspection.measuring import KEPT, NEAR, HeadPicture

UNIT = 65_535
"""A weight of 1, as it is written."""

_FLATTEST = 0.5
"""Height of a plane, as it is drawn, by its width, at least."""

_CONTEXT = 6
"""Tokens shown on either side of one."""


def head_data(head: HeadPicture, shares: Sequence[float]) -> dict[str, Any]:
    """One head, as JSON.

    Args:
        shares: of each splat in the weight that goes through splats on the whole text.
    """
    return {
        "name": head_name(head),
        "window": head.window,
        "splats": head.through.shape[1],
        "exact": _packed(whole_units(head.exact)),
        "weights": _packed(whole_units(head.weights)),
        "via": _packed(head.via.astype("<i2")),
        "through": _packed(np.round(head.through * UNIT).astype("<u2")),
        "explained": head.plane.explained.tolist(),
        "frame": frame(head),
        "points": point_rows(head),
        "circles": splat_rows(head, shares),
        "moves": move_rows(head),
    }


def head_name(head: Any) -> str:
    """How a head is called; layers and heads are numbered from 0."""
    return f"layer {head.layer}, head {head.head}"


def whole_units(weights: Float[np.ndarray, "T T"]) -> UInt16[np.ndarray, "T T"]:
    """Weights in units of 1 / `UNIT`, rounded so that each row still sums to 1: those that lose most are rounded up."""
    exact = weights * UNIT
    units = np.floor(exact).astype(np.int64)
    missing = UNIT - units.sum(axis=1, keepdims=True)
    order = np.argsort(np.argsort(units - exact, axis=1, kind="stable"), axis=1, kind="stable")
    return (units + (order < missing)).astype(np.uint16)


def token_rows(tokens: Sequence[str]) -> list[dict[str, Any]]:
    """Each token, as it is shown, with those around it."""
    shown = [visible(token) for token in tokens]

    def around(place: int) -> str:
        before, after = shown[max(0, place - _CONTEXT) : place], shown[place + 1 : place + 1 + _CONTEXT]
        word = shown[place].lstrip(" ")
        space = " " * (len(shown[place]) - len(word))
        return f"{''.join(before)}{space}[{word}]{''.join(after)}".strip()

    return [{"position": n, "token": token, "context": around(n)} for n, token in enumerate(shown)]


def visible(token: str) -> str:
    """A token without characters that cannot be seen, but for its space."""
    return "".join("\u21b5" if c == "\n" else c if c.isprintable() else "\ufffd" for c in token) or "\u2205"


def point_rows(head: HeadPicture) -> list[dict[str, Any]]:
    """Queries and keys in the plane."""
    kept = head.via[-1] == KEPT
    rows = [
        {"x": x, "y": y, "kind": "query", "position": n} for n, (x, y) in enumerate(_rounded(head.plane.query).tolist())
    ]
    return rows + [
        {"x": x, "y": y, "kind": "kept key" if is_kept else "key", "position": n}
        for n, ((x, y), is_kept) in enumerate(zip(_rounded(head.plane.key).tolist(), kept.tolist(), strict=True))
    ]


def pair_rows(head: HeadPicture) -> list[dict[str, Any]]:
    """Weights of each query and key that it sees."""
    rows = []
    for query in range(len(head.exact)):
        columns = (head.exact[query, : query + 1], head.weights[query, : query + 1], head.via[query, : query + 1])
        for key, (exact, weight, via) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            rows.append(
                {
                    "query": query,
                    "key": key,
                    "exact": exact,
                    "weights": weight,
                    "difference": weight - exact,
                    "how": {NEAR: "near", KEPT: "kept"}.get(via, f"splat {via}"),
                }
            )
    return rows


def splat_rows(head: HeadPicture, shares: Sequence[float]) -> list[dict[str, Any]]:
    """Splats in the plane."""
    columns = _rounded(head.plane.centers[-1]), _rounded(head.plane.sigma[-1]), np.round(shares, 5)
    return [
        {"x": x, "y": y, "sigma": sigma, "share": share, "splat": n}
        for n, ((x, y), sigma, share) in enumerate(zip(*(column.tolist() for column in columns), strict=True))
    ]


def move_rows(head: HeadPicture) -> list[dict[str, Any]]:
    """Splats in the plane at each stage; none if there is a single one."""
    stages = _rounded(head.plane.centers).tolist()
    if len(stages) == 1:
        return []
    return [
        {"x": x, "y": y, "stage": stage, "splat": n, "moved": round(float(head.moved[n]), 3)}
        for stage, centers in enumerate(stages)
        for n, (x, y) in enumerate(centers)
    ]


def frame(head: HeadPicture) -> tuple[float, float]:
    """How far the plane is drawn across and up: to all queries and keys, and to most splats, with the same unit."""
    plane = head.plane
    points = np.abs(np.concatenate([plane.query, plane.key])).max(axis=0)
    across, up = np.maximum(points, np.quantile(np.abs(plane.centers), 0.95, axis=(0, 1))) * 1.08
    across = max(across, up)
    return round(float(across), 3), round(float(max(up, _FLATTEST * across)), 3)


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.round(x, 3)


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode("ascii")
