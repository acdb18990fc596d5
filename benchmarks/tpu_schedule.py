"""Attention on a TPU as its compiler schedules it, beside splash attention: `python benchmarks/tpu_schedule.py`.

No chip is needed and nothing runs: `pip install '.[tpu-compiler]'`. For each call, in milliseconds, the instructions of
the kernels' final schedule at the chip's clock, plus the compiler's estimate of the operations around them. Both leave
out waiting for memory.

Of a kernel's conditional parts, ours computes one of two complementary ones in each chunk, the shorter one unless
features are steep; its others count in each chunk, though some run only where a document begins. Splash attention runs
its largest part for each pair of blocks that a causal mask leaves, and the other large ones once for each block of
queries, or of keys.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROWS, HEADS, HEAD_DIM, SPLATS, WINDOW = 8, 12, 64, 64, 64
MACHINE, HERTZ = "v5e:1x1", 1.5e9
LENGTHS = (2048, 4096, 8192)
LARGE = 60
"""Bundles of a conditional part that is worth looking at."""


class Part(NamedTuple):
    """A conditional part of a kernel.

    Attributes:
        predicate: the register that decides; with `!` in front if the part is left out where it is false.
        bundles: instructions.
    """

    predicate: str
    bundles: int


class Kernel(NamedTuple):
    """What the compiler wrote down of a kernel.

    Attributes:
        name: as in the program.
        bundles: instructions of one trip of its grid, with all parts.
        parts: the large ones.
    """

    name: str
    bundles: int
    parts: list[Part]


def lower(devices: list[Any], contender: str, length: int, direction: str) -> Any:
    """A call of ours or of splash attention, or its gradient by all arrays."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from gsa_jax.ops import Splats, no_splats, splat_attention

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(devices[0]))

    def forward(query: Any, key: Any, value: Any, splats: Splats) -> Any:
        if contender == "splash":
            return splat_attention(query, key, value, no_splats(HEADS, HEAD_DIM), window="all")[0]
        return splat_attention(query, key, value, splats, window=WINDOW)[0]

    def total(*arguments: Any) -> Any:
        return jnp.sum(forward(*arguments).astype(jnp.float32))

    of_splats: Any = array(HEADS, SPLATS, HEAD_DIM), array(HEADS, SPLATS), None, array(HEADS), array(HEADS)
    token = array(ROWS, length, HEADS, HEAD_DIM, dtype=jnp.bfloat16)
    function = forward if direction == "forward" else jax.grad(total, argnums=(0, 1, 2, 3))
    return jax.jit(function).lower(token, token, token, Splats(*of_splats))


def read_kernel(path: Path) -> Kernel:
    """A kernel's final schedule, a line for each bundle."""
    name = re.sub(r"^\d+-(.*)-\d+-final_bundles\.txt$", r"\1", path.name)
    lines = [line for line in path.read_text().splitlines() if re.match(r"\s*(0x[0-9a-f]+|0)\s+", line)]
    marks = [re.match(r"\s*\S+\s+([A-Z]{2})?\s*:", line) for line in lines]
    begins = next(i for i, mark in enumerate(marks) if mark and mark[1] == "LB")
    ends = [i for i, mark in enumerate(marks) if mark and mark[1] == "PF"]
    parts = []
    for i, line in enumerate(lines):
        jump = re.search(r"sbr\.rel \((!?%p\d+)(?:_p\d+)?\)", line)
        end = next((end for end in ends if end > i), None)
        if jump and end and end - i > LARGE:
            parts.append(Part(jump[1], end - i))
    return Kernel(name, len(lines) - begins, parts)


def splat_trips(kernel: Kernel, length: int, steep: bool) -> int:
    """Bundles of all trips of our kernel: two heads of 64 at a time, chunks of 128."""
    by_predicate = {part.predicate: part.bundles for part in kernel.parts}
    (pair,) = (
        (bundles, by_predicate["!" + name]) for name, bundles in by_predicate.items() if "!" + name in by_predicate
    )
    left_out = min(pair) if steep else max(pair)
    return ROWS * HEADS // 2 * (length // 128) * (kernel.bundles - left_out)


def splash_trips(kernel: Kernel, length: int) -> int:
    """Bundles of all trips of splash attention in blocks of 512."""
    blocks = length // 512
    sizes = sorted(part.bundles for part in kernel.parts)
    always = blocks**2 * (kernel.bundles - sum(sizes))
    return ROWS * HEADS * (always + blocks * (blocks + 1) // 2 * sizes[-1] + blocks * sum(sizes[:-1]))


def around(text: str) -> int:
    """Cycles that the compiler expects of all operations that are not kernels."""
    entry = text[text.index("\nENTRY ") :]
    entry = entry[: entry.index("\n}")]
    assert " while(" not in entry and " conditional(" not in entry, "an operation whose cycles are not in the line"
    return sum(int(cycles) for cycles in re.findall(r'estimated_cycles":"(\d+)"', entry))


def measure(contender: str, length: int, direction: str) -> tuple[float, float, float]:
    """Milliseconds of the kernels, of the kernels where all features are steep, and of the rest."""
    from gsa_jax.topology import Compiled, compile_for, parse_topology

    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        found = compile_for(
            parse_topology(MACHINE), importlib.import_module("tpu_schedule").lower, contender, length, direction
        )
        assert isinstance(found, Compiled), found
        names = {"splats": "splat_attention", "splash": "splash_mha"}
        kernels = [
            read_kernel(path)
            for path in sorted(Path(folder).glob(f"*{names[contender]}*-final_bundles.txt"))
            if "schedule-analysis" not in path.name
        ]
    expected = {"splats": (1, 2), "splash": (1, 3)}[contender][direction != "forward"]
    assert len(kernels) == expected, f"{expected} kernels expected, found {[kernel.name for kernel in kernels]}"
    if contender == "splash":
        level = steep = sum(splash_trips(kernel, length) for kernel in kernels)
    else:
        level, steep = (sum(splat_trips(kernel, length, x) for kernel in kernels) for x in (False, True))
    return tuple(1e3 * cycles / HERTZ for cycles in (level, steep, around(found.text)))  # type: ignore[return-value]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens; multiples of 512")
    lengths = parser.parse_args().lengths
    # The process that compiles imports this file by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    print(f"{MACHINE}, {ROWS} rows, {HEADS} heads of {HEAD_DIM}, S = {SPLATS}, W = {WINDOW}, bfloat16; milliseconds:")
    print("kernels + operations around them; (kernels where every chunk has steep features)")
    for direction in ("forward", "forward + backward"):
        print(f"\n| tokens | {direction}: splats | splash |\n|---|---|---|")
        for length in lengths:
            level, steep, rest = measure("splats", length, direction)
            splash, _, around_splash = measure("splash", length, direction)
            print(
                f"| {length:,} | {level:.1f} + {rest:.1f} ({steep:.1f}) | {splash:.1f} + {around_splash:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
