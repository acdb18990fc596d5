"""Attention through splats in linear time, many tokens at once: training and prefill.

Tokens are cut into chunks. What a chunk needs of its own tokens (features, scores, weights, sums over its keys) is
computed for a group of chunks at once, in large products; only maxima and sums of the state go from chunk to chunk. A
scan over groups carries the state.

On a TPU, most calls that begin a text are `gsa_jax.ops.kernel` instead.

May be changed here: how large chunks and groups are on each platform (`_SCHEDULES`), which calls a TPU's kernel takes
(`kernel_takes`), what goes from chunk to chunk, and what all heads and rows must do alike (`_group`). What a chunk
computes is `gsa_jax.ops.chunk`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsa_jax.ops import chunk
from gsa_jax.ops.kept import Choice, choose_in_groups, least_important_first
from gsa_jax.ops.precision import precision_of
from gsa_jax.ops.segments import Reached, documents_before, reached_by
from gsa_jax.ops.state import (
    FLOOR,
    STATE_HEADS,
    STATE_ROWS,
    Splats,
    SplatState,
    append_to_windows,
    compensated,
    exp_relative,
    per_head,
    without_paddings,
)
from gsa_jax.ops.steep import STEEP, level_weights, steep_weights


class Schedule(NamedTuple):
    """Sizes that affect speed and memory, and results only in rounding.

    Attributes:
        chunk: least tokens per chunk. A wider window takes chunks of its own width, up to `_MAX_CHUNK`: each chunk
            reads all keys of the window, which should not be many more than its own keys.
        scores: a group has as many chunks as have this many scores over all heads and rows, but one at least.
    """

    chunk: int
    scores: int


_SCHEDULES = {"cpu": Schedule(64, 0), "tpu": Schedule(128, 0), "default": Schedule(128, 9 << 23)}
"""By platform. What a processor computes should stay in its cache, and what a TPU does in its vector memory. A GPU is
bound by launches, 1,422 for 2,048 tokens in chunks of 64 one by one and 147 at once: on an H100, 4,096 tokens of 8 rows
at once take 0.67 of the time of one by one, and 0.54 with backward."""

_MAX_CHUNK = 256


# Without an outer jit, each call would compile its scan.
@functools.partial(jax.jit, static_argnames=("is_first", "chunk_size", "chunks_at_once"))
def chunked(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    segments: Int[Array, "B T"],
    splats: Splats,
    state: SplatState,
    is_first: bool = False,
    chunk_size: int | None = None,
    chunks_at_once: int | None = None,
) -> tuple[Float[Array, "B T H D"], SplatState]:
    """A scan over groups of chunks that carries the state: O(W + S) per token, in time and memory, both directions.

    The window of the state is in the order of time. The backward pass recomputes each group from the state at its
    start.

    With several documents the state before must be empty, and the one after is of the last document alone.

    Args:
        is_first: whether the state before is known to be empty. Without sizes of chunks and groups, a TPU's kernel then
            takes the place of the scan wherever `kernel_takes` says so.
    """
    batch, length, heads, _ = query.shape
    window = state.key.shape[2]

    def sizes(schedule: Schedule) -> tuple[int, int]:
        size = min(chunk_size or min(max(window, schedule.chunk), _MAX_CHUNK), length)
        at_once = chunks_at_once or max(schedule.scores // (batch * heads * size * (window + size)), 1)
        return size, min(at_once, -(-length // size))

    ways = {platform: sizes(schedule) for platform, schedule in _SCHEDULES.items()}
    arguments = query, key, value, segments, splats, state
    sizes_are_free = is_first and chunk_size is None and chunks_at_once is None
    has_kernel = sizes_are_free and kernel_takes(query, splats, window, state.kept_key.shape[2])
    if len(set(ways.values())) == 1 and not has_kernel:  # short texts: one program to trace instead of several
        size, at_once = ways["default"]
        return _scan(*arguments, size=size, at_once=at_once)
    scans: dict[str, Callable[..., Any]] = {
        name: functools.partial(_scan, size=size, at_once=at_once) for name, (size, at_once) in ways.items()
    }
    if has_kernel:
        # Imported here, because loading Pallas takes a while that programs without it need not wait.
        from gsa_jax.ops.kernel import kernel_attention

        scans["tpu"] = kernel_attention
    return jax.lax.platform_dependent(*arguments, **scans)


def kernel_takes(query: Float[Array, "B T H D"], splats: Splats, window: int, kept: int) -> bool:
    """Whether a TPU computes a text's beginning by `gsa_jax.ops.kernel`.

    It does for float32 and bfloat16, heads of 32 to 128, 1 to 128 splats, windows up to 256, no kept keys, and 256
    tokens or more. Smaller heads would be mostly padding, and in a shorter text there is not enough to gain to compile
    a kernel for.
    """
    _, length, _, head_dim = query.shape
    return (
        query.dtype in (jnp.float32, jnp.bfloat16)
        and 32 <= head_dim <= 128
        and 1 <= splats.centers.shape[1] <= 128
        and window <= 256
        and kept == 0
        and length >= 256
    )


def _scan(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    segments: Int[Array, "B T"],
    splats: Splats,
    state: SplatState,
    *,
    size: int,
    at_once: int,
) -> tuple[Float[Array, "B T H D"], SplatState]:
    """`chunked` in chunks of `size` tokens, `at_once` at a time or a few less."""
    batch, length, *shape = query.shape
    chunks = -(-length // size)
    count = -(-chunks // at_once)
    group = -(-chunks // count) * size

    def groups(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * group - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, group, *x.shape[2:]), 1, 0)

    # The last group may have slots past the end of the row. No key leaves the window at them, so the sums are right.
    # But the window moves on past the end, so the last state has that of the last tokens instead.
    exists = jnp.arange(count * group).reshape(count, group) < length
    keeps = state.kept_key.shape[2] > 0
    if keeps:
        state = per_head(least_important_first, (STATE_HEADS,), (STATE_ROWS,), STATE_HEADS, STATE_ROWS)(state)
    # The maxima are constants to the gradient, so that of the first one goes through the sums that it belongs to.
    unit = exp_relative(state.m - jax.lax.stop_gradient(state.m))
    first = dataclasses.replace(
        state, kv=state.kv * unit[..., None], kv_rest=state.kv_rest * unit[..., None], z=state.z * unit
    )
    # Keys before this call belong to document 1: without `segment_ids` a row is one document of that number, and with
    # them there are no keys before.
    window_segments, document = state.valid.astype(segments.dtype), jnp.ones(batch, segments.dtype)
    tokens = *map(groups, (query, key, value, segments)), exists
    final = append_to_windows(state, key, value, segments)
    choices = None
    if keeps:
        choose = functools.partial(choose_in_groups, shape=(count, group // size, size))
        choose = per_head(choose, (STATE_HEADS, 1, 1, None, 0), (STATE_ROWS, 0, 0, 0, None), (0, 0, 1, 1), (0, 0, 1, 1))
        tokens_only = (without_paddings(x, segments) for x in (key, value))
        importance, slot, choice, after = choose(state, *tokens_only, segments, splats)
        choices = choice, after
        final = dataclasses.replace(final, kept_importance=importance, kept_slot=slot)
        document = jnp.broadcast_to(document[:, None], state.z.shape[:2])
    carried = first, window_segments, document
    body = jax.checkpoint(functools.partial(_group, splats=splats, size=size))
    (sums, _, _), output = jax.lax.scan(body, carried, (tokens, choices))
    output = jnp.moveaxis(output, 0, 1).reshape(batch, count * group, *shape)[:, :length]
    own = {name: getattr(sums, name) for name in ("kept_key", "kept_value", "kv", "kv_rest", "z", "z_rest", "m")}
    return output, dataclasses.replace(final, **own)


Kind = Literal["token", "head", "row", "splats"]
"""What an array of all chunks is: `[B, T, H, D]` cut into `[B, G, C, H, D]`, `[B, H, G, ...]`, `[B, G, ...]`, or
`[H, ...]` without chunks. Where a group is one chunk, there is no axis G."""


def _group(
    carried: tuple[SplatState, Int[Array, "B W"], Int[Array, "..."]],
    given: tuple[tuple[jax.Array, ...], tuple[Choice, Int[Array, "B H M"]] | None],
    *,
    splats: Splats,
    size: int,
) -> tuple[tuple[SplatState, Int[Array, "B W"], Int[Array, "..."]], Float[Array, "B T H D"]]:
    """Outputs of the T tokens of a group, and what the next one is given.

    Args:
        carried: the state, with the window in the order of time; segments of the window; the document that the keys
            in the sums have reached, `[B]`, or `[B, H]` with kept keys: each head then has a stream of its own.
        given: query, key and value `[B, T, H, D]`, segments `[B, T]`, and which of the slots `[T]` exist; with kept
            keys, the choice in each chunk and places of the keys that are kept at the end.
    """
    state, window_segments, document = carried
    (query, key, value, segments, exists), choices = given
    length, window = query.shape[1], state.key.shape[2]
    several = length > size

    def over(function: Callable[..., Any], *kinds: Kind) -> Callable[..., Any]:
        """A function of one chunk of one head of one row, for all of them."""
        if several:
            function = jax.vmap(function, [None if kind == "splats" else 0 for kind in kinds])
        heads: dict[Kind, int | None] = {"token": 2 if several else 1, "head": 0, "row": None, "splats": 0}
        if set(kinds) != {"row"}:
            function = jax.vmap(function, [heads[kind] for kind in kinds])
        return jax.vmap(function, [None if kind == "splats" else 0 for kind in kinds])

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1, size, *x.shape[2:]) if several else x

    def at_hand(x: jax.Array, before: jax.Array) -> jax.Array:
        """What each chunk has at hand: the W slots before it, and its own."""
        x = jnp.concatenate([before, x])
        return _overlapping(x, window, size) if several else x

    query, key, value = (without_paddings(x, segments) for x in (query, key, value))
    following = append_to_windows(state, key, value, segments)
    slots = jnp.concatenate([window_segments, segments], axis=1)
    keys, values = (per_head(at_hand, (1, 0), (0, 0))(*x) for x in ((key, state.key), (value, state.value)))
    query = cut(query)
    exactly: tuple[jax.Array, ...] = cut(segments), jax.vmap(at_hand)(segments, window_segments)
    near_kinds: tuple[Kind, ...] = ("token", "head", "row", "row")
    # What goes into the sums at each slot of a chunk. Without kept keys, it is what leaves the window.
    if choices is None:
        stream: Kind = "row"
        goes = cut(jnp.where(exists, slots[:, :length], 0))
        going_keys, going_values = keys[..., :size, :], values[..., :size, :]
    else:
        stream = "head"
        choice, after = choices if several else jax.tree.map(lambda x: x[:, :, 0] if x.ndim > 3 else x, choices)
        own = per_head(_with_kept, (0, 0, 1), (0, 0, 0))
        key_candidates, value_candidates = (
            own(state.kept_key, state.key, key),
            own(state.kept_value, state.value, value),
        )
        take = per_head(_take, (0, 0), (0, 0))
        goes = choice.goes_segment
        going_keys, going_values = take(key_candidates, choice.goes), take(value_candidates, choice.goes)
        kept = state.kept_key, state.kept_value
        if several:
            kept = take(key_candidates, choice.before), take(value_candidates, choice.before)
        keys, values = (jnp.concatenate(pair, axis=-2) for pair in zip(kept, (keys, values), strict=True))
        following = dataclasses.replace(
            following, kept_key=take(key_candidates, after), kept_value=take(value_candidates, after)
        )
        exactly = *exactly, choice.before_segment, choice.until
        near_kinds = *near_kinds, "head", "head"

    reached = over(reached_by, stream, stream)(goes, documents_before(goes, document) if several else document)
    queries, features = over(chunk.features, "token", "head", stream, "splats")(query, going_keys, goes, splats)
    starts, ends = jax.lax.stop_gradient(state.m), None
    if several:
        starts, ends = per_head(_maxima, (0, None if stream == "row" else 0, 0), (0, 0, 0))(features, reached, starts)
    known = jnp.any(state.m > FLOOR, axis=(1, 2) if stream == "row" else 2)
    known = known.reshape(*known.shape, *[1] * (goes.ndim - known.ndim))
    begins = jnp.any(reached.has_key & ~(reached.goes_on & known))
    factors_of = functools.partial(chunk.factors, begins=begins)
    factors = over(factors_of, "head", "head", "row", stream, "head")(queries, features, exactly[0], reached, starts)
    near, near_top = over(chunk.near, *near_kinds)(query, keys, *exactly)

    precision = precision_of(query.dtype)
    arguments = factors.read, factors.add, near_top, over(chunk.causal, stream)(reached.document), reached.document
    kinds: tuple[Kind, ...] = ("head", "head", "head", stream, stream)
    level, any_way = (functools.partial(way, precision=precision) for way in (level_weights, steep_weights))
    # Decided once for all heads and rows: under `vmap`, one condition for each would compute both branches.
    steep = jnp.any(factors.add >= STEEP, axis=(0, 1, -2, -1))

    # Without the checkpoint, all other groups would store zeros in place of what a steep one keeps for the backward
    # pass.
    @jax.checkpoint
    def chunk_by_chunk(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        heads = tuple(None if kind == "row" else 0 for kind in kinds)
        one = functools.partial(per_head, head_axes=heads, row_axes=(0,) * 5)
        if not several:
            return one(any_way)(*arguments)
        chunks = [jnp.moveaxis(x, 1 if kind == "row" else 2, 0) for x, kind in zip(arguments, kinds, strict=True)]
        found = jax.lax.map(lambda x: jax.lax.cond(x[0], one(any_way), one(level), *x[1]), (steep, chunks))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), found)

    if factors.add.shape[-1]:
        top, factor, within = jax.lax.cond(jnp.any(steep), chunk_by_chunk, over(level, *kinds), *arguments)
    else:
        top, factor, within = over(level, *kinds)(*arguments)

    if ends is None:
        ends = over(chunk.end, "head", stream, "head")(factors, reached, starts)
    sums_of = over(functools.partial(chunk.sums, precision=precision), "head", "head", stream, "head", "head")
    sums = sums_of(going_values, factors, reached, starts, ends)
    if several:
        carry = per_head(_carry, (STATE_HEADS, 0), (STATE_ROWS, 0), (STATE_HEADS, 0), (STATE_ROWS, 0))
        following, (kv, z) = carry(following, sums)
        following = dataclasses.replace(following, m=ends[:, :, -1])
    else:
        following, (kv, z) = _advance(following, sums)
        following = dataclasses.replace(following, m=ends)
    output_of = functools.partial(chunk.output, precision=precision)
    weighted = near, top, within, values, factor, reached.goes_on, kv, z
    kinds = ("head", "head", "head", "head", "head", stream, "head", "head")
    if stream == "row":
        output = over(output_of, *kinds)(*weighted)
    else:
        output = over(output_of, *kinds, "head")(*weighted, going_values)
    output = jnp.swapaxes(output.reshape(*output.shape[:2], length, -1), 1, 2)
    document = reached.document.reshape(*document.shape, -1)[..., -1]
    return (following, slots[:, length:], document), output


def _take(x: Float[Array, "N D"], place: Int[Array, "*G C"]) -> Float[Array, "*G C D"]:
    return x.at[place].get(mode="promise_in_bounds")


def _with_kept(
    kept: Float[Array, "M D"], window: Float[Array, "W D"], tokens: Float[Array, "T D"]
) -> Float[Array, "N D"]:
    """What can go into the sums in a group of T slots: what was kept before, and what leaves the window."""
    return jnp.concatenate([kept, jnp.concatenate([window, tokens])[: len(tokens)]])


def _overlapping(x: Array, window: int, size: int) -> Array:
    """Of W + G C slots, those at hand in each chunk: `[G, W + C, ...]`."""
    pad = -window % size
    x = jnp.pad(x, [(pad, 0)] + [(0, 0)] * (x.ndim - 1))
    blocks = x.reshape(-1, size, *x.shape[1:])
    per_window = (window + pad) // size
    count = len(blocks) - per_window
    return jnp.concatenate([blocks[i : i + count] for i in range(per_window + 1)], axis=1)[:, pad:]


def _maxima(
    features: Float[Array, "G C S"], reached: Reached, m: Float[Array, "S"]
) -> tuple[Float[Array, "G S"], Float[Array, "G S"]]:
    """Maxima of the keys' features before and at the end of each chunk, of the document reached there.

    They are over all chunks so far that end in the same document, and over the keys before where it goes on from there.

    Args:
        m: the maximum before the first chunk.
    """
    known = jax.lax.stop_gradient(features)
    ends = reached.document[:, -1]
    own = jnp.max(jnp.where((reached.document == ends[:, None])[..., None], known, FLOOR), axis=1)
    same = jnp.tril(ends[:, None] == ends)
    maxima = jnp.max(jnp.where(same[:, :, None], own, FLOOR), axis=1)
    goes_on = jnp.cumprod(reached.goes_on[:, -1].astype(jnp.int32)) != 0
    maxima = jnp.maximum(maxima, jnp.where(goes_on[:, None], m, FLOOR))
    return jnp.concatenate([m[None], maxima[:-1]]), maxima


def _advance(state: SplatState, sums: chunk.Sums) -> tuple[SplatState, tuple[jax.Array, jax.Array]]:
    """The sums after a chunk, and those before it; of any number of heads and rows."""
    kv, kv_rest = compensated(state.kv, state.kv_rest, sums.kept[..., None], sums.kv)
    z, z_rest = compensated(state.z, state.z_rest, sums.kept, sums.z)
    return dataclasses.replace(state, kv=kv, kv_rest=kv_rest, z=z, z_rest=z_rest), (state.kv, state.z)


def _carry(state: SplatState, sums: chunk.Sums) -> tuple[SplatState, tuple[Float[Array, "G S D"], Float[Array, "G S"]]]:
    """The sums after all chunks, and those before each."""
    return jax.lax.scan(_advance, state, sums)
