"""Layers in a loop, as remat has them, compute what they compute one after another, and which layers run in one.

May be changed here: which layers run in a loop. What devices of a mesh make of it is in `test_sharding.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsa_jax import GPTNeoConfig, SplatConfig
from gsa_jax.layer_scan import Run, repeated_runs
from gsa_jax.parameters import build_model, expected_shapes
from gsa_jax.train.objectives import cross_entropy


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("glglglglglgl", [Run(0, 2, 6)]),
        ("gggg", [Run(0, 1, 4)]),
        ("g", [Run(0, 1, 1)]),
        ("glsr", [Run(layer, 1, 1) for layer in range(4)]),
        ("gsglgl", [Run(0, 1, 1), Run(1, 1, 1), Run(2, 2, 2)]),
        ("aabab", [Run(0, 1, 1), Run(1, 2, 2)]),  # not the pair at the start, which saves one layer instead of two
        ("glglg", [Run(0, 2, 2), Run(4, 1, 1)]),
        ("gggllllg", [Run(0, 1, 3), Run(3, 1, 4), Run(7, 1, 1)]),
        ("", []),
    ],
)
def test_runs_that_repeat(kinds: str, expected: list[Run]) -> None:
    assert repeated_runs(kinds) == expected


@given(st.text("ab", max_size=12))
def test_runs_are_all_layers_in_their_order(kinds: str) -> None:
    layers = []
    for start, period, repeats in repeated_runs(kinds):
        assert repeats > 1 or period == 1
        assert kinds[start : start + period * repeats] == kinds[start : start + period] * repeats
        layers += range(start, start + period * repeats)
    assert layers == list(range(len(kinds)))


def config_of(attention: str, splats: str | tuple[int, ...] | None) -> GPTNeoConfig:
    kinds = {"g": "global", "l": "local"}
    return GPTNeoConfig(
        vocab_size=31,
        max_position_embeddings=24,
        hidden_size=16,
        num_layers=len(attention),
        num_heads=2,
        attention_types=((tuple(kinds[kind] for kind in attention), 1),),
        window_size=6,
        bos_token_id=None,
        eos_token_id=None,
        splats=None if splats is None else SplatConfig(num_splats=3, window=4, layers=splats, far_gain=True),
    )


@pytest.mark.parametrize(
    ("attention", "splats", "has_loop"),
    [
        pytest.param("glgl", "global", True, marks=pytest.mark.slow),
        ("ggg", None, True),
        pytest.param("glgl", "all", True, marks=pytest.mark.slow),
        # The first four, and two exact ones.
        pytest.param("lglglg", (1, 3), True, marks=pytest.mark.slow),
        pytest.param("gll", (0,), True, marks=pytest.mark.slow),
        pytest.param("gl", "global", False, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_layers_one_after_another(attention, splats, has_loop) -> None:
    config, random = config_of(attention, splats), np.random.default_rng(0)
    params = {
        name: jnp.asarray(random.normal(size=shape, scale=0.2) + name.endswith(("ln_1.weight", "ln_2.weight")))
        for name, shape in expected_shapes(config).items()
    }
    params = {name: x.astype(jnp.float32) for name, x in params.items()}
    batch = {
        "input_ids": jnp.asarray(random.integers(0, 31, (2, 24)), jnp.int32),
        "segment_ids": jnp.asarray([[1] * 9 + [2] * 15, [1] * 20 + [0] * 4], jnp.int32),
    }

    def loss_of(remat: bool):
        computing = dataclasses.replace(config, remat=remat)
        objective = cross_entropy(lambda params: build_model(computing, params))
        return lambda params: objective(params, {}, batch)[0]

    def program_of(remat: bool) -> str:
        """The forward pass, where nothing is recomputed."""
        return jax.jit(loss_of(remat)).lower(params).as_text()

    in_loop, unrolled = (program_of(remat).count("dot_general") for remat in (True, False))
    assert (in_loop < unrolled) == has_loop
    (loss, gradients), (expected_loss, expected) = (
        jax.jit(jax.value_and_grad(loss_of(remat)))(params) for remat in (True, False)
    )
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert gradients.keys() == expected.keys() == params.keys()
    for name, gradient in gradients.items():
        error = np.linalg.norm(gradient - expected[name])
        assert error <= 1e-5 * np.linalg.norm(expected[name]), name
