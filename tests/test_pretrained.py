"""Models in one line: from folders of both kinds and from a hub, and back to a folder.

May be changed here: where a model may be. The oracle is Hugging Face PyTorch, of the same weights.
"""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, GPTNeoForCausalLM

import gsa_jax
from gsa_jax import InputError, SplatConfig, from_pretrained, save_pretrained
from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert import convert, export
from gsa_jax.parameters import named_parameters
from helpers.bits import assert_same_tensors
from helpers.hf_folders import tiny_config, tiny_tensors, write_bin_folder, write_folder
from helpers.hf_oracle import hf_model, torch_logits
from helpers.hf_splats import hf_splat_model
from helpers.hub_server import Hub, environment, hub_server
from helpers.tiny_checkpoints import tiny_checkpoint, tiny_folder
from helpers.tiny_models import random_ids, relative_rms

IDS = random_ids(0, 2, 40)
SPLATS = SplatConfig(num_splats=3, window=4, kept=2, layers="all", norm_gain=True, far_gain=True)

# Each model of a hub in turn, in a process of its own.
FROM_A_HUB = """
import json, sys
import numpy as np
import gsa_jax

ids, out, wanted = np.load(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
found = {}
for label, (source, options) in wanted.items():
    try:
        pretrained = gsa_jax.from_pretrained(source, **options)
    except gsa_jax.InputError as error:
        found[label] = str(error)
    else:
        np.save(f"{out}/{label}.npy", np.asarray(pretrained.model(ids)))
        gsa_jax.save_pretrained(pretrained, f"{out}/{label}")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def splat_checkpoint(tmp_path_factory, story_neo) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("splats"), story_neo, splats=SPLATS)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_hugging_face_folder_without_another_on_disk(tmp_path, kind):
    tensors, source = tiny_tensors(), tmp_path / "source"
    write_folder(source, tensors) if kind == "safetensors" else write_bin_folder(source, tensors)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    model = from_pretrained(source).model
    assert relative_rms(model(IDS), torch_logits(hf_model(), IDS)) < 2e-6
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parity
def test_the_bundled_model_and_its_tokenizer_as_transformers_have_them(story_neo):
    model, tokenizer = from_pretrained(story_neo)
    text = "Once upon a time, there was a little girl named Lily."
    ids = np.asarray(tokenizer(text, return_tensors="np")["input_ids"], np.int32)
    assert ids.tolist() == [AutoTokenizer.from_pretrained(story_neo).encode(text)]
    assert relative_rms(model(ids), torch_logits(GPTNeoForCausalLM.from_pretrained(story_neo).eval(), ids)) < 2e-6


@pytest.mark.parity
def test_a_checkpoint_with_splats_and_its_export(tmp_path, splat_checkpoint):
    """An export goes the way of Hugging Face's folders, and comes out as the checkpoint that it was made of."""
    export(splat_checkpoint, tmp_path / "exported")
    for folder in (splat_checkpoint, tmp_path / "exported"):
        model = from_pretrained(folder).model
        assert model.config.splats == SPLATS
        assert relative_rms(model(IDS), torch_logits(hf_splat_model(model), IDS)) < 1e-5
        assert_same_tensors(named_parameters(model), load_tensors(splat_checkpoint)[1])


@pytest.mark.parity
def test_the_window_and_the_dtype_are_those_that_were_asked_for(splat_checkpoint):
    exact = from_pretrained(splat_checkpoint, window="all").model
    assert relative_rms(exact(IDS), torch_logits(hf_model(vocab_size=1024), IDS)) < 2e-6
    pure = from_pretrained(splat_checkpoint, window=0, kept=0).model
    assert (pure.config.splats.window, pure.config.splats.kept) == (0, 0)
    assert relative_rms(pure(IDS), torch_logits(hf_splat_model(pure), IDS)) < 1e-5
    assert relative_rms(pure(IDS), exact(IDS)) > 1e-2
    model = from_pretrained(splat_checkpoint, dtype="bfloat16", param_dtype="bfloat16").model
    assert model.config.dtype == "bfloat16" and model.transformer.wte.embedding[...].dtype == "bfloat16"


def test_a_model_without_a_tokenizer_loads_and_asking_for_one_is_the_error(tmp_path):
    pretrained = from_pretrained(write_folder(tmp_path / "source"))
    assert pretrained.model(IDS).shape == (2, 40, 97)
    with pytest.raises(InputError, match=r"^[^\n]*source: no tokenizer in it"):
        _, _ = pretrained


def said(folder: Path) -> dict[str, bytes]:
    """Files of a checkpoint but its weights."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_saved_and_loaded_again_everything_is_as_it_was(tmp_path, story_neo):
    """From Hugging Face's format as `gsa convert` makes it, and from our own."""
    source = tiny_folder(tmp_path / "source", story_neo)
    config = json.loads((source / "config.json").read_text()) | {"summary_type": "cls_index"}
    (source / "config.json").write_text(json.dumps(config))
    generation = {"do_sample": True, "top_k": 0, "eos_token_id": [3, 5], "max_new_tokens": 7, "num_beams": 4}
    (source / "generation_config.json").write_text(json.dumps(generation))
    convert(source, tmp_path / "converted")
    folders = [tmp_path / name for name in ("source", "first", "second")]
    for before, after in itertools.pairwise(folders):
        pretrained = from_pretrained(before)
        save_pretrained(pretrained, after)
        again = from_pretrained(after)
        assert_same_tensors(named_parameters(again.model), named_parameters(pretrained.model))
        assert again.model.config == pretrained.model.config
        assert again.model.generation_config == pretrained.model.generation_config
        assert again.model.generation_config.unsupported == ("num_beams = 4",)
        expected, got = said(tmp_path / "converted"), said(after)
        assert got.keys() == expected.keys()
        assert {name for name in got if got[name] != expected[name]} == {"generation_config.json"}
    assert json.loads(said(after)["config.json"])["summary_type"] == "cls_index"


def test_a_model_alone_with_its_tokenizer_is_a_checkpoint_of_every_command(tmp_path, run_gsa, splat_checkpoint):
    model, tokenizer = from_pretrained(splat_checkpoint, window=6, param_dtype="bfloat16")
    weight = model.transformer.ln_f.bias
    weight[...] = weight[...] + 1
    model.generation_config = gsa_jax.generation_config.GenerationConfig(eos_token_id=(), max_new_tokens=3)
    save_pretrained(model, tmp_path / "out", tokenizer=tokenizer)
    config, tensors = load_tensors(tmp_path / "out")
    assert config.splats is not None and config.splats.window == 6
    assert_same_tensors(tensors, named_parameters(model))
    assert from_pretrained(tmp_path / "out").tokenizer.get_vocab() == tokenizer.get_vocab()
    outcome = run_gsa("generate", tmp_path / "out", "--prompt", "Once", "--json")
    assert outcome.code == 0 and len(json.loads(outcome.out)["tokens"]) == 3


def test_a_tokenizer_takes_the_place_of_the_one_that_was_there(tmp_path, splat_checkpoint):
    plain = splat_checkpoint.parent / "checkpoint"
    pretrained = from_pretrained(plain)
    pretrained.tokenizer.add_tokens(["<new>"])
    save_pretrained(pretrained, tmp_path / "out", tokenizer=pretrained.tokenizer)
    assert "<new>" in from_pretrained(tmp_path / "out").tokenizer.get_vocab()
    assert (tmp_path / "out" / "conversion.json").read_bytes() == (plain / "conversion.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 3}, "window = 3: the model has no splats"),
        ({"dtype": "int8"}, "dtype = 'int8': must be one of float32"),
        ({"dtype": "float33"}, "dtype = 'float33': must be one of float32"),
        ({"subfolder": "inner"}, "inner: no such folder"),
        ({"revision": "v1"}, "no revisions"),
        ({"attention_implementation": "fast"}, "attention_implementation = 'fast'"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(tmp_path, unchecked, options, words):
    source = write_folder(tmp_path / "source")
    with pytest.raises(InputError) as refused:
        from_pretrained(source, **options)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_bad_folders_are_one_line(tmp_path, run_gsa, splat_checkpoint):
    cases = {
        tmp_path / "nowhere": "nowhere: no such folder",
        write_folder(tmp_path / "llama", config=tiny_config(model_type="llama")): "model_type = 'llama'",
        write_folder(tmp_path / "nan", {name: 0 * t / 0 for name, t in tiny_tensors().items()}): "NaN or infinite",
    }
    damaged = shutil.copytree(splat_checkpoint, tmp_path / "damaged")
    shutil.rmtree(damaged / "weights" / "state")
    cases[damaged] = "damaged checkpoint"
    for folder, words in cases.items():
        with pytest.raises(InputError) as refused:
            from_pretrained(folder)
        assert words in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(InputError, match="damaged exists already"):
        save_pretrained(from_pretrained(splat_checkpoint), damaged)
    outcome = run_gsa("convert", splat_checkpoint, tmp_path / "out")
    outcome.assert_refused(splat_checkpoint, "is a gsa-jax checkpoint already; use it as it is")
    run_gsa("generate", "owner/name", "--prompt", "a").assert_refused("gsa convert", "hf download owner/name")


@pytest.fixture(scope="module")
def hub(tmp_path_factory, splat_checkpoint) -> Iterator[Hub]:
    folders = tmp_path_factory.mktemp("hub")
    tensors = tiny_tensors()
    bins = write_bin_folder(folders / "bin" / "inner", {name: 2 * t for name, t in tensors.items()}).parent
    checkpoint = shutil.copytree(splat_checkpoint, folders / "checkpoint")
    (checkpoint / "README.md").write_text("not needed")
    with hub_server() as served:
        plain = {"main": write_folder(folders / "plain", tensors), "v1": bins}
        served.repositories |= {"owner/plain": plain, "owner/checkpoint": {"main": checkpoint}}
        yield served


@pytest.mark.slow
@pytest.mark.parity
def test_models_of_a_hub(hub, tmp_path, splat_checkpoint):
    np.save(tmp_path / "ids.npy", IDS)
    wanted = {
        "plain": ("owner/plain", {}),
        "bin": ("owner/plain", {"revision": "v1", "subfolder": "inner"}),
        "checkpoint": ("owner/checkpoint", {}),
        "window": ("owner/checkpoint", {"window": "all"}),
        "nothing": ("owner/nothing", {}),
    }
    command = [sys.executable, "-c", FROM_A_HUB, tmp_path / "ids.npy", tmp_path, json.dumps(wanted)]
    ran = subprocess.run(command, env=environment(hub, tmp_path / "cache"), check=True, stdout=subprocess.PIPE)
    assert json.loads(ran.stdout).keys() == {"nothing"}
    assert "owner/nothing: no such folder, and no such model on the hub" in json.loads(ran.stdout)["nothing"]

    doubled = hf_model()
    doubled.load_state_dict({name: 2 * tensor for name, tensor in doubled.state_dict().items()})
    splats = gsa_jax.load(splat_checkpoint)
    oracles = {
        "plain": hf_model(),
        "bin": doubled,
        "checkpoint": hf_splat_model(splats),
        "window": hf_model(vocab_size=1024),
    }
    for label, oracle in oracles.items():
        assert relative_rms(np.load(tmp_path / f"{label}.npy"), torch_logits(oracle, IDS)) < 1e-5, label
    report = json.loads((tmp_path / "plain" / "conversion.json").read_text())
    assert report["hub_id"] == report["source"] == "owner/plain"
    assert_same_tensors(load_tensors(tmp_path / "checkpoint")[1], load_tensors(splat_checkpoint)[1])
    assert "README.md" not in hub.fetched_from("owner/checkpoint")
