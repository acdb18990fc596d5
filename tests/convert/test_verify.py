"""`gsa verify`: it agrees with what was converted, and with nothing else."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gsa_jax import SplatConfig
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.convert import convert
from gsa_jax.convert.verify import verify
from gsa_jax.tokenizer_folder import tokenizer_files
from helpers.hf_folders import (
    UNUSED,
    splat_tensors,
    tiny_config,
    tiny_tensors,
    write_bin_folder,
    write_folder,
    write_sharded_folder,
)
from helpers.texts import STORIES

# Hugging Face's Flax mixes dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.slow
@pytest.mark.parity
def test_sources_that_transformers_does_not_read_by_itself(tmp_path):
    """Layers counted by another name, named one by one, and weights in a container behind a wrapper; a configuration
    that begins with a byte order mark."""
    named = {"attention_types": None, "attention_layers": ["global", "local"]}
    for number, changes in enumerate(({"num_layers": None, "num_hidden_layers": 2}, named)):
        source = write_folder(tmp_path / f"source {number}", config=tiny_config(**changes))
        convert(source, tmp_path / f"out {number}")
        comparisons = verify(source, tmp_path / f"out {number}")
        assert comparisons and all(comparison.agrees for comparison in comparisons)
        assert "configuration by our names" in comparisons[0].oracle
    source = write_folder(tmp_path / "marked")
    (source / "config.json").write_bytes(b"\xef\xbb\xbf" + (source / "config.json").read_bytes())
    convert(source, tmp_path / "out marked")
    assert all(comparison.agrees for comparison in verify(source, tmp_path / "out marked"))
    state = {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in tiny_tensors().items()}
    source = write_bin_folder(tmp_path / "container", {"model": state, "step": 3})
    convert(source, tmp_path / "out")
    comparisons = verify(source, tmp_path / "out")
    assert comparisons and all(comparison.agrees for comparison in comparisons)
    assert "weights by our names" in comparisons[0].oracle


def altered(checkpoint: Path, out: Path, name: str, change) -> Path:
    config, tensors = load_tensors(checkpoint)
    tensors[name] = change(tensors[name])
    save(out, config, tensors, copied=tokenizer_files(checkpoint))
    return out


def add_one(index):
    def change(tensor: np.ndarray) -> np.ndarray:
        tensor = tensor.copy()
        tensor[index] += 1
        return tensor

    return change


@pytest.mark.parity
def test_the_bundled_model_agrees_on_text(run_gsa, story_neo, story_checkpoint, monkeypatch):
    comparisons = []

    def recorded(*args, **kwargs):
        comparisons.extend(verify(*args, **kwargs))
        return comparisons

    monkeypatch.setattr("gsa_jax.convert.verify.verify", recorded)
    outcome = run_gsa("verify", story_neo, story_checkpoint, "--text", STORIES)
    assert outcome.code == 0 and outcome.err == ""
    assert outcome.out.count("agrees") == 4 and "DIFFERS" not in outcome.out
    assert [(comparison.oracle.split(".")[0], comparison.inputs) for comparison in comparisons] == [
        (oracle, inputs)
        for oracle in ("PyTorch (transformers 4", "Flax (transformers 4")
        for inputs in ("random ids", "stories.txt")
    ]
    for comparison in comparisons:
        assert comparison.agrees and comparison.top1_agreement > 0.99
        assert comparison.relative_rms < 1e-5
        assert comparison.loss == pytest.approx(comparison.oracle_loss, abs=1e-5)
        if comparison.inputs == "stories.txt":
            assert comparison.loss < 4 < np.log(1024), "the bundled model has read stories like these"


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("transformer.h.0.attn.attention.out_proj.bias", add_one(0)),
        ("transformer.h.1.mlp.c_fc.weight", add_one((0, 0))),
        pytest.param("transformer.wpe.weight", add_one((17, 3)), marks=pytest.mark.slow),
        pytest.param("transformer.h.1.attn.attention.q_proj.weight", np.transpose, marks=pytest.mark.slow),
        ("transformer.ln_f.weight", lambda tensor: np.full_like(tensor, np.nan)),
    ],
    ids=["bias", "one weight", "one position", "transposed", "NaN"],
)
def test_an_altered_weight_differs(run_gsa, tmp_path, name, change):
    source = write_folder(tmp_path / "source")
    convert(source, tmp_path / "checkpoint")
    wrong = altered(tmp_path / "checkpoint", tmp_path / "wrong", name, change)
    outcome = run_gsa("verify", source, wrong)
    assert outcome.code == 1
    assert outcome.out.count("DIFFERS") == 2 and "agrees" not in outcome.out


@pytest.mark.parity
@pytest.mark.parametrize(
    "form",
    [
        "module. in a .bin",
        "head for embedding",
        *(pytest.param(form, marks=pytest.mark.slow) for form in ("sharded", "base model", "splats")),
    ],
)
def test_sources_whose_names_are_not_transformers_own(run_gsa, tmp_path, form):
    tensors, source = tiny_tensors(), tmp_path / "source"
    if form == "module. in a .bin":
        write_bin_folder(source, {"module." + name: tensor for name, tensor in tensors.items()})
    elif form == "sharded":
        write_sharded_folder(source, tensors, suffix="bin")
    elif form == "base model":
        write_folder(source, {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    elif form == "head for embedding":
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
        write_folder(source, tensors)
    else:
        splats = splat_tensors(UNUSED)
        write_folder(source, tensors | splats)
    convert(source, tmp_path / "checkpoint")
    for comparison in verify(source, tmp_path / "checkpoint"):
        assert comparison.agrees
        # Names that transformers cannot read itself.
        by_our_names = comparison.oracle.endswith(", weights by our names")
        assert by_our_names == (form in ("module. in a .bin", "head for embedding"))
    wrong = altered(tmp_path / "checkpoint", tmp_path / "wrong", "transformer.h.0.mlp.c_fc.bias", add_one(0))
    assert run_gsa("verify", source, wrong).code == 1


@pytest.mark.parity
def test_the_command_agrees_with_a_wrapped_bin(run_gsa, tmp_path):
    state = {"module." + name: tensor for name, tensor in tiny_tensors().items()}
    source = write_bin_folder(tmp_path / "source", state)
    convert(source, tmp_path / "checkpoint", splats=SplatConfig(num_splats=2))
    assert run_gsa("verify", source, tmp_path / "checkpoint").code == 0


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fewer_bits_are_forgiven_only_where_they_were_asked_for(run_gsa, tmp_path, dtype):
    source = write_folder(tmp_path / "source")
    convert(source, tmp_path / "narrow", dtype=dtype)
    assert run_gsa("verify", source, tmp_path / "narrow").code == 0
    config, tensors = load_tensors(tmp_path / "narrow")
    wide = {name: t.astype(np.float32) for name, t in tensors.items()}
    save(tmp_path / "rounded", config, wide, copied=[])
    assert run_gsa("verify", source, tmp_path / "rounded").code == 1


@pytest.mark.parity
def test_a_source_in_half_precision_agrees_closely(tmp_path):
    source = write_folder(tmp_path / "source", tiny_tensors(torch.bfloat16))
    convert(source, tmp_path / "checkpoint")
    assert all(comparison.relative_rms < 1e-5 for comparison in verify(source, tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    "changes",
    [{"window_size": 7}, {"attention_types": [[["local", "global"], 1]], "attention_layers": None}, {"num_heads": 2}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_configuration_is_bad_input(run_gsa, tmp_path, changes):
    source = write_folder(tmp_path / "source")
    convert(write_folder(tmp_path / "other", config=tiny_config(**changes)), tmp_path / "checkpoint")
    outcome = run_gsa("verify", source, tmp_path / "checkpoint")
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err == (
        f"gsa: {tmp_path / 'checkpoint'}: has another configuration than {source}; was it converted from there?\n"
    )


def text_missing(tmp_path: Path) -> str:
    return "no such file"


def text_binary(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00")
    return "not UTF-8"


def text_empty(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("")
    return "no text in it"


@pytest.mark.parametrize("prepare", [text_missing, text_binary, text_empty])
def test_a_text_that_cannot_be_used(run_gsa, tmp_path, story_neo, story_checkpoint, prepare):
    words = prepare(tmp_path)
    outcome = run_gsa("verify", story_neo, story_checkpoint, "--text", tmp_path / "text.txt")
    assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1
    assert f"{tmp_path / 'text.txt'}: {words}" in outcome.err


def test_a_tokenizer_of_another_model(run_gsa, tmp_path, story_neo):
    source = write_folder(tmp_path / "source")
    shutil.copy(story_neo / "tokenizer.json", source)
    convert(source, tmp_path / "checkpoint")
    outcome = run_gsa("verify", source, tmp_path / "checkpoint", "--text", STORIES)
    assert outcome.code == 2 and "outside of the vocabulary of 97" in outcome.err


def test_without_pytorch_it_says_how_to_install_it(run_gsa, story_neo, story_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    outcome = run_gsa("verify", story_neo, story_checkpoint)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "pip install 'gsa-jax[torch]'" in outcome.err
