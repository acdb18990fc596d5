"""The training loop that all recipes share: batches, steps, checkpoints, evaluation, and how a run ends.

May be changed here: the order of these. A run is a folder:

    RUN/
      run.json        the resolved configuration
      metrics.jsonl   a line for each step and each evaluation
      steps/          checkpoints of the run, each with the configuration
      model/          the result, an ordinary checkpoint folder
      profile/        a trace of a few steps, and tensorboard/: events, if asked for
      model-STEPS/    the result of fewer steps, if there were more to make later

The same command on an existing run, or one with more steps, goes on from its newest checkpoint, and what it computes
from there is bit for bit what it would have computed without the interruption.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gsa_jax.checkpoint import save, travelling_files
from gsa_jax.errors import InputError
from gsa_jax.generation_config import GENERATION_CONFIG_FILE
from gsa_jax.progress import Progress
from gsa_jax.sharding import batch_share, check_mesh, make_mesh, shard_batch, shard_tensors, shardings
from gsa_jax.text import context_length
from gsa_jax.text_files import TextFiles
from gsa_jax.tokenizer_folder import open_tokenizer, tokenizer_files
from gsa_jax.train.checkpoints import Restored, RunCheckpoints
from gsa_jax.train.config import TrainConfig
from gsa_jax.train.data import read_tokens, row_batches
from gsa_jax.train.evaluator import Evaluator
from gsa_jax.train.metrics import MetricsLog, Record
from gsa_jax.train.profiling import PROFILE_FOLDER, StepProfile
from gsa_jax.train.program import StepProgram
from gsa_jax.train.recipes import Start, prepare, random_tensors
from gsa_jax.train.run_folder import MODEL_FOLDER, STEPS_FOLDER, fingerprint, open_run
from gsa_jax.train.step import State
from gsa_jax.train.tracking import open_tracking, require_library

_TIMED_STEPS = 20
"""Over which a speed is averaged."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: optimiser steps made, those before a restart included.
        status: whether the result is written, or the run was told to stop and saved.
        model: folder of the result.
    """

    step: int
    status: Literal["finished", "stopped"]
    model: Path


def train(
    config: TrainConfig, *, report: Callable[[Record], None] = lambda record: None, progress: Progress = iter
) -> Outcome:
    """Trains, from the start or from the newest checkpoint of the run, on all devices of all processes.

    On SIGTERM the run saves and returns. With several processes, all of them call this, after
    `jax.distributed.initialize`.

    Args:
        report: is given each record of `metrics.jsonl`, and `{"kind": "note", "text": ...}` for what a user should
            know.
        progress: wraps names, one for each MB of text that is tokenised.

    Raises:
        InputError: something that the run needs cannot be used; the folder holds a run with another configuration,
            another text or another checkpoint to start from; the loss is not finite; or the disk is full. Checkpoints
            that were complete stay.
    """
    config.check()
    if config.track is not None:
        require_library(config.track)
    start = prepare(config)
    mesh = _mesh(config, start)
    context = context_length(start.model, config.context)
    process, processes = (0, 1) if mesh is None else batch_share(mesh)
    tokenizer = open_tokenizer(start.tokenizer)
    tokens = read_tokens(TextFiles(config.text, config.text_field), tokenizer, start.model, progress=progress)
    data = row_batches(
        tokens,
        start.model,
        context=context,
        batch_size=config.batch_size,
        seed=config.seed,
        process=process,
        processes=processes,
    )
    evaluator = Evaluator(config, start.model, tokenizer, context)
    content = {"text": tokens.fingerprint()}
    if start.stored is not None:
        content["checkpoint"] = fingerprint(start.stored)
    resolved, notes = open_run(config, start.model, content)
    for note in notes:
        report({"kind": "note", "text": note})
    with contextlib.ExitStack() as stack:
        should_stop = stack.enter_context(_termination())
        checkpoints = stack.enter_context(RunCheckpoints(config.out / STEPS_FOLDER, keep=config.keep))
        run = _Run(config, start, mesh, data, context, checkpoints, resolved, report)
        run.restore_or_begin()
        log = None
        if jax.process_index() == 0:
            after = run.step or -1
            tracking = None if config.track is None else open_tracking(config.track, config.out, resolved)
            log = stack.enter_context(MetricsLog(config.out, after=after, tracking=tracking))
        scored = -1 if log is None else log.scored
        if jax.process_count() > 1:  # an evaluation is a computation of all processes
            scored = int(multihost_utils.broadcast_one_to_all(np.asarray(scored)))
        profile = None
        if config.profile and jax.process_index() == 0:
            profile = stack.enter_context(StepProfile(config.out / PROFILE_FOLDER))
        finished = run.advance(log, evaluator, scored, should_stop, profile)
        if profile is not None:
            report({"kind": "note", "text": profile.told()})
        out = config.out / MODEL_FOLDER
        if finished and not out.exists():
            if start.stored is not None:
                copied = travelling_files(start.tokenizer)
            else:  # the tokenizer is that of another model, which may generate otherwise
                copied = [file for file in tokenizer_files(start.tokenizer) if file.name != GENERATION_CONFIG_FILE]
            save(out, start.model, run.parameters(), copied=copied)
    return Outcome(run.step, "finished" if finished else "stopped", out)


class _Run:
    """A run between two steps."""

    def __init__(
        self,
        config: TrainConfig,
        start: Start,
        mesh: Mesh | None,
        data: grain.DatasetIterator,
        context: int,
        checkpoints: RunCheckpoints,
        resolved: dict[str, Any],
        report: Callable[[Record], None],
    ) -> None:
        self._config = config
        self._start = start
        self._mesh = mesh
        self._data = data
        self._context = context
        self._checkpoints = checkpoints
        self._resolved = resolved
        self._report = report
        self._program = StepProgram(config, start, mesh, jax.default_backend())
        self.step = 0

    def restore_or_begin(self) -> None:
        """Parameters and optimiser, from the newest checkpoint or the start."""
        config, start = self._config, self._start
        restored = self._checkpoints.restore(self._program.state)
        needed = set(start.shapes)
        if restored is not None and not start.has_teacher:
            needed = {name for name in needed if not start.is_trained(name)}
        tensors = _tensors(config, start, self._mesh, needed)
        trained = {name: tensor for name, tensor in tensors.items() if start.is_trained(name)}
        self._frozen = {name: tensor for name, tensor in tensors.items() if name not in trained}
        self._teacher = self._frozen
        if start.has_teacher:
            # The trained ones are donated to the first step.
            self._teacher = {**self._frozen, **jax.tree.map(jnp.copy, trained)}
        if restored is None:
            self.state: State = self._program.begin(trained)
        else:
            self._go_on_from(restored)

    def _go_on_from(self, restored: Restored) -> None:
        for line in (*restored.passed_over, f"going on from step {restored.step}"):
            self._report({"kind": "note", "text": line})
        self.state, self.step = restored.state, restored.step
        self._data.set_state(restored.data)

    def advance(
        self,
        log: MetricsLog | None,
        evaluator: Evaluator,
        scored: int,
        should_stop: Callable[[int], bool],
        profile: StepProfile | None,
    ) -> bool:
        """Makes the steps that are left; False if it was told to stop before.

        Args:
            scored: the last step that the log has an evaluation of; -1 if there is none. A run that is told to stop at
                a step that is to be scored saves at once, and scores when it goes on.
        """
        config = self._config
        speed = _Speed(config.batch_size * (self._context - 1))

        def write(record: Record) -> None:
            if log is not None:
                log.write(record)
            self._report(record)

        def evaluate() -> None:
            record = evaluator.record(self.step, self.parameters())
            if record is not None:
                write(record)

        if self._is_scored() and self.step > scored:
            evaluate()
        speed.start()
        pending: tuple[int, dict[str, jax.Array]] | None = None
        while self.step < config.steps:
            batch = next(self._data)
            if self._mesh is not None:
                batch = shard_batch(self._mesh, batch)
            recording = contextlib.nullcontext() if profile is None else profile.step(self.step + 1)
            with self._program.on_mesh(), recording:
                self.state, metrics = self._program.step(self.state, self._frozen, self._teacher, batch)
            self.step += 1
            if profile is not None:
                profile.after(metrics)
            if pending is not None:  # one step late, so that the devices always have work
                write(self._train_record(*pending, speed))
            pending = self.step, metrics
            last = self.step == config.steps
            stopping = should_stop(self.step) and not last
            evaluates = self._is_scored()
            if last or stopping or evaluates or self.step % config.save_every == 0:
                # Nothing is saved or scored before it is known to be finite.
                write(self._train_record(*pending, speed))
                pending = None
                if evaluates and not stopping:
                    evaluate()
                if last or stopping or self.step % config.save_every == 0:
                    self._save(wait=last or stopping)
                speed.start()
            if stopping:
                return False
        return True

    def _is_scored(self) -> bool:
        return self.step == self._config.steps or self.step % self._config.eval_every == 0

    def parameters(self) -> dict[str, jax.Array]:
        """All parameters as they would be used: the moving average, where one is kept."""
        return {**self._frozen, **self.state.get("ema", self.state["params"])}

    def _train_record(self, step: int, metrics: dict[str, jax.Array], speed: _Speed) -> Record:
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, values.values())):
            newest = self._checkpoints.latest
            saved = "none was saved" if newest is None else f"{self._config.out / STEPS_FOLDER / str(newest)}"
            raise InputError(
                f"step {step}: the loss is {values['loss']}, the norm of its gradient {values['gradient_norm']}; "
                f"last good checkpoint: {saved}; go on with a lower learning rate"
            )
        return {"kind": "train", "step": step, **values, **speed.after(step)}

    def _save(self, *, wait: bool) -> None:
        self._checkpoints.save(self.step, self.state, self._data.get_state(), self._resolved, wait=wait)


class _Speed:
    """Tokens per second over the last steps; compilation, evaluations and saves left out."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._times: collections.deque[float] = collections.deque(maxlen=_TIMED_STEPS)
        self._compiled = False

    def start(self) -> None:
        """The next step begins now, after something else."""
        self._last = time.perf_counter()

    def after(self, step: int) -> Record:
        """What a record says about a step that has just ended."""
        now = time.perf_counter()
        times = [*self._times, now - self._last]
        self._last = now
        if self._compiled:
            self._times.append(times[-1])
        self._compiled = True
        seconds = sum(times) / len(times)
        return {"tokens": step * self._tokens, "tokens_per_s": self._tokens / seconds, "seconds_per_step": seconds}


def _mesh(config: TrainConfig, start: Start) -> Mesh | None:
    """The mesh of all devices; None on one device, where plain arrays do."""
    sizes = config.mesh.sizes(jax.device_count())
    check_mesh(sizes, start.model, config.batch_size // config.optimizer.accumulate)
    return None if jax.device_count() == 1 else make_mesh(sizes)


def _tensors(config: TrainConfig, start: Start, mesh: Mesh | None, names: set[str]) -> dict[str, jax.Array]:
    """These parameters at the start, float32, each device holding its own part and no more."""
    if start.tensors is not None:
        tensors = {name: np.asarray(start.tensors[name], np.float32) for name in start.tensors if name in names}
        return jax.tree.map(jnp.asarray, tensors) if mesh is None else shard_tensors(mesh, tensors)

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        return {name: tensor for name, tensor in random_tensors(start.model, key).items() if name in names}

    key = jax.random.key(config.seed)
    where = None if mesh is None else shardings(mesh, jax.eval_shape(draw, key))
    return jax.jit(draw, out_shardings=where)(key)


@contextlib.contextmanager
def _termination() -> Iterator[Callable[[int], bool]]:
    """Tells after each step whether the run was asked to stop; all processes hear of it after the same step."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
