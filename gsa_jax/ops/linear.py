"""The matrix product with a PyTorch-layout weight.

May be changed here: how `x @ weight.T` is computed on each platform. Callers rely only on the result.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gsa_jax.ops.precision import precision_of

_FEW_ROWS = 8
"""Rows up to which a bfloat16 product is bound by reading the weight (decoding, not prefill)."""


def linear(x: Float[Array, "*batch E"], weight: Float[Array, "F E"]) -> Float[Array, "*batch F"]:
    """Computes `x @ weight.T`, accumulated in float32 and returned in the dtype of `x`.

    The weight stays `[out, in]` as PyTorch stores it: a conversion then moves no bytes, and on CPU each output is
    a dot product over contiguous memory, which is what bounds the speed of decoding.
    """
    if weight.dtype == jnp.bfloat16 and x.size <= _FEW_ROWS * x.shape[-1]:
        return jax.lax.platform_dependent(x, weight, cpu=_row_reduction, default=_product)
    return _product(x, weight)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    precision = precision_of(x.dtype)
    return jnp.einsum("...i,oi->...o", x, weight, precision=precision, preferred_element_type=jnp.float32).astype(
        x.dtype
    )


def _row_reduction(x: jax.Array, weight: jax.Array) -> jax.Array:
    # XLA's CPU dot first writes a bfloat16 weight out in float32, which costs far more memory traffic than reading
    # it; a fused multiply and reduce converts in registers. The barrier ties the weight to its input, or XLA would
    # move the conversion out of a decoding loop and read float32 weights at each step after all.
    x, weight = jax.lax.optimization_barrier((x, weight))
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    wide = weight.astype(jnp.float32)
    out = jnp.stack([jnp.sum(wide * row, axis=-1) for row in rows])
    return out.reshape(*x.shape[:-1], weight.shape[0]).astype(x.dtype)
