"""The process that reads fuzzed inputs, and says of each what came of it.

Started by `fuzz.harness`; a line of JSON in, a line of JSON out. While an input is read, an audit hook watches what
Python opens, imports, runs and connects to, inotify what native code opens in the folder beside, and the address space
may grow by no more than `MEMORY`.

May be changed here: what counts as a fault.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any

MEMORY = 2**30
LONGEST_LINE = 2000
"""Characters of what is said of bad input; paths may be long, and are in it."""

_IN_ACCESS, _IN_MODIFY, _IN_OPEN, _IN_CREATE, _IN_DELETE = 0x1, 0x2, 0x20, 0x100, 0x200
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC

_ROOT = str(Path(__file__).parents[2])
"""Where this package's own code is, if it was not copied when it was installed."""

_INSTALLED = tuple(
    os.path.realpath(path) + "/"
    for path in {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, *sys.path, _ROOT, "/proc", "/sys"}
    if path
)
"""Where a library may read files of its own, while a reader runs for the first time."""

_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn")
_CONNECTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
_CHANGES = ("os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")


class Watch:
    """Collects what must not happen while `folder` is read."""

    def __init__(self, folder: Path, outside: Path) -> None:
        self._folder = os.path.realpath(folder)
        self._active = False
        self._here = threading.local()
        self.found: list[str] = []
        libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        mask = _IN_ACCESS | _IN_MODIFY | _IN_OPEN | _IN_CREATE | _IN_DELETE
        if self._inotify < 0 or libc.inotify_add_watch(self._inotify, str(outside).encode(), mask) < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        sys.addaudithook(self._heard)

    def __enter__(self) -> Watch:
        self.found = []
        self._events()
        self._active = True
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False
        self.found += [f"{name} beside the folder was touched" for name in self._events()]

    def _events(self) -> list[str]:
        try:
            data = os.read(self._inotify, 2**16)
        except BlockingIOError:
            return []
        names = []
        while data:
            length = int.from_bytes(data[12:16], "little")
            names.append(data[16 : 16 + length].rstrip(b"\0").decode())
            data = data[16 + length :]
        return names

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):  # a descriptor, which was opened before
            return True
        real = os.path.realpath(os.fsdecode(path))
        return (real + "/").startswith(self._folder + "/")

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active or getattr(self._here, "looks", False):
            return
        self._here.looks = True  # what is done here is heard as well
        try:
            problem = self._problem(event, arguments)
        except (ValueError, OSError):  # a path that is none
            problem = None
        if problem is not None:
            self.found.append(problem)
        self._here.looks = False

    def _problem(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event in _RUNS or event in _CONNECTS:
            return f"{event} {arguments!r:.300}"
        if event == "open":
            path, mode, flags = arguments
            # `shutil.rmtree` opens folders by their names in another one, which the event does not tell.
            if self._inside(path) or (mode is None and not os.path.dirname(path)):
                return None
            if os.fsdecode(path).endswith(".pyx"):  # a traceback looks for the source of compiled code
                return None
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if flags is not None else "r" not in mode
            installed = os.path.realpath(os.fsdecode(path)).startswith(_INSTALLED)
            return None if installed and not writes else f"opened {path!r:.300} {mode}"
        if event in _CHANGES:
            path, *more = arguments
            if event in ("os.remove", "os.rmdir") and more[0] >= 0:
                path = f"/proc/self/fd/{more[0]}/{os.fsdecode(path)}"
            return None if self._inside(path) else f"{event} {arguments!r:.300}"
        if event == "import" and str(arguments[0]).split(".")[0] in ("canary", "antigravity", "this", "pty", "turtle"):
            return f"imported {arguments[0]}"
        if event == "exec":
            file = getattr(arguments[0], "co_filename", "")
            known = file.startswith(("<frozen", "<string>", "<attrs", *_INSTALLED)) or not file
            return None if known else f"ran code of {file}"
        return None


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _judge(call: Any, folder: Path, watch: Watch) -> dict[str, Any]:
    from gsa_jax.errors import InputError

    started = time.process_time()
    outcome, said = "accepted", ""
    with watch:
        try:
            call(folder)
        except InputError as error:
            outcome, said = "refused", str(error)
        except BaseException as error:
            chain = f"{type(error).__name__}: {str(error)[:500]}"
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = "" if frame is None else f" ({frame.tb_frame.f_code.co_filename}:{frame.tb_lineno})"
            outcome, said = "fault", chain + where
    if watch.found:
        outcome, said = "fault", f"{watch.found[:3]}; {outcome}: {said}"
    elif outcome == "refused" and (len(said) > LONGEST_LINE or not said or not said.isprintable()):
        outcome, said = "fault", f"not one short line ({len(said)} characters): {said[:300]!r}"
    return {"outcome": outcome, "said": said, "seconds": time.process_time() - started}


def main() -> None:
    """Answers until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    from fuzz.readers import READERS

    reader, folder, outside, valid = sys.argv[1], *map(Path, sys.argv[2:])
    watch = Watch(folder, outside)
    call = READERS[reader].call
    for _ in range(2):  # what is imported, compiled and mapped for a reader is not the input's
        call(valid)
    limit = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps({"outcome": "ready"}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(_judge(call, folder, watch)), file=answers, flush=True)


if __name__ == "__main__":
    main()
