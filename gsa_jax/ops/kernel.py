"""Attention through splats as a kernel for TPUs, forward and backward: a chunk stays in vector memory from the first
product to the last.

The grid is rows, heads and chunks, the last one in the order of time forward and against it backward. The forward
kernel carries the state of a head from chunk to chunk and stores it at the start of each; the backward one computes
each chunk again from there, and carries the gradient of the state. Both call `gsa_jax.ops.kernel_chunk`.

May be changed here: how arrays are laid out for the kernels, and what goes from chunk to chunk. Which calls they take
is `kernel_takes` in `gsa_jax.ops.chunked`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gsa_jax.ops import kernel_chunk
from gsa_jax.ops.kernel_chunk import CHUNK, SLOT_ROWS, Chunk, HeadSplats, Slots, Way, slot_rows
from gsa_jax.ops.state import (
    FLOOR,
    Splats,
    SplatState,
    append_to_windows,
    compensated,
    feature_coefficients,
    query_terms,
    without_paddings,
)

_LANES = 128


class Sizes(NamedTuple):
    """Of padded arrays. Heads of 64 are computed two at a time, because vector registers are 128 numbers wide."""

    window: int
    head_dim: int
    splats: int
    narrow: bool
    interpret: bool

    @property
    def heads(self) -> int:
        """Heads of a program."""
        return _LANES // self.head_dim

    @property
    def chunks_before(self) -> int:
        """Chunks that the window reaches back to."""
        return -(-self.window // CHUNK)


def kernel_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    segments: Int[Array, "B T"],
    splats: Splats,
    state: SplatState,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H D"], SplatState]:
    """`gsa_jax.ops.chunked.chunked` from an empty state, on a TPU or interpreted on any platform.

    Sums of the state are compensated as everywhere. The output is of the dtype of the sums, float32, but has been
    rounded to that of `value`.
    """
    batch, length, heads, head_dim = query.shape
    num_splats, window = splats.centers.shape[1], state.key.shape[2]
    wide = _LANES // 2 if head_dim <= _LANES // 2 else _LANES
    padded_splats = _LANES // 2 if num_splats <= _LANES // 2 else _LANES
    sizes = Sizes(window, wide, padded_splats, query.dtype == jnp.bfloat16, interpret)
    more_slots, more_heads = -length % CHUNK, -heads % sizes.heads

    def flat(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, more_slots), (0, more_heads), (0, wide - head_dim)])
        return x.reshape(batch, length + more_slots, -1)

    complete = splats.complete(jnp.float32)
    directions, of_norm = jax.vmap(feature_coefficients)(complete)
    more_splats = padded_splats - num_splats
    directions = jnp.pad(directions, [(0, more_heads), (0, more_splats), (0, wide - head_dim)])
    # No query reads a splat that is not there.
    of_query = jnp.pad(jax.vmap(query_terms)(complete), [(0, 0), (0, more_splats)], constant_values=-jnp.inf)
    terms = jnp.stack([jnp.pad(of_norm, [(0, 0), (0, more_splats)]), of_query], axis=1)
    terms = jnp.pad(terms, [(0, more_heads), (0, 0), (0, 0)])
    query, key, value = (without_paddings(x, segments) for x in (query, key, value))
    rows = slot_rows(jnp.pad(segments, [(0, 0), (0, more_slots)]), length, window)
    results: Any = _attend(sizes, *map(flat, (query, key, value)), rows, jnp.swapaxes(directions, 1, 2), terms)
    output, kv, kv_rest, sums = results
    output = output.reshape(batch, length + more_slots, heads + more_heads, wide)[:, :length, :heads, :head_dim]
    kv, kv_rest = (jnp.swapaxes(x[:, :heads, :head_dim, :num_splats], 2, 3) for x in (kv, kv_rest))
    m, z, z_rest = (sums[:, :heads, i, :num_splats] for i in range(3))
    final = append_to_windows(state, key, value, segments)
    final = dataclasses.replace(final, kv=kv, kv_rest=kv_rest, z=z, z_rest=z_rest, m=jax.lax.stop_gradient(m))
    return output.astype(jnp.float32), final


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    sizes: Sizes,
    query: Float[Array, "B T E"],
    key: Float[Array, "B T E"],
    value: Float[Array, "B T E"],
    rows: Int[Array, "B N 8 C"],
    directions: Float[Array, "H D S"],
    terms: Float[Array, "H 2 S"],
) -> tuple[jax.Array, ...]:
    """Outputs `[B, T, E]`, and the last state: `kv` and `kv_rest` transposed `[B, H, D, S]`, and the rows `m`, `z` and
    `z_rest` `[B, H, 3, S]`.

    Args:
        terms: coefficients of |x|^2 and what queries have more, one below the other.
    """
    return _forward(sizes, query, key, value, rows, directions, terms, store=False)[0]


def _attend_forward(sizes: Sizes, *arrays: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    results, starts = _forward(sizes, *arrays, store=True)
    return results, (*arrays, *starts)


class _Specs(NamedTuple):
    """Blocks of arrays, for a program of some heads and the chunk that `at` makes of its number."""

    tokens: pl.BlockSpec
    before: Callable[[int], pl.BlockSpec]
    rows: pl.BlockSpec
    starts: Callable[..., pl.BlockSpec]
    per_row: Callable[..., pl.BlockSpec]
    per_head: Callable[..., pl.BlockSpec]


def _specs(sizes: Sizes, at: Callable[[Any], Any]) -> _Specs:
    heads = sizes.heads
    return _Specs(
        tokens=pl.BlockSpec((1, CHUNK, _LANES), lambda b, h, c: (b, at(c), h)),
        before=lambda n: pl.BlockSpec((1, CHUNK, _LANES), lambda b, h, c: (b, jnp.maximum(at(c) - n, 0), h)),
        rows=pl.BlockSpec((1, 1, SLOT_ROWS, CHUNK), lambda b, h, c: (b, at(c), 0, 0)),
        starts=lambda *shape: pl.BlockSpec((1, heads, 1, *shape), lambda b, h, c: (b, h, at(c), 0, 0)),
        per_row=lambda *shape: pl.BlockSpec((1, heads, *shape), lambda b, h, c: (b, h, 0, 0)),
        per_head=lambda *shape: pl.BlockSpec((heads, *shape), lambda b, h, c: (h, 0, 0)),
    )


def _call(sizes: Sizes, kernel: Any, name: str, grid: tuple[int, ...], **settings: Any) -> Callable[..., Any]:
    # Rows and heads are independent, chunks are not.
    parameters = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
    return pl.pallas_call(
        functools.partial(kernel, sizes=sizes),
        grid=grid,
        name=name,
        compiler_params=parameters,
        interpret=sizes.interpret,
        **settings,
    )


def _forward(
    sizes: Sizes,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: jax.Array,
    directions: jax.Array,
    terms: jax.Array,
    *,
    store: bool,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """What `_attend` returns; and if `store`, `kv` transposed `[B, H, N, D, S]`, `m` and `z` `[B, H, N, 2, S]` at the
    start of each chunk."""
    batch, chunks = rows.shape[:2]
    heads, dim, splats = directions.shape
    specs = _specs(sizes, lambda chunk: chunk)
    shapes = [
        (query.shape, query.dtype, specs.tokens),
        ((batch, heads, dim, splats), jnp.float32, specs.per_row(dim, splats)),
        ((batch, heads, dim, splats), jnp.float32, specs.per_row(dim, splats)),
        ((batch, heads, 3, splats), jnp.float32, specs.per_row(3, splats)),
    ]
    if store:
        shapes += [
            ((batch, heads, chunks, dim, splats), jnp.float32, specs.starts(dim, splats)),
            ((batch, heads, chunks, 2, splats), jnp.float32, specs.starts(2, splats)),
        ]
    tokens, in_specs = _at_hand(sizes, specs, query, key, value)
    results = _call(
        sizes,
        _forward_kernel,
        "splat_attention_forward",
        (batch, heads // sizes.heads, chunks),
        in_specs=[*in_specs, specs.rows, specs.per_head(dim, splats), specs.per_head(2, splats)],
        out_specs=[spec for _, _, spec in shapes],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in shapes],
    )(*tokens, rows, directions, terms)
    return tuple(results[:4]), tuple(results[4:])


def _at_hand(
    sizes: Sizes, specs: _Specs, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """Query, and key and value of each chunk at hand, in the order of time."""
    blocks = [specs.before(n) for n in range(sizes.chunks_before, 0, -1)] + [specs.tokens]
    return [query, *[key] * len(blocks), *[value] * len(blocks)], [specs.tokens, *blocks, *blocks]


def _tokens(sizes: Sizes, refs: Sequence[Any], head: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, and keys and values of the slots at hand, of one head of a program; float32."""
    query, *others = (ref[0, :, _lanes(sizes, head)].astype(jnp.float32) for ref in refs)
    count = len(others) // 2
    return query, jnp.concatenate(others[:count]), jnp.concatenate(others[count:])


def _lanes(sizes: Sizes, head: int) -> slice:
    return slice(head * sizes.head_dim, (head + 1) * sizes.head_dim)


def _either_way(
    of_keys: Sequence[jax.Array], bases: Sequence[jax.Array], slots: Slots, finish: Callable[[Way], None]
) -> None:
    """Does the rest of a chunk the way that its features need; decided for all heads of a program at once, so that the
    rest is one block of instructions to the scheduler."""
    steep = kernel_chunk.is_steep(of_keys, bases, slots)
    pl.when(steep)(lambda: finish(kernel_chunk.steep_weights))
    pl.when(jnp.logical_not(steep))(lambda: finish(kernel_chunk.level_weights))


def _forward_kernel(*refs: Any, sizes: Sizes) -> None:
    inputs = 3 + 2 * sizes.chunks_before
    rows_ref, directions_ref, terms_ref, output_ref, kv_ref, kv_rest_ref, sums_ref, *starts_refs = refs[inputs:]
    heads = range(sizes.heads)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        kv_ref[...] = jnp.zeros_like(kv_ref)
        kv_rest_ref[...] = jnp.zeros_like(kv_rest_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)
        sums_ref[0, :, 0:1, :] = jnp.full((sizes.heads, 1, sizes.splats), FLOOR, jnp.float32)

    slots = Slots.from_rows(rows_ref[0, 0], sizes.chunks_before)
    tokens = [_tokens(sizes, refs[:inputs], head) for head in heads]
    features = [
        kernel_chunk.features(*tokens[head][:2], _splats(directions_ref, terms_ref, head), sizes.window)
        for head in heads
    ]
    starts = [sums_ref[0, head, 0:1] for head in heads]
    of_keys = [keys for _, keys in features]
    bases = kernel_chunk.bases(of_keys, starts, slots)

    def finish(way: Way) -> None:
        outputs = []
        for head in heads:
            kv, z, z_rest = kv_ref[0, head], sums_ref[0, head, 1:2], sums_ref[0, head, 2:3]
            if starts_refs:
                starts_refs[0][0, head, 0] = kv
                starts_refs[1][0, head, 0] = jnp.concatenate([starts[head], z])
            chunk = Chunk(*tokens[head], *features[head], kv, z)
            (output, new_kv, new_z), carry = kernel_chunk.attend(
                chunk, bases[head], starts[head], slots, way, sizes.window, sizes.narrow
            )
            outputs.append(output)
            kv_ref[0, head], kv_rest_ref[0, head] = compensated(kv, kv_rest_ref[0, head], carry.kept, new_kv)
            z, z_rest = compensated(z, z_rest, carry.kept, new_z)
            sums_ref[0, head] = jnp.concatenate([carry.end, z, z_rest])
        output_ref[0] = jnp.concatenate(outputs, axis=1).astype(output_ref.dtype)

    _either_way(of_keys, bases, slots, finish)


def _splats(directions_ref: Any, terms_ref: Any, head: int) -> HeadSplats:
    return HeadSplats(directions_ref[head], terms_ref[head, 0:1], terms_ref[head, 1:2])


def _attend_backward(
    sizes: Sizes, residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, ...]:
    query, key, value, rows, directions, terms, kv_starts, starts = residuals
    of_output, of_kv, _, of_sums = cotangents
    batch, chunks = rows.shape[:2]
    heads, dim, splats = directions.shape
    specs = _specs(sizes, lambda step: chunks - 1 - step)
    tokens, in_specs = _at_hand(sizes, specs, query, key, value)
    carried = [pltpu.VMEM((sizes.chunks_before * CHUNK, _LANES), jnp.float32)] * 2 if sizes.window else []
    of_query, of_key, of_value, of_directions, of_terms = _call(
        sizes,
        _backward_kernel,
        "splat_attention_backward",
        (batch, heads // sizes.heads, chunks),
        in_specs=[
            *in_specs,
            specs.rows,
            specs.per_head(dim, splats),
            specs.per_head(2, splats),
            specs.starts(dim, splats),
            specs.starts(2, splats),
            specs.tokens,
            specs.per_row(dim, splats),
            specs.per_row(3, splats),
        ],
        out_specs=[specs.tokens] * 3 + [specs.per_row(dim, splats), specs.per_row(2, splats)],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)),
            jax.ShapeDtypeStruct((batch, heads, dim, splats), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, 2, splats), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((sizes.heads, dim, splats), jnp.float32),
            pltpu.VMEM((sizes.heads, 1, splats), jnp.float32),
            *carried,
        ],
    )(*tokens, rows, directions, terms, kv_starts, starts, of_output, of_kv, of_sums)
    return of_query, of_key, of_value, None, jnp.sum(of_directions, axis=0), jnp.sum(of_terms, axis=0)


def _backward_kernel(*refs: Any, sizes: Sizes) -> None:
    inputs = 3 + 2 * sizes.chunks_before
    rows_ref, directions_ref, terms_ref, kv_starts_ref, starts_ref, *refs_after = refs[inputs:]
    of_output_ref, of_kv_ref, of_sums_ref, of_query_ref, of_key_ref, of_value_ref, *refs_after = refs_after
    of_directions_ref, of_terms_ref, carried_kv, carried_z, *carried_tokens = refs_after
    heads = range(sizes.heads)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        of_directions_ref[...] = jnp.zeros_like(of_directions_ref)
        of_terms_ref[...] = jnp.zeros_like(of_terms_ref)
        carried_kv[...] = of_kv_ref[0]
        carried_z[...] = of_sums_ref[0, :, 1:2, :]
        for ref in carried_tokens:
            ref[...] = jnp.zeros_like(ref)

    slots = Slots.from_rows(rows_ref[0, 0], sizes.chunks_before)
    tokens = [_tokens(sizes, refs[:inputs], head) for head in heads]
    features_of = functools.partial(kernel_chunk.features, window=sizes.window)
    pairs: Any = [jax.vjp(features_of, *tokens[head][:2], _splats(directions_ref, terms_ref, head)) for head in heads]
    features, pull_features = ([pair[i] for pair in pairs] for i in range(2))
    starts = [starts_ref[0, head, 0, 0:1] for head in heads]
    of_keys = [keys for _, keys in features]
    bases = kernel_chunk.bases(of_keys, starts, slots)

    def finish(way: Way) -> None:
        gradients = []
        for head in heads:
            of_queries, of_leaving = features[head]
            kv, z = kv_starts_ref[0, head, 0], starts_ref[0, head, 0, 1:2]
            chunk = Chunk(*tokens[head], of_queries, of_leaving, kv, z)
            attend = functools.partial(
                kernel_chunk.attend,
                base=bases[head],
                start=starts[head],
                slots=slots,
                way=way,
                window=sizes.window,
                narrow=sizes.narrow,
            )
            _, pull, carry = jax.vjp(attend, chunk, has_aux=True)
            after = carried_kv[head], carried_z[head]
            (found,) = pull((of_output_ref[0, :, _lanes(sizes, head)].astype(jnp.float32), *after))
            carried_kv[head], carried_z[head] = found.kv + carry.kept * after[0], found.z + carry.kept * after[1]
            by_query, by_keys, of_splats = pull_features[head]((found.of_queries, found.of_keys))
            of_directions_ref[0, head] += of_splats.directions
            of_terms_ref[0, head] += jnp.concatenate([of_splats.of_norm, of_splats.of_query])
            gradients.append((found.query + by_query, found.keys + by_keys, found.values))
        queries, keys, values = (jnp.concatenate(parts, axis=1) for parts in zip(*gradients, strict=True))
        of_query_ref[0] = queries.astype(of_query_ref.dtype)
        own = sizes.chunks_before * CHUNK
        for i, (ref, of_slots) in enumerate(((of_key_ref, keys), (of_value_ref, values))):
            of_own = of_slots[own:]
            if carried_tokens:
                # What later chunks had to say, of the slots before theirs: the last of them are this chunk's own.
                carried = carried_tokens[i][...]
                of_own += carried[own - CHUNK :]
                carried_tokens[i][:CHUNK] = of_slots[:CHUNK]
                if own > CHUNK:
                    carried_tokens[i][CHUNK:] = of_slots[CHUNK:own] + carried[: own - CHUNK]
            ref[0] = of_own.astype(ref.dtype)

    _either_way(of_keys, bases, slots, finish)


_attend.defvjp(_attend_forward, _attend_backward)
