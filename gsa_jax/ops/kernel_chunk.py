"""One chunk of attention through splats in the vector memory of a TPU, of one head of one row: the arithmetic that both
kernels of `gsa_jax.ops.kernel` are made of.

It is that of `gsa_jax.ops.chunk` and `gsa_jax.ops.steep`, in what a TPU's kernel can hold: every array has two axes,
and a document is a range of slots instead of a number, so that masks are comparisons with counters. A chunk of C slots
has the C slots before it at hand if there is a window at all. The forward kernel calls these functions, and the
backward one the same under `jax.vjp`.

May be changed here: what a kernel computes of a chunk.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gsa_jax.ops.precision import EXPONENTS
from gsa_jax.ops.state import FLOOR, exp_relative
from gsa_jax.ops.steep import STEEP

SLOT_ROWS = 8
"""Rows of the array that describes the slots of a chunk: the columns of `Slots`, and one to make a whole tile."""


class Slots(NamedTuple):
    """What the slots of a chunk are, alike for all heads. A run is the slots at which keys have reached one document.

    Attributes:
        segments: document of the slot's token, 0 for padding.
        before: those of the chunk before.
        left: 1 where a key leaves the window.
        start: first slot of the run; -1 if it began before the chunk, so that sums of the state are of its document.
        end: last slot of the run within the chunk.
        first: slot at which the run's first key in this chunk left, or -1 if none has yet.
        reads: 1 where the token is of the document that keys have reached.
        of_keys: segments of the slots before and of the chunk's own, -1 for padding.
    """

    segments: Int[Array, "C 1"]
    before: Int[Array, "C 1"]
    left: Int[Array, "C 1"]
    start: Int[Array, "C 1"]
    end: Int[Array, "C 1"]
    first: Int[Array, "C 1"]
    reads: Int[Array, "C 1"]
    of_keys: Int[Array, "1 2*C"]

    @classmethod
    def from_rows(cls, rows: Int[Array, "8 C"]) -> "Slots":
        columns = rows.T
        of_keys = jnp.concatenate([rows[1:2], rows[0:1]], axis=1)
        return cls(*(columns[:, i : i + 1] for i in range(7)), of_keys=jnp.where(of_keys == 0, -1, of_keys))


class HeadSplats(NamedTuple):
    """Coefficients of one head: log features `x . direction + of_norm |x|^2`, and `of_query` more for queries."""

    directions: Float[Array, "D S"]
    of_norm: Float[Array, "1 S"]
    of_query: Float[Array, "1 S"]


Kind = Literal["ab", "abt", "atb"]
_CONTRACTED = {"ab": ((1,), (0,)), "abt": ((1,), (1,)), "atb": ((0,), (0,))}
"""The axes that `a b`, `a b^T` and `a^T b` add up over."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a: Float[Array, "..."], b: Float[Array, "..."], kind: Kind, narrow: bool) -> Float[Array, "..."]:
    """A float32 matrix product; of operands rounded to bfloat16 if `narrow`, as are those of its gradient."""
    if narrow:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    axes = (_CONTRACTED[kind], ((), ()))
    precision = None if narrow else EXPONENTS
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


product.defvjp(_product_forward, _product_backward)


def _counters(size: int) -> tuple[Int[Array, "C 1"], Int[Array, "1 C"]]:
    """The numbers of slots, down and across."""
    return jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0), jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)


def without_padding(x: Float[Array, "C D"], segments: Int[Array, "C 1"]) -> Float[Array, "C D"]:
    """Float32, with zeros in place of whatever padding holds."""
    return jnp.where(segments != 0, x.astype(jnp.float32), 0)


def leaving(x: Float[Array, "K D"], window: int) -> Float[Array, "C D"]:
    """Of the slots before and the chunk's own, or the latter alone without a window: those that leave the window."""
    size = len(x) // 2 if window else len(x)
    return x[size - window : 2 * size - window] if window else x


def features(
    query: Float[Array, "C D"], left: Float[Array, "C D"], splats: HeadSplats, m: Float[Array, "1 S"], slots: Slots
) -> tuple[Float[Array, "C S"], Float[Array, "C S"], Float[Array, "1 S"]]:
    """`read`, `add` and `last` of `gsa_jax.ops.chunk.Factors`, whose base is found as there.

    Args:
        left: keys that leave the window.
        m: the maximum before the chunk.
    """

    def log_gaussians(x: jax.Array) -> jax.Array:
        squares = jnp.sum(x * x, axis=1, keepdims=True)
        return product(x, splats.directions, "ab", False) + splats.of_norm * squares

    queries = log_gaussians(query) + splats.of_query
    keys = log_gaussians(left)
    goes_on, has_key = slots.start < 0, slots.first >= 0
    # The row of the run's first key, by a product with 0 and 1 that keeps all bits.
    _, across = _counters(len(query))
    known = jnp.where(slots.left != 0, jax.lax.stop_gradient(keys), 0)
    opening = product(jnp.where(across == slots.first, 1.0, 0.0), known, "ab", False)
    base = jnp.where(goes_on, m, FLOOR)
    base = jnp.where(base > FLOOR, base, jnp.where(has_key, opening, FLOOR))
    base = jax.lax.stop_gradient(base)
    read = jnp.where((base > FLOOR) & (slots.reads != 0), queries + base, -jnp.inf)
    return read, jnp.where(slots.left != 0, keys - base, -jnp.inf), base[-1:]


def near(
    query: Float[Array, "C D"], keys: Float[Array, "2*C D"], slots: Slots, window: int, narrow: bool
) -> Float[Array, "C 2*C"]:
    """Exact scores."""
    down, _ = _counters(len(query))
    distance = down + len(query) - jax.lax.broadcasted_iota(jnp.int32, (1, len(keys)), 1)
    exactly = (distance >= 0) & (distance < window) & (slots.of_keys == slots.segments)
    return jnp.where(exactly, product(query, keys, "abt", narrow), -jnp.inf)


def level_weights(
    read: Float[Array, "C S"], add: Float[Array, "C S"], near_top: Float[Array, "C 1"], slots: Slots, narrow: bool
) -> tuple[Float[Array, "C 1"], Float[Array, "C S"], Float[Array, "C C"]]:
    """As `gsa_jax.ops.steep.level_weights`."""
    top = jax.lax.stop_gradient(jnp.maximum(near_top, jnp.max(read, axis=1, keepdims=True)))
    return top, *_factorised(read - top, add, slots, narrow)


def steep_weights(
    read: Float[Array, "C S"], add: Float[Array, "C S"], near_top: Float[Array, "C 1"], slots: Slots, narrow: bool
) -> tuple[Float[Array, "C 1"], Float[Array, "C S"], Float[Array, "C C"]]:
    """As `gsa_jax.ops.steep.steep_weights`."""
    reached = _running_maximum(jax.lax.stop_gradient(add), slots)
    level = jnp.max(reached, axis=1, keepdims=True) < STEEP
    reached = jnp.maximum(reached, 0)
    level_top = jnp.maximum(near_top, jnp.max(read, axis=1, keepdims=True))
    steep_top = jnp.maximum(near_top, jnp.max(read + reached, axis=1, keepdims=True))
    top = jax.lax.stop_gradient(jnp.where(level, level_top, steep_top))
    relative = read - top
    factor, within = _factorised(relative, add, slots, narrow)
    return top, factor, jnp.where(level, within, _by_halves(relative, add, reached, slots, narrow))


def _factorised(
    relative: Float[Array, "C S"], add: Float[Array, "C S"], slots: Slots, narrow: bool
) -> tuple[Float[Array, "C S"], Float[Array, "C C"]]:
    factor = exp_relative(relative)
    added = jnp.exp(jnp.where(add < STEEP, add, -jnp.inf))
    down, across = _counters(len(relative))
    causal = (across <= down) & (across >= slots.start)
    return factor, jnp.where(causal, product(factor, added, "abt", narrow), 0)


def _running_maximum(x: Float[Array, "C S"], slots: Slots) -> Float[Array, "C S"]:
    """Maximum over the slots so far of the same run."""
    down, _ = _counters(len(x))
    so_far = down - jnp.maximum(slots.start, 0)
    distance = 1
    while distance < len(x):
        x = jnp.maximum(x, jnp.where(so_far >= distance, pltpu.roll(x, distance, 0), -jnp.inf))
        distance *= 2
    return x


def _by_halves(
    relative: Float[Array, "C S"], add: Float[Array, "C S"], reached: Float[Array, "C S"], slots: Slots, narrow: bool
) -> Float[Array, "C C"]:
    """As `gsa_jax.ops.steep.pairs_within`, with other exponents r: where a later half reads an earlier one, r is what
    features have reached at the end of the earlier half.

    That is at most what they have reached at any token of the later half, so both factors are at most 1. A pair that
    counts is far from underflow in both: their exponents are at most 0, and their sum is the pair's own exponent.
    """
    size = len(relative)
    down, across = _counters(size)
    own = jnp.sum(exp_relative(relative + add), axis=1, keepdims=True)
    weights = jnp.where(across == down, own, 0)
    half = 1
    while half < size:
        is_later = (down & half) != 0
        last = (down & -2 * half) + half - 1  # of the earlier half
        r = jnp.where(is_later, pltpu.roll(reached, half, 0), reached)
        reads = is_later & (slots.start <= last)
        adds = ~is_later & (slots.end >= last)
        later = exp_relative(jnp.where(reads, relative + r, -jnp.inf))
        earlier = exp_relative(jnp.where(adds, add - r, -jnp.inf))
        together = (down & -2 * half) == (across & -2 * half)
        weights += jnp.where(together, product(later, earlier, "abt", narrow), 0)
        # From here on `reached` is, in each block of both halves, what it is at the block's end.
        reached = jnp.where(is_later, reached, pltpu.roll(reached, size - half, 0))
        half *= 2
    return weights


def output(
    near: Float[Array, "C 2*C"] | None,
    top: Float[Array, "C 1"],
    factor: Float[Array, "C S"],
    within: Float[Array, "C C"],
    values: Float[Array, "K D"],
    kv: Float[Array, "D S"],
    z: Float[Array, "1 S"],
    slots: Slots,
    window: int,
    narrow: bool,
) -> Float[Array, "C D"]:
    """As `gsa_jax.ops.chunk.output`.

    Args:
        values: of the slots before and the chunk's own; of the latter alone without a window.
        kv: the sums of the state, transposed.
    """
    goes_on = slots.start < 0
    numerator = product(within, leaving(values, window), "ab", narrow)
    numerator += jnp.where(goes_on, product(factor, kv, "abt", narrow), 0)
    denominator = jnp.sum(within, axis=1, keepdims=True)
    denominator += jnp.where(goes_on, jnp.sum(factor * z, axis=1, keepdims=True), 0)
    if near is not None:
        weights = jnp.exp(near - top)
        numerator += product(weights, values, "ab", narrow)
        denominator += jnp.sum(weights, axis=1, keepdims=True)
    # As `gsa_jax.ops.state.weighted_mean`.
    scale = jax.lax.stop_gradient(1 / jnp.maximum(denominator, -1 / FLOOR))
    return numerator * scale / jnp.where(denominator > 0, denominator * scale, 1)


def sums(
    add: Float[Array, "C S"],
    left: Float[Array, "C D"],
    last: Float[Array, "1 S"],
    m: Float[Array, "1 S"],
    slots: Slots,
    narrow: bool,
) -> tuple[Float[Array, "1 S"], Float[Array, "1 S"], Float[Array, "D S"], Float[Array, "1 S"]]:
    """The maximum at the end of the chunk, and what the chunk does to the sums, as `gsa_jax.ops.chunk.Sums`: the factor
    of those before it, and what is added to `kv`, transposed, and to `z`.

    Args:
        left: values that leave the window.
        last: base of the last run.
        m: the maximum before the chunk.
    """
    down, _ = _counters(len(add))
    start = slots.start[-1:]
    added = jnp.where(down >= start, add, -jnp.inf)
    before = jnp.where(start < 0, m, FLOOR)
    end = jnp.maximum(before, last + jax.lax.stop_gradient(jnp.max(added, axis=0, keepdims=True)))
    added = exp_relative(added + (last - end))
    new = product(left, added, "atb", narrow), jnp.sum(added, axis=0, keepdims=True)
    return end, exp_relative(before - end), *new
