"""Decoding after contexts of 1k, 8k and 64k tokens, exact and through splats: `python benchmarks/long_context.py`.

A random model of the shape of TinyStories-33M with more positions, float32, batch 1. The cache is that of a context of
the given length, made directly: what it holds does not change what a step costs. The time to read such a context is
measured for the modes that read it in linear time.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import tinystories_33m

CONTEXTS = [1024, 8192, 65536]
STEPS = 32
CHUNK = 1024
MODES: dict[str, dict[str, Any]] = {
    "exact": {"num_splats": 64, "window": "all"},
    "hybrid, S = 32, W = 64, M = 64": {"num_splats": 32, "window": 64, "kept": 64},
    "S = 64, W = 64, M = 32": {"num_splats": 64, "window": 64, "kept": 32},
    "S = 64, W = 64": {"num_splats": 64, "window": 64},
    "pure, S = 64, W = 0": {"num_splats": 64, "window": 0},
}
READ = "reading the context"


def _model(mode: str, length: int) -> Any:
    import jax
    from flax import nnx

    from gsa_jax import GPTNeoConfig, GPTNeoForCausalLM, SplatConfig

    shape: dict[str, Any] = tinystories_33m.SHAPE | {"max_position_embeddings": length + STEPS}
    config = GPTNeoConfig(**shape, splats=SplatConfig(**MODES[mode]))
    build = jax.jit(lambda: nnx.split(GPTNeoForCausalLM(config, rngs=nnx.Rngs(0))))
    return nnx.merge(*build())


def decode(mode: str, length: int) -> Callable[[], Any]:
    """Greedy steps after a context; gives seconds per step, bytes of the cache, and of the compiled step's memory."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from gsa_jax.model import Cache

    model = _model(mode, length)
    graphdef, params = nnx.split(model)
    ids = np.ones((1, 16), np.int32)
    shapes = jax.eval_shape(lambda: model.prefill(ids, ids > 0, length + STEPS)[1])

    def context() -> Cache:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        layers = tuple(
            dataclasses.replace(
                layer,
                valid=jnp.ones_like(layer.valid),
                kept_slot=jnp.zeros_like(layer.kept_slot),
                length=jnp.int32(length),
            )
            for layer in zeros.layers
        )
        return Cache(layers, jnp.full((1,), length, jnp.int32))

    def steps(params: nnx.State, cache: Cache) -> tuple[jax.Array, Cache]:
        model = nnx.merge(graphdef, params)

        def step(carry: tuple[jax.Array, Cache], _: None) -> tuple[tuple[jax.Array, Cache], None]:
            token, cache = carry
            logits, cache = model.extend(token[:, None], jnp.ones((1, 1), bool), cache)
            return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), None

        (token, cache), _ = jax.lax.scan(step, (jnp.zeros((1,), jnp.int32), cache), None, length=STEPS)
        return token, cache

    compiled = jax.jit(steps, donate_argnums=1).lower(params, context()).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(context()))
    analysis = compiled.memory_analysis()
    assert analysis is not None, "the backend does not say how much memory a program needs"
    working = analysis.temp_size_in_bytes
    cache = context()

    def run() -> dict[str, int]:
        nonlocal cache
        token, cache = compiled(params, cache)
        # Back to the context's end, so that each run takes the same steps.
        cache = Cache(
            tuple(dataclasses.replace(layer, length=jnp.int32(length)) for layer in cache.layers),
            jnp.full((1,), length, jnp.int32),
        )
        jax.block_until_ready((token, cache))
        return {"cache_bytes": held, "working_bytes": working}

    return run


def read(mode: str, length: int) -> Callable[[], Any]:
    """Prefill of the whole context in chunks."""
    import jax
    from flax import nnx

    graphdef, params = nnx.split(_model(mode, length))
    ids = np.random.default_rng(0).integers(0, 50257, (1, length), dtype=np.int32)
    mask = np.ones((1, CHUNK), bool)
    first = jax.jit(lambda params, ids: nnx.merge(graphdef, params).prefill(ids, mask, length + STEPS))
    extend = jax.jit(lambda params, ids, cache: nnx.merge(graphdef, params).extend(ids, mask, cache), donate_argnums=2)

    def run() -> None:
        logits, cache = first(params, ids[:, :CHUNK])
        for start in range(CHUNK, length, CHUNK):
            logits, cache = extend(params, ids[:, start : start + CHUNK], cache)
        jax.block_until_ready(logits)

    return run


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "long_context.json")
    arguments = parser.parse_args()
    entries = []
    for length in CONTEXTS:
        contenders = {mode: (decode, (mode, length)) for mode in MODES}
        measured = side_by_side.measure(contenders, arguments.rounds, turn=1.0)
        reading = side_by_side.measure({mode: (read, (mode, length)) for mode in MODES if mode != "exact"}, rounds=1)
        for mode, entry in measured.items():
            seconds = entry["median"] / STEPS
            prefill = reading[mode]["median"] if mode in reading else None
            entries.append(
                {"mode": mode, "context": length, "seconds_per_token": seconds, **entry["result"], READ: prefill}
            )
    exact = {entry["context"]: entry["seconds_per_token"] for entry in entries if entry["mode"] == "exact"}
    rows = [
        [
            entry["mode"],
            f"{entry['context']:,}",
            f"{1e3 * entry['seconds_per_token']:.1f}",
            f"{exact[entry['context']] / entry['seconds_per_token']:.2f}",
            f"{entry['cache_bytes'] / 1e6:.1f}",
            f"{entry['working_bytes'] / 1e6:.1f}",
            "" if entry[READ] is None else f"{entry['context'] / entry[READ]:,.0f}",
        ]
        for entry in sorted(entries, key=lambda entry: list(MODES).index(entry["mode"]))
    ]
    side_by_side.report(
        "Decoding after a context, batch 1, TinyStories-33M shape, float32",
        ["mode", "context", "ms/token", "times as fast as exact", "cache MB", "working MB", "prefill tokens/s"],
        rows,
        {"entries": entries},
        arguments.out,
    )


if __name__ == "__main__":
    main()
