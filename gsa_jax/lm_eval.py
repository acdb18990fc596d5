"""A checkpoint as a model of lm-evaluation-harness (EleutherAI), without PyTorch.

The harness finds it as `gsa` through the entry point in its group `lm_eval.models`, where its version looks there;
`gsa lm-eval` hands it over in person, with every version. May be changed here: how requests are batched and scored.
What the harness asks for is described in its `docs/model_guide.md`; its own backend `hf` is the oracle of the tests.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gsa_jax.checkpoint import load
from gsa_jax.completion import complete
from gsa_jax.errors import InputError
from gsa_jax.ops.linear import linear
from gsa_jax.sampling import Greedy, Sampler, make_sampler
from gsa_jax.splat_config import Window
from gsa_jax.text import start_token
from gsa_jax.tokenizer_folder import open_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_SHORTEST = 16
"""Tokens; no batch is padded to less, so that few shapes are compiled."""

_TOKENS_OF_LOGITS = 256
"""Tokens whose logits are in memory together."""

ScoredTokens = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness hands over: text of context and continuation, and the tokens of both."""


class GaussianSplatLM(TemplateLM):
    """The model of a checkpoint folder.

    Args:
        pretrained: the checkpoint.
        window: tokens that splat layers see exactly, or `"all"`; as stored if None.
        kept: keys beyond the window that they see exactly; as stored if None.
        dtype: of the computation.
        batch_size: requests that run together.
        max_length: tokens of a context and its continuation; all that the model has positions for if None.
        max_gen_toks: tokens that a task may generate if it does not say how many.
        device, max_batch_size: given by the harness; ignored, because JAX has chosen a device and the size is fixed.

    Raises:
        InputError: the checkpoint cannot be used, or a number is out of range.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        window: Window | None = None,
        kept: int | None = None,
        dtype: str = "float32",
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        del device, max_batch_size
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size = {batch_size}: give a number of requests, >= 1")
        self.batch_size = int(batch_size)
        self._model = load(pretrained, window=window, kept=kept, dtype=dtype)
        self._graphdef, self._params = nnx.split(self._model)
        self.tokenizer: Any = open_tokenizer(pretrained)
        positions = self._model.config.max_position_embeddings
        self.max_length = positions if max_length is None else max_length
        if not 2 <= self.max_length <= positions:
            raise InputError(f"max_length = {max_length}: must be >= 2 and at most {positions}, the model's positions")
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """What ends a text; the first of these, if there are several."""
        end = self._model.config.eos_token_id
        end = end[0] if isinstance(end, tuple) else end
        return self.prefix_token_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context begins with."""
        return start_token(self._model.config)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text; special ones are added as the tokenizer does, but not to one that begins with one."""
        del kwargs
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts, in windows of `max_length` tokens that do not overlap in what they predict."""
        windows: list[ScoredTokens] = []
        counts = []
        for request in requests:
            (text,) = request.args
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[ScoredTokens], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)  # of a continuation without tokens
        rows = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        counts = [min(len(continuation), self.max_length) for _, _, continuation in requests]
        lengths = [len(row) for row in rows]
        for batch in self._batches([n for n, count in enumerate(counts) if count], lengths, disable_tqdm):
            # Rows end together, so what is scored lies at the end of all of them.
            slots = self._bucket(max(lengths[n] for n in batch) - 1)
            scored = self._bucket(max(counts[n] for n in batch))
            ids = np.zeros((self.batch_size, slots), np.int32)
            mask = np.zeros((self.batch_size, slots), bool)
            targets = np.zeros((self.batch_size, min(scored, slots)), np.int32)
            for place, n in enumerate(batch):
                ids[place, slots - lengths[n] + 1 :] = rows[n][:-1]
                mask[place, slots - lengths[n] + 1 :] = True
                targets[place, targets.shape[1] - counts[n] :] = rows[n][-counts[n] :]
            found = _score(self._graphdef, self._params, ids, mask, targets)
            for place, n in enumerate(batch):
                logs, greedy = (np.asarray(part)[place, -counts[n] :] for part in found)
                answers[n] = float(logs.sum(dtype=np.float64)), bool(greedy.all())
                texts = requests[n][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[n])
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts up to a text of `until`, the end token, or as many tokens as are allowed."""
        groups: dict[str, list[int]] = {}
        asked: list[Any] = [request.args for request in requests]
        for n, (_, options) in enumerate(asked):
            groups.setdefault(repr(sorted(options.items())), []).append(n)
        answers = [""] * len(requests)
        contexts = [self.tok_encode(text) or [self.prefix_token_id] for text, _ in asked]
        for group in groups.values():
            until, new_tokens, sampler = self._generation(asked[group[0]][1])
            kept = self.max_length - new_tokens
            if kept < 1:
                raise InputError(
                    f"{new_tokens} tokens to generate leave no room for a context in {self.max_length} positions; "
                    "lower max_gen_toks"
                )
            for batch in self._batches(group, [len(context) for context in contexts], disable_tqdm):
                prompts = [contexts[n][-kept:] for n in batch]
                for n, text in zip(batch, self._continue(prompts, until, new_tokens, sampler), strict=True):
                    answers[n] = text
                    self.cache_hook.add_partial("generate_until", asked[n], text)
        return answers

    def _generation(self, asked: dict[str, Any]) -> tuple[list[str], int, Sampler]:
        """Texts that end a continuation, how many tokens it may have, and how they are chosen.

        Raises:
            InputError: a task asks for something else.
        """
        options: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        until = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        new_tokens = options.pop("max_gen_toks")
        samples, temperature = options.pop("do_sample"), options.pop("temperature", 1.0)
        top_k, top_p = options.pop("top_k", None), options.pop("top_p", None)
        if options:
            raise InputError(f"a task asks for {', '.join(options)} in generation, which is not known here")
        if not samples:
            return until, new_tokens, Greedy()
        top_p = None if top_p is None else float(top_p)
        return until, new_tokens, make_sampler(temperature=float(temperature), top_k=top_k, top_p=top_p)

    def _continue(self, prompts: Sequence[list[int]], until: list[str], new_tokens: int, sampler: Sampler) -> list[str]:
        full = [prompts[place % len(prompts)] for place in range(self.batch_size)]  # one shape for the last batch too
        found = complete(
            self._model,
            full,
            max_new_tokens=new_tokens,
            sampler=sampler,
            eos_token_id=self.eot_token_id,
            stop=[text for text in until if text],
            tokenizer=self.tokenizer,
        )
        return [completion.text for completion in itertools.islice(found, len(prompts))]

    def _batches(self, numbers: list[int], lengths: list[int], quiet: bool) -> Iterator[list[int]]:
        """The numbers of requests that run together: such of similar length, the longest ones first."""
        from tqdm import tqdm

        ordered = sorted(numbers, key=lambda n: -lengths[n])
        with tqdm(total=len(ordered), disable=True if quiet else None, desc="requests") as bar:
            for start in range(0, len(ordered), self.batch_size):
                batch = ordered[start : start + self.batch_size]
                yield batch
                bar.update(len(batch))

    def _bucket(self, length: int) -> int:
        return min(max(_SHORTEST, 1 << (length - 1).bit_length()), self.max_length)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    targets: Int[Array, "B C"],
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
    """Log-probabilities of what follows the last C tokens, and whether it is the most likely token each time."""
    model = nnx.merge(graphdef, params)
    hidden = model.hidden_states(ids, mask)[:, -targets.shape[1] :]

    def of_token(token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state, target = token
        logits = linear(state, model.transformer.wte.embedding[...]).astype(jnp.float32)
        return logits[target] - jax.nn.logsumexp(logits), jnp.argmax(logits) == target

    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    logs, greedy = jax.lax.map(of_token, flat, batch_size=_TOKENS_OF_LOGITS)
    return logs.reshape(targets.shape), greedy.reshape(targets.shape)
