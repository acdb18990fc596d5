"""Inputs, error measure and compiled calls that the tests of splat attention share.

May be changed here: how random cases are drawn.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsa_jax.ops.api import splat_attention
from gsa_jax.ops.state import Splats, SplatState


class Case(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array
    splats: Splats
    mask: jax.Array

    def slots(self, start: int, stop: int) -> "Case":
        query, key, value, mask = (x[:, start:stop] for x in (self.query, self.key, self.value, self.mask))
        return Case(query, key, value, self.splats, mask)

    def poisoned(self, poison: float) -> "Case":
        """The same with padding that holds `poison`."""
        query, key, value = (jnp.where(self.mask[:, :, None, None], x, poison) for x in self[:3])
        return Case(query, key, value, self.splats, self.mask)


def draw(
    length: int,
    num_splats: int,
    *,
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 8,
    scale: float = 2.0,
    optional: bool = False,
    learned: bool = False,
    pads: float = 0.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    seed: int = 0,
) -> Case:
    """Normal queries, keys, values and centres, scales around `scale`, a share `pads` of padding at random slots.

    Args:
        optional: with all terms of the far score.
        learned: with weights of the importance of keys.
    """
    random = np.random.default_rng(seed)

    def normal(*shape: int, std: float = 1.0) -> jax.Array:
        return jnp.asarray(std * random.normal(size=shape), jnp.float32 if dtype == jnp.bfloat16 else dtype)

    splats = Splats(normal(heads, num_splats, head_dim), np.log(scale) + normal(heads, num_splats, std=0.2))
    if optional:
        splats = dataclasses.replace(
            splats,
            log_amplitudes=normal(heads, num_splats),
            norm_gain=normal(heads, std=0.1),
            far_gain=normal(heads),
        )
    if learned:
        splats = dataclasses.replace(splats, importance=normal(heads, 2 * head_dim + 1))
    query, key, value = (normal(batch, length, heads, head_dim).astype(dtype) for _ in range(3))
    return Case(query, key, value, splats, jnp.asarray(random.random((batch, length)) >= pads))


def relative_error(got: jax.typing.ArrayLike, want: jax.typing.ArrayLike, floor: float = 1e-30) -> float:
    """Norm of the difference over that of `want`, or over `floor` if that is larger; NaN and inf come through."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), floor))


def settled(state: SplatState) -> SplatState:
    """With what rounding left out of the sums added to them, and kept keys in the order of their slots: how the one is
    shared out, and in which order the others are, depends on the implementation."""
    same = {"kv_rest": jnp.zeros_like(state.kv), "z_rest": jnp.zeros_like(state.z)}
    order = jnp.argsort(state.kept_slot, axis=-1)
    for name in ("kept_key", "kept_value", "kept_importance", "kept_slot"):
        array = getattr(state, name)
        same[name] = jnp.take_along_axis(array, order if array.ndim == 3 else order[..., None], axis=2)
    return dataclasses.replace(state, kv=state.kv + state.kv_rest, z=state.z + state.z_rest, **same)


def assert_close(got: object, want: object, tolerance: float) -> None:
    """Compares two pytrees leaf by leaf: floats by relative error, masks and counters exactly.

    A leaf that is small beside the others, such as a gradient that is 0, is compared with a hundredth of the largest.
    """
    is_state = lambda x: isinstance(x, SplatState)  # noqa: E731
    got, want = (
        jax.tree.map(lambda x: settled(x) if is_state(x) else x, tree, is_leaf=is_state) for tree in (got, want)
    )
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = jax.tree_util.tree_leaves_with_path(want)
    floats = [np.asarray(x, np.float64) for _, x in leaves if jnp.issubdtype(x.dtype, jnp.floating) and x.size]
    floor = 0.01 * max([1e-30, *(float(np.linalg.norm(x)) for x in floats if np.abs(x).max() < 1e29)])
    for leaf, (path, expected) in zip(jax.tree.leaves(got), leaves, strict=True):
        name = jax.tree_util.keystr(path)
        assert leaf.shape == expected.shape and leaf.dtype == expected.dtype, name
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert relative_error(leaf, expected, floor) <= tolerance, name
        else:
            assert jnp.array_equal(leaf, expected), name


CHUNK = 16
"""Tokens of a chunk where nothing else is said: several chunks in a short text, and small programs."""

AT_ONCE = 3
"""Chunks of a group where "chunked" is asked for by its name; otherwise they come one by one, as on a processor."""


@functools.cache
def compiled(
    window: int | str,
    implementation: str | None = None,
    chunk_size: int | None = CHUNK,
    chunks_at_once: int | None = AT_ONCE,
    kept: int = 0,
):
    """`call(case, state) -> (output, state)`."""

    def call(case: Case, state: SplatState | None = None):
        return splat_attention(
            case.query,
            case.key,
            case.value,
            case.splats,
            window=window,
            kept=kept,
            attention_mask=case.mask,
            initial_state=state,
            implementation=implementation,  # type: ignore[arg-type]
            chunk_size=chunk_size if implementation in (None, "chunked") else None,
            chunks_at_once=chunks_at_once if implementation == "chunked" else None,
        )

    return jax.jit(call)


@functools.cache
def compiled_gradients(
    window: int | str,
    implementation: str | None = None,
    chunk_size: int | None = CHUNK,
    chunks_at_once: int | None = AT_ONCE,
    kept: int = 0,
):
    """`call(case) -> (output, state), gradients` by query, key, value and splats of all outputs and of the state."""
    return gradients_of(compiled(window, implementation, chunk_size, chunks_at_once, kept))


def gradients_of(attend: Callable[[Case], tuple[jax.Array, SplatState | None]]):
    """As `compiled_gradients`, of any function of a case."""

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, splats: Splats, mask: jax.Array):
        output, state = attend(Case(query, key, value, splats, mask))
        wide = output.astype(jnp.float32) if output.dtype == jnp.bfloat16 else output
        # Distinct weights: a plain sum would hide errors that cancel.
        total = jnp.sum(wide * jnp.sin(1.0 + jnp.arange(wide.size, dtype=wide.dtype)).reshape(wide.shape))
        if state is not None:
            total += jnp.mean(jnp.sin(state.kv)) + jnp.mean(jnp.sin(state.z)) if state.z.size else 0.0
        return total, (output, state)

    def call(case: Case):
        gradients, result = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*case)
        return result, gradients

    return jax.jit(call)
