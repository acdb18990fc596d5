"""Generation of token ids: one prefill, then a jitted loop that decodes token by token.

May be changed here: the loop, its buckets, and the options. How a token is chosen is in `gsa_jax.sampling`, what a
prompt may be in `gsa_jax.prompts`, texts instead of ids in `gsa_jax.completion`.

Prompts are padded on the left to a length bucket, so a new prompt compiles nothing as long as its bucket is known. A
long prompt is read in chunks. Options that are off are not in the compiled loop.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.config import GPTNeoConfig, require_seed
from gsa_jax.errors import InputError
from gsa_jax.model import Cache, GPTNeoForCausalLM
from gsa_jax.prompts import Mask, Prompts, check_prompts, pad_left, prompt_ids
from gsa_jax.sampling import History, LogitsProcessor, Sampler, default_sampler
from gsa_jax.tokenizer import Continuation, Tokenizer

_CHUNK = 1024
"""Tokens of a prompt that are read at once; a longer prompt takes several passes of the same program."""

_NEW_TOKENS_BUCKET = 64

_TOKENS_BETWEEN_LOOKS = 16
"""Tokens that are decoded before the text is searched for what ends it."""


class GenerationOptions(TypedDict, total=False):
    """How to generate. What is left out or None is as `model.generation_config` says."""

    max_new_tokens: int | None
    """At most this many are generated per prompt, >= 1. To be given where the model's configuration does not."""
    sampler: Sampler | None
    """Chooses tokens, see `gsa_jax.sampling`."""
    seed: int
    """Of the random choices, in [0, 2**32), 0 if left out; the same seed gives the same tokens."""
    eos_token_id: int | Sequence[int] | None
    """Each of these ends a text; a negative number or an empty list for none."""
    pad_token_id: int | None
    """Fills a row after its end; the first end-of-sequence token if the model's configuration does not say either."""
    repetition_penalty: float | None
    """As in `gsa_jax.sampling.LogitsProcessor`; 1 is none."""
    no_repeat_ngram_size: int | None
    """As in `gsa_jax.sampling.LogitsProcessor`; 0 is none."""
    min_new_tokens: int | None
    """As in `gsa_jax.sampling.LogitsProcessor`; 0 is none."""
    stop: str | Sequence[str]
    """A text ends with the token that completes one of these, looked for in what follows the prompt."""
    tokenizer: Tokenizer | None
    """For prompts that are texts, and for `stop`."""
    attention_mask: Mask | None
    """`[B, T]`, 0 for padding, where the prompts are an array."""


@no_type_check  # a pytree also holds shapes
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "logits", "tokens", "logprobs", "step", "done", "key"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _State:
    """What the loop carries.

    Attributes:
        logits: of the token that comes next.
        tokens: generated so far; the rest is not yet written.
        logprobs: of the tokens, by the model alone; None where nobody asked.
        step: how many are written.
        done: rows that have ended.
    """

    cache: Cache
    logits: Float[Array, "B V"]
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"] | None
    step: Int[Array, ""]
    done: Bool[Array, " B"]
    key: jax.Array


@no_type_check  # a pytree also holds shapes
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["sampler", "processor", "prompt", "eos_token_id", "pad_token_id"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Choice:
    """What stays the same while a batch is decoded.

    Attributes:
        processor: None if there is nothing to do.
        prompt: ids and mask of the prompts; None if the processor does not read them.
        eos_token_id: negative where there is none.
    """

    sampler: Sampler
    processor: LogitsProcessor | None
    prompt: tuple[Int[Array, "B P"], Bool[Array, "B P"]] | None
    eos_token_id: Int[Array, " E"]
    pad_token_id: Int[Array, ""]

    def __call__(self, state: _State) -> Int[Array, " B"]:
        logits = state.logits
        if self.processor is not None:
            logits = self.processor(logits, self._history(state), state.step, self.eos_token_id)
        token = self.sampler(logits, jax.random.fold_in(state.key, state.step))
        return jnp.where(state.done, self.pad_token_id, token)

    def _history(self, state: _State) -> History | None:
        if self.prompt is None:
            return None
        ids, mask = self.prompt
        written = jnp.broadcast_to(jnp.arange(state.tokens.shape[1]) < state.step, state.tokens.shape)
        tokens = jnp.concatenate([ids, state.tokens], axis=1)
        return History(tokens, jnp.concatenate([mask, written], axis=1), ids.shape[1] + state.step)


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
def _decode(graphdef: nnx.GraphDef, params: nnx.State, state: _State, choice: _Choice, stop: jax.Array) -> _State:
    """Generates until `stop` tokens are written or every row is done."""
    model = nnx.merge(graphdef, params)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < stop) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        token = choice(state)
        tokens = jax.lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step))
        logprobs = state.logprobs
        if logprobs is not None:
            of_token = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=1)
            logprobs = jax.lax.dynamic_update_slice(logprobs, of_token, (0, state.step))
        done = state.done | jnp.any(token[:, None] == choice.eos_token_id, axis=1)
        logits, cache = model.extend(token[:, None], jnp.ones_like(token[:, None], bool), state.cache)
        return _State(cache, logits, tokens, logprobs, state.step + 1, done, state.key)

    return jax.lax.while_loop(unfinished, advance, state)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be generated, with all that the options leave out filled in, and checked.

    Attributes:
        prompts: token ids, without padding.
        processor: None if there is nothing to do.
        eos_token_id: none if empty.
        stop: texts; `tokenizer` is there if there are any.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    sampler: Sampler
    seed: int
    eos_token_id: tuple[int, ...]
    pad_token_id: int
    processor: LogitsProcessor | None
    stop: tuple[str, ...]
    tokenizer: Tokenizer | None


def make_request(model: GPTNeoForCausalLM, prompts: Prompts, **options: Unpack[GenerationOptions]) -> Request:
    """Checks prompts and options, and fills in what `model.generation_config` says.

    Raises:
        InputError: as `generate`.
    """
    unknown = options.keys() - GenerationOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}; there are those of GenerationOptions")
    defaults, config = model.generation_config, model.config

    def option(name: str) -> Any:
        given = options.get(name)
        return getattr(defaults, name) if given is None else given

    tokenizer = options.get("tokenizer")
    rows = prompt_ids(prompts, tokenizer, options.get("attention_mask"))
    max_new_tokens = option("max_new_tokens")
    if max_new_tokens is None:
        raise InputError("max_new_tokens: say how many at most; the model's generation_config.json does not")
    check_prompts(config, rows, max_new_tokens)
    seed = options.get("seed", 0)
    seed = int(seed) if isinstance(seed, np.integer) else seed
    require_seed(seed)
    eos = _end_tokens(option("eos_token_id"), config, given=options.get("eos_token_id") is not None)
    pad = option("pad_token_id")
    pad = (*eos, 0)[0] if pad is None else pad
    if not 0 <= pad < config.vocab_size:
        raise InputError(f"pad_token_id = {pad}: not in the vocabulary of {config.vocab_size} tokens")
    stop = options.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise InputError("stop: an empty text is in every text; give one with a character at least")
    if stop and tokenizer is None:
        raise InputError("stop: texts are looked for in text; give the tokenizer as well")
    return Request(
        prompts=rows,
        max_new_tokens=int(max_new_tokens),
        sampler=options.get("sampler") or default_sampler(defaults),
        seed=seed,
        eos_token_id=eos,
        pad_token_id=pad,
        processor=_processor(option("repetition_penalty"), option("no_repeat_ngram_size"), option("min_new_tokens")),
        stop=stop,
        tokenizer=tokenizer,
    )


def _end_tokens(
    value: int | Sequence[int] | np.ndarray | np.integer, config: GPTNeoConfig, *, given: bool
) -> tuple[int, ...]:
    """Those that the model can say. A configuration may name others, which then end nothing; an option may not."""
    ids = tuple(np.atleast_1d(np.asarray(value, np.int64)).tolist())
    for token in ids:
        if given and token >= config.vocab_size:
            raise InputError(f"eos_token_id = {token}: not in the vocabulary of {config.vocab_size} tokens")
    return tuple(token for token in ids if 0 <= token < config.vocab_size)


def _processor(penalty: float | None, ngram: int | None, least: int | None) -> LogitsProcessor | None:
    if penalty is not None and not 0 < penalty < float("inf"):
        raise InputError(f"repetition_penalty = {penalty}: must be a number > 0; 1 is none")
    for name, number in (("no_repeat_ngram_size", ngram), ("min_new_tokens", least)):
        if number is not None and number < 0:
            raise InputError(f"{name} = {number}: must be >= 0; 0 is none")
    asked = {
        "repetition_penalty": None if penalty in (None, 1) else float(penalty),
        "no_repeat_ngram_size": ngram or None,
        "min_new_tokens": least or None,
    }
    return None if set(asked.values()) == {None} else LogitsProcessor(**asked)


class Step(NamedTuple):
    """What a few turns of the loop have added to each row.

    Attributes:
        tokens: int32, the padding token after a row's end.
        counts: how many of them are of the row; its last one, where it has ended, is the one that ended it.
        logprobs: of the tokens, by the model alone: before anything is done to its logits. None unless asked for.
        ended: rows that have ended.
    """

    tokens: Int[np.ndarray, "B n"]
    counts: Int[np.ndarray, "B"]
    logprobs: Float[np.ndarray, "B n"] | None
    ended: Bool[np.ndarray, "B"]


def decode_steps(
    model: GPTNeoForCausalLM, request: Request, *, tokens_per_step: int, logprobs: bool = False
) -> Iterator[Step]:
    """Generates, and gives new tokens as they come, `tokens_per_step` at a time."""
    rows = len(request.prompts)
    input_ids, attention_mask = pad_left(request.prompts, _CHUNK)
    room = -(-request.max_new_tokens // _NEW_TOKENS_BUCKET) * _NEW_TOKENS_BUCKET
    graphdef, params = nnx.split(model)
    capacity = _capacity(model.config, input_ids.shape[1] + room)
    logits, cache = _prefill(graphdef, params, input_ids[:, :_CHUNK], attention_mask[:, :_CHUNK], capacity=capacity)
    for start in range(_CHUNK, input_ids.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        logits, cache = _extend(graphdef, params, input_ids[:, chunk], attention_mask[:, chunk], cache)
    state = _State(
        cache=cache,
        logits=logits,
        tokens=jnp.zeros((rows, room), jnp.int32),
        logprobs=jnp.zeros((rows, room), jnp.float32) if logprobs else None,
        step=jnp.zeros((), jnp.int32),
        done=jnp.zeros((rows,), bool),
        key=jax.random.key(request.seed),
    )
    reads_history = request.processor is not None and request.processor.reads_history
    choice = _Choice(
        sampler=request.sampler,
        processor=request.processor,
        prompt=(jnp.asarray(input_ids), jnp.asarray(attention_mask)) if reads_history else None,
        eos_token_id=jnp.asarray(request.eos_token_id or (-1,), jnp.int32),
        pad_token_id=jnp.int32(request.pad_token_id),
    )
    watch = _StopWatch(request) if request.stop else None
    if watch is not None:
        tokens_per_step = min(tokens_per_step, _TOKENS_BETWEEN_LOOKS)
    written, ended = 0, np.zeros(rows, bool)
    while written < request.max_new_tokens:
        aim = min(written + tokens_per_step, request.max_new_tokens)
        state = _decode(graphdef, params, state, choice, jnp.int32(aim))
        new = slice(written, int(state.step))
        tokens = np.asarray(state.tokens)[:, new]  # sliced on the host, where it compiles nothing
        counts = _counts(tokens, ended, request.eos_token_id)
        ended = np.asarray(state.done)
        if watch is not None:
            counts, ended = watch.look(tokens, counts, ended)
            tokens = np.where(np.arange(tokens.shape[1]) < counts[:, None], tokens, np.int32(request.pad_token_id))
            tokens = tokens[:, : counts.max()]
            state = dataclasses.replace(state, done=jnp.asarray(ended))
        of_tokens = None if state.logprobs is None else np.asarray(state.logprobs)[:, new][:, : tokens.shape[1]]
        yield Step(tokens, counts, of_tokens, ended)
        if ended.all():
            return
        written = new.stop


def _counts(
    tokens: Int[np.ndarray, "B n"], ended: Bool[np.ndarray, "B"], eos_token_id: tuple[int, ...]
) -> Int[np.ndarray, "B"]:
    """How many of the new tokens belong to their row: up to the one that ends it, none if it had ended before."""
    ends = np.isin(tokens, eos_token_id)
    whole = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, tokens.shape[1])
    return np.where(ended, 0, whole)


class _StopWatch:
    """Looks for the texts that end a row, in the text of the row so far."""

    def __init__(self, request: Request) -> None:
        assert request.tokenizer is not None, "make_request asks for it"
        self._stop = request.stop
        self._texts = [Continuation(request.tokenizer, prompt) for prompt in request.prompts]
        self._tokens: list[list[int]] = [[] for _ in request.prompts]

    def look(
        self, tokens: Int[np.ndarray, "B n"], counts: Int[np.ndarray, "B"], ended: Bool[np.ndarray, "B"]
    ) -> tuple[Int[np.ndarray, "B"], Bool[np.ndarray, "B"]]:
        """`counts` and `ended` once the rows are cut after the token that completes such a text."""
        counts, ended = counts.copy(), ended.copy()
        for row, count in enumerate(counts.tolist()):
            before, new = len(self._tokens[row]), tokens[row, :count].tolist()
            self._tokens[row] += new
            if count and self._found(row, before + count):
                counts[row] = next(n for n in range(1, count + 1) if self._found(row, before + n))
                ended[row] = True
        return counts, ended

    def _found(self, row: int, count: int) -> bool:
        text = self._texts[row].text(self._tokens[row][:count])
        return any(stop in text for stop in self._stop)


def generate_stream(
    model: GPTNeoForCausalLM, prompts: Prompts, *, tokens_per_step: int = 1, **options: Unpack[GenerationOptions]
) -> Iterator[np.ndarray]:
    """Like `generate`, but yields `[B, n]` new tokens as they come, `tokens_per_step` at a time.

    Raises:
        InputError: what `generate` refuses, or `tokens_per_step` is below 1; when the first tokens are asked for.
    """
    if tokens_per_step < 1:
        raise InputError(f"tokens_per_step = {tokens_per_step}: must be >= 1")
    request = make_request(model, prompts, **options)
    for step in decode_steps(model, request, tokens_per_step=tokens_per_step):
        yield step.tokens


def generate(model: GPTNeoForCausalLM, prompts: Prompts, **options: Unpack[GenerationOptions]) -> np.ndarray:
    """Continues each prompt.

    Args:
        prompts: a text or several, with `tokenizer`; token ids of one prompt or several, of any lengths >= 1; or an
            array `[B, T]` of ids, whose padding `attention_mask` names.
        options: `GenerationOptions`; what they leave out is as `model.generation_config` says.

    Returns:
        int32 `[B, n]`: the new tokens alone; n <= max_new_tokens, smaller if every sequence ended before.

    Raises:
        InputError: `prompts` is none of these, an empty prompt, an id outside of the vocabulary, more tokens than the
            model has positions, or an option that is out of range.
    """
    request = make_request(model, prompts, **options)
    steps = decode_steps(model, request, tokens_per_step=request.max_new_tokens)
    return np.concatenate([step.tokens for step in steps], axis=1)


def _capacity(config: GPTNeoConfig, slots: int) -> int:
    """`slots`, but at most the largest window: more slots would change nothing, but compile the prefill again."""
    windows = [slots if window == "all" else window for window in config.windows]
    return min(slots, max(windows))
