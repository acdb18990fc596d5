"""GPT-2 as a donor: it computes what Hugging Face's computes, and goes back into a folder bit for bit.

May be changed here: the grid of configurations, and the forms that its weights come in.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import GPT2Config, GPT2LMHeadModel

from gsa_jax import GPTNeoConfig, GPTNeoForCausalLM, InputError, generate, load
from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert import convert, export
from gsa_jax.convert.verify import verify
from gsa_jax.parameters import build_model, named_parameters
from helpers.bits import assert_same_tensors
from helpers.hf_folders import Tensors, read_safetensors
from helpers.hf_gpt2 import EAGER, SHAPE, hf_gpt2, tensors_of, with_buffers, without_prefix, write_gpt2
from helpers.hf_oracle import torch_logits
from helpers.tiny_models import random_ids, relative_rms

pytestmark = pytest.mark.parity

MODELS: dict[str, dict[str, Any]] = {
    "heads of 64": {"n_embd": 128, "n_head": 2},
    "heads of 80": {"n_embd": 80, "n_head": 1},
    "heads of 48": {"n_embd": 96, "n_head": 2},
    "heads of 8": {},
    "narrow mlp": {"n_inner": 20},
    "unscaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "n_embd": 64, "n_head": 1},
    "scaled by layer alone": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "relu": {"activation_function": "relu"},
    "exact gelu": {"activation_function": "gelu"},
    "tanh": {"activation_function": "tanh"},
    "silu": {"activation_function": "silu"},
    "large epsilon": {"layer_norm_epsilon": 0.1},
}

SLOW = pytest.mark.slow
FAST_MODELS = ("scaled by layer",)
FAST_FORMS = ("bin", "safetensors in shards")

GRID = [name if name in FAST_MODELS else pytest.param(name, marks=SLOW) for name in MODELS]


def ours(theirs: GPT2LMHeadModel, folder: Path, **options: Any) -> GPTNeoForCausalLM:
    """The same model, through a folder and a checkpoint."""
    convert(write_gpt2(folder / "source", theirs), folder / "checkpoint")
    return load(folder / "checkpoint", **options)


def padded_ids() -> tuple[np.ndarray, np.ndarray]:
    """Three rows, two of them padded on the left."""
    ids, mask = random_ids(1, 3, 40), np.ones((3, 40), bool)
    mask[1, :5], mask[2, :39] = False, False
    return ids, mask


@pytest.mark.parametrize("name", GRID)
def test_logits_equal_pytorch(tmp_path: Path, name: str) -> None:
    theirs = hf_gpt2(**MODELS[name])
    ids, mask = padded_ids()
    got = np.asarray(ours(theirs, tmp_path)(ids, mask))
    assert relative_rms(got[mask], torch_logits(theirs, ids, mask)[mask]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heads of 64", "heads of 80", "heads of 48"])
def test_logits_equal_flax(standard_promotion: None, tmp_path: Path, name: str) -> None:
    from transformers import FlaxGPT2LMHeadModel
    from transformers.modeling_flax_pytorch_utils import convert_pytorch_state_dict_to_flax

    theirs = hf_gpt2(**MODELS[name])
    flax = FlaxGPT2LMHeadModel(theirs.config)
    params = convert_pytorch_state_dict_to_flax(theirs.state_dict(), flax)
    ids, mask = padded_ids()
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    expected = flax(ids, attention_mask=mask.astype(int), position_ids=positions, params=params).logits
    got = np.asarray(ours(theirs, tmp_path)(ids, mask))
    assert relative_rms(got[mask], np.asarray(expected)[mask]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heads of 80", "heads of 64"])
def test_as_close_to_float64_as_pytorch_is(tmp_path: Path, name: str) -> None:
    theirs, ids = hf_gpt2(**MODELS[name]), random_ids(2, 2, 40)
    got, their_own = ours(theirs, tmp_path)(ids), torch_logits(theirs, ids)
    exact = torch_logits(theirs.double(), ids)
    assert relative_rms(got, exact) < max(2 * relative_rms(their_own, exact), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heads of 80", "heads of 64", "heads of 48"])
def test_bfloat16_stays_near_pytorch(standard_promotion: None, tmp_path: Path, name: str) -> None:
    theirs, ids = hf_gpt2(**MODELS[name]), random_ids(3, 2, 40)
    expected = torch_logits(theirs, ids)
    logits = ours(theirs, tmp_path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(ids)
    their_error = relative_rms(torch_logits(theirs.to(torch.bfloat16), ids), expected)
    assert relative_rms(logits, expected) < 1.5 * their_error


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_powers_of_two_give_the_bits_of_scaled_weights(standard_promotion: None, tmp_path: Path, dtype: str) -> None:
    """Heads of 64: whether the scale is in the projections or behind them is no matter."""
    model = ours(hf_gpt2(**MODELS["heads of 64"]), tmp_path)
    scaled, (of_queries, of_keys) = named_parameters(model), model.config.score_scales(0)
    for name, tensor in scaled.items():
        factor = {"q_proj": of_queries, "k_proj": of_keys}.get(name.split(".")[-2], 1.0)
        scaled[name] = tensor * factor
    plain = dataclasses.replace(model.config, scale_attn_weights=False, dtype=dtype)
    expected = build_model(plain, scaled)(random_ids(4, 2, 30))
    model = build_model(dataclasses.replace(model.config, dtype=dtype), named_parameters(model))
    np.testing.assert_array_equal(model(random_ids(4, 2, 30)), expected)
    assert relative_rms(build_model(plain, named_parameters(model))(random_ids(4, 2, 30)), expected) > 1e-2


@pytest.mark.parametrize("head_dim", [4, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("by_layer", [False, True])
def test_queries_and_keys_share_the_scale(head_dim: int, by_layer: bool) -> None:
    fields = {"model_type": "gpt2", "n_embd": 2 * head_dim, "n_head": 2, "scale_attn_by_inverse_layer_idx": by_layer}
    config = GPTNeoConfig.from_hf(fields)
    for layer in range(config.num_layers):
        of_queries, of_keys = config.score_scales(layer)
        assert of_queries * of_keys == pytest.approx(head_dim**-0.5 / (layer + 1 if by_layer else 1), rel=1e-15)
        assert np.frexp(of_keys)[0] == 0.5 and 0.5 <= of_queries / of_keys <= 2
    assert dataclasses.replace(config, scale_attn_weights=False).score_scales(0) == (1, 1)


@pytest.mark.slow
def test_cache_equals_no_cache(tmp_path: Path) -> None:
    model = ours(hf_gpt2(**MODELS["heads of 80"]), tmp_path)
    ids, mask = random_ids(5, 2, 30), np.ones((2, 30), bool)
    mask[1, :7] = False
    expected = np.asarray(model(ids, mask))
    graphdef, params = nnx.split(model)
    extend = jax.jit(lambda params, token, mask, cache: nnx.merge(graphdef, params).extend(token, mask, cache))
    logits, cache = model.prefill(ids[:, :16], mask[:, :16], 30)
    for step in range(16, 30):
        assert relative_rms(logits, expected[:, step - 1]) < 1e-5, f"step {step}"
        logits, cache = extend(params, ids[:, step : step + 1], np.ones((2, 1), bool), cache)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heads of 80", "heads of 64", "heads of 48"])
def test_greedy_equals_hugging_face(tmp_path: Path, name: str) -> None:
    """A batch of different lengths, token for token."""
    theirs = hf_gpt2(**MODELS[name])
    prompts = [random_ids(n, n).tolist() for n in (1, 3, 16)]
    ids = torch.tensor([[0] * (16 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (16 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=40, **options)[:, 16:]
    got = generate(ours(theirs, tmp_path), prompts, max_new_tokens=40, eos_token_id=-1)
    np.testing.assert_array_equal(got, expected.numpy())


FORMS = {
    "safetensors": lambda tensors: tensors,
    "bin": with_buffers,
    "safetensors in shards": without_prefix,
    "bin in shards": lambda tensors: without_prefix(with_buffers(tensors)),
}


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        pytest.param(form, dtype, marks=() if form in FAST_FORMS and dtype == torch.bfloat16 else SLOW)
        for form in FORMS
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
    ],
    ids=str,
)
def test_there_and_back_every_tensor_is_the_same(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    theirs = hf_gpt2()
    tensors = tensors_of(theirs, dtype)
    convert(write_gpt2(tmp_path / "source", theirs, FORMS[form](tensors), form=form), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported")
    assert_same_tensors(read_safetensors(tmp_path / "exported"), tensors)
    loaded: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "exported", output_loading_info=True, **EAGER)
    assert not any(loaded[1].values())
    ids = random_ids(6, 2, 20)
    np.testing.assert_array_equal(torch_logits(loaded[0].float(), ids), torch_logits(theirs.to(dtype).float(), ids))


def test_subnormals_and_payloads_survive(tmp_path: Path) -> None:
    theirs = hf_gpt2()
    tensors = tensors_of(theirs)
    odd = torch.tensor([0x80000000, 1, 0x7FC12345, 0x7F800000, 0xFF800000], dtype=torch.uint32).view(torch.float32)
    for name in ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight"):
        tensors[f"transformer.h.1.{name}"][3, :5] = odd
    tensors["transformer.h.1.attn.c_attn.bias"][30:35] = odd
    convert(write_gpt2(tmp_path / "source", theirs, tensors), tmp_path / "checkpoint", allow_nonfinite=True)
    export(tmp_path / "checkpoint", tmp_path / "exported")
    assert_same_tensors(read_safetensors(tmp_path / "exported"), tensors)


def test_the_head_may_stand_for_the_embedding(tmp_path: Path) -> None:
    theirs = hf_gpt2()
    tensors = tensors_of(theirs)
    headed = {**tensors, "lm_head.weight": tensors.pop("transformer.wte.weight")}
    headed.pop("transformer.wte.weight")
    convert(write_gpt2(tmp_path / "source", theirs, headed), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported")
    assert_same_tensors(read_safetensors(tmp_path / "exported"), tensors_of(theirs))
    other = {**tensors_of(theirs), "lm_head.weight": tensors_of(hf_gpt2(1))["transformer.wte.weight"]}
    with pytest.raises(InputError, match="a model with an output head of its own is not supported"):
        convert(write_gpt2(tmp_path / "untied", theirs, other), tmp_path / "out")


def change(tensors: Tensors, name: str, make: Any) -> Tensors:
    return {**tensors, f"transformer.h.1.{name}": make(tensors[f"transformer.h.1.{name}"])}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda x: change(x, "attn.c_attn.weight", lambda w: w.T), r"c_attn.weight has shape \[96, 32\], expected"),
        (lambda x: {n: t for n, t in x.items() if "0.attn.c_attn.bias" not in n}, r"missing .*0.attn.c_attn.bias \[96"),
        (lambda x: x | {"transformer.h.0.crossattention.q_attn.weight": torch.ones(2)}, "unexpected .*crossattention"),
        (lambda x: x | {"multiple_choice_head.summary.weight": torch.ones(2)}, "GPT2LMHeadModel.from_pretrained"),
        (lambda x: x | {"score.weight": torch.ones(2)}, "GPT2LMHeadModel.from_pretrained"),
    ],
)
def test_tensors_that_do_not_fit_are_named_as_they_are_stored(tmp_path: Path, damage: Any, words: str) -> None:
    theirs = hf_gpt2()
    damaged = {name: tensor.contiguous() for name, tensor in damage(tensors_of(theirs)).items()}
    with pytest.raises(InputError, match=words):
        convert(write_gpt2(tmp_path / "source", theirs, damaged), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"add_cross_attention": True}, "add_cross_attention = true"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = true"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = false: an output head of its own"),
        ({"activation_function": "quick_gelu"}, "activation_function = 'quick_gelu' is unknown"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"n_head": 5}, "num_heads = 5 does not divide hidden_size = 32"),
        ({"n_layer": "2"}, "num_layers = '2'"),
        ({"n_layer": None}, "num_layers = None"),
        ({"num_heads": 2}, "num_heads = 2 is no field of GPT-2 and contradicts n_head = 4; set n_head"),
        ({"intermediate_size": 64}, "intermediate_size = 64 is no field of GPT-2 and contradicts n_inner = 128"),
        ({"num_attention_heads": 2}, "num_attention_heads = 2 contradicts n_head = 4"),
        ({"scale_attn_weights": 1}, "scale_attn_weights = 1: must be true or false"),
        ({"attention_bias": False}, "attention_bias = false"),
        ({"attention_types": [[["local"], 2]]}, "attention_types is no field of GPT-2"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling"),
    ],
    ids=str,
)
def test_a_bad_configuration(run_gsa: Any, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    source = write_gpt2(tmp_path / "source", hf_gpt2(), **changes)
    run_gsa("convert", source, tmp_path / "out").assert_refused(source / "config.json", words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bias", [True, False])
def test_a_gpt_neo_has_no_fields_of_a_gpt_2(bias: bool) -> None:
    for name in ("attention_bias", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
        fields = {"model_type": "gpt_neo", name: bias}
        if bias:
            with pytest.raises(InputError, match=f"{name} = true"):
                GPTNeoConfig.from_hf(fields)
        else:
            assert GPTNeoConfig.from_hf(fields) == GPTNeoConfig()
    with pytest.raises(InputError, match="attention_bias = False: it is True in every GPT-2"):
        GPTNeoConfig(donor="gpt2", attention_types=((("global",), 24),))
    with pytest.raises(InputError, match="a GPT-2 has no such layers"):
        GPTNeoConfig(donor="gpt2", attention_bias=True)


def test_defaults_are_those_of_hugging_face() -> None:
    bare = {"model_type": "gpt2"}  # such as the first config.json of GPT-2, written before some fields were there
    assert GPTNeoConfig.from_hf(bare) == GPTNeoConfig.from_hf(GPT2Config())
    by_alias = GPT2Config(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=7)
    fields = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 7}
    assert GPTNeoConfig.from_hf(bare | fields) == GPTNeoConfig.from_hf(by_alias)
    assert GPTNeoConfig.from_hf(bare | {"n_ctx": 3}) == GPTNeoConfig.from_hf(bare)  # nobody reads it any more


def test_the_configuration_survives(tmp_path: Path) -> None:
    theirs = hf_gpt2(
        n_inner=20,
        activation_function="relu",
        resid_pdrop=0.2,
        embd_pdrop=0.3,
        attn_pdrop=0.4,
        layer_norm_epsilon=1e-3,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
        summary_first_dropout=0.25,
        eos_token_id=[3, 5],
    )
    convert(write_gpt2(tmp_path / "source", theirs, n_ctx=64), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported")
    back, expected = (
        GPT2Config.from_pretrained(folder).to_dict() for folder in (tmp_path / "exported", tmp_path / "source")
    )
    for name in ("transformers_version", "dtype", "torch_dtype", "_name_or_path"):
        back.pop(name, None), expected.pop(name, None)
    assert back == expected
    written = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert "attention_types" not in written and "window_size" not in written and "num_heads" not in written


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heads of 64", "unscaled"])
def test_verify_agrees_and_notices(standard_promotion: None, tmp_path: Path, name: str) -> None:
    """Hugging Face's Flax is asked where it computes what the configuration says."""
    source = write_gpt2(tmp_path / "source", hf_gpt2(**MODELS[name]))
    convert(source, tmp_path / "checkpoint")
    comparisons = verify(source, tmp_path / "checkpoint")
    assert [comparison.oracle.split()[0] for comparison in comparisons] == ["PyTorch", "Flax"][
        : 1 + (name != "unscaled")
    ]
    assert all(comparison.agrees for comparison in comparisons)
    other = write_gpt2(tmp_path / "other", hf_gpt2(1, **MODELS[name]))
    assert not any(comparison.agrees for comparison in verify(other, tmp_path / "checkpoint"))


@pytest.mark.slow
def test_verify_reads_what_transformers_does_not(standard_promotion: None, tmp_path: Path) -> None:
    theirs = hf_gpt2()
    wrapped = {f"module.{name}": tensor for name, tensor in tensors_of(theirs).items()}
    source = write_gpt2(tmp_path / "source", theirs, wrapped, form="bin")
    convert(source, tmp_path / "checkpoint")
    comparisons = verify(source, tmp_path / "checkpoint")
    assert comparisons and all(comparison.agrees for comparison in comparisons)
    assert "weights by our names" in comparisons[0].oracle


def test_the_checkpoint_has_our_names(tmp_path: Path) -> None:
    """As PyTorch stores a `Linear`, whatever the donor: `[out, in]`, one for each of queries, keys and values."""
    theirs = hf_gpt2()
    convert(write_gpt2(tmp_path / "source", theirs), tmp_path / "checkpoint")
    config, tensors = load_tensors(tmp_path / "checkpoint")
    assert config.donor == "gpt2" and config.num_heads == SHAPE["n_head"]
    attention, stored = "transformer.h.1.attn.attention.", theirs.state_dict()
    joined = stored["transformer.h.1.attn.c_attn.weight"].numpy()
    np.testing.assert_array_equal(tensors[f"{attention}k_proj.weight"], joined[:, 32:64].T)
    biases = [tensors[f"{attention}{name}_proj.bias"] for name in "qkv"]
    np.testing.assert_array_equal(np.concatenate(biases), stored["transformer.h.1.attn.c_attn.bias"].numpy())
