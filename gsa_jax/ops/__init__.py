"""Pure functions of arrays; nothing here knows about Flax.

Letters used in shapes throughout the project:

    B batch   T tokens (queries)   K tokens (keys)   H heads   D head_dim   S splats per head
    E hidden_size   F width of the MLP   V vocabulary   C capacity of a cache, in tokens
"""

from gsa_jax.ops.linear import linear
from gsa_jax.ops.softmax import causal_attention, single_query_attention

__all__ = ["causal_attention", "linear", "single_query_attention"]
