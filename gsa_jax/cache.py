"""What decoding remembers: keys and values per layer, in ring buffers.

May be changed here: what a layer keeps and how it is laid out. A global layer gets room for the whole sequence, so its
ring never wraps; a local layer gets `window_size` slots.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.config import GPTNeoConfig


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key", "value"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The last C tokens of one layer; the token at slot t lies at index `t % C`.

    Heads come before tokens, so that each head's dot products run over contiguous memory.
    """

    key: Float[Array, "B H C D"]
    value: Float[Array, "B H C D"]

    @property
    def capacity(self) -> int:
        return self.key.shape[2]

    def fill(self, key: Float[Array, "B T H D"], value: Float[Array, "B T H D"]) -> LayerCache:
        """Stores the tokens of slots 0 .. T-1, of which the last C remain."""
        length, capacity = key.shape[1], self.capacity

        def store(cached: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(cached.dtype).swapaxes(1, 2)
            if length <= capacity:
                return cached.at[:, :, :length].set(new)
            return jnp.roll(new[:, :, length - capacity :], length % capacity, axis=2)

        return LayerCache(store(self.key, key), store(self.value, value))

    def append(self, key: Float[Array, "B 1 H D"], value: Float[Array, "B 1 H D"], slot: Int[Array, ""]) -> LayerCache:
        """Stores the token of one slot, over the one that is C slots older."""
        start = (0, 0, slot % self.capacity, 0)

        def store(cached: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(cached, new.astype(cached.dtype).swapaxes(1, 2), start)

        return LayerCache(store(self.key, key), store(self.value, value))

    def visible(self, mask: Bool[Array, "B L"], slot: Int[Array, ""]) -> Bool[Array, "B C"]:
        """Which entries the token of `slot`, not yet stored, attends to: all real ones but the one it will replace."""
        age = (slot - jnp.arange(self.capacity)) % self.capacity
        slots = slot - age
        return (age > 0) & (slots >= 0) & jnp.take(mask, jnp.maximum(slots, 0), axis=1)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "mask", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Decoding state of the whole model.

    Attributes:
        layers: one per layer.
        mask: True for each slot that holds a real token, False for padding and for slots not yet written.
        length: slots written so far, padding included.
    """

    layers: tuple[LayerCache, ...]
    mask: Bool[Array, "B L"]
    length: Int[Array, ""]


def init_cache(config: GPTNeoConfig, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """An empty cache for `length` tokens per sequence, padding included."""

    def layer(kind: str) -> LayerCache:
        capacity = length if kind == "global" else min(config.window_size, length)
        shape = (batch, config.num_heads, capacity, config.head_dim)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return Cache(
        layers=tuple(layer(kind) for kind in config.attention_layers),
        mask=jnp.zeros((batch, length), bool),
        length=jnp.zeros((), jnp.int32),
    )
