"""Passkey retrieval: does a model still know a number that it was told long ago?

The task of Mohtashami and Jaggi 2023, "Landmark Attention", section 4.2: a random number stands somewhere in a text
that has nothing to do with it, and is asked for at the end. A small model may be unable to say the number and yet find
it likelier than numbers that it was not told, so that is measured too.

May be changed here: the sentences, how items are drawn, and what is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.evaluation.arms import Arm, left_out, load_arms, rows_at_once
from gsa_jax.evaluation.intervals import Estimate
from gsa_jax.parameters import PositionExtension, build_model
from gsa_jax.progress import Progress
from gsa_jax.splat_config import SplatConfig, Window
from gsa_jax.text import document_tokens, read_documents
from gsa_jax.text_files import Text

if TYPE_CHECKING:
    from gsa_jax.tokenizer import Tokenizer

MULTIPLES = (1, 2, 4, 8)
"""Of the training length: how long the items are."""

CANDIDATES = 10
"""Numbers that an item offers: the one that the model was told, and others. Guessing is right in 1 of `CANDIDATES`."""

QUESTION = " The secret number is"
"""Ends the prompt. It also stands somewhere in the text, followed by the number and `REMEMBER`."""

REMEMBER = ". Remember it."

_NUMBERS = 1000
"""How many numbers of five digits keys are drawn from."""

_SENTENCE_ENDS = re.compile(r"""(?<=[.!?])(?=\s)|(?<=[.!?]["'\u201d\u2019])(?=\s)""")


@dataclasses.dataclass(frozen=True)
class PasskeyScore:
    """One arm on items of one length.

    Attributes:
        chosen: share of the items where the right key is likelier than all others; 1 / `CANDIDATES` by chance.
        said: share of the items where greedy decoding says the right key.
        margin: how much being told a key raises its log-probability, in nats: the value in the item where it was told,
            minus the mean over the items where another key was told; 0 by chance. How likely the model finds a number
            anyway cancels out, so even a weak memory shows.
    """

    name: str
    chosen: Estimate
    said: Estimate
    margin: Estimate


@dataclasses.dataclass(frozen=True)
class PasskeyRow:
    """All arms on the same items.

    Attributes:
        multiple: of the training length.
        length: tokens of an item, the start token and the key included.
    """

    multiple: int
    length: int
    arms: tuple[PasskeyScore, ...]


@dataclasses.dataclass(frozen=True)
class Passkey:
    """Scores, and what they are of.

    Attributes:
        rows: of the lengths that the model has positions for.
        notes: which arms and lengths are left out, and why.
        context: the training length, in tokens.
        items: of each length.
        candidates: keys of an item.
        splats: what the hybrid has in its layers.
        layers: that have splats.
    """

    checkpoint: str
    text: str
    rows: tuple[PasskeyRow, ...]
    notes: tuple[str, ...]
    context: int
    items: int
    candidates: int
    splats: SplatConfig
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Items:
    """N texts of P tokens that end with the question, and C possible answers to each.

    Groups of C consecutive items have the same C keys, and each item of a group is told a different one.

    Attributes:
        prompts: int32, without padding.
        keys: int32. All have k tokens, or short ones would be likelier.
        told: which key is the right one.
        depth: slot of each prompt where the sentence with the key begins.
    """

    prompts: Int[np.ndarray, "N P"]
    keys: Int[np.ndarray, "N C k"]
    told: Int[np.ndarray, "N"]
    depth: Int[np.ndarray, "N"]


def evaluate_passkey(
    folder: str | Path,
    text: Text,
    *,
    window: Window | None = None,
    kept: int | None = None,
    context: int | None = None,
    max_documents: int | None = None,
    items: int = 50,
    batch_size: int = 8,
    max_positions: int | None = None,
    position_extension: PositionExtension = "interpolate",
    reference: str | Path | None = None,
    progress: Progress = iter,
) -> Passkey:
    """Asks a checkpoint with splats and its controls for numbers hidden in a text, in float32.

    Intervals are 95 % ones: Wilson's for shares, Student's for the mean of the margin in `CANDIDATES` items.

    Args:
        text: documents, as `gsa_jax.text_files` reads them, to hide numbers in.
        context: the training length, of which items are multiples; all positions of the stored checkpoint if None.
        max_documents: the first so many; all if None.
        items: of each length; a multiple of `CANDIDATES`.
        batch_size: items that run together, at most.
        progress: wraps the names of the batches.

    The other arguments are those of `gsa_jax.evaluation.arms.load_arms`.

    Raises:
        InputError: what `load_arms` refuses; the model has too few positions for items of any length; the text cannot
            be used or is too short; or a model's log-probabilities are not finite.
    """
    for name, number in (("max_documents", max_documents), ("items", items), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise InputError(f"{name} = {number}: must be >= 1")
    if items % CANDIDATES:
        raise InputError(f"items = {items}: must be a multiple of {CANDIDATES}, so that each number is told once")
    arms, tokenizer, stored_positions = load_arms(
        folder,
        window=window,
        kept=kept,
        max_positions=max_positions,
        position_extension=position_extension,
        reference=reference,
    )
    if "hybrid" not in arms:
        raise InputError(f"{folder}: has no splats to ask for what lies far back; attach and fit them: gsa fit-init")
    config, _ = arms["hybrid"]
    splats = config.splats
    assert splats is not None and splats.window != "all", "load_arms refuses the other ones"
    context = stored_positions if context is None else context
    lengths = {multiple: multiple * context for multiple in MULTIPLES}
    fitting = {multiple: length for multiple, length in lengths.items() if length <= config.max_position_embeddings}
    too_long = [f"{multiple}x ({length} tokens)" for multiple, length in lengths.items() if multiple not in fitting]
    remedy = f"the model has {config.max_position_embeddings} positions; give it more: --max-positions"
    if not fitting:
        raise InputError(f"context = {context}: {remedy} {context}")
    notes = [*left_out(config)]
    if too_long:
        notes.append(f"left out: {', '.join(too_long)}; {remedy} {max(lengths.values())}")
    documents = read_documents(text, max_documents)
    by_length = {
        multiple: make_items(documents, tokenizer, config, length, items) for multiple, length in fitting.items()
    }
    found = _scores(arms, by_length, batch_size, progress)
    return Passkey(
        checkpoint=str(folder),
        text=str(text),
        rows=tuple(
            PasskeyRow(multiple, length, tuple(found[arm, multiple] for arm in arms))
            for multiple, length in fitting.items()
        ),
        notes=tuple(notes),
        context=context,
        items=items,
        candidates=CANDIDATES,
        splats=splats,
        layers=config.splat_layers,
    )


def make_items(
    documents: list[str], tokenizer: Tokenizer, config: GPTNeoConfig, length: int, count: int, seed: int = 0
) -> Items:
    """Draws `count` items of `length` tokens, start token and key included; a seed always draws the same ones.

    The text is cut out of the documents somewhere, so that it ends with a sentence. The depth of the key is uniform,
    but for moving to the end of the sentence before.

    Raises:
        InputError: the length has no room for the sentences, the documents are too short for it, or `document_tokens`
            finds something wrong.
    """
    draws = np.random.default_rng(seed)
    sentences = document_tokens(_SENTENCE_ENDS.split("\n\n".join(documents)), tokenizer, config)
    start = sentences[0][0]
    filler = np.array([token for sentence in sentences for token in sentence[1:]])
    ends = np.cumsum([len(sentence) - 1 for sentence in sentences])
    question, remember = (np.array(row[1:]) for row in document_tokens([QUESTION, REMEMBER], tokenizer, config))
    pool = _keys(tokenizer, config, draws)

    room = length - 1 - 2 * (len(question) + pool.shape[1]) - len(remember)
    if room < 1:
        raise InputError(f"context = {length}: must be >= {length + 1 - room}, for a number and the question for it")
    ends_of_text = ends[ends >= room]
    if not ends_of_text.size:
        raise InputError(f"the text has {len(filler):,} tokens, too few for items of {length:,}; give a longer one")
    keys = pool[np.stack([draws.choice(len(pool), CANDIDATES, replace=False) for _ in range(0, count, CANDIDATES)])]
    keys = np.repeat(keys, CANDIDATES, axis=0)
    told = np.arange(count) % CANDIDATES
    prompts, depths = [], []
    for number, end in enumerate(draws.choice(ends_of_text, count)):
        around = filler[end - room : end]
        places = np.concatenate([[0], ends[(ends > end - room) & (ends <= end)] - (end - room)])
        depth = places[np.searchsorted(places, draws.integers(room + 1), side="right") - 1]
        needle = [question, keys[number, told[number]], remember]
        prompts.append(np.concatenate([[start], around[:depth], *needle, around[depth:], question]))
        depths.append(depth + 1)
    return Items(np.array(prompts, np.int32), keys.astype(np.int32), told, np.array(depths))


def _keys(tokenizer: Tokenizer, config: GPTNeoConfig, draws: np.random.Generator) -> Int[np.ndarray, "K k"]:
    """Tokens of different random numbers, all with the number of tokens that is the most frequent one."""
    numbers = draws.choice(np.arange(10_000, 100_000), _NUMBERS, replace=False)
    rows = [row[1:] for row in document_tokens([f" {number}" for number in numbers], tokenizer, config)]
    usual = np.bincount([len(row) for row in rows]).argmax()
    keys = np.unique([row for row in rows if len(row) == usual], axis=0)
    if len(keys) < CANDIDATES:
        raise InputError("the tokenizer gives different numbers the same tokens; passkeys need one that has digits")
    return keys


def _scores(
    arms: Mapping[str, Arm], by_length: Mapping[int, Items], batch_size: int, progress: Progress
) -> dict[tuple[str, int], PasskeyScore]:
    """Of each arm and multiple."""
    shapes = {multiple: items.keys.shape[:2] for multiple, items in by_length.items()}
    nats = {(arm, multiple): np.zeros(shape, np.float64) for arm in arms for multiple, shape in shapes.items()}
    said = {key: np.zeros(of_key.shape, bool) for key, of_key in nats.items()}
    batches = [
        (multiple, np.arange(start, min(start + count, len(items.prompts))), count)
        for multiple, items in by_length.items()
        for count in [rows_at_once(items.prompts.shape[1], batch_size)]
        for start in range(0, len(items.prompts), count)
    ]

    def results() -> Iterator[tuple[str, int, np.ndarray, tuple[jax.Array, jax.Array]]]:
        for arm, (config, tensors) in arms.items():
            graphdef, params = nnx.split(build_model(config, tensors, param_dtype=jnp.float32))
            for multiple, rows, count in batches:
                full = np.resize(rows, count)  # repeats some: one shape for each length
                items = by_length[multiple]
                yield arm, multiple, rows, key_scores(graphdef, params, items.prompts[full], items.keys[full])

    names = [f"{arm}, {multiple}x, {len(rows)} items" for arm in arms for multiple, rows, _ in batches]
    for _, (arm, multiple, rows, found) in zip(progress(names), results(), strict=True):
        nats[arm, multiple][rows] = np.asarray(found[0])[: len(rows)]
        said[arm, multiple][rows] = np.asarray(found[1])[: len(rows)]
    for (arm, _), of_key in nats.items():
        if not np.isfinite(of_key).all():
            raise InputError(f"the {arm} model's log-probabilities are not finite; train, fit or convert it again")
    return {key: score_keys(key[0], nats[key], said[key], by_length[key[1]].told) for key in nats}


@functools.partial(jax.jit, static_argnums=0)
def key_scores(
    graphdef: nnx.GraphDef, params: nnx.State, prompts: Int[Array, "B P"], keys: Int[Array, "B C k"]
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
    """Log-probability of each key after its prompt, and whether it is what greedy decoding says.

    The prompt is read once, and each key continues from its cache. In a layer with splats and a finite window, reading
    takes memory in proportion to the prompt, but the part of the cache that it leaves does not grow with it.
    """
    model = nnx.merge(graphdef, params)
    capacity = prompts.shape[1] + keys.shape[2]
    after_prompt = model.prefill(prompts, jnp.ones(prompts.shape, bool), capacity)

    def score(key: Int[Array, "B k"]) -> tuple[jax.Array, jax.Array]:
        def read(carried: Any, token: Int[Array, "B"]) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            logits, cache = carried
            nats = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
            following = model.extend(token[:, None], jnp.ones((len(token), 1), bool), cache)
            return following, (nats, jnp.argmax(logits, axis=1) == token)

        _, (nats, greedy) = jax.lax.scan(read, after_prompt, key.T)
        return jnp.sum(nats, axis=0), jnp.all(greedy, axis=0)

    nats, said = jax.lax.map(score, keys.swapaxes(0, 1))
    return nats.T, said.T


def score_keys(
    arm: str, nats: Float[np.ndarray, "N C"], said: Bool[np.ndarray, "N C"], told: Int[np.ndarray, "N"]
) -> PasskeyScore:
    """The score of an arm on `Items`: `nats` are the log-probabilities of the keys, `said` whether it says them."""
    right = np.eye(CANDIDATES, dtype=bool)[told]
    best_other = np.where(right, -np.inf, nats).max(axis=1)
    by_group = nats.reshape(-1, CANDIDATES, CANDIDATES)
    of_group = right.reshape(by_group.shape)
    margins = by_group.mean(axis=(1, 2), where=of_group) - by_group.mean(axis=(1, 2), where=~of_group)
    return PasskeyScore(arm, chosen=_share(nats[right] > best_other), said=_share(said[right]), margin=_mean(margins))


def _mean(values: Float[np.ndarray, "G"]) -> Estimate:
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return Estimate(mean, None)
    reach = float(scipy.stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5)
    return Estimate(mean, (mean - reach, mean + reach))


def _share(hits: Bool[np.ndarray, "N"]) -> Estimate:
    result = scipy.stats.binomtest(int(hits.sum()), len(hits))
    low, high = result.proportion_ci(method="wilson")
    return Estimate(float(result.statistic), (float(low), float(high)))
