"""How much memory a training step takes on each device, estimated from shapes: nothing is computed or compiled.

What a machine's own compiler says is `gsa_jax.train.compiled`. May be changed here: what is counted. Parameters,
gradients and optimiser state are exact; activations are what differentiation keeps for the backward pass, before the
compiler merges or recomputes any of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.extend import core
from jax.sharding import AbstractMesh, NamedSharding

from gsa_jax.config import GPTNeoConfig
from gsa_jax.loss import BLOCK_BYTES
from gsa_jax.model import GPTNeoBlock
from gsa_jax.parameters import TOKEN_EMBEDDING, expected_shapes
from gsa_jax.sharding import check_mesh, shardings
from gsa_jax.train.config import MeshConfig
from gsa_jax.train.objectives import Objective

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Bytes on each device.

    Attributes:
        mesh: size of each axis.
        rows: of the batch on each device at a time.
        parameters: float32 parameters, trained or not, and the teacher's.
        gradients: float32; twice where they are accumulated, the sum and the newest.
        optimizer: its state.
        ema: the moving average of the parameters.
        weights: copies of the parameters for the computation, in its dtype and gathered over `fsdp`. Copies of all
            layers are kept, or with remat those of one block and of what is outside of the blocks.
        activations: what the forward pass keeps for the backward pass.
        working: what the backward pass needs at a time besides: the logits of a block of tokens, or with remat all
            activations of a layer, whichever is larger; and with `fsdp` the gradient of the token embedding, which is
            whole on every device until head and input have both added to it.
    """

    mesh: Mapping[str, int]
    rows: int
    parameters: int
    gradients: int
    optimizer: int
    ema: int
    weights: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """All of it; a little more than the peak, because not all of it is alive at once."""
        kept = self.parameters + self.gradients + self.optimizer + self.ema
        return kept + self.weights + self.activations + self.working


def meshes_like(config: MeshConfig) -> list[dict[str, int]]:
    """The mesh that is asked for, and others of as many devices; without one, meshes of 1, 8 and 64 devices.

    Raises:
        InputError: a size is below 1.
    """
    asked = config.sizes((config.data or 1) * config.fsdp * config.tensor)
    meshes = [asked]
    for devices in (1, 8, 64) if math.prod(asked.values()) == 1 else (math.prod(asked.values()),):
        for fsdp, tensor in ((1, 1), (devices, 1), (8, 1), (devices // 2, 2)):
            if fsdp and devices % (fsdp * tensor) == 0:
                mesh = {"data": devices // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
                if mesh not in meshes:
                    meshes.append(mesh)
    return meshes


def memory_reports(
    config: GPTNeoConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    meshes: Sequence[Mapping[str, int]],
    *,
    rows: int,
    context: int,
    dtype: jax.typing.DTypeLike,
    remat: bool,
    accumulate: int = 1,
    ema: bool = False,
    trained: Callable[[str], bool] = lambda name: True,
    teacher: Mapping[str, jax.ShapeDtypeStruct] | None = None,
) -> list[MemoryReport]:
    """What one step takes on a device of each mesh.

    Args:
        objective: as the step will have it, with this `dtype` and `remat`.
        meshes: sizes of their axes (`MeshConfig.sizes`).
        rows: of text per step, over all devices.
        trained: whether the parameter of this name is.
        teacher: the teacher's parameters; those that are not trained if None, as in the loop.

    Raises:
        InputError: a mesh does not divide the rows or the model.
    """
    for mesh in meshes:
        check_mesh(mesh, config, rows // accumulate)
    shapes: Shapes = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in expected_shapes(config).items()}
    moved = {name: shape for name, shape in shapes.items() if trained(name)}
    frozen = {name: shape for name, shape in shapes.items() if not trained(name)}
    teacher = dict(teacher or {})
    state = jax.eval_shape(optimizer.init, moved)
    ids = jax.ShapeDtypeStruct((1, context), jnp.int32)

    def of_batch(moved: Any, frozen: Any, teacher: Any, batch: Any) -> Any:
        return jax.vjp(lambda moved: objective({**frozen, **moved}, teacher or frozen, batch)[0], moved)[1]

    kept = _residuals(of_batch, moved, frozen, teacher, {"input_ids": ids, "segment_ids": ids})
    in_block = _block_residuals(config, context, dtype) if remat else []

    def report(mesh: Mapping[str, int]) -> MemoryReport:
        local_rows = rows // (accumulate * mesh["data"] * mesh["fsdp"])

        def activations(found: Iterable[jax.ShapeDtypeStruct]) -> int:
            copies = {shape.shape for shape in shapes.values()}
            total = 0
            for array in found:
                # An array of a parameter's shape is a copy of it, which `weights` counts; so is a stack of them, of
                # layers that run in a loop. Activations are of one row.
                stacked = array.shape[1:] in copies and array.shape[0] > 1
                if array.shape not in copies and not stacked:
                    split = {config.num_heads, config.mlp_dim} & set(array.shape[1:])
                    total += _size(array) // (mesh["tensor"] if split else 1)
            return total * local_rows

        # The loss holds those of a block of tokens, with their exponentials and their gradient.
        logits = 3 * min(local_rows * context * config.vocab_size * 4 // mesh["tensor"], BLOCK_BYTES)
        embedding = _size(shapes[TOKEN_EMBEDDING]) if mesh["fsdp"] > 1 and trained(TOKEN_EMBEDDING) else 0
        trained_bytes = _bytes_on_device(mesh, moved)
        return MemoryReport(
            mesh=dict(mesh),
            rows=local_rows,
            parameters=_bytes_on_device(mesh, shapes) + _bytes_on_device(mesh, teacher),
            gradients=trained_bytes * (2 if accumulate > 1 else 1),
            optimizer=_bytes_on_device(mesh, state),
            ema=trained_bytes if ema else 0,
            weights=_weights(mesh, shapes, dtype, remat),
            activations=activations(kept),
            working=max([logits, *map(activations, in_block)]) + embedding,
        )

    return [report(mesh) for mesh in meshes]


def _size(array: Any) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _bytes_on_device(mesh: Mapping[str, int], tree: Any) -> int:
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))

    def of_leaf(array: jax.ShapeDtypeStruct, where: NamedSharding) -> int:
        return math.prod(where.shard_shape(array.shape)) * array.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, tree, shardings(abstract, tree))))


def _weights(mesh: Mapping[str, int], shapes: Shapes, dtype: jax.typing.DTypeLike, remat: bool) -> int:
    if mesh["fsdp"] == 1 and jnp.dtype(dtype) == jnp.float32:
        return 0
    gathered = {**mesh, "fsdp": 1}
    blocks: dict[str, Shapes] = {}
    for name, shape in shapes.items():
        layer = name.split(".")[2] if name.startswith("transformer.h.") else ""
        blocks.setdefault(layer, {})[name] = jax.ShapeDtypeStruct(shape.shape, dtype)
    sizes = {layer: _bytes_on_device(gathered, block) for layer, block in blocks.items()}
    outside = sizes.pop("")
    return outside + (max(sizes.values()) if remat else sum(sizes.values()))


def _block_residuals(
    config: GPTNeoConfig, context: int, dtype: jax.typing.DTypeLike
) -> list[list[jax.ShapeDtypeStruct]]:
    """What each kind of block keeps of one row when it is recomputed."""
    layers = {(window, config.layer_splats.get(layer)): layer for layer, window in enumerate(config.windows)}

    def of_layer(layer: int) -> list[jax.ShapeDtypeStruct]:
        computing = dataclasses.replace(config, dtype=jnp.dtype(dtype).name)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: GPTNeoBlock(computing, layer, rngs=nnx.Rngs(0))))

        def run(params: Any, hidden_states: jax.Array, segment_ids: jax.Array) -> Any:
            def block(params: Any, hidden_states: jax.Array) -> jax.Array:
                return nnx.merge(graphdef, params)(hidden_states, segment_ids > 0, segment_ids)[0]

            return jax.vjp(block, params, hidden_states)[1]

        hidden_states = jax.ShapeDtypeStruct((1, context, config.hidden_size), dtype)
        return _residuals(run, params, hidden_states, jax.ShapeDtypeStruct((1, context), jnp.int32))

    return [of_layer(layer) for layer in layers.values()]


def _residuals(make_vjp: Callable[..., Any], *args: Any) -> list[jax.ShapeDtypeStruct]:
    """The arrays that a vjp function of these arguments holds, each once, without the arguments themselves."""
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(make_vjp(*args)))(*args).jaxpr
    given = set(jaxpr.invars)
    found = {v: v.aval for v in jaxpr.outvars if isinstance(v, core.Var) and v not in given}
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in found.values()]  # type: ignore[union-attr]
