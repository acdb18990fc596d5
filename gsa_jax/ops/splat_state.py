"""What attention through splats is given (`Splats`) and what it carries from token to token (`SplatState`).

May be changed here: the parameters, the layout of the state, and how Gaussian log features are computed. Every
implementation of `splat_attention` reads and writes the same state, so a prefill by one can be continued by another.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FLOOR = -1e30
"""Below every score. Finite, so that differences between maxima over nothing are numbers; an unseen key's own score is
-inf, and its weight exactly 0."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["centers", "log_scales", "log_amplitudes", "norm_gain", "far_gain"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Splats:
    """Gaussian splats of one layer.

    Attributes:
        centers: c_s.
        log_scales: log(sigma_s), isotropic.
        log_amplitudes: log(a_s); `None` means 0.
        norm_gain: beta, the weight of `|query|^2 + |key|^2` in the far score; `None` means 0.
        far_gain: lambda, added to each far score; `None` means 0.
    """

    centers: Float[Array, "H S D"]
    log_scales: Float[Array, "H S"]
    log_amplitudes: Float[Array, "H S"] | None = None
    norm_gain: Float[Array, "H"] | None = None
    far_gain: Float[Array, "H"] | None = None


def no_splats(heads: int, head_dim: int) -> Splats:
    """S = 0: attention inside the window alone."""
    return Splats(jnp.zeros((heads, 0, head_dim)), jnp.zeros((heads, 0)))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "valid", "kv", "kv_rest", "z", "z_rest", "m", "length"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class SplatState:
    """The past, in constant size: the window exactly, everything older as sums over each splat.

    A key that left the window has, for splat s, the log feature `f = log phi_s(key) + |c_s|^2 / (2 sigma_s^2) +
    beta |key|^2` (what all keys of a splat share is counted with the query, where it costs no precision).

    Attributes:
        key: the last W keys; the token at slot t lies at index `t % W`. Padding is stored as zeros.
        value: their values.
        valid: which of them are tokens: not padding, and already written.
        kv: sum of `exp(f - m) value` over the keys that left the window.
        kv_rest: what rounding has so far left out of `kv`. Without it, the sum over a million tokens is wrong by up to
            percents, because each addition to a large sum is rounded the same way.
        z: sum of `exp(f - m)`.
        z_rest: what rounding has left out of `z`.
        m: maximum of f, one per splat because splats' features may lie hundreds apart; `FLOOR` before the first key.
        length: slots seen so far, padding included.
    """

    key: Float[Array, "B H W D"]
    value: Float[Array, "B H W D"]
    valid: Bool[Array, "B W"]
    kv: Float[Array, "B H S D"]
    kv_rest: Float[Array, "B H S D"]
    z: Float[Array, "B H S"]
    z_rest: Float[Array, "B H S"]
    m: Float[Array, "B H S"]
    length: Int[Array, ""]


def init_splat_state(splats: Splats, batch: int, window: int, dtype: jax.typing.DTypeLike) -> SplatState:
    """The state before the first token, for keys and values of `dtype`; the sums are float32 at least."""
    heads, num_splats, head_dim = splats.centers.shape
    wide = jnp.promote_types(dtype, jnp.float32)
    kv = jnp.zeros((batch, heads, num_splats, head_dim), wide)
    z = jnp.zeros((batch, heads, num_splats), wide)
    return SplatState(
        key=jnp.zeros((batch, heads, window, head_dim), dtype),
        value=jnp.zeros((batch, heads, window, head_dim), dtype),
        valid=jnp.zeros((batch, window), bool),
        kv=kv,
        kv_rest=kv,
        z=z,
        z_rest=z,
        m=jnp.full_like(z, FLOOR),
        length=jnp.zeros((), jnp.int32),
    )


def roll_window(state: SplatState, shift: int | Int[Array, ""]) -> SplatState:
    """Turns the ring: by `-length` into the order of time, by `length` back."""
    return dataclasses.replace(
        state,
        key=jnp.roll(state.key, shift, axis=2),
        value=jnp.roll(state.value, shift, axis=2),
        valid=jnp.roll(state.valid, shift, axis=1),
    )


def heads_first(x: Float[Array, "B T H D"], valid: Bool[Array, "B T"] | Int[Array, "B T"]) -> Float[Array, "B H T D"]:
    """The layout of the dot products, with zeros in place of whatever padding holds: no `0 * inf` can come from it."""
    return jnp.where(valid[:, :, None, None], x, 0).swapaxes(1, 2)


def append_to_window(
    state: SplatState,
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    valid: Bool[Array, "B T"] | Int[Array, "B T"],
) -> SplatState:
    """Moves a window that is in the order of time on by T slots; the sums stay as they are."""
    length, window = key.shape[1], state.key.shape[2]
    new = min(length, window)
    key, value, valid = (x[:, length - new :] for x in (key, value, valid))
    return dataclasses.replace(
        state,
        key=jnp.concatenate([state.key[:, :, new:], heads_first(key, valid)], axis=2),
        value=jnp.concatenate([state.value[:, :, new:], heads_first(value, valid)], axis=2),
        valid=jnp.concatenate([state.valid[:, new:], valid], axis=1),
        length=state.length + length,
    )


def add_to_sums(
    state: SplatState,
    features: Float[Array, "B H T S"],
    value: Float[Array, "B H T D"],
    m: Float[Array, "B H S"],
) -> SplatState:
    """Adds T keys that left the window to the sums, which are then relative to `m`, no less than the features.

    Compensated summation: the rounding error of each addition is kept and added the next time.
    """
    kept, added = jnp.exp(state.m - m), jnp.exp(features - m[:, :, None, :])

    def add(total: jax.Array, rest: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = new + rest
        result = total + new
        return result, jax.lax.stop_gradient(new - (result - total))

    new_kv = jnp.einsum("bhts,bhtd->bhsd", added, value)
    kv, kv_rest = add(kept[..., None] * state.kv, kept[..., None] * state.kv_rest, new_kv)
    z, z_rest = add(kept * state.z, kept * state.z_rest, jnp.sum(added, axis=2))
    return dataclasses.replace(state, kv=kv, kv_rest=kv_rest, z=z, z_rest=z_rest, m=m)


def query_features(splats: Splats, query: Float[Array, "B H T D"]) -> Float[Array, "B H T S"]:
    """`log phi_s(query)` and all that does not depend on the key; plus a key's `f`, the far score through one splat."""
    inverse_variance = jnp.exp(-2 * splats.log_scales.astype(query.dtype))
    shared = -inverse_variance * jnp.sum(jnp.square(splats.centers.astype(query.dtype)), axis=-1)
    if splats.log_amplitudes is not None:
        shared += splats.log_amplitudes.astype(query.dtype)
    if splats.far_gain is not None:
        shared += splats.far_gain.astype(query.dtype)[:, None]
    return _log_gaussians(splats, query) + shared[:, None, :]


def key_features(
    splats: Splats, key: Float[Array, "B H T D"], valid: Bool[Array, "B T"] | Int[Array, "B T"]
) -> Float[Array, "B H T S"]:
    """`f` of `SplatState`; -inf for keys that are not there."""
    return jnp.where(valid[:, None, :, None], _log_gaussians(splats, key), -jnp.inf)


def _log_gaussians(splats: Splats, x: jax.Array) -> jax.Array:
    """`x . c_s / sigma_s^2 + (beta - 1 / (2 sigma_s^2)) |x|^2`.

    A matrix product instead of differences `x - c_s`: it is fast everywhere, and far centres or a beta near
    `1 / (2 sigma^2)` leave the small remainder that matters without rounding the large terms that cancel.
    """
    inverse_variance = jnp.exp(-2 * splats.log_scales.astype(x.dtype))
    directions = splats.centers.astype(x.dtype) * inverse_variance[..., None]
    # A TPU would otherwise multiply in bfloat16, and these are exponents.
    projections = jnp.einsum("bhtd,hsd->bhts", x, directions, precision=jax.lax.Precision.HIGHEST)
    of_norm = -inverse_variance / 2
    if splats.norm_gain is not None:
        of_norm += splats.norm_gain.astype(x.dtype)[:, None]
    return projections + of_norm[:, None, :] * jnp.sum(jnp.square(x), axis=-1, keepdims=True)
