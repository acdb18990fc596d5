"""What attention through splats costs a model in quality: perplexity beside the exact model, with controls.

May be changed here: how the arms are run, and what is reported. Which arms there are is `arms`; what is measured, and
how its interval is found, is `intervals`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.attention import state_bytes
from gsa_jax.errors import InputError
from gsa_jax.evaluation.arms import Arm, left_out, load_arms, rows_at_once
from gsa_jax.evaluation.intervals import Estimate, bucket_firsts, estimates, sum_by_document
from gsa_jax.loss import Head, blockwise_next_token_losses
from gsa_jax.parameters import PositionExtension, build_model
from gsa_jax.progress import Progress
from gsa_jax.sharding import whole_on_host
from gsa_jax.splat_config import SplatConfig, Window
from gsa_jax.text import TextRows, read_documents, text_rows
from gsa_jax.text_files import Text

_SHORTEST = 64
"""Tokens; no row of text is padded to less."""


@dataclasses.dataclass(frozen=True)
class ArmScore:
    """One arm on the whole text.

    Attributes:
        cross_entropy: nats per token.
        bits_per_byte: of the text in UTF-8.
        perplexity_ratio: to the exact arm.
    """

    name: str
    cross_entropy: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate
    perplexity_ratio: Estimate


@dataclasses.dataclass(frozen=True)
class Bucket:
    """All arms on the tokens in a range of positions; the token that starts a row has position 0.

    Attributes:
        first: position.
        last: position, included.
        tokens: predicted ones.
        cross_entropy: of each arm, nats per token.
        perplexity_ratio: of each arm to the exact one.
    """

    first: int
    last: int
    tokens: int
    cross_entropy: dict[str, Estimate]
    perplexity_ratio: dict[str, Estimate]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores, and what they are of.

    Attributes:
        arms: in the order of `ARMS`.
        gap_closed: share of the cross-entropy between window-only and exact that the hybrid makes up for; None if an
            arm it needs is left out, or window-only is no worse than exact.
        closed_by_splats: the same between without-splats and exact: what splats do, given the kept keys.
        closed_by_kept: the same between without-kept and exact: what kept keys do, given the splats.
        notes: which arms are left out, and why.
        tokens: predicted ones; each token of the text is, once.
        bytes: of the text in UTF-8.
        splats: what the hybrid has in its layers; None if there is only the exact model.
        layers: that have splats.
        state_bytes: of what those layers remember of one text, in float32, however long it is.
    """

    checkpoint: str
    text: str
    arms: tuple[ArmScore, ...]
    buckets: tuple[Bucket, ...]
    gap_closed: Estimate | None
    closed_by_splats: Estimate | None
    closed_by_kept: Estimate | None
    notes: tuple[str, ...]
    documents: int
    tokens: int
    bytes: int
    context: int
    splats: SplatConfig | None
    layers: tuple[int, ...]
    state_bytes: int


def evaluate(
    folder: str | Path,
    text: Text,
    *,
    window: Window | None = None,
    kept: int | None = None,
    context: int | None = None,
    max_documents: int | None = None,
    batch_size: int = 8,
    max_positions: int | None = None,
    position_extension: PositionExtension = "interpolate",
    reference: str | Path | None = None,
    progress: Progress = iter,
) -> Evaluation:
    """Scores a checkpoint with splats and its controls on a text, in float32; one without splats alone.

    Args:
        text: documents, as `gsa_jax.text_files` reads them.
        context: tokens of a row of text; all that the model has positions for if None.
        max_documents: the first so many; all if None.
        batch_size: rows of text that run together, at most.
        progress: wraps the names of the batches.

    The other arguments are those of `load_arms`.

    Raises:
        InputError: what `load_arms` and `score_arms` refuse, or the text cannot be used.
    """
    for name, number in (("max_documents", max_documents), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise InputError(f"{name} = {number}: must be >= 1")
    arms, tokenizer, _ = load_arms(
        folder,
        window=window,
        kept=kept,
        max_positions=max_positions,
        position_extension=position_extension,
        reference=reference,
    )
    documents = read_documents(text, max_documents)
    rows = text_rows(documents, tokenizer, arms.get("hybrid", arms["exact"])[0], context)
    return score_arms(
        arms, documents, rows, checkpoint=str(folder), text=str(text), batch_size=batch_size, progress=progress
    )


def score_arms(
    arms: Mapping[str, Arm],
    documents: list[str],
    rows: TextRows,
    *,
    checkpoint: str,
    text: str,
    batch_size: int = 8,
    progress: Progress = iter,
) -> Evaluation:
    """Scores models in memory, in float32.

    With `documents = read_documents(text)` and `rows = text_rows(documents, tokenizer, config)`, which can be
    kept, `score_arms(make_arms(config, tensors), documents, rows, ...)` is what `evaluate` finds for the checkpoint
    with that configuration and these tensors.

    Args:
        arms: of `make_arms`, or an exact model alone, as `"exact"`.
        rows: of the documents.
        checkpoint: what the result says was scored.
        text: what the result says it was scored on.
        batch_size: rows that run together, at most.
        progress: wraps the names of the batches.

    Raises:
        InputError: a model's losses are not finite.
    """
    losses = token_losses(arms, rows, batch_size=batch_size, progress=progress)
    return score_losses(arms, documents, rows, losses, checkpoint=checkpoint, text=text)


def score_losses(
    arms: Mapping[str, Arm],
    documents: list[str],
    rows: TextRows,
    losses: Mapping[str, Float[np.ndarray, "N P"]],
    *,
    checkpoint: str,
    text: str,
) -> Evaluation:
    """What `score_arms` makes of the `token_losses` of its arms and rows."""
    config, _ = arms.get("hybrid", arms["exact"])
    splats = config.splats
    assert splats is None or splats.window != "all", "make_arms refuses the other ones"
    sums = sum_by_document(documents, rows, losses)
    found = estimates(sums)
    length = rows.input_ids.shape[1]
    firsts = bucket_firsts(length)
    return Evaluation(
        checkpoint=checkpoint,
        text=text,
        arms=tuple(
            ArmScore(
                arm,
                cross_entropy=found["cross_entropy", arm],
                perplexity=found["perplexity", arm],
                bits_per_byte=found["bits_per_byte", arm],
                perplexity_ratio=found["perplexity_ratio", arm],
            )
            for arm in arms
        ),
        buckets=tuple(
            Bucket(
                first,
                following - 1,
                tokens,
                cross_entropy={arm: found["cross_entropy", arm, number] for arm in arms},
                perplexity_ratio={arm: found["perplexity_ratio", arm, number] for arm in arms},
            )
            for number, (first, following, tokens) in enumerate(
                zip(firsts, [*firsts[1:], length], sums.tokens.sum(axis=0).tolist(), strict=True)
            )
            if tokens
        ),
        gap_closed=found.get(("gap_closed", "window-only")),
        closed_by_splats=found.get(("gap_closed", "without-splats")),
        closed_by_kept=found.get(("gap_closed", "without-kept")),
        notes=() if splats is None else left_out(config),
        documents=len(documents),
        tokens=int(sums.tokens.sum()),
        bytes=int(sums.size.sum()),
        context=length,
        splats=splats,
        layers=config.splat_layers,
        state_bytes=0 if splats is None else state_bytes(config),
    )


def cross_entropy(arm: Arm, rows: TextRows, *, batch_size: int = 8) -> float:
    """Nats per token of one model in memory, in float32.

    Raises:
        InputError: its losses are not finite.
    """
    losses = token_losses({"exact": arm}, rows, batch_size=batch_size)["exact"]
    return float(losses[rows.attention_mask[:, 1:]].mean(dtype=np.float64))


def token_losses(
    arms: Mapping[str, Arm], text: TextRows, *, batch_size: int = 8, progress: Progress = iter
) -> dict[str, Float[np.ndarray, "N P"]]:
    """Nats of the P = L - 1 tokens of each row but the first, in float32; those of padding mean nothing.

    Raises:
        InputError: a model's losses are not finite.
    """
    shape = (len(text.document), text.input_ids.shape[1] - 1)
    losses = {arm: np.zeros(shape, np.float32) for arm in arms}
    batches = _batches(text.attention_mask, batch_size)

    def results() -> Iterator[tuple[str, np.ndarray, jax.Array]]:
        for arm, (config, tensors) in arms.items():
            graphdef, params = nnx.split(build_model(config, tensors, param_dtype=jnp.float32))
            for rows, length in batches:
                full = np.resize(rows, rows_at_once(length, batch_size))  # repeats some: one shape for each length
                inputs = text.input_ids[full, :length], text.attention_mask[full, :length]
                yield arm, rows, _batch_losses(graphdef, params, *inputs)

    names = [f"{arm}, {len(rows)} x {length} tokens" for arm in arms for rows, length in batches]
    for _, (arm, rows, found) in zip(progress(names), results(), strict=True):
        losses[arm][rows, : found.shape[1]] = whole_on_host(found)[: len(rows)]
    for arm, of_arm in losses.items():
        if not np.isfinite(of_arm[text.attention_mask[:, 1:]]).all():
            raise InputError(f"the {arm} model's losses are not finite; train, fit or convert it again")
    return losses


@functools.partial(jax.jit, static_argnums=0)
def _batch_losses(
    graphdef: nnx.GraphDef, params: nnx.State, ids: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T-1"]:
    model = nnx.merge(graphdef, params)
    return blockwise_next_token_losses(Head(model.hidden_states(ids, mask), model.transformer.wte.embedding[...]), ids)


def _batches(mask: Bool[np.ndarray, "N L"], batch_size: int) -> list[tuple[Int[np.ndarray, "B"], int]]:
    """Rows that run together, and the power of two (or L) that their tokens fit in."""
    powers = 2 ** np.ceil(np.log2(mask.sum(axis=1))).astype(int)
    lengths = np.minimum(np.maximum(powers, _SHORTEST), mask.shape[1])
    return [
        (rows[start : start + count], length)
        for length in np.unique(lengths).tolist()
        for rows, count in [(np.flatnonzero(lengths == length), rows_at_once(length, batch_size))]
        for start in range(0, len(rows), count)
    ]
