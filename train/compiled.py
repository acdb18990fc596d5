"""A run's step compiled for a machine that is not here: does it fit, what is exchanged, and what would make it fit.

Everything is what the machine's compiler says; nothing has run. May be changed here: what is reported, and which
remedies are tried. Machines and their compilers are `gsa_jax.topology`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.hlo import Program
from gsa_jax.sharding import check_mesh, make_mesh
from gsa_jax.text import context_length
from gsa_jax.topology import Compiled, Topology, compile_for, parse_topology
from gsa_jax.train.config import TrainConfig
from gsa_jax.train.program import StepProgram
from gsa_jax.train.recipes import prepare


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a compiler says of a run's step, for each device.

    Attributes:
        topology: the machine.
        mesh: size of each axis.
        rows: of the batch on each device at a time.
        needed: bytes at the moment at which most are alive; of a step that does not fit, what the compiler names.
        fits: whether that is no more than programs may use.
        arguments: bytes of parameters, optimiser state and batch; None if the compiler refused the step.
        temporaries: bytes of everything between arguments and results; None likewise.
        collective_bytes: per step, by kind, as `gsa_jax.hlo.Program` counts them; None likewise.
        matrix_flops: of matrix products per step; None likewise.
        seconds: of compiling, on the machine that compiled.
    """

    topology: Topology
    mesh: Mapping[str, int]
    rows: int
    needed: int
    fits: bool
    arguments: int | None
    temporaries: int | None
    collective_bytes: Mapping[str, int] | None
    matrix_flops: int | None
    seconds: float


def step_topologies(config: TrainConfig, names: tuple[str, ...]) -> list[Topology]:
    """The machines of these names.

    Raises:
        InputError: a machine is unknown, or the run's mesh has another number of devices.
    """
    config.check()
    found = [parse_topology(name) for name in names]
    for topology in found:
        _mesh_sizes(config, topology)
    return found


def compile_step(config: TrainConfig, topology: Topology) -> StepReport:
    """Compiles the step of a run: with its objective, optimiser, mesh, rows, context, dtype and rematerialisation.

    Raises:
        CompilerAborted: the compiler did not survive it.
        InputError: the compiler is missing, the mesh does not divide the model or the rows, or the run cannot start.
    """
    sizes = _mesh_sizes(config, topology)
    compiled = compile_for(topology, lower_step, config, what="the step")
    program = Program(compiled.text) if isinstance(compiled, Compiled) else None
    needed = compiled.peak if isinstance(compiled, Compiled) else compiled.needed
    return StepReport(
        topology=topology,
        mesh=sizes,
        rows=config.batch_size // (config.optimizer.accumulate * sizes["data"] * sizes["fsdp"]),
        needed=needed,
        fits=program is not None and needed <= topology.memory,
        arguments=compiled.arguments if isinstance(compiled, Compiled) else None,
        temporaries=compiled.temporaries if isinstance(compiled, Compiled) else None,
        collective_bytes=program.collective_bytes() if program else None,
        matrix_flops=program.matrix_flops() if program else None,
        seconds=compiled.seconds,
    )


def lower_step(devices: list[Any], config: TrainConfig) -> Any:
    """The lowered step of a run on these devices, as the loop would compile it; for `compile_for`.

    Raises:
        InputError: the mesh does not divide the model or the rows, or the run cannot start.
    """
    start = prepare(config)
    sizes = config.mesh.sizes(len(devices))
    check_mesh(sizes, start.model, config.batch_size // config.optimizer.accumulate)
    mesh = None if len(devices) == 1 else make_mesh(sizes, devices)
    program = StepProgram(config, start, mesh, devices[0].platform)
    context = context_length(start.model, config.context)
    arguments = program.arguments(config.batch_size, context, devices[0] if mesh is None else None)
    with program.on_mesh():
        return program.step.lower(*arguments)


def find_remedy(
    config: TrainConfig, topology: Topology, *, note: Callable[[str], None] = lambda text: None
) -> str | None:
    """Options with which a step fits that does not, or None if it does not fit with all of them.

    Tried in this order, each on top of those before it: recomputing blocks, all devices of `data` in `fsdp`, more and
    more parts of a batch, and one row on each device. Each is compiled.

    Args:
        note: is told the options that are tried next.
    """
    for options, changed in _remedies(config, _mesh_sizes(config, topology), prepare(config).model):
        note(options)
        if compile_step(changed, topology).fits:
            return options
    return None


def _remedies(config: TrainConfig, sizes: Mapping[str, int], model: GPTNeoConfig) -> Iterator[tuple[str, TrainConfig]]:
    options: list[str] = []
    if not config.remat:
        config = dataclasses.replace(config, remat=True)
        options.append("--remat")
        yield " ".join(options), config
    split = sizes["data"] * sizes["fsdp"]
    if sizes["data"] > 1 and model.hidden_size % split == 0:
        options += ["--mesh.data 1"] if config.mesh.data is not None else []
        options.append(f"--mesh.fsdp {split}")
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=split))
        yield " ".join(options), config
    parts = config.optimizer.accumulate
    while config.batch_size % ((parts := parts * 2) * split) == 0:
        optimizer = dataclasses.replace(config.optimizer, accumulate=parts)
        added = f"--optimizer.accumulate {parts}"
        yield " ".join([*options, added]), dataclasses.replace(config, optimizer=optimizer)
    if config.batch_size > split:
        options += ["--optimizer.accumulate 1"] if config.optimizer.accumulate > 1 else []
        options.append(f"--batch-size {split}")
        optimizer = dataclasses.replace(config.optimizer, accumulate=1)
        yield " ".join(options), dataclasses.replace(config, optimizer=optimizer, batch_size=split)


def _mesh_sizes(config: TrainConfig, topology: Topology) -> dict[str, int]:
    try:
        return config.mesh.sizes(topology.devices)
    except InputError as error:
        raise InputError(f"{topology.name}: {error}") from None
