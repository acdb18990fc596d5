"""One chunk of attention through splats in the vector memory of a TPU, of one head of one row: the arithmetic that both
kernels of `gsa_jax.ops.kernel` are made of.

It is that of `gsa_jax.ops.chunk` and `gsa_jax.ops.steep`, in what a TPU's kernel can hold: every array has two axes,
and a document is a range of slots instead of a number, so that masks are comparisons with counters. A chunk of C slots
has K slots at hand, its own and whole chunks before it. The forward kernel calls these functions, and the backward one
the same under `jax.vjp`.

May be changed here: what a kernel computes of a chunk.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.ops.precision import EXPONENTS
from gsa_jax.ops.segments import documents_before, reached_by
from gsa_jax.ops.state import FLOOR, exp_relative
from gsa_jax.ops.steep import STEEP

CHUNK = 128
"""Slots of a chunk: what fills the lanes of a vector register."""

SLOT_ROWS = 8
"""Rows of the array that describes the slots of a chunk, in the order of `Slots.from_rows`."""


class Slots(NamedTuple):
    """What the slots of a chunk are, alike for all heads. A run is the slots at which keys have reached one document.

    Attributes:
        segments: document of the slot's token, 0 for padding.
        start: first slot of the run; -1 if it began before the chunk, so that sums of the state are of its document.
        end: last slot of the run within the chunk.
        first: slot at which the run's first key in this chunk left, or -1 if none has yet.
        left: whether a key leaves the window.
        reads: whether the token is of the document that keys have reached.
        of_keys: segments of the slots at hand, -1 for padding.
        begins: whether any run takes the feature of its first key as its base.
    """

    segments: Int[Array, "C 1"]
    start: Int[Array, "C 1"]
    end: Int[Array, "C 1"]
    first: Int[Array, "C 1"]
    left: Bool[Array, "C 1"]
    reads: Bool[Array, "C 1"]
    of_keys: Int[Array, "1 K"]
    begins: Bool[Array, ""]

    @classmethod
    def from_rows(cls, rows: Int[Array, "8 C"], chunks_before: int) -> "Slots":
        """From rows: segments, those of the chunk before and of the one before that, start, end, first, left plus twice
        reads, begins."""
        columns = rows.T
        segments, _, _, start, end, first, flags, _ = (columns[:, i : i + 1] for i in range(SLOT_ROWS))
        of_keys = jnp.concatenate([rows[i : i + 1] for i in range(chunks_before, -1, -1)], axis=1)
        of_keys = jnp.where(of_keys == 0, -1, of_keys)
        begins = jnp.max(rows[7:8]) != 0
        return cls(segments, start, end, first, (flags & 1) != 0, flags >= 2, of_keys, begins)


def slot_rows(segments: Int[Array, "B T"], length: int, window: int) -> Int[Array, "B N 8 C"]:
    """The slots of each of N chunks, as `Slots.from_rows` reads them; no key leaves at slots past the `length`."""
    batch, padded = segments.shape
    left = jnp.pad(segments, [(0, 0), (window, 0)])[:, :padded]
    left = jnp.where(jnp.arange(padded) < length, left, 0)
    segments, left = (x.reshape(batch, -1, CHUNK) for x in (segments, left))
    before = (jnp.pad(segments, [(0, 0), (i, 0), (0, 0)])[:, : segments.shape[1]] for i in (1, 2))
    # Without `segment_ids` a row is document 1, and with them the state before is empty.
    documents = documents_before(left, jnp.ones(batch, left.dtype))
    reached = jax.vmap(jax.vmap(reached_by))(left, documents)
    start = jnp.where(reached.goes_on, -1, reached.first)
    end = jnp.sum(reached.document[..., None, :] <= reached.document[..., None], axis=-1) - 1
    first = jnp.where(reached.has_key, reached.first, -1)
    flags = jnp.where(left != 0, 1, 0) + jnp.where(reached.document == segments, 2, 0)
    some = jnp.cumsum(jnp.any(left != 0, axis=2), axis=1)
    known = jnp.pad(some[:, :-1], [(0, 0), (1, 0)])[..., None] != 0
    begins = jnp.any(reached.has_key & ~(reached.goes_on & known), axis=2, keepdims=True)
    rows = segments, *before, start, end, first, flags, jnp.broadcast_to(begins, left.shape)
    return jnp.stack([x.astype(jnp.int32) for x in rows], axis=2)


class HeadSplats(NamedTuple):
    """Coefficients of one head: log features `x . direction + of_norm |x|^2`, and `of_query` more for queries."""

    directions: Float[Array, "D S"]
    of_norm: Float[Array, "1 S"]
    of_query: Float[Array, "1 S"]


Way = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
"""`level_weights` or `steep_weights`."""

Kind = Literal["ab", "abt", "atb"]
_CONTRACTED = {"ab": ((1,), (0,)), "abt": ((1,), (1,)), "atb": ((0,), (0,))}
"""The axes that `a b`, `a b^T` and `a^T b` add up over."""


def product(a: Float[Array, "..."], b: Float[Array, "..."], kind: Kind, narrow: bool) -> Float[Array, "..."]:
    """A float32 matrix product; of operands rounded to bfloat16 if `narrow`, as are those of its gradient."""
    result: Any = _product(a, b, kind, narrow)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(a: jax.Array, b: jax.Array, kind: Kind, narrow: bool) -> jax.Array:
    if narrow:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    axes = (_CONTRACTED[kind], ((), ()))
    precision = jax.lax.Precision.DEFAULT if narrow else EXPONENTS
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def _product_forward(a: jax.Array, b: jax.Array, kind: Kind, narrow: bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return product(a, b, kind, narrow), (a, b)


def _product_backward(
    kind: Kind, narrow: bool, operands: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    a, b = operands
    if kind == "ab":
        return product(g, b, "abt", narrow), product(a, g, "atb", narrow)
    if kind == "abt":
        return product(g, b, "ab", narrow), product(g, a, "atb", narrow)
    return product(b, g, "abt", narrow), product(a, g, "ab", narrow)


_product.defvjp(_product_forward, _product_backward)


def _counters(size: int) -> tuple[Int[Array, "C 1"], Int[Array, "1 C"]]:
    """The numbers of slots, down and across."""
    return jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0), jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)


def leaving(x: Float[Array, "K D"], window: int) -> Float[Array, "C D"]:
    """Of the slots at hand, those that leave the window."""
    stop = len(x) - window
    return x[stop - CHUNK : stop]


def features(
    query: Float[Array, "C D"], keys: Float[Array, "K D"], splats: HeadSplats, window: int
) -> tuple[Float[Array, "C S"], Float[Array, "C S"]]:
    """Log features of queries, and of the keys that leave the window, if there are any."""

    def log_gaussians(x: jax.Array) -> jax.Array:
        squares = jnp.sum(x * x, axis=1, keepdims=True)
        return product(x, splats.directions, "ab", False) + splats.of_norm * squares

    return log_gaussians(query) + splats.of_query, log_gaussians(leaving(keys, window))


def bases(
    of_keys: Sequence[Float[Array, "C S"]], starts: Sequence[Float[Array, "1 S"]], slots: Slots
) -> list[Float[Array, "C S"]]:
    """What the features of each head are relative to at each slot, as in `gsa_jax.ops.chunk.Factors`.

    Args:
        of_keys: features of the keys that leave the window, of each head.
        starts: maxima before the chunk, of each head.
    """

    def with_openings() -> tuple[jax.Array, ...]:
        # The row of the run's first key, by a product with 0 and 1 that keeps all bits.
        _, across = _counters(CHUNK)
        chosen = jnp.where(across == slots.first, 1.0, 0.0)
        found = (product(chosen, jnp.where(slots.left, keys, 0), "ab", False) for keys in of_keys)
        return tuple(jnp.where(slots.first >= 0, x, FLOOR) for x in found)

    def without() -> tuple[jax.Array, ...]:
        return tuple(jnp.full_like(keys, FLOOR) for keys in of_keys)

    openings = jax.lax.cond(slots.begins, with_openings, without)
    return [
        jnp.where((slots.start < 0) & (start > FLOOR), start, opening)
        for start, opening in zip(starts, openings, strict=True)
    ]


def is_steep(
    of_keys: Sequence[Float[Array, "C S"]], found: Sequence[Float[Array, "C S"]], slots: Slots
) -> Bool[Array, ""]:
    """Whether any head needs `steep_weights`, given its `bases`."""
    rises = (jnp.where(slots.left, keys - base, -jnp.inf) for keys, base in zip(of_keys, found, strict=True))
    return functools.reduce(jnp.maximum, map(jnp.max, rises)) >= STEEP


class Chunk(NamedTuple):
    """What outputs and sums of a chunk are made of.

    Attributes:
        query: queries.
        keys: keys of the slots at hand.
        values: their values.
        of_queries: log features.
        of_keys: those of the keys that leave the window.
        kv: the sums before the chunk, transposed.
        z: the sums before the chunk.
    """

    query: Float[Array, "C D"]
    keys: Float[Array, "K D"]
    values: Float[Array, "K D"]
    of_queries: Float[Array, "C S"]
    of_keys: Float[Array, "C S"]
    kv: Float[Array, "D S"]
    z: Float[Array, "1 S"]


class Carry(NamedTuple):
    """How the sums go on: the maximum at the end of the chunk, and the factor of the sums before it."""

    end: Float[Array, "1 S"]
    kept: Float[Array, "1 S"]


def attend(
    chunk: Chunk,
    base: Float[Array, "C S"],
    start: Float[Array, "1 S"],
    slots: Slots,
    way: Way,
    window: int,
    narrow: bool,
) -> tuple[tuple[Float[Array, "C D"], Float[Array, "D S"], Float[Array, "1 S"]], Carry]:
    """Outputs, what the chunk adds to `kv` and `z`, and how those go on.

    Args:
        base: what features are relative to, a constant to the gradient.
        start: the maximum before the chunk.
        way: how the weights of the chunk's own keys are computed.
        narrow: whether matrix products take operands rounded to bfloat16.
    """
    queries = jnp.where((base > FLOOR) & slots.reads, chunk.of_queries, -jnp.inf)
    keys = jnp.where(slots.left, chunk.of_keys, -jnp.inf)
    left = leaving(chunk.values, window)

    near = _near(chunk.query, chunk.keys, slots, window, narrow) if window else None
    near_top = FLOOR if near is None else jnp.maximum(jnp.max(near, axis=1, keepdims=True), FLOOR)
    top, factor, within = way(queries, keys, base, near_top, slots, narrow)

    goes_on = slots.start < 0
    numerator = product(within, left, "ab", narrow)
    numerator += jnp.where(goes_on, product(factor, chunk.kv, "abt", narrow), 0)
    denominator = jnp.sum(within, axis=1, keepdims=True)
    denominator += jnp.where(goes_on, jnp.sum(factor * chunk.z, axis=1, keepdims=True), 0)
    if near is not None:
        weights = jnp.exp(near - top)
        numerator += product(weights, chunk.values, "ab", narrow)
        denominator += jnp.sum(weights, axis=1, keepdims=True)
    # As `gsa_jax.ops.state.weighted_mean`.
    scale = jax.lax.stop_gradient(1 / jnp.maximum(denominator, -1 / FLOOR))
    output = numerator * (scale / jnp.where(denominator > 0, denominator * scale, 1))

    down, _ = _counters(CHUNK)
    last = slots.start[-1:]
    of_last = jnp.where(down >= last, keys, -jnp.inf)
    before = jnp.where(last < 0, start, FLOOR)
    end = jnp.maximum(before, jax.lax.stop_gradient(jnp.max(of_last, axis=0, keepdims=True)))
    added = exp_relative(of_last - end)
    sums = product(left, added, "atb", narrow), jnp.sum(added, axis=0, keepdims=True)
    return (output, *sums), Carry(end, exp_relative(before - end))


def _near(
    query: Float[Array, "C D"], keys: Float[Array, "K D"], slots: Slots, window: int, narrow: bool
) -> Float[Array, "C K"]:
    """Exact scores."""
    down, _ = _counters(CHUNK)
    distance = down + (len(keys) - CHUNK) - jax.lax.broadcasted_iota(jnp.int32, (1, len(keys)), 1)
    exactly = (distance >= 0) & (distance < window) & (slots.of_keys == slots.segments)
    return jnp.where(exactly, product(query, keys, "abt", narrow), -jnp.inf)


def level_weights(
    queries: Float[Array, "C S"],
    keys: Float[Array, "C S"],
    base: Float[Array, "C S"],
    near_top: Float[Array, "C 1"] | float,
    slots: Slots,
    narrow: bool,
) -> tuple[Float[Array, "C 1"], Float[Array, "C S"], Float[Array, "C C"]]:
    """As `gsa_jax.ops.steep.level_weights`.

    Args:
        queries: log features of queries, -inf where no far key can be read.
        keys: those of the keys that leave the window, -inf where none does.
        base: what both are relative to in a factor.
    """
    read = queries + base
    top = jax.lax.stop_gradient(jnp.maximum(near_top, jnp.max(read, axis=1, keepdims=True)))
    return top, *_factorised(read - top, keys - base, slots, narrow)


def steep_weights(
    queries: Float[Array, "C S"],
    keys: Float[Array, "C S"],
    base: Float[Array, "C S"],
    near_top: Float[Array, "C 1"] | float,
    slots: Slots,
    narrow: bool,
) -> tuple[Float[Array, "C 1"], Float[Array, "C S"], Float[Array, "C C"]]:
    """As `gsa_jax.ops.steep.steep_weights`; arguments as above.

    Where features have risen far above their base, neither is added to it: the sum would lose the bits that count.
    """
    read, add = queries + base, keys - base
    reached = _running_maximum(jax.lax.stop_gradient(keys), slots)
    level = jnp.max(reached - base, axis=1, keepdims=True) < STEEP
    reached = jnp.maximum(reached, base)
    level_top = jnp.maximum(near_top, jnp.max(read, axis=1, keepdims=True))
    steep_top = jnp.maximum(near_top, jnp.max(queries + reached, axis=1, keepdims=True))
    top = jax.lax.stop_gradient(jnp.where(level, level_top, steep_top))
    factor, within = _factorised(read - top, add, slots, narrow)
    return top, factor, jnp.where(level, within, _by_halves(queries - top, keys, reached, slots, narrow))


def _factorised(
    relative: Float[Array, "C S"], add: Float[Array, "C S"], slots: Slots, narrow: bool
) -> tuple[Float[Array, "C S"], Float[Array, "C C"]]:
    factor = exp_relative(relative)
    added = jnp.exp(jnp.where(add < STEEP, add, -jnp.inf))
    down, across = _counters(CHUNK)
    causal = (across <= down) & (across >= slots.start)
    return factor, jnp.where(causal, product(factor, added, "abt", narrow), 0)


def _running_maximum(x: Float[Array, "C S"], slots: Slots) -> Float[Array, "C S"]:
    """Maximum over the slots so far of the same run."""
    down, _ = _counters(CHUNK)
    so_far = down - jnp.maximum(slots.start, 0)
    distance = 1
    while distance < CHUNK:
        x = jnp.maximum(x, jnp.where(so_far >= distance, pltpu.roll(x, distance, 0), -jnp.inf))
        distance *= 2
    return x


def _by_halves(
    queries: Float[Array, "C S"], keys: Float[Array, "C S"], reached: Float[Array, "C S"], slots: Slots, narrow: bool
) -> Float[Array, "C C"]:
    """As `gsa_jax.ops.steep.pairs_within`, with other exponents r: where a later half reads an earlier one, r is what
    features have reached at the end of the earlier half.

    That is at most what they have reached at any token of the later half, so both factors are at most 1. A pair that
    counts is far from underflow in both: their exponents are at most 0, and their sum is the pair's own exponent.
    """
    down, across = _counters(CHUNK)
    own = jnp.sum(exp_relative(queries + keys), axis=1, keepdims=True)
    weights = jnp.where(across == down, own, 0)
    half = 1
    while half < CHUNK:
        is_later = (down & half) != 0
        last = (down & -2 * half) + half - 1  # of the earlier half
        r = jnp.where(is_later, pltpu.roll(reached, half, 0), reached)
        reads = is_later & (slots.start <= last)
        adds = ~is_later & (slots.end >= last)
        later = exp_relative(jnp.where(reads, queries + r, -jnp.inf))
        earlier = exp_relative(jnp.where(adds, keys - r, -jnp.inf))
        together = (down & -2 * half) == (across & -2 * half)
        weights += jnp.where(together, product(later, earlier, "abt", narrow), 0)
        # From here on `reached` is, in each block of both halves, what it is at the block's end.
        reached = jnp.where(is_later, reached, pltpu.roll(reached, CHUNK - half, 0))
        half *= 2
    return weights
