"""Hugging Face folders with tiny random models, in every form that a conversion has to read.

The tensors that go into a folder are the oracle for what comes out of it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.hf_oracle import hf_model

ATTENTION = "transformer.h.{}.attn.attention."
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 4, 8
"""Of `hf_model`."""

UNUSED = {"centers": "unused_gsa_splat_centers", "scales": "unused_gsa_splat_scales"}
GSA = {"centers": "gsa_splat_centers", "scales": "gsa_splat_log_scales"}
"""Leaf names of the prototype's dialects."""

Tensors = dict[str, torch.Tensor]


def tiny_tensors(dtype: torch.dtype = torch.float32, **overrides: Any) -> Tensors:
    """The weights of a tiny model by Hugging Face's names; the head is tied and left out."""
    state = hf_model(**overrides).state_dict()
    return {name: tensor.to(dtype).clone() for name, tensor in state.items() if name != "lm_head.weight"}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """The config.json of `tiny_tensors()`; `None` removes a key."""
    values = hf_model().config.to_dict() | {"architectures": ["GPTNeoForCausalLM"]} | changes
    return {name: value for name, value in values.items() if name not in changes or value is not None}


def write_folder(folder: Path, tensors: Tensors | None = None, config: dict[str, Any] | None = None) -> Path:
    """A folder with a model.safetensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tiny_config() if config is None else config), encoding="utf-8")
    save_file(tiny_tensors() if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_bin_folder(folder: Path, state: Any, *, legacy: bool = False) -> Path:
    """A folder with a pytorch_model.bin that holds `state`; in the format before torch 1.6 if `legacy`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    return folder


def write_sharded_folder(folder: Path, tensors: Tensors, *, suffix: str) -> Path:
    """A folder with two shards and their index; `suffix` is `"safetensors"` or `"bin"`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for number in range(2):
        shard = f"{stem}-0000{number + 1}-of-00002.{suffix}"
        part = dict(list(tensors.items())[number::2])
        weight_map |= dict.fromkeys(part, shard)
        if suffix == "safetensors":
            save_file(part, folder / shard, {"format": "pt"})
        else:
            torch.save(part, folder / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def read_safetensors(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def splat_tensors(leaves: dict[str, str], num_splats: int = 2, *, dtype: torch.dtype = torch.float32) -> Tensors:
    """Random splats for every layer of the tiny model, under the leaf names of a dialect."""
    torch.manual_seed(1)
    tensors = {}
    for layer in range(NUM_LAYERS):
        shape = (NUM_HEADS, num_splats)
        tensors[ATTENTION.format(layer) + leaves["centers"]] = torch.randn(*shape, HEAD_DIM).to(dtype)
        tensors[ATTENTION.format(layer) + leaves["scales"]] = torch.randn(shape).to(dtype)
    return tensors
