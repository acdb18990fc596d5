"""Models with splats in PyTorch: the exported code, run from the package."""

import json
from typing import Any

import numpy as np
import torch

from gsa_jax import GPTNeoForCausalLM
from gsa_jax.convert.pytorch.configuration_gsa import GSAConfig
from gsa_jax.convert.pytorch.modeling_gsa import GSAForCausalLM
from gsa_jax.parameters import named_parameters


def hf_config(values: dict[str, Any]) -> GSAConfig:
    """As it is after it was in a `config.json`."""
    return GSAConfig(**json.loads(json.dumps(values)))


def hf_splat_model(model: GPTNeoForCausalLM) -> GSAForCausalLM:
    """The same model in PyTorch."""
    theirs = GSAForCausalLM(hf_config(model.config.to_hf_with_splats())).eval()
    weights = {name: torch.from_numpy(np.array(tensor)) for name, tensor in named_parameters(model).items()}
    theirs.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]}, strict=True)
    return theirs
