"""`gsa generate`.

May be changed here: its options and how text is printed.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gsa_jax.cli.base import Command
from gsa_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue prompts."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction]
    """Text to continue; repeat the option for a batch."""
    max_new_tokens: int = 200
    """Tokens to add at most."""
    temperature: float = 0.0
    """0 takes the most likely token, 1 draws from the model's distribution."""
    top_k: int | None = None
    """Draw from this many of the most likely tokens."""
    top_p: float | None = None
    """Draw from the smallest set of tokens with this probability."""
    seed: int = 0
    """Of the draws."""
    num_samples: int = 1
    """Continuations of each prompt."""
    stream: bool = False
    """Print the text as it comes (one prompt, one sample)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""
    window: int | Literal["all"] | None = None
    """Tokens that splat layers see exactly: a number, 0 for none, or `all`. By default the checkpoint's."""

    kept: int | None = None
    """Keys beyond the window that each head of a splat layer sees exactly. By default the checkpoint's."""

    def run(self) -> int:
        from gsa_jax.checkpoint import load, load_tokenizer
        from gsa_jax.generation import generate_stream
        from gsa_jax.sampling import make_sampler

        sampler = make_sampler(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        if self.num_samples < 1:
            raise InputError(f"--num-samples {self.num_samples}: must be >= 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise InputError(f"--num-samples {self.num_samples}: all the same at temperature 0; raise --temperature")
        if self.stream and (len(self.prompt) > 1 or self.num_samples > 1):
            raise InputError("--stream prints one text; give one --prompt and one sample")
        model = load(self.checkpoint, dtype=self.dtype, param_dtype=self.dtype, window=self.window, kept=self.kept)
        tokenizer = load_tokenizer(self.checkpoint)
        prompts = [tokenizer.encode(text) for text in self.prompt for _ in range(self.num_samples)]
        rows: list[list[int]] = [[] for _ in prompts]
        started, printed, decoded = time.perf_counter(), "", 0
        for tokens in generate_stream(
            model,
            prompts,
            max_new_tokens=self.max_new_tokens,
            sampler=sampler,
            seed=self.seed,
            tokens_per_step=1 if self.stream else self.max_new_tokens,
        ):
            if self.stream and not decoded:  # not before the request has been checked
                print(self.prompt[0], end="", flush=True)
            decoded += tokens.size
            for row, new in zip(rows, tokens.tolist(), strict=True):
                row.extend(new)
            if self.stream:
                text = tokenizer.decode(rows[0], skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                    print(text[len(printed) :], end="", flush=True)
                    printed = text
        if self.stream:
            print()
        else:
            texts = [text for text in self.prompt for _ in range(self.num_samples)]
            for number, (prompt, row) in enumerate(zip(texts, rows, strict=True)):
                if len(rows) > 1:
                    print(f"--- {number + 1} of {len(rows)}")
                print(prompt + tokenizer.decode(row, skip_special_tokens=True))
        seconds = time.perf_counter() - started
        print(f"{decoded} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
        return 0
