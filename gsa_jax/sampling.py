"""How the next token is chosen from its logits.

May be changed here: add a sampler by adding a frozen dataclass with `__call__(logits, key)`. Samplers are pytrees:
numbers that may change without recompiling are data, the rest is static.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsa_jax.errors import InputError


@runtime_checkable
class Sampler(Protocol):
    """A pytree that maps logits to tokens."""

    def __call__(self, logits: Float[Array, "B V"], key: jax.Array) -> Int[Array, " B"]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token."""

    def __call__(self, logits: Float[Array, "B V"], key: jax.Array) -> Int[Array, " B"]:
        del key
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@no_type_check  # a pytree also holds shapes
@functools.partial(jax.tree_util.register_dataclass, data_fields=["temperature", "top_p"], meta_fields=["top_k"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Categorical:
    """Draws from softmax(logits / temperature), cut first to the top k, then to the nucleus, as Hugging Face does.

    Attributes:
        temperature: > 0.
        top_k: keep this many of the most likely tokens; None keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; None keeps all
            (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
    """

    temperature: float | jax.Array = 1.0
    top_k: int | None = None
    top_p: float | jax.Array | None = None

    def filtered(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Tempered logits, with -inf for every token that must not be drawn."""
        logits = logits / self.temperature
        if self.top_k is not None:
            kept = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0]
            logits = jnp.where(logits < kept[:, -1:], -jnp.inf, logits)
        if self.top_p is not None:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            probabilities = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            # The most likely token has nothing before it, so one token always stays. A sum of all the others may round
            # to 1, and a nucleus of 1 is everything all the same.
            inside = (before < self.top_p) | (jnp.asarray(self.top_p) >= 1)
            threshold = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < threshold, -jnp.inf, logits)
        return logits

    def __call__(self, logits: Float[Array, "B V"], key: jax.Array) -> Int[Array, " B"]:
        return jax.random.categorical(key, self.filtered(logits), axis=-1).astype(jnp.int32)


def make_sampler(*, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Sampler:
    """The sampler for these settings; temperature 0 is greedy.

    Raises:
        InputError: a setting is out of range, or is given although a temperature of 0 ignores it.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature = {temperature}: must be finite and >= 0")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k = {top_k}: must be >= 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p = {top_p}: must be in (0, 1]")
    if temperature == 0:
        if top_k is not None or top_p is not None:
            raise InputError("temperature = 0 is greedy and ignores top_k and top_p; leave them out")
        return Greedy()
    return Categorical(temperature=temperature, top_k=top_k, top_p=top_p)
