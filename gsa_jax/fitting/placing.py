"""Splats that start where a model's queries and keys are.

May be changed here: how centres, scales and far gains of a layer are chosen from its queries and keys. Measuring those
is `statistics`; making a checkpoint of what is chosen is `fitted`; training from here on is `gsa_jax.train`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.fitting.importance import HeadImportance, fit_importance
from gsa_jax.fitting.kmeans import kmeans
from gsa_jax.fitting.statistics import (
    AttentionRows,
    Projections,
    attended_midpoints,
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
from gsa_jax.parameters import attention_tensor
from gsa_jax.splat_config import LayerSplats, SplatConfig, Window

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


def splat_tensors(layer: int, splats: Splats) -> dict[str, np.ndarray]:
    """The parameters of a layer's splats by their names."""
    terms = {field.name: getattr(splats, field.name) for field in dataclasses.fields(splats)}
    return {
        attention_tensor(layer, f"splat_{name}"): np.asarray(term) for name, term in terms.items() if term is not None
    }


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
    weights, importances = learn_importance(config, layer, projected, attention_mask, splats, seen, seed)
    if importances:
        splats, heads = fit(weights)
    return dataclasses.replace(splats, importance=weights), heads, importances


def learn_importance(
    config: GPTNeoConfig,
    layer: int,
    projected: Projections,
    attention_mask: Bool[np.ndarray, "N T"],
    splats: Splats,
    seen: Window,
    seed: int,
) -> tuple[Float[Array, "H F"], list[HeadImportance]]:
    """Weights of importance of a layer's heads, and its reports; those of the norm, and none, where no key is kept.

    Args:
        splats: that the far keys which are not kept go through.
        seen: what exact attention sees there.
    """
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
