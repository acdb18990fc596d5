"""How exactly matrix products are computed.

May be changed here: what a dtype promises. TPUs and GPUs multiply float32 arrays in fewer bits than float32 has unless
a product asks for all of them (bfloat16 on TPU, TF32 on GPU), so every product of this package states its precision.
"""

import jax
import jax.numpy as jnp

EXPONENTS = jax.lax.Precision.HIGHEST
"""Of products that become exponents, whatever the model's dtype: an error of 0.01 in one is an error of 1 %."""


def precision_of(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """The precision of products in a model that computes in `dtype`: float32 means float32.

    A 16-bit model takes the platform's fast product. Products of its queries and keys are exact all the same, because
    the fast product keeps all bits of 16-bit numbers; they are added up in float32.
    """
    return jax.lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else jax.lax.Precision.DEFAULT
