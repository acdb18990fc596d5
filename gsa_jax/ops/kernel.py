"""Attention through splats as a kernel for TPUs, forward and backward: a chunk stays in vector memory from the first
product to the last.

The grid is rows, heads and chunks, the last one in the order of time forward and against it backward. The forward
kernel carries the state of a head from chunk to chunk and stores it at the start of each; the backward one computes
each chunk again from there, and carries the gradient of the state. Both call `gsa_jax.ops.kernel_chunk`.

May be changed here: which calls the kernels take, how arrays are laid out for them, and what goes from chunk to chunk.
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
from gsa_jax.ops.kernel_chunk import SLOT_ROWS, HeadSplats, Slots
from gsa_jax.ops.segments import documents_before, reached_by
from gsa_jax.ops.state import (
    FLOOR,
    Splats,
    SplatState,
    append_to_windows,
    compensated,
    feature_coefficients,
    query_terms,
)

_LANES = 128
_CHUNKS = (128, 256)


class Sizes(NamedTuple):
    """Of padded arrays. Heads of 64 are computed two at a time, because vector registers are 128 numbers wide."""

    window: int
    chunk: int
    head_dim: int
    splats: int
    narrow: bool
    interpret: bool

    @property
    def heads(self) -> int:
        """Heads of a program."""
        return _LANES // self.head_dim


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
    chunk = next(size for size in _CHUNKS if window <= size)
    wide = _LANES // 2 if head_dim <= _LANES // 2 else _LANES
    padded_splats = _LANES // 2 if num_splats <= _LANES // 2 else _LANES
    sizes = Sizes(window, chunk, wide, padded_splats, query.dtype == jnp.bfloat16, interpret)
    more_slots, more_heads = -length % chunk, -heads % sizes.heads

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
    rows = _slot_rows(jnp.pad(segments, [(0, 0), (0, more_slots)]), length, sizes)
    output, kv, kv_rest, sums = _attend(
        sizes, *map(flat, (query, key, value)), rows, jnp.swapaxes(directions, 1, 2), terms
    )
    output = output.reshape(batch, length + more_slots, heads + more_heads, wide)[:, :length, :heads, :head_dim]
    kv, kv_rest = (jnp.swapaxes(x[:, :heads, :head_dim, :num_splats], 2, 3) for x in (kv, kv_rest))
    m, z, z_rest = (sums[:, :heads, i, :num_splats] for i in range(3))
    final = append_to_windows(state, key, value, segments)
    final = dataclasses.replace(final, kv=kv, kv_rest=kv_rest, z=z, z_rest=z_rest, m=jax.lax.stop_gradient(m))
    return output.astype(jnp.float32), final


def _slot_rows(segments: Int[Array, "B T"], length: int, sizes: Sizes) -> Int[Array, "B N 8 C"]:
    """The slots of each of N chunks, as `Slots.from_rows` reads them. No key leaves at slots past the `length`."""
    batch, padded = segments.shape
    left = jnp.pad(segments, [(0, 0), (sizes.window, 0)])[:, :padded]
    left = jnp.where(jnp.arange(padded) < length, left, 0)
    segments, left = (x.reshape(batch, -1, sizes.chunk) for x in (segments, left))
    before = jnp.pad(segments[:, :-1], [(0, 0), (1, 0), (0, 0)])
    # Without `segment_ids` a row is document 1, and with them the state before is empty.
    documents = documents_before(left, jnp.ones(batch, left.dtype))
    reached = jax.vmap(jax.vmap(reached_by))(left, documents)
    start = jnp.where(reached.goes_on, -1, reached.first)
    end = jnp.sum(reached.document[..., None, :] <= reached.document[..., None], axis=-1) - 1
    first = jnp.where(reached.has_key, reached.first, -1)
    rows = segments, before, left != 0, start, end, first, reached.document == segments, jnp.zeros_like(left)
    return jnp.stack([x.astype(jnp.int32) for x in rows], axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    sizes: Sizes,
    query: Float[Array, "B T E"],
    key: Float[Array, "B T E"],
    value: Float[Array, "B T E"],
    rows: Int[Array, "B N 8 C"],
    directions: Float[Array, "H D S"],
    terms: Float[Array, "H 2 S"],
) -> tuple[Float[Array, "B T E"], Float[Array, "B H D S"], Float[Array, "B H D S"], Float[Array, "B H 3 S"]]:
    """Outputs, and of the last state `kv` and `kv_rest` transposed, and `m`, `z` and `z_rest` one below the other.

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
    before: pl.BlockSpec
    rows: pl.BlockSpec
    starts: Callable[..., pl.BlockSpec]
    per_row: Callable[..., pl.BlockSpec]
    per_head: Callable[..., pl.BlockSpec]


def _specs(sizes: Sizes, at: Callable[[Any], Any]) -> _Specs:
    chunk, heads = sizes.chunk, sizes.heads
    return _Specs(
        tokens=pl.BlockSpec((1, chunk, _LANES), lambda b, h, c: (b, at(c), h)),
        before=pl.BlockSpec((1, chunk, _LANES), lambda b, h, c: (b, jnp.maximum(at(c) - 1, 0), h)),
        rows=pl.BlockSpec((1, 1, SLOT_ROWS, chunk), lambda b, h, c: (b, at(c), 0, 0)),
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
    tokens, in_specs = _with_chunk_before(sizes, specs, (query, key, value))
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


def _with_chunk_before(
    sizes: Sizes, specs: _Specs, tokens: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """Query, key and value, and key and value of the chunk before if there is a window."""
    query, key, value = tokens
    if not sizes.window:
        return [query, key, value], [specs.tokens] * 3
    return [query, key, value, key, value], [specs.tokens] * 3 + [specs.before] * 2


class _Tokens(NamedTuple):
    """Of one head: float32, with zeros in place of padding; keys and values of the slots at hand."""

    query: Float[Array, "C D"]
    keys: Float[Array, "K D"]
    values: Float[Array, "K D"]


def _tokens(refs: Sequence[Any], slots: Slots, head: int, sizes: Sizes) -> _Tokens:
    lanes = slice(head * sizes.head_dim, (head + 1) * sizes.head_dim)
    read = [ref[0, :, lanes] for ref in refs]
    query, key, value = (kernel_chunk.without_padding(x, slots.segments) for x in read[:3])
    if not sizes.window:
        return _Tokens(query, key, value)
    key_before, value_before = (kernel_chunk.without_padding(x, slots.before) for x in read[3:])
    return _Tokens(query, jnp.concatenate([key_before, key]), jnp.concatenate([value_before, value]))


def _scores(
    query: jax.Array, keys: jax.Array, splats: HeadSplats, m: jax.Array, slots: Slots, sizes: Sizes
) -> tuple[tuple[jax.Array | None, jax.Array, jax.Array], jax.Array]:
    """Near scores if there is a window, and `read` and `add`; and `last`, a constant to the gradient."""
    left = kernel_chunk.leaving(keys, sizes.window)
    read, add, last = kernel_chunk.features(query, left, splats, m, slots)
    near = kernel_chunk.near(query, keys, slots, sizes.window, sizes.narrow) if sizes.window else None
    return (near, read, add), last


def _near_top(near: jax.Array | None, size: int) -> Float[Array, "C 1"]:
    if near is None:
        return jnp.full((size, 1), FLOOR, jnp.float32)
    return jnp.maximum(jnp.max(near, axis=1, keepdims=True), FLOOR)


def _forward_kernel(*refs: Any, sizes: Sizes) -> None:
    inputs = 5 if sizes.window else 3
    rows_ref, directions_ref, terms_ref, output_ref, kv_ref, kv_rest_ref, sums_ref, *starts = refs[inputs:]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        kv_ref[...] = jnp.zeros_like(kv_ref)
        kv_rest_ref[...] = jnp.zeros_like(kv_rest_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)
        sums_ref[0, :, 0:1, :] = jnp.full((sizes.heads, 1, sizes.splats), FLOOR, jnp.float32)

    slots = Slots.from_rows(rows_ref[0, 0])
    outputs = []
    for head in range(sizes.heads):
        tokens = _tokens(refs[:inputs], slots, head, sizes)
        splats = HeadSplats(directions_ref[head], terms_ref[head, 0:1], terms_ref[head, 1:2])
        kv, m, z, z_rest = kv_ref[0, head], *(sums_ref[0, head, i : i + 1] for i in range(3))
        if starts:
            starts[0][0, head, 0] = kv
            starts[1][0, head, 0] = sums_ref[0, head, 0:2]
        (near, read, add), last = _scores(tokens.query, tokens.keys, splats, m, slots, sizes)
        top, factor, within = _weights(read, add, _near_top(near, sizes.chunk), slots, sizes)
        outputs.append(
            kernel_chunk.output(near, top, factor, within, tokens.values, kv, z, slots, sizes.window, sizes.narrow)
        )
        left = kernel_chunk.leaving(tokens.values, sizes.window)
        end, kept, new_kv, new_z = kernel_chunk.sums(add, left, last, m, slots, sizes.narrow)
        kv_ref[0, head], kv_rest_ref[0, head] = compensated(kv, kv_rest_ref[0, head], kept, new_kv)
        z, z_rest = compensated(z, z_rest, kept, new_z)
        sums_ref[0, head] = jnp.concatenate([end, z, z_rest])
    output_ref[0] = jnp.concatenate(outputs, axis=1).astype(output_ref.dtype)


def _weights(
    read: jax.Array, add: jax.Array, near_top: jax.Array, slots: Slots, sizes: Sizes
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weights of the chunk's own keys, the way that its features need."""

    def run(way: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: way(read, add, near_top, slots, sizes.narrow)

    steep = jnp.max(add) >= kernel_chunk.STEEP
    return jax.lax.cond(steep, run(kernel_chunk.steep_weights), run(kernel_chunk.level_weights))


def _weights_backward(
    read: jax.Array,
    add: jax.Array,
    near_top: jax.Array,
    slots: Slots,
    sizes: Sizes,
    of_factor: jax.Array,
    of_within: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients by `read` and `add`."""

    def run(way: Callable[..., Any]) -> Callable[[], Any]:
        def gradient() -> Any:
            _, pull = jax.vjp(lambda read, add: way(read, add, near_top, slots, sizes.narrow)[1:], read, add)
            return pull((of_factor, of_within))

        return gradient

    steep = jnp.max(add) >= kernel_chunk.STEEP
    return jax.lax.cond(steep, run(kernel_chunk.steep_weights), run(kernel_chunk.level_weights))


def _attend_backward(
    sizes: Sizes, residuals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, ...]:
    query, key, value, rows, directions, terms, kv_starts, starts = residuals
    of_output, of_kv, _, of_sums = cotangents
    batch, chunks = rows.shape[:2]
    heads, dim, splats = directions.shape
    specs = _specs(sizes, lambda step: chunks - 1 - step)
    tokens, in_specs = _with_chunk_before(sizes, specs, (query, key, value))
    carried = [pltpu.VMEM((sizes.chunk, _LANES), jnp.float32)] * 2 if sizes.window else []
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
    inputs = 5 if sizes.window else 3
    rows_ref, directions_ref, terms_ref, kv_start_ref, start_ref, of_output_ref, of_kv_ref, of_sums_ref = refs[
        inputs : inputs + 8
    ]
    of_query_ref, of_key_ref, of_value_ref, of_directions_ref, of_terms_ref = refs[inputs + 8 : inputs + 13]
    carried_kv, carried_z, *carried_tokens = refs[inputs + 13 :]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        of_directions_ref[...] = jnp.zeros_like(of_directions_ref)
        of_terms_ref[...] = jnp.zeros_like(of_terms_ref)
        carried_kv[...] = of_kv_ref[0]
        carried_z[...] = of_sums_ref[0, :, 1:2, :]
        for ref in carried_tokens:
            ref[...] = jnp.zeros_like(ref)

    slots = Slots.from_rows(rows_ref[0, 0])
    gradients = []
    for head in range(sizes.heads):
        tokens = _tokens(refs[:inputs], slots, head, sizes)
        splats = HeadSplats(directions_ref[head], terms_ref[head, 0:1], terms_ref[head, 1:2])
        kv, m, z = kv_start_ref[0, head, 0], start_ref[0, head, 0, 0:1], start_ref[0, head, 0, 1:2]
        lanes = slice(head * sizes.head_dim, (head + 1) * sizes.head_dim)
        of_output = of_output_ref[0, :, lanes].astype(jnp.float32)

        scores = functools.partial(_scores, m=m, slots=slots, sizes=sizes)
        (near, read, add), pull_scores, last = jax.vjp(scores, tokens.query, tokens.keys, splats, has_aux=True)
        near_top = _near_top(near, sizes.chunk)
        top, factor, within = _weights(read, add, near_top, slots, sizes)

        def mix(near, factor, within, values, kv, z, top=top):
            return kernel_chunk.output(near, top, factor, within, values, kv, z, slots, sizes.window, sizes.narrow)

        def add_up(add, values, m=m, last=last):
            left = kernel_chunk.leaving(values, sizes.window)
            _, kept, *new = kernel_chunk.sums(add, left, last, m, slots, sizes.narrow)
            return tuple(new), kept

        _, pull_output = jax.vjp(mix, near, factor, within, tokens.values, kv, z)
        of_near, of_factor, of_within, of_values, of_kv, of_z = pull_output(of_output)
        _, pull_sums, kept = jax.vjp(add_up, add, tokens.values, has_aux=True)
        after = carried_kv[head], carried_z[head]
        of_add, of_added_values = pull_sums(after)
        carried_kv[head], carried_z[head] = of_kv + kept * after[0], of_z + kept * after[1]
        of_read, of_added = _weights_backward(read, add, near_top, slots, sizes, of_factor, of_within)
        of_query, of_keys, of_splats = pull_scores((of_near, of_read, of_add + of_added))
        of_directions_ref[0, head] += of_splats.directions
        of_terms_ref[0, head] += jnp.concatenate([of_splats.of_norm, of_splats.of_query])
        # Of the raw arrays: padding was replaced by zeros.
        gradients.append((of_query, of_keys, of_values + of_added_values))
    queries, keys, values = (jnp.concatenate(parts, axis=1) for parts in zip(*gradients, strict=True))
    of_query_ref[0] = jnp.where(slots.segments != 0, queries, 0).astype(of_query_ref.dtype)
    for ref, found, carried in zip(
        (of_key_ref, of_value_ref), (keys, values), (carried_tokens or (None, None)), strict=True
    ):
        if carried is not None:
            before, found = found[: sizes.chunk], found[sizes.chunk :] + carried[...]
            carried[...] = before
        ref[0] = jnp.where(slots.segments != 0, found, 0).astype(ref.dtype)


_attend.defvjp(_attend_forward, _attend_backward)
