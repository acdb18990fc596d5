"""A random model of the shape of TinyStories-33M, for every contender the same weights.

The shape is that of the published `roneneldan/TinyStories-33M`: 768 wide, 4 layers, 16 heads, vocabulary 50,257.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 768,
    "num_layers": 4,
    "num_heads": 16,
    "attention_types": [[["global", "local"], 2]],
    "max_position_embeddings": 2048,
    "window_size": 256,
}


def write(folder: Path) -> None:
    """Writes the model as a Hugging Face folder."""
    import torch
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    GPTNeoForCausalLM(GPTNeoConfig(**SHAPE)).save_pretrained(folder)


def load_ours(folder: str, dtype: str) -> Any:
    """Our model of it."""
    import dataclasses

    from gsa_jax.convert.importer import plan_source, read_tensors
    from gsa_jax.convert.reader import open_source
    from gsa_jax.parameters import build_model

    source = open_source(folder)
    planned = plan_source(source)
    config = dataclasses.replace(planned.config, dtype=dtype)
    return build_model(config, read_tensors(source, planned), param_dtype=dtype)


def load_torch(folder: str, dtype: str) -> Any:
    """Hugging Face's PyTorch model of it."""
    import torch
    from transformers import GPTNeoForCausalLM

    return GPTNeoForCausalLM.from_pretrained(folder).to(getattr(torch, dtype)).eval()


def load_flax(folder: str) -> Any:
    """Hugging Face's Flax model of it."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers.FlaxGPTNeoForCausalLM.from_pretrained(folder, from_pt=True)
