"""Trained splats without the model that they were trained for: a folder with `config.json` and `splats.safetensors`.

May be changed here: this format. Tensors have the names that they have in a checkpoint; the configuration is that of
the model with its splats.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gsa_jax.config import CONFIG_FILE, GPTNeoConfig, read_config
from gsa_jax.errors import InputError
from gsa_jax.files import new_folder, refuse_foreign
from gsa_jax.parameters import expected_shapes, is_splat, shape_problems
from gsa_jax.splat_config import SplatConfig

SPLATS_FILE = "splats.safetensors"


def write_splats(out: Path, config: GPTNeoConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Writes the splats of a checkpoint's configuration and parameters into a new folder, and gives them back.

    Raises:
        InputError: there are none, or the folder cannot be written.
    """
    splats = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items() if is_splat(name)}
    if not splats:
        raise InputError("the checkpoint has no splats to export; leave --splats-only out")
    with new_folder(out, needed_bytes=sum(tensor.nbytes for tensor in splats.values())) as staging:
        save_file(splats, staging / SPLATS_FILE)
        (staging / SPLATS_FILE).chmod(0o644)  # the writer makes it private
        (staging / CONFIG_FILE).write_text(json.dumps(config.to_hf(), indent=2) + "\n", encoding="utf-8")
    return splats


def read_splats(folder: Path, model: GPTNeoConfig) -> tuple[SplatConfig, dict[str, np.ndarray]]:
    """Configuration and tensors of splats that were trained for this model.

    Raises:
        InputError: the folder holds no splats, is damaged, or they are for a model of another shape.
    """
    path = folder / SPLATS_FILE
    refuse_foreign(folder, [CONFIG_FILE, SPLATS_FILE])
    if not path.is_file():
        raise InputError(f"{folder}: no {SPLATS_FILE} in it; make it with gsa export CHECKPOINT OUT --splats-only")
    config = read_config(folder / CONFIG_FILE)
    if config.splats is None:
        raise InputError(f"{folder / CONFIG_FILE}: says nothing about splats")
    differing = [
        f"{field.name} is {getattr(model, field.name)!r} and was {getattr(config, field.name)!r}"
        for field in dataclasses.fields(model)
        if field.name != "splats" and getattr(model, field.name) != getattr(config, field.name)
    ]
    if differing:
        raise InputError(f"{folder}: its splats were trained for another model: {'; '.join(differing)}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged ({error})") from None
    expected = {name: shape for name, shape in expected_shapes(config).items() if is_splat(name)}
    problems = shape_problems(expected, {name: tensor.shape for name, tensor in tensors.items()})
    if problems:
        raise InputError(f"{path}: {'; '.join(problems)}")
    return config.splats, tensors
