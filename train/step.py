"""One optimiser step, as a pure function of flat dicts of parameters.

May be changed here: how gradients become new parameters. What is minimised is `gsa_jax.train.objectives`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from gsa_jax.train.objectives import Batch, Objective, Tensors

State = dict[str, Any]
"""`params`, the trained parameters by their names; `opt_state`; and `ema`, their moving average, if one is kept."""


def init_state(params: Tensors, optimizer: optax.GradientTransformation, ema_decay: float | None) -> State:
    """The state before the first step."""
    state: State = {"params": dict(params), "opt_state": optimizer.init(dict(params))}
    if ema_decay is not None:
        state["ema"] = jax.tree.map(jnp.copy, dict(params))
    return state


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, *, accumulate: int, ema_decay: float | None
) -> Callable[[State, Tensors, Tensors, Batch], tuple[State, dict[str, jax.Array]]]:
    """A function of the state, the parameters that stay as they are, the teacher's and a batch; to be compiled.

    It returns the next state, and the batch's `loss` and `gradient_norm`, beside what the objective reports. The
    gradient is the mean over `accumulate` equal parts of the batch, which are computed one after another.
    """

    def step(state: State, frozen: Tensors, teacher: Tensors, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        def loss_of(params: Tensors, part: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
            return objective({**frozen, **params}, teacher, part)

        def of_part(part: Batch) -> tuple[Tensors, dict[str, jax.Array]]:
            (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state["params"], part)
            return gradients, {"loss": loss, **metrics}

        if accumulate == 1:
            gradients, metrics = of_part(batch)
        else:
            # Neighbouring rows go to different parts, so that each part is spread over the devices as the batch is.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            gradients, metrics = jax.tree.map(
                lambda total: total / accumulate, _sum_over(of_part, parts, like=jax.tree.map(lambda x: x[0], parts))
            )
        updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        following: State = {"params": params, "opt_state": opt_state}
        if ema_decay is not None:
            following["ema"] = optax.incremental_update(params, state["ema"], 1 - ema_decay)
        return following, {**metrics, "gradient_norm": optax.tree.norm(gradients)}

    return step


def _sum_over(function: Callable[[Batch], Any], parts: Mapping[str, Int[Array, "A B T"]], like: Batch) -> Any:
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, like))

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, zeros, parts)[0]
