"""Text generation: one prefill, then a jitted loop that decodes token by token.

May be changed here: the loop and its buckets. How a token is chosen is in `gsa_jax.sampling`, what is remembered in
`gsa_jax.cache`.

Prompts are padded on the left to a length bucket, so a new prompt compiles nothing as long as its bucket is known.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.cache import Cache
from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.sampling import Greedy, Sampler

_SMALLEST_PROMPT_BUCKET = 16
_NEW_TOKENS_BUCKET = 64


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


@functools.partial(jax.jit, static_argnames=("graphdef", "cache_length", "room"))
def _prefill(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    key: jax.Array,
    *,
    cache_length: int,
    room: int,
) -> _State:
    model = nnx.merge(graphdef, params)
    logits, cache = model.prefill(input_ids, attention_mask, cache_length)
    batch = input_ids.shape[0]
    tokens = jnp.zeros((batch, room), jnp.int32)
    return _State(cache, logits, tokens, jnp.zeros((), jnp.int32), jnp.zeros((batch,), bool), key)


def _decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: _State,
    sampler: Sampler,
    stop: jax.Array,
    eos_token_id: jax.Array,
    pad_token_id: jax.Array,
) -> _State:
    """Generates until `stop` tokens are written or every row is done; `eos_token_id` < 0 never ends a row."""
    model = nnx.merge(graphdef, params)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < stop) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        token = sampler(state.logits, jax.random.fold_in(state.key, state.step))
        token = jnp.where(state.done, pad_token_id, token)
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step))
        logits, cache = model.decode(token, state.cache)
        return _State(cache, logits, tokens, state.step + 1, state.done | (token == eos_token_id), state.key)

    return jax.lax.while_loop(unfinished, advance, state)


@functools.cache
def _jitted_decode(on_cpu_in_float32: bool) -> Callable[..., _State]:
    # In float32 on CPU, XLA copies the caches at each step unless it may look at which parts are read and written: with
    # a prompt of 1,024 tokens that made decoding 1.15 times slower. In bfloat16 it was the option that did.
    options = {"xla_cpu_copy_insertion_use_region_analysis": True} if on_cpu_in_float32 else None
    # The state is donated: without that, every call would copy the caches once.
    return jax.jit(_decode, static_argnames=("graphdef",), donate_argnames=("state",), compiler_options=options)


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
    eos = -1 if eos is None else eos
    pad = max(eos, 0) if pad_token_id is None else pad_token_id
    input_ids, attention_mask = _pad_left(prompts)
    room = _round_up(max_new_tokens, _NEW_TOKENS_BUCKET)
    graphdef, params = nnx.split(model)
    state = _prefill(
        graphdef,
        params,
        input_ids,
        attention_mask,
        jax.random.key(seed),
        cache_length=input_ids.shape[1] + room,
        room=room,
    )
    decode = _jitted_decode(jax.default_backend() == "cpu" and jnp.dtype(model.dtype) == jnp.float32)
    written = 0
    while written < max_new_tokens:
        stop = min(written + tokens_per_step, max_new_tokens)
        state = decode(graphdef, params, state, sampler or Greedy(), jnp.int32(stop), jnp.int32(eos), jnp.int32(pad))
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
        eos_token_id: ends a sequence; the configuration's if None, negative for none.
        pad_token_id: fills a sequence after its end; the end-of-sequence token if None.

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
    input_ids = np.zeros((len(prompts), bucket), np.int32)
    attention_mask = np.zeros((len(prompts), bucket), bool)
    for row, prompt in enumerate(prompts):
        input_ids[row, bucket - len(prompt) :] = prompt
        attention_mask[row, bucket - len(prompt) :] = True
    return input_ids, attention_mask


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
