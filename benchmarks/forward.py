"""One forward pass over 2,048 tokens at batch 1, side by side: `python benchmarks/forward.py`.

A random model of the shape of TinyStories-33M, float32, logits of every token; each contender in a process of its own,
in turn, after one warm-up.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import tinystories_33m

LENGTH = 2048


def _ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50257, (1, LENGTH), dtype=np.int32)


def ours(folder: str) -> Callable[[], Any]:
    """Our model, jitted."""
    import jax
    from flax import nnx

    graphdef, params = nnx.split(tinystories_33m.load_ours(folder, "float32"))
    forward = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))
    return lambda: np.asarray(forward(params, _ids())[0, -1, :8]).tolist()


def pytorch(folder: str) -> Callable[[], Any]:
    """Hugging Face PyTorch."""
    import torch

    model = tinystories_33m.load_torch(folder, "float32")

    def run() -> list[float]:
        with torch.no_grad():
            return model(torch.from_numpy(_ids()).long()).logits[0, -1, :8].tolist()

    return run


def flax(folder: str) -> Callable[[], Any]:
    """Hugging Face Flax, jitted."""
    import jax

    model = tinystories_33m.load_flax(folder)
    forward = jax.jit(lambda params, ids: model(ids, params=params).logits)
    return lambda: np.asarray(forward(model.params, _ids())[0, -1, :8]).tolist()


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "forward.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tinystories_33m.write(Path(folder))
        measured = side_by_side.measure(
            {
                "gsa-jax": (ours, (folder,)),
                "HF PyTorch": (pytorch, (folder,)),
                "HF Flax": (flax, (folder,)),
            },
            arguments.rounds,
        )
    baseline = measured["gsa-jax"]
    expected = np.asarray(baseline["result"])
    rows = []
    for name, entry in measured.items():
        entry["tokens_per_second"] = LENGTH / entry["median"]
        entry["time_over_gsa"] = entry["median"] / baseline["median"]
        entry["largest_difference"] = float(np.abs(np.asarray(entry.pop("result")) - expected).max())
        rows.append(
            [
                name,
                f"{entry['median']:.2f}",
                f"{entry['tokens_per_second']:.0f}",
                f"{entry['time_over_gsa']:.2f}",
                f"{entry['largest_difference']:.0e}",
            ]
        )
    side_by_side.report(
        "Forward pass, batch 1, 2,048 tokens, TinyStories-33M shape, float32",
        ["contender", "seconds", "tokens/s", "time / gsa-jax", "largest difference of a logit"],
        rows,
        {"contenders": measured},
        arguments.out,
    )


if __name__ == "__main__":
    main()
