"""How a number of bytes of state is spent over layers: splats, window and kept keys of each.

Each way to spend on a layer is judged by the squared error that it makes on the layer's output of attention, on sampled
rows, times what such an error costs the model. That price is measured, one layer at a time: how much the loss rises on
calibration text with splats in this layer alone, divided by the error there. Costs of layers are added up. A small
error costs another price than a large one, so prices are measured once more at what the first ones chose.

May be changed here: what may be chosen, and how it is judged.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gsa_jax.attention import state_bytes
from gsa_jax.checkpoint import load_tensors
from gsa_jax.config import GPTNeoConfig, require_seed
from gsa_jax.errors import InputError
from gsa_jax.evaluation.perplexity import cross_entropy
from gsa_jax.fitting.placing import fit_layer, fit_layers, splat_tensors
from gsa_jax.fitting.statistics import (
    AttentionRows,
    Projections,
    calibration_tokens,
    far_keys,
    near_scores,
    projections,
    sample_rows,
    splat_scores,
    take_rows,
)
from gsa_jax.parameters import attention_tensor, build_model, expected_shapes, without_splats
from gsa_jax.progress import Progress
from gsa_jax.splat_config import LayerSplats, SplatConfig
from gsa_jax.text import TextRows
from gsa_jax.text_files import Text

SPLATS = (0, 8, 16, 32, 64, 128)
WINDOWS = (4, 8, 16, 32, 64, 128, 256)
KEPT = (0, 8, 16, 32, 64, 128)
"""What a layer can have."""

_PRICED = LayerSplats(16, 16, 0)
"""What a layer has when its price is first measured: little, so that the loss rises by more than noise."""

_LEAST_PRICE = 0.1
"""Of the first one, below which no second one falls: rises may then be as small as noise."""

_TOKENS = 16384
"""Of the text that is chosen by; as many again are compared on."""

_ROWS_PER_SEQUENCE = 16
_GAIN_RANGE = (-60.0, 60.0)
_BISECTIONS = 16

Choice = tuple[LayerSplats, ...]
"""What each layer with splats gets."""


@dataclasses.dataclass(frozen=True)
class LayerBudget:
    """What one layer gets.

    Attributes:
        price: nats per token that the loss rises for each unit of squared error of the layer's output of attention,
            relative to the square of the output.
        bytes: of its state.
        error: that is expected, in that unit.
    """

    layer: int
    splats: LayerSplats
    price: float
    bytes: int
    error: float


@dataclasses.dataclass(frozen=True)
class Budget:
    """How a budget is spent.

    Attributes:
        budget: bytes that all layers together may take.
        layers: what each gets by its price.
        uniform: the best of what is the same for all layers, and within the budget too.
        rise: of the loss, in nats per token, with these layers, on text that nothing was chosen by.
        uniform_rise: with the uniform ones.
        splats: the configuration: that of the layers, or the uniform one if it measured better.
    """

    budget: int
    layers: tuple[LayerBudget, ...]
    uniform: LayerSplats
    rise: float
    uniform_rise: float
    splats: SplatConfig


def spend(
    folder: str | Path,
    text: Text,
    budget: int,
    *,
    splats: SplatConfig,
    seed: int = 0,
    progress: Progress = iter,
) -> Budget:
    """Chooses splats, windows and kept keys for the layers of a checkpoint within a number of bytes.

    Args:
        text: documents to calibrate on, as `gsa_jax.text_files` reads them.
        budget: bytes of state of one text, float32, over all layers with splats.
        splats: which layers have splats, and with which terms; its numbers do not matter.
        seed: of clusters and rows.
        progress: wraps the names of the steps.

    Raises:
        InputError: the budget is too small for a splat in each layer; the text is so short that a window and kept keys
            hold all of it; or the checkpoint or the text cannot be used.
    """
    require_seed(seed)
    stored, tensors = load_tensors(folder)
    config = with_choice(stored, splats, [_PRICED])
    layers = config.splat_layers
    sizes = {option: _layer_bytes(config, option) for option in map(LayerSplats._make, _options())}
    least = len(layers) * min(size for option, size in sizes.items() if option.num_splats)
    if budget < least:
        raise InputError(
            f"state budget = {budget:,} bytes: too small for splats in {len(layers)} layers; give at least {least:,}"
        )
    ids, mask = calibration_tokens(Path(folder), text, config, 2 * _TOKENS)
    if len(ids) < 2:
        raise InputError(f"{text}: one row is not enough to choose by and to compare on; give more text")
    half = min(int(np.searchsorted(np.cumsum(mask.sum(axis=1)), mask.sum() // 2)) + 1, len(ids) - 1)
    chosen_by, held_out = (
        TextRows(ids[part], mask[part], np.arange(len(ids))[part]) for part in (slice(half), slice(half, None))
    )
    plain, weights = without_splats(config, tensors)
    model = build_model(plain, weights)

    def loss(config: GPTNeoConfig, rows: TextRows) -> float:
        fitted = dict(weights)
        if config.splats is not None:
            for layer, of_layer, *_ in fit_layers(model, config, chosen_by.input_ids, chosen_by.attention_mask, seed):
                fitted |= splat_tensors(layer, of_layer)
        return cross_entropy((config, {name: fitted[name] for name in expected_shapes(config)}), rows)

    exact = loss(plain, chosen_by)
    errors: dict[int, dict[LayerSplats, float]] = {}
    prices: dict[int, float] = {}

    def price(layer: int, at: LayerSplats) -> float:
        alone = dataclasses.replace(splats, layers=(layer,))
        return (loss(with_choice(stored, alone, [at]), chosen_by) - exact) / errors[layer][at]

    def choose() -> tuple[Choice, LayerSplats]:
        costs = {layer: {x: prices[layer] * error for x, error in errors[layer].items()} for layer in layers}
        same = [x for x, size in sizes.items() if size * len(layers) <= budget]
        uniform = min(same, key=lambda x: sum(of_layer[x] for of_layer in costs.values()))
        return cheapest(list(costs.values()), sizes, budget), uniform

    steps = iter(progress([*(f"layer {layer}" for layer in layers), "prices", "comparison"]))
    for layer in layers:
        next(steps)
        _, projected = next(projections(model, chosen_by.input_ids, chosen_by.attention_mask, (layer,)))
        errors[layer] = _layer_errors(config, layer, projected, chosen_by, weights, list(sizes), seed)
        if not errors[layer][_PRICED]:
            raise InputError(
                f"{text}: no row is longer than {_PRICED.window} tokens, so splats are never used; give longer text"
            )
        prices[layer] = max(price(layer, _PRICED), 1e-6)
    next(steps)
    first, _ = choose()
    for layer, at in zip(layers, first, strict=True):
        if errors[layer][at]:  # otherwise everything is seen exactly, at any price
            prices[layer] = max(price(layer, at), _LEAST_PRICE * prices[layer])
    next(steps)
    best, uniform = choose()
    exact = loss(plain, held_out)
    rise = loss(with_choice(stored, splats, best), held_out) - exact
    uniform_rise = loss(with_choice(stored, splats, [uniform]), held_out) - exact
    next(steps, None)  # ends the progress
    chosen = with_splats(splats, best if rise < uniform_rise else [uniform])
    if not (chosen.has_splats or chosen.keeps):
        raise InputError(f"{text}: a window within {budget:,} bytes holds all of it; give longer text, or fewer bytes")
    return Budget(
        budget=budget,
        layers=tuple(
            LayerBudget(layer, of_layer, prices[layer], sizes[of_layer], errors[layer][of_layer])
            for layer, of_layer in zip(layers, best, strict=True)
        ),
        uniform=uniform,
        rise=rise,
        uniform_rise=uniform_rise,
        splats=chosen,
    )


def with_splats(splats: SplatConfig, choice: Sequence[LayerSplats]) -> SplatConfig:
    """The configuration with these numbers; of one layer, they are those of all."""
    columns = zip(*choice, strict=True)
    numbers = [column[0] if len(set(column)) == 1 else tuple(column) for column in columns]
    return dataclasses.replace(splats, **dict(zip(LayerSplats._fields, numbers, strict=True)))


def with_choice(config: GPTNeoConfig, splats: SplatConfig, choice: Sequence[LayerSplats]) -> GPTNeoConfig:
    """The model's configuration with these splats and numbers."""
    return dataclasses.replace(config, splats=with_splats(splats, choice))


def cheapest(
    costs: Sequence[Mapping[LayerSplats, float]], sizes: Mapping[LayerSplats, int], budget: int
) -> tuple[LayerSplats, ...]:
    """One way to spend for each layer, with the least sum of costs whose bytes are within the budget.

    Layers are added one by one; of all ways to spend on those so far, only the ones are kept that no other one beats
    both in bytes and in cost.
    """
    ways: list[tuple[int, float, tuple[LayerSplats, ...]]] = [(0, 0.0, ())]
    for of_layer in costs:
        longer = sorted(
            (size + sizes[x], cost + of_layer[x], (*choice, x))
            for (size, cost, choice), x in itertools.product(ways, of_layer)
            if size + sizes[x] <= budget
        )
        ways = []
        for way in longer:
            if not ways or way[1] < ways[-1][1]:
                ways.append(way)
    return ways[-1][2]


def _options() -> list[tuple[int, int, int]]:
    return list(itertools.product(SPLATS, WINDOWS, KEPT))


def _layer_bytes(config: GPTNeoConfig, option: LayerSplats) -> int:
    assert config.splats is not None
    alone = dataclasses.replace(config.splats, layers=config.splat_layers[:1])
    return state_bytes(with_choice(config, alone, [option]))


def _layer_errors(
    config: GPTNeoConfig,
    layer: int,
    projected: Projections,
    text: TextRows,
    weights: Mapping[str, np.ndarray],
    options: Sequence[LayerSplats],
    seed: int,
) -> dict[LayerSplats, float]:
    """The error of a layer's output of attention for each option."""
    assert config.splats is not None
    seen = dataclasses.replace(config, splats=None).windows[layer]
    sample = sample_rows(text.attention_mask, seed, per_sequence=_ROWS_PER_SEQUENCE)
    rows = take_rows(sample, projected, text.attention_mask)
    out_proj = jnp.asarray(weights[attention_tensor(layer, "out_proj.weight")], jnp.float32)
    exact = near_scores(rows, seen=seen)
    near = near_scores(rows, seen="all")
    importance = None
    errors: dict[LayerSplats, float] = {}
    for count in sorted({option.num_splats for option in options}, reverse=True):
        alone = dataclasses.replace(config.splats, layers=(layer,), importance="norm")
        if importance is None and config.splats.importance == "learned":
            alone = dataclasses.replace(alone, importance="learned")
        placed = with_choice(config, alone, [LayerSplats(count, _PRICED.window, KEPT[-1] // 4)])
        splats, *_ = fit_layer(placed, layer, projected, text.attention_mask, seen, seed)
        importance = splats.importance if importance is None else importance
        bare = dataclasses.replace(splats, far_gain=None, importance=None)
        far = splat_scores(rows, bare)
        for option in options:
            if option.num_splats == count:
                assert option.window != "all", "what may be chosen is finite"
                numbers = option.window, option.kept
                error = _error(rows, exact, near, far, importance, out_proj, *numbers, has_gain=config.splats.far_gain)
                errors[option] = float(error)
    return errors


@functools.partial(jax.jit, static_argnames="has_gain")
def _error(
    rows: AttentionRows,
    exact: Float[Array, "N H R T"],
    near: Float[Array, "N H R T"],
    far: Float[Array, "N H R T"],
    importance: Float[Array, "H F"] | None,
    out_proj: Float[Array, "E E"],
    window: int | Int[Array, ""],
    kept: int | Int[Array, ""],
    has_gain: bool,
) -> Float[Array, ""]:
    """Squared error of the layer's output of attention, relative to the output.

    Args:
        exact: scores of exact attention.
        near: exact scores of all keys.
        far: scores through splats.
        importance: as `Splats.importance`.
        has_gain: whether there is a far gain: the one at which far keys have the mass that exact attention gives them.
    """
    through = far_keys(rows, importance, window, kept)
    wanted = jax.nn.softmax(exact, axis=-1)

    def weights(gain: jax.Array) -> jax.Array:
        return jax.nn.softmax(jnp.where(through, far + gain[:, None, None], near), axis=-1)

    def mass(weights: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sum(jnp.where(through, weights, 0), axis=-1), axis=(0, 2))

    def halve(_: int | jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        below = mass(weights(middle)) < mass(wanted)
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    bounds = tuple(jnp.full(far.shape[1], bound if has_gain else 0.0) for bound in _GAIN_RANGE)
    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, bounds)

    def output(weights: jax.Array) -> jax.Array:
        of_heads = jnp.einsum("nhrt,nthd->nrhd", weights, rows.value, precision=jax.lax.Precision.HIGHEST)
        return jnp.matmul(of_heads.reshape(*of_heads.shape[:2], -1), out_proj.T, precision=jax.lax.Precision.HIGHEST)

    error = output(weights((low + high) / 2) - wanted)
    return jnp.sum(jnp.square(error)) / jnp.sum(jnp.square(output(wanted)))
