"""Fields of a config.json: by every name that Hugging Face takes, and refused where it would be another model."""

import dataclasses
import json

import numpy as np
import pytest

from gsa_jax import GPTNeoConfig, InputError
from gsa_jax.config import read_config
from gsa_jax.hf_fields import DONORS
from gsa_jax.text import start_token
from helpers.tiny_models import SETTINGS, tiny_config


def read(**changes: object) -> GPTNeoConfig:
    """The tiny model's configuration, with these fields; without those that are `...`."""
    return GPTNeoConfig.from_hf({name: value for name, value in (SETTINGS | changes).items() if value is not ...})


@pytest.mark.parity
def test_aliases_are_those_of_hugging_face() -> None:
    from transformers import GPTNeoConfig as HFConfig

    assert HFConfig.attribute_map == DONORS["gpt_neo"].aliases
    for alias, name in DONORS["gpt_neo"].aliases.items():
        theirs = HFConfig(**SETTINGS | {alias: SETTINGS[name]})
        assert getattr(theirs, name) == getattr(read(**{name: ..., alias: SETTINGS[name]}), name) == SETTINGS[name]


@pytest.mark.parity
def test_a_number_of_heads_by_its_other_name_is_the_one_that_is_computed_with(tmp_path) -> None:
    import torch
    from transformers import GPTNeoForCausalLM

    from gsa_jax.checkpoint import load
    from gsa_jax.convert import convert
    from helpers.hf_folders import tiny_config as hf_config
    from helpers.hf_folders import tiny_tensors, write_folder

    source = write_folder(tmp_path / "source", tiny_tensors(), hf_config(num_heads=None, num_attention_heads=4))
    convert(source, tmp_path / "out")
    ids = np.random.default_rng(0).integers(1, 97, (1, 24))
    with torch.no_grad():
        expected = GPTNeoForCausalLM.from_pretrained(source).eval()(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(np.asarray(load(tmp_path / "out")(ids)), expected, atol=2e-4)


def test_layers_may_be_named_one_by_one() -> None:
    layers = ["global", "local"]
    many = read(attention_types=None, attention_layers=layers * 3, num_layers=6)
    assert many == read(attention_types=[[layers, 3]], num_layers=6)
    odd = read(attention_types=None, attention_layers=[*layers, "local"], num_layers=3)
    assert odd.attention_layers == ("global", "local", "local")
    for changes in ({"attention_types": ...}, {"attention_types": None}):
        assert read(**changes, attention_layers=layers).attention_layers == ("global", "local")
    with pytest.raises(InputError, match="attention_types = null"):
        read(attention_types=None)


@pytest.mark.parametrize(
    "harmless",
    [
        {
            "num_attention_heads": 4,
            "n_head": 4,
            "head_dim": 8,
            "n_inner": 128,
            "hidden_act": "gelu_new",
            "n_embd": None,
        },
        {"tie_word_embeddings": True, "is_encoder_decoder": False, "pruned_heads": {}, "rope_scaling": None},
        {"use_cache": True, "torchscript": False, "summary_type": "cls_index", "gradient_checkpointing": True},
    ],
)
def test_fields_that_say_the_same_or_nothing_are_no_matter(harmless) -> None:
    assert read(**harmless) == tiny_config()


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"is_encoder_decoder": True},
        {"add_cross_attention": True},
        {"pruned_heads": {"0": [1]}},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 10_000.0},
        {"rotary_dim": 64},
        {"position_embedding_type": "relative_key"},
        {"scale_attn_weights": True},
        {"attention_multiplier": 0.125},
        {"logit_scale": 0.5},
        {"attn_logit_softcapping": 50.0},
        {"use_parallel_residual": True},
        {"multi_query": True},
        {"alibi": True},
        {"num_experts": 8},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_fields_that_make_it_another_model_are_refused_by_name(changes) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(changes))} = .* not supported$"):
        read(**changes)


@pytest.mark.parametrize("changes", [{"n_head": 2}, {"d_model": 64}, {"hidden_act": "relu"}, {"sliding_window": 99}])
def test_another_models_name_for_a_field_must_not_contradict_it(changes) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(changes))} = .* is no field of GPT-Neo and contradicts"):
        read(**changes)


def test_a_byte_order_mark_is_dropped(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"model_type": "gpt_neo"}), encoding="utf-8-sig")
    assert read_config(tmp_path / "config.json") == tiny_config()


def test_the_end_may_be_one_of_several_tokens_or_beyond_the_vocabulary() -> None:
    assert read(eos_token_id=[0, 3]).eos_token_id == (0, 3)
    assert read(eos_token_id=[]).eos_token_id is None
    assert read(eos_token_id=[0, 3]).to_hf()["eos_token_id"] == [0, 3]
    assert read().beyond_vocabulary == read(eos_token_id=None).beyond_vocabulary == []
    assert len(read(bos_token_id=97, eos_token_id=[3, 97, -1]).beyond_vocabulary) == 3


def test_documents_do_not_start_with_a_token_beyond_the_vocabulary() -> None:
    assert start_token(read(bos_token_id=None, eos_token_id=[3, 97])) == 3
    for config in (read(bos_token_id=97), read(bos_token_id=None, eos_token_id=50256)):
        with pytest.raises(InputError, match="not in the vocabulary of 97 tokens; set bos_token_id"):
            start_token(config)
    assert dataclasses.replace(read(), bos_token_id=97).bos_token_id == 97
