"""Attention through splats in linear time, many tokens at once: training and prefill.

May be changed here: how a chunk is computed. A chunk maps (state, tokens) to (state, outputs); a scan does the rest.
`_factors` and `_chunk` work on one head of one row; `chunked` decides what all heads and rows must do alike.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.ops.segments import Reached, reached_by, visible
from gsa_jax.ops.state import (
    FLOOR,
    STATE_HEADS,
    STATE_ROWS,
    Splats,
    SplatState,
    append_to_window,
    append_to_windows,
    compensated,
    exp_relative,
    key_features,
    per_head,
    query_features,
    weighted_mean,
    without_padding,
)
from gsa_jax.ops.steep import STEEP, level_weights, steep_weights

_CHUNK = 64
"""Least tokens per chunk by default. A wider window takes chunks of its own width, up to `_MAX_CHUNK`: each chunk reads
all keys of the window, which should not be many more than its own keys."""

_MAX_CHUNK = 256


class Factors(NamedTuple):
    """Log features of queries and of the keys that leave the window, relative to a base.

    The base of a document is a maximum that all of its tokens in the chunk have seen: that of the keys before the
    chunk, or else the feature of the document's first key.

    Attributes:
        read: a query's log features plus the base; -inf where no far key can be read.
        add: a key's log features less the base; -inf where there is no key.
        last: base of the last document, the only one that can have readers to come.
    """

    read: Float[Array, "*BH T S"]
    add: Float[Array, "*BH T S"]
    last: Float[Array, "*BH S"]


@functools.partial(jax.jit, static_argnames=("chunk_size",))  # without an outer jit, each call would compile its scan
def chunked(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    segments: Int[Array, "B T"],
    splats: Splats,
    state: SplatState,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H D"], SplatState]:
    """A scan over chunks that carries the state: O(W + S) per token, in time and memory, forward and backward.

    The window of the state is in the order of time. The backward pass recomputes each chunk from the state at its
    start.

    With several documents the state before must be empty, and the one after is of the last document alone.
    """
    batch, length, heads, head_dim = query.shape
    size = min(chunk_size or min(max(state.key.shape[2], _CHUNK), _MAX_CHUNK), length)
    count = -(-length // size)
    padding_to_zeros = per_head(without_padding, (1, None), (0, 0), 1)

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(carried: tuple[Any, ...], tokens: tuple[jax.Array, ...]) -> tuple[tuple[Any, ...], jax.Array]:
        query, key, value, segments, exists = tokens
        query, key, value = (padding_to_zeros(x, segments) for x in (query, key, value))
        state, window_segments, document = carried
        key_segments = jnp.concatenate([window_segments, segments], axis=1)
        left = jnp.where(exists, key_segments[:, :size], 0)
        reached = jax.vmap(reached_by)(left, document)
        begins = jnp.any(reached.has_key & ~(reached.goes_on & jnp.any(state.m > FLOOR, axis=(1, 2))[:, None]))
        factors = factors_of(query, key, segments, left, reached, splats, state, begins)
        # Decided once for all heads and rows: under `vmap`, one condition for each would compute both branches.
        steep = jnp.any(factors.add >= STEEP)
        output, state = chunk(query, key, value, segments, key_segments, reached, factors, state, steep)
        return (state, key_segments[:, size:], reached.document[:, -1]), output

    factors_of = per_head(
        _factors, (1, 1, None, None, None, 0, STATE_HEADS, None), (0, 0, 0, 0, 0, None, STATE_ROWS, None)
    )
    chunk = per_head(
        _chunk,
        (1, 1, 1, None, None, None, 0, STATE_HEADS, None),
        (0, 0, 0, 0, 0, 0, 0, STATE_ROWS, None),
        (1, STATE_HEADS),
        (0, STATE_ROWS),
    )
    # The last chunk may have slots past the end of the row. No key leaves the window at them, so the sums are right.
    # But the window moves on past the end, so the last state has that of the last tokens instead.
    exists = jnp.arange(count * size).reshape(count, size) < length
    tokens = (*map(chunks, (query, key, value, segments)), exists)
    # Keys before this call belong to document 1: without `segment_ids` a row is one document of that number, and with
    # them there are no keys before.
    carried = state, state.valid.astype(segments.dtype), jnp.ones(batch, segments.dtype)
    (sums, _, _), output = jax.lax.scan(body, carried, tokens)
    output = jnp.moveaxis(output, 0, 1).reshape(batch, count * size, heads, head_dim)[:, :length]
    final = append_to_windows(state, key, value, segments)
    return output, dataclasses.replace(sums, key=final.key, value=final.value, valid=final.valid, length=final.length)


def _factors(
    query: Float[Array, "T D"],
    key: Float[Array, "T D"],
    segments: Int[Array, "T"],
    left: Int[Array, "T"],
    reached: Reached,
    splats: Splats,
    state: SplatState,
    begins: Bool[Array, ""],
) -> Factors:
    """The factors of T tokens.

    Args:
        left: segments of the keys that leave the window.
        begins: whether any document takes the feature of its first key as its base.
    """
    length, dtype = len(query), state.z.dtype
    leaving = jnp.concatenate([state.key, key])[:length].astype(dtype)
    features = key_features(splats, leaving, left != 0)
    known = jax.lax.stop_gradient(features)
    base = jnp.where(reached.goes_on[:, None], state.m, FLOOR)

    def with_openings() -> jax.Array:
        opening = jnp.where(reached.has_key[:, None], known[reached.first], FLOOR)
        return jnp.where(base > FLOOR, base, opening)

    base = jax.lax.cond(begins, with_openings, lambda: base)
    reads = (base > FLOOR) & (reached.document == segments)[:, None]
    read = jnp.where(reads, query_features(splats, query.astype(dtype)) + base, -jnp.inf)
    return Factors(read, features - base, base[-1])


def _chunk(
    query: Float[Array, "T D"],
    key: Float[Array, "T D"],
    value: Float[Array, "T D"],
    segments: Int[Array, "T"],
    key_segments: Int[Array, "K"],
    reached: Reached,
    factors: Factors,
    state: SplatState,
    steep: Bool[Array, ""],
) -> tuple[Float[Array, "T D"], SplatState]:
    """Outputs of T tokens, and the state after them; the window is in the order of time.

    Of the W + T keys at hand, token t sees key j through the splats if j <= t, and exactly if t < j <= t + W.
    """
    length, window, dtype = len(query), len(state.key), state.z.dtype
    keys, values = jnp.concatenate([state.key, key]), jnp.concatenate([state.value, value])
    wide_values = values.astype(dtype)
    offset = jnp.arange(window + length) - jnp.arange(length)[:, None]
    exactly = (offset > 0) & (offset <= window) & visible(segments, key_segments)
    near = jnp.where(exactly, query.astype(dtype) @ keys.astype(dtype).T, -jnp.inf)
    near_top = jax.lax.stop_gradient(jnp.max(near, axis=-1, initial=FLOOR))

    document, read, add = reached.document, factors.read, factors.add
    causal = jnp.tril(jnp.ones((length, length), bool)) & (document[:, None] == document)

    def level() -> tuple[jax.Array, ...]:
        return level_weights(read, add, near_top, causal)

    # Without the checkpoint, all other chunks would store zeros in place of what a steep chunk keeps for the backward
    # pass.
    @jax.checkpoint
    def any_way() -> tuple[jax.Array, ...]:
        return steep_weights(read, add, near_top, causal, document)

    top, factor, within = jax.lax.cond(steep, any_way, level) if add.shape[1] else level()
    weights = jnp.exp(near - top[:, None]) + jnp.pad(within, [(0, 0), (0, window)])
    numerator = weights @ wide_values + jnp.where(reached.goes_on[:, None], factor @ state.kv, 0)
    denominator = jnp.sum(weights, axis=-1) + jnp.where(reached.goes_on, factor @ state.z, 0)
    output = weighted_mean(numerator, denominator)

    following = append_to_window(state, key, value, segments)
    of_last = document == document[-1]
    added = jnp.where(of_last[:, None], add, -jnp.inf)
    m_before = jnp.where(reached.goes_on[-1], state.m, FLOOR)
    m = jnp.maximum(m_before, factors.last + jax.lax.stop_gradient(jnp.max(added, axis=0, initial=-jnp.inf)))
    # The factor exp(FLOOR - m) = 0 removes sums of another document; before the first key, all sums are 0 anyway.
    kept, added = exp_relative(m_before - m), exp_relative(added + (factors.last - m))
    kv, kv_rest = compensated(state.kv, state.kv_rest, kept[:, None], added.T @ wide_values[:length])
    z, z_rest = compensated(state.z, state.z_rest, kept, jnp.sum(added, axis=0))
    return output, dataclasses.replace(following, kv=kv, kv_rest=kv_rest, z=z, z_rest=z_rest, m=m)
