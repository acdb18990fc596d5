"""How the splats of a model are doing, head by head.

May be changed here: what is reported, and when a head counts as dead. Rows of attention are measured by
`statistics`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.attention import GSASelfAttention
from gsa_jax.checkpoint import load_tensors
from gsa_jax.errors import InputError
from gsa_jax.fitting.statistics import (
    calibration_tokens,
    dead_splats,
    effective_splats,
    exact_log_weights,
    far_keys,
    mean_mass,
    projections,
    row_statistics,
    sample_rows,
    splat_log_weights,
    take_rows,
)
from gsa_jax.loss import mean_next_token_loss
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.ops import Splats
from gsa_jax.ops.kept import importance
from gsa_jax.ops.reference import most_important
from gsa_jax.parameters import build_model, named_parameters, without_splats
from gsa_jax.splat_config import LayerSplats, SplatConfig, Window
from gsa_jax.text_files import Text
from gsa_jax.tokenizer_folder import open_tokenizer

_SEED = 0

_TOKENS = 4096

_WORDS = 20
"""That are reported of each head."""


@dataclasses.dataclass(frozen=True)
class KeptWord:
    """A word that a head keeps.

    Attributes:
        times: occurrences that are kept.
        tokens: for how many tokens, on average, an occurrence is kept.
    """

    word: str
    times: int
    tokens: float


@dataclasses.dataclass(frozen=True)
class HeadDiagnostics:
    """One head's splats. Entropies and masses are means over sampled tokens, on the exact model's queries and keys.

    Attributes:
        layer: its number.
        head: its number.
        sigma: geometric mean of its splats' scales.
        exact_entropy: of exact attention, divided by the logarithm of how many keys have gone before, itself included:
            1 is equal weights to all of them, 0 is a single key.
        entropy: the same of attention with the window and the splats.
        exact_far_mass: weight that exact attention gives to far keys: those beyond the window that are not kept.
        far_mass: weight that they get through the splats.
        exact_kept_mass: weight that exact attention gives to kept keys; what is left is the window's.
        kept_mass: weight that they get beside the splats.
        usage: how many splats that weight goes through, as a perplexity between 1 and S; 0 if there is no weight.
        dead_splats: how many carry less than a hundredth of an equal share of it.
        centers_gradient: norm of the gradient of the language-modelling loss in the centres.
        log_scales_gradient: the same in the logarithms of the scales.
        shares: of each splat in the weight that goes through splats; they sum to 1, or to 0 if there is no weight.
        kept_words: those that are kept the longest, summed over all their occurrences.
    """

    layer: int
    head: int
    sigma: float
    exact_entropy: float
    entropy: float
    exact_far_mass: float
    far_mass: float
    exact_kept_mass: float
    kept_mass: float
    usage: float
    dead_splats: int
    num_splats: int
    centers_gradient: float
    log_scales_gradient: float
    shares: tuple[float, ...]
    kept_words: tuple[KeptWord, ...]

    @property
    def is_dead(self) -> bool:
        """Whether training cannot move it: no gradient, or one that is not finite, or nothing but dead splats."""
        moves = all(np.isfinite(norm) and norm > 0 for norm in (self.centers_gradient, self.log_scales_gradient))
        return not moves or self.dead_splats == self.num_splats


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What `diagnose` found.

    Attributes:
        splats: what the layers have.
        tokens: of the text.
        loss: nats per token.
    """

    splats: SplatConfig
    tokens: int
    loss: float
    heads: tuple[HeadDiagnostics, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, and for each head whether it is dead."""
        heads = [dataclasses.asdict(head) | {"is_dead": head.is_dead} for head in self.heads]
        return dataclasses.asdict(self) | {"heads": heads}


def diagnose(
    folder: str | Path,
    text: Text,
    *,
    window: Window | None = None,
    kept: int | None = None,
    tokens: int = _TOKENS,
) -> Diagnostics:
    """Diagnoses the splats of a checkpoint on the beginning of a text.

    Args:
        window: tokens seen exactly; as the checkpoint says if None.
        kept: keys beyond the window that each head sees exactly; as the checkpoint says if None.
        tokens: of the text to use, rounded up to whole rows.

    Raises:
        InputError: the checkpoint or the text cannot be used, or nothing goes through splats: there are none, the
            window is `"all"`, or no row has a key beyond the window and the kept ones of a layer with splats.
    """
    config, tensors = load_tensors(folder)
    return diagnose_on(build_model(config.with_window(window, kept), tensors), folder, text, tokens=tokens)


def diagnose_on(model: GPTNeoForCausalLM, folder: str | Path, text: Text, *, tokens: int = _TOKENS) -> Diagnostics:
    """`diagnose` of a model that is there already; its tokenizer is the folder's."""
    input_ids, mask = calibration_tokens(Path(folder), text, model.config, tokens)
    pieces = {number: piece for piece, number in open_tokenizer(folder).get_vocab().items()}
    words = [
        words_of([pieces[number] for number in row[valid].tolist()]) for row, valid in zip(input_ids, mask, strict=True)
    ]
    return diagnose_model(model, input_ids, mask, words)


def diagnose_model(
    model: GPTNeoForCausalLM,
    input_ids: Int[np.ndarray, "N T"],
    attention_mask: Bool[np.ndarray, "N T"],
    words: Sequence[Sequence[str]],
) -> Diagnostics:
    """The same for a model as it is configured; ids are right-padded.

    Args:
        words: the word that each token of a row belongs to.

    Raises:
        InputError: nothing goes through splats.
    """
    config = model.config
    if config.splats is None or not config.splats.has_splats:
        raise InputError("the model has no splats to diagnose; attach and fit some first: gsa fit-init")
    if config.splats.window == "all":
        raise InputError("window = 'all' leaves the splats unused; give a number of tokens, such as --window 64")
    layers = config.layer_splats.values()
    far = max(own.window + own.kept for own in layers if own.num_splats and own.window != "all")
    if attention_mask.sum(axis=1).max() <= far:
        raise InputError(f"no token of the text has another {far} before it; give longer text or a smaller window")
    loss, gradients = _loss_and_gradients(*nnx.split(model, _is_splat, ...), input_ids, attention_mask)
    sample = sample_rows(attention_mask, _SEED)
    heads: list[HeadDiagnostics] = []
    exact = build_model(*without_splats(config, named_parameters(model)))
    for layer, projected in projections(exact, input_ids, attention_mask, config.splat_layers):
        own = config.layer_splats[layer]
        if not own.num_splats:
            continue
        attention = model.transformer.h[layer].attn.attention
        assert isinstance(attention, GSASelfAttention), "splat layers have splats"
        splats, rows = attention.splats, take_rows(sample, projected, attention_mask)
        far = far_keys(rows, splats.importance, own.window, own.kept)
        kept = far_keys(rows, splats.importance, own.window, 0) & ~far
        exact_weights = exact_log_weights(rows, seen=exact.config.windows[layer])
        weights, through_each = splat_log_weights(rows, splats, far)
        exactly = row_statistics(rows, far, exact_weights)
        through = row_statistics(rows, far, weights, through_each)
        usage = np.asarray(through.usage)
        of_layer = gradients["transformer"]["h"][layer]["attn"]["attention"]
        columns = (
            np.exp(np.mean(np.asarray(splats.log_scales, np.float32), axis=-1)),
            exactly.entropy,
            through.entropy,
            exactly.far_mass,
            through.far_mass,
            mean_mass(exact_weights, kept),
            mean_mass(weights, kept),
            effective_splats(usage),
            dead_splats(usage),
            np.full(config.num_heads, own.num_splats),
            jnp.linalg.norm(of_layer["splat_centers"][...], axis=(1, 2)),
            jnp.linalg.norm(of_layer["splat_log_scales"][...], axis=1),
        )
        durations = [
            np.asarray(_tokens_kept(splats, projected.key[n], projected.value[n], attention_mask[n], own))
            for n in range(len(input_ids))
        ]
        for head, values in enumerate(zip(*(np.asarray(column).tolist() for column in columns), strict=True)):
            kept_words = most_kept(words, [of_row[head] for of_row in durations])
            shares = tuple(usage[head].tolist())
            heads.append(HeadDiagnostics(layer, head, *values, shares=shares, kept_words=kept_words))
    return Diagnostics(config.splats, int(attention_mask.sum()), float(loss), tuple(heads))


@functools.partial(jax.jit, static_argnames="own")
def _tokens_kept(
    splats: Splats, key: Float[Array, "T H D"], value: Float[Array, "T H D"], valid: Bool[Array, "T"], own: LayerSplats
) -> Int[Array, "H T"]:
    """For how many tokens each key of a row is kept."""
    assert own.window != "all", "nothing is kept of an infinite window"
    slots = jnp.arange(len(valid))
    far = (slots[:, None] - slots >= own.window) & valid & valid[:, None]
    important = jax.vmap(importance, (0, 1, 1))(splats, key, value)
    return jax.vmap(lambda x: jnp.sum(most_important(x, far, own.kept), axis=0))(important)


def words_of(pieces: Sequence[str]) -> list[str]:
    """The word that each piece of a text belongs to; pieces are of a byte-level tokenizer, and begin words by a space.

    Marks are words of their own.
    """
    words: list[list[str]] = []
    for piece in (piece.replace("\u0120", " ").replace("\u010a", "\\n") for piece in pieces):
        continues = words and piece[:1].isalpha() and words[-1][-1][-1:].isalpha() and words[-1][-1] != "\\n"
        words.append([*words.pop(), piece] if continues else [piece])
    return ["".join(parts).strip() or "space" for parts in words for _ in parts]


def most_kept(words: Sequence[Sequence[str]], durations: Sequence[Int[np.ndarray, "T"]]) -> tuple[KeptWord, ...]:
    """The words that a head keeps for the most tokens.

    Args:
        durations: for how many tokens each token is kept; of a row at least as long as its words.
    """
    found: dict[str, list[int]] = {}
    for of_row, kept in zip(words, durations, strict=True):
        for word, tokens in zip(of_row, kept.tolist(), strict=False):
            if tokens:
                found.setdefault(word, []).append(tokens)
    most = sorted(found, key=lambda word: -sum(found[word]))[:_WORDS]
    return tuple(KeptWord(word, len(found[word]), float(np.mean(found[word]))) for word in most)


def _is_splat(path: tuple[Any, ...], _: Any) -> bool:
    return str(path[-1]).startswith("splat_")


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradients(
    graphdef: nnx.GraphDef, splats: nnx.State, rest: nnx.State, input_ids: jax.Array, attention_mask: jax.Array
) -> tuple[jax.Array, nnx.State]:
    """Mean loss over all tokens and its gradient in the splats, one sequence in memory at a time."""
    counts = jnp.sum(attention_mask[:, 1:] & attention_mask[:, :-1], axis=1)
    shares = counts.astype(jnp.float32) / jnp.maximum(jnp.sum(counts), 1).astype(jnp.float32)

    def loss(splats: nnx.State, ids: jax.Array, mask: jax.Array, share: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, splats, rest)(ids[None], mask[None])
        return share * mean_next_token_loss(logits, ids[None], mask[None])

    def add(total: tuple[jax.Array, nnx.State], sequence: tuple[jax.Array, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(splats, *sequence)), None

    nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, splats))
    return jax.lax.scan(add, nothing, (input_ids, attention_mask, shares))[0]
