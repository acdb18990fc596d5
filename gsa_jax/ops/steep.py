"""Sums over splats within a chunk, when features rise so far that a product of two factors could overflow.

The weight of key j for token t is `sum_s exp(read[t, s] + add[j, s])`. With level features it is the matrix product of
`exp(read - top)` and `exp(add)`. A feature that rises by more than `STEEP` above its base (`chunk.Factors`) would
overflow the second factor. A larger base would avoid that, but then a later key would decide which weights of an
earlier token underflow. So tokens from the first such key on take the sums of `pairs_within` instead. Whether a token
does depends only on keys up to it, so that no bit of an output depends on the future.

May be changed here: how such sums are computed. Everything is of one head of one row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.ops.state import FLOOR, exp_relative

STEEP = 40.0
"""How far a feature may rise above its base: exp(40) times exp(40) fits in float32."""

_BASE = 4
"""Tokens whose scores through the splats are summed pair by pair, without factors."""


def level_weights(
    read: Float[Array, "T S"],
    add: Float[Array, "T S"],
    near_top: Float[Array, "T"],
    causal: Bool[Array, "T T"],
    document: Int[Array, "T"],
    *,
    precision: jax.lax.Precision,
) -> tuple[Float[Array, "T"], Float[Array, "T S"], Float[Array, "T T"]]:
    """Row maxima `top`, `exp(read - top)`, and the weights relative to `top`; right where no feature is steep.

    Args:
        causal: whether the token of a row may read the key of a column.
        document: not needed here, but by `steep_weights`, which takes this function's place.
        precision: of matrix products.
    """
    top = jax.lax.stop_gradient(jnp.maximum(near_top, jnp.max(read, axis=-1, initial=FLOOR)))
    return top, *_product(read - top[:, None], add, causal, precision)


def steep_weights(
    read: Float[Array, "T S"],
    add: Float[Array, "T S"],
    near_top: Float[Array, "T"],
    causal: Bool[Array, "T T"],
    document: Int[Array, "T"],
    *,
    precision: jax.lax.Precision,
) -> tuple[Float[Array, "T"], Float[Array, "T S"], Float[Array, "T T"]]:
    """As `level_weights`, but right for all features; equal bits for tokens before their document's first steep key.

    Args:
        causal: whether the token of a row may read the key of a column.
        document: the one that the keys have reached at each token; `causal` is False between two documents.
    """
    rises = jax.lax.stop_gradient(add)
    highest = _running_maximum(jnp.max(rises, axis=-1, keepdims=True), document)[:, 0]
    level = highest < STEEP
    # Relative to 0, like the sums over the keys before the chunk, or to the largest feature so far.
    reached = jnp.maximum(_running_maximum(rises, document), 0)
    level_top = jnp.maximum(near_top, jnp.max(read, axis=-1, initial=FLOOR))
    steep_top = jnp.maximum(near_top, jnp.max(read + reached, axis=-1, initial=FLOOR))
    top = jax.lax.stop_gradient(jnp.where(level, level_top, steep_top))
    relative = read - top[:, None]
    factor, product = _product(relative, add, causal, precision)
    return top, factor, jnp.where(level[:, None], product, pairs_within(relative, add, document, precision))


def _product(
    relative: Float[Array, "T S"], add: Float[Array, "T S"], causal: Bool[Array, "T T"], precision: jax.lax.Precision
) -> tuple[Float[Array, "T S"], Float[Array, "T T"]]:
    factor = exp_relative(relative)
    added = jnp.exp(jnp.where(add < STEEP, add, -jnp.inf))
    return factor, jnp.where(causal, jnp.matmul(factor, added.T, precision=precision), 0)


def _running_maximum(x: Float[Array, "T S"], document: Int[Array, "T"]) -> Float[Array, "T S"]:
    """Maximum over the tokens so far of the same document."""

    def combine(earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]):
        same = earlier[0] == later[0]
        return later[0], jnp.where(same, jnp.maximum(earlier[1], later[1]), later[1])

    return jax.lax.associative_scan(combine, (document[:, None], x))[1]


def pairs_within(
    read: Float[Array, "T S"], add: Float[Array, "T S"], document: Int[Array, "T"], precision: jax.lax.Precision
) -> Float[Array, "T T"]:
    """The sum over splats of `exp(read[t] + add[j])` for j <= t of the same document, else 0.

    The sum becomes a matrix product by `exp(read + r) exp(add - r)`, which is only safe if no key after t sets r. So
    the tokens are halved again and again: the later half reads the earlier one through r = the earlier half's maximum,
    and what is left at the end are small blocks along the diagonal.

    The only document that both halves can share is the last one of the earlier half, so r is the maximum over it.
    """
    length, num_splats = read.shape
    base = min(_BASE, length)
    count = 1 << (-(-length // base) - 1).bit_length()
    tail = (0, count * base - length)
    read = jnp.pad(read, [tail, (0, 0)], constant_values=-jnp.inf)
    add = jnp.pad(add, [tail, (0, 0)], constant_values=-jnp.inf)
    document = jnp.pad(document, tail, mode="edge")

    of_block = document.reshape(count, base)
    causal = jnp.tril(jnp.ones((base, base), bool)) & (of_block[:, :, None] == of_block[:, None, :])
    scores = read.reshape(count, base, 1, num_splats) + add.reshape(count, 1, base, num_splats)
    weights = jnp.sum(exp_relative(jnp.where(causal[..., None], scores, -jnp.inf)), axis=-1)
    while count > 1:
        count //= 2
        halves = document.reshape(count, 2, base)
        last = halves[:, 0, -1:]
        earlier = jnp.where((halves[:, 0] == last)[..., None], add.reshape(count, 2, base, num_splats)[:, 0], -jnp.inf)
        later = jnp.where((halves[:, 1] == last)[..., None], read.reshape(count, 2, base, num_splats)[:, 1], -jnp.inf)
        maximum = jax.lax.stop_gradient(jnp.max(earlier, axis=1, keepdims=True, initial=FLOOR))
        factors = exp_relative(later + maximum), exp_relative(earlier - maximum)
        across = jnp.einsum("nts,nks->ntk", *factors, precision=precision)
        # An axis of 2 instead of strided slices, whose gradient aborts the TPU's compiler.
        blocks = weights.reshape(count, 2, base, base)
        upper = jnp.pad(blocks[:, 0], [(0, 0), (0, 0), (0, base)])
        weights = jnp.concatenate([upper, jnp.concatenate([across, blocks[:, 1]], axis=2)], axis=1)
        base *= 2
    return weights[0, :length, :length]
