"""Writes a fuzzed input into a folder, has a process of its own read it, and says what came of it.

May be changed here: how inputs get to the process, and when it is given up.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import psutil
from fuzz.readers import READERS

TESTS = Path(__file__).parents[1]
HANG = 10.0
"""Seconds of work, or `HANG * 12` of waiting on a busy machine, after which a reader hangs."""
_RECYCLE = 1000
"""Inputs that one process reads; what JAX remembers of each is no fault."""


@dataclasses.dataclass(frozen=True)
class Link:
    """A symbolic link in place of a file."""

    target: str


@dataclasses.dataclass(frozen=True)
class Special:
    """Something that is no file in place of one: `fifo` or `folder`."""

    kind: str


Files = Mapping[str, "bytes | Link | Special"]
"""What stands in a folder, by paths in it."""


def read_files(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_files(folder: Path, files: Files) -> None:
    """Makes a folder anew, with these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        match content:
            case Link(target):
                path.symlink_to(target)
            case Special("fifo"):
                os.mkfifo(path)
            case Special():
                path.mkdir()
            case bytes():
                path.write_bytes(content)


class Fault(AssertionError):
    """A reader did what it must not do."""


class Fuzzed:
    """A reader in a process of its own, which is started again when it dies, hangs, or has read much.

    Attributes:
        root: holds `case`, the folder that is read, `valid`, and `outside`, which is not to be touched.
        counts: of outcomes.
    """

    def __init__(self, reader: str, root: Path) -> None:
        self.reader, self.root = reader, root
        self.counts: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0
        (root / "valid").mkdir(parents=True)
        READERS[reader].make(root / "valid")
        self.files = read_files(root / "valid")
        self.outside = root / "outside"
        write_files(self.outside, {Path(name).name: content for name, content in self.files.items()})
        (self.outside / "secret").write_text("secret\n")
        (self.outside / "canary.py").write_text("raise SystemExit('code of the input was run')\n")
        self._process: subprocess.Popen[str] | None = None
        self._read = 0

    def __enter__(self) -> Fuzzed:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        places = [str(self.root / name) for name in ("case", "outside", "valid")]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(self.outside)]),  # canary.py could be imported
            "MALLOC_ARENA_MAX": "2",  # of which glibc would reserve address space for each thread
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        log = (self.root / "log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.worker", self.reader, *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            cwd=self.root,
            text=True,
        )
        log.close()
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready, f"the process of {self.reader} did not start: {(self.root / 'log').read_text()[-2000:]}"
        return process

    def check(self, files: Files) -> dict[str, Any]:
        """Has the reader read these files.

        Raises:
            Fault: it raised anything but an `InputError` of one short line, took too long or too much memory, died, or
                touched what it must not.
        """
        if self._process is None or self._read >= _RECYCLE:
            self.stop()
            self._process, self._read = self._start(), 0
        write_files(self.root / "case", files)
        self._read += 1
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        answer = self._answer(process, process.stdout)
        self.counts[answer["outcome"]] += 1
        self.slowest = max(self.slowest, answer["seconds"])
        if answer["outcome"] == "fault":
            self.stop()
            raise Fault(f"{self.reader}: {answer['said']}")
        return answer

    def _answer(self, process: subprocess.Popen[str], stream: IO[str]) -> dict[str, Any]:
        watched = psutil.Process(process.pid)
        before, since = sum(watched.cpu_times()[:2]), time.monotonic()
        while not select.select([stream], [], [], 1.0)[0]:
            worked = sum(watched.cpu_times()[:2]) - before
            if worked > HANG or time.monotonic() - since > 12 * HANG or watched.status() == psutil.STATUS_ZOMBIE:
                return {"outcome": "fault", "said": f"hung: {worked:.0f} s of work", "seconds": worked}
        line = stream.readline()
        if line:
            return json.loads(line)
        code = process.wait()
        return {"outcome": "fault", "said": f"the process died with {code}: {self._log()}", "seconds": 0.0}

    def _log(self) -> str:
        return (self.root / "log").read_text(errors="replace")[-500:]
