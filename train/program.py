"""A run's step as a program: the shapes and places of what it takes, and how it is compiled.

One definition for `gsa_jax.train.loop`, which runs it, and `gsa_jax.train.compiled`, which compiles it for a machine
that is not here. May be changed here: where arrays live, and what is donated.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from gsa_jax.ops.partition import BATCH
from gsa_jax.sharding import shardings
from gsa_jax.topology import UNTUNED
from gsa_jax.train.config import TrainConfig
from gsa_jax.train.optimizer import make_optimizer
from gsa_jax.train.recipes import Start
from gsa_jax.train.step import init_state, make_step

_DETERMINISTIC = {"xla_gpu_deterministic_ops": True, **UNTUNED}
"""For GPUs, where sums by atomic additions, and products chosen by timing them, would end in other bits in each run."""


class StepProgram:
    """The step of a run on a mesh; without one, on a single device.

    Args:
        platform: of the devices, as JAX calls it.

    Attributes:
        begin: compiled when called: the trained parameters, which are donated, to the state before the first step.
        step: compiled when called: the state, which is donated, the parameters that stay as they are, the teacher's
            and a batch, to the next state and metrics. To be called and lowered inside of `on_mesh()`.
        state: shape and place of each array of the state.
    """

    def __init__(self, config: TrainConfig, start: Start, mesh: Mesh | None, platform: str) -> None:
        optimizer, ema_decay = make_optimizer(config.optimizer, config.steps), config.optimizer.ema_decay
        self._start = start
        self._mesh = mesh
        begin = functools.partial(init_state, optimizer=optimizer, ema_decay=ema_decay)
        step = make_step(start.objective, optimizer, accumulate=config.optimizer.accumulate, ema_decay=ema_decay)
        shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in start.shapes.items()}
        self._trained = {name: shape for name, shape in shapes.items() if start.is_trained(name)}
        self._frozen = {name: shape for name, shape in shapes.items() if name not in self._trained}
        state = jax.eval_shape(begin, self._trained)
        self.state = self._placed(state)
        where = whole = None
        if mesh is not None:
            where, whole = shardings(mesh, state), NamedSharding(mesh, P())
        self.begin: Callable[..., Any] = jax.jit(begin, out_shardings=where, donate_argnums=0)
        self.step = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=None if mesh is None else (where, whole),
            compiler_options=_DETERMINISTIC if config.deterministic and platform == "gpu" else None,
        )

    def on_mesh(self) -> AbstractContextManager[Any]:
        """Where the step is called and lowered."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def arguments(self, rows: int, context: int, device: Any = None) -> tuple[Any, Any, Any, Any]:
        """Shape and place of everything that a step takes.

        Args:
            rows: of a batch, over all devices.
            context: tokens of a row.
            device: without a mesh: the one to compile for, JAX's default if None.
        """
        ids = jax.ShapeDtypeStruct((rows, context), jnp.int32)
        batch = {"input_ids": ids, "segment_ids": ids}
        if self._mesh is not None:
            where = NamedSharding(self._mesh, BATCH)
            batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batch)
        frozen = self._placed(self._frozen)
        teacher = {**frozen, **self._placed(self._trained)} if self._start.has_teacher else frozen
        arguments = self.state, frozen, teacher, batch
        if device is None:
            return arguments
        assert self._mesh is None, "a mesh has its devices"
        where = SingleDeviceSharding(device)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arguments)

    def _placed(self, tree: Any) -> Any:
        if self._mesh is None:
            return tree
        where = shardings(self._mesh, tree)
        return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), tree, where)
