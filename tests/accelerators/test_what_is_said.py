"""What is read from compilers and programs, where it is known by hand.

May be changed here: what is known.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gsa_jax.hlo import Program
from gsa_jax.sharding import make_mesh
from gsa_jax.topology import DoesNotFit, compile_for, parse_topology
from helpers.programs import compiled, on_one_device

pytestmark = pytest.mark.accelerators

MACHINES = ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1")


def lower_large(devices, gib):
    array = jax.ShapeDtypeStruct((gib * 2**18, 1024), jnp.float32)
    return jax.jit(lambda x: x * 2).lower(*on_one_device(devices, (array,)))


@pytest.mark.parametrize("machine", MACHINES)
def test_the_memory_of_a_machine_is_what_its_compiler_says(machine):
    topology = parse_topology(machine)
    found = compile_for(topology, lower_large, 110)
    assert isinstance(found, DoesNotFit)
    assert found.needed == 220 * 2**30  # argument and result
    available = re.search(r"available HBM \(([\d.]+)G\)", found.line)
    assert float(available[1]) == round(topology.memory / 2**30, 2)


@dataclasses.dataclass(frozen=True)
class Products:
    """`steps` products of `[rows, width]` and `[width, width]`, one after another, weights cut over `fsdp`."""

    rows: int = 512
    width: int = 256
    steps: int = 5


def lower_products(devices, sizes):
    mesh = make_mesh({"data": 1, "fsdp": len(devices), "tensor": 1}, devices)

    def run(x, weights):
        def product(x, weight):
            whole = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))
            return jnp.tanh(x @ whole), None

        return jax.lax.scan(product, x, weights)[0]

    def array(*shape, cut):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, cut))

    x = array(sizes.rows, sizes.width, cut=P("fsdp"))
    weights = array(sizes.steps, sizes.width, sizes.width, cut=P(None, "fsdp"))
    return jax.jit(run, out_shardings=NamedSharding(mesh, P("fsdp"))).lower(x, weights)


@pytest.mark.quick
@pytest.mark.parametrize("machine", ["v5e:2x4", "h100:8"])
def test_products_and_bytes_of_a_loop(machine):
    sizes = Products()
    program = Program(compiled(machine, lower_products, sizes).text)
    rows = sizes.rows // 8
    assert program.matrix_flops() == sizes.steps * 2 * rows * sizes.width**2
    exchanged = program.collective_bytes()
    assert exchanged.pop("all-gather") == sizes.steps * sizes.width**2 * 2
    assert set(exchanged.values()) == {0}


def lower_sum(devices, width):
    mesh = make_mesh({"data": len(devices), "fsdp": 1, "tensor": 1}, devices)
    rows = jax.ShapeDtypeStruct((len(devices), width), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    return jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=NamedSharding(mesh, P())).lower(rows)


@pytest.mark.quick
@pytest.mark.parametrize("machine", ["v5e:2x4", "h100:8"])
def test_bytes_of_a_sum_over_devices(machine):
    exchanged = Program(compiled(machine, lower_sum, 4096).text).collective_bytes()
    assert exchanged.pop("all-reduce") == 4096 * 4
    assert set(exchanged.values()) == {0}
