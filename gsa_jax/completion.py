"""Generation of text: prompts in, texts out.

May be changed here: what a completion says, and when a text that is still growing is given out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, Unpack

import numpy as np

from gsa_jax.errors import InputError
from gsa_jax.generation import GenerationOptions, Request, decode_steps, make_request
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.prompts import Prompts
from gsa_jax.tokenizer import Continuation, Tokenizer

ROWS_AT_ONCE = 32
"""Prompts that run together; each has a cache of its own in memory."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What follows a prompt.

    Attributes:
        prompt: its text.
        text: the text of prompt and new tokens together, without the prompt's; without the text that ended it, if
            `finish_reason` is `"stop"`, and without special tokens.
        tokens: new ones, with those that ended it.
        logprobs: of each token, in nats, by the model alone: before penalties and temperature. None unless asked for.
        finish_reason: `"eos"`: the model ended it; `"stop"`: a text did that is to end it; `"length"`: it has as many
            tokens as it may; None: it is still growing.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: Literal["eos", "stop", "length"] | None


def complete(
    model: GPTNeoForCausalLM,
    prompts: Prompts,
    *,
    logprobs: bool = False,
    **options: Unpack[GenerationOptions],
) -> Iterator[Completion]:
    """Continues each prompt, `ROWS_AT_ONCE` together; gives the completions in order, as they are ready.

    Args:
        prompts: as `gsa_jax.generation.generate` takes them.
        options: `GenerationOptions`; with `tokenizer`.

    Raises:
        InputError: as `generate`, before anything is generated; or there is no tokenizer.
    """
    request = make_request(model, prompts, **options)
    tokenizer = _tokenizer(request)
    texts = _prompt_texts(tokenizer, prompts, request)
    for number, start in enumerate(range(0, len(texts), ROWS_AT_ONCE)):
        part = slice(start, start + ROWS_AT_ONCE)
        # Rows of different batches would otherwise have the same draws.
        seed = int(np.random.SeedSequence([request.seed, number]).generate_state(1)[0]) if number else request.seed
        batch = dataclasses.replace(request, prompts=request.prompts[part], seed=seed)
        rows = _Rows(tokenizer, texts[part], batch)
        for step in decode_steps(model, batch, tokens_per_step=request.max_new_tokens, logprobs=logprobs):
            rows.add(step.tokens, step.counts, step.logprobs)
        yield from (rows.completion(row) for row in range(len(texts[part])))


def stream_completion(
    model: GPTNeoForCausalLM,
    prompt: Prompts,
    *,
    logprobs: bool = False,
    **options: Unpack[GenerationOptions],
) -> Iterator[Completion]:
    """The completion of one prompt, as it grows: first without a token, then after each token, at last finished.

    A text only ever grows: what another token might change, such as half a character, waits for it.

    Raises:
        InputError: as `generate`, or there are several prompts; before anything is generated.
    """
    request = make_request(model, prompt, **options)
    tokenizer = _tokenizer(request)
    if len(request.prompts) > 1:
        raise InputError(f"{len(request.prompts)} prompts: one text can be streamed; give one prompt, or complete them")
    rows = _Rows(tokenizer, _prompt_texts(tokenizer, prompt, request), request)
    yield rows.growing(0)
    for step in decode_steps(model, request, tokens_per_step=1, logprobs=logprobs):
        rows.add(step.tokens, step.counts, step.logprobs)
        yield rows.growing(0)
    yield rows.completion(0)


def stream_text(model: GPTNeoForCausalLM, prompt: Prompts, **options: Unpack[GenerationOptions]) -> Iterator[str]:
    """What follows one prompt, in pieces of text as they come; joined, they are the text that `complete` gives.

    Raises:
        InputError: as `stream_completion`.
    """
    given = 0
    for completion in stream_completion(model, prompt, **options):
        if piece := completion.text[given:]:
            yield piece
        given = max(given, len(completion.text))


def _tokenizer(request: Request) -> Tokenizer:
    if request.tokenizer is None:
        raise InputError("tokens become text by a tokenizer; give it: tokenizer=gsa_jax.open_tokenizer(folder)")
    return request.tokenizer


def _prompt_texts(tokenizer: Tokenizer, prompts: Prompts, request: Request) -> list[str]:
    if isinstance(prompts, str):
        return [prompts]
    texts = list(prompts)
    if all(isinstance(text, str) for text in texts):
        return texts
    return [Continuation(tokenizer, ids).prompt_text for ids in request.prompts]


class _Rows:
    """The rows of a batch, so far."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[str], request: Request) -> None:
        self._request = request
        self._prompts = prompts
        self._texts = [Continuation(tokenizer, ids) for ids in request.prompts]
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._logprobs: list[list[float]] | None = None

    def add(self, tokens: np.ndarray, counts: np.ndarray, logprobs: np.ndarray | None) -> None:
        for row, count in enumerate(counts.tolist()):
            self._tokens[row] += tokens[row, :count].tolist()
            if logprobs is not None:
                self._logprobs = self._logprobs or [[] for _ in self._prompts]
                self._logprobs[row] += logprobs[row, :count].tolist()

    def completion(self, row: int) -> Completion:
        text = self._texts[row].text(self._tokens[row])
        found = [place for stop in self._request.stop if (place := text.find(stop)) >= 0]
        if found:
            return self._made(row, text[: min(found)], "stop")
        return self._made(row, text, "eos" if self._tokens[row][-1] in self._request.eos_token_id else "length")

    def growing(self, row: int) -> Completion:
        """Without the end of the text that may yet change, or turn out to be what ends it."""
        text = self._texts[row].settled(self._tokens[row])
        places = [place for stop in self._request.stop if (place := _begins(text, stop)) is not None]
        return self._made(row, text[: min(places, default=len(text))], None)

    def _made(self, row: int, text: str, reason: Literal["eos", "stop", "length"] | None) -> Completion:
        logprobs = None if self._logprobs is None else tuple(self._logprobs[row])
        return Completion(self._prompts[row], text, tuple(self._tokens[row]), logprobs, reason)


def _begins(text: str, stop: str) -> int | None:
    """Where `stop` is in a text, or begins at its end."""
    place = text.find(stop)
    if place >= 0:
        return place
    return next((len(text) - n for n in range(min(len(stop), len(text)), 0, -1) if stop.startswith(text[-n:])), None)
