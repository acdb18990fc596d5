"""Tiny random GPT-2s of Hugging Face PyTorch, folders with them in every form that a conversion reads, and splats.

May be changed here: their shape, and how their weights are drawn.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gsa_jax import GPTNeoForCausalLM, SplatConfig
from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert import convert
from gsa_jax.parameters import build_model, is_splat, named_parameters
from helpers.hf_folders import Tensors

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

# The other implementations of attention leave out what scales it in some configurations.
EAGER = {"attn_implementation": "eager"}


def hf_gpt2(seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    """With biases and norms that are not 0 and 1, where mistakes would hide."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE | overrides, **EAGER)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def tensors_of(model: GPT2LMHeadModel, dtype: torch.dtype = torch.float32) -> Tensors:
    """By Hugging Face's names; the head is tied and left out."""
    return {n: tensor.to(dtype).clone() for n, tensor in model.state_dict().items() if n != "lm_head.weight"}


def with_buffers(tensors: Tensors) -> Tensors:
    """With the masks that old versions of transformers stored beside the weights, and the tied head."""
    buffers = {}
    for layer in range(SHAPE["n_layer"]):
        buffers[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        buffers[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return {**tensors, **buffers, "lm_head.weight": tensors["transformer.wte.weight"]}


def without_prefix(tensors: Tensors) -> Tensors:
    """As the first checkpoints of GPT-2 have them."""
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def write_gpt2(
    folder: Path, model: GPT2LMHeadModel, tensors: Tensors | None = None, *, form: str = "safetensors", **changes: Any
) -> Path:
    """A folder of a form: `safetensors`, `bin`, or either of them `in shards`."""
    folder.mkdir(parents=True)
    values = model.config.to_dict() | {"architectures": ["GPT2LMHeadModel"]} | changes
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensors = tensors_of(model) if tensors is None else tensors
    suffix, _, shards = form.partition(" ")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{n}-of-00002.{suffix}" for n in (1, 2)] if shards else [f"{stem}.{suffix}"]
    weight_map = {}
    for number, name in enumerate(names):
        part = dict(list(tensors.items())[number :: len(names)])
        weight_map |= dict.fromkeys(part, name)
        if suffix == "safetensors":
            save_file(part, folder / name, {"format": "pt"})
        else:
            torch.save(part, folder / name)
    if shards:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def with_tokenizer(folder: Path, story_neo: Path) -> Path:
    """The folder with the bundled model's tokenizer, of 1,024 tokens, described as GPT-2's own is."""
    shutil.copyfile(story_neo / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}', encoding="utf-8")
    return folder


def with_splats(theirs: GPT2LMHeadModel, folder: Path, splats: SplatConfig) -> GPTNeoForCausalLM:
    """The same model with splats that are random in every parameter, wide enough for its keys to reach them."""
    convert(write_gpt2(folder / "source", theirs), folder / "plain")
    config, tensors = load_tensors(folder / "plain")
    config, random = dataclasses.replace(config, splats=splats), np.random.default_rng(0)
    drawn = {}
    for name, tensor in named_parameters(GPTNeoForCausalLM(config, rngs=nnx.Rngs(0))).items():
        if is_splat(name):
            centre = 0.7 if name.endswith("log_scales") else 0.0
            drawn[name] = jnp.asarray(centre + 0.2 * random.normal(size=tensor.shape), jnp.float32)
    return build_model(config, tensors | drawn)
