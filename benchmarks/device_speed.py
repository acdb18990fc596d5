"""How fast does a model decode and train, and how near to what the device could do? Parts of `device.py`.

May be changed here: what is measured, at which sizes, and the bounds it is held against. Weights are random.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_bench import Bench, Finding, concurrently, normal, seconds_per_call

import gsa_jax
from gsa_jax.config import GPTNeoConfig
from gsa_jax.parameters import POSITION_EMBEDDING, build_model, expected_shapes
from gsa_jax.splat_config import SPLAT_PRESETS, LayerSplats, SplatConfig
from gsa_jax.train.config import MODELS, MeshConfig, OptimizerConfig
from gsa_jax.train.memory import memory_reports
from gsa_jax.train.objectives import cross_entropy
from gsa_jax.train.optimizer import make_optimizer
from gsa_jax.train.recipes import random_tensors
from gsa_jax.train.step import init_state, make_step

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""Dense bfloat16 FLOP/s that the makers state, by a part of the kind's name; the first that fits."""


def bounds(bench: Bench) -> Iterator[Finding]:
    """What the device can do at best: bytes per second and bfloat16 FLOP/s."""
    bandwidth, matmul = measured_bandwidth(bench.accelerator), measured_flops(bench.accelerator)
    stated = stated_flops(bench)
    yield {"what": "memory, a + s b", "found": f"{bandwidth / 1e9:,.0f} GB/s", "bytes_per_second": bandwidth}
    yield {
        "what": "large bfloat16 product",
        "found": f"{matmul / 1e12:,.1f} TFLOP/s",
        "against": f"{stated / 1e12:,.0f} TFLOP/s stated by the maker" if stated else "no peak known for this kind",
        "flops_per_second": matmul,
        "stated_flops_per_second": stated,
    }


@functools.cache
def measured_bandwidth(accelerator: bool) -> float:
    """Bytes read and written per second by a + s b over arrays that no cache holds."""
    size = 2**28 if accelerator else 2**24
    a, b = (normal(seed, (size,), jnp.float32) for seed in (0, 1))
    triad = jax.jit(lambda a, b: a + jnp.float32(3) * b)
    return 3 * a.nbytes / seconds_per_call(lambda: triad(a, b))


@functools.cache
def measured_flops(accelerator: bool) -> float:
    """FLOP/s of a large bfloat16 matrix product."""
    size = 8192 if accelerator else 512
    a, b = (normal(seed, (size, size), jnp.bfloat16) for seed in (0, 1))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / seconds_per_call(lambda: product(a, b))


def stated_flops(bench: Bench) -> float | None:
    """The peak that the maker states, if the kind is known."""
    return next((peak for kind, peak in PEAKS.items() if kind in bench.device.device_kind), None)


MODES: dict[str, SplatConfig | None] = {
    "hybrid": SPLAT_PRESETS["hybrid"],
    "S = 64, W = 64": SplatConfig(num_splats=64, window=64, norm_gain=True, far_gain=True),
    "exact": None,
}


def _model_config(bench: Bench, mode: str) -> GPTNeoConfig:
    config = MODELS["125M"]
    if not bench.accelerator:
        config = MODELS["story"]
    if bench.brief:
        config = dataclasses.replace(config, num_layers=1, attention_types=((("global",), 1),))
    dtype = "bfloat16" if bench.accelerator else "float32"
    return dataclasses.replace(config, splats=MODES[mode], dtype=dtype)


def _shape_name(bench: Bench) -> str:
    return "125M" if bench.accelerator else "one layer of the story shape" if bench.brief else "the story shape"


def _multiplied(config: GPTNeoConfig) -> int:
    """Parameters that every token is multiplied with: all but the positions; the token embedding once, as the head."""
    shapes = expected_shapes(config)
    return sum(int(np.prod(shape)) for name, shape in shapes.items() if name != POSITION_EMBEDDING)


def decoding(bench: Bench) -> Iterator[Finding]:
    """Greedy decoding with random weights, against reading weights and state once per token."""
    prompt, step, steps = (1024, 64, 4) if bench.accelerator else (64, 16, 4)
    batches = (1, 4) if bench.brief else (1, 32)

    def run(model: gsa_jax.GPTNeoForCausalLM, rows: int) -> list[float]:
        """Seconds per token; those of the first tokens, which hold the prefill, left out."""
        ids = np.random.default_rng(0).integers(1, model.config.vocab_size, (rows, prompt)).tolist()
        parts = gsa_jax.generate_stream(model, ids, max_new_tokens=step * steps, eos_token_id=-1, tokens_per_step=step)
        times = []
        for _ in parts:
            times.append(time.perf_counter())
        return [(after - before) / step for before, after in itertools.pairwise(times)]

    models, state_bytes = {}, {}
    row = jax.ShapeDtypeStruct((1, prompt), jnp.int32)
    for mode in MODES:
        config = _model_config(bench, mode)
        draw = jax.jit(functools.partial(random_tensors, config))
        model = build_model(config, draw(jax.random.key(0)), param_dtype=config.dtype)
        cache = jax.eval_shape(lambda ids, model=model: model.prefill(ids, None, prompt + step * steps)[1], row)
        models[mode] = model
        state_bytes[mode] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    cases = [(mode, rows) for mode in models for rows in batches]
    concurrently([functools.partial(run, models[mode], rows) for mode, rows in cases])  # compiles
    bandwidth = measured_bandwidth(bench.accelerator)
    for mode, rows in cases:
        model = models[mode]
        config = model.config
        seconds = statistics.median([*run(model, rows), *run(model, rows)])
        state = rows * state_bytes[mode]
        weights = _multiplied(config) * jnp.dtype(config.dtype).itemsize
        bound = (weights + state) / bandwidth
        yield {
            "what": f"{_shape_name(bench)}, {mode}, {config.dtype}, batch {rows}",
            "found": f"{rows / seconds:,.0f} tokens/s, {bound / seconds:.0%} of the bound"
            + (" (caches hold much of it)" if bound > seconds else ""),
            "against": f"{rows / bound:,.0f} tokens/s: {weights / 1e6:,.0f} + {state / 1e6:,.0f} MB a token",
            "tokens_per_second": rows / seconds,
            "share_of_bound": bound / seconds,
            "weight_bytes": weights,
            "state_bytes": state,
            "bytes_per_second": bandwidth,
            "prompt": prompt,
            "new_tokens": step * steps,
        }


FLOP_FORMULA = "6 N + 12 E sum over layers of keys per query; N without positions; keys (T + 1) / 2, W, or W + 2 S"


def flops_per_token(config: GPTNeoConfig, context: int) -> float:
    """Model FLOPs of a training step per token; what remat computes again is not counted.

    `FLOP_FORMULA`: a multiplication with N parameters takes 2 N FLOPs forward and 4 N backward; a key that is looked at
    takes 4 E forward (score and value) and 8 E backward. Features of a query and a key, reading and writing the state
    cost as much as 2 S keys.
    """
    keys = 0.0
    for layer, window in enumerate(config.windows):
        if window == "all":
            keys += (context + 1) / 2
            continue
        splats = config.layer_splats.get(layer, LayerSplats(0, window, 0))
        keys += min(window, context) + splats.kept + 2 * splats.num_splats
    return 6 * _multiplied(config) + 12 * config.hidden_size * keys


def training(bench: Bench) -> Iterator[Finding]:
    """A step of full training from random weights: speed, model FLOP utilisation, memory against the estimate."""
    context = 2048 if bench.accelerator else 128
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    mesh = MeshConfig(data=1).sizes(1)

    def prepare(mode: str) -> dict[str, Any]:
        config = dataclasses.replace(_model_config(bench, mode), remat=bench.accelerator)
        objective = cross_entropy(functools.partial(build_model, config))
        limit = (bench.device.memory_stats() or {}).get("bytes_limit", 0)
        rows = 16 if bench.accelerator else 2
        while True:
            estimate = memory_reports(
                config,
                objective,
                optimizer,
                [mesh],
                rows=rows,
                context=context,
                dtype=config.dtype,
                remat=config.remat,
            )[0].total
            if not limit or estimate <= 0.75 * limit or rows == 1:
                break
            rows //= 2

        def begin(key: jax.Array) -> Any:
            return init_state(random_tensors(config, key), optimizer, None)

        ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows, context), dtype=np.int32)
        batch = {"input_ids": jnp.asarray(ids), "segment_ids": jnp.ones_like(ids)}
        step = jax.jit(make_step(objective, optimizer, accumulate=1, ema_decay=None), donate_argnums=0)
        started = time.perf_counter()
        compiled = step.lower(jax.eval_shape(begin, jax.random.key(0)), {}, {}, batch).compile()
        took = time.perf_counter() - started
        return dict(
            config=config, rows=rows, batch=batch, begin=jax.jit(begin), step=compiled, estimate=estimate, took=took
        )

    prepared = concurrently([functools.partial(prepare, mode) for mode in MODES])
    peak, source = stated_flops(bench), "stated by the maker"
    if peak is None:
        peak, source = measured_flops(bench.accelerator), "of a measured matrix product"
    for mode, case in zip(MODES, prepared, strict=True):
        yield _training_speed(bench, mode, context=context, peak=peak, source=source, **case)


def _training_speed(
    bench: Bench,
    mode: str,
    *,
    context: int,
    peak: float,
    source: str,
    config: GPTNeoConfig,
    rows: int,
    batch: Any,
    begin: Any,
    step: Any,
    estimate: int,
    took: float,
) -> Finding:
    before = _peak_bytes(bench)
    state = begin(jax.random.key(0))
    losses = []

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, {}, {}, batch)
        losses.append(metrics["loss"])
        return state

    seconds = seconds_per_call(call, 3.0 if bench.accelerator else 0.5)
    if not all(np.isfinite(float(loss)) for loss in losses):
        raise RuntimeError(f"{mode}: the loss is not finite")
    after = _peak_bytes(bench)
    tokens_per_second = rows * context / seconds
    utilisation = tokens_per_second * flops_per_token(config, context) / peak
    analysis = step.memory_analysis()
    compiled = None
    if analysis is not None:
        aliased = analysis.alias_size_in_bytes
        kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - aliased
        compiled = kept + analysis.temp_size_in_bytes
    # The counter never falls: a peak that was there before says nothing about this step.
    measured = after if after is not None and before is not None and after > before else None

    def gib(size: int | None) -> str:
        return "unknown" if size is None else f"{size / 2**30:.2f} GiB"

    return {
        "what": f"{_shape_name(bench)}, {mode}, {config.dtype}, {rows} x {context:,} tokens",
        "found": f"{tokens_per_second:,.0f} tokens/s, model FLOP utilisation {utilisation:.1%}, peak {gib(measured)}",
        "against": f"{peak / 1e12:,.1f} TFLOP/s {source}; {gib(compiled)} compiled, {gib(estimate)} estimated",
        "tokens_per_second": tokens_per_second,
        "seconds_per_step": seconds,
        "utilisation": utilisation,
        "flops_per_token": flops_per_token(config, context),
        "flop_formula": FLOP_FORMULA,
        "peak_flops_per_second": peak,
        "peak_flops_source": source,
        "peak_bytes": measured,
        "compiled_bytes": compiled,
        "estimated_bytes": estimate,
        "seconds_to_compile": took,
        "first_and_last_loss": [float(losses[0]), float(losses[-1])],
    }


def _peak_bytes(bench: Bench) -> int | None:
    return (bench.device.memory_stats() or {}).get("peak_bytes_in_use")
