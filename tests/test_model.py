"""The forward pass against Hugging Face PyTorch and Flax, and properties that hold without an oracle."""

import dataclasses
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax import GPTNeoConfig, GPTNeoForCausalLM, InputError, SplatConfig
from gsa_jax.config import _NOT_STORED
from gsa_jax.hf_fields import DONORS
from gsa_jax.parameters import build_model, named_parameters
from helpers.tiny_models import VOCAB, random_ids, relative_rms, tiny_config, tiny_model

MIXED = [[["global", "local"], 1]]

MODELS = {
    "mixed": {},
    "global only": {"attention_types": [[["global"], 2]]},
    "local only": {"attention_types": [[["local"], 2]]},
    "pattern repeated": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "window 1": {"window_size": 1},
    "window beyond the length": {"window_size": 100},
    "head_dim 4": {"num_heads": 8},
    "one head": {"num_heads": 1},
    "narrow mlp": {"intermediate_size": 24},
    "relu": {"activation_function": "relu"},
    "exact gelu": {"activation_function": "gelu"},
    "silu": {"activation_function": "silu"},
    "large epsilon": {"layer_norm_epsilon": 0.1},
}


SLOW_MODELS = ("pattern repeated", "window beyond the length", "one head", "relu", "silu", "large epsilon")


@pytest.mark.parity
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_MODELS else name for name in MODELS]
)
def test_logits_equal_pytorch(name: str) -> None:
    from helpers.hf_oracle import hf_model, torch_logits

    reference = hf_model(**MODELS[name])
    model = tiny_model(**MODELS[name])
    for length in (1, 7, 33):
        ids = random_ids(length, 2, length)
        assert relative_rms(model(ids), torch_logits(reference, ids)) < 1e-5, f"length {length}"


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("window", [3, 256, 300])
def test_blocked_attention_equals_pytorch(window: int) -> None:
    """Lengths beyond two blocks, where global and local layers no longer attend in one piece."""
    from helpers.hf_oracle import hf_model, torch_logits

    shape = {"window_size": window, "max_position_embeddings": 1024, "num_heads": 2}
    reference = hf_model(**shape)
    ids = random_ids(0, 1, 777)
    mask = np.ones(ids.shape, bool)
    mask[0, :20] = False
    got = np.asarray(tiny_model(**shape)(ids, mask))
    assert relative_rms(got[mask], torch_logits(reference, ids, mask)[mask]) < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_pytorch(side: str) -> None:
    from helpers.hf_oracle import hf_model, torch_logits

    reference = hf_model()
    ids, mask = random_ids(1, 3, 21), np.ones((3, 21), bool)
    for row, pads in enumerate((0, 5, 20)):
        mask[row, slice(0, pads) if side == "left" else slice(21 - pads, 21)] = False
    got = np.asarray(tiny_model()(ids, mask))
    assert relative_rms(got[mask], torch_logits(reference, ids, mask)[mask]) < 1e-5


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "local only", "window 1", "head_dim 4"])
def test_logits_equal_flax(standard_promotion, name: str) -> None:
    from transformers import FlaxGPTNeoForCausalLM
    from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

    from helpers.hf_oracle import hf_model, positions

    reference = hf_model(**MODELS[name])
    flax = FlaxGPTNeoForCausalLM(reference.config)
    params = convert_pytorch_state_dict_to_flax(reference.state_dict(), flax)
    ids, mask = random_ids(2, 2, 33), np.ones((2, 33), bool)
    mask[1, :9] = False
    expected = flax(ids, attention_mask=mask.astype(int), position_ids=positions(mask), params=params).logits
    got = np.asarray(tiny_model(**MODELS[name])(ids, mask))
    assert relative_rms(got[mask], np.asarray(expected)[mask]) < 1e-5


@pytest.mark.parity
def test_as_close_to_float64_as_pytorch_is() -> None:
    from helpers.hf_oracle import hf_model, torch_logits

    reference = hf_model(initializer_range=0.5)
    ids = random_ids(3, 2, 40)
    got = relative_rms(
        tiny_model(initializer_range=0.5)(ids), exact := torch_logits(hf_model(initializer_range=0.5).double(), ids)
    )
    assert got < max(2 * relative_rms(torch_logits(reference, ids), exact), 1e-6)


@pytest.mark.parity
def test_bfloat16_stays_near_pytorch(standard_promotion) -> None:
    import torch

    from helpers.hf_oracle import hf_model, torch_logits

    reference = hf_model(initializer_range=0.1)
    ids = random_ids(4, 2, 40)
    expected = torch_logits(reference, ids)
    model = tiny_model(initializer_range=0.1, dtype="bfloat16", param_dtype=jnp.bfloat16)
    logits = model(ids)
    assert logits.dtype == jnp.float32
    their_error = relative_rms(torch_logits(reference.to(torch.bfloat16), ids), expected)
    assert relative_rms(logits, expected) < 1.5 * their_error


def test_parameters_and_computation_have_dtypes_of_their_own() -> None:
    model = tiny_model(dtype="float32", param_dtype=jnp.float16)
    assert {str(leaf.dtype) for leaf in named_parameters(model).values()} == {"float16"}
    hidden_states, _ = model.transformer(jnp.asarray(random_ids(0, 1, 4)), jnp.ones((1, 4), bool))
    assert hidden_states.dtype == jnp.float32


def test_splats_do_not_change_a_bit() -> None:
    plain = tiny_model()
    config = dataclasses.replace(plain.config, splats=SplatConfig(num_splats=3, layers="all"))
    splats = {
        name: leaf
        for name, leaf in named_parameters(GPTNeoForCausalLM(config, rngs=nnx.Rngs(0))).items()
        if ".splat_" in name
    }
    assert sum(leaf.size for leaf in splats.values()) == 2 * 4 * 3 * (8 + 1)
    with_splats = build_model(config, named_parameters(plain) | splats)
    ids = random_ids(5, 2, 50)
    chex.assert_trees_all_equal(plain(ids), with_splats(ids))


@pytest.fixture(scope="module")
def mixed_forward():
    graphdef, params = nnx.split(tiny_model(window_size=5))
    return jax.jit(lambda ids, mask: nnx.merge(graphdef, params)(ids, mask))


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 29), st.integers(0, 2**31))
def test_the_future_does_not_change_the_past(mixed_forward, edit: int, seed: int) -> None:
    ids, mask = random_ids(6, 1, 30), np.ones((1, 30), bool)
    edited = np.where(np.arange(30) >= edit, random_ids(seed, 1, 30), ids)
    chex.assert_trees_all_equal(mixed_forward(ids, mask)[:, :edit], mixed_forward(edited, mask)[:, :edit])


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 29), st.integers(0, 2**31))
def test_left_padding_changes_nothing(mixed_forward, pads: int, seed: int) -> None:
    tokens = random_ids(7, 1, 30 - pads)
    ids = np.concatenate([random_ids(seed, 1, pads), tokens], axis=1)
    mask = np.arange(30)[None] >= pads
    alone = ours_on(mixed_forward, tokens)
    assert relative_rms(mixed_forward(ids, mask)[:, pads:], alone) < 1e-5


def ours_on(forward, tokens: np.ndarray) -> np.ndarray:
    """Logits of unpadded tokens, with padding on the right to keep one compiled shape."""
    length = tokens.shape[1]
    ids = np.zeros((1, 30), np.int32)
    ids[:, :length] = tokens
    return np.asarray(forward(ids, np.ones((1, 30), bool)))[:, :length]


def test_padding_gives_finite_logits_and_gradients() -> None:
    graphdef, params = nnx.split(tiny_model())
    ids, mask = random_ids(8, 2, 12), np.zeros((2, 12), bool)
    mask[1, 4:] = True  # row 0 is padding altogether
    loss = jax.jit(jax.value_and_grad(lambda params: nnx.merge(graphdef, params)(ids, mask).sum()))
    chex.assert_tree_all_finite(loss(params))


def test_remat_gives_the_same_gradients() -> None:
    ids = random_ids(9, 1, 20)

    def gradients(remat: bool):
        graphdef, params = nnx.split(tiny_model(remat=remat))
        return jax.jit(jax.grad(lambda params: jax.nn.logsumexp(nnx.merge(graphdef, params)(ids))))(params)

    chex.assert_trees_all_close(
        jax.tree.leaves(gradients(True)), jax.tree.leaves(gradients(False)), rtol=1e-5, atol=1e-6
    )


def test_positions_can_be_given() -> None:
    model = tiny_model()
    ids = random_ids(10, 1, 10)
    shifted = jnp.arange(10)[None] + 3
    assert relative_rms(model(ids, None, shifted), model(ids)) > 1e-2
    chex.assert_trees_all_equal(model(ids, None, jnp.arange(10)[None]), model(ids))


def test_local_layers_take_linear_memory() -> None:
    graphdef, params = nnx.split(
        tiny_model(attention_types=[[["local"], 2]], window_size=64, max_position_embeddings=8192)
    )

    def temporary_bytes(length: int) -> int:
        hidden = jax.jit(lambda params, ids: nnx.merge(graphdef, params).transformer(ids, ids > 0))
        compiled = hidden.lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 2.2 * temporary_bytes(4096)


@pytest.mark.parity
def test_config_goes_to_hugging_face_and_back() -> None:
    from transformers import GPTNeoConfig as HFConfig

    theirs = HFConfig(
        hidden_size=48,
        num_layers=4,
        num_heads=3,
        attention_types=[[["global", "local"], 1], [["local"], 2]],
        window_size=17,
        vocab_size=VOCAB,
        bos_token_id=5,
        eos_token_id=6,
        attention_dropout=0.1,
        intermediate_size=99,
    )
    config = GPTNeoConfig.from_hf(theirs)
    assert config.attention_layers == tuple(theirs.attention_layers) == ("global", "local", "local", "local")
    back = HFConfig(**config.to_hf()).to_dict()
    expected = theirs.to_dict()
    for name in ("attention_types", "attention_layers", *(f.name for f in dataclasses.fields(config))):
        if name not in ("splats", "donor", *_NOT_STORED, *DONORS["gpt_neo"].fixed):
            assert back[name] == expected[name], name
    with_splats = dataclasses.replace(config, splats=SplatConfig(num_splats=2))
    assert GPTNeoConfig.from_hf(with_splats.to_hf()) == with_splats


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 5}, "num_heads = 5 does not divide hidden_size = 32"),
        ({"activation_function": "mish"}, "activation_function = 'mish' is unknown"),
        ({"attention_types": [[["banded"], 2]]}, "attention_types names 'banded'"),
        ({"attention_types": [[["global"], 3]]}, "describes 3 layers, num_layers = 2"),
        ({"attention_types": ["global"]}, "attention_types = "),
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"window_size": 0}, "window_size = 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon = nan"),
        ({"eos_token_id": True}, "eos_token_id = True"),
        ({"attention_layers": ["local", "global"]}, "attention_layers"),
        ({"splats": {"num_splats": 0, "window": 0}}, "num_splats = 0"),
        ({"splats": {"number": 1}}, "splats"),
        ({"splats": {"num_splats": -1}}, "num_splats = -1"),
        ({"splats": {"num_splats": 1, "window": -1}}, "window = -1"),
        ({"splats": {"num_splats": 1, "layers": "every"}}, "layers = 'every'"),
        ({"splats": {"num_splats": 1, "layers": [2]}}, "the model has 2 layers"),
        ({"splats": {"num_splats": 1, "layers": []}}, "no such layer"),
        ({"splats": {"num_splats": 1, "far_gain": 1}}, "far_gain = 1"),
    ],
)
def test_config_refuses_what_it_is_not(change: dict, words: str) -> None:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": MIXED,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    GPTNeoConfig.from_hf(values)
    with pytest.raises(InputError, match=words):
        GPTNeoConfig.from_hf(values | change)


def test_an_infinite_window_that_was_written_as_null_still_loads() -> None:
    splats = {"num_splats": 2, "window": None}
    old = GPTNeoConfig.from_hf(tiny_config().to_hf() | {"splats": splats})
    assert old == GPTNeoConfig.from_hf(tiny_config().to_hf() | {"splats": {"num_splats": 2}})
    assert old.windows == ("all", 8) and old.to_hf()["splats"]["window"] == "all"


def test_a_config_says_nothing_of_the_computation() -> None:
    config = dataclasses.replace(tiny_config(), dtype="bfloat16", remat=True)
    assert GPTNeoConfig.from_hf(config.to_hf() | {"dtype": "float16", "torch_dtype": "float16"}) == tiny_config()
    with pytest.raises(InputError, match="dtype = 'int8': must be one of float32"):
        dataclasses.replace(config, dtype="int8")


@pytest.mark.parametrize("dtype", [bool, np.int32, np.int64])
def test_masks_of_hugging_face_are_taken_at_every_door(dtype: type) -> None:
    """A tokenizer gives int64; results are those of bools, bit for bit."""
    model = tiny_model()
    ids, mask = random_ids(11, 2, 12).astype(np.int64), np.ones((2, 12), dtype)
    mask[1, :5] = 0
    expected = model(jnp.asarray(ids), jnp.asarray(mask, bool))
    chex.assert_trees_all_equal(model(ids, mask), expected)
    (want, want_cache), (got, cache) = (model.prefill(ids[:, :8], x[:, :8], 12) for x in (mask.astype(bool), mask))
    chex.assert_trees_all_equal((got, cache), (want, want_cache))
    following = [model.extend(ids[:, 8:], x[:, 8:], cache) for x in (mask.astype(bool), mask)]
    chex.assert_trees_all_equal(*following)


@pytest.mark.parametrize("mask", [np.ones((1, 3)), np.ones((2, 3), bool), np.array([[0, 1, 2]])], ids=str)
def test_what_is_no_mask_is_refused_at_every_door(mask: np.ndarray) -> None:
    model, ids = tiny_model(), np.ones((1, 3), np.int32)
    _, cache = model.prefill(ids, None, 6)
    for door in (
        lambda: model(ids, mask),
        lambda: model.prefill(ids, mask, 6),
        lambda: model.extend(ids, mask, cache),
    ):
        with pytest.raises(InputError, match="attention_mask"):
            door()


@pytest.mark.parametrize("given", ["mask", "segments", "positions"])
def test_more_tokens_than_positions_are_an_error(given: str) -> None:
    """Tokens count, not slots: padding and a new document take no position."""
    model = tiny_model(max_position_embeddings=16)
    ids, mask, segments = random_ids(0, 2, 20), np.ones((2, 20), bool), np.ones((2, 20), np.int32)
    with pytest.raises(InputError, match="row 0 has a token with position 16, the model has 16; give shorter texts"):
        model(ids)
    with pytest.raises(InputError, match="row 0 has a token with position 16"):
        model.prefill(ids, None, 20)
    arguments: dict[str, Any] = {"attention_mask": mask}
    mask[0, 3:7], mask[1, :4] = False, False
    if given == "segments":
        mask[:], segments[:, 10:] = True, 2
        arguments["segment_ids"] = segments
    elif given == "positions":
        mask[:] = True
        arguments["positions"] = jnp.arange(20)[None].repeat(2, axis=0) % 16
    assert np.isfinite(model(ids, **arguments)).all()
    if given == "mask":
        logits, cache = model.prefill(ids, mask, 40)
        assert np.isfinite(logits).all()
        with pytest.raises(InputError, match="row 0 has a token with position 16"):
            model.extend(ids[:, :1], None, cache)


def test_what_is_no_token_id_is_an_error() -> None:
    model = tiny_model()
    for wrong in (VOCAB, -1):
        with pytest.raises(InputError, match=f"row 1 has a token with token id {wrong}, the model has {VOCAB}"):
            model(np.array([[1, 2], [3, wrong]]))
    for wrong in (np.zeros(3, int), np.zeros((1, 3)), np.zeros((1, 2, 3), int)):
        with pytest.raises(InputError, match="input_ids is "):
            model(wrong)
    with pytest.raises(InputError, match=f"input_ids holds {2**32 + 1}, which 32 bits cannot"):
        model(np.array([[1, 2**32 + 1]]))


@pytest.mark.parametrize("positions", [np.zeros((1, 4), int), np.zeros(3, int), np.zeros((1, 3))], ids=str)
def test_positions_of_another_shape_are_an_error(positions: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"positions is .*; give integers of shape \[1, 3\]"):
        tiny_model()(np.array([[1, 2, 3]]), positions=positions)


def test_a_row_that_is_too_long_leaves_the_others_alone() -> None:
    """Inside of `jit`, where nobody can be told. And padding may hold any numbers."""
    model = tiny_model(max_position_embeddings=16)
    ids, mask = random_ids(1, 3, 20), np.ones((3, 20), bool)
    mask[1, 15:], mask[2, :8] = False, False
    expected = [np.asarray(model(ids[row : row + 1], mask[row : row + 1]))[0] for row in (1, 2)]
    ids[~mask] = np.array([-100, VOCAB, 2**30])[np.arange((~mask).sum()) % 3]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    positions[~mask] = 10**6
    for given in (None, jnp.asarray(positions)):
        got = np.asarray(jax.jit(lambda ids, positions: model(ids, mask, positions))(ids, given))
        for row, alone in zip((1, 2), expected, strict=True):
            np.testing.assert_allclose(got[row][mask[row]], alone[mask[row]], rtol=1e-4, atol=1e-4)
        assert np.isfinite(got[1:]).all() and np.isnan(got[0]).any()
