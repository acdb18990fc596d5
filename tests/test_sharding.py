"""Eight simulated devices compute what one does, each holds its part, and the memory report says how large it is."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gsa_jax import GPTNeoConfig, InputError, SplatConfig
from gsa_jax.ops.partition import MESH_AXES
from gsa_jax.parameters import build_model, expected_shapes
from gsa_jax.sharding import batch_share, check_mesh
from gsa_jax.train.config import MeshConfig
from gsa_jax.train.memory import memory_reports
from gsa_jax.train.objectives import cross_entropy

MESHES = ["data", "fsdp", "tensor", "mixed"]
LAYER = "transformer.h.1."
# Of the matrices [out, in] with hidden size 32, MLP 128, 4 heads of 8, 6 splats: what a device has of them.
PARTS = {
    "attn.attention.q_proj.weight": {"fsdp": [32, 4], "tensor": [8, 32], "mixed": [16, 16]},
    "attn.attention.out_proj.weight": {"fsdp": [4, 32], "tensor": [32, 8], "mixed": [16, 16]},
    "attn.attention.splat_centers": {"fsdp": [4, 6, 8], "tensor": [1, 6, 8], "mixed": [2, 6, 8]},
    "attn.attention.splat_far_gain": {"fsdp": [4], "tensor": [1], "mixed": [2]},
    "mlp.c_fc.weight": {"fsdp": [128, 4], "tensor": [32, 32], "mixed": [64, 16]},
    "mlp.c_fc.bias": {"fsdp": [128], "tensor": [32], "mixed": [64]},
    "mlp.c_proj.weight": {"fsdp": [4, 128], "tensor": [32, 32], "mixed": [16, 64]},
    "mlp.c_proj.bias": {"fsdp": [32], "tensor": [32], "mixed": [32]},
    "ln_2.weight": {"fsdp": [32], "tensor": [32], "mixed": [32]},
}
EMBEDDING = {"fsdp": [53, 4], "tensor": [53, 32], "mixed": [53, 16]}


@pytest.fixture(scope="module")
def found() -> dict:
    """What `eight_devices.py` measures."""
    program = Path(__file__).parent / "helpers" / "eight_devices.py"
    run = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_compute_what_one_does(found: dict, mesh: str) -> None:
    """That is, from all logits at once; the divergence, in blocks as well."""
    assert found[mesh]["loss_error"] < 1e-6
    assert found[mesh]["gradient_error"] < 1e-5, found[mesh]["worst_gradient"]
    assert found[mesh]["divergence_errors"][0] < 1e-6 and found[mesh]["divergence_errors"][1] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES[1:])
def test_each_device_holds_its_part(found: dict, mesh: str) -> None:
    """Of parameters and moments after a step, and of the gradients; nothing else takes memory in between."""
    for parts in found[mesh]["parts"].values():
        assert parts["transformer.wte.weight"] == EMBEDDING[mesh]
        assert {name: parts[LAYER + name] for name in PARTS} == {name: part[mesh] for name, part in PARTS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_devices_exchange_weights_and_no_activations(found: dict, mesh: str) -> None:
    """A gathered array has two axes, as weights do; hidden states and logits have three. Loops run without exchange,
    but where devices have parts of the vocabulary: they exchange a number or two for each token of a block."""
    for line in found[mesh]["exchanges_in_loops"]:
        assert mesh in ("tensor", "mixed") and " all-reduce(" in line
        assert set(re.findall(r"\w+\[[\d,]+\]", line.split(" all-reduce(")[0])) <= {"f32[80,1]", "f32[160,1]"}
    for line in found[mesh]["exchanges"]:
        assert "all-to-all" not in line
        assert "all-gather" not in line or axes(line) == 2, line


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp", "mixed"])
def test_layers_in_a_loop_are_gathered_one_at_a_time(found: dict, mesh: str) -> None:
    """Stacked weights have three axes. Outside of the loop, the embeddings are gathered, and the parts of the gradient
    of the vocabulary, which is 54 words for two devices."""
    scanned = found["scanned"][mesh]
    assert scanned["loss_error"] < 1e-6 and scanned["gradient_error"] < 1e-5
    gathered = [line for line in scanned["exchanges"] if "all-gather" in line]
    assert len(gathered) > 10
    for line in gathered:
        assert axes(line) == 2, line
        outside = any(shape in line for shape in ("f32[53,32]", "f32[160,32]", "f32[54,16]"))
        assert line in scanned["exchanges_in_loops"] or outside, line


def axes(line: str) -> int:
    """Of the first result of an instruction."""
    result = line.split(" = ")[1]
    return result[: result.index("]")].count(",") + 1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_the_report_counts_the_bytes_that_arrays_have(found: dict, mesh: str) -> None:
    assert found[mesh]["reported_bytes"] == found[mesh]["bytes"]


def small(num_layers: int = 3) -> GPTNeoConfig:
    return GPTNeoConfig(
        vocab_size=300,
        max_position_embeddings=128,
        hidden_size=64,
        num_layers=num_layers,
        num_heads=4,
        attention_types=((("global", "local", "global"), num_layers // 3),),
        window_size=16,
        bos_token_id=None,
        eos_token_id=None,
        splats=SplatConfig(num_splats=16, window=16, layers=(2,)),
    )


def report(config: GPTNeoConfig, **options):
    settings = {"rows": 4, "remat": False, "mesh": {"data": 1, "fsdp": 1, "tensor": 1}, **options}
    mesh, remat = settings.pop("mesh"), settings["remat"]
    objective = cross_entropy(lambda params: build_model(dataclasses.replace(config, remat=remat), params))
    (found,) = memory_reports(config, objective, optax.adamw(1e-3), [mesh], context=128, dtype=jnp.float32, **settings)
    return found


def test_parameters_in_float32_are_computed_with_as_they_are() -> None:
    """However the dtype is written: the command line writes its name."""
    config, mesh = small(), {"data": 1, "fsdp": 1, "tensor": 1}
    objective = cross_entropy(lambda params: build_model(config, params))
    weights = {}
    for dtype in (jnp.float32, "float32", "bfloat16"):
        (found,) = memory_reports(
            config, objective, optax.adamw(1e-3), [mesh], rows=4, context=128, dtype=dtype, remat=False
        )
        weights[dtype] = found.weights
    assert weights[jnp.float32] == weights["float32"] == 0 < weights["bfloat16"]


@pytest.mark.slow
def test_activations_are_what_the_compiler_sets_aside() -> None:
    config = small()
    objective = cross_entropy(lambda params: build_model(config, params))
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in expected_shapes(config).items()}
    batch = {name: jax.ShapeDtypeStruct((4, 128), jnp.int32) for name in ("input_ids", "segment_ids")}
    gradient = jax.jit(jax.grad(lambda params, batch: objective(params, {}, batch)[0]))
    analysis = gradient.lower(params, batch).compile().memory_analysis()
    assert analysis is not None
    found = report(config)
    ratio = (found.activations + found.working) / analysis.temp_size_in_bytes
    assert 0.5 < ratio < 2, ratio


@pytest.mark.slow
def test_with_remat_only_the_input_of_a_block_is_kept() -> None:
    """CPU programs cannot show this: XLA merges what is recomputed there with what it was computed from."""
    short, long = report(small(3), remat=True), report(small(6), remat=True)
    assert long.activations - short.activations == 3 * 4 * (4 * 128 * 64)
    assert short.working > short.activations / 3  # all that a block keeps, when its turn comes
    assert report(small()).activations > 5 * short.activations


@pytest.mark.slow
def test_meshes_and_parts_of_a_batch_share_the_memory() -> None:
    whole = report(small(), rows=8)
    assert report(small(), rows=8, mesh={"data": 2, "fsdp": 1, "tensor": 1}).activations == whole.activations // 2
    accumulated = report(small(), rows=8, accumulate=2, ema=True)
    assert accumulated.activations == whole.activations // 2
    assert accumulated.gradients == 2 * whole.gradients
    assert (accumulated.ema, whole.ema) == (whole.parameters, 0)
    split = report(small(), rows=8, mesh={"data": 1, "fsdp": 1, "tensor": 4})
    assert whole.activations / 4 < split.activations < whole.activations
    gathered = report(small(), rows=8, mesh={"data": 1, "fsdp": 2, "tensor": 1})
    assert gathered.working == whole.working // 2 + 4 * 300 * 64  # the gradient of the embedding, before it is cut
    splats = report(small(), trained=lambda name: ".splat_" in name)
    assert splats.gradients == 4 * (4 * 16 * 16 + 4 * 16)
    assert splats.parameters == whole.parameters
    assert splats.optimizer == 2 * splats.gradients + 4


@pytest.mark.parametrize(
    ("mesh", "rows", "words"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 1}, 6, "data x fsdp = 4 does not divide the 6 rows of a batch"),
        ({"data": 1, "fsdp": 1, "tensor": 3}, 6, "tensor = 3 does not divide num_heads = 4; tensor = 2 would"),
        ({"data": 1, "fsdp": 3, "tensor": 1}, 6, "fsdp = 3 does not divide hidden_size = 64; fsdp = 2 would"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(mesh: dict[str, int], rows: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_mesh(mesh, small(), rows)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(fsdp=3), "3 x 1 = 3 does not divide the 8 devices"),
        (MeshConfig(data=2, fsdp=2), "2 x 2 x 1 = 4, but there are 8 devices"),
        (MeshConfig(tensor=0), "tensor = 0: must be >= 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config: MeshConfig, words: str) -> None:
    with pytest.raises(InputError, match=words):
        config.sizes(8)


def shares(*sizes: int, processes: int) -> list[tuple[int, int]]:
    """Of each process, where the devices are dealt out in order."""
    count = int(np.prod(sizes))
    devices = np.empty(count, object)
    devices[:] = [SimpleNamespace(process_index=number * processes // count) for number in range(count)]
    mesh = SimpleNamespace(devices=devices.reshape(sizes), shape=dict(zip(MESH_AXES, sizes, strict=True)))
    return [batch_share(mesh, process) for process in range(processes)]  # type: ignore[arg-type]


def test_processes_read_the_rows_that_their_devices_have(unchecked) -> None:
    assert shares(2, 2, 2, processes=2) == [(0, 2), (1, 2)]
    assert shares(1, 8, 1, processes=4) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert shares(2, 1, 4, processes=4) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert shares(1, 1, 8, processes=2) == [(0, 1), (0, 1)]
    with pytest.raises(InputError, match="let tensor divide the devices of a process"):
        shares(2, 1, 3, processes=3)
