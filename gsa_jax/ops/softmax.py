"""Exact softmax attention of GPT-Neo over all of the past: causal, unscaled.

May be changed here: how the exact attention is blocked. The definition is `_attend`; everything else is the same
sum over fewer keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.ops.precision import precision_of
from gsa_jax.ops.segments import visible

_BLOCK = 256
"""Queries per block, at least. Sequences up to twice as long take the plain dense path."""

_MAX_BLOCKS = 16
"""Blocks that are unrolled, which bounds the size of the compiled program."""

_MASKED = jnp.finfo(jnp.float32).min
"""Finite, so that a row without any key gives finite numbers, forward and backward."""


def causal_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    segments: Int[Array, "B T"],
) -> Float[Array, "B T H D"]:
    """Softmax attention over the past, as in `transformers` v4.57 `GPTNeoSelfAttention._attn`.

    Scores are `q . k`, NOT divided by sqrt(D), and computed in float32 whatever the inputs are. Query i sees the keys
    j <= i of its own document. Cost: O(T^2) in time and memory.

    Args:
        segments: the number of each token's document, 0 for padding (`gsa_jax.ops.segments.join_masks`). A query that
            sees no key gets an arbitrary finite result.
    """
    length = query.shape[1]
    block = max(_BLOCK, -(-length // _MAX_BLOCKS))
    if length <= 2 * block:
        block = length
    # Unrolled, so that each block of queries reads only the keys up to its own end: half the work of the full square.
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
        allowed = causal & visible(segments[:, start:stop], segments[:, :stop])
        outputs.append(_attend(query[:, start:stop], key[:, :stop], value[:, :stop], allowed[:, None]))
    return jnp.concatenate(outputs, axis=1)


def _attend(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B K H D"],
    value: Float[Array, "B K H D"],
    allowed: Bool[Array, "B 1 T K"],
) -> Float[Array, "B T H D"]:
    precision = precision_of(query.dtype)
    wide_query, wide_key = query.astype(jnp.float32), key.astype(jnp.float32)
    scores = jnp.einsum("...thd,...khd->...htk", wide_query, wide_key, precision=precision)
    scores = jnp.where(allowed, scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("...htk,...khd->...thd", weights, value, precision=precision)
