"""The numbers of the page: attention of a passage as the model computes it, and what other measurements say of a text.

Weights, masses and usage are those of `gsa_jax.fitting`, losses those of `gsa_jax.evaluation`. May be changed here:
which part of the text is looked at, which heads are drawn, and in which plane.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from gsa_jax.attention import GSASelfAttention
from gsa_jax.checkpoint import load_tensors
from gsa_jax.config import GPTNeoConfig, Window
from gsa_jax.errors import InputError
from gsa_jax.evaluation.arms import make_arms
from gsa_jax.evaluation.perplexity import Evaluation, score_losses, token_losses
from gsa_jax.fitting.diagnosis import Diagnostics, diagnose_on
from gsa_jax.fitting.statistics import (
    AttentionRows,
    exact_log_weights,
    far_keys,
    main_splats,
    projections,
    splat_log_weights,
)
from gsa_jax.inspection.stages import Stage, model_folder, stages
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.parameters import build_model
from gsa_jax.progress import Progress
from gsa_jax.text import TextRows, document_tokens, text_rows
from gsa_jax.text_files import Text, as_text_files, read_pieces
from gsa_jax.tokenizer import Tokenizer
from gsa_jax.tokenizer_folder import open_tokenizer

NEAR, KEPT, UNSEEN = -1, -2, -3
"""In `HeadPicture.via`: a key in the window, a kept one, one that comes later. Other numbers are splats."""

_CHARACTERS = 24_000
"""Of the text, at most, that losses are measured on."""

_LONGEST = 4_000
"""Characters of a document that are used."""

_BEYOND = 96
"""Tokens of the passage beyond the window and the kept keys."""

_HEADS = 48
"""That are drawn at most."""

_ROWS = 32
"""Queries of the passage that are in memory together."""

_LOSS_TOKENS = 1_200
"""After as many, no further row of text has its losses shown one by one."""

_SHORT = 16
"""Tokens of a row; a mean over fewer would not mean much."""


@dataclasses.dataclass(frozen=True)
class Plane:
    """Queries, keys and splats of a head in the plane of the first two principal components of queries and keys.

    Attributes:
        explained: share of the variance of queries and keys along each axis.
        query: from the mean of queries and keys, as are the other two.
        centers: at each of K stages; the last one is the model's.
        sigma: of the splats at each stage. A splat of this sigma is a circle of this radius in any plane.
    """

    explained: Float[np.ndarray, "2"]
    query: Float[np.ndarray, "T 2"]
    key: Float[np.ndarray, "T 2"]
    centers: Float[np.ndarray, "K S 2"]
    sigma: Float[np.ndarray, "K S"]


@dataclasses.dataclass(frozen=True)
class HeadPicture:
    """One head's attention on the passage, on the queries and keys that the model itself has there.

    Attributes:
        exact: weights of exact attention; rows sum to 1.
        weights: of attention as the model has it.
        via: how a row sees each key: `NEAR`, `KEPT`, `UNSEEN`, or the number of the splat that carries most of it.
        through: how much of a row's weight goes through each splat.
        moved: how far each splat is from where it was at the first stage, in its sigma then.
    """

    layer: int
    head: int
    window: int
    exact: Float[np.ndarray, "T T"]
    weights: Float[np.ndarray, "T T"]
    via: Int[np.ndarray, "T T"]
    through: Float[np.ndarray, "T S"]
    plane: Plane
    moved: Float[np.ndarray, "S"]


@dataclasses.dataclass(frozen=True)
class TokenLosses:
    """A row of text, token by token.

    Attributes:
        tokens: the first one is only there for the others to follow.
        exact: nats of each token but the first, of the exact model.
        splats: of the model with splats.
    """

    tokens: tuple[str, ...]
    exact: Float[np.ndarray, "n"]
    splats: Float[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything that the page shows.

    Attributes:
        tokens: of the passage.
        heads: those that are drawn, in order.
        all_heads: how many there are.
        stages: names; the last one is the model.
        losses: rows of the text, those first in which splats cost the most.
    """

    checkpoint: str
    text: str
    config: GPTNeoConfig
    tokens: tuple[str, ...]
    heads: tuple[HeadPicture, ...]
    all_heads: int
    stages: tuple[str, ...]
    diagnostics: Diagnostics
    evaluation: Evaluation
    losses: tuple[TokenLosses, ...]


def measure(
    folder: Path,
    text: Text,
    *,
    compare: Path | None = None,
    window: Window | None = None,
    kept: int | None = None,
    progress: Progress = iter,
) -> Inspection:
    """Measures a checkpoint with splats on a text.

    Args:
        folder: checkpoint, or run of a training.
        compare: checkpoint or run with the same splats at another time.
        window: tokens that splat layers see exactly; as the checkpoint says if None.
        kept: keys beyond the window that each of their heads sees exactly; as the checkpoint says if None.
        progress: wraps the names of the batches of text.

    Raises:
        InputError: a checkpoint or the text cannot be used, splats cannot be compared, or nothing goes through splats.
    """
    checkpoint = model_folder(folder)
    stored, tensors = load_tensors(checkpoint)
    config = stored.with_window(window, kept)
    path = stages(folder, compare, config, tensors)
    diagnostics = diagnose_on(build_model(config, tensors), checkpoint, text)  # which refuses models that use no splats
    tokenizer = open_tokenizer(checkpoint)
    documents = list(_beginnings(text))
    ids = _passage(documents, tokenizer, config)
    pairs = [(head.layer, head.head) for head in diagnostics.heads]
    drawn = sorted({pairs[n] for n in np.linspace(0, len(pairs) - 1, min(len(pairs), _HEADS)).round().astype(int)})
    arms, rows = make_arms(config, tensors), text_rows(documents, tokenizer, config)
    losses = token_losses(arms, rows, progress=progress)
    return Inspection(
        checkpoint=str(folder),
        text=as_text_files(text).name,
        config=config,
        tokens=_labels(ids, tokenizer),
        heads=tuple(_pictures(build_model(config, tensors, param_dtype=jnp.float32), ids, drawn, path)),
        all_heads=len(pairs),
        stages=tuple(stage.name for stage in path),
        diagnostics=diagnostics,
        evaluation=score_losses(arms, documents, rows, losses, checkpoint=str(folder), text=str(text)),
        losses=tuple(_dearest(rows, losses, lambda ids: _labels(ids, tokenizer))),
    )


def _beginnings(text: Text) -> Iterator[str]:
    """The beginnings of the first documents."""
    taken = 0
    for piece in read_pieces(as_text_files(text), _LONGEST):
        if piece.begins:
            yield piece.text
            taken += len(piece.text)
        if taken >= _CHARACTERS:
            return


def _passage(documents: list[str], tokenizer: Tokenizer, config: GPTNeoConfig) -> Int[np.ndarray, "T"]:
    """The beginning of the first document that is long enough, or of the longest one."""
    far = max(own.window + own.kept for own in config.layer_splats.values() if own.window != "all")
    wanted = min(far + _BEYOND, config.max_position_embeddings)
    found = document_tokens(documents, tokenizer, config)
    ids = next((ids for ids in found if len(ids) >= wanted), max(found, key=len))[:wanted]
    if len(ids) <= far:
        raise InputError(
            f"no document of the text is longer than the {far} tokens that are seen exactly; give longer text or a "
            "smaller window"
        )
    return ids


def _labels(ids: Int[np.ndarray, "n"], tokenizer: Tokenizer) -> tuple[str, ...]:
    return tuple(tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids.tolist())


def _pictures(
    model: GPTNeoForCausalLM, ids: Int[np.ndarray, "T"], drawn: list[tuple[int, int]], path: tuple[Stage, ...]
) -> Iterator[HeadPicture]:
    config, mask = model.config, np.ones((1, len(ids)), bool)
    exact_windows = dataclasses.replace(config, splats=None).windows
    for layer, projected in projections(model, ids[None], mask, tuple(sorted({layer for layer, _ in drawn}))):
        attention, own = model.transformer.h[layer].attn.attention, config.layer_splats[layer]
        assert isinstance(attention, GSASelfAttention) and own.window != "all", "it has splats, and uses them"
        splats = attention.splats
        rows = _whole_rows(projected.query[0], projected.key[0], projected.value[0])
        far = far_keys(rows, splats.importance, own.window, own.kept)
        beyond = far_keys(rows, splats.importance, own.window, 0)
        exactly = exact_log_weights(rows, seen=exact_windows[layer])
        log_weights, through = splat_log_weights(rows, splats, far)
        main = main_splats(rows, splats)
        via = jnp.where(far, main, jnp.where(beyond, KEPT, NEAR))
        via = jnp.where(jnp.arange(len(ids)) > rows.row[:, None, :, None], UNSEEN, via)
        arrays = [_rows_of_heads(x, len(ids)) for x in (jnp.exp(exactly), jnp.exp(log_weights), via, through)]
        query, key = (np.asarray(x[0], np.float64) for x in (projected.query, projected.key))
        for head in (head for of_layer, head in drawn if of_layer == layer):
            exact, weights, seen_via, carried = (x[head] for x in arrays)
            centers = np.stack([stage.centers[layer][head] for stage in path])
            sigma = np.exp(np.stack([stage.log_scales[layer][head] for stage in path]))
            total = weights.astype(np.float64).sum(axis=1, keepdims=True)
            yield HeadPicture(
                layer,
                head,
                own.window,
                exact=_normalised(exact),
                weights=_normalised(weights),
                via=seen_via,
                through=carried / total,
                plane=_plane(query[:, head], key[:, head], centers, sigma),
                moved=np.linalg.norm(centers[-1] - centers[0], axis=-1) / sigma[0],
            )


def _whole_rows(
    query: Float[jax.Array, "T H D"], key: Float[jax.Array, "T H D"], value: Float[jax.Array, "T H D"]
) -> AttentionRows:
    """All rows of one text, in parts as if they were of several; the last part repeats the last row."""
    parts = -(-len(query) // _ROWS)
    row = jnp.minimum(jnp.arange(parts * _ROWS), len(query) - 1).reshape(parts, _ROWS)
    every = jnp.broadcast_to(key, (parts, *key.shape)), jnp.broadcast_to(value, (parts, *value.shape))
    return AttentionRows(query[row], *every, row, jnp.ones((parts, len(key)), bool))


def _rows_of_heads(parts: jax.Array, length: int) -> np.ndarray:
    """`[N, H, R, ...]` of `_whole_rows` as `[H, T, ...]`."""
    rows = np.moveaxis(np.asarray(parts), 1, 0)
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])[:, :length]


def _normalised(weights: Float[np.ndarray, "T T"]) -> Float[np.ndarray, "T T"]:
    """Without what float32 has rounded."""
    wide = weights.astype(np.float64)
    return wide / wide.sum(axis=1, keepdims=True)


def _plane(
    query: Float[np.ndarray, "T D"],
    key: Float[np.ndarray, "T D"],
    centers: Float[np.ndarray, "K S D"],
    sigma: Float[np.ndarray, "K S"],
) -> Plane:
    points = np.concatenate([query, key])
    mean = points.mean(axis=0)
    _, singular, directions = np.linalg.svd(points - mean, full_matrices=False)
    axes = np.zeros((2, points.shape[1]))  # the second stays 0 where heads have a single dimension
    axes[: len(directions[:2])] = directions[:2]
    axes *= np.where(axes[np.arange(2), np.abs(axes).argmax(axis=1)] < 0, -1, 1)[:, None]
    explained = np.zeros(2)
    explained[: len(singular[:2])] = np.square(singular[:2]) / max(np.square(singular).sum(), np.finfo(float).tiny)
    return Plane(explained, (query - mean) @ axes.T, (key - mean) @ axes.T, (centers - mean) @ axes.T, sigma)


def _dearest(
    rows: TextRows, losses: Mapping[str, Any], labels: Callable[[np.ndarray], tuple[str, ...]]
) -> Iterator[TokenLosses]:
    """Rows of text from the one in which splats cost the most per token, until there are enough tokens."""
    predicted = rows.attention_mask[:, 1:]
    extra = np.where(predicted, losses["hybrid"] - losses["exact"], 0).sum(axis=1, dtype=np.float64)
    counts, shown = predicted.sum(axis=1), 0
    for row in np.argsort(-extra / np.maximum(counts, 1), kind="stable").tolist():
        count = int(counts[row])
        if count < _SHORT:
            continue
        yield TokenLosses(
            labels(rows.input_ids[row, : count + 1]),
            *(losses[arm][row, :count].astype(np.float64) for arm in ("exact", "hybrid")),
        )
        shown += count
        if shown >= _LOSS_TOKENS:
            return
