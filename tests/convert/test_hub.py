"""Models of a hub: the real client against a hub on this machine. What is needed is downloaded, and nothing else."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gsa_jax.checkpoint import load_tensors
from helpers.bits import assert_same_tensors
from helpers.hf_folders import tiny_config, tiny_tensors, write_bin_folder, write_folder, write_sharded_folder
from helpers.hub_server import Hub, environment, hub_server

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

# Opens each source in turn in one process, because the client reads HF_ENDPOINT when it is imported.
OPEN_SOURCES = """
import json, sys
from gsa_jax.convert.reader import open_source
from gsa_jax.errors import InputError

results = {}
for label, (source, options) in json.loads(sys.argv[1]).items():
    try:
        opened = open_source(source, **options)
    except InputError as error:
        results[label] = {"error": str(error)}
    else:
        results[label] = {"folder": str(opened.folder), "files": [file.name for file in opened.files]}
print(json.dumps(results))
"""

SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "both formats": ("owner/both", {}),
    "a .bin": ("owner/bin", {}),
    "shards": ("owner/shards", {}),
    "a revision": ("owner/both", {"revision": "v1"}),
    "a subfolder": ("owner/both", {"subfolder": "inner/model"}),
    "another model": ("owner/llama", {}),
    "no weights": ("owner/flax", {}),
    "an adapter": ("owner/adapter", {}),
    "no configuration": ("owner/weights-only", {}),
    "a shard that is not there": ("owner/incomplete", {}),
    "a checkpoint of ours": ("owner/checkpoint", {}),
    "no such repository": ("owner/nothing", {}),
    "no such revision": ("owner/both", {"revision": "v9"}),
    "no such subfolder": ("owner/both", {"subfolder": "outer"}),
    "gated": ("owner/gated", {}),
    "private": ("owner/private", {}),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, story_neo: Path) -> Iterator[Hub]:
    folders = tmp_path_factory.mktemp("hub")
    tensors = tiny_tensors()
    both = write_folder(folders / "both", tensors)
    torch.save(tensors, both / "pytorch_model.bin")
    for name in ("flax_model.msgpack", "README.md", "training_args.bin", "model.fp16.safetensors"):
        (both / name).write_bytes(b"not needed")
    for name in TOKENIZER:
        shutil.copy(story_neo / name, both)
    inner = write_folder(both / "inner" / "model", {name: tensor + 1 for name, tensor in tensors.items()})
    torch.save(tensors, inner / "pytorch_model.bin")
    write_folder(folders / "v1", {name: tensor * 2 for name, tensor in tensors.items()})
    write_bin_folder(folders / "bin", tensors)
    write_sharded_folder(folders / "shards", tensors, suffix="safetensors")
    shutil.copy(folders / "bin" / "pytorch_model.bin", folders / "shards")
    write_folder(folders / "llama", config=tiny_config(model_type="llama"))
    (write_folder(folders / "flax") / "model.safetensors").rename(folders / "flax" / "flax_model.msgpack")
    (folders / "adapter").mkdir()
    (folders / "adapter" / "adapter_config.json").write_text("{}")
    save_file(tensors, folders / "adapter" / "adapter_model.safetensors")
    (write_folder(folders / "weights-only") / "config.json").unlink()
    write_sharded_folder(folders / "incomplete", tensors, suffix="bin")
    (folders / "incomplete" / "pytorch_model-00002-of-00002.bin").unlink()
    (write_folder(folders / "checkpoint") / "model.safetensors").unlink()
    (folders / "checkpoint" / "weights").mkdir()
    (folders / "checkpoint" / "weights" / "manifest").write_bytes(b"not needed")
    with hub_server() as served:
        names = ("both", "bin", "shards", "llama", "flax", "adapter", "weights-only", "incomplete", "checkpoint")
        served.repositories |= {f"owner/{name}": {"main": folders / name} for name in names}
        served.repositories["owner/both"]["v1"] = folders / "v1"
        served.repositories |= {f"owner/{name}": {"main": folders / "bin"} for name in ("gated", "private")}
        served.gated.add("owner/gated")
        served.private.add("owner/private")
        yield served


def opened(env: dict[str, str], sources: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-c", OPEN_SOURCES, json.dumps(sources)]
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def results(hub: Hub, cache: Path) -> dict[str, Any]:
    return opened(environment(hub, cache), SOURCES)


def test_one_format_is_downloaded_and_nothing_that_is_not_read(hub, results):
    folder = Path(results["both formats"]["folder"])
    wanted = {"config.json", "model.safetensors", *TOKENIZER}
    assert {path.name for path in folder.iterdir() if path.is_file()} == wanted
    assert results["both formats"]["files"] == ["model.safetensors"]
    inner = {"inner/model/config.json", "inner/model/model.safetensors"}
    assert set(hub.fetched_from("owner/both")) <= wanted | inner
    assert hub.fetched_from("owner/bin") == ["config.json", "pytorch_model.bin"]


def test_shards_come_before_another_format(hub, results):
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert hub.fetched_from("owner/shards") == sorted(["config.json", "model.safetensors.index.json", *shards])
    assert results["shards"]["files"] == [*shards, "model.safetensors.index.json"]


def test_revisions_and_subfolders_are_those_that_were_asked_for(results):
    tensors = tiny_tensors()
    for label, change in (
        ("both formats", lambda x: x),
        ("a revision", lambda x: 2 * x),
        ("a subfolder", lambda x: 1 + x),
    ):
        got = load_file(Path(results[label]["folder"]) / "model.safetensors")
        assert_same_tensors(got, {name: change(tensor) for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("another model", "model_type = 'llama'"),
        ("no weights", "owner/flax: no weights in it"),
        ("an adapter", "owner/adapter: holds an adapter (adapter_config.json)"),
        ("no configuration", "owner/weights-only: no config.json in it"),
        ("a shard that is not there", "lists shards that are not there: pytorch_model-00002-of-00002.bin"),
        ("a checkpoint of ours", "fetch it for the commands: hf download owner/checkpoint --local-dir OUT"),
        ("no such repository", "owner/nothing: no such folder, and no such model on the hub"),
        ("no such revision", "owner/both: the hub has no revision 'v9' of it"),
        ("no such subfolder", "owner/both/outer: no config.json in it"),
        ("gated", "owner/gated: its owners grant access to it"),
        ("private", "owner/private: no such folder, and no such model on the hub; log in if it is private"),
    ],
)
def test_what_cannot_be_used_is_refused_before_its_weights_come(hub, results, label, words):
    assert words in results[label]["error"] and "\n" not in results[label]["error"]
    repository = SOURCES[label][0]
    if repository != "owner/both":
        assert set(hub.fetched_from(repository)) <= {"config.json", "pytorch_model.bin.index.json"}


def test_a_private_repository_comes_to_those_who_are_logged_in(hub, results, tmp_path):
    sources = {"private": SOURCES["private"]}
    assert "error" in results["private"]
    (tmp_path / "token").write_text(hub.token)  # as `hf auth login` leaves it
    assert opened(environment(hub, tmp_path), sources)["private"]["files"] == ["pytorch_model.bin"]
    assert "error" in opened(environment(hub, tmp_path, HF_TOKEN="hf_of_someone_else"), sources)["private"]


def test_without_a_hub_what_was_downloaded_before_is_taken(hub, results, cache, tmp_path):
    sources = {label: SOURCES[label] for label in ("both formats", "a revision", "a subfolder", "no such repository")}
    for change in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again = opened(environment(hub, cache, **change), sources)
        for label in ("both formats", "a revision", "a subfolder"):
            assert again[label] == results[label]
        assert "owner/nothing: no such folder, and not to be had from the hub" in again["no such repository"]["error"]


def test_the_command_takes_a_revision_and_a_subfolder(hub, cache, tmp_path):
    gsa = Path(sys.executable).parent / "gsa"
    command = [gsa, "convert", "owner/both", tmp_path / "out", "--revision", "main", "--subfolder", "inner/model"]
    subprocess.run(command, env=environment(hub, cache), check=True, stdout=subprocess.PIPE)
    tensors = {name: tensor + 1 for name, tensor in tiny_tensors().items()}
    assert_same_tensors(load_tensors(tmp_path / "out")[1], tensors)


def test_a_folder_has_subfolders_and_no_revisions(run_gsa, tmp_path):
    write_folder(tmp_path / "source" / "inner")
    assert run_gsa("convert", tmp_path / "source", tmp_path / "out", "--subfolder", "inner").code == 0
    outcome = run_gsa("convert", tmp_path / "source", tmp_path / "other", "--subfolder", "outer")
    outcome.assert_refused(tmp_path / "source" / "outer", "no such folder")
    outcome = run_gsa("convert", tmp_path / "source", tmp_path / "other", "--revision", "v1")
    outcome.assert_refused(tmp_path / "source", "no revisions")
