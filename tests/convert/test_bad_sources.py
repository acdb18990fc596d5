"""Sources that are not a model of this kind, and bad options: one line on stderr, exit code 2, nothing left behind.

Files that are damaged are in `test_damaged_files`, configurations in `test_bad_configurations`.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gsa_jax import SplatConfig
from gsa_jax.convert import convert
from helpers.hf_folders import (
    ATTENTION,
    GSA,
    read_safetensors,
    splat_tensors,
    tiny_tensors,
    write_bin_folder,
    write_folder,
    write_sharded_folder,
)

WTE = "transformer.wte.weight"
C_FC = "transformer.h.1.mlp.c_fc.weight"


def tensors_with(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return tiny_tensors() | {name: tensor}


def first_element(name: str, value: float) -> dict[str, torch.Tensor]:
    tensors = tiny_tensors()
    tensors[name].view(-1)[0] = value
    return tensors


# Each of these makes a source folder and returns what the message has to name.


def no_folder(source: Path) -> list[object]:
    return [source, "no such folder"]


def a_file(source: Path) -> list[object]:
    source.write_text("weights")
    return [source, "is a file"]


def empty_folder(source: Path) -> list[object]:
    source.mkdir()
    return [source / "config.json", "no such file"]


def no_weights(source: Path) -> list[object]:
    (write_folder(source) / "model.safetensors").unlink()
    return [source, "no weights"]


def config_is_a_folder(source: Path) -> list[object]:
    (write_folder(source) / "config.json").unlink()
    (source / "config.json").mkdir()
    return [source / "config.json", "cannot be read"]


def adapter(source: Path) -> list[object]:
    source.mkdir()
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (source / "adapter_model.bin").write_bytes(b"")
    return [source, "holds an adapter (adapter_config.json)", "merge"]


def adapter_beside_a_model(source: Path) -> list[object]:
    (write_folder(source) / "adapter_model.safetensors").write_bytes(b"")
    return [source, "holds an adapter (adapter_model.safetensors)", "merge"]


def adapter_in_the_model(source: Path) -> list[object]:
    name = f"base_model.model.{ATTENTION.format(0)}q_proj.lora_A.default.weight"
    return [write_folder(source, tensors_with(name, torch.zeros(4, 32))), name, "LoRA", "merge_and_unload"]


def classifier(source: Path) -> list[object]:
    file = write_folder(source, tensors_with("score.weight", torch.zeros(2, 32))) / "model.safetensors"
    return [file, "score.weight is a head for another task", "save the language model"]


def token_classifier(source: Path) -> list[object]:
    return [write_folder(source, tensors_with("module.classifier.bias", torch.zeros(2))), "head for another task"]


def head_for_values(source: Path) -> list[object]:
    file = write_bin_folder(source, tensors_with("v_head.summary.weight", torch.zeros(1, 32))) / "pytorch_model.bin"
    return [file, "v_head.summary.weight is a head for another task", "GPTNeoForCausalLM"]


def placeholders(source: Path) -> list[object]:
    state = {name: torch.zeros(0) for name in tiny_tensors()}
    return [write_bin_folder(source, state) / "pytorch_model.bin", "30 tensors are empty", "zero_to_fp32.py"]


def two_containers(source: Path) -> list[object]:
    state = {"model": tiny_tensors(), "module": tiny_tensors()}
    return [write_bin_folder(source, state) / "pytorch_model.bin", "two models, model and module"]


def another_model(source: Path) -> list[object]:
    state = {f"layer.{n}.weight": torch.zeros(3) for n in range(40)}
    return [write_folder(source, state) / "model.safetensors", "70 tensors do not fit", "; and 65 more"]


def an_unknown_wrapper(source: Path) -> list[object]:
    state = {f"net.{name}": tensor for name, tensor in tiny_tensors().items()}
    return [
        write_folder(source, state),
        "60 tensors do not fit",
        "all of its names are others, such as net.transformer",
    ]


def weights_of_others(source: Path) -> list[object]:
    (write_folder(source) / "model.safetensors").rename(source / "flax_model.msgpack")
    for name in ("last.ckpt", "optimizer.pt", "training_args.bin", "notes.txt"):
        (source / name).write_bytes(b"")
    return [source, "no weights", "only flax_model.msgpack; last.ckpt; a state dict", "pytorch_model.bin"]


def parts_of_deepspeed(source: Path) -> list[object]:
    (write_folder(source) / "model.safetensors").unlink()
    (source / "zero_to_fp32.py").write_text("")
    return [source, "python zero_to_fp32.py . pytorch_model.bin"]


def keys_of_all_kinds(source: Path) -> list[object]:
    tensors = tensors_with(C_FC, torch.zeros(3, 4)) | {
        "transformer.h.7.extra": torch.zeros(5),
        "other": torch.zeros(()),
    }
    del tensors[WTE], tensors["transformer.ln_f.bias"]
    return [
        write_folder(source, tensors) / "model.safetensors",
        "5 tensors do not fit the config.json",
        f"missing {WTE} [97, 32]",
        "missing transformer.ln_f.bias [32]",
        "unexpected transformer.h.7.extra [5]",
        "unexpected other []",
        f"{C_FC} has shape [3, 4], expected [128, 32]",
    ]


def keys_behind_a_wrapper(source: Path) -> list[object]:
    state = {f"module.{name}": tensor for name, tensor in tensors_with(C_FC, torch.zeros(3, 4)).items()}
    return [write_bin_folder(source, state) / "pytorch_model.bin", f"module.{C_FC} has shape [3, 4]"]


def two_models(source: Path) -> list[object]:
    state = tiny_tensors() | {"module." + WTE: torch.zeros(97, 32)}
    return [write_folder(source, state) / "model.safetensors", WTE, "module." + WTE, "two models"]


def not_a_number(source: Path) -> list[object]:
    tensors = first_element(C_FC, float("nan"))
    return [write_folder(source, tensors), "model.safetensors", "1 tensors", f"{C_FC} [128, 32]", "--allow-nonfinite"]


def infinite(source: Path) -> list[object]:
    tensors = first_element(C_FC, -float("inf")) | {"transformer.ln_f.bias": torch.full((32,), float("inf"))}
    return [write_folder(source, tensors), "2 tensors", C_FC, "transformer.ln_f.bias", "--allow-nonfinite"]


def integers(source: Path) -> list[object]:
    return [write_folder(source, tensors_with(C_FC, torch.zeros(128, 32).int())), f"{C_FC} is I32"]


def doubles(source: Path) -> list[object]:
    tensors = {name: tensor.double() for name, tensor in tiny_tensors().items()}
    return [write_bin_folder(source, tensors), f"{WTE} is float64; ", "; and 25 more; save the model in one of these"]


SOURCES: list[Callable[[Path], list[object]]] = [
    no_folder, a_file, empty_folder, no_weights, config_is_a_folder, adapter, adapter_beside_a_model,
    adapter_in_the_model, classifier, token_classifier, placeholders, two_containers, another_model,
    head_for_values, an_unknown_wrapper, parts_of_deepspeed, weights_of_others, keys_of_all_kinds,
    keys_behind_a_wrapper, two_models, not_a_number, infinite, integers, doubles,
]  # fmt: skip


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_a_bad_source(run_gsa, tmp_path, make):
    words = make(tmp_path / "source")
    out = tmp_path / "new" / "out"
    run_gsa("convert", tmp_path / "source", out).assert_refused(*words)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("tensors", "options", "words"),
    [
        (tiny_tensors, ["--num-splats", "0"], ["num_splats = 0", "attach one splat at least"]),
        (tiny_tensors, ["--num-splats", "-3"], ["num_splats = -3", ">= 0"]),
        (tiny_tensors, ["--terms", "norm_gain"], ["--terms: how many splats? Give --num-splats or --preset"]),
        (
            lambda: tiny_tensors() | splat_tensors(GSA),
            ["--num-splats", "2"],
            ["carries 2 splats per head already, no others can be attached"],
        ),
        (
            lambda: first_element(C_FC, 70000.0),
            ["--dtype", "float16"],
            ["model.safetensors", f"{C_FC} [128, 32]", "after narrowing to float16", "--allow-nonfinite"],
        ),
    ],
    ids=["no splats", "negative splats", "terms of no splats", "splats already", "overflow"],
)
def test_a_bad_option(run_gsa, tmp_path, tensors, options, words):
    source = write_folder(tmp_path / "source", tensors())
    run_gsa("convert", source, tmp_path / "out", *options).assert_refused(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nonfinite_weights_may_be_allowed(run_gsa, tmp_path):
    source = write_folder(tmp_path / "source", first_element(C_FC, float("nan")))
    assert run_gsa("convert", source, tmp_path / "out", "--allow-nonfinite").code == 0
    wide = write_folder(tmp_path / "wide", first_element(C_FC, 70000.0))
    assert run_gsa("convert", wide, tmp_path / "narrow", "--dtype", "float16", "--allow-nonfinite").code == 0


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_output_that_exists_is_left_alone(run_gsa, tmp_path, story_checkpoint, kind):
    source, out = write_folder(tmp_path / "source"), tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to(tmp_path / "nowhere")
    run_gsa("convert", source, out).assert_refused(out, "exists already")
    run_gsa("export", story_checkpoint, out).assert_refused(out, "exists already")
    assert out.is_symlink() or out.read_text() == "precious" if kind != "folder" else not list(out.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_output_below_a_file(run_gsa, tmp_path):
    source = write_folder(tmp_path / "source")
    out = source / "config.json" / "out"
    run_gsa("convert", source, out).assert_refused(out, "cannot be created")


def test_the_entry_point_prints_one_line_and_debug_a_traceback(tmp_path):
    gsa = Path(sys.executable).parent / "gsa"
    command = [gsa, "convert", tmp_path / "nowhere", tmp_path / "out"]
    plain = subprocess.run(command, capture_output=True, text=True)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr == f"gsa: {tmp_path / 'nowhere'}: no such folder\n"
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True)
    assert debug.returncode not in (0, 2)
    assert "Traceback" in debug.stderr and f"{tmp_path / 'nowhere'}: no such folder" in debug.stderr


def test_a_usage_error_exits_with_2(run_gsa):
    for arguments in ([], ["conwert"], ["convert"], ["convert", "a", "b", "--num-splats", "many"], ["generate", "a"]):
        assert run_gsa(*arguments).code == 2


def test_nothing_here_depends_on_a_broken_helper(tmp_path):
    """The folders that the cases above damage are fine before."""
    for suffix in ("safetensors", "bin"):
        source = write_sharded_folder(tmp_path / suffix, tiny_tensors(), suffix=suffix)
        convert(source, tmp_path / f"{suffix} out")
    convert(write_bin_folder(tmp_path / "legacy", tiny_tensors(), legacy=True), tmp_path / "legacy out")
    source = write_folder(tmp_path / "source", first_element(C_FC, 60000.0))
    convert(source, tmp_path / "out", dtype="float16", splats=SplatConfig(num_splats=1))
    assert np.isfinite(read_safetensors(source)[C_FC].numpy()).all()
