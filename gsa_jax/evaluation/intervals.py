"""From losses of several models on the same tokens to measures with intervals.

May be changed here: what is measured, and how its interval is found. Intervals are percentile bootstraps over
documents. All models share the same resamples, so that hard documents weigh alike on both sides of a ratio.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping

import numpy as np
import scipy.stats
from jaxtyping import Float, Int, Shaped

from gsa_jax.text import TextRows

FIRST_BUCKET_ENDS = 64
"""Position where the second bucket begins; each later one begins at twice the position of the one before."""

_RESAMPLES = 1000
_RESAMPLES_AT_ONCE = 100


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A measure, and its 95 % interval; None if there are too few documents for one."""

    value: float
    interval: tuple[float, float] | None

    def shown(self, digits: int) -> str:
        """Both, with so many digits behind the point."""
        shown = f"{self.value:z.{digits}f}"
        if self.interval is None:
            return shown
        low, high = self.interval
        return f"{shown} [{low:z.{digits}f}, {high:z.{digits}f}]"


def perplexity(nats: float) -> float:
    """Of a cross-entropy in nats per token; infinite where no float holds it."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats))


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over each of the D documents, in K position buckets.

    Attributes:
        size: bytes of the documents in UTF-8.
        tokens: predicted ones.
        nats: of each arm; `"exact"` is one of them.
    """

    size: Int[np.ndarray, "D"]
    tokens: Int[np.ndarray, "D K"]
    nats: dict[str, Float[np.ndarray, "D K"]]


def bucket_firsts(context: int) -> list[int]:
    """First positions of the buckets in rows of `context` tokens: 1, 64, 128, 256 and so on."""
    firsts = [1]
    while (following := max(FIRST_BUCKET_ENDS, 2 * firsts[-1])) < context:
        firsts.append(following)
    return firsts


def sum_by_document(documents: list[str], rows: TextRows, losses: Mapping[str, Float[np.ndarray, "N P"]]) -> Sums:
    """Adds up each arm's losses, nats of each token but the first of its row; those of padding do not count."""
    predicted = rows.attention_mask[:, 1:]
    starts = np.array(bucket_firsts(rows.attention_mask.shape[1])) - 1

    def sums(values: np.ndarray) -> np.ndarray:
        by_document = np.zeros((len(documents), len(starts)), values.dtype)
        np.add.at(by_document, rows.document, np.add.reduceat(values, starts, axis=1))
        return by_document

    return Sums(
        np.array([len(document.encode()) for document in documents]),
        sums(predicted.astype(np.int64)),
        {arm: sums(np.where(predicted, nats, 0).astype(np.float64)) for arm, nats in losses.items()},
    )


Key = tuple[str, str] | tuple[str, str, int]
"""`(measure, arm)` or `(measure, arm, bucket)`; of `gap_closed`, the arm is the control that the gap begins at."""

CONTROLS = ("window-only", "without-splats", "without-kept")
"""Arms without a part of the hybrid: how much of what they lack does that part give?"""


def estimates(sums: Sums) -> dict[Key, Estimate]:
    """All measures with their intervals; without those that are not defined, for want of tokens or of a gap."""
    documents = len(sums.size)
    values = {key: float(value) for key, value in _measures(sums, np.ones(documents)).items() if not np.isnan(value)}
    for arm in CONTROLS:
        if values.pop(("gap", arm), 0.0) <= 0:
            values.pop(("gap_closed", arm), None)
    if documents == 1:
        return {key: Estimate(value, None) for key, value in values.items()}

    def statistic(drawn: np.ndarray, axis: int) -> np.ndarray:
        times = np.apply_along_axis(np.bincount, axis, drawn, minlength=documents)
        measures = _measures(sums, times)
        return np.stack([measures[key] for key in values])

    with warnings.catch_warnings():
        # A position that few documents reach is missing in some resamples. It gets no interval.
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        interval = scipy.stats.bootstrap(
            (np.arange(documents),),
            statistic,
            vectorized=True,
            method="percentile",
            n_resamples=_RESAMPLES,
            batch=_RESAMPLES_AT_ONCE,
            rng=np.random.default_rng(0),
        ).confidence_interval
    bounds = zip(interval.low.tolist(), interval.high.tolist(), strict=True)
    return {
        key: Estimate(value, (low, high) if math.isfinite(low) and math.isfinite(high) else None)
        for (key, value), (low, high) in zip(values.items(), bounds, strict=True)
    }


def _measures(sums: Sums, times: Shaped[np.ndarray, "*R D"]) -> Mapping[Key, np.ndarray | np.float64]:
    """The measures of a text in which each document occurs so many times; NaN where they are not defined."""
    tokens, size = times @ sums.tokens, times @ sums.size
    nats = {arm: times @ of_arm for arm, of_arm in sums.nats.items()}
    measures: dict[Key, np.ndarray] = {}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        total = {arm: of_arm.sum(axis=-1) / tokens.sum(axis=-1) for arm, of_arm in nats.items()}
        by_bucket = {arm: of_arm / tokens for arm, of_arm in nats.items()}
        for arm in nats:
            measures["cross_entropy", arm] = total[arm]
            measures["perplexity", arm] = np.exp(total[arm])
            measures["bits_per_byte", arm] = nats[arm].sum(axis=-1) / (math.log(2) * size)
            measures["perplexity_ratio", arm] = np.exp(total[arm] - total["exact"])
            for bucket in range(tokens.shape[-1]):
                measures["cross_entropy", arm, bucket] = by_bucket[arm][..., bucket]
                measures["perplexity_ratio", arm, bucket] = np.exp(by_bucket[arm] - by_bucket["exact"])[..., bucket]
        for arm in CONTROLS:
            if arm in nats:
                measures["gap", arm] = total[arm] - total["exact"]
                measures["gap_closed", arm] = (total[arm] - total["hybrid"]) / measures["gap", arm]
    return measures
