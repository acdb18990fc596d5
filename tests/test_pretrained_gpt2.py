"""A GPT-2 in one line, from a folder and from a hub, and out again: saved, described, published, exported.

May be changed here: ways in and out. The oracle is Hugging Face PyTorch, of the same weights; what a GPT-2 computes in
all its forms is `convert/test_gpt2.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from gsa_jax import InputError, from_pretrained, model_card, open_tokenizer, save_pretrained
from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert import export
from gsa_jax.parameters import named_parameters
from helpers.bits import assert_same_tensors
from helpers.hf_folders import read_safetensors
from helpers.hf_gpt2 import hf_gpt2, tensors_of, with_buffers, with_tokenizer, without_prefix, write_gpt2
from helpers.hf_oracle import torch_logits
from helpers.hub_server import environment, hub_server
from helpers.tiny_models import random_ids, relative_rms

pytestmark = pytest.mark.parity

IDS = random_ids(0, 2, 40)
TEXT = "Once upon a time,\nthere was a <|endoftext|> girl."

THERE_AND_BACK = """
import sys
import numpy as np
import gsa_jax

ids, out = sys.argv[1:]
gsa_jax.save_pretrained(gsa_jax.from_pretrained("owner/gpt2"), f"{out}/saved")
gsa_jax.push_to_hub(f"{out}/saved", "owner/mine")
np.save(f"{out}/logits.npy", np.asarray(gsa_jax.from_pretrained("owner/mine").model(np.load(ids))))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory, story_neo) -> Path:
    """With old names and buffers, as the first GPT-2s have them; not to be changed by a test."""
    theirs = hf_gpt2(vocab_size=1024)
    tensors = without_prefix(with_buffers(tensors_of(theirs)))
    folder = write_gpt2(tmp_path_factory.mktemp("gpt2") / "source", theirs, tensors, form="bin")
    return with_tokenizer(folder, story_neo)


def test_in_by_one_line_and_out_again(tmp_path: Path, source: Path) -> None:
    theirs = hf_gpt2(vocab_size=1024)
    pretrained = from_pretrained(source)
    model, tokenizer = pretrained
    assert model.config.donor == "gpt2"
    assert relative_rms(model(IDS), torch_logits(theirs, IDS)) < 1e-5
    expected = AutoTokenizer.from_pretrained(source).encode(TEXT)
    assert 0 in expected and tokenizer.encode(TEXT) == expected
    assert open_tokenizer(source)(TEXT)["input_ids"] == expected
    with pytest.raises(InputError, match="window = 3: the model has no splats"):
        from_pretrained(source, window=3)

    save_pretrained(pretrained, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert again.model.config == model.config and again.tokenizer.encode(TEXT) == expected
    assert_same_tensors(named_parameters(again.model), named_parameters(model))
    card = model_card(tmp_path / "saved")
    assert "A GPT-2 for gsa-jax (JAX/Flax): 2 layers, hidden size 32, 4 heads, 1,024 tokens" in card.content
    assert card.data.tags == ["gsa-jax", "jax", "flax", "gpt2"]
    export(tmp_path / "saved", tmp_path / "exported")
    assert_same_tensors(read_safetensors(tmp_path / "exported"), tensors_of(theirs))


@pytest.mark.slow
def test_from_a_hub_and_to_one(tmp_path: Path, source: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    with hub_server() as hub:
        hub.uploads = tmp_path / "hub"
        hub.repositories["owner/gpt2"] = {"main": source}
        command = [sys.executable, "-c", THERE_AND_BACK, tmp_path / "ids.npy", tmp_path]
        subprocess.run(command, env=environment(hub, tmp_path / "cache", HF_TOKEN=hub.token), check=True)
    theirs = hf_gpt2(vocab_size=1024)
    assert relative_rms(np.load(tmp_path / "logits.npy"), torch_logits(theirs, IDS)) < 1e-5
    published = hub.uploads / "owner" / "mine"
    assert_same_tensors(load_tensors(published)[1], load_tensors(tmp_path / "saved")[1])
    assert json.loads((published / "config.json").read_text())["model_type"] == "gpt2"
    data = ModelCard.load(published / "README.md").data
    assert data.base_model == "owner/gpt2" and "gpt2" in data.tags and "gpt_neo" not in data.tags
