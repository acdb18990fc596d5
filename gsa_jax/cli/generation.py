"""`gsa generate`.

May be changed here: its options, files of prompts, and how text is printed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gsa_jax.cli.base import Command
from gsa_jax.errors import InputError
from gsa_jax.json_files import parse_json

if TYPE_CHECKING:
    from gsa_jax.completion import Completion
    from gsa_jax.generation import GenerationOptions
    from gsa_jax.model import GPTNeoForCausalLM

_MAX_NEW_TOKENS = 200
"""Unless an option or the model's own configuration says otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue prompts. What no option says is as the checkpoint's generation_config.json has it."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """Text to continue; repeat the option for a batch."""
    prompt_file: Path | None = None
    """UTF-8 file with a prompt in each line, or, named .jsonl, {"prompt": TEXT}; `-` reads lines from stdin."""
    max_new_tokens: int | None = None
    """Tokens to add at most; 200 if nothing says how many."""
    min_new_tokens: int | None = None
    """Tokens to add before the model may end the text."""
    stop: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """End at this text, which is not printed; repeat the option for several."""
    temperature: float | None = None
    """0 takes the most likely token, 1 draws from the model's distribution; 0 if nothing says otherwise."""
    top_k: int | None = None
    """Draw from this many of the most likely tokens."""
    top_p: float | None = None
    """Draw from the smallest set of tokens with this probability."""
    min_p: float | None = None
    """Draw from tokens with at least this share of the probability of the most likely one."""
    repetition_penalty: float | None = None
    """Divide the logits of tokens that are there already by this, or multiply negative ones; 1 is none."""
    no_repeat_ngram_size: int | None = None
    """Never say so many tokens in a row twice; 0 is no such rule."""
    seed: int = 0
    """Of the draws."""
    num_samples: int = 1
    """Continuations of each prompt."""
    stream: bool = False
    """Print the text as it comes (one prompt, one sample)."""
    json: bool = False
    """Print a line of JSON for each continuation: prompt, text, tokens, finish_reason."""
    logprobs: bool = False
    """Print each new token with its log-probability by the model, before any of the options above."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and computation."""
    window: int | Literal["all"] | None = None
    """Tokens that splat layers see exactly: a number, 0 for none, or `all`. By default the checkpoint's."""

    kept: int | None = None
    """Keys beyond the window that each head of a splat layer sees exactly. By default the checkpoint's."""

    def run(self) -> int:
        from gsa_jax.checkpoint import load
        from gsa_jax.tokenizer_folder import open_tokenizer

        prompts = self._prompts()
        if self.num_samples < 1:
            raise InputError(f"--num-samples {self.num_samples}: must be >= 1")
        if self.stream and (len(prompts) > 1 or self.num_samples > 1):
            raise InputError("--stream prints one text; give one --prompt and one sample")
        if self.stream and self.json:
            raise InputError("--stream prints text as it comes, --json whole lines; leave one of them out")
        model = load(self.checkpoint, dtype=self.dtype, param_dtype=self.dtype, window=self.window, kept=self.kept)
        options = self._options(model)
        options["tokenizer"] = open_tokenizer(self.checkpoint)
        for setting in model.generation_config.unsupported:
            print(f"gsa: generation_config.json: {setting} is not supported, and ignored", file=sys.stderr)
        started = time.perf_counter()
        if self.stream:
            count = self._stream(model, prompts[0], options)
        else:
            count = self._print(model, [x for x in prompts for _ in range(self.num_samples)], options)
        seconds = time.perf_counter() - started
        print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
        return 0

    def _prompts(self) -> list[str]:
        prompts = list(self.prompt)
        if self.prompt_file is not None:
            prompts += read_prompts(self.prompt_file)
        if not prompts:
            raise InputError("no prompt given; say --prompt TEXT, or --prompt-file FILE with one in each line")
        return prompts

    def _options(self, model: GPTNeoForCausalLM) -> GenerationOptions:
        from gsa_jax.sampling import Greedy, default_sampler

        defaults = model.generation_config
        names = ("temperature", "top_k", "top_p", "min_p")
        sampler = default_sampler(defaults, **{name: getattr(self, name) for name in names})
        if self.num_samples > 1 and isinstance(sampler, Greedy):
            raise InputError(f"--num-samples {self.num_samples}: all the same at temperature 0; raise --temperature")
        return {
            "max_new_tokens": self.max_new_tokens
            if self.max_new_tokens is not None
            else defaults.max_new_tokens or _MAX_NEW_TOKENS,
            "min_new_tokens": self.min_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "sampler": sampler,
            "seed": self.seed,
            "stop": self.stop,
        }

    def _stream(self, model: GPTNeoForCausalLM, prompt: str, options: GenerationOptions) -> int:
        from gsa_jax.completion import stream_completion

        printed, completion = 0, None
        for completion in stream_completion(model, prompt, logprobs=self.logprobs, **options):
            if not completion.tokens:  # not before the request has been checked
                print(prompt, end="", flush=True)
            print(completion.text[printed:], end="", flush=True)
            printed = max(printed, len(completion.text))
        print()
        assert completion is not None, "the first one has no tokens"
        _print_logprobs(completion, options)
        return len(completion.tokens)

    def _print(self, model: GPTNeoForCausalLM, prompts: list[str], options: GenerationOptions) -> int:
        from gsa_jax.completion import complete

        count = 0
        completions = complete(model, prompts, logprobs=self.logprobs, **options)
        for number, completion in enumerate(completions, 1):
            count += len(completion.tokens)
            if self.json:
                values = dataclasses.asdict(completion)
                if not self.logprobs:
                    del values["logprobs"]
                print(json.dumps(values), flush=True)
                continue
            if len(prompts) > 1:
                print(f"--- {number} of {len(prompts)}")
            print(completion.prompt + completion.text)
            _print_logprobs(completion, options)
        return count


def _print_logprobs(completion: Completion, options: GenerationOptions) -> None:
    if completion.logprobs is not None and (tokenizer := options.get("tokenizer")) is not None:
        for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
            print(f"{logprob:10.4f}  {tokenizer.decode([token])!r}")


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, or of stdin if it is `-`: its lines that are not empty.

    A line of a file that is named `.jsonl` is an object with a `prompt`, as `gsa generate --json` prints it.

    Raises:
        InputError: it cannot be read, is not UTF-8 or not JSON, or has no prompt in it.
    """
    name = "stdin" if str(file) == "-" else str(file)
    if name == "stdin" and sys.stdin is None:
        raise InputError("stdin: is closed; give a file with a prompt in each line")
    try:
        content = (sys.stdin.buffer.read() if name == "stdin" else file.read_bytes()).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; give one with a prompt in each line") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8") from None
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from None
    lines = [(number, line) for number, line in enumerate(content.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"{name}: no prompt in it; give one in each line")
    if file.suffix == ".jsonl":
        return [_from_json(f"{name}, line {number}", line) for number, line in lines]
    return [line for _, line in lines]


def _from_json(where: str, line: str) -> str:
    try:
        value: Any = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise InputError(f'{where}: no prompt in it; give {{"prompt": TEXT}}')
    return prompt
