"""What a layer does with its parameters: a product with a PyTorch-layout weight, and the rows of a table.

May be changed here: how these and their gradients are computed on each platform. Callers rely only on the results.

A parameter may have more bits than the computation. If it were cast before it is used, its gradient would have the
bits of the computation, and devices would add up rounded gradients. So the functions here take the parameter as it is,
and its gradient is added up in float32 and comes in its own dtype.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsa_jax.ops.partition import BATCH, TABLE, keep_whole, per_rows_and_heads, sum_of_table
from gsa_jax.ops.precision import precision_of

_FEW_ROWS = 8
"""Rows up to which a bfloat16 product is bound by reading the weight (decoding, not prefill)."""


@jax.custom_vjp
def linear(
    x: Float[Array, "*batch E"], weight: Float[Array, "F E"], bias: Float[Array, "F"] | None = None
) -> Float[Array, "*batch F"]:
    """Computes `x @ weight.T + bias` in the dtype of `x`; products are accumulated in float32.

    The weight stays `[out, in]` as PyTorch stores it: a conversion then moves no bytes, and on CPU each output is
    a dot product over contiguous memory, which is what bounds the speed of decoding.
    """
    weight = weight.astype(x.dtype)
    if weight.dtype == jnp.bfloat16 and x.size <= _FEW_ROWS * x.shape[-1]:
        out = jax.lax.platform_dependent(x, weight, cpu=_row_reduction, default=_product)
    else:
        out = _product(x, weight)
    return out if bias is None else out + bias.astype(x.dtype)


def _linear_forward(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, Any]:
    return linear(x, weight, bias), (x, weight, bias)


def _linear_backward(residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, weight, bias = residuals
    batch = tuple(range(x.ndim - 1))
    of_x = _tensordot(cotangent, weight.astype(x.dtype), 1).astype(x.dtype)
    of_weight = _tensordot(cotangent, x, (batch, batch)).astype(weight.dtype)
    if bias is None:
        return of_x, of_weight, None
    return of_x, of_weight, jnp.sum(cotangent, axis=batch, dtype=jnp.float32).astype(bias.dtype)


linear.defvjp(_linear_forward, _linear_backward)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _tensordot(x, weight, (-1, -1)).astype(x.dtype)


def _tensordot(x: jax.Array, y: jax.Array, axes: Any) -> jax.Array:
    return jnp.tensordot(x, y, axes, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


def _row_reduction(x: jax.Array, weight: jax.Array) -> jax.Array:
    # XLA's CPU dot first writes a bfloat16 weight out in float32, which costs far more memory traffic than reading
    # it; a fused multiply and reduce converts in registers. The barrier ties the weight to its input, or XLA would
    # move the conversion out of a decoding loop and read float32 weights at each step after all.
    x, weight = jax.lax.optimization_barrier((x, weight))
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    wide = weight.astype(jnp.float32)
    out = jnp.stack([jnp.sum(wide * row, axis=-1) for row in rows])
    return out.reshape(*x.shape[:-1], weight.shape[0]).astype(x.dtype)


def look_up(table: Float[Array, "V E"], rows: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch E"]:
    """Rows of a table in `dtype`; NaN for numbers that it does not have."""
    return _look_up(dtype, table, rows)


def _take(dtype: Any, table: jax.Array, rows: jax.Array) -> jax.Array:
    # A mesh gathers the table before the rows are taken: the head needs it whole anyway.
    return jnp.take(keep_whole(table.astype(dtype)), rows, axis=0)


_look_up = jax.custom_vjp(_take, nondiff_argnums=(0,))


def _look_up_forward(dtype: Any, table: jax.Array, rows: jax.Array) -> tuple[jax.Array, Any]:
    return _take(dtype, table, rows), (table, rows)


def _look_up_backward(dtype: Any, residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None]:
    table, rows = residuals

    def on_device(rows: jax.Array, cotangent: jax.Array) -> jax.Array:
        return sum_of_table(jnp.zeros(table.shape, jnp.float32).at[rows].add(cotangent.astype(jnp.float32)))

    return per_rows_and_heads(on_device, (BATCH, BATCH), TABLE)(rows, cotangent).astype(table.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)
