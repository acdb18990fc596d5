"""A GPT-2 with splats: in PyTorch, on the command line, and back to a GPT-2.

May be changed here: what is done with it. The exact model is `test_gpt2.py`, the PyTorch code for other models
`test_pytorch_model.py`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from gsa_jax import SplatConfig, generate, load
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.convert import convert, export
from gsa_jax.convert.verify import verify
from gsa_jax.parameters import build_model, named_parameters
from gsa_jax.tokenizer_folder import open_tokenizer
from helpers.bits import assert_same_tensors
from helpers.hf_folders import read_safetensors
from helpers.hf_gpt2 import EAGER, hf_gpt2, tensors_of, with_splats, with_tokenizer, write_gpt2
from helpers.hf_oracle import torch_logits
from helpers.hf_splats import hf_splat_model
from helpers.texts import STORIES, TOLD
from helpers.tiny_models import random_ids, relative_rms

pytestmark = pytest.mark.parity

ALL_TERMS = {"log_amplitudes": True, "norm_gain": True, "far_gain": True}
MODES = {
    "pure": SplatConfig(num_splats=3, window=0),
    "hybrid": SplatConfig(num_splats=3, window=6, **ALL_TERMS),
    "kept": SplatConfig(num_splats=3, window=5, kept=4, importance="learned", norm_gain=True),
    "one layer": SplatConfig(num_splats=3, window=5, layers=(1,)),
    "attached": SplatConfig(num_splats=3),
}
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 64": {"n_embd": 128, "n_head": 2},
    "heads of 48, scaled by layer": {"n_embd": 96, "n_head": 2, "scale_attn_by_inverse_layer_idx": True},
}
FAST = ("hybrid", "heads of 48, scaled by layer")
GRID = [
    pytest.param(mode, shape, marks=() if (mode, shape) == FAST else pytest.mark.slow)
    for mode in MODES
    for shape in SHAPES
]


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers puts code that it was told to trust."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.mark.parametrize(("mode", "shape"), GRID)
def test_pytorch_computes_the_same(tmp_path: Path, mode: str, shape: str) -> None:
    model = with_splats(hf_gpt2(**SHAPES[shape]), tmp_path, MODES[mode])
    ids, mask = random_ids(1, 2, 30), np.ones((2, 30), bool)
    mask[1, :9] = False
    expected = torch_logits(hf_splat_model(model), ids, mask)[mask]
    assert relative_rms(np.asarray(model(ids, mask))[mask], expected) < 1e-5
    if mode != "attached":
        exact = build_model(model.config.with_window("all"), named_parameters(model))
        assert relative_rms(np.asarray(exact(ids, mask))[mask], expected) > 1e-2


def read_text(folder: Path, text: Path) -> np.ndarray:
    """The first rows of a text that hold as many tokens as the model has positions for."""
    ids = open_tokenizer(folder)(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return np.asarray(ids[: 8 * 64], np.int32).reshape(8, 64)


@pytest.mark.slow
def test_from_the_command_line_to_pytorch_and_back(
    standard_promotion: None, run_gsa: Any, tmp_path: Path, story_neo: Path
) -> None:
    """Made by Hugging Face, converted, placed by the preset, distilled, exported, and loaded by PyTorch."""
    theirs = hf_gpt2(vocab_size=1024, n_embd=64, n_head=1)
    source = with_tokenizer(write_gpt2(tmp_path / "source", theirs), story_neo)
    run, told = tmp_path / "run", ["--text", TOLD]
    fitted = ["--preset", "hybrid", "--num-splats", 8, "--window", 8, "--kept", 6]
    distilled = ["--steps", 40, "--optimizer.splat-learning-rate", 0.02]
    tuned = ["--steps", 4, "--batch-size", 2, "--max-positions", 96]
    for command in (
        ["convert", source, tmp_path / "plain"],
        ["verify", source, tmp_path / "plain", "--text", STORIES],
        ["fit-init", tmp_path / "plain", tmp_path / "fitted", *told, *fitted],
        ["train", "distill", tmp_path / "fitted", run, *told, *distilled],
        ["train", "finetune", run / "model", tmp_path / "tuned", *told, *tuned],
        ["generate", run / "model", "--prompt", "Once upon a time", "--max-new-tokens", 5],
        ["export", run / "model", tmp_path / "exported"],
        ["export", run / "model", tmp_path / "exact", "--exact"],
        ["export", tmp_path / "tuned" / "model", tmp_path / "longer", "--exact"],
        ["convert", tmp_path / "exported", tmp_path / "again"],
        ["export", tmp_path / "again", tmp_path / "exact again", "--exact"],
    ):
        outcome = run_gsa(*command)
        assert outcome.code == 0, (command, outcome)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    ids = read_text(source, STORIES)
    assert relative_rms(load(run / "model")(ids), torch_logits(model.eval(), ids)) < 1e-5
    exact = torch_logits(theirs, ids)
    assert relative_rms(load(run / "model")(ids), exact) < 0.95 * relative_rms(load(tmp_path / "fitted")(ids), exact)
    prompt = random_ids(3, 1, 20)
    with torch.no_grad():
        expected = model.generate(torch.from_numpy(prompt).long(), max_new_tokens=12, do_sample=False, pad_token_id=0)
    got = generate(load(run / "model"), prompt.tolist(), max_new_tokens=12)
    count = min(got.shape[1], expected.shape[1] - 20)
    np.testing.assert_array_equal(got[:, :count], expected.numpy()[:, 20 : 20 + count])

    # The exact model is the one that came in, and its splats lie beside it unused.
    for exported in ("exact", "exact again"):
        tensors = read_safetensors(tmp_path / exported)
        splats = {name for name in tensors if "splat" in name}
        assert splats
        assert_same_tensors({n: x for n, x in tensors.items() if n not in splats}, tensors_of(theirs))
        assert json.loads((tmp_path / exported / "config.json").read_text())["model_type"] == "gpt2"
    comparisons = verify(tmp_path / "exported", run / "model")
    assert [comparison.agrees for comparison in comparisons] == [True]
    longer, ids = GPT2LMHeadModel.from_pretrained(tmp_path / "longer", **EAGER), random_ids(4, 1, 96)
    assert relative_rms(load(tmp_path / "tuned" / "model", window="all")(ids), torch_logits(longer, ids)) < 1e-5
    convert(tmp_path / "exact", tmp_path / "from exact")
    (config, tensors), (own_config, own_tensors) = (load_tensors(x) for x in (tmp_path / "from exact", run / "model"))
    assert config == own_config
    assert_same_tensors(tensors, own_tensors)


@pytest.mark.slow
def test_splats_travel_without_their_model(tmp_path: Path) -> None:
    model = with_splats(hf_gpt2(), tmp_path, MODES["hybrid"])
    save(tmp_path / "splats", model.config, named_parameters(model), copied=[])
    export(tmp_path / "splats", tmp_path / "alone", splats_only=True)
    convert(tmp_path / "source", tmp_path / "together", splats=str(tmp_path / "alone"))
    ids = random_ids(4, 1, 20)
    np.testing.assert_array_equal(load(tmp_path / "together")(ids), model(ids))


@pytest.mark.slow
def test_gpt2s_own_class_does_not_load_an_export(tmp_path: Path) -> None:
    """Whose `config.json` does not name its fields: it takes its defaults, which are those of the smallest GPT-2."""
    model = with_splats(hf_gpt2(n_embd=24, n_layer=12, n_head=12), tmp_path, SplatConfig(num_splats=2, window=3))
    save(tmp_path / "splats", model.config, named_parameters(model), copied=[])
    export(tmp_path / "splats", tmp_path / "exported")
    with pytest.raises(RuntimeError, match="size mismatch"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "exported")
