"""Greedy decoding at batch 1, side by side: `python benchmarks/generate.py`.

A random model of the shape of TinyStories-33M, a prompt of 32 tokens, 128 new tokens; each contender in a process
of its own, in turn, after one warm-up. The limits are the time to read every weight once at the bandwidth that our
matrix-vector product with the largest weight reaches in the same run.
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

PROMPT = list(range(100, 132))
NEW_TOKENS = 128


def ours(folder: str, dtype: str) -> Callable[[], Any]:
    """`gsa_jax.generate`."""
    import gsa_jax

    model = tinystories_33m.load_ours(folder, dtype)
    return lambda: gsa_jax.generate(model, [PROMPT], max_new_tokens=NEW_TOKENS, eos_token_id=-1)[0].tolist()


def pytorch(folder: str, dtype: str) -> Callable[[], Any]:
    """`generate` of Hugging Face PyTorch."""
    import torch

    model = tinystories_33m.load_torch(folder, dtype)
    ids = torch.tensor([PROMPT])

    def run() -> list[int]:
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[0, len(PROMPT) :].tolist()

    return run


def flax(folder: str, jitted: bool) -> Callable[[], Any]:
    """`generate` of Hugging Face Flax, as it is and as a whole under `jax.jit`."""
    import jax

    model = tinystories_33m.load_flax(folder)

    def call(ids: Any, params: Any) -> Any:
        # It wants an end of sequence; `same tokens` in the table shows that the model does not produce this one.
        return model.generate(
            ids, params=params, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=50256, pad_token_id=0
        ).sequences

    call = jax.jit(call) if jitted else call
    return lambda: np.asarray(call(np.asarray([PROMPT]), model.params))[0, len(PROMPT) :].tolist()


def matvec(dtype: str) -> Callable[[], Any]:
    """Reads a weight of the size of the token embedding 20 times, by `gsa_jax.ops.linear` on one row."""
    import jax
    import jax.numpy as jnp

    from gsa_jax.ops import linear

    columns = tinystories_33m.SHAPE["hidden_size"]
    weight = jax.random.normal(jax.random.key(0), (50257, columns), dtype)
    product = jax.jit(linear)

    def run() -> int:
        x = jnp.ones((1, columns), dtype)
        for _ in range(20):
            product(x, weight).block_until_ready()
        return 20 * weight.nbytes

    return run


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "generate.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tinystories_33m.write(Path(folder))
        measured = side_by_side.measure(
            {
                "gsa-jax float32": (ours, (folder, "float32")),
                "HF PyTorch float32": (pytorch, (folder, "float32")),
                "HF Flax float32": (flax, (folder, False)),
                "HF Flax float32, under jit": (flax, (folder, True)),
                "gsa-jax bfloat16": (ours, (folder, "bfloat16")),
                "HF PyTorch bfloat16": (pytorch, (folder, "bfloat16")),
                "limit float32": (matvec, ("float32",)),
                "limit bfloat16": (matvec, ("bfloat16",)),
            },
            arguments.rounds,
        )
    hidden = tinystories_33m.SHAPE["hidden_size"]
    weights = tinystories_33m.SHAPE["num_layers"] * 12 * hidden**2 + 50257 * hidden
    limits = {}
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        product = measured.pop(f"limit {dtype}")
        bandwidth = product["result"] / product["median"]
        limits[dtype] = {
            "weight_bytes": weights * width,
            "bytes_per_second": bandwidth,
            "seconds_per_token": weights * width / bandwidth,
            "share_reached": weights * width / bandwidth / (measured[f"gsa-jax {dtype}"]["median"] / NEW_TOKENS),
        }
    baseline = measured["gsa-jax float32"]
    expected = baseline["result"]
    rows = []
    for name, entry in measured.items():
        entry["tokens_per_second"] = NEW_TOKENS / entry["median"]
        entry["time_over_gsa_float32"] = entry["median"] / baseline["median"]
        entry["same_tokens"] = entry.pop("result") == expected
        rows.append(
            [
                name,
                f"{entry['tokens_per_second']:.1f}",
                f"{entry['median'] / NEW_TOKENS * 1e3:.2f}",
                f"{entry['time_over_gsa_float32']:.2f}",
                "yes" if entry["same_tokens"] else "no",
            ]
        )
    for dtype, limit in limits.items():
        seconds = limit["seconds_per_token"]
        rows.append(
            [
                f"limit {dtype}: {limit['weight_bytes'] / 1e6:.0f} MB at {limit['bytes_per_second'] / 1e9:.1f} GB/s",
                f"{1 / seconds:.1f}",
                f"{seconds * 1e3:.2f}",
                f"{seconds * NEW_TOKENS / baseline['median']:.2f}",
                f"{limit['share_reached']:.0%} reached",
            ]
        )
    side_by_side.report(
        "Greedy decoding, batch 1, 32 + 128 tokens, TinyStories-33M shape",
        ["contender", "tokens/s", "ms/token", "time / gsa-jax float32", "same tokens"],
        rows,
        {"contenders": measured, "limits": limits},
        arguments.out,
    )


if __name__ == "__main__":
    main()
