"""Tries gsa-jax on the GPU or TPU of this machine, in the minutes it is given: `python benchmarks/device.py`.

It needs gsa-jax and the files `device*.py`, nothing else. First whether the device computes what the CPU computes, then
how fast it is. A part that the time does not suffice for is left out, one that runs when the time is over is cut, and
both are named; what was found until then is in the table and in the JSON file, which is written after every finding.
Exit code 1 says that a part failed, or that the device disagrees with the CPU.

May be changed here: the parts, their order, and how the time is shared out.
"""

from __future__ import annotations

import os
import sys
import time

STARTED = time.monotonic()  # the minutes hold the imports
if os.environ.get("JAX_PLATFORMS", "cpu").find("cpu") < 0:
    # The reference is a CPU, which a list of other platforms leaves out.
    os.environ["JAX_PLATFORMS"] += ",cpu"

import argparse
import dataclasses
import json
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import device_attention
import device_parity
import device_speed
import jax
from device_bench import Bench, Finding, Part
from rich import box
from rich.console import Console
from rich.table import Table

from gsa_jax.errors import first_line

BRIEF_MINUTES = 4.0
"""On a CPU, less than this is little time."""


def environment(bench: Bench) -> Iterator[Finding]:
    """What a figure depends on."""
    device = bench.device
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None
    versions = {name: version(name) for name in ("gsa-jax", "jax", "jaxlib", "flax", "numpy")}
    yield {
        "what": device.device_kind,
        "found": f"{device.platform}, 1 of {jax.device_count()} devices, {os.cpu_count()} cores",
        "against": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "kind": device.device_kind,
        "platform": device.platform,
        "platform_version": device.client.platform_version,
        "devices": jax.device_count(),
        "driver": driver,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": versions,
        "memory": device.memory_stats(),
        "settings": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("JAX_", "XLA_"))},
    }


PARTS: dict[str, tuple[Part, float, float]] = {
    "environment": (environment, 1, 1),
    "logits": (device_parity.logits, 80, 8),
    "greedy tokens": (device_parity.greedy_tokens, 20, 5),
    "gradients": (device_parity.gradients, 95, 8),
    "resume": (device_parity.resume, 35, 15),
    "bounds": (device_speed.bounds, 5, 1),
    "operation": (device_attention.operation, 180, 10),
    "decoding": (device_speed.decoding, 150, 6),
    "training": (device_speed.training, 130, 10),
}
"""What is done, in this order, and about how many seconds it takes: on an accelerator, as an H100 with 16 cores took
(decoding had not ended after 115), and briefly on a CPU."""


class Run:
    """The parts, what they found, and the time that is left."""

    def __init__(self, bench: Bench, out: Path, parts: dict[str, tuple[Part, float]], end: float) -> None:
        self._bench = bench
        self._out = out
        self._parts = parts
        self._end = end
        self._results: dict[str, dict[str, Any]] = {name: {"status": "left out", "findings": []} for name in parts}
        self._lock = threading.Lock()

    def all_parts(self) -> None:
        """Runs every part that the time suffices for."""
        names = list(self._parts)
        for number, name in enumerate(names):
            part, needed = self._parts[name]
            result = self._results[name]
            left = self._end - time.monotonic()
            if left < needed:
                result["reason"] = f"takes about {needed:.0f} s, {max(left, 0):.0f} s were left"
                continue
            after = sum(self._parts[later][1] for later in names[number + 1 :])
            print(f"{name} ...", flush=True)
            result["status"] = "cut"  # until it has ended
            started = time.monotonic()
            try:
                for finding in part(dataclasses.replace(self._bench, left=self._left(after))):
                    with self._lock:
                        result["findings"].append(finding)
                    self.write()
                failed = any(finding.get("ok") is False for finding in result["findings"])
                result["status"] = "NOT ok" if failed else "ok"
            except Exception as error:  # one part must not cost the others
                traceback.print_exc()
                result["status"] = "failed"
                result["reason"] = f"{type(error).__name__}: {first_line(error)}"
                result["traceback"] = traceback.format_exc()
            result["seconds"] = time.monotonic() - started
            self.write()

    def _left(self, after: float) -> Any:
        return lambda: self._end - time.monotonic() - after

    def write(self) -> None:
        """Everything that was found so far."""
        with self._lock:
            seconds = time.monotonic() - STARTED
            text = json.dumps({"seconds": seconds, "parts": self._results}, indent=2, default=str)
            staging = self._out.with_suffix(".part")
            staging.write_text(text + "\n", encoding="utf-8")
            staging.replace(self._out)

    def report(self) -> int:
        """Prints the table, and what failed; gives the exit code."""
        self.write()
        table = Table(title=self._bench.device.device_kind, title_justify="left", box=box.SIMPLE)
        for column in ("part", "what", "found", "against", "verdict"):
            table.add_column(column)
        for name, result in self._results.items():
            taken = f" ({result['seconds']:.0f} s)" if "seconds" in result else ""
            for number, finding in enumerate(result["findings"]):
                verdict = {True: "ok", False: "NOT ok", None: ""}[finding.get("ok")]
                cells = [str(finding.get(key, "")) for key in ("what", "found", "against")]
                table.add_row(name + taken if number == 0 else "", *cells, verdict)
            if result["status"] not in ("ok", "NOT ok"):
                table.add_row("" if result["findings"] else name + taken, "", result["reason"], "", result["status"])
            table.add_section()
        Console(width=140).print(table)
        bad = [name for name, result in self._results.items() if result["status"] in ("failed", "NOT ok")]
        for name in bad:
            print(f"{name}: {self._results[name].get('reason', 'disagrees with the CPU')}")
        print(f"written to {self._out}")
        return 1 if bad else 0

    def cut(self) -> None:
        """Ends the process with what there is: neither a compiler nor a device can be interrupted."""
        for result in self._results.values():
            if result["status"] in ("cut", "left out"):
                result.setdefault("reason", "the time was over")
        code = self.report()
        sys.stdout.flush()
        shutil.rmtree(self._bench.folder, ignore_errors=True)
        os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0, help="after which it ends, with what it has")
    parser.add_argument("--out", type=Path, help="JSON file; by default results/device-KIND.json, beside this file")
    given = parser.parse_args(arguments)
    device, reference = jax.devices()[0], jax.devices("cpu")[0]
    accelerator = device.platform != "cpu"
    kind = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")
    out = given.out or Path(__file__).parent / "results" / f"device-{kind}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    brief = not accelerator and given.minutes < BRIEF_MINUTES
    slower = 1 if accelerator or brief else 3
    parts = {name: (part, (long if accelerator else short * slower)) for name, (part, long, short) in PARTS.items()}
    end = STARTED + 60 * given.minutes
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench = Bench(
            device=device,
            reference=reference,
            accelerator=accelerator,
            brief=brief,
            folder=Path(folder),
            left=lambda: end - time.monotonic(),
        )
        run = Run(bench, out, parts, end)
        timer = threading.Timer(max(end - time.monotonic(), 0), run.cut)
        timer.daemon = True
        timer.start()
        run.all_parts()
        timer.cancel()
        return run.report()


if __name__ == "__main__":
    sys.exit(main())
