"""Tiny random models, made without PyTorch; `hf_oracle` has the same models in PyTorch.

May be changed here: their shape, and how their weights are drawn.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gsa_jax.config import GPTNeoConfig
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.parameters import build_model, expected_shapes, named_parameters
from gsa_jax.splat_config import SplatConfig

VOCAB = 97

SETTINGS: dict[str, Any] = {
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
}
"""By Hugging Face's names."""


def tiny_config(**overrides: Any) -> GPTNeoConfig:
    return GPTNeoConfig.from_hf(SETTINGS | overrides)


def tiny_weights(seed: int = 0, **overrides: Any) -> dict[str, np.ndarray]:
    """Random weights whose logits spread over several units, so that agreement means something."""
    config, random = tiny_config(**overrides), np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        # Biases and norms are not 0 and 1, where mistakes would hide.
        std = config.initializer_range if len(shape) == 2 else 0.2
        mean = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        return (mean + std * random.normal(size=shape)).astype(np.float32)

    return {name: draw(name, shape) for name, shape in expected_shapes(config).items()}


def tiny_model(
    seed: int = 0, *, param_dtype: jax.typing.DTypeLike | None = None, dtype: str = "float32", **overrides: Any
) -> GPTNeoForCausalLM:
    """Our model with these weights."""
    config = dataclasses.replace(tiny_config(**overrides), dtype=dtype)
    return build_model(config, tiny_weights(seed, **overrides), param_dtype=param_dtype)


def tiny_splat_model(splats: SplatConfig, dtype: str = "float32") -> GPTNeoForCausalLM:
    """A random model of two layers, local (window 7) and global, whose splats are random in every parameter."""
    plain = tiny_model(window_size=7, attention_types=[[["local", "global"], 1]])
    config = dataclasses.replace(plain.config, splats=splats, dtype=dtype)
    random = np.random.default_rng(0)
    tensors = named_parameters(GPTNeoForCausalLM(config, rngs=nnx.Rngs(0)))
    for name, tensor in tensors.items():
        if ".splat_" in name:
            centre = 0.7 if name.endswith("log_scales") else 0.0
            spread = 1.0 if name.endswith(("centers", "amplitudes")) else 0.1
            tensors[name] = jnp.asarray(centre + spread * random.normal(size=tensor.shape), jnp.float32)
    return build_model(config, tensors | named_parameters(plain))


def random_ids(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB, shape, dtype=np.int32)


def relative_rms(got: Any, expected: Any) -> float:
    """RMS of the difference over the RMS of what is expected."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))
