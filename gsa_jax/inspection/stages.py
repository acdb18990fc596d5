"""The splats of one model at several times: of another checkpoint, of the saved steps of a run, of the model itself.

May be changed here: where earlier splats are taken from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from gsa_jax.checkpoint import load_tensors
from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.parameters import attention_tensor, is_splat
from gsa_jax.train.checkpoints import saved_parameters
from gsa_jax.train.run_folder import MODEL_FOLDER, RUN_FILE, STEPS_FOLDER


class Stage(NamedTuple):
    """Splats at one time, by layer, float64."""

    name: str
    centers: dict[int, Float[np.ndarray, "H S D"]]
    log_scales: dict[int, Float[np.ndarray, "H S"]]


def model_folder(folder: Path) -> Path:
    """The checkpoint in a folder that is one, or that is the run of a training.

    Raises:
        InputError: the run has made no model yet.
    """
    if not (folder / RUN_FILE).exists():
        return folder
    if not (folder / MODEL_FOLDER).exists():
        raise InputError(f"{folder}: the run has no model yet; let it come to its end, or inspect where it began")
    return folder / MODEL_FOLDER


def stages(folder: Path, compare: Path | None, config: GPTNeoConfig, tensors: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The splats of `compare`, of the saved steps if `folder` is a run, and the model's own, in this order.

    Args:
        tensors: of the model.

    Raises:
        InputError: a checkpoint cannot be read, or has other layers, heads or numbers of splats than the model.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    if compare is not None:
        found.append((str(compare), load_tensors(model_folder(compare))[1]))
    if (folder / RUN_FILE).exists():
        steps = saved_parameters(folder / STEPS_FOLDER, is_splat)
        found += [(f"step {step:,}", tensors_then) for step, tensors_then in steps.items()]
    return tuple(_stage(name, then, config) for name, then in [*found, (str(folder), tensors)])


def _stage(name: str, tensors: Mapping[str, Any], config: GPTNeoConfig) -> Stage:
    layers = [layer for layer, own in config.layer_splats.items() if own.num_splats]

    def of_layers(leaf: str, axes: int) -> dict[int, np.ndarray]:
        taken = {}
        for layer in layers:
            own = config.layer_splats[layer]
            tensor = tensors.get(attention_tensor(layer, leaf))
            expected = (config.num_heads, own.num_splats, config.head_dim)[:axes]
            if tensor is None or tensor.shape != expected:
                has = "none" if tensor is None else f"{list(tensor.shape)}"
                raise InputError(
                    f"{name}: its splats cannot be compared, layer {layer} has {leaf} {list(expected)} in the model "
                    f"and {has} there; give a checkpoint with the same layers, heads and splats"
                )
            taken[layer] = np.asarray(tensor, np.float64)
        return taken

    return Stage(name, of_layers("splat_centers", 3), of_layers("splat_log_scales", 2))
