"""Exact softmax attention of GPT-Neo: causal, unscaled, global or local.

May be changed here: how the exact attention is blocked. The definition is `_attend`; everything else is the same
sum over fewer keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_BLOCK = 256
"""Queries per block. Sequences up to twice as long take the plain dense path."""

_MAX_GLOBAL_BLOCKS = 16
"""Blocks that the global path unrolls, which bounds the size of the compiled program."""

_MASKED = jnp.finfo(jnp.float32).min
"""Finite, so that a row without any key gives finite numbers, forward and backward."""


def causal_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    key_mask: Bool[Array, "B T"],
    *,
    window: int | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention over the past, as in `transformers` v4.57 `GPTNeoSelfAttention._attn`.

    Scores are `q . k`, NOT divided by sqrt(D), and computed in float32 whatever the inputs are. Query i sees the keys
    j with `key_mask[j]` and `0 <= i - j < window`. Cost: O(T^2) for `window=None`, otherwise O(T * window), in time
    and memory alike.

    Args:
        key_mask: False for padding. A query that sees no key gets an arbitrary finite result.
        window: tokens seen, the query's own included; `None` for all of the past.
    """
    length = query.shape[1]
    if window is None or window >= length:
        return _global(query, key, value, key_mask)
    block = max(window, _BLOCK)
    if length <= 2 * block:
        return _attend(query, key, value, _allowed(length, length, 0, window) & key_mask[:, None, None, :])
    return _local(query, key, value, key_mask, window, block)


def single_query_attention(
    query: Float[Array, "B H D"],
    key: Float[Array, "B H D"],
    value: Float[Array, "B H D"],
    cached_key: Float[Array, "B H C D"],
    cached_value: Float[Array, "B H C D"],
    cache_mask: Bool[Array, "B C"],
) -> Float[Array, "B H D"]:
    """The same attention for one token per sequence, over itself and cached tokens in any order, heads first.

    The token's own key and value come apart from the cache, so that a loop can attend before it writes: a loop that
    reads the updated cache makes XLA copy the whole buffer several times at each step.

    Args:
        cache_mask: which entries of the cache the token sees.
    """
    query, key, cached_key = (x.astype(jnp.float32) for x in (query, key, cached_key))
    past = jnp.einsum("bhd,bhcd->bhc", query, cached_key)
    past = jnp.where(cache_mask[:, None, :], past, _MASKED)
    own = jnp.sum(query * key, axis=-1, keepdims=True)
    weights = jax.nn.softmax(jnp.concatenate([past, own], axis=-1), axis=-1).astype(value.dtype)
    return jnp.einsum("bhc,bhcd->bhd", weights[..., :-1], cached_value) + weights[..., -1:] * value


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, allowed: jax.Array) -> jax.Array:
    scores = jnp.einsum("...thd,...khd->...htk", query.astype(jnp.float32), key.astype(jnp.float32))
    scores = jnp.where(allowed, scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("...htk,...khd->...thd", weights, value)


def _allowed(queries: int, keys: int, offset: int, window: int | None) -> jax.Array:
    """`[T, K]`: may query t see key k, where query 0 stands `offset` tokens after key 0?"""
    distance = offset + jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def _global(query: jax.Array, key: jax.Array, value: jax.Array, key_mask: jax.Array) -> jax.Array:
    length = query.shape[1]
    block = max(_BLOCK, -(-length // _MAX_GLOBAL_BLOCKS))
    if length <= 2 * block:
        block = length
    # Unrolled, so that each block of queries reads only the keys up to its own end: half the work of the full square.
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        allowed = _allowed(stop - start, stop, start, None) & key_mask[:, None, None, :stop]
        outputs.append(_attend(query[:, start:stop], key[:, :stop], value[:, :stop], allowed))
    return jnp.concatenate(outputs, axis=1)


def _local(
    query: jax.Array, key: jax.Array, value: jax.Array, key_mask: jax.Array, window: int, block: int
) -> jax.Array:
    """Each block of queries reads its own and the previous block of keys, which holds the window (block >= window)."""
    batch, length = query.shape[:2]
    count = -(-length // block)
    tail = count * block - length

    def blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, count, block, *x.shape[2:])

    def with_previous(x: jax.Array) -> jax.Array:
        x = blocks(x)
        previous = jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
        return jnp.concatenate([previous, x], axis=2)

    mask = with_previous(key_mask)[:, :, None, None, :]
    allowed = _allowed(block, 2 * block, block, window) & mask
    out = _attend(blocks(query), with_previous(key), with_previous(value), allowed)
    return out.reshape(batch, count * block, *query.shape[2:])[:, :length]
