"""Export: what Hugging Face loads from it is the model that was converted, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPTNeoForCausalLM

from gsa_jax import GPTNeoConfig, SplatConfig
from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert import convert, export
from helpers.bits import assert_same_tensors
from helpers.hf_folders import (
    GSA,
    UNUSED,
    read_safetensors,
    splat_tensors,
    tiny_config,
    tiny_tensors,
    write_bin_folder,
    write_folder,
)
from helpers.hf_oracle import torch_logits
from helpers.tiny_models import random_ids

WITH_TRANSFORMERS_5 = """
import sys
import numpy, torch, transformers
folders, ids, out = sys.argv[3:], numpy.load(sys.argv[1]), sys.argv[2]
logits = {"version": transformers.__version__}
for number, folder in enumerate(folders):
    model, info = transformers.GPTNeoForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        logits[str(number)] = model.float().eval()(torch.from_numpy(ids).long()).logits.numpy()
tokenizer = transformers.AutoTokenizer.from_pretrained(folders[-1])
logits["text"] = tokenizer.decode(tokenizer.encode("Once upon a time"))
numpy.savez(out, **logits)
"""


def hf_loaded(folder: Path) -> tuple[GPTNeoForCausalLM, dict]:
    loaded: Any = GPTNeoForCausalLM.from_pretrained(folder, output_loading_info=True)
    return loaded[0].eval(), loaded[1]


def there_and_back(source: Path, **options) -> Path:
    """Exported as the exact model, whether there are splats or not."""
    checkpoint, exported = source.parent / f"{source.name} checkpoint", source.parent / f"{source.name} exported"
    convert(source, checkpoint, **options)
    export(checkpoint, exported, exact=True)
    return exported


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_there_and_back_every_tensor_is_the_same(tmp_path, form, dtype):
    tensors = tiny_tensors(dtype)
    write = write_folder if form == "safetensors" else write_bin_folder
    assert_same_tensors(read_safetensors(there_and_back(write(tmp_path / "source", tensors))), tensors)


def test_signs_of_zero_subnormals_and_payloads_survive(tmp_path):
    tensors = tiny_tensors()
    odd = torch.tensor([0x80000000, 1, 0x7FC12345, 0x7F800000, 0xFF800000], dtype=torch.uint32).view(torch.float32)
    tensors["transformer.ln_f.bias"][:5] = odd
    exported = there_and_back(write_folder(tmp_path / "source", tensors), allow_nonfinite=True)
    assert_same_tensors(read_safetensors(exported), tensors)


@pytest.mark.parity
@pytest.mark.parametrize("splats", [{}, splat_tensors(GSA)], ids=["plain", "splats"])
def test_transformers_4_loads_an_export(tmp_path, splats):
    source = write_folder(tmp_path / "source", tiny_tensors() | splats)
    exported = there_and_back(source)
    theirs, info = hf_loaded(exported)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) == set(splats)
    ids = random_ids(0, 2, 20)
    np.testing.assert_array_equal(torch_logits(theirs, ids), torch_logits(hf_loaded(source)[0], ids))


@pytest.mark.slow
@pytest.mark.parity
def test_transformers_5_computes_what_4_computes_from_the_source(tmp_path, story_neo, story_checkpoint):
    half = write_folder(tmp_path / "half", tiny_tensors(torch.float16))
    splats = splat_tensors(UNUSED)
    with_splats = write_folder(tmp_path / "splats", tiny_tensors() | splats)
    export(story_checkpoint, tmp_path / "story exported", exact=True)
    sources = [half, with_splats, story_neo]
    exported = [there_and_back(half), there_and_back(with_splats), tmp_path / "story exported"]
    ids = random_ids(1, 2, 40)
    np.save(tmp_path / "ids.npy", ids)
    transformers_5 = Path(sys.prefix) / "transformers5"
    subprocess.run(
        [sys.executable, "-c", WITH_TRANSFORMERS_5, tmp_path / "ids.npy", tmp_path / "logits.npz", *exported],
        env=os.environ | {"PYTHONPATH": str(transformers_5)},
        check=True,
    )
    result = np.load(tmp_path / "logits.npz")
    assert str(result["version"]).startswith("5.")
    assert str(result["text"]) == "Once upon a time"
    for number, source in enumerate(sources):
        np.testing.assert_array_equal(result[str(number)], torch_logits(hf_loaded(source)[0].float(), ids))


def test_the_configuration_survives(tmp_path):
    settings = tiny_config(
        attention_types=[[["global"], 1], [["local"], 1]],
        intermediate_size=128,
        window_size=5,
        activation_function="gelu",
        layer_norm_epsilon=1e-3,
        resid_dropout=0.25,
        embed_dropout=0.5,
        attention_dropout=0.125,
        initializer_range=0.01,
        bos_token_id=3,
        eos_token_id=4,
        max_position_embeddings=64,
    )
    tensors = tiny_tensors(max_position_embeddings=64)
    exported = there_and_back(
        write_folder(tmp_path / "source", tensors, settings), splats=SplatConfig(num_splats=2, window=7)
    )
    config = hf_loaded(exported)[0].config.to_dict()
    kept = GPTNeoConfig.from_hf(settings).to_hf()
    assert {name: config[name] for name in kept} == {name: settings[name] for name in kept}
    assert GPTNeoConfig.from_hf(config).splats == SplatConfig(num_splats=2, window=7)
    convert(exported, tmp_path / "again")
    assert load_tensors(tmp_path / "again")[0] == load_tensors(tmp_path / "source checkpoint")[0]


def test_fields_that_have_no_meaning_here_survive(tmp_path):
    fields = {
        "pad_token_id": 0,
        "task_specific_params": {"text-generation": {"do_sample": True}},
        "use_cache": False,
        "classifier_dropout": 0.25,
        "id2label": {"0": "yes"},
        "of_our_own": [1, {"two": None}],
    }
    exported = there_and_back(write_folder(tmp_path / "source", config=tiny_config(eos_token_id=[0, 3], **fields)))
    assert fields.items() <= json.loads((exported / "config.json").read_text()).items()
    config = hf_loaded(exported)[0].config
    assert (config.pad_token_id, config.of_our_own, config.eos_token_id) == (0, [1, {"two": None}], [0, 3])
    convert(exported, tmp_path / "again")
    again = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("source checkpoint", "again")]
    assert again[0] == again[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_transformers_learns_the_dtype(tmp_path, dtype):
    exported = there_and_back(write_folder(tmp_path / "source", tiny_tensors(dtype)))
    assert GPTNeoForCausalLM.from_pretrained(exported, torch_dtype="auto").dtype == dtype


def test_the_tokenizer_goes_along(run_gsa, tmp_path, story_neo, story_checkpoint):
    outcome = run_gsa("export", story_checkpoint, tmp_path / "exported", "--exact")
    assert outcome.code == 0 and outcome.err == ""
    text = "The dragon and the baker\nlived in a tree."
    theirs, source = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "exported", story_neo))
    assert theirs.encode(text) == source.encode(text)
    assert [file.stat().st_mode & 0o777 for file in (tmp_path / "exported").iterdir()] == [0o644] * 6


def test_progress_does_not_move_in_a_pipe(run_gsa, monkeypatch, tmp_path, story_checkpoint):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as the kernels of notebooks have it
    outcome = run_gsa("export", story_checkpoint, tmp_path / "exported", "--exact")
    assert outcome.code == 0 and "\x1b" not in outcome.out + outcome.err
