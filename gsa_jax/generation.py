"""Text generation: one prefill, then a jitted loop that decodes token by token.

May be changed here: the loop and its buckets. How a token is chosen is in `gsa_jax.sampling`.

Prompts are padded on the left to a length bucket, so a new prompt compiles nothing as long as its bucket is known. A
long prompt is read in chunks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.model import Cache, GPTNeoForCausalLM
from gsa_jax.sampling import Greedy, Sampler

_SMALLEST_PROMPT_BUCKET = 16
_CHUNK = 1024
"""Tokens of a prompt that are read at once; a longer prompt takes several passes of the same program."""

_NEW_TOKENS_BUCKET = 64


@no_type_check  # a pytree also holds shapes
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "logits", "tokens", "step", "done", "key"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _State:
    """What the loop carries.

    Attributes:
        logits: of the token that comes next.
        tokens: generated so far; the rest is not yet written.
        step: how many are written.
        done: rows that have produced the end-of-sequence token.
    """

    cache: Cache
    logits: Float[Array, "B V"]
    tokens: Int[Array, "B M"]
    step: Int[Array, ""]
    done: Bool[Array, " B"]
    key: jax.Array


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _prefill(
    graphdef: nnx.GraphDef, params: nnx.State, input_ids: jax.Array, attention_mask: jax.Array, *, capacity: int
) -> tuple[jax.Array, Cache]:
    return nnx.merge(graphdef, params).prefill(input_ids, attention_mask, capacity)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("cache",))
def _extend(
    graphdef: nnx.GraphDef, params: nnx.State, input_ids: jax.Array, attention_mask: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    return nnx.merge(graphdef, params).extend(input_ids, attention_mask, cache)


# The state is donated: without that, every call would copy the cache once.
@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def _decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: _State,
    sampler: Sampler,
    stop: jax.Array,
    eos_token_ids: jax.Array,
    pad_token_id: jax.Array,
) -> _State:
    """Generates until `stop` tokens are written or every row is done; a row ends with any of `eos_token_ids`."""
    model = nnx.merge(graphdef, params)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < stop) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        token = sampler(state.logits, jax.random.fold_in(state.key, state.step))
        token = jnp.where(state.done, pad_token_id, token)
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step))
        logits, cache = model.extend(token[:, None], jnp.ones_like(token[:, None], bool), state.cache)
        return _State(cache, logits, tokens, state.step + 1, state.done | jnp.isin(token, eos_token_ids), state.key)

    return jax.lax.while_loop(unfinished, advance, state)


def generate_stream(
    model: GPTNeoForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    tokens_per_step: int = 1,
) -> Iterator[np.ndarray]:
    """Like `generate`, but yields `[B, n]` new tokens as they come, `tokens_per_step` at a time."""
    _check_request(model.config, prompts, max_new_tokens)
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    ends = (-1,) if eos is None else (eos,) if isinstance(eos, int) else eos
    pad = max(ends[0], 0) if pad_token_id is None else pad_token_id
    input_ids, attention_mask = _pad_left(prompts)
    room = _round_up(max_new_tokens, _NEW_TOKENS_BUCKET)
    graphdef, params = nnx.split(model)
    capacity = _capacity(model.config, input_ids.shape[1] + room)
    logits, cache = _prefill(graphdef, params, input_ids[:, :_CHUNK], attention_mask[:, :_CHUNK], capacity=capacity)
    for start in range(_CHUNK, input_ids.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        logits, cache = _extend(graphdef, params, input_ids[:, chunk], attention_mask[:, chunk], cache)
    tokens, done = jnp.zeros((len(prompts), room), jnp.int32), jnp.zeros((len(prompts),), bool)
    state = _State(cache, logits, tokens, jnp.zeros((), jnp.int32), done, jax.random.key(seed))
    written = 0
    while written < max_new_tokens:
        stop = min(written + tokens_per_step, max_new_tokens)
        state = _decode(
            graphdef, params, state, sampler or Greedy(), jnp.int32(stop), jnp.asarray(ends), jnp.int32(pad)
        )
        step = int(state.step)
        yield np.asarray(state.tokens)[:, written:step]  # sliced on the host, where it compiles nothing
        if step < stop or bool(jnp.all(state.done)):
            return
        written = step


def generate(
    model: GPTNeoForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    seed: int = 0,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> np.ndarray:
    """Continues each prompt.

    Args:
        prompts: token ids, one sequence per prompt, of any lengths >= 1.
        max_new_tokens: at most this many are generated per prompt, >= 1.
        sampler: chooses tokens, see `gsa_jax.sampling`; greedy if None.
        seed: of the random choices; the same seed gives the same tokens.
        eos_token_id: ends a sequence; the configuration's, of which there may be several, if None; negative for none.
        pad_token_id: fills a sequence after its end; the first end-of-sequence token if None.

    Returns:
        int32 `[B, n]`: the new tokens alone; n <= max_new_tokens, smaller if every sequence ended before.

    Raises:
        InputError: an empty prompt, an id outside of the vocabulary, or more tokens than the model has positions.
    """
    (tokens,) = generate_stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        tokens_per_step=max(max_new_tokens, 1),
    )
    return tokens


def _check_request(config: GPTNeoConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {max_new_tokens}: must be >= 1")
    if not len(prompts):
        raise InputError("no prompt given")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {row} is empty; start it with the beginning-of-sequence token at least")
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise InputError(
                    f"prompt {row} holds token id {token}, outside of the vocabulary of {config.vocab_size}; "
                    "does the tokenizer belong to this model?"
                )
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens, with {max_new_tokens} new ones more than the "
                f"{config.max_position_embeddings} positions of the model; shorten one of the two"
            )


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    longest = max(len(prompt) for prompt in prompts)
    bucket = max(_SMALLEST_PROMPT_BUCKET, 1 << (longest - 1).bit_length())
    bucket = bucket if bucket <= _CHUNK else _round_up(longest, _CHUNK)
    input_ids = np.zeros((len(prompts), bucket), np.int32)
    attention_mask = np.zeros((len(prompts), bucket), bool)
    for row, prompt in enumerate(prompts):
        input_ids[row, bucket - len(prompt) :] = prompt
        attention_mask[row, bucket - len(prompt) :] = True
    return input_ids, attention_mask


def _capacity(config: GPTNeoConfig, slots: int) -> int:
    """`slots`, but at most the largest window: more slots would change nothing, but compile the prefill again."""
    windows = [slots if window == "all" else window for window in config.windows]
    return min(slots, max(windows))


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
