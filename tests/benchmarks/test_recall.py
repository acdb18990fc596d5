"""The rows of `benchmarks/recall_task.py` and the features of `benchmarks/recall_based.py`.

May be changed here: what rows and features have to be. The modules are loaded from their files, so that the other
scripts beside them do not come into the way of packages.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax import GPTNeoForCausalLM
from gsa_jax.parameters import named_parameters

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # for those that are loaded after it
    spec.loader.exec_module(module)
    return module


load("mapped_attention")
recall_task, recall_based = load("recall_task"), load("recall_based")


@pytest.mark.parametrize("context", [32, 128, 1024])
def test_each_answer_is_the_value_its_key_was_told_with(context):
    counts = np.array([2, context // 8, context // 4, context // 16])
    rows = recall_task.make_rows(np.random.default_rng(context), context, counts)
    assert rows.tokens.shape == rows.answers.shape == (4, context)
    for tokens, answers, count in zip(rows.tokens.tolist(), rows.answers.tolist(), counts, strict=True):
        told: dict[int, int] = {}
        asked = []
        for place, (token, answer) in enumerate(zip(tokens, answers, strict=True)):
            if token < 256 and place < context // 2:  # a key: its value is next
                assert token not in told and answer == -1
                told[token] = tokens[place + 1]
                assert 256 <= told[token] < 448
            elif token < 256:
                assert answer == told[token]
                asked.append(token)
            else:
                assert answer == -1
                assert token >= 448 or tokens[place - 1] in told
        assert len(told) == count and sorted(asked) == sorted(told)


def test_rows_of_a_seed_are_the_same_and_places_vary():
    counts = np.full(200, 4)
    first, again = (recall_task.make_rows(np.random.default_rng(3), 64, counts) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    asks = first.answers != recall_task.NO_ANSWER
    assert not asks[:, :32].any() and asks[:, 32:].any(axis=0).all()
    assert (first.tokens < 256)[:, :31].any(axis=0).all()


def test_loss_and_share_count_answers_alone():
    draws = np.random.default_rng(0)
    logits, answers = draws.normal(size=(2, 6, 5)).astype(np.float32), np.full((2, 6), -1)
    answers[0, 1], answers[1, [2, 5]] = 3, (0, 4)
    logits[1, 5, 4], logits[0, 1, 2] = 9, 9
    wide = logits.astype(np.float64)
    log_shares = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    expected = -(log_shares[0, 1, 3] + log_shares[1, 2, 0] + log_shares[1, 5, 4]) / 3
    np.testing.assert_allclose(recall_task.answer_loss(jnp.asarray(logits), jnp.asarray(answers)), expected, rtol=1e-5)
    right = 1 + (logits[1, 2].argmax() == 0)
    np.testing.assert_allclose(recall_task.answered(jnp.asarray(logits), jnp.asarray(answers)), right / 3, rtol=1e-6)


@pytest.mark.parametrize("features", [1, 4, 7])
def test_taylor_features_multiply_to_the_series(features):
    x, y = np.random.default_rng(features).normal(size=(2, 9, features)).astype(np.float32)
    found = [np.asarray(recall_based.taylor_features(jnp.asarray(part)), np.float64) for part in (x, y)]
    assert found[0].shape == (9, 1 + features + features * (features + 1) // 2)
    products = x.astype(np.float64) @ y.astype(np.float64).T
    np.testing.assert_allclose(found[0] @ found[1].T, 1 + products + products**2 / 2, rtol=1e-5, atol=1e-5)
    assert recall_based.state_bytes_of_based(features, 64, 2) == 4 * 2 * found[0].shape[1] * 65


def test_based_attention_is_the_running_sums_it_is_counted_by():
    config, layer, count = recall_task.CONFIG, 1, 4
    draws = np.random.default_rng(1)
    tensors = named_parameters(GPTNeoForCausalLM(config, rngs=nnx.Rngs(0)))
    query, key, value = draws.normal(size=(3, 2, 12, 1, 64)).astype(np.float32)
    maps = recall_based.initial_maps(layer, query, key, count)
    attention = recall_based.build_based(config, layer, tensors | maps).transformer.h[layer].attn.attention
    found, _ = attention._attn(*map(jnp.asarray, (query, key, value)))

    of_query, of_key = (np.asarray(maps[f"transformer.h.1.attn.attention.{name}"][0]) for name in recall_based.MAPS)
    for row in range(2):
        numerator, denominator = np.zeros((1 + count + count**2, 64)), np.zeros(1 + count + count**2)
        for token in range(12):
            q, k = of_query @ query[row, token, 0].astype(float), of_key @ key[row, token, 0].astype(float)
            q, k = (np.concatenate([[1], x, np.outer(x, x).ravel() / np.sqrt(2)]) for x in (q, k))
            numerator, denominator = numerator + np.outer(k, value[row, token, 0]), denominator + k
            np.testing.assert_allclose(found[row, token, 0], q @ numerator / (q @ denominator), rtol=1e-4, atol=1e-5)
