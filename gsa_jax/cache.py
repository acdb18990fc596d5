"""What decoding remembers.

May be changed here: what is kept beside the states of the layers. What a layer keeps is `gsa_jax.ops.SplatState`: a
ring of the last W keys and values, and sums over each splat for what is older. A layer that attends exactly to all of
the past has a ring with room for all of it; any other layer's state does not grow with the context.
"""

import dataclasses
import functools

import jax
from jaxtyping import Array, Int

from gsa_jax.ops import SplatState


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "tokens"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Decoding state of the whole model.

    Attributes:
        layers: one per layer.
        tokens: how many real tokens each sequence has so far, padding not counted.
    """

    layers: tuple[SplatState, ...]
    tokens: Int[Array, " B"]
