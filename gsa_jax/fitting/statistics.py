"""What attention does on real text: the exact model's queries and keys, and statistics of sampled rows of attention.

May be changed here: which tokens and rows are looked at, and what is measured on a row. `placing` chooses splats by
these numbers, `diagnosis` reports them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.ops import Splats, no_splats
from gsa_jax.ops.kept import importance
from gsa_jax.ops.reference import most_important
from gsa_jax.ops.segments import positions_from_mask
from gsa_jax.ops.state import key_features, query_features
from gsa_jax.splat_config import Window
from gsa_jax.text import iterate_documents, text_rows
from gsa_jax.text_files import Text
from gsa_jax.tokenizer_folder import open_tokenizer

_SEQUENCES = 16
_ROWS_PER_SEQUENCE = 32
_DOCUMENTS_AT_ONCE = 64
_DEAD_SHARE = 0.01


def calibration_tokens(
    folder: Path, text: Text, config: GPTNeoConfig, tokens: int
) -> tuple[Int[np.ndarray, "N T"], Bool[np.ndarray, "N T"]]:
    """Ids and mask, right-padded, of the first rows of a text that hold `tokens` tokens together, or of all rows.

    Raises:
        InputError: the text or the checkpoint's tokenizer cannot be read.
    """
    documents, tokenizer = iterate_documents(text), open_tokenizer(folder)
    parts, found = [], 0
    while some := list(itertools.islice(documents, _DOCUMENTS_AT_ONCE)):
        parts.append(text_rows(some, tokenizer, config))
        found += int(parts[-1].attention_mask.sum())
        if found >= tokens:
            break
    input_ids = np.concatenate([part.input_ids for part in parts])
    mask = np.concatenate([part.attention_mask for part in parts])
    lengths = mask.sum(axis=1)
    count = int(np.searchsorted(np.cumsum(lengths), tokens)) + 1
    longest = lengths[:count].max()
    return input_ids[:count, :longest], mask[:count, :longest]


class Projections(NamedTuple):
    """Queries, keys and values of a layer, float32."""

    query: Float[Array, "N T H D"]
    key: Float[Array, "N T H D"]
    value: Float[Array, "N T H D"]


def projections(
    model: GPTNeoForCausalLM,
    input_ids: Int[np.ndarray, "N T"],
    attention_mask: Bool[np.ndarray, "N T"],
    layers: tuple[int, ...],
) -> Iterator[tuple[int, Projections]]:
    """Layer by layer, the queries, keys and values of a text; memory holds one layer's at a time."""
    transformer, mask = model.transformer, jnp.asarray(attention_mask)
    hidden_states = transformer.embed(jnp.asarray(input_ids), positions_from_mask(mask))
    for number, block in enumerate(transformer.h):
        split = nnx.split(block)
        if number in layers:
            yield number, _project(*split, hidden_states)
        if number == max(layers):
            return
        hidden_states = _advance(*split, hidden_states, mask)


@functools.partial(jax.jit, static_argnums=0)
def _project(graphdef: nnx.GraphDef, state: nnx.State, hidden_states: jax.Array) -> Projections:
    block = nnx.merge(graphdef, state)
    return Projections(*(x.astype(jnp.float32) for x in block.attn.attention.project(block.ln_1(hidden_states))))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(graphdef: nnx.GraphDef, state: nnx.State, hidden_states: jax.Array, mask: jax.Array) -> jax.Array:
    block = nnx.merge(graphdef, state)
    return jax.lax.map(lambda sequence: block(sequence[0][None], sequence[1][None])[0][0], (hidden_states, mask))


@functools.partial(jax.jit, static_argnames="seen")
def attended_midpoints(
    draws: jax.Array,
    query: Float[Array, "N T H D"],
    key: Float[Array, "N T H D"],
    attention_mask: Bool[Array, "N T"],
    *,
    seen: Window,
) -> Float[Array, "N T H D"]:
    """The middle between each query and one key, drawn as exact attention over the last `seen` tokens weighs them."""

    def sequence(of_sequence: tuple[jax.Array, ...]) -> jax.Array:
        draws, query, key, valid = of_sequence
        rows = AttentionRows(query, key, key, jnp.arange(len(query)), valid)
        distance, causal = _distances(rows)
        visible = causal if seen == "all" else causal & (distance < seen)
        drawn = jax.random.categorical(draws, jnp.where(visible, _near_scores(rows), -jnp.inf)).T
        return (query + jnp.take_along_axis(key, drawn[:, :, None], axis=0)) / 2

    return jax.lax.map(sequence, (jax.random.split(draws, len(query)), query, key, attention_mask))


@dataclasses.dataclass(frozen=True)
class RowSample:
    """Which rows of attention to look at: tokens `rows[n]` of the sequences `sequences[n]`."""

    sequences: Int[np.ndarray, "N"]
    rows: Int[np.ndarray, "N R"]


def sample_rows(
    attention_mask: Bool[np.ndarray, "N T"],
    seed: int,
    *,
    sequences: int = _SEQUENCES,
    per_sequence: int = _ROWS_PER_SEQUENCE,
) -> RowSample:
    """Draws tokens that have a token before them, from long sequences more often than from short ones.

    Raises:
        InputError: no sequence holds two tokens.
    """
    draws = np.random.default_rng(seed)
    followers = [np.flatnonzero(mask)[1:] for mask in attention_mask]
    sizes = np.array([rows.size for rows in followers])
    if not sizes.any():
        raise InputError("no document holds two tokens; give longer text")
    count = min(sequences, np.count_nonzero(sizes))
    drawn = np.sort(draws.choice(len(sizes), count, replace=False, p=sizes / sizes.sum()))
    rows = [np.sort(draws.choice(followers[sequence], per_sequence)) for sequence in drawn]
    return RowSample(drawn, np.stack(rows))


@no_type_check  # a pytree also holds shapes
@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["query", "key", "value", "row", "valid"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class AttentionRows:
    """Sampled rows of one layer's attention: R queries of each of N sequences, and all keys and values of these.

    Attributes:
        row: slots of the queries.
        valid: which keys are tokens.
    """

    query: Float[Array, "N R H D"]
    key: Float[Array, "N T H D"]
    value: Float[Array, "N T H D"]
    row: Int[Array, "N R"]
    valid: Bool[Array, "N T"]


def take_rows(sample: RowSample, projected: Projections, attention_mask: Bool[np.ndarray, "B T"]) -> AttentionRows:
    """The sampled rows of these queries, keys and values."""
    sequences = sample.sequences
    return AttentionRows(
        query=projected.query[sequences[:, None], sample.rows],
        key=projected.key[sequences],
        value=projected.value[sequences],
        row=jnp.asarray(sample.rows),
        valid=jnp.asarray(attention_mask[sequences]),
    )


@no_type_check  # a pytree also holds shapes
@functools.partial(jax.tree_util.register_dataclass, data_fields=["entropy", "far_mass", "usage"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RowStatistics:
    """Of each head's attention, over sampled rows.

    Attributes:
        entropy: mean of a row's entropy divided by the logarithm of how many keys have gone before, itself included,
            whether or not the layer sees all of them.
        far_mass: mean weight that a row gives to far keys, `far_keys`.
        usage: share of each splat in all of the weight that goes through splats; sums to 1. None for exact attention.
    """

    entropy: Float[Array, "H"]
    far_mass: Float[Array, "H"]
    usage: Float[Array, "H S"] | None


@jax.jit
def far_keys(
    rows: AttentionRows,
    weights: Float[Array, "H F"] | None,
    window: int | Int[Array, ""],
    kept: int | Int[Array, ""],
) -> Bool[Array, "N H R T"]:
    """Which keys a row sees through splats: those beyond the window that are not kept.

    Args:
        weights: what makes keys important, as `Splats.importance`.
    """

    def sequence(rows: AttentionRows) -> jax.Array:
        distance, causal = _distances(rows)
        beyond = causal & (distance >= window)

        def head(key: jax.Array, value: jax.Array, weights: jax.Array | None) -> jax.Array:
            splats = dataclasses.replace(no_splats(1, key.shape[-1]), importance=weights)
            return beyond & ~most_important(importance(splats, key, value), beyond, kept)

        return jax.vmap(head, (1, 1, None if weights is None else 0))(rows.key, rows.value, weights)

    return jax.lax.map(sequence, rows)


@functools.partial(jax.jit, static_argnames="seen")
def exact_log_weights(rows: AttentionRows, *, seen: Window) -> Float[Array, "N H R T"]:
    """Logarithms of the weights of exact attention that sees the last `seen` tokens."""
    return jax.nn.log_softmax(near_scores(rows, seen=seen), axis=-1)


@functools.partial(jax.jit, static_argnames="seen")
def near_scores(rows: AttentionRows, *, seen: Window) -> Float[Array, "N H R T"]:
    """Exact scores of the last `seen` tokens; -inf elsewhere."""

    def sequence(rows: AttentionRows) -> jax.Array:
        distance, causal = _distances(rows)
        return jnp.where(causal if seen == "all" else causal & (distance < seen), _near_scores(rows), -jnp.inf)

    return jax.lax.map(sequence, rows)


@jax.jit
def splat_scores(rows: AttentionRows, splats: Splats) -> Float[Array, "N H R T"]:
    """Scores through splats of keys at any distance; -inf where there is no key, or there are no splats."""

    def sequence(rows: AttentionRows) -> jax.Array:
        query = jax.vmap(query_features, (0, 1))(splats, rows.query)
        key = jax.vmap(key_features, (0, 1, None))(splats, rows.key, rows.valid)
        return jax.nn.logsumexp(query[:, :, None, :] + key[:, None, :, :], axis=-1)

    return jax.lax.map(sequence, rows)


@jax.jit
def splat_log_weights(
    rows: AttentionRows, splats: Splats, far: Bool[Array, "N H R T"]
) -> tuple[Float[Array, "N H R T"], Float[Array, "N H R S"]]:
    """Logarithms of the weights of attention to far keys through splats, and to all others exactly; and how much of a
    row's weight goes through each splat."""

    def sequence(of_sequence: tuple[AttentionRows, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, far = of_sequence
        _, causal = _distances(rows)
        query = jax.vmap(query_features, (0, 1))(splats, rows.query)
        key = jax.vmap(key_features, (0, 1, None))(splats, rows.key, rows.valid)
        joint = query[:, :, None, :] + key[:, None, :, :]  # [H, R, T, S]
        scores = jnp.where(far, jax.nn.logsumexp(joint, axis=-1), _near_scores(rows))
        scores = jnp.where(causal, scores, -jnp.inf)
        normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        through = jnp.where(far[..., None], jnp.exp(joint - normaliser[..., None]), 0)
        return scores - normaliser, jnp.sum(through, axis=2)

    return jax.lax.map(sequence, (rows, far))


@jax.jit
def main_splats(rows: AttentionRows, splats: Splats) -> Int[Array, "N H R T"]:
    """The splat that carries most of the score of a query and a key, were the key a far one."""

    def sequence(rows: AttentionRows) -> jax.Array:
        query = jax.vmap(query_features, (0, 1))(splats, rows.query)
        key = jax.vmap(key_features, (0, 1, None))(splats, rows.key, rows.valid)
        return jnp.argmax(query[:, :, None, :] + key[:, None, :, :], axis=-1)

    return jax.lax.map(sequence, rows)


@jax.jit
def row_statistics(
    rows: AttentionRows,
    far: Bool[Array, "N H R T"],
    log_weights: Float[Array, "N H R T"],
    through: Float[Array, "N H R S"] | None = None,
) -> RowStatistics:
    """Of attention with these weights.

    Args:
        far: whose mass is counted.
        through: of `splat_log_weights`, for the usage of splats.
    """
    usage = None
    if through is not None:
        usage = jnp.sum(through, axis=(0, 2))
        usage /= jnp.maximum(jnp.sum(usage, axis=-1, keepdims=True), jnp.finfo(usage.dtype).tiny)
    return RowStatistics(_normalised_entropy(log_weights, rows), mean_mass(log_weights, far), usage)


@functools.partial(jax.jit, static_argnames="seen")
def exact_statistics(rows: AttentionRows, far: Bool[Array, "N H R T"], *, seen: Window) -> RowStatistics:
    """Of exact attention that sees the last `seen` tokens; `far` says whose mass is counted."""
    return row_statistics(rows, far, exact_log_weights(rows, seen=seen))


@jax.jit
def splat_statistics(rows: AttentionRows, splats: Splats, far: Bool[Array, "N H R T"]) -> RowStatistics:
    """Of attention to far keys through splats, and to all others exactly."""
    return row_statistics(rows, far, *splat_log_weights(rows, splats, far))


def _distances(rows: AttentionRows) -> tuple[jax.Array, jax.Array]:
    """`[R, T]`: how many slots a key lies before a query, and whether the query may see it."""
    distance = rows.row[:, None] - jnp.arange(rows.key.shape[0])
    return distance, (distance >= 0) & rows.valid


def _near_scores(rows: AttentionRows) -> jax.Array:
    return jnp.einsum("rhd,thd->hrt", rows.query, rows.key, precision=jax.lax.Precision.HIGHEST)


def _normalised_entropy(log_weights: Float[Array, "N H R T"], rows: AttentionRows) -> Float[Array, "H"]:
    weights = jnp.exp(log_weights)
    entropy = -jnp.sum(jnp.where(weights > 0, weights * log_weights, 0), axis=-1)
    seen = jax.vmap(lambda rows: jnp.sum(_distances(rows)[1], axis=-1))(rows)
    return jnp.mean(entropy / jnp.log(seen)[:, None], axis=(0, 2))


def mean_mass(log_weights: Float[Array, "N H R T"], keys: Bool[Array, "N H R T"]) -> Float[Array, "H"]:
    """Mean weight that a row gives to these keys."""
    return jnp.mean(jnp.sum(jnp.where(keys, jnp.exp(log_weights), 0), axis=-1), axis=(0, 2))


def effective_splats(usage: Float[np.ndarray, "H S"]) -> Float[np.ndarray, "H"]:
    """Perplexity of each head's usage: between 1, one splat does everything, and S; 0 if nothing goes through them."""
    logs = np.log(usage, out=np.zeros_like(usage), where=usage > 0)
    return np.where(usage.sum(axis=-1) > 0, np.exp(-(usage * logs).sum(axis=-1)), 0.0)


def dead_splats(usage: Float[np.ndarray, "H S"]) -> Int[np.ndarray, "H"]:
    """How many of each head's splats carry less than a hundredth of an equal share."""
    return (usage < _DEAD_SHARE / usage.shape[-1]).sum(axis=-1)
