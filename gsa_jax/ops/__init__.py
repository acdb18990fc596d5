"""Pure functions of arrays; nothing here knows about Flax.

Letters used in shapes throughout the project:

    B batch   T tokens (queries)   K tokens (keys)   H heads   D head_dim   S splats per head
    E hidden_size   F width of the MLP   V vocabulary   W window in tokens

May be changed here: what the rest of the package may use of the operations, and the letters.
"""

from gsa_jax.ops.api import splat_attention
from gsa_jax.ops.linear import linear, look_up
from gsa_jax.ops.softmax import causal_attention
from gsa_jax.ops.state import Splats, SplatState, init_splat_state, no_splats

__all__ = [
    "SplatState",
    "Splats",
    "causal_attention",
    "init_splat_state",
    "linear",
    "look_up",
    "no_splats",
    "splat_attention",
]
