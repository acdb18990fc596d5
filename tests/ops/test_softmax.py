"""The exact attention against a plain float64 loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.ops import causal_attention, linear, no_splats, splat_attention


def by_definition(query, key, value, attention_mask, window):
    """One row at a time, float64; rows that see nothing are zero."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(value)
    batch, length, heads, _ = query.shape
    for b in range(batch):
        for i in range(length):
            first = 0 if window == "all" else max(0, i - window + 1)
            seen = [j for j in range(first, i + 1) if attention_mask[b, j]]
            for h in range(heads):
                if seen:
                    scores = key[b, seen, h] @ query[b, i, h]
                    weights = np.exp(scores - scores.max())
                    out[b, i, h] = weights @ value[b, seen, h] / weights.sum()
    return out


def inputs(seed: int, batch: int, length: int, heads: int, dim: int):
    rng = np.random.default_rng(seed)
    query, key, value = (jnp.asarray(rng.normal(size=(batch, length, heads, dim)).astype(np.float32)) for _ in range(3))
    return query, key, value, rng.random((batch, length)) > 0.2


def attend(query, key, value, mask, window: int | str, implementation: str | None = None) -> jax.Array:
    """Of a global layer, or of a local one."""
    splats = no_splats(*query.shape[2:])
    output, _ = splat_attention(
        query, key, value, splats, window=window, attention_mask=jnp.asarray(mask), implementation=implementation
    )
    return output


def assert_by_definition(arrays, window: int | str, implementation: str | None = None) -> None:
    """Where a row is a token that sees a key."""
    query, key, value, mask = arrays
    got = attend(query, key, value, mask, window, implementation)
    expected = by_definition(query, key, value, mask, window)
    sees = mask & (np.abs(expected).sum(axis=(2, 3)) > 0)
    np.testing.assert_allclose(np.asarray(got)[sees], expected[sees], atol=1e-5)


@pytest.mark.parametrize("window", ["all", 1, 5, 40, 1000])
@pytest.mark.parametrize("length", [1, 40])
def test_short_sequences(length: int, window: int | str) -> None:
    assert_by_definition(inputs(length, 2, length, 3, 4), window)


@pytest.mark.parametrize(("length", "window"), [(513, "all"), (601, 9), (601, 256), (1024, "all"), (1024, 300)])
def test_sequences_of_several_blocks(length: int, window: int | str) -> None:
    assert_by_definition(inputs(length, 1, length, 1, 4), window)


@pytest.mark.parametrize("implementation", ["reference", "chunked", "recurrent"])
def test_every_implementation_is_local_attention_without_splats(implementation: str) -> None:
    assert_by_definition(inputs(0, 2, 150, 2, 4), 16, implementation)


def test_rows_without_a_key_are_finite_in_both_directions() -> None:
    query, key, value, _ = inputs(0, 1, 600, 2, 4)
    mask = np.zeros((1, 600), bool)
    for window in ("all", 8):
        gradient = jax.grad(lambda *qkv: attend(*qkv, mask, window).sum(), argnums=(0, 1, 2))  # noqa: B023
        gradients = jax.jit(gradient)(query, key, value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_scores_are_float32_whatever_comes_in() -> None:
    """Scores near 300 differ by less than bfloat16 can hold, and the order of the keys still decides."""
    query = jnp.full((1, 2, 1, 4), 8.0, jnp.bfloat16)
    key = jnp.asarray([[[[8.0, 8.0, 8.0, 8.0]], [[8.0, 8.0, 8.0, 8.0625]]]], jnp.bfloat16)
    value = jnp.asarray([[[[0.0] * 4], [[1.0] * 4]]], jnp.bfloat16)
    weight = float(causal_attention(query, key, value, jnp.ones((1, 2), jnp.int32))[0, 1, 0, 0])
    assert abs(weight - 1 / (1 + np.exp(-0.5))) < 5e-3


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_linear_in_bfloat16_accumulates_in_float32(rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, weight = (
        jnp.asarray(rng.normal(size=(rows, 700)), jnp.bfloat16),
        jnp.asarray(rng.normal(size=(50, 700)), jnp.bfloat16),
    )
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    got = np.asarray(jax.jit(linear)(x, weight), np.float64)
    # bfloat16 keeps 8 bits, and the result is rounded once.
    np.testing.assert_allclose(got, expected, rtol=2**-8, atol=1e-2)
