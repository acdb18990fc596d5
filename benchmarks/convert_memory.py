"""How much memory a conversion takes, next to the size of what it writes.

May be changed here: the shape of the checkpoint that is converted. By default that of GPT-Neo 1.3B in float16; its
weights are random bits, which no compression makes smaller.

A child process imports everything, reports that it is ready, and converts. What it holds on top of that is sampled
from /proc: memory of its own (`RssAnon`), and together with pages of files that the system may take back (`RssAnon` +
`RssFile`). Linux only.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from gsa_jax.config import GPTNeoConfig
from gsa_jax.parameters import expected_shapes

_BLOCK = 2**22
"""Weights that are drawn at a time."""

_CHILD = """
import sys
import jax
from gsa_jax.convert import convert
jax.random.normal(jax.random.key(0), (1,))
print("ready", flush=True)
sys.stdin.readline()
convert(sys.argv[1], sys.argv[2])
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """Bytes, except for the ratio and the time. `peak_*` are over what the child held before it began."""

    source_file: int
    output_folder: int
    output_tensors: int
    largest_tensor: int
    baseline_rss: int
    peak_anonymous: int
    peak_rss: int
    anonymous_over_output: float
    seconds: float


def write_random_checkpoint(folder: Path, config: GPTNeoConfig) -> tuple[int, int]:
    """Writes a float16 Hugging Face folder block by block: bytes of all tensors, and of the largest."""
    folder.mkdir(parents=True)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = largest = 0
    for name, shape in expected_shapes(config).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end, largest = end + size, max(largest, size)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for start in range(0, end, 2 * _BLOCK):
            bits = np.frombuffer(generator.bytes(min(2 * _BLOCK, end - start)), np.uint16)
            # Without the highest bit of the exponent every number is finite, and below 2.
            file.write((bits & 0xBFFF).tobytes())
    (folder / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    return end, largest


def measure(source: Path, out: Path) -> tuple[int, int, int, float]:
    """Converts in a child: its baseline, its peak of anonymous memory and of all memory over that, seconds."""
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(source), str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise RuntimeError("the child process could not start")
        before = _memory(child.pid)
        assert before is not None
        peak_anonymous = peak_rss = 0
        started = time.perf_counter()
        child.stdin.write("\n")
        child.stdin.flush()
        while (now := _memory(child.pid)) is not None:
            peak_anonymous = max(peak_anonymous, now[0] - before[0])
            peak_rss = max(peak_rss, now[1] - before[1])
            time.sleep(0.005)
        seconds = time.perf_counter() - started
    if child.returncode:
        raise RuntimeError(f"the conversion failed with exit code {child.returncode}")
    return before[1], peak_anonymous, peak_rss, seconds


def _memory(pid: int) -> tuple[int, int] | None:
    """Anonymous memory, and anonymous memory with pages of files; None once the process has given them back."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    if "RssAnon" not in fields:
        return None
    anonymous, file = (1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return anonymous, anonymous + file


def main(
    work: Annotated[Path | None, tyro.conf.Positional] = None,
    *,
    out: Path | None = None,
    hidden_size: int = 2048,
    num_layers: int = 24,
) -> None:
    """Measures the memory of a conversion.

    Args:
        work: folder for the checkpoints, which are removed afterwards; a temporary one by default.
        out: JSON file for the result.
        hidden_size: of the model.
        num_layers: of the model, an even number.
    """
    config = GPTNeoConfig(
        hidden_size=hidden_size, num_layers=num_layers, attention_types=((("global", "local"), num_layers // 2),)
    )
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        source, checkpoint = Path(folder) / "source", Path(folder) / "checkpoint"
        tensors, largest = write_random_checkpoint(source, config)
        baseline, peak_anonymous, peak_rss, seconds = measure(source, checkpoint)
        result = Result(
            source_file=(source / "model.safetensors").stat().st_size,
            output_folder=sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()),
            output_tensors=tensors,
            largest_tensor=largest,
            baseline_rss=baseline,
            peak_anonymous=peak_anonymous,
            peak_rss=peak_rss,
            anonymous_over_output=peak_anonymous / tensors,
            seconds=seconds,
        )
    for name, value in dataclasses.asdict(result).items():
        print(f"{name:24}{value:>16,.2f}" if isinstance(value, float) else f"{name:24}{value:>16,}")
    if out is not None:
        out.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
