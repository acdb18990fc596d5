"""What the parts of `device.py` share: the device, the time they may take, and how they time and report.

May be changed here: what a part is given, and how calls are timed. The parts are in `device_parity.py`,
`device_attention.py` and `device_speed.py`.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Device = Any
"""A `jax.Device`, which type checkers take for a variable."""

Finding = dict[str, Any]
"""A line of the table: `what` was looked at, `found`, `against` what, `ok` where there is a verdict; and numbers."""

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What a part is given.

    Attributes:
        device: that is tried.
        reference: the CPU that it is compared with; the same where there is nothing else.
        accelerator: whether the device is more than a CPU.
        brief: on a CPU with little time: smaller cases.
        folder: for what a part writes.
        left: seconds that the part may still take, so that those after it get their turn.
    """

    device: Device
    reference: Device
    accelerator: bool
    brief: bool
    folder: Path
    left: Callable[[], float]


Part = Callable[[Bench], Iterator[Finding]]
"""Yields what it finds as it finds it, so that nothing is lost when it fails or is cut."""


def concurrently(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of all tasks, which run at the same time: most of their time is compiling, on one core each."""
    with ThreadPoolExecutor(max_workers=max(len(tasks), 1)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


def seconds_per_call(call: Callable[[], Any], seconds: float = 0.5, repeats: int = 5) -> float:
    """Median over `repeats`, each of as many calls in a row as fit its share of `seconds`.

    It is the host's clock around calls that queue up on the device, divided by their number: launching is in it.
    """
    jax.block_until_ready(call())

    def of(count: int) -> float:
        result = None
        started = time.perf_counter()
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - started) / count

    count = min(max(int(seconds / repeats / of(1)), 1), 200)
    return statistics.median(of(count) for _ in range(repeats))


def normal(seed: int, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    """Normal numbers, because zeros can be quicker than what a model has."""
    return (jax.random.normal(jax.random.key(seed), shape, jnp.float32) * scale).astype(dtype)
