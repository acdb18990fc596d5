"""Splats that start where a model's queries and keys are.

May be changed here: how centres, scales and far gains are chosen from calibration text, and what the report says.
Measuring is `statistics`; training from here on is `gsa_jax.train`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.attention import GSASelfAttention
from gsa_jax.checkpoint import REPORT_FILE, load_tensors, save, tokenizer_files
from gsa_jax.config import SPLAT_PRESETS, GPTNeoConfig, LayerSplats, SplatConfig, Window, require_seed
from gsa_jax.errors import InputError
from gsa_jax.files import refuse_existing
from gsa_jax.fitting.importance import HeadImportance, fit_importance
from gsa_jax.fitting.kmeans import kmeans
from gsa_jax.fitting.statistics import (
    AttentionRows,
    Projections,
    attended_midpoints,
    calibration_tokens,
    dead_splats,
    effective_splats,
    exact_statistics,
    far_keys,
    projections,
    sample_rows,
    splat_statistics,
    take_rows,
)
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.ops import Splats, no_splats
from gsa_jax.parameters import attention_tensor, build_model, expected_shapes, is_splat, without_splats
from gsa_jax.progress import Progress
from gsa_jax.text_files import Text, TextFiles, as_text_files

FIT_REPORT_FILE = "fit_init.json"

ENTROPY_BAND = (0.2, 0.9)
"""Range that the entropy to fit is moved into, where 1 is equal weights. Outside of it, the attention of a head hardly
changes when its splats do."""

_FAR_SHARE_BAND = (0.01, 0.99)
"""The same for the mass of far keys, as a share of the largest possible: with no mass, splats get no gradient."""

_SCALE_RANGE = (0.02, 50.0)
"""Scales that are searched, in units of the root mean square norm of a head's queries."""

_GAIN_RANGE = (-500.0, 500.0)

_BISECTIONS = 24

_TO_LEARN_FROM = {"sequences": 64, "per_sequence": 128}
"""Rows from which it is learned what makes a key important. With a quarter of the sequences, the weights lose half of
what they gain over the norm."""


@dataclasses.dataclass(frozen=True)
class HeadFit:
    """How one head was fitted.

    Attributes:
        layer: its number.
        head: its number.
        sigma: scale of all of its splats.
        teacher_entropy: of exact attention, normalised: 1 is equal weights.
        entropy_target: the same, moved into `ENTROPY_BAND`.
        entropy: that sigma reaches, with everything seen through the splats.
        inertia: mean squared distance of a midpoint from the nearest centre.
        usage: how many splats the far keys use, as a perplexity between 1 and S.
        dead_splats: how many carry less than a hundredth of an equal share.
        far_gain: the term of that name, or None if the configuration leaves it out.
    """

    layer: int
    head: int
    sigma: float
    teacher_entropy: float
    entropy_target: float
    entropy: float
    inertia: float
    usage: float
    dead_splats: int
    far_gain: float | None


@dataclasses.dataclass(frozen=True)
class FitReport:
    """What was fitted to what: the text file's name, how many of its tokens, the seed, and each head.

    Attributes:
        importances: how each head came to the keys that it keeps, where that is learned.
    """

    text: str
    tokens: int
    seed: int
    splats: SplatConfig
    heads: tuple[HeadFit, ...]
    importances: tuple[HeadImportance, ...] = ()


def fit_init(
    folder: str | Path,
    out: str | Path,
    text: Text,
    *,
    splats: SplatConfig | None = None,
    seed: int = 0,
    tokens: int = 32768,
    progress: Progress = iter,
) -> FitReport:
    """Writes a checkpoint whose splats start at what the exact model does on a text; all or nothing.

    A splat s contributes to the weight of a key k for a query q the product

        phi_s(q) phi_s(k) = exp(-|q - k|^2 / (4 sigma^2)) exp(-|c_s - (q + k) / 2|^2 / sigma^2)

    so it serves pairs whose midpoint is near its centre. The centres are therefore clusters of the midpoints of pairs
    drawn by the weights of exact attention. Where centres are dense, the sum over splats is proportional to the first
    factor. A `norm_gain` starts at 1 / (4 sigma^2), which turns that factor into exp(q . k / (2 sigma^2)). With
    sigma^2 = 1/2, this is the exp(q . k) of exact attention.

    All splats of a head share one sigma, at which attention through them alone has the mean entropy of exact attention.
    A `far_gain` gives far keys that are not kept the mass that they have in exact attention. Log-amplitudes start at 0.
    What makes a key important is its norm, or what `gsa_jax.fitting.importance` learns if that is configured.

    Args:
        folder: a checkpoint, with splats, which are replaced, or without.
        out: the checkpoint folder to make; must not exist.
        text: documents, as `gsa_jax.text_files` reads them.
        splats: what to attach; as the checkpoint has them if None, or the preset `hybrid` if it has none.
        seed: in [0, 2**32), of the clusters and of the rows that are looked at; the same seed gives the same bits.
        tokens: of the text to use, rounded up to whole rows.
        progress: wraps the names of the layers.

    Raises:
        InputError: the checkpoint or the text cannot be used, or the output cannot be written. Nothing is left behind.
    """
    folder, out, text = Path(folder), Path(out), as_text_files(text)
    refuse_existing(out)
    require_seed(seed)
    stored, tensors = load_tensors(folder)
    config = dataclasses.replace(stored, splats=splats or default_splats(stored))
    assert config.splats is not None
    if not config.splats.has_splats and not (config.splats.keeps and config.splats.importance == "learned"):
        raise InputError("num_splats = 0 leaves nothing to fit; give at least one splat per head")
    input_ids, mask = calibration_tokens(folder, text, config, tokens)
    plain, kept = without_splats(config, tensors)
    fitted: dict[str, np.ndarray] = {}
    heads: list[HeadFit] = []
    importances: list[HeadImportance] = []
    layers = fit_layers(build_model(plain, kept), config, input_ids, mask, seed)
    for _ in progress([f"layer {layer}" for layer in config.splat_layers]):
        layer, layer_splats, layer_heads, layer_importances = next(layers)
        for term in dataclasses.fields(layer_splats):
            array = getattr(layer_splats, term.name)
            if array is not None:
                fitted[attention_tensor(layer, f"splat_{term.name}")] = np.asarray(array)
        heads.extend(layer_heads)
        importances.extend(layer_importances)
    return _saved(folder, out, text, config, kept, fitted, mask, seed, heads, importances)


def _saved(
    folder: Path,
    out: Path,
    text: TextFiles,
    config: GPTNeoConfig,
    weights: dict[str, np.ndarray],
    fitted: dict[str, np.ndarray],
    mask: Bool[np.ndarray, "N T"],
    seed: int,
    heads: list[HeadFit],
    importances: list[HeadImportance],
) -> FitReport:
    """The report, written with the checkpoint."""
    assert config.splats is not None
    fitted = {name: fitted[name] for name in expected_shapes(config) if is_splat(name)}
    report = FitReport(text.name, int(mask.sum()), seed, config.splats, tuple(heads), tuple(importances))
    conversion = [folder / REPORT_FILE] if (folder / REPORT_FILE).is_file() else []
    reports = {FIT_REPORT_FILE: dataclasses.asdict(report)}
    save(out, config, weights | fitted, copied=[*tokenizer_files(folder), *conversion], reports=reports)
    return report


def fit_importance_anew(
    folder: str | Path,
    out: str | Path,
    text: Text,
    *,
    splats: SplatConfig | None = None,
    seed: int = 0,
    tokens: int = 131072,
    progress: Progress = iter,
) -> FitReport:
    """Writes a checkpoint with the splats of another, and with importance learned for them; all or nothing.

    Worth it after a distillation: what keeping a key saves is what the splats get wrong, and trained ones get other
    keys wrong than those that importance was learned for.

    Args:
        folder: a checkpoint with splats.
        out, text, seed, progress: as in `fit_init`.
        tokens: as in `fit_init`, but more of them, because long rows say the most and are few.
        splats: what the checkpoint has, save for another window or another number of kept keys; as it has if None.

    Raises:
        InputError: as `fit_init`; or the checkpoint has no splats, keeps no keys, or has others than `splats` says.
    """
    folder, out, text = Path(folder), Path(out), as_text_files(text)
    refuse_existing(out)
    require_seed(seed)
    stored, tensors = load_tensors(folder)
    splats = splats or stored.splats
    if splats is None or stored.splats is None:
        raise InputError(f"{folder}: has no splats; attach and fit them first: gsa fit-init")
    if not splats.keeps:
        raise InputError(f"{folder}: keeps no keys, so none is important; say how many with --kept")
    splats = dataclasses.replace(splats, importance="learned")
    config = dataclasses.replace(stored, splats=splats)
    if dataclasses.replace(splats, window=0, kept=1, importance="norm") != dataclasses.replace(
        stored.splats, window=0, kept=1, importance="norm"
    ):
        raise InputError(f"{folder}: has other splats than asked for, and only importance is to be fitted")
    input_ids, mask = calibration_tokens(folder, text, config, tokens)
    plain, weights = without_splats(stored, tensors)
    trained = build_model(stored, tensors).transformer.h
    fitted = {name: tensor for name, tensor in tensors.items() if is_splat(name)}
    importances: list[HeadImportance] = []
    layers = projections(build_model(plain, weights), input_ids, mask, config.splat_layers)
    for _ in progress([f"layer {layer}" for layer in config.splat_layers]):
        layer, projected = next(layers)
        attention = trained[layer].attn.attention
        there = (
            attention.splats
            if isinstance(attention, GSASelfAttention)
            else no_splats(config.num_heads, config.head_dim)
        )
        found, of_layer = _learned(config, layer, projected, mask, there, plain.windows[layer], seed)
        fitted[attention_tensor(layer, "splat_importance")] = np.asarray(found)
        importances.extend(of_layer)
    return _saved(folder, out, text, config, weights, fitted, mask, seed, [], importances)


def default_splats(config: GPTNeoConfig) -> SplatConfig:
    """What is fitted if nobody says: the splats that the model has, or the preset `hybrid` if it has none."""
    return config.splats or SPLAT_PRESETS["hybrid"]


def fit_layers(
    model: GPTNeoForCausalLM,
    config: GPTNeoConfig,
    input_ids: Int[np.ndarray, "N T"],
    attention_mask: Bool[np.ndarray, "N T"],
    seed: int,
) -> Iterator[tuple[int, Splats, list[HeadFit], list[HeadImportance]]]:
    """Splats, float32, and the reports of one layer after another; layers of no splats have no centres.

    Args:
        model: with exact attention.
        config: the configuration that the splats are for.

    Raises:
        InputError: there are fewer queries and keys than splats, or the model computes numbers that are not finite.
    """
    for layer, projected in projections(model, input_ids, attention_mask, config.splat_layers):
        yield layer, *fit_layer(config, layer, projected, attention_mask, model.config.windows[layer], seed)


def fit_layer(
    config: GPTNeoConfig,
    layer: int,
    projected: Projections,
    attention_mask: Bool[np.ndarray, "N T"],
    seen: Window,
    seed: int,
) -> tuple[Splats, list[HeadFit], list[HeadImportance]]:
    """Splats of one layer, and its reports.

    Args:
        seen: what exact attention sees there.

    Raises:
        InputError: as `fit_layers`.
    """
    assert config.splats is not None
    if not all(np.isfinite(x[attention_mask]).all() for x in projected):
        raise InputError(f"layer {layer}: queries, keys or values are not finite; the checkpoint's weights are damaged")
    own = config.layer_splats[layer]
    rows = take_rows(sample_rows(attention_mask, seed), projected, attention_mask)
    clusters = jnp.zeros((config.num_heads, 0, config.head_dim)), jnp.zeros(config.num_heads)
    if own.num_splats:
        draws, starts = jax.random.split(jax.random.fold_in(jax.random.key(seed), layer))
        midpoints = attended_midpoints(draws, *projected[:2], attention_mask, seen=seen)[attention_mask]
        clusters = kmeans(starts, midpoints.swapaxes(0, 1), own.num_splats)
    fit = functools.partial(_fit_terms, layer, rows, *clusters, seen, own, config.splats)
    splats, heads = fit(None)
    if config.splats.importance == "norm":
        return splats, heads, []
    weights, importances = _learned(config, layer, projected, attention_mask, splats, seen, seed)
    if importances:
        splats, heads = fit(weights)
    return dataclasses.replace(splats, importance=weights), heads, importances


def _learned(
    config: GPTNeoConfig,
    layer: int,
    projected: Projections,
    attention_mask: Bool[np.ndarray, "N T"],
    splats: Splats,
    seen: Window,
    seed: int,
) -> tuple[Float[Array, "H F"], list[HeadImportance]]:
    """Weights of importance; those of the norm, and no reports, where no key is kept."""
    own = config.layer_splats[layer]
    if not own.kept or own.window == "all":
        return jnp.zeros((config.num_heads, 2 * config.head_dim + 1)).at[:, -1].set(1), []
    many = take_rows(sample_rows(attention_mask, seed + 1, **_TO_LEARN_FROM), projected, attention_mask)
    return fit_importance(layer, many, splats, window=own.window, kept=own.kept, seen=seen)


def _fit_terms(
    layer: int,
    rows: AttentionRows,
    centers: Float[Array, "H S D"],
    inertia: Float[Array, "H"],
    seen: Window,
    own: LayerSplats,
    terms: SplatConfig,
    weights: Float[Array, "H F"] | None,
) -> tuple[Splats, list[HeadFit]]:
    """Scales and optional terms for centres.

    Args:
        seen: what exact attention sees.
        weights: of the importance of keys; the norm if None.
    """
    if not own.num_splats:
        return no_splats(len(centers), centers.shape[-1]), []
    everything = far_keys(rows, None, 0, 0)
    far = everything if own.window == "all" else far_keys(rows, weights, own.window, own.kept)

    def at_scale(log_scale: np.ndarray) -> Splats:
        log_scales = jnp.broadcast_to(jnp.asarray(log_scale, jnp.float32)[:, None], centers.shape[:2])
        return Splats(
            centers,
            log_scales,
            log_amplitudes=jnp.zeros_like(log_scales) if terms.log_amplitudes else None,
            norm_gain=jnp.exp(-2 * log_scales[:, 0]) / 4 if terms.norm_gain else None,
        )

    def entropy(log_scale: np.ndarray) -> np.ndarray:
        return np.asarray(splat_statistics(rows, at_scale(log_scale), everything).entropy)

    teacher = jax.tree.map(np.asarray, exact_statistics(rows, far, seen=seen))
    target = np.clip(teacher.entropy, *ENTROPY_BAND)
    norm = jnp.sqrt(jnp.mean(jnp.sum(rows.query**2, axis=-1), axis=(0, 1)))
    log_scale = _bisect(entropy, target, *(np.log(bound * np.asarray(norm)) for bound in _SCALE_RANGE))
    splats, reached = at_scale(log_scale), entropy(log_scale)
    if terms.far_gain:
        splats = dataclasses.replace(splats, far_gain=_far_gain(rows, splats, teacher.far_mass, far))
    usage = np.asarray(splat_statistics(rows, splats, far).usage)
    columns = (
        np.exp(log_scale),
        teacher.entropy,
        target,
        reached,
        np.asarray(inertia),
        effective_splats(usage),
        dead_splats(usage),
        np.full(len(centers), None) if splats.far_gain is None else np.asarray(splats.far_gain),
    )
    values = zip(*(column.tolist() for column in columns), strict=True)
    return splats, [HeadFit(layer, head, *of_head) for head, of_head in enumerate(values)]


def _far_gain(
    rows: AttentionRows, splats: Splats, teacher_mass: Float[np.ndarray, "H"], far: Bool[Array, "N H R T"]
) -> Float[Array, "H"]:
    """The gain that gives far keys the mass they have in exact attention; 0 where all keys are far, or none is."""
    if bool(jnp.all(far == far_keys(rows, None, 0, 0))):
        return jnp.zeros(teacher_mass.shape)

    def mass(gain: np.ndarray) -> np.ndarray:
        gained = dataclasses.replace(splats, far_gain=jnp.asarray(gain, jnp.float32))
        return np.asarray(splat_statistics(rows, gained, far).far_mass)

    low, high = (np.full(teacher_mass.shape, bound) for bound in _GAIN_RANGE)
    most = mass(high)  # not 1: many rows have no far key
    least_share, most_share = _FAR_SHARE_BAND
    gain = _bisect(mass, np.clip(teacher_mass, least_share * most, most_share * most), low, high)
    return jnp.asarray(np.where(most > 0, gain, 0), jnp.float32)


def _bisect(
    reached: Callable[[np.ndarray], np.ndarray], target: np.ndarray, low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Where `reached`, which rises from below `target` to above it, crosses `target`; one search per element."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = reached(middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2
