"""The tiny models of `tiny_models` in Hugging Face PyTorch.

Everything that compares with `transformers` starts here. The imports are unconditional on purpose: without them the
parity tests must fail, not vanish.
"""

from typing import Any

import numpy as np
import torch
from transformers import GPTNeoConfig as HFConfig
from transformers import GPTNeoForCausalLM as HFModel

from helpers.tiny_models import SETTINGS, tiny_weights


def hf_model(seed: int = 0, **overrides: Any) -> HFModel:
    """The same weights as `tiny_model(seed, **overrides)`."""
    model = HFModel(HFConfig(**(SETTINGS | overrides))).eval()
    weights = {name: torch.from_numpy(weight) for name, weight in tiny_weights(seed, **overrides).items()}
    model.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]}, strict=True)
    return model


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
