"""Configurations of models that are not this one: one line on stderr, exit code 2, and nothing left behind."""

import pytest

from helpers.hf_folders import tiny_config, write_folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type = 'llama': only 'gpt_neo' and 'gpt2' models are supported"),
        ({"model_type": []}, "model_type = []: only 'gpt_neo' and 'gpt2' models are supported"),
        ({"model_type": "gsa_gpt_neo", "donor": []}, "donor = []: must be one of gpt_neo, gpt2"),
        ({"model_type": None}, "no model_type"),
        ({"num_heads": 5}, "num_heads = 5 does not divide hidden_size = 32"),
        ({"num_heads": 0}, "num_heads = 0"),
        ({"hidden_size": "32"}, "hidden_size = '32'"),
        ({"hidden_size": 32.0}, "hidden_size = 32.0"),
        ({"activation_function": "tanhshrink"}, "activation_function = 'tanhshrink' is unknown"),
        ({"attention_types": [[["global", "sparse"], 1]]}, "attention_types names 'sparse'"),
        ({"attention_types": [[["global"], 1]]}, "attention_types describes 1 layers, num_layers = 2"),
        ({"attention_types": [[["global"], 10**9]]}, f"attention_types describes {10**9} layers, num_layers = 2"),
        ({"attention_types": "global"}, "attention_types = 'global'"),
        ({"attention_types": 3}, "attention_types = 3"),
        ({"attention_layers": ["local", "global"]}, "attention_layers = ['local', 'global'] contradicts"),
        ({"attention_layers": 3}, "attention_layers = 3 contradicts"),
        ({"window_size": -1}, "window_size = -1"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon = nan"),
        ({"attention_types": None, "attention_layers": "local"}, "attention_layers = 'local'"),
        (
            {"attention_types": None, "attention_layers": ["global"]},
            "attention_types describes 1 layers, num_layers = 2",
        ),
        ({"eos_token_id": "97"}, "eos_token_id = '97'"),
        ({"eos_token_id": [0, None, "</s>"]}, "eos_token_id = '</s>'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = false"),
        ({"num_attention_heads": 8}, "num_attention_heads = 8 contradicts num_heads = 4"),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 3 contradicts num_layers = 2"),
        ({"n_head": 2}, "n_head = 2 is no field of GPT-Neo and contradicts num_heads = 4"),
        ({"n_inner": 64}, "n_inner = 64 is no field of GPT-Neo and contradicts intermediate_size = 128"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"head_dim": 16}, "head_dim = 16 is no field of GPT-Neo and contradicts hidden_size / num_heads = 8"),
        ({"rope_theta": 10000.0}, "rope_theta = 10000.0"),
        ({"alibi": True}, "alibi = true"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling = {"),
        ({"quantization_config": {"bits": 8}}, "quantization_config = {"),
        ({"add_cross_attention": True}, "add_cross_attention = true"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads = {"),
        ({"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "auto_map = {"),
        ({"splats": [2]}, "splats = [2]"),
        ({"splats": {"num_splats": 0, "window": 0}}, "num_splats = 0"),
    ],
    ids=str,
)
def test_a_bad_configuration(run_gsa, tmp_path, changes, words):
    source = write_folder(tmp_path / "source", config=tiny_config(**changes))
    run_gsa("convert", source, tmp_path / "out").assert_refused(source / "config.json", words)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
