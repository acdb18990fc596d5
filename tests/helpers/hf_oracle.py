"""Tiny random Hugging Face models, made in memory, and their weights in our model.

Everything that compares with `transformers` starts here. The imports are unconditional on purpose: without them the
parity tests must fail, not vanish.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import torch
from transformers import GPTNeoConfig as HFConfig
from transformers import GPTNeoForCausalLM as HFModel

from gsa_jax.config import GPTNeoConfig
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.parameters import build_model

VOCAB = 97


def hf_model(seed: int = 0, **overrides: Any) -> HFModel:
    """A random model whose logits spread over several units, so that agreement means something."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "initializer_range": 0.3,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    } | overrides
    torch.manual_seed(seed)
    model = HFModel(HFConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name or name.endswith("bias"):  # transformers starts these at 0 and 1, where mistakes hide
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ours(model: HFModel, *, param_dtype: jax.typing.DTypeLike | None = None, **computation: Any) -> GPTNeoForCausalLM:
    """Our model with the same weights; `computation` are fields of its configuration."""
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    config = dataclasses.replace(GPTNeoConfig.from_hf(model.config), **computation)
    return build_model(config, tensors, param_dtype=param_dtype)


def random_ids(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, shape, dtype=np.int32)


def positions(mask: np.ndarray) -> np.ndarray:
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)


def torch_logits(model: HFModel, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    mask = np.ones(ids.shape, np.int64) if mask is None else mask.astype(np.int64)
    with torch.no_grad():
        output = model(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions(mask)).long(),
        )
    return output.logits.float().numpy()


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the difference over the RMS of what is expected."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))
