"""The memory that is estimated from shapes, against what a TPU's compiler says.

May be changed here: which steps and meshes.
"""

import dataclasses
from pathlib import Path

import pytest

from gsa_jax.splat_config import SPLAT_PRESETS
from gsa_jax.topology import parse_topology
from gsa_jax.train.config import MODELS, MeshConfig, Pretrain
from gsa_jax.train.recipes import memory_of_step
from helpers.programs import compiled, lower_pretraining

pytestmark = pytest.mark.accelerators

MODEL = dataclasses.replace(
    MODELS["125M"], num_layers=2, attention_types=((("global", "local"), 1),), splats=SPLAT_PRESETS["hybrid"]
)
MESHES = {
    "8x1x1": MeshConfig(),
    "1x8x1": MeshConfig(fsdp=8),
    "4x1x2": MeshConfig(tensor=2),
    "1x2x4": MeshConfig(fsdp=2, tensor=4),
}


@pytest.mark.parametrize("machine", ["v5e:2x4"])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_estimate_is_not_below_what_is_compiled(machine, mesh, monkeypatch, standard_promotion):
    monkeypatch.setitem(MODELS, "125M", MODEL)
    paths = dict.fromkeys(("out", "text", "tokenizer"), Path("x"))
    config = Pretrain(**paths, model="125M", dtype="bfloat16", remat=True, batch_size=32, mesh=MESHES[mesh])
    (estimate,) = memory_of_step(config, [config.mesh.sizes(parse_topology(machine).devices)])
    peak = compiled(machine, lower_pretraining, config, MODEL).peak
    # The kernels of a TPU need far less than the attention that is counted.
    assert 0.97 * peak <= estimate.total < 4 * peak
