"""Float64 rows of attention, one at a time, and the queries and keys of the Hugging Face model.

May be changed here: nothing but the definitions that calibration and diagnostics are compared with.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from gsa_jax.fitting.statistics import RowSample

DEAD_SHARE = 0.01


class HeadSplats(NamedTuple):
    """One head's parameters: centers [S, D], log_scales and log_amplitudes [S], and two numbers."""

    centers: np.ndarray
    log_scales: np.ndarray
    log_amplitudes: np.ndarray | float = 0.0
    norm_gain: float = 0.0
    far_gain: float = 0.0


class HeadStatistics(NamedTuple):
    """Means over rows; usage sums to 1 over splats."""

    entropy: float
    far_mass: float
    usage: np.ndarray


def head_splats(tensors: dict[str, np.ndarray], layer: int, head: int) -> HeadSplats:
    """Of a checkpoint's tensors."""
    prefix = f"transformer.h.{layer}.attn.attention.splat_"
    return HeadSplats(
        **{
            field: np.asarray(tensors[prefix + field][head], np.float64)
            for field in HeadSplats._fields
            if prefix + field in tensors
        }
    )


def key_importance(
    tensors: dict[str, np.ndarray], layer: int, head: int, keys: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Of each key, as a checkpoint has learned it."""
    weights = np.asarray(tensors[f"transformer.h.{layer}.attn.attention.splat_importance"][head], np.float64)
    return np.concatenate([keys, values, np.sum(keys**2, axis=1, keepdims=True)], axis=1) @ weights


def far_keys(keys: np.ndarray, window: int, kept: int, importance: np.ndarray | None = None) -> np.ndarray:
    """Which of the keys up to a query's own go through splats: all beyond the window but the most important ones, which
    are the longest if nothing is said of their importance."""
    importance = np.sum(keys**2, axis=1) if importance is None else importance
    distance = np.arange(len(keys))[::-1]
    beyond = np.flatnonzero(distance >= window)
    stays = sorted(beyond, key=lambda j: (-importance[j], j))[:kept]
    return (distance >= window) & ~np.isin(np.arange(len(keys)), stays)


def row_weights(
    query: np.ndarray, keys: np.ndarray, far: np.ndarray, seen: int | None, splats: HeadSplats | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a query over the keys up to its own, and what each splat carries of them."""
    distance = np.arange(len(keys))[::-1]
    scores = keys @ query
    if splats is None:
        scores = np.where(distance < (seen or len(keys)), scores, -np.inf)
        joint = np.full((len(keys), 1), -np.inf)
    else:
        squared = np.sum((query - splats.centers) ** 2, axis=1)
        squared = squared + np.sum((keys[:, None] - splats.centers) ** 2, axis=2)
        joint = -squared / (2 * np.exp(2 * splats.log_scales)) + splats.log_amplitudes
        norms = np.sum(query**2) + np.sum(keys**2, axis=1, keepdims=True)
        joint += splats.norm_gain * norms + splats.far_gain
        joint[~far] = -np.inf
        scores = np.where(far, np.logaddexp.reduce(joint, axis=1), scores)
    normaliser = np.logaddexp.reduce(scores)
    return np.exp(scores - normaliser), np.exp(joint - normaliser).sum(axis=0)


def head_statistics(
    query: np.ndarray,
    key: np.ndarray,
    sample: RowSample,
    *,
    window: int,
    kept: int = 0,
    seen: int | None = None,
    splats: HeadSplats | None = None,
) -> HeadStatistics:
    """Over sampled rows of one head's queries and keys `[N, T, D]`; exact attention if there are no splats."""
    query, key = query.astype(np.float64), key.astype(np.float64)
    entropies, masses, carried = [], [], []
    for sequence, rows in zip(sample.sequences, sample.rows, strict=True):
        for row in rows:
            far = far_keys(key[sequence, : row + 1], window, kept)
            weights, through = row_weights(query[sequence, row], key[sequence, : row + 1], far, seen, splats)
            positive = weights[weights > 0]
            entropies.append(-np.sum(positive * np.log(positive)) / np.log(row + 1))
            masses.append(weights[far].sum())
            carried.append(through)
    usage = np.sum(carried, axis=0)
    return HeadStatistics(float(np.mean(entropies)), float(np.mean(masses)), usage / max(usage.sum(), 1e-300))


def hf_queries_and_keys(folder: Path, ids: np.ndarray, heads: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first two of `hf_projections`."""
    return [(query, key) for query, key, _ in hf_projections(folder, ids, heads)]


def hf_projections(folder: Path, ids: np.ndarray, heads: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What `q_proj`, `k_proj` and `v_proj` of each layer give in PyTorch, `[N, T, H, D]`; ids are right-padded."""
    import torch
    from transformers import GPTNeoForCausalLM as HFModel

    model = HFModel.from_pretrained(folder).eval()
    seen: dict[str, np.ndarray] = {}

    def keep(name: str):
        return lambda module, args, output: seen.update({name: output.numpy().reshape(*ids.shape, heads, -1)})

    for layer, block in enumerate(model.transformer.h):
        for kind in "qkv":
            getattr(block.attn.attention, f"{kind}_proj").register_forward_hook(keep(f"{kind}{layer}"))
    with torch.no_grad():
        model(torch.from_numpy(ids).long())
    return [(seen[f"q{layer}"], seen[f"k{layer}"], seen[f"v{layer}"]) for layer in range(len(model.transformer.h))]
