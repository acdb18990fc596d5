"""Checkpoints whose splats, or whose importance of keys, are fitted to a text: `gsa fit-init`.

May be changed here: what is fitted anew and what is taken over, what is refused, and what the report says. How a layer
is fitted is `placing`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from gsa_jax.attention import GSASelfAttention
from gsa_jax.checkpoint import load_tensors, save, travelling_files
from gsa_jax.config import GPTNeoConfig, require_seed
from gsa_jax.errors import InputError
from gsa_jax.files import refuse_existing
from gsa_jax.fitting.importance import HeadImportance
from gsa_jax.fitting.placing import HeadFit, fit_layers, learn_importance, splat_tensors
from gsa_jax.fitting.statistics import calibration_tokens, projections
from gsa_jax.ops import no_splats
from gsa_jax.parameters import attention_tensor, build_model, expected_shapes, is_splat, without_splats
from gsa_jax.progress import Progress
from gsa_jax.splat_config import SPLAT_PRESETS, SplatConfig
from gsa_jax.text_files import Text, TextFiles, as_text_files

FIT_REPORT_FILE = "fit_init.json"


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
    if not (config.splats.has_splats or config.splats.keeps):
        raise InputError("num_splats = 0 and kept = 0 leave nothing to fit; give each head a splat or a kept key")
    input_ids, mask = calibration_tokens(folder, text, config, tokens)
    plain, kept = without_splats(config, tensors)
    fitted: dict[str, np.ndarray] = {}
    heads: list[HeadFit] = []
    importances: list[HeadImportance] = []
    layers = fit_layers(build_model(plain, kept), config, input_ids, mask, seed)
    for _ in progress([f"layer {layer}" for layer in config.splat_layers]):
        layer, layer_splats, layer_heads, layer_importances = next(layers)
        fitted |= splat_tensors(layer, layer_splats)
        heads.extend(layer_heads)
        importances.extend(layer_importances)
    return _saved(folder, out, text, config, kept, fitted, mask, seed, heads, importances)


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
        found, of_layer = learn_importance(config, layer, projected, mask, there, plain.windows[layer], seed)
        fitted[attention_tensor(layer, "splat_importance")] = np.asarray(found)
        importances.extend(of_layer)
    return _saved(folder, out, text, config, weights, fitted, mask, seed, [], importances)


def default_splats(config: GPTNeoConfig) -> SplatConfig:
    """What is fitted if nobody says: the splats that the model has, or the preset `hybrid` if it has none."""
    return config.splats or SPLAT_PRESETS["hybrid"]


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
    reports = {FIT_REPORT_FILE: dataclasses.asdict(report)}
    save(out, config, weights | fitted, copied=travelling_files(folder), reports=reports)
    return report
