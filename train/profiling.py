"""A trace of a few training steps, as the profiler of JAX records it: `gsa train --profile`.

May be changed here: which steps are recorded. TensorBoard with the plugin `xprof`, and `xprof` alone, show the folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

PROFILE_FOLDER = "profile"
STEP_NAME = "train"
"""Of the event that each step is in a trace."""

_WARM_UP = 2
"""Steps of a process that are not recorded: the first one compiles."""

_RECORDED = 5


class StepProfile:
    """Records the third to seventh step that this process makes; a context manager.

    Args:
        folder: to write the trace into, beside those that are there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0
        self._running = False
        self._recorded: list[int] = []

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around what a step calls; it is named by its number in the trace."""
        self._made += 1
        if self._made == _WARM_UP + 1:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=number):
            yield
        if self._running:
            self._recorded.append(number)

    def after(self, results: Any) -> None:
        """What the step that was called last computes; waits for it if it is the last one to be recorded."""
        if self._running and len(self._recorded) == _RECORDED:
            jax.block_until_ready(results)
            self._stop()

    def told(self) -> str:
        """What was recorded, for a user."""
        if not self._recorded:
            return f"nothing was recorded: the first {_WARM_UP} steps of a process are left out, and there were no more"
        return f"steps {self._recorded[0]} to {self._recorded[-1]} are recorded in {self._folder}"

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()
