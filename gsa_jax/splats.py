"""The parameters of splats.

May be changed here: how splats start.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gsa_jax.config import GPTNeoConfig


def init_splats(
    key: jax.Array, config: GPTNeoConfig, dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "H S D"], Float[Array, "H S"]]:
    """Centres and log-scales for one layer of a model that has seen no data.

    Standard normal centres are distinct, which is all that can be asked of them before they see queries and keys;
    scales are 1.
    """
    assert config.splats is not None, "the configuration has no splats"
    shape = (config.num_heads, config.splats.num_splats)
    return jax.random.normal(key, (*shape, config.head_dim), dtype), jnp.zeros(shape, dtype)
