"""More positions: the new rows are those of numpy, and the model with them is PyTorch's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax import GPTNeoConfig, GPTNeoForCausalLM, InputError, SplatConfig
from gsa_jax.parameters import POSITION_EMBEDDING, build_model, expected_shapes, extend_positions, named_parameters
from helpers.tiny_models import random_ids, tiny_model


def embedding(positions: int, width: int, dtype: jax.typing.DTypeLike) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(0).normal(size=(positions, width)).astype(jnp.dtype(dtype))
    return {POSITION_EMBEDDING: rows, "other": np.zeros(1)}


def config(positions: int) -> GPTNeoConfig:
    return GPTNeoConfig(max_position_embeddings=positions)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("positions", "longer"), [(1, 4), (2, 3), (7, 8), (7, 14), (7, 50), (512, 4096)])
def test_interpolated_rows_are_those_of_numpy(positions: int, longer: int, dtype: str) -> None:
    before = embedding(positions, 3, dtype)
    given = before[POSITION_EMBEDDING].copy()
    extended, after = extend_positions(config(positions), before, longer, "interpolate")
    rows = np.asarray(after[POSITION_EMBEDDING])
    places = np.linspace(0, positions - 1, longer)
    expected = np.stack([np.interp(places, np.arange(positions), column) for column in given.astype(np.float64).T], 1)
    assert extended == config(longer)
    assert rows.shape == (longer, 3) and rows.dtype == given.dtype
    step = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(rows.astype(np.float64), expected, rtol=step, atol=1e-6)
    np.testing.assert_array_equal(rows[[0, -1]], given[[0, -1]])
    np.testing.assert_array_equal(before[POSITION_EMBEDDING], given)
    assert after["other"] is before["other"] and set(after) == set(before)


@pytest.mark.parametrize(("positions", "longer"), [(1, 3), (5, 6), (5, 10), (5, 23)])
def test_tiled_rows_are_those_of_numpy(positions: int, longer: int) -> None:
    before = embedding(positions, 3, "bfloat16")
    extended, after = extend_positions(config(positions), before, longer, "tile")
    assert extended == config(longer) and after[POSITION_EMBEDDING].dtype == jnp.bfloat16
    expected = np.tile(before[POSITION_EMBEDDING], (-(-longer // positions), 1))[:longer]
    np.testing.assert_array_equal(np.asarray(after[POSITION_EMBEDDING]), expected)


@pytest.mark.parity
@pytest.mark.parametrize("method", ["interpolate", "tile"])
def test_the_longer_model_is_the_one_that_pytorch_has(method) -> None:
    """Beyond the old length too; and short texts give what they gave, bit for bit, if the rows are repeated."""
    import torch

    from helpers.hf_oracle import hf_model

    small = hf_model(max_position_embeddings=12)
    model = tiny_model(max_position_embeddings=12)
    longer_config, tensors = extend_positions(model.config, named_parameters(model), 40, method)
    longer = build_model(longer_config, tensors)
    torch_longer = hf_model(max_position_embeddings=40)
    state = small.state_dict() | {POSITION_EMBEDDING: torch.tensor(np.array(tensors[POSITION_EMBEDDING]))}
    torch_longer.load_state_dict(state, strict=False)
    ids = random_ids(0, 2, 40)
    with torch.no_grad():
        expected = torch_longer(torch.from_numpy(ids).long()).logits.numpy()
    np.testing.assert_allclose(np.asarray(longer(ids)), expected, atol=2e-4)
    short = np.asarray(model(ids[:, :12]))
    assert np.array_equal(np.asarray(longer(ids[:, :12])), short) == (method == "tile")


@pytest.mark.parametrize(
    "splats",
    [
        None,
        SplatConfig(num_splats=3, window=2, kept=2, norm_gain=True, importance="learned"),
        SplatConfig(layers=(0, 10), num_splats=(2, 5), window=(2, 4), kept=(0, 1)),
    ],
    ids=["none", "alike", "others in each layer"],
)
@pytest.mark.parametrize("donor", ["gpt_neo", "gpt2"])
def test_expected_shapes_are_those_of_a_model(donor, splats) -> None:
    if donor == "gpt2":
        settings = {"n_embd": 8, "n_layer": 11, "n_head": 2}
    else:
        settings = {"hidden_size": 8, "num_layers": 11, "num_heads": 2, "attention_types": [[["global"], 11]]}
    config = GPTNeoConfig.from_hf({"model_type": donor, "vocab_size": 5} | settings)
    config = dataclasses.replace(config, splats=splats)
    model = GPTNeoForCausalLM(config, rngs=nnx.Rngs(0))
    shapes = {name: x.shape for name, x in named_parameters(model).items()}
    assert list(expected_shapes(config).items()) == list(shapes.items())


def test_as_many_positions_change_nothing() -> None:
    before = embedding(5, 3, "float32")
    for method in ("interpolate", "tile"):
        extended, after = extend_positions(config(5), before, 5, method)
        assert extended == config(5) and all(after[name] is tensor for name, tensor in before.items())


def test_what_cannot_be_extended_is_refused(unchecked) -> None:
    before = embedding(5, 3, "float32")
    with pytest.raises(InputError, match="max_positions = 4: the model has 5 positions already; give at least as many"):
        extend_positions(config(5), before, 4, "tile")
    with pytest.raises(InputError, match="position_extension = 'stretch': must be one of interpolate, tile"):
        extend_positions(config(5), before, 9, "stretch")  # pyright: ignore[reportArgumentType]
