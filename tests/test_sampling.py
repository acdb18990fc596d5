"""Samplers against Hugging Face's logits processors, and the distribution that they draw from."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax import Categorical, Greedy, InputError, make_sampler
from gsa_jax.generation_config import GenerationConfig
from gsa_jax.sampling import History, LogitsProcessor, default_sampler


def logits(seed: int, batch: int = 4, vocab: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, vocab)).astype(np.float32) * 3


@pytest.mark.parity
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.0, 0.1, 1.0])
def test_filters_keep_what_hugging_face_keeps(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    import torch
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = logits(0)
    expected = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(scores))
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p is not None:
        expected = MinPLogitsWarper(min_p)(None, expected)
    sampler = Categorical(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = sampler.filtered(jnp.asarray(scores))
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


def test_draws_follow_the_distribution() -> None:
    scores = jnp.asarray(logits(1, batch=1, vocab=8))
    sampler = Categorical(temperature=1.5, top_k=5)
    draws = jax.jit(jax.vmap(lambda key: sampler(scores, key)[0]))(jax.random.split(jax.random.key(0), 20_000))
    share = np.bincount(np.asarray(draws), minlength=8) / 20_000
    expected = np.asarray(jax.nn.softmax(sampler.filtered(scores)))[0]
    assert (share[expected == 0] == 0).all()
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / 20_000))


def test_greedy_is_the_limit_of_low_temperature() -> None:
    scores = jnp.asarray(logits(2))
    key = jax.random.key(0)
    np.testing.assert_array_equal(Greedy()(scores, key), Categorical(temperature=1e-6)(scores, key))


def test_numbers_of_a_sampler_do_not_recompile() -> None:
    @jax.jit
    @chex.assert_max_traces(n=1)
    def draw(sampler: Categorical, scores: jax.Array) -> jax.Array:
        return sampler(scores, jax.random.key(0))

    for temperature, top_p in ((0.5, 0.9), (0.7, 0.8)):
        draw(Categorical(temperature=temperature, top_p=top_p), logits(3))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"temperature": 0.0, "top_k": 3}, "ignores"),
        ({"temperature": 0.0, "min_p": 0.1}, "ignores"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_sampler(**settings)


def test_make_sampler_chooses() -> None:
    assert make_sampler(temperature=0.0) == Greedy()
    assert make_sampler(temperature=0.8, top_k=4) == Categorical(temperature=0.8, top_k=4)


@pytest.mark.parametrize(
    ("said", "given", "expected"),
    [
        ({}, {}, Greedy()),
        ({"temperature": 0.7, "top_k": 9}, {}, Greedy()),
        ({"temperature": 0.7, "top_k": 9}, {"temperature": 2.0}, Categorical(temperature=2.0, top_k=9)),
        ({"do_sample": True, "temperature": 0.7}, {}, Categorical(temperature=0.7)),
        ({"do_sample": True, "top_p": 0.9}, {"top_k": 3, "min_p": 0.2}, Categorical(top_k=3, top_p=0.9, min_p=0.2)),
        ({"do_sample": True, "top_p": 0.9}, {"temperature": 0.0}, Greedy()),
    ],
)
def test_options_stand_instead_of_what_a_model_says(said: dict, given: dict, expected: object) -> None:
    assert default_sampler(GenerationConfig(**said), **given) == expected


def texts_so_far(seed: int, prompt: int, step: int, room: int = 12) -> tuple[History, list[list[int]]]:
    """Rows of few different tokens, so that they repeat; the first has no padding. And the tokens of each."""
    draws = np.random.default_rng(seed)
    tokens = draws.integers(0, 4, (4, prompt + room)).astype(np.int32)
    lengths = np.array([prompt, 1, 3, prompt // 2 + 1])
    slots = np.arange(prompt + room)
    is_token = (slots >= prompt - lengths[:, None]) & (slots < prompt + step)
    history = History(jnp.asarray(tokens), jnp.asarray(is_token), jnp.int32(prompt + step))
    return history, [row[mask].tolist() for row, mask in zip(tokens, is_token, strict=True)]


@jax.jit
def process(processor: LogitsProcessor, *arguments: Any) -> jax.Array:
    return processor(*arguments)


@pytest.mark.parity
@pytest.mark.parametrize("step", [0, 1, 7, 12])
@pytest.mark.parametrize("penalty", [None, 0.5, 1.3])
@pytest.mark.parametrize("size", [None, 1, 2, 3, 19, 40])
@pytest.mark.parametrize("least", [None, 7])
def test_logits_are_processed_as_by_hugging_face(
    step: int, penalty: float | None, size: int | None, least: int | None
) -> None:
    """Row by row, because Hugging Face's processors take padding for tokens."""
    import torch
    from transformers import (
        LogitsProcessorList,
        MinNewTokensLengthLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
    )

    scores, eos = logits(5), [3, 50]
    history, rows = texts_so_far(step, prompt=8, step=step)
    expected = []
    for row, tokens in enumerate(rows):
        theirs = LogitsProcessorList()
        if penalty is not None:
            theirs.append(RepetitionPenaltyLogitsProcessor(penalty))
        if size is not None:
            theirs.append(NoRepeatNGramLogitsProcessor(size))
        if least is not None:
            theirs.append(MinNewTokensLengthLogitsProcessor(len(tokens) - step, least, torch.tensor(eos)))
        expected.append(theirs(torch.tensor([tokens]), torch.tensor(scores[row : row + 1])).numpy()[0])
    ours = LogitsProcessor(repetition_penalty=penalty, no_repeat_ngram_size=size, min_new_tokens=least)
    got = process(ours, jnp.asarray(scores), history, jnp.int32(step), jnp.asarray(eos, jnp.int32))
    np.testing.assert_allclose(got, np.stack(expected), rtol=2e-7)  # a division, rounded as each compiler likes


def test_no_token_ends_a_row_that_has_no_end() -> None:
    scores = jnp.asarray(logits(6))
    got = LogitsProcessor(min_new_tokens=3)(scores, None, jnp.int32(0), jnp.asarray([-1], jnp.int32))
    np.testing.assert_array_equal(got, scores)
