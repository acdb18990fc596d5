"""One training step on eight simulated CPU devices and on one; prints what was found as JSON.

A program of its own, because the number of devices is fixed when JAX starts. May be changed here: what is measured;
`test_sharding.py` says what it must be.
"""

import json
import os
import re

os.environ.update({"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "JAX_DEFAULT_MATMUL_PRECISION": "highest"})

import jax
import numpy as np
import optax
from flax import nnx

from gsa_jax import GPTNeoConfig, GPTNeoForCausalLM, SplatConfig
from gsa_jax.loss import mean_next_token_loss
from gsa_jax.parameters import build_model, named_parameters
from gsa_jax.sharding import check_mesh, make_mesh, shard_batch, shard_tensors, shardings
from gsa_jax.train.config import MeshConfig
from gsa_jax.train.memory import memory_reports

ROWS, LENGTH = 8, 160  # several chunks, or a scan over one would leave no loop to look into
CONFIG = GPTNeoConfig(
    vocab_size=53,
    max_position_embeddings=LENGTH,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    attention_types=((("local", "global"), 1),),
    window_size=5,
    bos_token_id=None,
    eos_token_id=None,
    splats=SplatConfig(num_splats=6, window=4, norm_gain=True, far_gain=True),
)
MESHES = {
    "data": MeshConfig(),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(tensor=4),
    "mixed": MeshConfig(fsdp=2, tensor=2),
}
COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
OPTIMIZER = optax.adamw(1e-3)


def objective(params, teacher, batch):
    ids = batch["input_ids"]
    return mean_next_token_loss(build_model(CONFIG, params)(ids), ids, batch["segment_ids"] > 0), {}


def step(params, opt_state, batch):
    (loss, _), gradients = jax.value_and_grad(objective, has_aux=True)(params, {}, batch)
    updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
    return loss, gradients, optax.apply_updates(params, updates), opt_state


def collectives(program: str, *, in_loops: bool) -> list[str]:
    """Lines of a compiled program in which devices exchange something: all, or those that a loop repeats."""
    lines: dict[str, list[str]] = {}
    name = ""
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = start[1]
        lines.setdefault(name, []).append(line)
    wanted = list(lines)
    if in_loops:
        loops = re.findall(r"\bwhile\(.*?\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)", program)
        assert loops, "the chunks of a sequence are a loop"
        wanted = [part for loop in loops for part in loop]
        for part in wanted:  # grows: whatever these call
            called = set(re.findall(r"[\w.\-]+", " ".join(lines.get(part, [])))) & set(lines)
            wanted += [other for other in called if other not in wanted]
    return [line.strip()[:200] for part in wanted for line in lines.get(part, []) if COLLECTIVE.search(line)]


def bytes_on_first_device(tree) -> int:
    device = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)


def run(tensors, batch, expected, config: MeshConfig) -> dict:
    mesh = make_mesh(config.sizes(8))
    check_mesh(mesh.shape, CONFIG, ROWS)
    params = shard_tensors(mesh, tensors)
    abstract = jax.eval_shape(OPTIMIZER.init, params)
    opt_state = jax.jit(OPTIMIZER.init, out_shardings=shardings(mesh, abstract))(params)
    bytes_found = [bytes_on_first_device(tree) for tree in (params, opt_state)]
    where = [shardings(mesh, tree) for tree in (params, params, abstract)]
    one_number = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(step, donate_argnums=(0, 1), out_shardings=(one_number, *where))
            .lower(params, opt_state, shard_batch(mesh, batch))
            .compile()
        )
        loss, gradients, params, opt_state = compiled(params, opt_state, shard_batch(mesh, batch))
    errors = {
        name: float(np.linalg.norm(gradient - expected[1][name]) / np.linalg.norm(expected[1][name]))
        for name, gradient in jax.device_get(gradients).items()
    }
    worst = max(errors, key=errors.__getitem__)
    (report,) = memory_reports(
        CONFIG, objective, OPTIMIZER, [mesh.shape], rows=ROWS, context=LENGTH, dtype=np.float32, remat=False
    )
    program = compiled.as_text()
    return {
        "loss_error": abs(float(loss) / float(expected[0]) - 1),
        "gradient_error": errors[worst],
        "worst_gradient": worst,
        "parts": {
            key: {name: list(x.addressable_shards[0].data.shape) for name, x in tree.items()}
            for key, tree in {"params": params, "gradients": gradients, "moments": opt_state[0].mu}.items()
        },
        "bytes": bytes_found,
        "reported_bytes": [report.parameters, report.optimizer],
        "exchanges": collectives(program, in_loops=False),
        "exchanges_in_loops": collectives(program, in_loops=True),
    }


def main() -> None:
    random = np.random.default_rng(0)
    initial = named_parameters(GPTNeoForCausalLM(CONFIG, rngs=nnx.Rngs(0)))
    # Large enough that attention is not flat and every gradient counts.
    tensors = {n: np.asarray(x) + 0.1 * random.normal(size=x.shape).astype(np.float32) for n, x in initial.items()}
    batch = {
        "input_ids": random.integers(0, CONFIG.vocab_size, (ROWS, LENGTH), dtype=np.int32),
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
    }
    expected = jax.device_get(jax.jit(step)(tensors, OPTIMIZER.init(tensors), batch)[:2])
    print(json.dumps({name: run(tensors, batch, expected, mesh) for name, mesh in MESHES.items()}))


if __name__ == "__main__":
    main()
