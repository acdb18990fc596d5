"""Based's linear attention, for comparison: second-order Taylor features of projected queries and keys.

Arora et al. (2024), "Simple linear attention language models balance the recall-throughput tradeoff", arXiv
2402.18668, section 4: phi(q) . phi(k) = 1 + q'.k' + (q'.k')^2 / 2, the beginning of the series of exp(q'.k'), for
learned projections q' and k' to few dimensions. A state has sums of phi(k) v and of phi(k).

May be changed here: the features, and where projections start.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from mapped_attention import MappedSelfAttention

from gsa_jax import GPTNeoForCausalLM
from gsa_jax.ops import SplatState
from gsa_jax.parameters import attention_tensor, build_model

MAPS = ("splat_query_map", "splat_key_map")
"""Projections of a head's queries and keys, `[H, F, D]`; named as parameters of splats, and trained like them."""


def taylor_features(x: Float[Array, "*rows F"]) -> Float[Array, "*rows G"]:
    """Features whose product for two vectors x and y is 1 + x.y + (x.y)^2 / 2.

    x_i x_j and x_j x_i are one feature here, with the weight of both: 1 + F + F (F + 1) / 2 features where the paper
    counts 1 + F + F^2, and the same products.
    """
    first, second = np.triu_indices(x.shape[-1])
    scale = jnp.where(first == second, np.sqrt(0.5), 1.0).astype(x.dtype)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, x[..., first] * x[..., second] * scale], axis=-1)


def state_bytes_of_based(features: int, head_dim: int, heads: int) -> int:
    """Bytes of the sums for projections to `features` dimensions, float32."""
    return 4 * heads * taylor_features(jnp.zeros(features)).size * (head_dim + 1)


class BasedSelfAttention(MappedSelfAttention):
    """Attention by Taylor features over all tokens so far.

    Written as the matrix of weights, which gives the same numbers as the sums do, for rows without padding.
    """

    def _attn(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B T H D"],
        value: Float[Array, "B T H D"],
        **call: Any,
    ) -> tuple[Float[Array, "B T H D"], SplatState | None]:
        query, key = (
            taylor_features(jnp.einsum("bthd,hfd->bthf", x, getattr(self, name)[...]))
            for x, name in zip((query, key), MAPS, strict=True)
        )
        weights = jnp.tril(jnp.einsum("bihg,bjhg->bhij", query, key))
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return jnp.einsum("bhij,bjhd->bihd", weights, value), None


def initial_maps(
    layer: int, query: Float[np.ndarray, "N T H D"], key: Float[np.ndarray, "N T H D"], features: int
) -> dict[str, jax.Array]:
    """The same directions for queries and keys: those in which keys vary most, as large as makes q'.k' about 1."""
    found = []
    for head in range(key.shape[2]):
        keys = key[:, :, head].reshape(-1, key.shape[-1])
        _, directions = np.linalg.eigh(np.cov(keys.T))
        directions = directions.T[::-1][:features]
        lengths = [np.sqrt(np.mean((x[:, :, head] @ directions.T) ** 2) * features**0.5) for x in (query, key)]
        found.append([directions / length for length in lengths])
    maps = np.asarray(found, np.float32).swapaxes(0, 1)
    return {attention_tensor(layer, name): jnp.asarray(x) for name, x in zip(MAPS, maps, strict=True)}


def build_based(config: Any, layer: int, params: dict[str, jax.Array]) -> GPTNeoForCausalLM:
    """The plain model of `config` but for Taylor features in one layer; `params` has their projections as well."""
    names = {attention_tensor(layer, name): name for name in MAPS}
    model = build_model(config, {name: tensor for name, tensor in params.items() if name not in names})
    attn = model.transformer.h[layer].attn
    attn.attention = BasedSelfAttention(attn.attention, {leaf: params[name] for name, leaf in names.items()})
    return model
