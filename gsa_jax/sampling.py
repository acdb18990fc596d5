"""How the next token is chosen from its logits: what is done to them first, and what is then drawn.

May be changed here: add a sampler by adding a frozen dataclass with `__call__(logits, key)`. Samplers are pytrees:
numbers that may change without recompiling are data, the rest is static. What is off is None, so that it is not in the
compiled program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple, Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.errors import InputError
from gsa_jax.generation_config import GenerationConfig


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
@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["temperature", "top_p", "min_p"], meta_fields=["top_k"]
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Categorical:
    """Draws from softmax(logits / temperature), cut to the top k, the nucleus and `min_p`, in Hugging Face's order.

    Attributes:
        temperature: > 0.
        top_k: keep this many of the most likely tokens; None keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; None keeps all
            (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
        min_p: keep tokens with at least this share of the probability of the most likely one; None keeps all
            (Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling").
    """

    temperature: float | jax.Array = 1.0
    top_k: int | None = None
    top_p: float | jax.Array | None = None
    min_p: float | jax.Array | None = None

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
        if self.min_p is not None:
            probabilities = jax.nn.softmax(logits, axis=-1)
            least = self.min_p * jnp.max(probabilities, axis=-1, keepdims=True)
            logits = jnp.where(probabilities < least, -jnp.inf, logits)
        return logits

    def __call__(self, logits: Float[Array, "B V"], key: jax.Array) -> Int[Array, " B"]:
        return jax.random.categorical(key, self.filtered(logits), axis=-1).astype(jnp.int32)


def make_sampler(
    *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Sampler:
    """The sampler for these settings; temperature 0 is greedy.

    Raises:
        InputError: a setting is out of range, or is given although a temperature of 0 ignores it.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature = {temperature}: must be finite and >= 0")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k = {top_k}: must be >= 1; that of the vocabulary keeps all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p = {top_p}: must be in (0, 1]")
    if min_p is not None and not 0 <= min_p <= 1:
        raise InputError(f"min_p = {min_p}: must be in [0, 1]")
    if temperature == 0:
        if (top_k, top_p, min_p) != (None, None, None):
            raise InputError("temperature = 0 is greedy and ignores top_k, top_p and min_p; leave them out")
        return Greedy()
    return Categorical(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def default_sampler(
    defaults: GenerationConfig,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Sampler:
    """The sampler that a model's own configuration asks for, with what is given here instead of what it says.

    Raises:
        InputError: as `make_sampler`.
    """
    if temperature is None:
        temperature = defaults.temperature if defaults.do_sample else 0.0
    if temperature == 0:
        return make_sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return make_sampler(
        temperature=temperature,
        top_k=defaults.top_k if top_k is None else top_k,
        top_p=defaults.top_p if top_p is None else top_p,
        min_p=defaults.min_p if min_p is None else min_p,
    )


class History(NamedTuple):
    """The tokens of each row so far: its prompt, padded on the left, and behind it what has been generated.

    Attributes:
        is_token: False for padding, and for slots that are not yet written.
        end: the first slot that is not yet written, the same for all rows.
    """

    tokens: Int[Array, "B L"]
    is_token: Bool[Array, "B L"]
    end: Int[Array, ""]


@no_type_check  # a pytree also holds shapes
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["repetition_penalty", "min_new_tokens"],
    meta_fields=["no_repeat_ngram_size"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsProcessor:
    """What is done to logits before a token is chosen, in Hugging Face's order. What is None is not done.

    Attributes:
        repetition_penalty: > 0: logits of tokens that the row has already are divided by it, negative ones multiplied
            (Keskar et al. 2019, "CTRL"). Padding does not count, while it does in Hugging Face's batches.
        no_repeat_ngram_size: no n tokens that follow one another in the row do so again; n >= 1.
        min_new_tokens: the row does not end before so many tokens have been generated.
    """

    repetition_penalty: float | jax.Array | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | jax.Array | None = None

    @property
    def reads_history(self) -> bool:
        """Whether it needs to know the tokens so far."""
        return self.repetition_penalty is not None or self.no_repeat_ngram_size is not None

    def __call__(
        self,
        logits: Float[Array, "B V"],
        history: History | None,
        step: Int[Array, ""],
        eos_token_id: Int[Array, " E"],
    ) -> Float[Array, "B V"]:
        """The processed logits, -inf for tokens that must not come next.

        Args:
            history: None if not `reads_history`.
            step: how many tokens have been generated.
            eos_token_id: tokens that end a row; negative ones do not exist.
        """
        assert history is not None or not self.reads_history, "the loop gives it what it reads"
        if self.repetition_penalty is not None and history is not None:
            seen = _mark(logits, history.tokens, history.is_token)
            penalty = jnp.asarray(self.repetition_penalty, logits.dtype)
            logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
        if self.no_repeat_ngram_size is not None and history is not None:
            logits = jnp.where(_completes_ngram(logits, history, self.no_repeat_ngram_size), -jnp.inf, logits)
        if self.min_new_tokens is not None:
            slots = jnp.where(eos_token_id < 0, logits.shape[-1], eos_token_id)
            ended = logits.at[:, slots].set(-jnp.inf, mode="drop")
            logits = jnp.where(step < self.min_new_tokens, ended, logits)
        return logits


def _mark(logits: Float[Array, "B V"], tokens: Int[Array, "B N"], which: Bool[Array, "B N"]) -> Bool[Array, "B V"]:
    """The vocabulary, True for each of these tokens that `which` names."""
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros(logits.shape, bool).at[rows, tokens].max(which)


def _completes_ngram(logits: Float[Array, "B V"], history: History, size: int) -> Bool[Array, "B V"]:
    """Tokens that would make the last `size - 1` tokens of a row into `size` that it has already."""
    windows = history.tokens.shape[1] - size + 1
    if windows < 1:
        return jnp.zeros(logits.shape, bool)
    last = jax.lax.dynamic_slice_in_dim(history.tokens, history.end - (size - 1), size - 1, axis=1)
    # Tokens of a row stand side by side, so a window from a token to a token has no padding in it.
    repeats = history.is_token[:, :windows] & history.is_token[:, size - 1 :]
    for place in range(size - 1):
        repeats &= history.tokens[:, place : place + windows] == last[:, place : place + 1]
    return _mark(logits, history.tokens[:, size - 1 :], repeats)
