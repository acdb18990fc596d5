"""Attention through splats one token at a time: decoding.

May be changed here: how one step reads and updates the state.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gsa_jax.ops.splat_state import FLOOR, Splats, SplatState, add_to_sums, heads_first, key_features, query_features


@jax.jit  # without an outer jit, each call would compile its scan
def recurrent(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    valid: Bool[Array, "B T"],
    splats: Splats,
    state: SplatState,
) -> tuple[Float[Array, "B T H D"], SplatState]:
    """A scan of single steps: O(W + S) per token, in time and memory."""
    if query.shape[1] == 1:
        return _step(query, key, value, valid, splats, state)

    def body(state: SplatState, token: tuple[jax.Array, ...]) -> tuple[SplatState, jax.Array]:
        query, key, value, valid = (x[:, None] for x in token)
        output, state = _step(query, key, value, valid, splats, state)
        return state, output[:, 0]

    state, output = jax.lax.scan(body, state, tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value, valid)))
    return jnp.moveaxis(output, 0, 1), state


def _step(
    query: jax.Array, key: jax.Array, value: jax.Array, valid: jax.Array, splats: Splats, state: SplatState
) -> tuple[jax.Array, SplatState]:
    window, dtype = state.key.shape[2], state.z.dtype
    query, key, value = (heads_first(x, valid) for x in (query, key, value))
    wide_query = query.astype(dtype)
    if window == 0:
        slot, left = 0, (key, value, valid)
        near = jnp.zeros((*query.shape[:3], 0), dtype)
    else:
        slot = state.length % window
        left = tuple(
            jax.lax.dynamic_slice_in_dim(ring, slot, 1, axis)
            for ring, axis in ((state.key, 2), (state.value, 2), (state.valid, 1))
        )
        stays = state.valid & (jnp.arange(window) != slot)
        ring = jnp.einsum("bhtd,bhkd->bhtk", wide_query, state.key.astype(dtype))
        ring = jnp.where(stays[:, None, None, :], ring, -jnp.inf)
        own = jnp.sum(wide_query * key.astype(dtype), axis=-1, keepdims=True)
        near = jnp.concatenate([ring, jnp.where(valid[:, None, :, None], own, -jnp.inf)], axis=-1)

    left_key, left_value, left_valid = left
    features = key_features(splats, left_key.astype(dtype), left_valid)
    m = jax.lax.stop_gradient(jnp.maximum(state.m, features[:, :, 0]))
    sums = add_to_sums(state, features, left_value.astype(dtype), m)

    far = query_features(splats, wide_query) + m[:, :, None, :]
    top = jnp.max(jnp.concatenate([near, far], axis=-1), axis=-1, keepdims=True, initial=FLOOR)
    top = jax.lax.stop_gradient(top)
    near, far = jnp.exp(near - top), jnp.exp(far - top)
    numerator = jnp.einsum("bhts,bhsd->bhtd", far, sums.kv)
    denominator = jnp.sum(near, axis=-1) + jnp.einsum("bhts,bhs->bht", far, sums.z)
    if window:
        numerator += jnp.einsum("bhtk,bhkd->bhtd", near[..., :-1], state.value.astype(dtype))
        numerator += near[..., -1:] * value.astype(dtype)
    output = numerator / jnp.where(denominator > 0, denominator, 1)[..., None]

    if window:
        # Always true, but XLA cannot know. A loop writes into the ring in place if the write depends on all reads of
        # it, and otherwise copies the ring at each step.
        has_read = jnp.all((output == output) | (output != output))
        key, value, valid = (jnp.where(has_read, x, jnp.zeros_like(x)) for x in (key, value, valid))
        sums = dataclasses.replace(
            sums,
            key=jax.lax.dynamic_update_slice_in_dim(state.key, key, slot, axis=2),
            value=jax.lax.dynamic_update_slice_in_dim(state.value, value, slot, axis=2),
            valid=jax.lax.dynamic_update_slice_in_dim(state.valid, valid, slot, axis=1),
        )
    return output.swapaxes(1, 2), dataclasses.replace(sums, length=state.length + 1)
