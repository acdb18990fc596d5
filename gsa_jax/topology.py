"""Machines that are not here: their names, and what their compilers say of a program.

TPU's compiler (`libtpu`) and CUDA's (JAX's plugin with NVIDIA's `ptxas`) run on any x86-64 Linux machine. A program is
compiled in a process of its own, because a check that fails inside of a compiler ends the process.

May be changed here: which machines there are, and how a compiler is started and quoted. What is compiled comes from
the caller; what a compiled program does is read in `gsa_jax.hlo`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from gsa_jax.errors import InputError, first_line

_GIB = 2**30

_TPU_MEMORY = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}
"""GiB of a device that a program may use, as libtpu 0.0.42 says when one takes more: a little less than the chip has
(32, 16, 95, 32 and, for one of the two devices of a chip, 96)."""

_TPU_DEVICES_PER_CHIP = {"tpu7x": 2}
"""Where it is not 1."""

_MOST_GPUS_PER_HOST = 8

_CARDS: dict[str, dict[str, Any]] = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "capability": (9, 0),
        "multiprocessors": 132,
        "memory_bytes": 84_978_434_048,
        "memory_bytes_per_second": 3_352_320_000_000,
        "l2_bytes": 52_428_800,
        "clock_ghz": 1.98,
        "shared_memory_per_multiprocessor": 233_472,
        "shared_memory_per_block": 232_448,
        "floats_per_multiprocessor": 128,
    },
    "a100": {
        "name": "NVIDIA A100-SXM4-80GB",
        "capability": (8, 0),
        "multiprocessors": 108,
        "memory_bytes": 84_987_740_160,
        "memory_bytes_per_second": 2_039_000_000_000,
        "l2_bytes": 41_943_040,
        "clock_ghz": 1.41,
        "shared_memory_per_multiprocessor": 167_936,
        "shared_memory_per_block": 166_912,
        "floats_per_multiprocessor": 64,
    },
}
"""The SXM cards with 80 GB, from NVIDIA's architecture white papers and CUDA's table of compute capabilities; memory is
what the driver reports. JAX takes three quarters of it unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise."""

KNOWN = ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1", "h100", "h100:8", "a100", "a100:8")
"""Examples of every kind of name."""

UNTUNED: dict[str, Any] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""Options of CUDA's compiler where products are not to be timed on a card. All are cuBLAS's then: the one tiling that
Triton takes untimed does not suit every product, and the compiler gives up (on a step that distils the preset `hybrid`,
for an A100; jaxlib 0.10.2)."""

_PROGRAM = "from gsa_jax.topology import _serve; _serve()"
"""What the process that compiles runs; this module by its own name, by which answers are unpickled."""

_INSTALL = {
    "tpu": "its compiler is missing: pip install 'gsa-jax[tpu-compiler]' (jax[tpu]: the libtpu for this jax)",
    "cuda": "its compiler is missing: pip install 'gsa-jax[gpu-compiler]' (JAX's CUDA plugin and NVIDIA's ptxas)",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine, as JAX would show it.

    Attributes:
        name: as it was given, e.g. `"v5e:2x4"` or `"h100:8"`.
        platform: whose compiler compiles for it.
        kind: `"v5e"`, `"h100"`.
        shape: chips along each axis; of GPUs, their number.
        devices: that JAX shows. tpu7x has two on a chip, everything else one.
        memory: bytes of a device that programs may use: for TPUs the number that the compiler refuses to exceed, for
            GPUs all that the driver reports.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    kind: str
    shape: tuple[int, ...]
    devices: int
    memory: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made of a program, on each device. Nothing was run.

    Attributes:
        text: the optimised program, HLO.
        device_kind: what JAX calls the device, e.g. `"TPU v5 lite"`.
        peak: bytes at the moment at which most are alive. On a GPU everything that is allocated for the program:
            temporaries have their places in one allocation, which is there all the time.
        arguments: bytes of the arguments.
        temporaries: bytes of everything between arguments and results.
        seconds: of compiling, on the machine that compiled.
    """

    text: str
    device_kind: str
    peak: int
    arguments: int
    temporaries: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class DoesNotFit:
    """A compiler's verdict that a device has too little memory.

    Attributes:
        needed: bytes, as the compiler names them.
        line: its own words.
        seconds: of compiling, on the machine that compiled.
    """

    needed: int
    line: str
    seconds: float


class CompilerAborted(InputError):
    """A check inside of a compiler failed, and ended its process."""


def parse_topology(name: str) -> Topology:
    """What a name stands for.

    `KIND:AxB` or `KIND:AxBxC` for TPUs, with the chips along each axis; `h100`, `a100` or `h100:N` for N GPUs.

    Raises:
        InputError: there is no such machine.
    """
    kind, _, shape = name.partition(":")
    if kind in _TPU_MEMORY and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        sizes = tuple(map(int, shape.split("x")))
        devices = math.prod(sizes) * _TPU_DEVICES_PER_CHIP.get(kind, 1)
        return Topology(name, "tpu", kind, sizes, devices, int(_TPU_MEMORY[kind] * _GIB))
    if kind in _CARDS and re.fullmatch(r"([1-9]\d*)?", shape) and not name.endswith(":"):
        devices = int(shape or 1)
        if devices <= _MOST_GPUS_PER_HOST or devices % _MOST_GPUS_PER_HOST == 0:
            return Topology(name, "cuda", kind, (devices,), devices, _CARDS[kind]["memory_bytes"])
    raise InputError(f"topology {name}: unknown; known, with other numbers as well: {', '.join(KNOWN)}")


def compile_for(
    topology: Topology, function: Callable[..., Any], *arguments: Any, what: str = "the program"
) -> Compiled | DoesNotFit:
    """Compiles a program for a machine, in a process of its own.

    Args:
        function: of the machine's devices and `arguments`, to a `jax.stages.Lowered`. It is called in the other
            process, which imports it by its name, so it stands at the top of a module.
        arguments: anything that can be pickled.
        what: how errors call the program.

    Raises:
        CompilerAborted: a check of the compiler failed.
        InputError: the compiler is not installed, does not know this shape of the machine, or refuses the program; or
            `function` raised one.
        RuntimeError: `function` raised something else; with its traceback.
    """
    _require_compiler(topology)
    request = pickle.dumps((topology, function, arguments))
    child = subprocess.run(
        [sys.executable, "-c", _PROGRAM], input=request, capture_output=True, check=False, env=_environment()
    )
    said = child.stderr.decode(errors="replace")
    if child.returncode:
        raise CompilerAborted(
            f"{topology.name}: {what} does not compile, because the compiler {_last_words(child.returncode, said)}; "
            "try another shape of the program, or another version of jax with its compiler"
        )
    answer = pickle.loads(child.stdout)
    if isinstance(answer, InputError):
        raise answer
    if isinstance(answer, str):
        raise RuntimeError(f"{topology.name}: {answer}")
    if isinstance(answer, _Refused):
        if needed := _needed_bytes(answer.line):
            return DoesNotFit(needed, answer.line, answer.seconds)
        raise InputError(f"{topology.name}: {what} does not compile: {answer.line}")
    return answer


@dataclasses.dataclass(frozen=True)
class _Refused:
    line: str
    seconds: float


def _require_compiler(topology: Topology) -> None:
    if topology.platform == "tpu":
        there = importlib.util.find_spec("libtpu") is not None
    else:
        there = importlib.util.find_spec("jax_cuda13_plugin") is not None and _ptxas_folder() is not None
    if not there:
        raise InputError(f"{topology.name}: {_INSTALL[topology.platform]}")


def _ptxas_folder() -> Path | None:
    """Where `ptxas` is: on the path, or in the wheel `nvidia-cuda-nvcc`."""
    found = shutil.which("ptxas")
    if found:
        return Path(found).parent
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "cu13/bin/ptxas").is_file():
            return Path(folder) / "cu13/bin"
    return None


def _environment() -> dict[str, str]:
    """Of the process that compiles."""
    environment = dict(os.environ)
    # Programs are compiled as users run them, and anew, so that the seconds are those of compiling.
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES"):
        environment.pop(name, None)
    ptxas = _ptxas_folder()
    if ptxas is not None:
        environment["PATH"] = os.pathsep.join([environment.get("PATH", ""), str(ptxas)])
    return environment | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",  # of arrays that are made on the way; nothing looks for a chip
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "2",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def _last_words(code: int, said: str) -> str:
    """How a compiler ended, with the line of the check that failed."""
    for line in said.splitlines():
        # "F1126 00:12:34.567 1234 file.cc:56] message", where F stands for fatal.
        if found := re.match(r"F\d{4} \S+\s+\d+ (?:.*/)?([\w.]+:\d+)\] (.*)", line):
            return f"aborted at {found[1]}: {found[2].strip()[:300]}"
    if -code == signal.SIGKILL:
        return "was killed; this machine may have too little memory for it"
    lines = [line for line in said.splitlines() if line.strip()]
    end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"ended with {end}: {lines[-1].strip()[:300] if lines else 'without a word'}"


def _needed_bytes(line: str) -> int | None:
    """What a compiler says that a program needs, where it says that memory ran out."""
    if "RESOURCE_EXHAUSTED" not in line:
        return None
    found = re.search(r"(?:Used|temporaries \()\s*([\d.]+)([KMG])", line)
    return int(float(found[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]]) if found else None


def _serve() -> None:
    """The process that compiles: a request on stdin, an answer on stdout, words on stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing else is said on stdout
    try:
        answer = _compile(*pickle.load(sys.stdin.buffer))
    except InputError as error:
        answer = InputError(str(error))
    except Exception:  # of whatever class: the process that asked raises it again, with this traceback
        answer = traceback.format_exc()
    _send(answers, answer)


def _send(answers: BinaryIO, answer: Any) -> None:
    pickle.dump(answer, answers)
    answers.close()
    sys.stderr.flush()
    os._exit(0)  # a compiler's threads may outlive the interpreter, and crash


def _compile(topology: Topology, function: Callable[..., Any], arguments: Sequence[Any]) -> Compiled | _Refused:
    import jax

    devices, options = _devices(topology)
    lowered = function(devices, *arguments)
    begin = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return _Refused(" ".join(str(error).split())[:400], time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes
    if topology.platform == "cuda":
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    return Compiled(
        compiled.as_text(),
        devices[0].device_kind,
        peak,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        seconds,
    )


def _devices(topology: Topology) -> tuple[list[Any], dict[str, Any]]:
    """The devices of a machine, and options of its compiler."""
    import jax
    from jax.experimental import topologies

    if topology.platform == "tpu":
        options: dict[str, Any] = {}
        if topology.kind == "v4":
            options["chip_config_name"] = "megacore"  # one device a chip, as Cloud TPU shows v4
        if math.prod(topology.shape) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
        except jax.errors.JaxRuntimeError as error:
            raise InputError(
                f"topology {topology.name}: its compiler refuses it ({first_line(error)}); known: {', '.join(KNOWN)}"
            ) from None
        return found.devices, {}
    hosts = max(topology.devices // _MOST_GPUS_PER_HOST, 1)
    found = topologies.get_topology_desc(
        platform="cuda",
        topology=f"1x{hosts}x{topology.devices // hosts}",
        target_config=_describe(_CARDS[topology.kind]),
    )
    return found.devices, UNTUNED


def _describe(card: dict[str, Any]) -> str:
    """A card as XLA's `GpuTargetConfigProto` in text form."""
    major, minor = card["capability"]
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          threads_per_block_limit: 1024
          threads_per_warp: 32
          threads_per_core_limit: 2048
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {card["shared_memory_per_block"]}
          shared_memory_per_core: {card["shared_memory_per_multiprocessor"]}
          registers_per_block_limit: 65536
          registers_per_core_limit: 65536
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          core_count: {card["multiprocessors"]}
          fpus_per_core: {card["floats_per_multiprocessor"]}
          clock_rate_ghz: {card["clock_ghz"]}
          memory_bandwidth: {card["memory_bytes_per_second"]}
          l2_cache_size: {card["l2_bytes"]}
          device_memory_size: {card["memory_bytes"]}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 12 }}
        device_description_str: "{card["name"]}"
    """
