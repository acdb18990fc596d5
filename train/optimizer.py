"""The optimiser: AdamW with a schedule, and learning rates of their own for splats.

May be changed here: groups of parameters and schedules. All arithmetic is optax's.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import jax
import optax

from gsa_jax.parameters import is_splat
from gsa_jax.train.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int, highest: float) -> optax.Schedule:
    """Learning rate of each step: a linear rise, then the fall that `config.schedule` names."""
    fall = steps - config.warmup_steps
    lowest = highest * config.final_share
    after = {
        "constant": lambda: optax.constant_schedule(highest),
        "linear": lambda: optax.linear_schedule(highest, lowest, fall),
        "cosine": lambda: optax.cosine_decay_schedule(highest, fall, config.final_share),
    }[config.schedule]()
    rise = optax.linear_schedule(0.0, highest, max(config.warmup_steps, 1))
    return optax.join_schedules([rise, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Of a flat dict of parameters by their names."""

    def adamw(highest: float, weight_decay: float) -> optax.GradientTransformation:
        return optax.adamw(learning_rate(config, steps, highest), b1=config.b1, b2=config.b2, weight_decay=weight_decay)

    groups: dict[Hashable, optax.GradientTransformation] = {
        "splats": adamw(config.splat_learning_rate, 0.0),
        "matrices": adamw(config.learning_rate, config.weight_decay),
        "vectors": adamw(config.learning_rate, 0.0),
    }
    grouped = optax.partition(groups, _groups)
    if not config.clip_norm:
        return grouped
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), grouped)


def _groups(params: Mapping[str, jax.Array]) -> dict[str, str]:
    return {
        name: "splats" if is_splat(name) else "matrices" if array.ndim > 1 else "vectors"
        for name, array in params.items()
    }
