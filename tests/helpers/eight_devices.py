"""One training step on eight simulated CPU devices and on one; prints what was found as JSON.

A program of its own, because the number of devices is fixed when JAX starts. May be changed here: what is measured;
`test_sharding.py` says what it must be.
"""

import dataclasses
import functools
import json
import os
import re

os.environ.update({"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "JAX_DEFAULT_MATMUL_PRECISION": "highest"})

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gsa_jax import GPTNeoConfig, GPTNeoForCausalLM, SplatConfig, loss
from gsa_jax.loss import Head, blockwise_mean_divergence, blockwise_mean_loss, mean_next_token_loss
from gsa_jax.ops.partition import keep_rows_apart, keep_whole
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
loss.BLOCK_BYTES = 4 * CONFIG.vocab_size * 64
"""Each device's loss is several blocks. The vocabulary divides by no mesh."""
SCANNED = dataclasses.replace(CONFIG, num_layers=4, attention_types=((("local", "global"), 2),), remat=True)


def head(config, params, batch):
    model = build_model(config, params)
    return Head(model.hidden_states(batch["input_ids"]), model.transformer.wte.embedding[...])


def objective(params, teacher, batch, config=CONFIG):
    return blockwise_mean_loss(head(config, params, batch), batch["input_ids"], batch["segment_ids"] > 0), {}


def straightforward(params, batch, config):
    """The loss with all layers one after another, of all logits at once."""
    config = dataclasses.replace(config, remat=False)
    logits = build_model(config, params)(batch["input_ids"])
    return mean_next_token_loss(logits, batch["input_ids"], batch["segment_ids"] > 0)


def divergence(params, batch):
    """Of two heads without layers between embedding and head."""
    embedding = params["transformer.wte.weight"]
    student = Head(keep_rows_apart(jnp.take(keep_whole(embedding), batch["input_ids"], axis=0)), embedding)
    teacher = student._replace(embedding=jnp.flip(embedding, 0))
    return blockwise_mean_divergence(student, teacher, 0.7, batch["input_ids"], batch["segment_ids"] > 0)[0]


def step(params, opt_state, batch, config=CONFIG):
    (value, _), gradients = jax.value_and_grad(objective, has_aux=True)(params, {}, batch, config)
    updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
    return value, gradients, optax.apply_updates(params, updates), opt_state


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


def largest_error(found, expected) -> tuple[float, str]:
    """Of the gradients, relative to their norms, and which one it is; those that are 0 have to be 0."""
    return max(
        (float(np.linalg.norm(gradient - expected[name]) / max(np.linalg.norm(expected[name]), 1e-30)), name)
        for name, gradient in jax.device_get(found).items()
    )


def compiled_step(mesh, params, opt_state, batch, config):
    where = [shardings(mesh, tree) for tree in (params, params, opt_state)]
    one_number = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    make = jax.jit(functools.partial(step, config=config), donate_argnums=(0, 1), out_shardings=(one_number, *where))
    with jax.set_mesh(mesh):
        return make.lower(params, opt_state, batch).compile()


def run(tensors, batch, expected, of_divergence, config: MeshConfig) -> dict:
    mesh = make_mesh(config.sizes(8))
    check_mesh(mesh.shape, CONFIG, ROWS)
    params = shard_tensors(mesh, tensors)
    abstract = jax.eval_shape(OPTIMIZER.init, params)
    opt_state = jax.jit(OPTIMIZER.init, out_shardings=shardings(mesh, abstract))(params)
    bytes_found = [bytes_on_first_device(tree) for tree in (params, opt_state)]
    local_batch = shard_batch(mesh, batch)
    with jax.set_mesh(mesh):
        diverged = jax.jit(jax.value_and_grad(divergence))(params, local_batch)
    compiled = compiled_step(mesh, params, opt_state, local_batch, CONFIG)
    value, gradients, params, opt_state = compiled(params, opt_state, local_batch)
    error, worst = largest_error(gradients, expected[1])
    (report,) = memory_reports(
        CONFIG, objective, OPTIMIZER, [mesh.shape], rows=ROWS, context=LENGTH, dtype=np.float32, remat=False
    )
    program = compiled.as_text()
    return {
        "loss_error": abs(float(value) / float(expected[0]) - 1),
        "gradient_error": error,
        "worst_gradient": worst,
        "divergence_errors": [
            abs(float(diverged[0]) / float(of_divergence[0]) - 1),
            largest_error(diverged[1], of_divergence[1])[0],
        ],
        "parts": {
            key: {name: list(x.addressable_shards[0].data.shape) for name, x in tree.items()}
            for key, tree in {"params": params, "gradients": gradients, "moments": opt_state[0].mu}.items()
        },
        "bytes": bytes_found,
        "reported_bytes": [report.parameters, report.optimizer],
        "exchanges": collectives(program, in_loops=False),
        "exchanges_in_loops": collectives(program, in_loops=True),
    }


def run_scanned(tensors, batch, expected, config: MeshConfig) -> dict:
    """With layers in a loop, which gathers the weights of one of them at a time."""
    mesh = make_mesh(config.sizes(8))
    params = shard_tensors(mesh, tensors)
    abstract = jax.eval_shape(OPTIMIZER.init, params)
    opt_state = jax.jit(OPTIMIZER.init, out_shardings=shardings(mesh, abstract))(params)
    local_batch = shard_batch(mesh, batch)
    compiled = compiled_step(mesh, params, opt_state, local_batch, SCANNED)
    value, gradients, *_ = compiled(params, opt_state, local_batch)
    program = compiled.as_text()
    return {
        "loss_error": abs(float(value) / float(expected[0]) - 1),
        "gradient_error": largest_error(gradients, expected[1])[0],
        "exchanges": collectives(program, in_loops=False),
        "exchanges_in_loops": collectives(program, in_loops=True),
    }


def draw(config) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    initial = named_parameters(GPTNeoForCausalLM(config, rngs=nnx.Rngs(0)))
    # Large enough that attention is not flat and every gradient counts.
    return {n: np.asarray(x) + 0.1 * random.normal(size=x.shape).astype(np.float32) for n, x in initial.items()}


def main() -> None:
    random = np.random.default_rng(1)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[0, -9:] = 0
    batch = {
        "input_ids": random.integers(0, CONFIG.vocab_size, (ROWS, LENGTH), dtype=np.int32),
        "segment_ids": segments,
    }
    expected = {
        config: jax.device_get(
            jax.jit(jax.value_and_grad(functools.partial(straightforward, config=config)))(draw(config), batch)
        )
        for config in (CONFIG, SCANNED)
    }
    of_divergence = jax.device_get(jax.jit(jax.value_and_grad(divergence))(draw(CONFIG), batch))
    found = {name: run(draw(CONFIG), batch, expected[CONFIG], of_divergence, mesh) for name, mesh in MESHES.items()}
    found["scanned"] = {
        name: run_scanned(draw(SCANNED), batch, expected[SCANNED], MESHES[name]) for name in ("fsdp", "mixed")
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
