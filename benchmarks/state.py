"""Quality against bytes of state: the same bytes spent on a window, on splats, on kept keys, and on the best mix.

    python benchmarks/state.py --text TRAIN --eval-text VALID --out FOLDER

For each number of bytes and each way to spend them: `gsa fit-init` on the bundled model, `gsa train distill` where
splats are spent on, `gsa eval`; a window alone and kept keys alone are arms of models with one splat. The mix is what
`gsa fit-init --state-budget` chooses for each layer. Writes benchmarks/results/state.json and docs/state.svg; commands
whose result is there are not repeated.

May be changed here: the budgets, and the ways to spend them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from quality import MODEL, has_splats, make, train

from gsa_jax.attention import state_bytes
from gsa_jax.config import GPTNeoConfig, read_config
from gsa_jax.splat_config import SPLAT_PRESETS, SplatConfig

RESULTS = Path(__file__).parent / "results" / "state.json"
FIGURE = Path(__file__).parents[1] / "docs" / "state.svg"
BUDGETS = (500_000, 250_000, 125_000)
DOCUMENTS = 100
DISTILL = "--steps 400 --batch-size 4 --optimizer.warmup-steps 20 --optimizer.splat-learning-rate 0.02"
NEAR = 16
"""Window beside splats alone or kept keys alone: the least that the first layer's heads need."""

SPLATS, KEPT, MIX = f"splats, window {NEAR}", f"kept keys, window {NEAR}", "chosen by layer"
SHARES = ((2, 2, 1), (1, 4, 2), (1, 2, 4), (0, 4, 1))
"""Splats, window and kept keys in these proportions, in every layer."""


def _name(splats: int, window: int, kept: int) -> str:
    return f"S : W : M = {splats} : {window} : {kept}"


WAYS: dict[str, Callable[[int], dict[str, Any]]] = {
    "window": lambda n: {"num_splats": 0, "window": n, "kept": 0, "importance": "norm"},
    SPLATS: lambda n: {"num_splats": n, "window": NEAR, "kept": 0, "importance": "norm"},
    KEPT: lambda n: {"num_splats": 0, "window": NEAR, "kept": n, "importance": "learned"},
} | {
    _name(s, w, m): lambda n, s=s, w=w, m=m: {
        "num_splats": s * n,
        "window": w * n,
        "kept": m * n,
        "importance": "learned",
    }
    for s, w, m in SHARES
}
ARMS = {"window": "window-only", KEPT: "without-splats", _name(0, 4, 1): "without-splats"}
"""The arm of an evaluation that spends as a way says, where it is not the hybrid."""
MARKERS = "s^vxd*Po"
EXACT = (512, 2048)
"""Tokens of which exact attention's own bytes are shown."""
TICKS = (125, 250, 500, 1000, 2000, 4000)
"""kB."""


def main() -> None:
    """Runs everything, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="training text")
    parser.add_argument("--eval-text", type=Path, required=True, help="held-out text")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and runs")
    given = parser.parse_args()
    plain = given.out / "plain"
    make(plain, f"convert {MODEL} {plain}")
    config = read_config(MODEL / "config.json")
    results: dict[str, Any] = {"exact": {f"{n}": exact_bytes(config, n) for n in EXACT}, "ways": {}}
    for budget in BUDGETS:
        for way in [*WAYS, MIX]:
            folder = given.out / f"{re.sub(r'[^a-zA-Z0-9]+', '-', way)}-{budget}"
            found = score(given, plain, folder, way, options(config, way, budget))
            if way != MIX:
                found["bytes"] = bytes_of(config, most(config, way, budget))
            results["ways"].setdefault(way, []).append(found)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
            print(way, f"{budget:,}", json.dumps(found), flush=True)
    draw(results)


def score(given: argparse.Namespace, plain: Path, folder: Path, way: str, attach: str) -> dict[str, Any]:
    """Bytes of state and ratio of perplexity to exact, fitted and distilled."""
    fitted = folder / "fitted"
    make(fitted, f"fit-init {plain} {fitted} --text {given.text} {attach}")
    found: dict[str, Any] = {}
    stages = {"fitted": fitted}
    if way not in ARMS and has_splats(fitted):
        options = f"--text {given.text} {DISTILL}"
        stages["distilled"] = train(folder / "distilled", f"distill {fitted}", options)
    for stage, checkpoint in stages.items():
        out = folder / f"{stage}.json"
        make(out, f"eval {checkpoint} --json {out} --text {given.eval_text} --max-documents {DOCUMENTS}")
        values = json.loads(out.read_text(encoding="utf-8"))
        found |= {"splats": values["splats"], "bytes": values["state_bytes"], "tokens": values["tokens"]}
        found[stage] = next(arm["perplexity_ratio"] for arm in values["arms"] if arm["name"] == ARMS.get(way, "hybrid"))
    return found


def options(config: GPTNeoConfig, way: str, budget: int) -> str:
    """Of `gsa fit-init`."""
    if way == MIX:
        return f"--state-budget {budget} --importance learned"
    numbers = most(config, way, budget)
    numbers["num_splats"] = max(numbers["num_splats"], 1)
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in numbers.items())


def most(config: GPTNeoConfig, way: str, budget: int) -> dict[str, Any]:
    """The most of something that fits into the budget."""
    count = 1
    while bytes_of(config, WAYS[way](count + 1)) <= budget:
        count += 1
    return WAYS[way](count)


def bytes_of(config: GPTNeoConfig, numbers: dict[str, Any]) -> int:
    """Bytes of state with the terms of the recommended preset and these numbers."""
    splats: SplatConfig = dataclasses.replace(SPLAT_PRESETS["hybrid"], **numbers)
    return state_bytes(dataclasses.replace(config, splats=splats))


def exact_bytes(config: GPTNeoConfig, tokens: int) -> int:
    """What exact attention remembers of a text in the same layers."""
    return state_bytes(dataclasses.replace(config, splats=SplatConfig(num_splats=0)), tokens)


def draw(results: dict[str, Any]) -> None:
    """The cost of each way over its bytes."""
    plt.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    for (way, entries), marker in zip(results["ways"].items(), MARKERS, strict=True):
        best = [entry.get("distilled", entry["fitted"]) for entry in entries]
        low, high = ([max(x["interval"][n] - 1, 1e-5) for x in best] for n in (0, 1))
        sizes = [entry["bytes"] / 1e3 for entry in entries]
        axes.plot(sizes, [x["value"] - 1 for x in best], marker=marker, label=way)
        axes.fill_between(sizes, low, high, alpha=0.15)
    for tokens, size in results["exact"].items():
        axes.axvline(size / 1e3, color="grey", linestyle=":")
        axes.annotate(
            f"exact, {int(tokens):,} tokens", (size / 1e3, axes.get_ylim()[1]), rotation=90, va="top", ha="right"
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="kB of state of one text, layers with splats",
        ylabel="perplexity above exact",
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2%}")
    axes.set_xticks(TICKS, labels=[f"{kilobytes:,}" for kilobytes in TICKS])
    axes.xaxis.set_minor_formatter("")
    figure.legend(loc="outside right upper")
    figure.savefig(FIGURE)


if __name__ == "__main__":
    main()
