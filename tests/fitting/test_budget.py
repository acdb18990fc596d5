"""A number of bytes that is spent over layers."""

import dataclasses
import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from gsa_jax.attention import state_bytes
from gsa_jax.checkpoint import load_tensors
from gsa_jax.cli.fitting import parse_bytes
from gsa_jax.convert import convert
from gsa_jax.errors import InputError
from gsa_jax.fitting import budget as module
from gsa_jax.fitting.budget import cheapest, spend, with_choice
from gsa_jax.fitting.statistics import AttentionRows
from gsa_jax.splat_config import SPLAT_PRESETS, LayerSplats
from helpers.texts import STORIES

TERMS = SPLAT_PRESETS["hybrid"]


def test_the_cheapest_choice_is_the_best_of_all() -> None:
    """Against every combination, tried one by one."""
    draws = np.random.default_rng(0)
    options = [LayerSplats(*numbers) for numbers in itertools.product((0, 2), (4, 8), (0, 4))]
    sizes = {option: 10 * option.num_splats + 3 * option.window + 5 * option.kept for option in options}
    costs = [{option: float(draws.random()) / (1 + sizes[option]) for option in options} for _ in range(3)]
    for budget in (40, 75, 100, 160, 1000):
        affordable = [
            choice
            for choice in itertools.product(options, repeat=3)
            if sum(sizes[option] for option in choice) <= budget
        ]
        best = min(affordable, key=lambda choice: sum(of[x] for of, x in zip(costs, choice, strict=True)))
        assert cheapest(costs, sizes, budget) == best


@pytest.fixture(scope="module")
def plain(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget") / "plain"
    convert(story_neo, folder)
    return folder


def few_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPLATS", (0, 8))
    monkeypatch.setattr(module, "WINDOWS", (4, 16))
    monkeypatch.setattr(module, "KEPT", (0, 16))
    monkeypatch.setattr(module, "_PRICED", LayerSplats(8, 4, 0))


@pytest.mark.slow
def test_more_bytes_cost_less_and_none_are_too_many(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_options(monkeypatch)
    config, _ = load_tensors(plain)
    rises = []
    for budget in (40_000, 120_000):
        found = spend(plain, STORIES, budget, splats=dataclasses.replace(TERMS, importance="learned"))
        chosen = dataclasses.replace(config, splats=found.splats)
        assert state_bytes(chosen) <= budget
        assert [layer.layer for layer in found.layers] == [0, 2]
        assert all(layer.price > 0 for layer in found.layers)
        assert sum(layer.bytes for layer in found.layers) == state_bytes(
            with_choice(config, TERMS, [layer.splats for layer in found.layers])
        )
        rises.append(min(found.rise, found.uniform_rise))
    assert rises[1] < rises[0]


def test_a_budget_that_is_too_small(plain: Path) -> None:
    with pytest.raises(InputError, match="state budget = 9,999 bytes: too small for splats in 2 layers; give at least"):
        spend(plain, STORIES, 9_999, splats=TERMS)


def test_numbers_of_bytes() -> None:
    assert [parse_bytes(text) for text in ("5000", "1.5kB", "2MB", "1 MiB", "3GB")] == [
        5000,
        1500,
        2 * 10**6,
        2**20,
        3 * 10**9,
    ]
    for text in ("", "many", "-1", "1TB", "1e6"):
        with pytest.raises(InputError, match="is no number of bytes; write it as 500000, 500kB or 1MB"):
            parse_bytes(text)


def test_the_command_refuses_numbers_beside_a_budget(run_gsa, plain: Path, tmp_path: Path) -> None:
    run_gsa(
        "fit-init", plain, tmp_path / "out", "--text", STORIES, "--state-budget", "1MB", "--window", 8
    ).assert_refused("--window is what --state-budget chooses")
    run_gsa("fit-init", plain, tmp_path / "out", "--text", STORIES, "--state-budget", "1kB").assert_refused("too small")
    assert not list(tmp_path.iterdir())


def test_text_that_is_too_short(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_options(monkeypatch)
    monkeypatch.setattr(module, "KEPT", (0,))
    text = tmp_path / "text.txt"
    for documents, words in (
        (["Once upon a time, there was a cat."], "one row is not enough to choose by and to compare on"),
        (["A."] * 60, "no row is longer than 4 tokens"),
        (["Once upon a time, there was a cat."] * 40, "a window within 900,000 bytes holds all of it"),
    ):
        text.write_text("<|endoftext|>".join(documents), encoding="utf-8")
        with pytest.raises(InputError, match=words):
            spend(plain, text, 900_000, splats=dataclasses.replace(TERMS, importance="norm"))


@pytest.mark.parametrize("has_gain", [True, False])
def test_errors_of_an_option_are_those_of_float64_rows(has_gain: bool) -> None:
    """At the far gain that gives far keys their mass, found by root finding; or at none."""
    draws = np.random.default_rng(0)
    sequences, rows, length, heads, size, window = 2, 3, 12, 2, 4, 3
    place = np.sort(draws.integers(6, length, (sequences, rows)), axis=1)
    value = draws.normal(size=(sequences, length, heads, size))
    out_proj = draws.normal(size=(heads * size, heads * size))
    causal = (np.arange(length) <= place[:, :, None])[:, None]
    near = np.where(causal, draws.normal(size=(sequences, heads, rows, length)), -np.inf)
    far = np.where(causal, draws.normal(size=near.shape), -np.inf)
    beyond = np.broadcast_to(np.arange(length) <= (place - window)[:, None, :, None], near.shape)

    def rows_of(gain: np.ndarray) -> np.ndarray:
        return scipy.special.softmax(np.where(beyond, far + gain[:, None, None], near), axis=-1)

    exact = scipy.special.softmax(near, axis=-1)
    gain = np.zeros(heads)
    if has_gain:
        for head in range(heads):

            def lacks(x: float, head: int = head) -> float:
                return np.where(beyond, rows_of(np.full(heads, x)) - exact, 0)[:, head].sum()

            gain[head] = scipy.optimize.brentq(lacks, -30, 30)

    def output(weights: np.ndarray) -> np.ndarray:
        return np.einsum("nhrt,nthd->nrhd", weights, value).reshape(sequences, rows, -1) @ out_proj.T

    expected = np.square(output(rows_of(gain) - exact)).sum() / np.square(output(exact)).sum()
    zeros = jnp.zeros((sequences, rows, heads, size))
    valid = jnp.ones((sequences, length), bool)
    of_rows = AttentionRows(zeros, jnp.asarray(value), jnp.asarray(value), jnp.asarray(place), valid)
    scores = jnp.asarray(near), jnp.asarray(near), jnp.asarray(far)
    found = module._error(of_rows, *scores, None, jnp.asarray(out_proj), window, 0, has_gain=has_gain)
    assert float(found) == pytest.approx(expected, rel=1e-3)
