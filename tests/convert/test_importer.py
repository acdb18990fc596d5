"""Conversion: every way in which weights are stored and named arrives bit for bit, whole or not at all."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gsa_jax import GPTNeoConfig, SplatConfig
from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert import convert
from gsa_jax.errors import InputError
from gsa_jax.parameters import expected_shapes
from gsa_jax.tokenizer_folder import load_tokenizer
from helpers.bits import assert_same_tensors, bits
from helpers.hf_folders import (
    ATTENTION,
    NUM_HEADS,
    NUM_LAYERS,
    read_safetensors,
    tiny_config,
    tiny_tensors,
    write_bin_folder,
    write_folder,
    write_sharded_folder,
)

WTE = "transformer.wte.weight"

TINY_STORIES_33M = {
    "model_type": "gpt_neo",
    "activation_function": "gelu_new",
    "attention_layers": ["global", "local", "global", "local"],
    "attention_types": [[["global", "local"], 2]],
    "hidden_size": 768,
    "intermediate_size": None,
    "max_position_embeddings": 2048,
    "num_heads": 16,
    "num_layers": 4,
    "vocab_size": 50257,
    "window_size": 256,
}


def converted(source: Path, out: Path, **options) -> dict[str, np.ndarray]:
    convert(source, out, **options)
    return load_tensors(out)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "legacy bin", "sharded bin"])
def test_every_file_format_arrives_bit_for_bit(tmp_path, form, dtype):
    tensors, source = tiny_tensors(dtype), tmp_path / "source"
    if form == "safetensors":
        write_folder(source, tensors)
    elif form.startswith("sharded"):
        write_sharded_folder(source, tensors, suffix=form.split()[1])
    else:
        write_bin_folder(source, tensors, legacy=form.startswith("legacy"))
    assert_same_tensors(converted(source, tmp_path / "out"), tensors)


def test_a_bin_of_parameters_and_of_views(tmp_path):
    tensors = tiny_tensors()
    stored = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    stored[WTE] = torch.nn.Parameter(tensors[WTE].T.contiguous().T)  # as stored by whoever saved a transposed view
    assert_same_tensors(converted(write_bin_folder(tmp_path / "source", stored), tmp_path / "out"), tensors)


def test_dtypes_may_differ_from_tensor_to_tensor(tmp_path):
    tensors = tiny_tensors()
    tensors[WTE] = tensors[WTE].bfloat16()
    assert_same_tensors(converted(write_folder(tmp_path / "source", tensors), tmp_path / "out"), tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_rounds_as_pytorch_does(tmp_path, dtype):
    tensors = tiny_tensors()
    got = converted(
        write_folder(tmp_path / "source", tensors), tmp_path / "out", dtype=dtype, splats=SplatConfig(num_splats=2)
    )
    splats = {name: got.pop(name) for name in list(got) if ".splat_" in name}
    assert_same_tensors(got, {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()})
    assert {str(splat.dtype) for splat in splats.values()} == {dtype}


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("module.", ""),
        ("_orig_mod.module.", ""),
        ("module.model.", ""),
        ("base_model.model.", ""),
        ("_forward_module.", "_checkpoint_wrapped_module."),
        ("_fsdp_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
        ("", "_orig_mod."),
    ],
)
def test_wrappers_are_left_out_wherever_they_stand(run_gsa, tmp_path, before, inside):
    tensors = tiny_tensors()
    state = {before + re.sub(r"(\.h\.\d+\.)", rf"\1{inside}", name): tensor for name, tensor in tensors.items()}
    assert len(state.keys() & tensors.keys()) < len(tensors)
    outcome = run_gsa("convert", write_bin_folder(tmp_path / "source", state), tmp_path / "out")
    assert outcome.code == 0 and outcome.err == ""
    assert_same_tensors(load_tensors(tmp_path / "out")[1], tensors)
    wrappers = {part for part in f"{before}{inside}".split(".") if part}
    assert set(json.loads((tmp_path / "out" / "conversion.json").read_text())["wrappers"]) == wrappers
    assert "wrappers left out" in outcome.out and all(wrapper in outcome.out for wrapper in wrappers)


def test_what_stood_around_a_state_dict_is_said(run_gsa, tmp_path):
    tensors = tiny_tensors()
    content = {"model": {"module": tensors, "ema": None}, "optimizer": {"state": {}}, "step": 3}
    outcome = run_gsa("convert", write_bin_folder(tmp_path / "source", content), tmp_path / "out")
    assert outcome.code == 0 and "taken out of" in outcome.out
    assert_same_tensors(load_tensors(tmp_path / "out")[1], tensors)
    said = json.loads((tmp_path / "out" / "conversion.json").read_text())["containers"]
    assert said == ["pytorch_model.bin: model.module; left behind: optimizer, step, ema"]


def test_files_travel_or_are_named(run_gsa, tmp_path, story_neo):
    source = write_folder(tmp_path / "source", tiny_tensors(vocab_size=1024), tiny_config(vocab_size=1024))
    shutil.copyfile(story_neo / "tokenizer.json", source / "tokenizer.json")
    travelling = ("spiece.model", "tokenizer.model", "vocab.txt", "chat_template.jinja", "generation_config.json")
    for number, name in enumerate((*travelling, "optimizer.pt", "README.md", "merges.txt.bak")):
        (source / name).write_text(f"{number}", encoding="utf-8")
    for folder in ("additional_chat_templates", "runs"):
        (source / folder).mkdir()
        (source / folder / "rag.jinja").write_text("{{ messages }}", encoding="utf-8")
    outcome = run_gsa("convert", source, tmp_path / "out")
    assert outcome.code == 0
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["left_behind"] == ["README.md", "merges.txt.bak", "optimizer.pt", "runs/"]
    assert "README.md, merges.txt.bak, optimizer.pt, runs/" in outcome.out
    assert run_gsa("export", tmp_path / "out", tmp_path / "exported").code == 0
    for folder in (tmp_path / "out", tmp_path / "exported"):
        for name in (*travelling, "tokenizer.json", "additional_chat_templates/rag.jinja"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "exported" / "config.carried.json").exists()


def test_a_tokenizer_from_another_folder(run_gsa, tmp_path, story_neo):
    source = write_folder(tmp_path / "bare", tiny_tensors(vocab_size=1024), tiny_config(vocab_size=1024))
    assert run_gsa("convert", source, tmp_path / "without").code == 0
    run_gsa("generate", tmp_path / "without", "--prompt", "Once").assert_refused("no tokenizer", "--tokenizer FOLDER")
    assert run_gsa("convert", source, tmp_path / "with", "--tokenizer", story_neo).code == 0
    text = "Once upon a time"
    assert load_tokenizer(tmp_path / "with").encode(text) == load_tokenizer(story_neo).encode(text)
    assert not (tmp_path / "with" / "generation_config.json").exists()  # of another model
    small = write_folder(tmp_path / "small")
    outcome = run_gsa("convert", small, tmp_path / "no", "--tokenizer", story_neo)
    outcome.assert_refused(story_neo, "1024 tokens, the model 97")
    outcome = run_gsa("convert", story_neo, tmp_path / "no", "--tokenizer", story_neo)
    outcome.assert_refused(story_neo, "has a tokenizer")
    run_gsa("convert", source, tmp_path / "no", "--tokenizer", tmp_path).assert_refused(tmp_path, "no tokenizer in it")
    assert not (tmp_path / "no").exists()


def test_special_tokens_beyond_the_vocabulary_are_a_warning(run_gsa, tmp_path):
    config = tiny_config(bos_token_id=50256, eos_token_id=[97, 3])
    outcome = run_gsa("convert", write_folder(tmp_path / "source", config=config), tmp_path / "out")
    assert outcome.code == 0
    for words in ("bos_token_id = 50256 is beyond the vocabulary of 97 tokens", "eos_token_id = 97 is beyond"):
        assert f"gsa: warning: {words}" in outcome.err
    assert len(json.loads((tmp_path / "out" / "conversion.json").read_text())["warnings"]) == 2
    got = load_tensors(tmp_path / "out")[0]
    assert (got.bos_token_id, got.eos_token_id) == (50256, (97, 3))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_base_model_has_no_transformer_prefix(tmp_path, prefix):
    tensors = tiny_tensors()
    base = {prefix + name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert_same_tensors(converted(write_folder(tmp_path / "source", base), tmp_path / "out"), tensors)


def test_mask_buffers_go_and_biases_stay(tmp_path):
    tensors = tiny_tensors()
    buffers = {}
    for layer in range(NUM_LAYERS):
        buffers[ATTENTION.format(layer) + "bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
        buffers[ATTENTION.format(layer) + "masked_bias"] = torch.tensor(-1e9)
    got = converted(write_folder(tmp_path / "source", tensors | buffers), tmp_path / "out")
    assert ATTENTION.format(0) + "out_proj.bias" in got
    assert_same_tensors(got, tensors)
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert set(report["ignored"]) == set(buffers)


def test_a_tied_head_may_be_there_or_stand_for_the_embedding(tmp_path):
    tensors = tiny_tensors()
    both = tensors | {"lm_head.weight": tensors[WTE].clone()}
    assert_same_tensors(converted(write_folder(tmp_path / "both", both), tmp_path / "out both"), tensors)
    head_only = {name: tensor for name, tensor in both.items() if name != WTE}
    assert_same_tensors(converted(write_folder(tmp_path / "head", head_only), tmp_path / "out head"), tensors)


def test_a_head_of_its_own_is_refused(tmp_path):
    tensors = tiny_tensors()
    head = tensors[WTE].clone()
    head[3, 5] += 1
    source = write_folder(tmp_path / "source", tensors | {"lm_head.weight": head})
    with pytest.raises(InputError, match=r"lm_head\.weight \[97, 32\] differs from the token embedding"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_links_as_in_the_hubs_cache(tmp_path):
    blobs, source = write_folder(tmp_path / "blobs"), tmp_path / "snapshots" / "0123"
    source.mkdir(parents=True)
    for file in blobs.iterdir():
        (source / file.name).symlink_to(file)
    got = converted(source, tmp_path / "out")
    assert_same_tensors(got, read_safetensors(blobs))
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))


def test_what_a_checkpoint_holds(story_neo, story_checkpoint):
    config, tensors = load_tensors(story_checkpoint)
    assert config == GPTNeoConfig(
        vocab_size=1024,
        max_position_embeddings=512,
        hidden_size=192,
        num_layers=4,
        attention_types=((("global", "local"), 2),),
        num_heads=4,
        window_size=64,
        bos_token_id=0,
        eos_token_id=0,
        splats=SplatConfig(num_splats=2),
    )
    own = {name: tensor for name, tensor in tensors.items() if ".splat_" not in name}
    assert_same_tensors(own, read_safetensors(story_neo))
    report = json.loads((story_checkpoint / "conversion.json").read_text())
    assert report["source"] == str(story_neo)
    assert report["tensors"] == len(tensors)
    assert report["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert report["splats"] == "attached"
    assert report["splat_parameters"] == 2 * 4 * 2 * (48 + 1)
    text = "Once upon a time, there was a little girl."
    assert load_tokenizer(story_checkpoint).encode(text) == load_tokenizer(story_neo).encode(text)
    for name in report["tokenizer"]:
        assert (story_checkpoint / name).read_bytes() == (story_neo / name).read_bytes()
    assert {file.name for file in story_checkpoint.iterdir()} == {
        "config.json",
        "conversion.json",
        "weights",
        "config.carried.json",
        *report["tokenizer"],
    }


def test_attached_splats_are_distinct_and_the_same_each_time(story_neo, story_checkpoint, tmp_path):
    again = converted(story_neo, tmp_path / "again", splats=SplatConfig(num_splats=2))
    tensors = load_tensors(story_checkpoint)[1]
    assert_same_tensors(again, tensors)
    centers = [tensor for name, tensor in tensors.items() if name.endswith(".splat_centers")]
    everything = np.concatenate([tensor.reshape(-1, 48) for tensor in centers])
    assert len(np.unique(everything, axis=0)) == 2 * 4 * 2


def test_two_splats_add_6272_parameters_to_tiny_stories_33m():
    plain = GPTNeoConfig.from_hf(TINY_STORIES_33M)
    splats = GPTNeoConfig.from_hf(TINY_STORIES_33M | {"splats": {"num_splats": 2, "layers": "all"}})
    sizes = [
        {name: int(np.prod(shape)) for name, shape in expected_shapes(config).items()} for config in (plain, splats)
    ]
    per_layer = 4 * 768**2 + 768 + (768 * 3072 + 3072) + (3072 * 768 + 768) + 2 * 2 * 768
    assert sum(sizes[0].values()) == (50257 + 2048) * 768 + 4 * per_layer + 2 * 768
    assert sum(sizes[1].values()) - sum(sizes[0].values()) == 6272
    assert {name for name in sizes[1] if name not in sizes[0]} == {
        f"transformer.h.{layer}.attn.attention.{leaf}"
        for layer in range(4)
        for leaf in ("splat_centers", "splat_log_scales")
    }


def test_the_output_appears_at_the_end(tmp_path):
    source, out = write_folder(tmp_path / "source"), tmp_path / "new" / "folder" / "out"
    seen = []

    def watch(names):
        for name in names:
            seen.append(out.exists())
            yield name

    convert(source, out, progress=watch)
    assert len(seen) > 10 and not any(seen)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


def test_the_command_says_what_it_did(run_gsa, tmp_path):
    buffer = ATTENTION.format(0) + "masked_bias"
    source = write_folder(tmp_path / "source", tiny_tensors() | {buffer: torch.tensor(-1e9)})
    outcome = run_gsa("convert", source, tmp_path / "out", "--num-splats", 3, "--layers", "all")
    assert outcome.code == 0 and outcome.err == ""
    added = NUM_LAYERS * NUM_HEADS * 3 * (8 + 1)
    for words in (f"attached ({added} parameters)", "none in the source", buffer, "mask buffer"):
        assert words in outcome.out


@pytest.mark.slow
def test_memory_peaks_at_the_output_and_the_largest_tensor(tmp_path):
    benchmark = Path(__file__).parents[2] / "benchmarks" / "convert_memory.py"
    result = tmp_path / "result.json"
    shape = ["--hidden-size", "512", "--num-layers", "24"]
    subprocess.run([sys.executable, benchmark, tmp_path / "work", "--out", result, *shape], check=True)
    measured = json.loads(result.read_text())
    assert measured["output_tensors"] > 190e6
    slack = 48 * 2**20
    assert measured["peak_anonymous"] <= measured["output_tensors"] + measured["largest_tensor"] + slack
    assert not list((tmp_path / "work").iterdir())


def test_the_oracle_of_these_tests_tells_tensors_apart():
    tensor = torch.tensor([0.0])
    assert bits(tensor) != bits(-tensor)
    assert bits(tensor) != bits(tensor.half())
    assert bits(tensor) == bits(tensor.numpy())
    assert tiny_config(model_type=None).get("model_type") is None
