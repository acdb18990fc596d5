"""What attention through splats is given (`Splats`) and what it carries from token to token (`SplatState`).

May be changed here: the parameters, the layout of the state, and how Gaussian log features are computed. Every
implementation of `splat_attention` reads and writes the same state, so a prefill by one can be continued by another.

Functions here are of one head of one row, unless their arrays begin with `B H`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.ops.precision import EXPONENTS

FLOOR = -1e30
"""The maximum over no keys: below every score, and finite, so that the difference of two such maxima is not NaN. The
score of a key that is not seen is -inf, so its weight is exactly 0."""


_HIGHEST = 10.0
"""Limit of a score relative to its maximum: above what rounding adds to meaningful scores, and far from overflow."""


@no_type_check  # a pytree also holds axes, shapes and shardings
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["centers", "log_scales", "log_amplitudes", "norm_gain", "far_gain", "importance"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Splats:
    """Gaussian splats of one layer; of one head without the first axis.

    Attributes:
        centers: c_s.
        log_scales: log(sigma_s), isotropic.
        log_amplitudes: log(a_s); `None` means 0.
        norm_gain: beta, the weight of `|query|^2 + |key|^2` in the far score; `None` means 0.
        far_gain: lambda, added to each far score; `None` means 0.
        importance: F = 2 D + 1 weights of a key, of its value and of `|key|^2`, by which it is decided which keys are
            kept; `None` means `|key|^2` alone. It has no gradient.
    """

    centers: Float[Array, "*H S D"]
    log_scales: Float[Array, "*H S"]
    log_amplitudes: Float[Array, "*H S"] | None = None
    norm_gain: Float[Array, "*H"] | None = None
    far_gain: Float[Array, "*H"] | None = None
    importance: Float[Array, "*H F"] | None = None

    def complete(self, dtype: jax.typing.DTypeLike) -> Splats:
        """What the far score takes, in this dtype, with zeros in place of every `None`."""
        per_splat, per_head = jnp.zeros_like(self.log_scales), jnp.zeros(self.log_scales.shape[:-1])
        filled = Splats(
            self.centers,
            self.log_scales,
            per_splat if self.log_amplitudes is None else self.log_amplitudes,
            per_head if self.norm_gain is None else self.norm_gain,
            per_head if self.far_gain is None else self.far_gain,
        )
        return jax.tree.map(lambda x: x.astype(dtype), filled)


def no_splats(heads: int, head_dim: int) -> Splats:
    """S = 0: attention inside the window alone."""
    return Splats(jnp.zeros((heads, 0, head_dim)), jnp.zeros((heads, 0)))


@no_type_check
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "key",
        "value",
        "valid",
        "kept_key",
        "kept_value",
        "kept_importance",
        "kept_slot",
        "kv",
        "kv_rest",
        "z",
        "z_rest",
        "m",
        "length",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SplatState:
    """The past, in constant size: the window and M kept keys exactly, everything else as sums over each splat.

    A key that is in the sums has, for splat s, the log feature `f = log phi_s(key) + |c_s|^2 / (2 sigma_s^2) +
    beta |key|^2`. Its second term removes a constant from `log phi_s`; the query's feature contains it instead, where
    it costs no precision.

    Attributes:
        key: the last W keys; the token at slot t lies at index `t % W`. Padding is stored as zeros.
        value: their values.
        valid: which of them are tokens: not padding, and already written.
        kept_key: the M keys of most importance of those that left the window, in any order.
        kept_value: their values.
        kept_importance: `gsa_jax.ops.kept.importance` of each.
        kept_slot: the slot of each; -1 where there is none yet.
        kv: sum of `exp(f - m) value` over the keys that left the window and are not kept.
        kv_rest: what rounding has so far left out of `kv`. Without it, the sum over a million tokens is wrong by up to
            percents, because each addition to a large sum is rounded the same way.
        z: sum of `exp(f - m)`.
        z_rest: what rounding has left out of `z`.
        m: maximum of f, one per splat because splats' features may lie hundreds apart; `FLOOR` before the first key.
        length: slots seen so far, padding included.
    """

    key: Float[Array, "*BH W D"]
    value: Float[Array, "*BH W D"]
    valid: Bool[Array, "*B W"]
    kept_key: Float[Array, "*BH M D"]
    kept_value: Float[Array, "*BH M D"]
    kept_importance: Float[Array, "*BH M"]
    kept_slot: Int[Array, "*BH M"]
    kv: Float[Array, "*BH S D"]
    kv_rest: Float[Array, "*BH S D"]
    z: Float[Array, "*BH S"]
    z_rest: Float[Array, "*BH S"]
    m: Float[Array, "*BH S"]
    length: Int[Array, ""]


STATE_HEADS = SplatState(**{field.name: 0 for field in dataclasses.fields(SplatState)})  # type: ignore[arg-type]
STATE_HEADS = dataclasses.replace(STATE_HEADS, valid=None, length=None)  # type: ignore[arg-type]
STATE_ROWS = dataclasses.replace(STATE_HEADS, valid=0)
"""Axes over which `jax.vmap` maps the state of a row to its heads, and of a batch to its rows."""


def sums_dtype(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """That of scores and sums for queries, keys and values of `dtype`: float32 at least."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def init_splat_state(splats: Splats, batch: int, window: int, dtype: jax.typing.DTypeLike, kept: int = 0) -> SplatState:
    """The state before the first token, for keys and values of `dtype`; the sums are float32 at least.

    Args:
        kept: M, how many keys stay exact after they left the window.
    """
    heads, num_splats, head_dim = splats.centers.shape
    wide = sums_dtype(dtype)
    kv = jnp.zeros((batch, heads, num_splats, head_dim), wide)
    z = jnp.zeros((batch, heads, num_splats), wide)
    return SplatState(
        key=jnp.zeros((batch, heads, window, head_dim), dtype),
        value=jnp.zeros((batch, heads, window, head_dim), dtype),
        valid=jnp.zeros((batch, window), bool),
        kept_key=jnp.zeros((batch, heads, kept, head_dim), dtype),
        kept_value=jnp.zeros((batch, heads, kept, head_dim), dtype),
        kept_importance=jnp.zeros((batch, heads, kept), wide),
        kept_slot=jnp.full((batch, heads, kept), -1, jnp.int32),
        kv=kv,
        kv_rest=kv,
        z=z,
        z_rest=z,
        m=jnp.full_like(z, FLOOR),
        length=jnp.zeros((), jnp.int32),
    )


def roll_window(state: SplatState, shift: int | Int[Array, ""]) -> SplatState:
    """Turns the ring of a state `[B, H, ...]`: by `-length` into the order of time, by `length` back."""
    return dataclasses.replace(
        state,
        key=jnp.roll(state.key, shift, axis=2),
        value=jnp.roll(state.value, shift, axis=2),
        valid=jnp.roll(state.valid, shift, axis=1),
    )


def without_padding(x: Float[Array, "T D"], segments: Int[Array, "T"]) -> Float[Array, "T D"]:
    """Zeros in place of whatever padding holds: no `0 * inf` can come from it."""
    return jnp.where((segments != 0)[:, None], x, 0)


def append_to_window(
    state: SplatState, key: Float[Array, "T D"], value: Float[Array, "T D"], segments: Int[Array, "T"]
) -> SplatState:
    """Moves a window in the order of time on by T slots, padding as zeros; the sums stay as they are."""
    length, window = len(key), len(state.key)
    new = slice(length - min(length, window), None)
    kept = slice(min(length, window), None)
    key, value = (without_padding(x[new], segments[new]) for x in (key, value))
    return dataclasses.replace(
        state,
        key=jnp.concatenate([state.key[kept], key]),
        value=jnp.concatenate([state.value[kept], value]),
        valid=jnp.concatenate([state.valid[kept], segments[new] != 0]),
        length=state.length + length,
    )


def per_head(
    function: Callable[..., Any], head_axes: Any, row_axes: Any, head_out: Any = 0, row_out: Any = 0
) -> Callable[..., Any]:
    """A function of one head of one row, for all heads and rows; axes as `jax.vmap` takes them."""
    return jax.vmap(jax.vmap(function, head_axes, head_out), row_axes, row_out)


append_to_windows = per_head(
    append_to_window, (STATE_HEADS, 1, 1, None), (STATE_ROWS, 0, 0, 0), STATE_HEADS, STATE_ROWS
)
"""`append_to_window` of a state `[B, H, ...]` and tokens `[B, T, H, D]`."""


without_paddings = per_head(without_padding, (1, None), (0, 0), 1)
"""`without_padding` of tokens `[B, T, H, D]` and segments `[B, T]`."""


def exp_relative(x: Array) -> Array:
    """`exp(x)` of scores relative to their maximum: finite however x was rounded, and its derivative is its value.

    A compiler may compute a score twice, for its maximum and for the difference from it, and round it differently each
    time. Scores near 1e9, which scales of 1e-3 give, then lie hundreds above their maximum, and would overflow. What
    lies a little above it is left as it is: all scores of a row may have been rounded alike.
    """
    return jnp.exp(x - jax.lax.stop_gradient(jnp.maximum(x - _HIGHEST, 0)))


def weighted_mean(numerator: Float[Array, "*T D"], denominator: Float[Array, "*T"]) -> Float[Array, "*T D"]:
    """The quotient; 0 where a query sees nothing.

    Scores are relative to their maximum, so a denominator is about 1 at least, unless scores near 1e9 have been rounded
    by hundreds. Both sides are scaled by a constant first: the gradient divides by the square of the denominator, which
    must not underflow even then.
    """
    scale = jax.lax.stop_gradient(1 / jnp.maximum(denominator, -1 / FLOOR))
    return numerator * scale[..., None] / jnp.where(denominator > 0, denominator * scale, 1)[..., None]


def compensated(total: Array, rest: Array, kept: Array, new: Array) -> tuple[Array, Array]:
    """`kept * (total + rest) + new` as a float and what its rounding left out, to be added the next time.

    Kahan (1965), "Further remarks on reducing truncation errors".
    """
    total, new = kept * total, new + kept * rest
    result = total + new
    return result, jax.lax.stop_gradient(new - (result - total))


def query_features(splats: Splats, query: Float[Array, "T D"]) -> Float[Array, "T S"]:
    """The part of a far score through each splat that does not depend on the key; the key's part is `key_features`.

    Their sum is `log phi_s(query) + log phi_s(key) + log a_s + beta (|query|^2 + |key|^2) + lambda`.
    """
    splats = splats.complete(query.dtype)
    shared = query_terms(splats)
    return _log_gaussians(splats, query) + shared


def query_terms(splats: Splats) -> Float[Array, "S"]:
    """What the log features of queries have more than those of keys; of complete splats."""
    centers, log_scales, log_amplitudes, _, far_gain = jax.tree.leaves(splats)
    return log_amplitudes + far_gain - jnp.exp(-2 * log_scales) * jnp.sum(jnp.square(centers), axis=-1)


def key_features(splats: Splats, key: Float[Array, "T D"], valid: Bool[Array, "T"]) -> Float[Array, "T S"]:
    """The log feature `f` of `SplatState` of each key; -inf for keys that are not there."""
    return jnp.where(valid[:, None], _log_gaussians(splats.complete(key.dtype), key), -jnp.inf)


def _log_gaussians(splats: Splats, x: Float[Array, "T D"]) -> Float[Array, "T S"]:
    """`x . c_s / sigma_s^2 + (beta - 1 / (2 sigma_s^2)) |x|^2`.

    This is a matrix product instead of differences `x - c_s`, which makes it fast everywhere. For far centres or a beta
    near `1 / (2 sigma^2)`, large terms cancel before they are computed, so the small remainder is not rounded away.
    """
    directions, of_norm = feature_coefficients(splats)
    projections = jnp.matmul(x, directions.T, precision=EXPONENTS)
    return projections + of_norm * jnp.sum(jnp.square(x), axis=-1, keepdims=True)


def feature_coefficients(splats: Splats) -> tuple[Float[Array, "S D"], Float[Array, "S"]]:
    """`c_s / sigma_s^2` and `beta - 1 / (2 sigma_s^2)`, of complete splats."""
    assert splats.norm_gain is not None, "splats are complete"
    inverse_variance = jnp.exp(-2 * splats.log_scales)
    return splats.centers * inverse_variance[:, None], splats.norm_gain - inverse_variance / 2
