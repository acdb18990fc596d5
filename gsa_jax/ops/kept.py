"""Kept keys: of the keys that left the window, the M most important ones of a head stay exact.

At each slot one key leaves the window, and of it and the M kept ones the least important goes into the sums over the
splats, never to return. So what goes into the sums is a stream again, of one key at most for each slot, in another
order than the keys left the window. Whatever sums over splats, chunk by chunk or step by step, takes that stream.

How important a key is depends on the key and its value alone. Which keys are kept at a token is thus the same however
the text is cut into chunks or calls.

May be changed here: what makes a key important, and how the kept ones are found. Functions are of one head of one row.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsa_jax.ops.state import Splats, SplatState, sums_dtype


class Candidates(NamedTuple):
    """N keys that are kept, or may come to be.

    Attributes:
        importance: of each.
        segment: number of its document; 0 where there is no key.
        place: index of the key and its value, among the kept ones before and those that leave the window after them.
    """

    importance: Float[Array, "*BH N"]
    segment: Int[Array, "*BH N"]
    place: Int[Array, "*BH N"]


class Choice(NamedTuple):
    """What becomes of N = M + C keys: those kept before a chunk of C slots, and those that leave the window in it.

    Places are those in a group of chunks: the keys kept before it come first, then those that leave the window in it.

    Attributes:
        before: place of the keys kept before the chunk.
        before_segment: documents of these keys; 0 where there is none.
        until: the slot of the chunk from which on a key is no longer kept; C if it still is at the end.
        goes: place of the key that goes into the sums at each slot.
        goes_segment: document of that key; 0 where none goes.
    """

    before: Int[Array, "*BHG M"]
    before_segment: Int[Array, "*BHG M"]
    until: Int[Array, "*BHG N"]
    goes: Int[Array, "*BHG C"]
    goes_segment: Int[Array, "*BHG C"]


_BLOCK = 32
"""Slots at most whose keys are compared with one another and with the kept ones at once: more of them need fewer steps,
and more comparisons for each."""


def importance(splats: Splats, key: Float[Array, "T D"], value: Float[Array, "T D"]) -> Float[Array, "T"]:
    """How important it is to keep each key: `|key|^2`, or what `splats.importance` makes of key and value.

    Exact scores are products with the key, so it is long keys that a query can want far more than others.
    """
    dtype = sums_dtype(key.dtype)
    key, value = (jax.lax.stop_gradient(x).astype(dtype) for x in (key, value))
    squared_norm = jnp.sum(jnp.square(key), axis=-1)
    if splats.importance is None:
        return squared_norm
    weights = jax.lax.stop_gradient(splats.importance).astype(dtype)
    of_key, of_value = jnp.split(weights[:-1], 2)
    return jnp.sum(key * of_key, axis=-1) + jnp.sum(value * of_value, axis=-1) + weights[-1] * squared_norm


def choose(kept: Candidates, left: Candidates) -> tuple[Candidates, tuple[Int[Array, "C"], Int[Array, "C"]]]:
    """The kept keys after some slots; and place and document of the key that goes into the sums at each, 0 for none.

    A key that leaves the window goes there itself if M others are more important. Otherwise the least important kept
    one does; and since what comes to be kept is always more important than what goes, the k-th key to go is the k-th
    least important of all that are kept at any of these slots.

    Args:
        kept: those before, the least important first.
        left: the keys that leave the window, one at each slot.
    """
    count, size = len(kept.place), len(left.place)
    slots = jnp.arange(size)
    # A key outranks another of its document that is less important, or as important but newer; and all of documents
    # before, because nothing after it sees them.
    importance, segment = left.importance[:, None], left.segment[:, None]
    over_kept = (segment > kept.segment) | ((segment == kept.segment) & (importance > kept.importance))
    more = jnp.where(slots[:, None] < slots, importance >= left.importance, importance > left.importance)
    over_left = (segment > left.segment) | ((segment == left.segment) & more)

    earlier = slots[:, None] < slots
    above = count - jnp.sum(over_kept, axis=1) + jnp.sum(earlier & over_left, axis=0)
    enters = above < count
    # Ranks from below among the kept keys and those that enter.
    rank_of_kept = jnp.arange(count) + jnp.sum(enters[:, None] & ~over_kept, axis=0)
    rank_of_left = jnp.sum(over_kept, axis=1) + jnp.sum(over_left & enters, axis=1)
    rank = jnp.concatenate([rank_of_kept, jnp.where(enters, rank_of_left, count + size)])
    order = jnp.arange(count + size)
    by_rank = jnp.sum(jnp.where(rank == order[:, None], order, 0), axis=1)

    entered = jnp.cumsum(enters)
    goes = jnp.where(enters, by_rank[entered - 1], count + slots)
    stays = jax.lax.dynamic_slice_in_dim(by_rank, entered[-1], count)
    everything = Candidates(*(jnp.concatenate(pair) for pair in zip(kept, left, strict=True)))
    goes_segment = jnp.where(everything.segment[goes] == left.segment, left.segment, 0)
    return Candidates(*(x[stays] for x in everything)), (everything.place[goes], goes_segment)


def most_important(candidates: Candidates, count: int) -> Candidates:
    """The `count` most important ones, the most important first; of equals, the earlier.

    Only where every key that leaves the window comes behind those before it is the earlier one also the older one. That
    is so for keys in the order of time, and for what this makes of two such parts, one behind the other.
    """
    order = jnp.arange(len(candidates.place))
    segment, importance = candidates.segment, candidates.importance
    more = jnp.where(order[:, None] < order, importance[:, None] >= importance, importance[:, None] > importance)
    outranks = (segment[:, None] > segment) | ((segment[:, None] == segment) & more)
    rank = jnp.sum(outranks, axis=0)
    taken = jnp.sum(jnp.where(rank == order[:count, None], order, 0), axis=1)
    return Candidates(*(x[taken] for x in candidates))


def kept_before_each(kept: Candidates, left: Candidates) -> tuple[Candidates, Candidates]:
    """The keys kept before each of some chunks, `[chunks, M]`, and after all of them; the least important first.

    In a number of steps that grows with the logarithm of the number of chunks, for processors that are bound by it.

    Args:
        kept: those before all chunks, the least important first.
        left: the keys that leave the window in each, `[chunks, C]`.
    """
    count = len(kept.place)
    chunks = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, max(count - x.shape[1], 0)))), left)
    parts = jax.vmap(lambda chunk: most_important(chunk, count))(chunks)
    first = jax.tree.map(lambda x: x[None, ::-1], kept)
    parts = jax.tree.map(lambda *both: jnp.concatenate(both), first, parts)

    def both(before: Candidates, after: Candidates) -> Candidates:
        pair = Candidates(*(jnp.concatenate(x, axis=1) for x in zip(before, after, strict=True)))
        return jax.vmap(lambda one: most_important(one, count))(pair)

    found = jax.tree.map(lambda x: x[:, ::-1], jax.lax.associative_scan(both, parts))
    return jax.tree.map(lambda x: x[:-1], found), jax.tree.map(lambda x: x[-1], found)


def least_important_first(state: SplatState) -> SplatState:
    """The same, with the kept keys in the order that `choose_in_groups` takes."""
    order = jnp.lexsort((-state.kept_slot, state.kept_importance, state.kept_slot >= 0))
    names = ("kept_key", "kept_value", "kept_importance", "kept_slot")
    return dataclasses.replace(state, **{name: getattr(state, name)[order] for name in names})


def choose_in_groups(
    state: SplatState,
    key: Float[Array, "T D"],
    value: Float[Array, "T D"],
    segments: Int[Array, "T"],
    splats: Splats,
    *,
    shape: tuple[int, int, int],
) -> tuple[Float[Array, "M"], Int[Array, "M"], Choice, Int[Array, "groups M"]]:
    """Which keys are kept when.

    Args:
        state: the one before, with the window in the order of time, and the least important kept key first.
        key: with zeros as padding.
        shape: groups, chunks of each, slots of a chunk. Slots past the last token hold no keys.

    Returns:
        Importances and slots of the keys that are kept in the end; what becomes of keys in each chunk, in arrays
        `[groups, chunks, ...]`; and the places of the keys kept after each group.
    """
    length, window, count = len(key), len(state.key), len(state.kept_slot)
    groups, chunks, size = shape
    key, value = jnp.concatenate([state.key, key]), jnp.concatenate([state.value, value])
    segments = jnp.concatenate([state.valid.astype(segments.dtype), segments])
    padding = (0, groups * chunks * size - length)
    importances = jnp.pad(importance(splats, key[:length], value[:length]), padding).reshape(shape)
    left_segments = jnp.pad(segments[:length], padding).reshape(shape)
    # Into the sums of a group go keys of that group, or keys kept before it: in its arrays, those come first.
    places = (count + jnp.arange(chunks * size)).reshape(chunks, size)
    slots = (state.length - window + jnp.arange(groups * chunks * size, dtype=jnp.int32)).reshape(groups, -1)
    blocks = -(-size // _BLOCK)
    block = -(-size // blocks)

    def chunk(kept: Candidates, leaving: Candidates) -> tuple[Candidates, Choice]:
        mine = jnp.arange(count + size)
        left = leaving._replace(place=mine[count:])
        left = jax.tree.map(lambda x: jnp.pad(x, (0, blocks * block - size)).reshape(blocks, block), left)
        after, going = jax.lax.scan(choose, kept._replace(place=mine[:count]), left)
        goes, goes_segment = (x.reshape(-1)[:size] for x in going)
        until = jnp.full(count + size, size).at[goes].set(jnp.arange(size), unique_indices=True)
        place = jnp.concatenate([kept.place, leaving.place])
        choice = Choice(kept.place, kept.segment, until, place[goes], goes_segment)
        return after._replace(place=place[after.place]), choice

    def group(
        carried: tuple[Candidates, jax.Array], given: tuple[jax.Array, ...]
    ) -> tuple[tuple[Candidates, jax.Array], tuple[Choice, jax.Array]]:
        (kept, kept_slot), (importance, segment, slot) = carried, given
        left = Candidates(importance, segment, places)
        if chunks == 1:
            after, choices = jax.lax.scan(chunk, kept, left)
        else:
            before, after = kept_before_each(kept, left)
            _, choices = jax.vmap(chunk)(before, left)
        kept_slot = jnp.concatenate([kept_slot, slot])[after.place]
        return (after._replace(place=jnp.arange(count)), kept_slot), (choices, after.place)

    kept = Candidates(state.kept_importance, (state.kept_slot >= 0).astype(segments.dtype), jnp.arange(count))
    given = importances, left_segments, slots
    (kept, kept_slot), (choices, after) = jax.lax.scan(group, (kept, state.kept_slot), given)
    return kept.importance, jnp.where(kept.segment != 0, kept_slot, -1), choices, after
