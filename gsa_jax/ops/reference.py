"""Attention through splats as it is defined, with the full matrix of scores: the oracle of the fast forms.

May be changed here: nothing but the definition itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.ops.documents import visible_keys
from gsa_jax.ops.splat_state import FLOOR, Splats, SplatState, heads_first, roll_window


def reference(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    valid: Bool[Array, "B T"] | Int[Array, "B T"],
    splats: Splats,
    state: SplatState,
) -> tuple[Float[Array, "B T H D"], SplatState]:
    """The dense form: O(T^2 S) time and memory, float32 or float64 as `state.z` is.

    With documents in `valid` the state before must be empty, and the one after means nothing.
    """
    length, window, dtype = query.shape[1], state.key.shape[2], state.z.dtype
    query, key, value = (heads_first(x, valid) for x in (query, key, value))
    state = roll_window(state, -state.length)
    keys = jnp.concatenate([state.key, key], axis=2)
    values = jnp.concatenate([state.value, value], axis=2)
    seen = jnp.concatenate([state.valid, valid], axis=1)
    query, k, v = (x.astype(dtype) for x in (query, keys, values))

    centers, log_scales = splats.centers.astype(dtype), splats.log_scales.astype(dtype)
    half_inverse_variance = jnp.exp(-2 * log_scales) / 2

    def log_phi(x: jax.Array) -> jax.Array:
        squared = jnp.sum(jnp.square(x[:, :, :, None, :] - centers[:, None]), axis=-1)
        return -squared * half_inverse_variance[:, None, :]

    log_q, log_k = log_phi(query), log_phi(k)
    if splats.log_amplitudes is not None:
        log_q += splats.log_amplitudes.astype(dtype)[:, None, :]
    if splats.far_gain is not None:
        log_q += splats.far_gain.astype(dtype)[:, None, None]
    if splats.norm_gain is not None:
        norm_gain = splats.norm_gain.astype(dtype)[:, None, None]
        log_q += norm_gain * jnp.sum(query**2, axis=-1, keepdims=True)
        log_k += norm_gain * jnp.sum(k**2, axis=-1, keepdims=True)
    # The state counts what all keys of a splat share with the query.
    shared = (half_inverse_variance * jnp.sum(centers**2, axis=-1))[:, None, :]
    log_q, log_k = log_q - shared, log_k + shared

    distance = window + jnp.arange(length)[:, None] - jnp.arange(window + length)
    near = jnp.einsum("bhtd,bhkd->bhtk", query, k)
    far = jax.nn.logsumexp(log_q[:, :, :, None, :] + log_k[:, :, None, :, :], axis=-1)
    scores = jnp.where(distance < window, near, far)
    scores = jnp.where((distance >= 0) & visible_keys(valid, seen), scores, -jnp.inf)
    older = log_q + state.m[:, :, None, :]  # each splat's past counts as z keys of this score

    top = jnp.max(jnp.concatenate([scores, older], axis=-1), axis=-1, keepdims=True, initial=FLOOR)
    top = jax.lax.stop_gradient(top)
    weights, older = jnp.exp(scores - top), jnp.exp(older - top)
    numerator = jnp.einsum("bhtk,bhkd->bhtd", weights, v) + jnp.einsum("bhts,bhsd->bhtd", older, state.kv)
    denominator = jnp.sum(weights, axis=-1) + jnp.einsum("bhts,bhs->bht", older, state.z)
    output = numerator / jnp.where(denominator > 0, denominator, 1)[..., None]

    left = jnp.where(seen[:, None, :length, None], log_k[:, :, :length], -jnp.inf)
    m = jax.lax.stop_gradient(jnp.maximum(state.m, jnp.max(left, axis=2)))
    left, kept = jnp.exp(left - m[:, :, None, :]), jnp.exp(state.m - m)
    state = dataclasses.replace(
        state,
        key=keys[:, :, length:],
        value=values[:, :, length:],
        valid=seen[:, length:],
        kv=kept[..., None] * (state.kv + state.kv_rest) + jnp.einsum("bhts,bhtd->bhsd", left, v[:, :, :length]),
        kv_rest=jnp.zeros_like(state.kv),
        z=kept * (state.z + state.z_rest) + jnp.sum(left, axis=2),
        z_rest=jnp.zeros_like(state.z),
        m=m,
        length=state.length + length,
    )
    return output.swapaxes(1, 2), roll_window(state, state.length)
