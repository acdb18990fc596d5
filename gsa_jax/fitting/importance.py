"""What makes a key one to keep: weights of each head, fitted to what keeping a key would have saved.

May be changed here: what is regressed on what, and how a head chooses between that and the norm of the key.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gsa_jax.errors import InputError
from gsa_jax.fitting.statistics import AttentionRows, exact_log_weights, far_keys, splat_log_weights
from gsa_jax.ops import Splats
from gsa_jax.splat_config import Window

_RIDGE = 1e-3
"""Penalty on the weights of standardised features, in units of the number of keys."""


@dataclasses.dataclass(frozen=True)
class HeadImportance:
    """How one head came to the keys that it keeps.

    Errors are half of the sum of absolute differences between weights of exact attention and those with splats and kept
    keys, means over held-out rows: 0 is exact, 1 is everything wrong.

    Attributes:
        nothing_kept: error without kept keys.
        first_tokens: with the first tokens of the text kept, a control.
        norm: with the keys of largest norm kept.
        learned: with the keys kept that the fitted weights say.
        chosen: the better one of the two.
    """

    layer: int
    head: int
    nothing_kept: float
    first_tokens: float
    norm: float
    learned: float
    chosen: Literal["norm", "learned"]


def fit_importance(
    layer: int, rows: AttentionRows, splats: Splats, *, window: int, kept: int, seen: Window
) -> tuple[Float[Array, "H F"], list[HeadImportance]]:
    """Weights of keys, values and squared norms for each head.

    The first half of the sequences says what would have been saved: for each key, the mean absolute error that
    attention through splats makes on its weight, over the rows that see it far away. Ridge regression of that on key,
    value and squared norm gives weights. The other half decides whether a head takes them or the norm alone.

    Args:
        rows: of at least two sequences.
        splats: of the layer, without `importance`.
        seen: what exact attention sees.

    Raises:
        InputError: no row of the first half has a key beyond the window.
    """
    half = len(rows.row) // 2
    training, held_out = (jax.tree.map(lambda x, part=part: x[part], rows) for part in (slice(half), slice(half, None)))
    exactly = exact_log_weights(training, seen=seen)
    beyond = far_keys(training, None, window, 0)
    if not jnp.any(beyond):
        raise InputError(
            f"layer {layer}: importance is learned from rows of text longer than the window of {window}, and the first "
            f"half of the text's {len(rows.row)} has none; give more and longer text, or take --importance norm"
        )
    error = jnp.where(beyond, jnp.abs(jnp.exp(exactly) - jnp.exp(splat_log_weights(training, splats, beyond)[0])), 0)
    saved = jnp.sum(error, axis=2) / jnp.maximum(jnp.sum(beyond, axis=2), 1).astype(error.dtype)
    reached = np.asarray(jnp.any(beyond, axis=2))  # [N, H, T]
    weights = np.stack(
        [
            _regress(training, np.asarray(saved)[:, head], reached[:, head], head)
            for head in range(training.key.shape[2])
        ]
    )
    norm = np.zeros_like(weights)
    norm[:, -1] = 1

    exactly = exact_log_weights(held_out, seen=seen)

    def errors(far: Bool[Array, "N H R T"]) -> np.ndarray:
        through, _ = splat_log_weights(held_out, splats, far)
        difference = jnp.abs(jnp.exp(exactly) - jnp.exp(through))
        return np.asarray(jnp.mean(jnp.sum(difference, axis=-1), axis=(0, 2)) / 2)

    beyond = far_keys(held_out, None, window, 0)
    first = beyond & (jnp.arange(beyond.shape[-1]) >= kept)
    by_norm, by_weights = (errors(far_keys(held_out, jnp.asarray(x), window, kept)) for x in (norm, weights))
    learned = by_weights < by_norm
    heads = [
        HeadImportance(layer, head, *map(float, values), chosen="learned" if learned[head] else "norm")
        for head, values in enumerate(zip(errors(beyond), errors(first), by_norm, by_weights, strict=True))
    ]
    return jnp.asarray(np.where(learned[:, None], weights, norm), jnp.float32), heads


def _regress(
    rows: AttentionRows, saved: Float[np.ndarray, "N T"], reached: Bool[np.ndarray, "N T"], head: int
) -> Float[np.ndarray, "F"]:
    key, value = (np.asarray(x[:, :, head], np.float64)[reached] for x in (rows.key, rows.value))
    features = np.concatenate([key, value, np.square(key).sum(axis=-1, keepdims=True)], axis=-1)
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-12
    features, target = (features - mean) / scale, saved[reached] - saved[reached].mean()
    gram = features.T @ features / len(features) + _RIDGE * np.eye(features.shape[1])
    return np.linalg.solve(gram, features.T @ target / len(features)) / scale
