"""Bit-for-bit comparison of tensors, of numpy or PyTorch.

May be changed here: what has to be the same for two tensors to be the same.
"""

from typing import Any

import numpy as np


def bits(tensor: Any) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype, shape and bytes."""
    if hasattr(tensor, "detach"):
        import torch

        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw
    return str(tensor.dtype), tuple(tensor.shape), np.ascontiguousarray(tensor).tobytes()


def assert_same_tensors(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(got) == set(expected)
    different = [name for name in expected if bits(got[name]) != bits(expected[name])]
    assert not different
