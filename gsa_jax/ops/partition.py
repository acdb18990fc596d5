"""What runs inside of `jit` on a mesh of devices: which arrays are kept where.

May be changed here: what the compiler is told about arrays on a mesh. Without a mesh these functions do nothing. Which
mesh there is, and where parameters live, is `gsa_jax.sharding`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

R = TypeVar("R")

MESH_AXES = ("data", "fsdp", "tensor")
"""`data` cuts rows of the batch; `fsdp` rows of the batch and one side of each matrix; `tensor` heads with their
splats, and the MLP's width."""

BATCH = P(("data", "fsdp"))
"""Of an array whose first axis is the rows of a batch."""

ROWS_AND_HEADS = P(("data", "fsdp"), "tensor")
TOKENS_AND_HEADS = P(("data", "fsdp"), None, "tensor")
HEADS = P("tensor")
"""How arrays `[B, H, ...]`, `[B, T, H, ...]` and `[H, ...]` are cut."""

TABLE = P(None, "fsdp")
"""How an embedding `[V, E]` is cut: vocabularies rarely divide (50257 = 29 x 1733)."""


def keep_rows_apart(x: Array) -> Array:
    """Tells the compiler that an array `[B, ...]` is cut along its rows and nowhere else.

    For the hidden states between blocks: each device then gathers the weights of a block and keeps its own rows.
    Without this, the compiler gathers rows instead, and adds up partial logits of the whole batch.
    """
    return jax.lax.with_sharding_constraint(x, BATCH) if on_mesh() else x


def keep_whole(x: Array) -> Array:
    """Tells the compiler that every device has all of this array."""
    return jax.lax.with_sharding_constraint(x, P()) if on_mesh() else x


def per_rows_and_heads(function: Callable[..., R], in_specs: Any, out_specs: Any) -> Callable[..., R]:
    """Runs a function on each device's own rows and heads; devices exchange nothing meanwhile.

    Without this, the compiler makes devices agree on a branch, and adds up gradients of what they share, at every step
    of a loop.
    """
    if not on_mesh():
        return function
    # With `check_vma`, gradients of what is shared would be added up at each use of it, inside of loops.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_of_table(gradient: Float[Array, "V E"]) -> Float[Array, "V part_of_E"]:
    """Inside of `per_rows_and_heads`: the sum of what each device's rows give, for a parameter `P(None, "fsdp")`.

    Each device gets its own part, as it has of the parameter. Left to itself, the compiler sends hidden states around.
    """
    if not on_mesh():
        return gradient

    def scattered(x: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)

    def cut(x: jax.Array) -> jax.Array:
        # Between processes, a CPU's reduce-scatter (gloo) now and then gives other numbers at the end of the array.
        size = x.shape[1] // jax.lax.axis_size("fsdp")
        return jax.lax.dynamic_slice_in_dim(jax.lax.psum(x, "fsdp"), size * jax.lax.axis_index("fsdp"), size, axis=1)

    return jax.lax.psum(jax.lax.platform_dependent(gradient, cpu=cut, default=scattered), "data")


def on_mesh() -> bool:
    """Whether a program is being made for a mesh."""
    return set(MESH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)
