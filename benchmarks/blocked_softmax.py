"""Exact causal attention in JAX in linear memory, the contender that `splat_attention` has to beat.

May be changed here: how fast it is. It computes the same as softmax over all earlier scores, forward and backward.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 256
"""Tokens per block: of 64, 128 and 256 the fastest with backward at 8,192 tokens, and forward as fast as any."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_softmax(
    query: Float[Array, "B H T D"], key: Float[Array, "B H T D"], value: Float[Array, "B H T D"], block: int = BLOCK
) -> Float[Array, "B H T D"]:
    """Unscaled causal softmax attention, block by block: algorithms 1 and 2 of FlashAttention-2 (arXiv 2307.08691).

    Each block of queries meets the blocks of keys up to its own; a running maximum and sum stand for the scores, which
    are never stored. The backward pass computes them again from the logarithm of each query's sum. T must be a
    multiple of `block`.
    """
    return _forward(query, key, value, block)[0]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array, block: int) -> tuple[jax.Array, tuple]:
    queries, keys, values = (_blocks(x, block) for x in (query, key, value))
    causal = jnp.tril(jnp.ones((block, block), bool))

    def row(_: None, index: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        own = queries[index]
        scores = jnp.where(causal, _scores(own, keys[index]), -jnp.inf)
        top = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - top[..., None])
        start = top, jnp.sum(weights, axis=-1), jnp.einsum("bhtk,bhkd->bhtd", weights, values[index])

        def add(other: jax.Array, carried: tuple) -> tuple:
            top, total, output = carried
            scores = _scores(own, keys[other])
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights, kept = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            output = kept[..., None] * output + jnp.einsum("bhtk,bhkd->bhtd", weights, values[other])
            return higher, kept * total + jnp.sum(weights, axis=-1), output

        top, total, output = jax.lax.fori_loop(0, index, add, start)
        return None, (output / total[..., None], top + jnp.log(total))

    _, (output, log_sums) = jax.lax.scan(row, None, jnp.arange(len(queries)))
    return _joined(output), (query, key, value, output, log_sums)


def _backward(block: int, saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, output, log_sums = saved
    queries, keys, values, gradients = (_blocks(x, block) for x in (query, key, value, gradient))
    shifts = jnp.sum(gradients * output, axis=-1)
    causal = jnp.tril(jnp.ones((block, block), bool))

    def column(d_queries: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        own_key, own_value = keys[index], values[index]

        def pair(other: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            weights = jnp.exp(scores - log_sums[other][..., None])
            d_value = jnp.einsum("bhtk,bhtd->bhkd", weights, gradients[other])
            d_weights = jnp.einsum("bhtd,bhkd->bhtk", gradients[other], own_value)
            d_scores = weights * (d_weights - shifts[other][..., None])
            d_key = jnp.einsum("bhtk,bhtd->bhkd", d_scores, queries[other])
            return jnp.einsum("bhtk,bhkd->bhtd", d_scores, own_key), d_key, d_value

        def add(other: jax.Array, carried: tuple) -> tuple:
            d_queries, d_key, d_value = carried
            new_query, new_key, new_value = pair(other, _scores(queries[other], own_key))
            return d_queries.at[other].add(new_query), d_key + new_key, d_value + new_value

        new_query, d_key, d_value = pair(index, jnp.where(causal, _scores(queries[index], own_key), -jnp.inf))
        start = d_queries.at[index].add(new_query), d_key, d_value
        d_queries, d_key, d_value = jax.lax.fori_loop(index + 1, len(queries), add, start)
        return d_queries, (d_key, d_value)

    d_queries, (d_keys, d_values) = jax.lax.scan(column, jnp.zeros_like(queries), jnp.arange(len(queries)))
    return _joined(d_queries), _joined(d_keys), _joined(d_values)


blocked_softmax.defvjp(_forward, _backward)


def _blocks(x: jax.Array, block: int) -> jax.Array:
    batch, heads, length, head_dim = x.shape
    return jnp.moveaxis(x.reshape(batch, heads, length // block, block, head_dim), 2, 0)


def _joined(blocks: jax.Array) -> jax.Array:
    count, batch, heads, block, head_dim = blocks.shape
    return jnp.moveaxis(blocks, 0, 2).reshape(batch, heads, count * block, head_dim)


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.einsum("bhtd,bhkd->bhtk", query, key)
