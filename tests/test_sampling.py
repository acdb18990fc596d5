"""Samplers against Hugging Face's logits processors, and the distribution that they draw from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax import Categorical, Greedy, InputError, make_sampler


def logits(seed: int, batch: int = 4, vocab: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, vocab)).astype(np.float32) * 3


@pytest.mark.parity
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.6, 1.0])
def test_filters_keep_what_hugging_face_keeps(temperature: float, top_k: int | None, top_p: float | None) -> None:
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = logits(0)
    expected = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(scores))
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = Categorical(temperature=temperature, top_k=top_k, top_p=top_p).filtered(jnp.asarray(scores))
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
        ({"temperature": 0.0, "top_k": 3}, "ignores"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_sampler(**settings)


def test_make_sampler_chooses() -> None:
    assert make_sampler(temperature=0.0) == Greedy()
    assert make_sampler(temperature=0.8, top_k=4) == Categorical(temperature=0.8, top_k=4)
