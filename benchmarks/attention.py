"""Seconds per call of splat attention and of exact attention, by length: `python benchmarks/attention.py`.

Batch 1, 16 heads of 48, float32, causal, unscaled; forward, and forward with backward (output and gradients to all
inputs). Each contender in a process of its own, in turn, after one warm-up, with inputs in the layout it likes best.
Exact attention grows with the square of the length: a contender is left out where its last call suggests more time or
memory than the limits below. `--markdown` prints the figures on file for the documentation and measures nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plot_attention
import side_by_side

LENGTHS = [2**i for i in range(9, 17)]
PASSES = ["forward", "forward + backward"]
HEADS, HEAD_DIM = 16, 48
NUM_SPLATS = WINDOW = 64

CALL_SECONDS = 30.0
"""Longer calls are left out."""

CALL_BYTES = 12e9
"""Calls whose process would hold more are left out."""

OURS, BLOCKED, SDPA, HF_FLAX = "splat attention", "blocked softmax (JAX)", "SDPA (PyTorch)", "GPT-Neo (HF Flax)"
TARGETS = [
    ("forward", BLOCKED, 8.0),
    ("forward + backward", BLOCKED, 6.0),
    ("forward", SDPA, 3.0),
]
"""Pass, contender, and how many times as fast as it splat attention should be at `TARGET_LENGTH`."""
TARGET_LENGTH, BREAK_EVEN = 8192, 1024
TOLERANCE = 1e-4

Arrays = dict[str, np.ndarray]


def _inputs(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Query, key, value and a gradient of the output, `[1, H, T, D]`; the scores' standard deviation is 1.7."""
    generator = np.random.default_rng(0)
    shape = (1, HEADS, length, HEAD_DIM)
    query, key, value, gradient = (generator.standard_normal(shape, np.float32) for _ in range(4))
    return query / 2, key / 2, value, gradient


def _sample(arrays: Any, time_axis: int) -> tuple[Arrays, int]:
    """Eight tokens of the output and of the gradients to query, key and value, and the peak of memory in bytes."""
    sample = {}
    for name, array in zip(("output", "query", "key", "value"), arrays, strict=False):
        array = np.moveaxis(np.asarray(array), time_axis, 0)
        sample[name] = array[len(array) // 8 - 1 :: len(array) // 8].reshape(8, HEADS, HEAD_DIM)
    return sample, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_jax(attention: Callable[..., Any], which: str, inputs: tuple[Any, ...], time_axis: int) -> Callable[[], Any]:
    """`attention` of all inputs but the last, which is the gradient of its output."""
    import jax

    def backward(*inputs: Any) -> tuple[Any, ...]:
        output, pull = jax.vjp(attention, *inputs[:-1])
        return output, *pull(inputs[-1])

    run = jax.jit(backward if which == PASSES[1] else lambda *inputs: (attention(*inputs[:-1]),))
    inputs = jax.tree.map(jax.numpy.asarray, inputs)
    return lambda: _sample(jax.block_until_ready(run(*inputs)), time_axis)


def ours(which: str, length: int, window: int) -> Callable[[], Any]:
    """`splat_attention`, splats among the inputs."""
    import jax.numpy as jnp

    from gsa_jax.ops import Splats, splat_attention

    query, key, value, gradient = (x.swapaxes(1, 2) for x in _inputs(length))
    centers = np.random.default_rng(1).standard_normal((HEADS, NUM_SPLATS, HEAD_DIM), np.float32) / 2
    splats = Splats(jnp.asarray(centers), jnp.full(centers.shape[:2], np.log(2.0), jnp.float32))

    def attention(query: Any, key: Any, value: Any, splats: Any) -> Any:
        mask = jnp.ones(key.shape[:2], bool)
        return splat_attention(query, key, value, splats, window=window, attention_mask=mask)[0]

    return _in_jax(attention, which, (query, key, value, splats, gradient), 1)


def blocked(which: str, length: int) -> Callable[[], Any]:
    """Exact attention in JAX, in linear memory."""
    from blocked_softmax import blocked_softmax

    return _in_jax(blocked_softmax, which, _inputs(length), 2)


def hf_flax(which: str, length: int) -> Callable[[], Any]:
    """What `transformers` v4.57 `FlaxGPTNeoSelfAttention` computes between its projections."""
    import jax
    import jax.numpy as jnp
    from flax.linen import make_causal_mask
    from flax.linen.attention import dot_product_attention_weights

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        mask = make_causal_mask(jnp.ones((1, length), bool), dtype=bool)
        bias = jax.lax.select(mask, jnp.full(mask.shape, 0.0), jnp.full(mask.shape, jnp.finfo(jnp.float32).min))
        query = query * jnp.sqrt(HEAD_DIM).astype(query.dtype)
        weights = dot_product_attention_weights(query, key, bias=bias, deterministic=True)
        return jnp.einsum("...hqk,...khd->...qhd", weights, value)

    return _in_jax(attention, which, tuple(x.swapaxes(1, 2) for x in _inputs(length)), 1)


def sdpa(which: str, length: int) -> Callable[[], Any]:
    """PyTorch's `scaled_dot_product_attention`."""
    import torch

    query, key, value, gradient = (torch.from_numpy(x) for x in _inputs(length))

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)

    def forward() -> Any:
        with torch.no_grad():
            return _sample([attention(query, key, value)], 2)

    def backward() -> Any:
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        output = attention(*leaves)
        return _sample([output.detach(), *torch.autograd.grad(output, leaves, gradient)], 2)

    return backward if which == PASSES[1] else forward


Contenders = dict[str, tuple[side_by_side.Contender, tuple[Any, ...]]]

CONTENDERS: Contenders = {
    OURS: (ours, (WINDOW,)),
    BLOCKED: (blocked, ()),
    SDPA: (sdpa, ()),
    HF_FLAX: (hf_flax, ()),
}


def compare(measured: dict[str, dict[str, Any]]) -> None:
    """Ends the run if contenders that compute the same thing do not agree."""
    for first, name in itertools.pairwise(measured):
        expected = measured[first]["result"][0]
        for part, array in measured[name]["result"][0].items():
            difference = np.abs(array - expected[part]).max() / max(1.0, np.abs(expected[part]).max())
            if not difference <= TOLERANCE:
                raise SystemExit(f"{name} and {first} differ by {difference:.0e} in {part}; one of them is wrong")


def check() -> None:
    """At 512 tokens all exact contenders agree, and so does splat attention with a window that holds everything."""
    arguments = (PASSES[1], LENGTHS[0])
    exact: Contenders = {name: (run, arguments) for name, (run, _) in CONTENDERS.items() if name != OURS}
    exact["splat attention, window = 512"] = (ours, (*arguments, LENGTHS[0]))
    compare(side_by_side.measure(exact, 1))
    print(f"{', '.join(exact)} agree to {TOLERANCE:g}, outputs and gradients", flush=True)


def expected_cost(entries: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Seconds and bytes at twice the last length: time grows as theory says, memory as it did last."""
    seconds = entries[-1]["seconds_per_call"] * (2 if name == OURS else 4)
    growth = entries[-1]["peak_bytes"] / entries[-2]["peak_bytes"] if len(entries) > 1 else 1.0
    return seconds, entries[-1]["peak_bytes"] * growth


def measure(lengths: list[int], rounds: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Entries by pass and contender, one per length; `run` is False for those left out, with the cost expected."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {which: {name: [] for name in CONTENDERS} for which in PASSES}
    for which, by_contender in results.items():
        for length in lengths:
            contenders: Contenders = {}
            for name, (run, arguments) in CONTENDERS.items():
                entries = by_contender[name]
                seconds, peak = expected_cost(entries, name) if entries else (0.0, 0.0)
                if seconds > CALL_SECONDS or peak > CALL_BYTES:
                    entries.append({"length": length, "run": False, "seconds_per_call": seconds, "peak_bytes": peak})
                else:
                    contenders[name] = (run, (which, length, *arguments))
            measured = side_by_side.measure(contenders, rounds, turn=1.0, limit=10)
            compare({name: entry for name, entry in measured.items() if name != OURS})
            for name, entry in measured.items():
                peak = entry.pop("result")[1]
                entry = {"seconds_per_call": entry["median"], "peak_bytes": peak, "seconds": entry["seconds"]}
                by_contender[name].append({"length": length, "run": True, **entry})
            seconds = ", ".join(f"{name} {entry['median']:.3g} s" for name, entry in measured.items())
            print(f"{which}, {length:,} tokens: {seconds}", flush=True)
    return results


def targets(results: dict[str, Any]) -> list[str]:
    """A line for each target: met, not met or not measured."""
    lines = []
    for which, name, factor in TARGETS:
        seconds, theirs = (plot_attention.measured(results[which][x]).get(TARGET_LENGTH) for x in (OURS, name))
        if seconds is None or theirs is None:
            verdict = "not measured"
        else:
            ratio = theirs / seconds
            verdict = f"{ratio:.1f}x, {'met' if ratio >= factor else 'NOT met'}"
        lines.append(f"{which}, {TARGET_LENGTH:,} tokens, at least {factor:g}x as fast as {name}: {verdict}")
    for which, by_contender in results.items():
        times = {name: plot_attention.measured(entries) for name, entries in by_contender.items()}
        start = None
        for length in sorted(times[OURS], reverse=True):
            exact = [times[name][length] for name in times if name != OURS and length in times[name]]
            if exact and times[OURS][length] > min(exact):
                break
            start = length
        verdict = f"{start:,}" if start else "beyond the longest"
        met = "met" if start and start <= BREAK_EVEN else "NOT met"
        lines.append(f"{which}, no slower than the fastest exact contender from {BREAK_EVEN:,} on: {verdict}, {met}")
    return lines


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: a row per pass and length."""

    def cell(entry: dict[str, Any]) -> str:
        seconds, gigabytes = entry["seconds_per_call"], entry["peak_bytes"] / 1e9
        if entry["run"]:
            return f"{seconds * 1e3:,.0f} ms, {gigabytes:.1f} GB"
        return f"not run (about {f'{seconds:,.0f} s' if seconds > CALL_SECONDS else f'{gigabytes:,.0f} GB'})"

    rows = []
    for which, by_contender in results.items():
        for entries in zip(*by_contender.values(), strict=True):
            rows.append([which, f"{entries[0]['length']:,}", *map(cell, entries)])
    return ["pass", "tokens", *CONTENDERS], rows


def main() -> None:
    """Measures, prints, writes, draws."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    parser.add_argument("--markdown", action="store_true", help="print the figures on file, measure nothing")
    parser.add_argument("--out", type=Path, default=here / "results" / "attention.json")
    parser.add_argument("--plot", type=Path, default=here.parent / "docs" / "attention_speed.svg")
    arguments = parser.parse_args()
    if arguments.markdown:
        results = json.loads(arguments.out.read_text(encoding="utf-8"))["passes"]
        columns, rows = table(results)
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    else:
        check()
        results = measure([length for length in LENGTHS if length <= arguments.longest], arguments.rounds)
        title = "Attention, batch 1, 16 heads of 48, float32: time per call, peak memory of the process"
        side_by_side.report(title, *table(results), {"passes": results}, arguments.out)
        plot_attention.plot(results, arguments.plot)
        print(f"written to {arguments.plot}")
    print("\n".join(targets(results)))


if __name__ == "__main__":
    main()
