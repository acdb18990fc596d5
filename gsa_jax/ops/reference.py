"""Attention through splats as it is defined, with the full matrix of scores: the oracle of the fast forms.

    log phi_s(x) = -|x - c_s|^2 / (2 sigma_s^2)

    near(i, j)   = q_i . k_j
    far(i, j)    = logsumexp_s( log phi_s(q_i) + log phi_s(k_j) + log a_s ) + beta (|q_i|^2 + |k_j|^2) + lambda
    score(i, j)  = near(i, j) if i - j < W, or j is kept at i, else far(i, j); -inf if j > i, or i and j are not of one
                   document
    j is kept at i if i - j >= W and fewer than M of the other such keys are more important, or older and as important

    output_i     = sum_j softmax_j(score(i, .)) v_j

May be changed here: nothing but the definition itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.ops.kept import importance
from gsa_jax.ops.precision import precision_of
from gsa_jax.ops.segments import visible
from gsa_jax.ops.state import FLOOR, Splats, SplatState, append_to_window, weighted_mean, without_padding


def scores(
    query: Float[Array, "T D"],
    key: Float[Array, "K D"],
    query_segments: Int[Array, "T"],
    key_segments: Int[Array, "K"],
    splats: Splats,
    window: int,
    importance: Float[Array, "K"],
    kept: int,
) -> Float[Array, "T K"]:
    """The definition, for the last T of K tokens as queries."""
    log_query, log_key = log_factors(splats, query, key)
    near = jnp.matmul(query, key.T, precision=precision_of(query.dtype))
    far = jax.nn.logsumexp(log_query[:, None, :] + log_key[None, :, :], axis=-1)
    distance = jnp.arange(len(key) - len(query), len(key))[:, None] - jnp.arange(len(key))
    seen = (distance >= 0) & visible(query_segments, key_segments)
    score = jnp.where((distance < window) | most_important(importance, seen & (distance >= window), kept), near, far)
    return jnp.where(seen, score, -jnp.inf)


def most_important(
    importance: Float[Array, "K"], far: Bool[Array, "*T K"], kept: int | Int[Array, ""]
) -> Bool[Array, "*T K"]:
    """Which far keys are kept: those of most importance, and the older of two that are as important."""
    order = jnp.argsort(jnp.where(far, -importance, jnp.inf), axis=-1, stable=True)
    return far & (jnp.argsort(order, axis=-1, stable=True) < kept)


def log_factors(
    splats: Splats, query: Float[Array, "T D"], key: Float[Array, "K D"]
) -> tuple[Float[Array, "T S"], Float[Array, "K S"]]:
    """Logarithms of the factors that each splat has for a query and for a key in `exp(far)`."""
    centers, log_scales, log_amplitudes, norm_gain, far_gain = jax.tree.leaves(splats.complete(query.dtype))

    def log_phi(x: jax.Array) -> jax.Array:
        return -jnp.sum(jnp.square(x[:, None, :] - centers), axis=-1) / (2 * jnp.exp(2 * log_scales))

    def norm(x: jax.Array) -> jax.Array:
        return norm_gain * jnp.sum(x**2, axis=-1, keepdims=True)

    return log_phi(query) + log_amplitudes + norm(query) + far_gain, log_phi(key) + norm(key)


def reference(
    query: Float[Array, "T D"],
    key: Float[Array, "T D"],
    value: Float[Array, "T D"],
    segments: Int[Array, "T"],
    splats: Splats,
    state: SplatState,
) -> tuple[Float[Array, "T D"], SplatState]:
    """The dense form: O(T^2 S) time and memory, float32 or float64 as `state.z` is; the window in the order of time.

    The keys before these are in the state: those of the window and the kept ones one by one, others as sums over each
    splat.

    With several documents the state before must be empty, and the one after means nothing.
    """
    length, window, kept, dtype = len(query), len(state.key), len(state.kept_slot), state.z.dtype
    query, key, value = (without_padding(x, segments) for x in (query, key, value))
    following = append_to_window(state, key, value, segments)
    # Kept keys are older than the window, and stand before it in the order of time.
    old = jnp.argsort(state.kept_slot)
    key = jnp.concatenate([state.kept_key[old], state.key, key])
    value = jnp.concatenate([state.kept_value[old], state.value, value])
    slots = jnp.concatenate([state.kept_slot[old], jnp.arange(-window, length, dtype=jnp.int32) + state.length])
    known = jnp.concatenate([state.kept_slot[old] >= 0, state.valid]).astype(segments.dtype)
    key_segments = jnp.concatenate([known, segments])
    importances = jnp.concatenate([state.kept_importance[old], importance(splats, key[kept:], value[kept:])])
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    score = scores(query, key, segments, key_segments, splats, window, importances, kept)

    log_query, log_key = log_factors(splats, query, key)
    complete = splats.complete(dtype)
    shared = jnp.sum(complete.centers**2, axis=-1) / (2 * jnp.exp(2 * complete.log_scales))
    older = log_query - shared + state.m  # each splat's past counts as z keys of this score
    top = jnp.max(jnp.concatenate([score, older], axis=-1), axis=-1, keepdims=True, initial=FLOOR)
    top = jax.lax.stop_gradient(top)
    weights, older = jnp.exp(score - top), jnp.exp(older - top)
    denominator = jnp.sum(weights, axis=-1) + jnp.sum(older * state.z, axis=-1)
    dot = functools.partial(jnp.matmul, precision=precision_of(dtype))
    output = weighted_mean(dot(weights, value) + dot(older, state.kv), denominator)

    left = (key_segments != 0) & (jnp.arange(len(key)) < kept + length)
    stay = most_important(importances, left, kept)
    left = jnp.where((left & ~stay)[:, None], log_key + shared, -jnp.inf)
    m = jax.lax.stop_gradient(jnp.maximum(state.m, jnp.max(left, axis=0)))
    left, rest = jnp.exp(left - m), jnp.exp(state.m - m)
    chosen = jnp.argsort(~stay, stable=True)[:kept]
    return output, dataclasses.replace(
        following,
        kept_key=jnp.where(stay[chosen, None], key[chosen], 0).astype(state.key.dtype),
        kept_value=jnp.where(stay[chosen, None], value[chosen], 0).astype(state.value.dtype),
        kept_importance=jnp.where(stay[chosen], importances[chosen], 0),
        kept_slot=jnp.where(stay[chosen], slots[chosen], -1),
        kv=rest[:, None] * (state.kv + state.kv_rest) + dot(left.T, value),
        kv_rest=jnp.zeros_like(state.kv),
        z=rest * (state.z + state.z_rest) + jnp.sum(left, axis=0),
        z_rest=jnp.zeros_like(state.z),
        m=m,
    )
