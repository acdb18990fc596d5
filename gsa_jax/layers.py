"""Layers that Flax does not have in the form this model needs.

May be changed here: initialisation of a projection, and the table of activations.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gsa_jax.ops import linear

ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Hugging Face activation name -> function (`transformers` v4.57 `ACT2FN`); the three tanh forms are one formula."""


class Linear(nnx.Module):
    """`x @ weight.T + bias` with the weight `[out, in]` of `torch.nn.Linear`; `gsa_jax.ops.linear` says why."""

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool, stddev: float, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(stddev)
        self.weight = nnx.Param(init(rngs.params(), (out_features, in_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if use_bias else None

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch F"]:
        """Computed in the dtype of `x`, whatever that of the parameters is."""
        return linear(x, self.weight[...], None if self.bias is None else self.bias[...])
