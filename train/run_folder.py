"""The folder of a run, and its configuration, which a restart must repeat.

May be changed here: the layout of the folder, and which settings may differ from the first ones when a run goes on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.train.config import TrainConfig

RUN_FILE = "run.json"
STEPS_FOLDER = "steps"
MODEL_FOLDER = "model"

_FREE = ("out", "mesh", "eval_text", "eval_every", "eval_documents", "save_every", "keep", "tensorboard")
"""Settings that change nothing about what is learnt."""


def open_run(config: TrainConfig, model: GPTNeoConfig) -> dict[str, Any]:
    """Makes the folder of a run, or checks that the one there is of the same run; gives its resolved configuration.

    Raises:
        InputError: the folder holds something else, or a run with another configuration; all differences are named.
    """
    resolved = _resolved(config, model)
    path = config.out / RUN_FILE
    problem = None
    if jax.process_index() == 0:
        try:
            _check_or_make(path, resolved)
        except InputError as error:
            problem = str(error)
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.asarray(problem is not None)):
        problem = problem or f"{config.out}: cannot be used; see the message of process 0"
    if problem is not None:
        raise InputError(problem)
    return resolved


def _check_or_make(path: Path, resolved: dict[str, Any]) -> None:
    folder = path.parent
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists already and is not a run; choose another folder or remove it first")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staged = folder / f".{RUN_FILE}.partial"
            staged.write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")
            staged.rename(path)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror})") from None
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove the run to start again") from None
    before, now = dict(_flat(begun)), dict(_flat(resolved))
    differing = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name.split(".")[0] not in _FREE
    ]
    if differing:
        raise InputError(
            f"{folder}: holds a run with another configuration: {'; '.join(differing)}; "
            "repeat its command to go on, or choose another folder"
        )


def _resolved(config: TrainConfig, model: GPTNeoConfig) -> dict[str, Any]:
    values = {"recipe": config.recipe, **dataclasses.asdict(config), "model": model.to_hf()}
    return json.loads(json.dumps(values, default=str))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
