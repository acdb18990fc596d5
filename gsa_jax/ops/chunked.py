"""Attention through splats in linear time, many tokens at once: training and prefill.

May be changed here: how a chunk is computed. A chunk maps (state, tokens) to (state, outputs); a scan does the rest.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from gsa_jax.ops.documents import Runs, numbers_documents, runs, visible_keys
from gsa_jax.ops.splat_state import (
    FLOOR,
    Splats,
    SplatState,
    add_to_sums,
    append_to_window,
    heads_first,
    key_features,
    query_features,
    roll_window,
)

_CHUNK = 64
"""Least tokens per chunk by default. A wider window takes chunks of its own width, or the window's keys, which each
chunk reads, would outweigh the chunk's."""

_MAX_CHUNK = 256

_STEEP = 40.0
"""How far a feature may rise over a maximum that factors are relative to: exp(40) times exp(40) fits in float32."""

_BASE = 4
"""Tokens whose scores through the splats are summed pair by pair, without factors."""


@functools.partial(jax.jit, static_argnames=("chunk_size",))  # without an outer jit, each call would compile its scan
def chunked(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    valid: Bool[Array, "B T"] | Int[Array, "B T"],
    splats: Splats,
    state: SplatState,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H D"], SplatState]:
    """A scan over chunks that carries the state: O(W + S) per token, in time and memory, forward and backward.

    The backward pass recomputes each chunk from the state at its start.

    With documents in `valid` the state before must be empty, and the one after is of the last document alone.
    """
    batch, length, heads, head_dim = query.shape
    size = min(chunk_size or min(max(state.key.shape[2], _CHUNK), _MAX_CHUNK), length)
    count = -(-length // size)
    # The document whose keys the sums hold. Only one can have any still to be read, as numbers never fall.
    document = None
    if numbers_documents(valid):
        document = jnp.zeros(batch, valid.dtype)
        state = dataclasses.replace(state, valid=state.valid.astype(valid.dtype))
    state = roll_window(state, -state.length)
    final = append_to_window(state, key, value, valid)

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(carried: tuple[SplatState, jax.Array | None], tokens: tuple[jax.Array, ...]):
        query, key, value, valid, exists = tokens
        output, state, document = _chunk(query, key, value, valid, exists, splats, *carried)
        return (state, document), output

    # Slots past the end are kept out of the sums; the window they have slid through is the one thing to put right.
    exists = jnp.arange(count * size).reshape(count, size) < length
    tokens = (*map(chunks, (query, key, value, valid)), exists)
    (state, _), output = jax.lax.scan(body, (state, document), tokens)
    output = jnp.moveaxis(output, 0, 1).reshape(batch, count * size, heads, head_dim)[:, :length]
    state = dataclasses.replace(state, key=final.key, value=final.value, valid=final.valid, length=final.length)
    return output, roll_window(state, state.length)


def _chunk(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    valid: jax.Array,
    exists: jax.Array,
    splats: Splats,
    state: SplatState,
    document: jax.Array | None,
) -> tuple[jax.Array, SplatState, jax.Array | None]:
    """Outputs of T tokens, the state after them and the document of its sums; the window is in the order of time.

    Of the W + T keys at hand, token t sees key j through the splats if j <= t, and exactly if t < j <= t + W.
    """
    length, window, dtype = query.shape[1], state.key.shape[2], state.z.dtype
    following = append_to_window(state, key, value, valid)
    query, key, value = (heads_first(x, valid) for x in (query, key, value))
    keys = jnp.concatenate([state.key, key], axis=2)
    values = jnp.concatenate([state.value, value], axis=2)
    seen = jnp.concatenate([state.valid, valid], axis=1)
    query, wide_values = query.astype(dtype), values.astype(dtype)

    leaving = keys[:, :, :length].astype(dtype)
    left = seen[:, :length] & exists if document is None else jnp.where(exists, seen[:, :length], 0)
    features = key_features(splats, leaving, left)
    far = query_features(splats, query)
    offset = jnp.arange(window + length) - jnp.arange(length)[:, None]
    near = jnp.einsum("bhtd,bhkd->bhtk", query, keys.astype(dtype))
    near = jnp.where((offset > 0) & (offset <= window) & visible_keys(valid, seen), near, -jnp.inf)
    near_top = jax.lax.stop_gradient(jnp.max(near, axis=-1, initial=FLOOR))

    # Maxima that each token of the chunk has seen: the ones that far keys' features are taken relative to.
    run, m, opening = None, state.m, features[:, :, 0]
    if document is not None:
        # Of the documents that far keys have reached, a token reads its own or none, and the sums if they are of it.
        # Each has maxima of its own: relative to those of another, its weights could vanish.
        run = runs(left, document)
        far = jnp.where(_per_token(run.number == valid), far, -jnp.inf)
        m = jnp.where(_per_token(run.goes_on), state.m[:, :, None, :], FLOOR)
        opening = jnp.take_along_axis(features, _per_token(run.first), axis=2)
    base = jnp.maximum(m, jax.lax.stop_gradient(opening))
    top, read, within = _far_within(far, features, base, m, near_top, run)
    weights = jnp.exp(near - top[..., None]) + jnp.pad(within, [(0, 0)] * 3 + [(0, window)])
    if run is not None:
        # The document of the sums is the one at the first slot, or has no reader left.
        m, base, read = m[:, :, 0], base[:, :, 0], jnp.where(_per_token(run.goes_on), read, 0)
    kept = jnp.exp(m - base)
    numerator = jnp.einsum("bhtk,bhkd->bhtd", weights, wide_values)
    numerator += jnp.einsum("bhts,bhsd->bhtd", read, kept[..., None] * state.kv)
    denominator = jnp.sum(weights, axis=-1) + jnp.einsum("bhts,bhs->bht", read, kept * state.z)
    output = numerator / jnp.where(denominator > 0, denominator, 1)[..., None]

    if run is not None:
        # Only the last document can have readers to come. Sums relative to `FLOOR` count exp(FLOOR - m) = 0.
        document = run.number[:, -1]
        features = jnp.where(_per_token(run.number == document[:, None]), features, -jnp.inf)
        following = dataclasses.replace(following, m=jnp.where(run.goes_on[:, -1, None, None], state.m, FLOOR))
    m = jnp.maximum(following.m, jax.lax.stop_gradient(jnp.max(features, axis=2)))
    return output.swapaxes(1, 2), add_to_sums(following, features, wide_values[:, :, :length], m), document


def _per_token(x: Shaped[Array, "B T"]) -> Shaped[Array, "B 1 T 1"]:
    return x[:, None, :, None]


def _far_within(
    far: Float[Array, "B H T S"],
    features: Float[Array, "B H T S"],
    base: Float[Array, "B H *#T S"],
    m: Float[Array, "B H *#T S"],
    near_top: Float[Array, "B H T"],
    run: Runs | None,
) -> tuple[Float[Array, "B H T"], Float[Array, "B H T S"], Float[Array, "B H T T"]]:
    """Row maxima `top`; `read = exp(far + base - top)`; and sums over splats of `exp(far[t] + features[j] - top[t])`
    for j <= t, else 0.

    The sums are a matrix product of `read` and `exp(features - base)`, unless a feature rises so far
    over `base` that the second factor could overflow. From such a key on, tokens take `_pairs_within` instead. Whether
    they do depends on keys up to each token alone, so that no bit of an output depends on the future.
    """
    length, num_splats = features.shape[2:]
    number = None if run is None else run.number
    spread = (lambda x: x[:, :, None, :]) if run is None else (lambda x: x)
    rises = jax.lax.stop_gradient(features) - spread(base)
    highest = jnp.max(rises, axis=-1, initial=-jnp.inf)
    if run is None:
        level = jax.lax.cummax(highest, axis=2) < _STEEP
    else:
        last_steep = jax.lax.cummax(jnp.where(highest < _STEEP, -1, jnp.arange(length)), axis=2)
        level = last_steep < run.first[:, None, :]

    def level_top() -> jax.Array:
        return jnp.maximum(near_top, jnp.max(far + spread(base), axis=-1, initial=FLOOR))

    def level_product(top: jax.Array) -> tuple[jax.Array, jax.Array]:
        read = jnp.exp(far + (spread(base) - top[..., None]))
        added = jnp.exp(jnp.where(rises < _STEEP, features - spread(base), -jnp.inf))
        causal = jnp.tril(jnp.ones((length, length), bool))
        if number is not None:
            causal &= visible_keys(number, number)
        return read, jnp.where(causal, jnp.einsum("bhts,bhks->bhtk", read, added), 0)

    def all_level() -> tuple[jax.Array, ...]:
        top = jax.lax.stop_gradient(level_top())
        return top, *level_product(top)

    def some_steep() -> tuple[jax.Array, ...]:
        running = jnp.maximum(_running_maximum(jax.lax.stop_gradient(features), number), spread(m))
        steep_top = jnp.maximum(near_top, jnp.max(far + running, axis=-1, initial=FLOOR))
        top = jax.lax.stop_gradient(jnp.where(level, level_top(), steep_top))
        pairs = _pairs_within(far - top[..., None], features, number)
        read, product = level_product(top)
        return top, read, jnp.where(level[..., None], product, pairs)

    if num_splats == 0:
        return near_top, far, jnp.zeros((*near_top.shape, length), far.dtype)
    return jax.lax.cond(jnp.all(level), all_level, some_steep)


def _running_maximum(x: jax.Array, number: jax.Array | None) -> jax.Array:
    """Maximum of the tokens so far, or of those so far whose document is `number` of the last."""
    if number is not None:

        def combine(earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]):
            same = earlier[0] == later[0]
            return later[0], jnp.where(same, jnp.maximum(earlier[1], later[1]), later[1])

        return jax.lax.associative_scan(combine, (_per_token(number), x), axis=2)[1]
    # In two short strides: on CPU, the work of `lax.cummax` is the length of the stride per token.
    length = x.shape[2]
    stride = min(_BASE, length)
    padded = jnp.pad(x, [(0, 0), (0, 0), (0, -length % stride), (0, 0)], constant_values=-jnp.inf)
    strides = padded.reshape(*x.shape[:2], padded.shape[2] // stride, stride, x.shape[3])
    inside = jax.lax.cummax(strides, axis=3)
    before = jax.lax.cummax(inside[:, :, :-1, -1], axis=2)
    before = jnp.pad(before, [(0, 0), (0, 0), (1, 0), (0, 0)], constant_values=-jnp.inf)
    return jnp.maximum(inside, before[:, :, :, None, :]).reshape(padded.shape)[:, :, :length]


def _pairs_within(far: jax.Array, features: jax.Array, number: jax.Array | None) -> jax.Array:
    """`[B, H, T, T]`: the sum over splats of `exp(far[t] + features[j])` for j <= t, else 0.

    The sum becomes a matrix product by `exp(far + r) exp(features - r)`, which is only safe if no key after t sets r.
    So the tokens are halved again and again: the later half reads the earlier one through r = the earlier half's
    maximum, and what is left at the end are small blocks along the diagonal.

    With documents, `[t, j]` is 0 too unless `number` is equal at t and j. Of an earlier half, a later one can then
    share none but the last document, and that one's maximum is r.
    """
    length, num_splats = far.shape[2:]
    base = min(_BASE, length)
    count = 1 << (-(-length // base) - 1).bit_length()
    tail = [(0, 0), (0, 0), (0, count * base - length), (0, 0)]
    far = jnp.pad(far, tail, constant_values=-jnp.inf)
    features = jnp.pad(features, tail, constant_values=-jnp.inf)

    def blocks(x: jax.Array, *shape: int) -> jax.Array:
        return x.reshape(*x.shape[:2], *shape, num_splats)

    scores = blocks(far, count, base, 1) + blocks(features, count, 1, base)
    causal = jnp.tril(jnp.ones((base, base), bool))[..., None]
    if number is not None:
        number = jnp.pad(number, tail[1:3], mode="edge")
        of_block = number.reshape(-1, 1, count, base, 1)
        causal &= (of_block == of_block.swapaxes(3, 4))[..., None]
    weights = jnp.sum(jnp.exp(jnp.where(causal, scores, -jnp.inf)), axis=-1)
    while count > 1:
        count //= 2
        later = blocks(far, count, 2, base)[:, :, :, 1]
        earlier = blocks(features, count, 2, base)[:, :, :, 0]
        if number is not None:
            halves = number.reshape(-1, 1, count, 2, base, 1)
            last = halves[:, :, :, 0, -1:]
            earlier = jnp.where(halves[:, :, :, 0] == last, earlier, -jnp.inf)
            later = jnp.where(halves[:, :, :, 1] == last, later, -jnp.inf)
        maximum = jax.lax.stop_gradient(jnp.max(earlier, axis=3, keepdims=True, initial=FLOOR))
        across = jnp.einsum("bhnts,bhnks->bhntk", jnp.exp(later + maximum), jnp.exp(earlier - maximum))
        upper = jnp.pad(weights[:, :, 0::2], [(0, 0)] * 4 + [(0, base)])
        weights = jnp.concatenate([upper, jnp.concatenate([across, weights[:, :, 1::2]], axis=4)], axis=3)
        base *= 2
    return weights[:, :, 0, :length, :length]
