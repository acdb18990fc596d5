"""The folder of a run, and its configuration, which a restart must repeat.

May be changed here: the layout of the folder, and which settings may differ from the first ones when a run goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.files import refuse_existing, refuse_foreign, replace_text
from gsa_jax.json_files import read_json
from gsa_jax.train.config import TrainConfig

RUN_FILE = "run.json"
STEPS_FOLDER = "steps"
MODEL_FOLDER = "model"

CONTENT = "content"
"""In the configuration: fingerprints of what the run reads, by which it is known wherever it lies."""

_FREE = (
    "out", "mesh", "eval_text", "eval_every", "eval_documents", "save_every", "keep", "track", "profile", "tensorboard"
)  # fmt: skip
"""Settings that change nothing about what is learnt; the last one is `track` in runs of earlier versions."""

_PLACES = ("text", "text_field", "checkpoint", "tokenizer")
"""Where things are; what is there has a fingerprint."""


def fingerprint(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of parameters, their names and their dtypes, which tells a checkpoint from others."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        found.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        found.update(tensor.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def open_run(
    config: TrainConfig, model: GPTNeoConfig, content: Mapping[str, str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Makes the folder of a run, or checks that the one there is of the same run.

    A run may go on with more steps than it was begun with. The model of one that has ended is kept under another name.

    Args:
        content: fingerprints of the text and of the checkpoint that the run starts from.

    Returns:
        The resolved configuration, and what a user should know about going on.

    Raises:
        InputError: the folder holds something else, or a run with another configuration, text or checkpoint; all
            differences are named.
    """
    resolved = _resolved(config, model, content)
    path = config.out / RUN_FILE
    problem, notes = None, ()
    if jax.process_index() == 0:
        try:
            refuse_foreign(config.out, _own_names(config.out))  # a run writes into it as well
            if path.exists():
                notes = _go_on(path, resolved)
            else:
                _make(path, resolved)
        except InputError as error:
            problem = str(error)
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.asarray(problem is not None)):
        problem = problem or f"{config.out}: cannot be used; see the message of process 0"
    if problem is not None:
        raise InputError(problem)
    return resolved, notes


def _own_names(folder: Path) -> list[str]:
    """Of what is in a run, but for wandb's folder: it has links to logs elsewhere, and nothing here reads it."""
    if not os.path.isdir(folder):
        return ["."]
    return [x.name for x in folder.iterdir() if x.name != "wandb" or x.is_symlink()]


def _make(path: Path, resolved: dict[str, Any]) -> None:
    folder = path.parent
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already and is not a run; choose another folder or remove it first")
    _write(path, resolved)


def _write(path: Path, resolved: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(resolved, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made ({error.strerror})") from None


def _go_on(path: Path, resolved: dict[str, Any]) -> tuple[str, ...]:
    """Checks that the run there is the same one; writes down what it has from now on."""
    folder = path.parent
    try:
        begun = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove the run to start again") from None
    is_run = isinstance(begun, dict) and isinstance(begun.get(CONTENT, {}), dict)
    if not is_run or not isinstance(begun.get("steps"), int):
        raise InputError(f"{path}: damaged (not the configuration of a run); remove the run to start again")
    known = CONTENT in begun
    if not known:  # begun by a version that knew its inputs by their places, and of a text only one
        begun = {**begun, CONTENT: resolved[CONTENT], "text_field": resolved["text_field"]}
        begun["text"] = [begun["text"]] if isinstance(begun.get("text"), str) else begun.get("text")
    before, now = dict(_flat(begun)), dict(_flat(resolved))
    free = {*_FREE, "steps", *(_PLACES if known else ())}
    problems = [
        _other(name, resolved) for name in resolved[CONTENT] if begun[CONTENT].get(name) != now[f"{CONTENT}.{name}"]
    ]
    problems += [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name.split(".")[0] not in {*free, CONTENT}
    ]
    if now["steps"] < before["steps"]:
        problems.append(f"steps was {before['steps']} and is {now['steps']}, and may only grow")
    if problems:
        raise InputError(
            f"{folder}: holds a run with another configuration: {'; '.join(problems)}; "
            "repeat its command to go on, or choose another folder"
        )
    if now["steps"] == before["steps"]:
        if not known:
            _write(path, resolved)
        return ()
    # In this order: if it is interrupted between the two, the old command makes the model again.
    _keep_model(folder, before["steps"])
    _write(path, resolved)
    fall = "" if now["optimizer.schedule"] == "constant" else "; learning rates go on as in a run of that many"
    return (f"steps was {before['steps']:,} and is {now['steps']:,}{fall}",)


def _other(name: str, resolved: Mapping[str, Any]) -> str:
    where = resolved[name]
    where = ", ".join(where) if isinstance(where, list) else where
    return f"the {name} in {where} is not the one that it was begun with (give that one, wherever it is now)"


def _keep_model(folder: Path, steps: int) -> None:
    model, kept = folder / MODEL_FOLDER, folder / f"{MODEL_FOLDER}-{steps}"
    if model.exists():
        refuse_existing(kept)
        model.rename(kept)


def _resolved(config: TrainConfig, model: GPTNeoConfig, content: Mapping[str, str]) -> dict[str, Any]:
    values = {"recipe": config.recipe, **dataclasses.asdict(config), "model": model.to_hf(), CONTENT: dict(content)}
    return json.loads(json.dumps(values, default=str))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
