"""Attention through splats one token at a time: decoding.

May be changed here: how one step reads and updates the state.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.ops.kept import importance
from gsa_jax.ops.precision import precision_of
from gsa_jax.ops.state import (
    FLOOR,
    STATE_HEADS,
    STATE_ROWS,
    Splats,
    SplatState,
    compensated,
    exp_relative,
    key_features,
    per_head,
    query_features,
    weighted_mean,
)


@jax.jit  # without an outer jit, each call would compile its scan
def recurrent(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    segments: Int[Array, "B T"],
    splats: Splats,
    state: SplatState,
) -> tuple[Float[Array, "B T H D"], SplatState]:
    """A scan of single steps: O(W + M + S) per token, in time and memory. A row is one document."""
    step = per_head(
        _step, (0, 0, 0, None, 0, STATE_HEADS), (0, 0, 0, 0, None, STATE_ROWS), (0, STATE_HEADS), (0, STATE_ROWS)
    )

    def body(state: SplatState, token: tuple[jax.Array, ...]) -> tuple[SplatState, jax.Array]:
        output, following = step(*token, splats, state)
        return _write(following, *token[1:], slot=state.length, after=output), output

    tokens = query, key, value, segments != 0
    if query.shape[1] == 1:
        state, output = body(state, tuple(x[:, 0] for x in tokens))
        return output[:, None], state
    state, output = jax.lax.scan(body, state, tuple(jnp.moveaxis(x, 1, 0) for x in tokens))
    return jnp.moveaxis(output, 0, 1), state


def _step(
    query: Float[Array, "D"],
    key: Float[Array, "D"],
    value: Float[Array, "D"],
    valid: Bool[Array, ""],
    splats: Splats,
    state: SplatState,
) -> tuple[Float[Array, "D"], SplatState]:
    """The next token of one head of one row; its key and value are not in the window of the state yet."""
    window, dtype = len(state.key), state.z.dtype
    dot = functools.partial(jnp.matmul, precision=precision_of(query.dtype))
    query, key, value = (jnp.where(valid, x, 0) for x in (query, key, value))  # padding may hold anything
    wide_query = query.astype(dtype)
    if window == 0:
        slot, left = 0, (key, value, valid)
        near = jnp.zeros(0, dtype)
    else:
        slot = state.length % window
        left = tuple(
            jax.lax.dynamic_index_in_dim(x, slot, keepdims=False) for x in (state.key, state.value, state.valid)
        )
        stays = state.valid & (jnp.arange(window) != slot)
        ring = jnp.where(stays, dot(state.key.astype(dtype), wide_query), -jnp.inf)
        own = jnp.where(valid, jnp.sum(wide_query * key.astype(dtype)), -jnp.inf)
        near = jnp.concatenate([ring, own[None]])

    state, going = _keep_or_let_go(splats, state, *left, slot=state.length - window)
    going_key, going_value, goes = going
    feature = key_features(splats, going_key.astype(dtype)[None], goes[None])[0]
    m = jax.lax.stop_gradient(jnp.maximum(state.m, feature))
    old, added = exp_relative(state.m - m), exp_relative(feature - m)
    kv, kv_rest = compensated(state.kv, state.kv_rest, old[:, None], added[:, None] * going_value.astype(dtype))
    z, z_rest = compensated(state.z, state.z_rest, old, added)

    far = query_features(splats, wide_query[None])[0] + m
    kept = jnp.where(state.kept_slot >= 0, dot(state.kept_key.astype(dtype), wide_query), -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(jnp.concatenate([near, kept, far]), initial=FLOOR))
    near, kept, far = (exp_relative(x - top) for x in (near, kept, far))
    numerator, denominator = dot(far, kv), jnp.sum(near) + jnp.sum(kept) + dot(far, z)
    numerator += dot(kept, state.kept_value.astype(dtype))
    if window:
        numerator += dot(near[:-1], state.value.astype(dtype)) + near[-1] * value.astype(dtype)
    output = weighted_mean(numerator, denominator)
    sums = dataclasses.replace(state, kv=kv, kv_rest=kv_rest, z=z, z_rest=z_rest, m=m, length=state.length + 1)
    return output, sums


def _keep_or_let_go(
    splats: Splats,
    state: SplatState,
    key: Float[Array, "D"],
    value: Float[Array, "D"],
    valid: Bool[Array, ""],
    *,
    slot: Int[Array, ""],
) -> tuple[SplatState, tuple[Float[Array, "D"], Float[Array, "D"], Bool[Array, ""]]]:
    """What becomes of a key that leaves the window: it is kept in place of the least important one, or is not.

    Returns:
        The state with the kept keys after that, and the key that goes into the sums: it, its value, and whether there
        is any.
    """
    if not len(state.kept_slot):
        return state, (key, value, valid)
    own = importance(splats, key[None], value[None])[0]
    taken = state.kept_slot >= 0
    # The least important one, of several the newest, or a place that is free.
    ranked = jnp.where(taken, state.kept_importance, -jnp.inf)
    newest = jnp.where(taken, state.kept_slot, jnp.iinfo(jnp.int32).max)
    least = jnp.argmax(jnp.where(ranked == jnp.min(ranked), newest, -1))
    enters = valid & (~taken[least] | (own > state.kept_importance[least]))
    going_key = jnp.where(enters, state.kept_key[least], key)
    going_value = jnp.where(enters, state.kept_value[least], value)
    goes = jnp.where(enters, taken[least], valid)
    here = enters & (jnp.arange(len(taken)) == least)
    state = dataclasses.replace(
        state,
        kept_key=jnp.where(here[:, None], key, state.kept_key),
        kept_value=jnp.where(here[:, None], value, state.kept_value),
        kept_importance=jnp.where(here, own, state.kept_importance),
        kept_slot=jnp.where(here, slot, state.kept_slot),
    )
    return state, (going_key, going_value, goes)


def _write(
    state: SplatState,
    key: Float[Array, "B H D"],
    value: Float[Array, "B H D"],
    valid: Bool[Array, "B"],
    *,
    slot: Int[Array, ""],
    after: Float[Array, "B H D"],
) -> SplatState:
    """Puts a token into the ring, of all heads and rows at once: under `vmap`, a slice becomes a scatter."""
    window = state.key.shape[2]
    if window == 0:
        return state
    # Always true, but XLA cannot know. A loop writes into the ring in place if the write depends on all reads of it,
    # and otherwise copies the ring at each step.
    has_read = jnp.all((after == after) | (after != after))
    present = (valid & has_read)[:, None, None]
    key, value = (jnp.where(present, x, jnp.zeros_like(x))[:, :, None] for x in (key, value))
    return dataclasses.replace(
        state,
        key=jax.lax.dynamic_update_slice_in_dim(state.key, key, slot % window, axis=2),
        value=jax.lax.dynamic_update_slice_in_dim(state.value, value, slot % window, axis=2),
        valid=jax.lax.dynamic_update_slice_in_dim(state.valid, (valid & has_read)[:, None], slot % window, axis=1),
    )
