"""Prefill, the decoding loop and training steps, as the compilers of TPUs and GPUs take them.

May be changed here: which programs, machines and meshes.
"""

import dataclasses

import pytest

from gsa_jax.hlo import COLLECTIVES
from gsa_jax.topology import parse_topology
from gsa_jax.train.compiled import compile_step
from gsa_jax.train.config import Distill, Finetune, MeshConfig, Pretrain
from helpers.programs import HYBRID_STORY, compiled, lower_decode, lower_prefill, run

pytestmark = pytest.mark.accelerators

MACHINES = ("v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:2x2x1", "h100", "a100")


def on(*machines, quick=()):
    """These machines as a parameter; of them `quick` for CI."""
    return pytest.mark.parametrize(
        "machine", [pytest.param(machine, marks=[pytest.mark.quick] * (machine in quick)) for machine in machines]
    )


@on(*MACHINES)
def test_prefill(machine):
    assert compiled(machine, lower_prefill, HYBRID_STORY, 2, 256).peak > 0


@on(*MACHINES, quick=("v5e:1x1",))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_decoding_loop(machine, dtype):
    assert compiled(machine, lower_decode, dataclasses.replace(HYBRID_STORY, dtype=dtype), 2, 256).peak > 0


@on(*MACHINES, quick=("v5e:1x1", "h100"))
def test_a_training_step(machine, hybrid):
    report = compile_step(run(Finetune, hybrid), parse_topology(machine))
    assert report.fits and report.matrix_flops > 0


@on(*MACHINES)
def test_a_step_of_distillation(machine, hybrid):
    assert compile_step(run(Distill, hybrid, objective="logits"), parse_topology(machine)).fits


STEPS = {
    "distill-output": (Distill, {"objective": "output"}),
    "finetune-teacher": (Finetune, {"teacher_weight": 0.5, "remat": True}),
    "pretrain": (Pretrain, {"model": "story", "dtype": "float32"}),
}


@on("v5e:1x1", "v4:1x1x1", "h100")
@pytest.mark.parametrize("step", STEPS)
def test_every_recipe(machine, step, hybrid):
    recipe, settings = STEPS[step]
    assert compile_step(run(recipe, hybrid, **settings), parse_topology(machine)).fits


MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=4),
    "mixed": MeshConfig(fsdp=2, tensor=2),
}


@on("v5e:2x4", "h100:8")
@pytest.mark.parametrize("mesh", [pytest.param("mixed", marks=pytest.mark.quick), "data", "fsdp", "tensor"])
def test_meshes_of_eight(machine, mesh, hybrid):
    exchanged = compile_step(run(Finetune, hybrid, mesh=MESHES[mesh]), parse_topology(machine)).collective_bytes
    trained = 4 * 2_000_000  # bytes of the float32 gradients; a little more in truth
    assert set(exchanged) == set(COLLECTIVES)
    assert sum(exchanged.values()) > trained / 4
    if mesh == "data":
        assert trained < exchanged["all-reduce"] < 1.2 * trained


@on("v5e:8x8")
def test_a_mesh_of_sixty_four(machine, hybrid):
    settings = {"batch_size": 64, "mesh": MeshConfig(fsdp=16)}
    assert compile_step(run(Finetune, hybrid, **settings), parse_topology(machine)).fits
