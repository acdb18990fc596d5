"""Files of a source that cannot be read: one line on stderr that names the file, exit code 2, nothing left behind.

What was read and is no model of this kind is in `test_bad_sources`.
"""

import errno
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.hf_folders import tiny_tensors, write_bin_folder, write_folder, write_sharded_folder

WTE = "transformer.wte.weight"


class Stranger:
    """Something that an unpickler must not build."""


# Each of these makes a source folder and returns what the message has to name.


def truncated(source: Path) -> list[object]:
    file = write_folder(source) / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return [file, "truncated"]


def header_truncated(source: Path) -> list[object]:
    os.truncate(write_folder(source) / "model.safetensors", 100)
    return [source / "model.safetensors", "truncated"]


def corrupt(source: Path) -> list[object]:
    (write_folder(source) / "model.safetensors").write_bytes(os.urandom(5000))
    return [source / "model.safetensors", "not a safetensors file"]


def corrupt_header(source: Path) -> list[object]:
    file = write_folder(source) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"]" + data[9:])
    return [file, "not a safetensors file"]


def no_tensors(source: Path) -> list[object]:
    header = b"{}      "
    (write_folder(source) / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return [source, "no tensors"]


def empty_file(source: Path) -> list[object]:
    (write_folder(source) / "model.safetensors").write_bytes(b"")
    return [source / "model.safetensors", "empty"]


def empty_bin(source: Path) -> list[object]:
    (write_bin_folder(source, {}) / "pytorch_model.bin").write_bytes(b"")
    return [source / "pytorch_model.bin", "empty"]


def truncated_bin(source: Path) -> list[object]:
    file = write_bin_folder(source, tiny_tensors()) / "pytorch_model.bin"
    os.truncate(file, file.stat().st_size // 2)
    return [file, "truncated"]


def truncated_legacy_bin(source: Path) -> list[object]:
    file = write_bin_folder(source, tiny_tensors(), legacy=True) / "pytorch_model.bin"
    os.truncate(file, file.stat().st_size // 2)
    return [file, "truncated"]


def text_as_bin(source: Path) -> list[object]:
    (write_bin_folder(source, {}) / "pytorch_model.bin").write_text("weights\n")
    return [source / "pytorch_model.bin", "not written by torch.save"]


def pointer(source: Path) -> list[object]:
    (write_folder(source) / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    return [source / "model.safetensors", "a git-lfs pointer", "git lfs pull"]


def pointer_to_a_configuration(source: Path) -> list[object]:
    (write_folder(source) / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return [source / "config.json", "a git-lfs pointer"]


def pointer_to_a_tokenizer(source: Path) -> list[object]:
    (write_folder(source) / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return [source / "tokenizer.json", "a git-lfs pointer"]


def page(source: Path) -> list[object]:
    (write_folder(source) / "model.safetensors").write_text("<!DOCTYPE html>\n<html><body>Log in</body></html>\n")
    return [source / "model.safetensors", "an HTML page"]


def page_for_an_index(source: Path) -> list[object]:
    write_sharded_folder(source, tiny_tensors(), suffix="bin")
    (source / "pytorch_model.bin.index.json").write_text("<HTML>")
    return [source / "pytorch_model.bin.index.json", "an HTML page"]


def shards_elsewhere(source: Path) -> list[object]:
    write_sharded_folder(source, tiny_tensors(), suffix="bin")
    (source / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../../model.bin"}}')
    return [source / "pytorch_model.bin.index.json", "do not stand beside it: ../../model.bin"]


def pickled_list(source: Path) -> list[object]:
    return [write_bin_folder(source, [torch.zeros(2)]) / "pytorch_model.bin", "not a state dict but a list"]


def pickled_numbers(source: Path) -> list[object]:
    state = {"epoch": 3, "step": 4, WTE: torch.zeros(2)}
    return [write_bin_folder(source, state) / "pytorch_model.bin", "epoch, step hold no tensors"]


def pickled_stranger(source: Path) -> list[object]:
    return [
        write_bin_folder(source, {"model": Stranger()}) / "pytorch_model.bin",
        "Stranger, and only tensors are read",
    ]


def container_of_nothing(source: Path) -> list[object]:
    return [write_bin_folder(source, {"model": {}, "step": 3}) / "pytorch_model.bin", "not a state dict"]


def config_not_json(source: Path) -> list[object]:
    (write_folder(source) / "config.json").write_text("{'model_type': 'gpt_neo'}")
    return [source / "config.json", "not JSON"]


def config_a_list(source: Path) -> list[object]:
    (write_folder(source) / "config.json").write_text("[1, 2]")
    return [source / "config.json", "no model_type"]


def missing_shard(source: Path) -> list[object]:
    write_sharded_folder(source, tiny_tensors(), suffix="safetensors")
    (source / "model-00002-of-00002.safetensors").unlink()
    return [source / "model.safetensors.index.json", "model-00002-of-00002.safetensors"]


def missing_bin_shard(source: Path) -> list[object]:
    write_sharded_folder(source, tiny_tensors(), suffix="bin")
    (source / "pytorch_model-00001-of-00002.bin").unlink()
    return [source / "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"]


def shard_without_its_tensors(source: Path) -> list[object]:
    write_sharded_folder(source, tiny_tensors(), suffix="safetensors")
    shutil.copy(source / "model-00001-of-00002.safetensors", source / "model-00002-of-00002.safetensors")
    return [source / "model-00002-of-00002.safetensors", "is in model-00001-of-00002.safetensors as well"]


def broken_index(source: Path) -> list[object]:
    write_sharded_folder(source, tiny_tensors(), suffix="safetensors")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": ')
    return [source / "model.safetensors.index.json", "not an index"]


def index_of_numbers(source: Path) -> list[object]:
    write_sharded_folder(source, tiny_tensors(), suffix="safetensors")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "b": null}}')
    return [source / "model.safetensors.index.json", "shards are missing"]


def index_without_map(source: Path) -> list[object]:
    write_sharded_folder(source, tiny_tensors(), suffix="safetensors")
    (source / "model.safetensors.index.json").write_text('{"metadata": {}}')
    return [source / "model.safetensors.index.json", "weight_map"]


SOURCES: list[Callable[[Path], list[object]]] = [
    truncated, header_truncated, corrupt, corrupt_header, no_tensors, empty_file, empty_bin, truncated_bin,
    truncated_legacy_bin, text_as_bin, pickled_list, pointer, pointer_to_a_configuration, pointer_to_a_tokenizer,
    page, page_for_an_index, container_of_nothing, shards_elsewhere, pickled_numbers, pickled_stranger,
    config_not_json, config_a_list, missing_shard, missing_bin_shard, shard_without_its_tensors, broken_index,
    index_of_numbers, index_without_map,
]  # fmt: skip


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_a_damaged_source(run_gsa, tmp_path, make):
    words = make(tmp_path / "source")
    out = tmp_path / "new" / "out"
    run_gsa("convert", tmp_path / "source", out).assert_refused(*words)
    assert not out.parent.exists()


def test_a_file_that_may_not_be_read_is_not_called_damaged(run_gsa, tmp_path, monkeypatch):
    def forbidden(path: Path, *arguments, **options):
        if path.name in ("model.safetensors", "pytorch_model.bin"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    opened = Path.open
    sources = [write_folder(tmp_path / "a"), write_bin_folder(tmp_path / "b", tiny_tensors())]
    monkeypatch.setattr(Path, "open", forbidden)  # whoever runs the tests may be allowed to read everything
    for source in sources:
        outcome = run_gsa("convert", source, tmp_path / "out")
        outcome.assert_refused(source, "cannot be read (Permission denied)")
        assert "damaged" not in outcome.err and "truncated" not in outcome.err


def test_a_stranger_in_a_pickle_is_not_built(run_gsa, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    source = write_bin_folder(tmp_path / "source", {WTE: Trap()})
    run_gsa("convert", source, tmp_path / "out").assert_refused(source / "pytorch_model.bin")
    assert not (tmp_path / "sprung").exists()
