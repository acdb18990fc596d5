"""Runs contenders in processes of their own, in turn, so that noise of the machine meets all of them alike.

May be changed here: how rounds are taken and how results are printed. What is measured belongs to the scripts beside.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Contender = Callable[..., Callable[[], Any]]
"""Prepares (imports, loads, compiles) and returns what is timed; its result must be small and ready."""


def measure(
    contenders: dict[str, tuple[Contender, tuple[Any, ...]]], rounds: int, turn: float = 0.0, limit: float = math.inf
) -> dict[str, dict[str, Any]]:
    """Median and all seconds of each contender, and its last result.

    One process per contender stays alive; in each round each contender has a turn, alone.

    Args:
        turn: seconds that a turn lasts at least: shorter calls are repeated, untimed for as long before. Each turn has
            one timed call or more.
        limit: seconds after which a contender gets no more turns, once it had one.
    """
    context = multiprocessing.get_context("spawn")
    workers = {}
    for name, (contender, arguments) in contenders.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, contender, arguments), daemon=True)
        process.start()
        workers[name] = (process, ours)
        _receive(name, process, ours)
    results: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in workers}
    for _ in range(rounds):
        for name, (process, pipe) in workers.items():
            if sum(results[name]["seconds"]) >= limit:
                continue
            pipe.send(turn)
            seconds, result = _receive(name, process, pipe)
            results[name]["seconds"].extend(seconds)
            results[name]["result"] = result
    for process, pipe in workers.values():
        pipe.send(None)
        process.join()
    for measured in results.values():
        measured["median"] = sorted(measured["seconds"])[len(measured["seconds"]) // 2]
    return results


def environment() -> dict[str, Any]:
    """What a figure depends on: processor and versions."""
    packages = ("jax", "jaxlib", "flax", "torch", "transformers")
    return {
        "processor": _processor(),
        "cores": multiprocessing.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def report(title: str, columns: list[str], rows: list[list[str]], results: dict[str, Any], out: Path) -> None:
    """Prints the table and writes the JSON."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {out}")


def _serve(pipe: Any, contender: Contender, arguments: tuple[Any, ...]) -> None:
    run = contender(*arguments)

    def timed() -> tuple[float, Any]:
        started = time.perf_counter()
        result = run()
        return time.perf_counter() - started, result

    run()  # compiles
    pipe.send("ready")
    last = 0.0
    while (turn := pipe.recv()) is not None:
        # A process that has been idle is slow at first: the system has taken memory away from it.
        started = time.perf_counter()
        while last < turn and time.perf_counter() - started < turn:
            last, _ = timed()
        seconds, result = [], None
        while not seconds or sum(seconds) < turn:
            last, result = timed()
            seconds.append(last)
        pipe.send((seconds, result))


def _receive(name: str, process: Any, pipe: Any) -> Any:
    while not pipe.poll(1):
        if not process.is_alive():
            raise SystemExit(f"{name} ended with exit code {process.exitcode}")
    return pipe.recv()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
