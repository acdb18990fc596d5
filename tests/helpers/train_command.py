"""`gsa train` for processes that are to be killed.

May be changed here: how settings become options.
"""

import dataclasses
import sys

from gsa_jax.train.config import OptimizerConfig, TrainConfig


def command(config: TrainConfig) -> list[str]:
    """`gsa train` with these settings."""
    options = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("checkpoint", "out", "mesh") or value == field.default or isinstance(value, OptimizerConfig):
            continue
        options += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    for field in dataclasses.fields(config.optimizer):
        value = getattr(config.optimizer, field.name)
        if value != field.default:
            options += [f"--optimizer.{field.name.replace('_', '-')}", str(value)]
    gsa = [sys.executable, "-m", "gsa_jax.cli", "train", config.recipe]
    return [*gsa, str(config.checkpoint), str(config.out), *options]
