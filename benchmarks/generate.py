"""Greedy decoding at batch 1, side by side: `python benchmarks/generate.py`.

A random model of the shape of TinyStories-33M, a prompt of 32 tokens, 128 new tokens; each contender in a process
of its own, in turn, after one warm-up. The limit beside our float32 rate is the time to read every weight once at the
bandwidth that a float32 matrix-vector product with the largest weight reaches on this machine, in the same run.
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


def matvec(folder: str) -> Callable[[], Any]:
    """Reads the token embedding of the model 20 times by float32 matrix-vector products."""
    import jax
    import jax.numpy as jnp

    rows, columns = 50257, tinystories_33m.SHAPE["hidden_size"]
    weight = jax.random.normal(jax.random.key(0), (rows, columns))
    product = jax.jit(lambda weight, x: weight @ x)

    def run() -> int:
        x = jnp.ones((columns,))
        for _ in range(20):
            product(weight, x).block_until_ready()
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
                "matrix-vector": (matvec, (folder,)),
            },
            arguments.rounds,
        )
    bandwidth = measured["matrix-vector"].pop("result") / measured.pop("matrix-vector")["median"]
    hidden = tinystories_33m.SHAPE["hidden_size"]
    weights = 4 * (tinystories_33m.SHAPE["num_layers"] * 12 * hidden**2 + 50257 * hidden)
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
    limit = weights / bandwidth
    share = limit / (baseline["median"] / NEW_TOKENS)
    rows.append(
        [
            f"limit: {weights / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s",
            f"{1 / limit:.1f}",
            f"{limit * 1e3:.2f}",
            f"{share:.2f}",
            "",
        ]
    )
    side_by_side.report(
        "Greedy decoding, batch 1, 32 + 128 tokens, TinyStories-33M shape",
        ["contender", "tokens/s", "ms/token", "time / gsa-jax float32", "same tokens"],
        rows,
        {"contenders": measured, "bandwidth": bandwidth, "weight_bytes": weights, "share_of_limit": share},
        arguments.out,
    )


if __name__ == "__main__":
    main()
