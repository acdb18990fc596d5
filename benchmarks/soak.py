"""A million tokens through splats and kept keys in one process: `python benchmarks/soak.py LOG [--tokens N]`.

The bundled model with its trained splats, a window of 64 and 32 kept keys, sampling at temperature 1. It has 512
positions, so a text cannot go on for ever: its position embedding is repeated to `--length` positions (as `gsa eval
--position-extension tile` does), texts of that many tokens are generated one after another, and the decoding state is
carried through each. What the model says beyond its 512 positions means nothing; what it costs does.

A line of JSON is appended to LOG for every 1,000 tokens, so that a run of hours can be watched, and what a killed one
has measured is kept; `--report` says again what the last run in LOG found. Wanted: memory flat to 1 %, every
log-probability finite, the last 10,000 tokens as fast as the first ones within 3 %. On a machine that others use too,
the time of the processor says more than that of the clock; both are reported, and the clock's decides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 1_000
"""Tokens of a record."""
COMPARED = 10_000
"""Tokens at the beginning and at the end whose times are compared."""
PROMPT = "Once upon a time"


def generate(tokens: int, length: int) -> Iterator[dict[str, Any]]:
    """A record for each block: its milliseconds per token, the memory of the process, and how many are not finite."""
    import jax.numpy as jnp
    import numpy as np
    import psutil

    import gsa_jax
    from gsa_jax.checkpoint import load_tensors
    from gsa_jax.convert import convert
    from gsa_jax.generation import decode_steps, make_request
    from gsa_jax.parameters import build_model, extend_positions
    from gsa_jax.tokenizer_folder import open_tokenizer

    source = gsa_jax.assets.story_neo()
    splats = source.with_name("story-neo-splats")
    with tempfile.TemporaryDirectory() as folder:
        convert(source, Path(folder) / "checkpoint", splats=splats)
        config, tensors = load_tensors(Path(folder) / "checkpoint")
        tokenizer = open_tokenizer(Path(folder) / "checkpoint")
    prompt = tokenizer.encode(PROMPT)
    new = length - len(prompt)
    config, tensors = extend_positions(config.with_window(64, 32), tensors, length, "tile")
    model = build_model(config, tensors, param_dtype=jnp.float32)
    process, done, seed = psutil.Process(), 0, 0
    while done < tokens:
        sampler = gsa_jax.make_sampler(temperature=1.0)
        request = make_request(
            model, [prompt], max_new_tokens=new, sampler=sampler, seed=seed, eos_token_id=(), repetition_penalty=1.0
        )
        steps = decode_steps(model, request, tokens_per_step=BLOCK, logprobs=True)
        while True:
            started, worked = time.perf_counter(), time.process_time()
            step = next(steps, None)
            if step is None or step.logprobs is None:
                break
            seconds, work = time.perf_counter() - started, time.process_time() - worked
            count = step.tokens.shape[1]
            done += count
            yield {
                "text": seed,
                "tokens": done,
                "count": count,
                "ms_per_token": 1e3 * seconds / count,
                "cpu_ms_per_token": 1e3 * work / count,
                "rss": process.memory_info().rss,
                "not_finite": int(np.sum(~np.isfinite(step.logprobs))),
            }
            if done >= tokens:
                return
        seed += 1


def report(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run found. The first text is left out: it contains compilation, and memory grows until it ends."""
    steady = [record for record in records if record["text"] > 0 and record["count"] == BLOCK]
    # The first block of a text reads the prompt as well.
    texts = [record["text"] for record in steady]
    steady = [record for n, record in enumerate(steady) if n and texts[n] == texts[n - 1]]
    compared = COMPARED // BLOCK
    if len(steady) < 2 * compared:
        return {"tokens": records[-1]["tokens"] if records else 0, "compared": False}

    def compare(name: str) -> tuple[float, float]:
        first, last = (statistics.median(record[name] for record in p) for p in (steady[:compared], steady[-compared:]))
        return first, last

    first, last = compare("ms_per_token")
    first_work, last_work = compare("cpu_ms_per_token")
    memory = [record["rss"] for record in steady]
    return {
        "tokens": records[-1]["tokens"],
        "compared": True,
        "not_finite": sum(record["not_finite"] for record in records),
        "rss_first_mb": memory[0] / 1e6,
        "rss_last_mb": memory[-1] / 1e6,
        "rss_growth": memory[-1] / memory[0] - 1,
        "rss_largest_growth": max(memory) / memory[0] - 1,
        "ms_per_token_first": first,
        "ms_per_token_last": last,
        "slower": last / first - 1,
        "cpu_ms_per_token_first": first_work,
        "cpu_ms_per_token_last": last_work,
        "more_work": last_work / first_work - 1,
    }


def main() -> None:
    """Prints what the docstring of this file says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=8192, help="positions of a text, the prompt's included")
    parser.add_argument("--report", action="store_true", help="of a run that has been")
    options = parser.parse_args()
    if not options.report:
        with options.log.open("a", encoding="utf-8") as log:
            print(json.dumps({"started": options.tokens, "length": options.length}), file=log, flush=True)
            for record in generate(options.tokens, options.length):
                print(json.dumps(record), file=log, flush=True)
    lines = [json.loads(line) for line in options.log.read_text(encoding="utf-8").splitlines()]
    begun = max(n for n, line in enumerate(lines) if "started" in line)
    found = report(lines[begun + 1 :])
    print(json.dumps(found, indent=2))
    if found["compared"] and (found["not_finite"] or abs(found["rss_growth"]) > 0.01 or found["slower"] > 0.03):
        sys.exit(1)


if __name__ == "__main__":
    main()
