"""One chunk of attention through splats, of one head of one row: `gsa_jax.ops.chunked` computes many of them at once.

A chunk of C tokens has K = W + C keys at hand, those of the window before it and its own. The first C of them leave
the window, one at each slot. Token t sees key j of them exactly if t < j <= t + W, and if j <= t, through the splats.

With M kept keys, those kept before the chunk are at hand as well, before the others, and what goes into the sums at
each slot need not be the key that leaves the window there: `gsa_jax.ops.kept`.

May be changed here: what is computed of the tokens of a chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.ops.precision import precision_of
from gsa_jax.ops.segments import Reached, visible
from gsa_jax.ops.state import FLOOR, Splats, exp_relative, key_features, query_features, sums_dtype, weighted_mean


class Factors(NamedTuple):
    """Log features of queries and of the keys that go into the sums, relative to a base.

    The base of a document is a maximum that all of its tokens in the chunk have seen: that of the keys before the
    chunk, or else the feature of the document's first key.

    Attributes:
        read: a query's log features plus the base; -inf where no far key can be read.
        add: a key's log features less the base; -inf where there is no key.
        last: base of the last document, the only one that can have readers to come.
    """

    read: Float[Array, "*BHG C S"]
    add: Float[Array, "*BHG C S"]
    last: Float[Array, "*BHG S"]


class Sums(NamedTuple):
    """What a chunk does to the sums of the state.

    Attributes:
        kept: the factor of the sums before the chunk.
        kv: sum of `exp(f - m) value` over the chunk's keys, of the document that keys have reached at its end.
        z: sum of `exp(f - m)`.
    """

    kept: Float[Array, "*BHG S"]
    kv: Float[Array, "*BHG S D"]
    z: Float[Array, "*BHG S"]


def causal(document: Int[Array, "C"]) -> Bool[Array, "C C"]:
    """Whether a token may read the key that goes into the sums at another slot."""
    return jnp.tril(jnp.ones((len(document), len(document)), bool)) & (document[:, None] == document)


def features(
    query: Float[Array, "C D"], going: Float[Array, "C D"], goes: Int[Array, "C"], splats: Splats
) -> tuple[Float[Array, "C S"], Float[Array, "C S"]]:
    """Log features of queries, and of the keys that go into the sums; -inf where none goes."""
    dtype = sums_dtype(query.dtype)
    return query_features(splats, query.astype(dtype)), key_features(splats, going.astype(dtype), goes != 0)


def _of_last_document(
    factors: Factors, reached: Reached, start: Float[Array, "S"]
) -> tuple[Float[Array, "C S"], Float[Array, "S"]]:
    """The keys' factors and the maximum before the chunk, of the document that keys have reached at its end."""
    of_last = reached.document == reached.document[-1]
    return jnp.where(of_last[:, None], factors.add, -jnp.inf), jnp.where(reached.goes_on[-1], start, FLOOR)


def end(factors: Factors, reached: Reached, start: Float[Array, "S"]) -> Float[Array, "S"]:
    """The maximum of the keys' features at the end of a chunk, of the document reached there.

    Args:
        start: the maximum before the chunk.
    """
    added, before = _of_last_document(factors, reached, start)
    return jnp.maximum(before, factors.last + jax.lax.stop_gradient(jnp.max(added, axis=0, initial=-jnp.inf)))


def factors(
    queries: Float[Array, "C S"],
    features: Float[Array, "C S"],
    segments: Int[Array, "C"],
    reached: Reached,
    start: Float[Array, "S"],
    *,
    begins: Bool[Array, ""],
) -> Factors:
    """The factors of a chunk.

    Args:
        start: the maximum before the chunk.
        begins: whether any document takes the feature of its first key as its base.
    """
    base = jnp.where(reached.goes_on[:, None], start, FLOOR)

    def with_openings() -> jax.Array:
        opening = jax.lax.stop_gradient(features)[reached.first]
        opening = jnp.where(reached.has_key[:, None], opening, FLOOR)
        return jnp.where(base > FLOOR, base, opening)

    base = jax.lax.cond(begins, with_openings, lambda: base)
    reads = (base > FLOOR) & (reached.document == segments)[:, None]
    return Factors(jnp.where(reads, queries + base, -jnp.inf), features - base, base[-1])


def near(
    query: Float[Array, "C D"],
    keys: Float[Array, "N D"],
    segments: Int[Array, "C"],
    key_segments: Int[Array, "K"],
    kept_segments: Int[Array, "M"] | None = None,
    until: Int[Array, "M+C"] | None = None,
) -> tuple[Float[Array, "C N"], Float[Array, "C"]]:
    """Exact scores, and the maximum of each row.

    Args:
        keys: N = M + K, the kept ones first.
        kept_segments: documents of the keys that were kept before the chunk.
        until: when they and the keys that leave the window are no longer kept, as in `kept.Choice`.
    """
    dtype = sums_dtype(query.dtype)
    size = len(query)
    slots = jnp.arange(size)[:, None]
    offset = jnp.arange(len(key_segments)) - slots
    exactly = (offset > 0) & (offset <= len(key_segments) - size)
    if kept_segments is not None and until is not None:
        before, since = jnp.split(slots < until, [len(kept_segments)], axis=1)
        since &= offset[:, :size] <= 0
        exactly |= jnp.pad(since, [(0, 0), (0, len(key_segments) - size)])
        exactly &= visible(segments, key_segments)
        exactly = jnp.concatenate([before & visible(segments, kept_segments), exactly], axis=1)
    else:
        exactly &= visible(segments, key_segments)
    scores = jnp.matmul(query.astype(dtype), keys.astype(dtype).T, precision=precision_of(query.dtype))
    near = jnp.where(exactly, scores, -jnp.inf)
    return near, jax.lax.stop_gradient(jnp.max(near, axis=-1, initial=FLOOR))


def output(
    near: Float[Array, "C N"],
    top: Float[Array, "C"],
    within: Float[Array, "C C"],
    values: Float[Array, "N D"],
    factor: Float[Array, "C S"],
    goes_on: Bool[Array, "C"],
    kv: Float[Array, "S D"],
    z: Float[Array, "S"],
    going: Float[Array, "C D"] | None = None,
    *,
    precision: jax.lax.Precision,
) -> Float[Array, "C D"]:
    """Outputs from near keys, from the chunk's own keys through the splats, and from the sums before the chunk.

    Args:
        values: of the keys that are seen exactly.
        going: of those that go into the sums; None if these are the first of `values`.
    """
    dot = functools.partial(jnp.matmul, precision=precision)
    weights = jnp.exp(near - top[:, None])
    if going is None:
        weights += jnp.pad(within, [(0, 0), (0, len(values) - len(within))])
    numerator = dot(weights, values.astype(kv.dtype)) + jnp.where(goes_on[:, None], dot(factor, kv), 0)
    denominator = jnp.sum(weights, axis=-1) + jnp.where(goes_on, dot(factor, z), 0)
    if going is not None:
        numerator += dot(within, going.astype(kv.dtype))
        denominator += jnp.sum(within, axis=-1)
    return weighted_mean(numerator, denominator)


def sums(
    going: Float[Array, "C D"],
    factors: Factors,
    reached: Reached,
    start: Float[Array, "S"],
    end: Float[Array, "S"],
    *,
    precision: jax.lax.Precision,
) -> Sums:
    """What the chunk does to the sums.

    Args:
        going: values of the keys that go into them.
        start: the maximum before the chunk.
        end: that at its end.
    """
    added, before = _of_last_document(factors, reached, start)
    added = exp_relative(added + (factors.last - end))
    # The factor exp(FLOOR - m) = 0 removes sums of another document; before the first key, all sums are 0 anyway.
    kept = exp_relative(before - end)
    return Sums(kept, jnp.matmul(added.T, going.astype(added.dtype), precision=precision), jnp.sum(added, axis=0))
