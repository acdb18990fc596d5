"""Attention with learned maps of queries and keys in place of splats: what other methods are compared in.

May be changed here: what of the exact attention stays. What is done with the maps is in
`hedgehog.py` and `recall_based.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

from gsa_jax.attention import GPTNeoSelfAttention


class MappedSelfAttention(GPTNeoSelfAttention):
    """The projections of an exact attention, no window, no kept keys, and maps as parameters by their names."""

    def __init__(self, exact: GPTNeoSelfAttention, maps: Mapping[str, jax.Array]) -> None:
        self.num_heads, self.head_dim, self.window, self.kept = exact.num_heads, exact.head_dim, 0, 0
        self.query_scale, self.key_scale = exact.query_scale, exact.key_scale
        self.attention_implementation = exact.attention_implementation
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = exact.q_proj, exact.k_proj, exact.v_proj, exact.out_proj
        for name, value in maps.items():
            setattr(self, name, nnx.Param(value))
