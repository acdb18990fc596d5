"""What layers do with parameters, and above all their gradients, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.ops import linear, look_up


def wide(x) -> np.ndarray:
    return np.asarray(x, np.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_gradients_of_parameters_are_float32_whatever_the_computation_is(dtype, tolerance):
    """Those of inputs, like outputs, have the bits of the computation."""
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(4, 32, n)), jnp.dtype(dtype)) for n in (24, 40))
    weight, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((40, 24), (40,)))
    output, backward = jax.vjp(linear, x, weight, bias)
    of_x, of_weight, of_bias = backward(cotangent)
    assert (output.dtype, of_x.dtype, of_weight.dtype, of_bias.dtype) == (dtype, dtype, "float32", "float32")

    def close(got, expected, tolerance):
        np.testing.assert_allclose(wide(got), expected, atol=tolerance * np.abs(expected).max())

    close(output, wide(x) @ wide(weight).T + wide(bias), 2 * tolerance)
    close(of_x, wide(cotangent) @ wide(weight), 2 * tolerance)
    close(of_weight, np.einsum("bto,bti->oi", wide(cotangent), wide(x)), 1e-6)
    close(of_bias, wide(cotangent).sum((0, 1)), 1e-6)


def test_a_row_that_is_looked_up_often_gets_all_of_its_gradient():
    """Added up in bfloat16, 1 + 1 + ... would stop at 256."""
    table = jnp.arange(6.0).reshape(3, 2)
    rows = jnp.concatenate([jnp.zeros(1000, jnp.int32), jnp.array([2], jnp.int32)])
    found, backward = jax.vjp(lambda table: look_up(table, rows, jnp.bfloat16), table)
    assert found.dtype == jnp.bfloat16 and found[-1].tolist() == [4, 5]
    np.testing.assert_array_equal(backward(jnp.ones_like(found))[0], [[1000, 1000], [0, 0], [1, 1]])


def test_a_row_that_a_table_does_not_have_is_nan():
    """Also where it is the gradient that is asked for, and it has none."""
    table = jnp.ones((3, 2))
    found, backward = jax.vjp(lambda table: look_up(table, jnp.array([3], jnp.int32), jnp.float32), table)
    assert np.isnan(found).all() and not backward(found)[0].any()
