"""The models that an evaluation compares: the exact one, the one with splats, and controls.

May be changed here: which arms are compared, and how they are made of a checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from gsa_jax.checkpoint import load_tensors
from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.parameters import PositionExtension, attention_tensor, expected_shapes, extend_positions
from gsa_jax.splat_config import Window
from gsa_jax.tokenizer_folder import open_tokenizer

if TYPE_CHECKING:
    from gsa_jax.tokenizer import Tokenizer

ARMS = ("exact", "hybrid", "without-splats", "without-kept", "window-only", "none")
"""What splat layers see: all keys exactly; keys as configured; window and kept keys; window and splats; the window
alone; nothing (values are 0)."""

Arm = tuple[GPTNeoConfig, Mapping[str, Any]]
"""Configuration and parameters of an ordinary model, in memory of numpy or JAX."""

_TOKENS_AT_ONCE = 4096
"""Tokens whose logits are in memory together; a longer row runs alone."""

_WITHOUT = {
    "without-splats": {"num_splats": 0},
    "without-kept": {"kept": 0},
    "window-only": {"num_splats": 0, "kept": 0},
}
"""What these arms do not have of the splat layers' numbers."""

NOTHING_KEPT = "without-splats and without-kept are left out: no keys are kept, so they are window-only and hybrid"
NO_SPLATS = "without-splats and without-kept are left out: there are no splats, so they are hybrid and window-only"


def load_arms(
    folder: str | Path,
    *,
    window: Window | None = None,
    kept: int | None = None,
    max_positions: int | None = None,
    position_extension: PositionExtension = "interpolate",
    reference: str | Path | None = None,
) -> tuple[dict[str, Arm], Tokenizer, int]:
    """The arms of a checkpoint, its tokenizer, and how many positions it has as stored.

    A checkpoint without splats has one arm, the exact one.

    Args:
        window: tokens that splat layers attend to exactly; as stored if None.
        kept: keys beyond the window that each of their heads sees exactly; as stored if None.
        max_positions: positions of every arm, as `gsa_jax.parameters.extend_positions` makes them; as stored if None.
        position_extension: how it makes them.
        reference: checkpoint of the model to be the exact arm, e.g. one trained on the same tokens; its own splats, if
            it has any, are not used. The checkpoint's own exact model if None.

    Raises:
        InputError: a checkpoint or tokenizer cannot be used; there are no splats to compare a reference with; the
            window is `"all"`; the positions are fewer than the checkpoint's; or the reference has another vocabulary.
    """
    stored, tensors = load_tensors(folder)
    config = stored.with_window(window, kept)
    tokenizer = open_tokenizer(folder)
    exact = None if reference is None else load_tensors(reference)
    if reference is not None and open_tokenizer(reference).get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{reference}: its tokenizer has another vocabulary than that of {folder}; give a reference "
            "with the same one"
        )
    if max_positions is not None:
        config, tensors = extend_positions(config, tensors, max_positions, position_extension)
        if exact is not None and exact[0].max_position_embeddings < max_positions:
            exact = extend_positions(*exact, max_positions, position_extension)
    if config.splats is None and exact is None:
        return {"exact": (config, tensors)}, tokenizer, stored.max_position_embeddings
    return make_arms(config, tensors, exact), tokenizer, stored.max_position_embeddings


def make_arms(config: GPTNeoConfig, tensors: Mapping[str, Any], reference: Arm | None = None) -> dict[str, Arm]:
    """The models to compare, by their names in `ARMS`; without those that `left_out` names.

    Args:
        reference: the model to be the exact arm, without its splats if it has any; the same weights if None.

    Raises:
        InputError: there are no splats, the window is `"all"`, or the reference has another vocabulary or too few
            positions.
    """
    splats = config.splats
    if splats is None or not (splats.has_splats or splats.keeps):
        raise InputError("the checkpoint has no splats to evaluate; attach and fit them first: gsa fit-init")
    if splats.window == "all":
        raise InputError("with a window of all tokens the splats are unused; give a number of tokens: --window W")
    exact = config.with_window("all")
    arms: dict[str, Arm] = {"exact": (exact, tensors)}
    if reference is not None:
        _check_reference(reference[0], config)
        arms["exact"] = reference[0].with_window("all"), reference[1]
    arms["hybrid"] = config, tensors
    for name, change in _WITHOUT.items():
        is_another = name == "window-only" or (splats.keeps and splats.has_splats)
        if is_another and not _is_blind(config, change):
            arms[name] = _with(config, tensors, change)
    of_values = [attention_tensor(n, f"v_proj.{leaf}") for n in config.splat_layers for leaf in ("weight", "bias")]
    nothing = {name: jnp.zeros_like(tensors[name]) for name in of_values if name in tensors}
    arms["none"] = (exact, {**tensors, **nothing})
    return arms


def left_out(config: GPTNeoConfig) -> tuple[str, ...]:
    """Which arms a configuration does not have, and why."""
    assert config.splats is not None, "arms are of a model with splats"
    told = {NOTHING_KEPT: not config.splats.keeps, NO_SPLATS: not config.splats.has_splats}
    notes = [note for note, is_so in told.items() if is_so]
    for name, change in _WITHOUT.items():
        if (name == "window-only" or not notes) and _is_blind(config, change):
            notes.append(f"{name} is left out: with a window of 0 it has nothing to attend to")
    return tuple(notes)


def _is_blind(config: GPTNeoConfig, change: Mapping[str, int]) -> bool:
    """Whether a splat layer would have nothing to attend to with these numbers instead of its own."""
    return any(not any(layer._replace(**change)) for layer in config.layer_splats.values())


def _with(config: GPTNeoConfig, tensors: Mapping[str, Any], change: Mapping[str, int]) -> Arm:
    """The model with other numbers of splats or kept keys, and with the parameters that it still has."""
    assert config.splats is not None, "arms are of a model with splats"
    config = dataclasses.replace(config, splats=dataclasses.replace(config.splats, **change))
    return config, {name: tensors[name] for name in expected_shapes(config)}


def _check_reference(reference: GPTNeoConfig, config: GPTNeoConfig) -> None:
    if reference.vocab_size != config.vocab_size:
        raise InputError(
            f"the reference has a vocabulary of {reference.vocab_size}, the checkpoint one of {config.vocab_size}; "
            "give a reference with the same one"
        )
    if reference.max_position_embeddings < config.max_position_embeddings:
        raise InputError(
            f"the reference has {reference.max_position_embeddings} positions, fewer than the checkpoint's "
            f"{config.max_position_embeddings}; extend it: --max-positions {config.max_position_embeddings}"
        )


def rows_at_once(length: int, batch_size: int) -> int:
    """How many rows of `length` tokens run together: fewer than `batch_size` where memory would grow with it."""
    return max(1, min(batch_size, _TOKENS_AT_ONCE // length))
