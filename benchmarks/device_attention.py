"""Attention through splats against exact attention, by length: a part of `device.py`, with random inputs.

May be changed here: which contenders there are, and at which lengths. Who is fastest at exact attention depends on the
platform.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from device_bench import Bench, Finding, concurrently, normal, seconds_per_call

from gsa_jax.errors import first_line
from gsa_jax.ops import Splats, splat_attention
from gsa_jax.ops.flash import splash

HEADS, HEAD_DIM, NUM_SPLATS, WINDOW, KEPT = 12, 64, 64, 64, 32
PASSES = ("forward", "forward + backward")
OURS, OURS_KEPT, OURS_EXACT = "splats", f"splats and {KEPT} kept keys", "exact (gsa-jax)"
LONGEST_OURS_EXACT = 4096
"""Where it has no flash attention, its memory grows with the square of the length."""

Attention = Callable[..., jax.Array]


def _splats(query: jax.Array, key: jax.Array, value: jax.Array, splats: Splats) -> jax.Array:
    return splat_attention(query, key, value, splats, window=WINDOW)[0]


def _splats_and_kept(query: jax.Array, key: jax.Array, value: jax.Array, splats: Splats) -> jax.Array:
    return splat_attention(query, key, value, splats, window=WINDOW, kept=KEPT)[0]


def _ours_exact(query: jax.Array, key: jax.Array, value: jax.Array, splats: Splats) -> jax.Array:
    return splat_attention(query, key, value, splats, window="all")[0]


def _product_attention(implementation: Literal["xla", "cudnn"]) -> Attention:
    def attention(query: jax.Array, key: jax.Array, value: jax.Array, splats: Splats) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, scale=1.0, implementation=implementation)

    return attention


def best_exact(platform: str, dtype: Any) -> tuple[str, Attention] | None:
    """The platform's fastest exact attention; None where that is ours."""
    if platform == "tpu":
        return "splash attention", lambda query, key, value, splats: splash(query, key, value, None, window=None)
    if platform == "cpu":
        return "exact (jax.nn, XLA)", _product_attention("xla")
    return ("flash attention (cuDNN)", _product_attention("cudnn")) if dtype == jnp.bfloat16 else None


def _with_backward(attention: Attention) -> Callable[..., Any]:
    def run(query: jax.Array, key: jax.Array, value: jax.Array, splats: Splats, gradient: jax.Array) -> Any:
        output, pull = jax.vjp(attention, query, key, value, splats)
        return output, pull(gradient)

    return run


def operation(bench: Bench) -> Iterator[Finding]:
    """Attention through splats against exact attention, by length; the lengths far apart come first."""
    dtypes: dict[Any, list[int]] = {jnp.float32: [1024, 2048, 4096, 8192] if not bench.brief else [512, 1024]}
    if bench.accelerator:
        lengths = [1024, 4096, 16384, 65536, 2048, 8192, 32768]
        dtypes = {jnp.bfloat16: lengths, jnp.float32: [2048, 4096]}
    faster: dict[str, dict[int, float]] = {name: {} for name in PASSES}
    took = 0.0
    for dtype, lengths in dtypes.items():
        for length in lengths:
            if took and bench.left() < 1.3 * took:
                yield {"what": f"{length:,} tokens, {jnp.dtype(dtype).name}", "found": "left out, not enough time"}
                continue
            started = time.perf_counter()
            for finding in _at_length(bench, dtype, length):
                if finding.get("ratio") is not None and dtype == next(iter(dtypes)):
                    faster[finding["pass"]][length] = finding["ratio"]
                yield finding
            took = time.perf_counter() - started
    for name, ratios in faster.items():
        won = [length for length in sorted(ratios) if all(ratios[x] >= 1 for x in ratios if x >= length)]
        found = f"no slower from {won[0]:,} tokens on" if won else "slower at the longest"
        yield {
            "what": f"break-even, {name}",
            "found": found if ratios else "nothing was measured",
            "against": ", ".join(f"{length:,}" for length in sorted(ratios)) + " tokens" if ratios else "",
            "break_even": won[0] if won else None,
        }


def _at_length(bench: Bench, dtype: Any, length: int) -> Iterator[Finding]:
    rows = min(8, 65536 // length) if bench.accelerator else 1
    shape = (rows, length, HEADS, HEAD_DIM)
    query, key, value, gradient = (normal(n, shape, dtype, scale) for n, scale in enumerate((0.5, 0.5, 1.0, 1.0)))
    splats = Splats(
        centers=normal(4, (HEADS, NUM_SPLATS, HEAD_DIM), jnp.float32, 0.5),
        log_scales=jnp.full((HEADS, NUM_SPLATS), np.log(2.0), jnp.float32),
        norm_gain=jnp.zeros((HEADS,), jnp.float32),
        far_gain=jnp.zeros((HEADS,), jnp.float32),
    )
    rival = best_exact(bench.device.platform, dtype)
    contenders: dict[str, Attention] = {OURS: _splats, OURS_KEPT: _splats_and_kept, **dict([rival] if rival else [])}
    if length <= LONGEST_OURS_EXACT:
        contenders[OURS_EXACT] = _ours_exact
    inputs = (query, key, value, splats)
    cases = [(name, which) for name in contenders for which in PASSES]

    def prepare(name: str, which: str) -> Callable[[], Any] | Exception:
        attention = contenders[name]
        try:
            if which == PASSES[0]:
                compiled = jax.jit(attention).lower(*inputs).compile()
                return lambda: compiled(*inputs)
            compiled = jax.jit(_with_backward(attention)).lower(*inputs, gradient).compile()
            return lambda: compiled(*inputs, gradient)
        except Exception as error:  # one contender that cannot run must not cost the others
            return error

    calls = dict(zip(cases, concurrently([functools.partial(prepare, *case) for case in cases]), strict=True))
    what = f"{length:,} tokens x {rows} rows, {jnp.dtype(dtype).name}"
    errors: list[Exception] = []
    for which in PASSES:
        seconds: dict[str, float] = {}
        for name in contenders:
            call = calls[name, which]
            try:
                if isinstance(call, Exception):
                    raise call
                seconds[name] = seconds_per_call(call, 0.5 if bench.accelerator else 0.2)
            except Exception as error:
                errors.append(error)
                yield {"what": f"{what}, {which}", "found": f"{name} failed: {first_line(error)}", "ok": False}
        exact = {name: taken for name, taken in seconds.items() if name not in (OURS, OURS_KEPT)}
        ratio = min(exact.values()) / seconds[OURS] if exact and OURS in seconds else None
        yield {
            "what": f"{what}, {which}",
            "found": f"splats {seconds.get(OURS, float('nan')) * 1e3:.3g} ms"
            + (f", {ratio:.2f} x as fast" if ratio is not None else ""),
            "against": ", ".join(f"{name} {taken * 1e3:.3g} ms" for name, taken in seconds.items() if name != OURS),
            "pass": which,
            "length": length,
            "rows": rows,
            "dtype": jnp.dtype(dtype).name,
            "seconds": seconds,
            "ratio": ratio,
        }
