"""What splat attention costs: linear in the tokens, and a decoding loop that updates its state in place.

Counted from the program rather than timed, so that the result does not depend on the machine.
"""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from gsa_jax.ops.api import splat_attention
from gsa_jax.ops.state import Splats, init_splat_state

pytestmark = pytest.mark.usefixtures("optimised")

HEADS, DIM, SPLATS = 2, 8, 16


def operations(jaxpr: core.Jaxpr) -> int:
    """Multiply-adds of matrix products plus one for each number written by anything else, loops counted in full."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        assert name != "while", "a program whose length is not known"
        inner = [operations(x) for x in map(as_jaxpr, jax.tree.leaves(equation.params)) if x is not None]
        inner = max(inner, default=0) if name == "cond" else sum(inner)
        if inner:
            total += inner * (equation.params["length"] if name == "scan" else 1)
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape  # type: ignore[union-attr]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)  # type: ignore[union-attr]
        else:
            total += sum(math.prod(x.aval.shape) for x in equation.outvars)  # type: ignore[union-attr]
    return total


def as_jaxpr(parameter: object) -> core.Jaxpr | None:
    if isinstance(parameter, core.ClosedJaxpr):
        return parameter.jaxpr
    return parameter if isinstance(parameter, core.Jaxpr) else None


def forward(query, key, value, splats, *, window: int, implementation: str | None = None):
    mask = jnp.ones(query.shape[:2], bool)
    return splat_attention(
        query,
        key,
        value,
        splats,
        window=window,
        attention_mask=mask,
        implementation=implementation,  # type: ignore[arg-type]
    )


def forward_backward(*arrays, window: int, implementation: str | None = None):
    def loss(*arrays):
        return jnp.sum(forward(*arrays, window=window, implementation=implementation)[0] ** 2)

    return jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)


def shapes(length: int):
    token = jax.ShapeDtypeStruct((1, length, HEADS, DIM), jnp.float32)
    centers = jax.ShapeDtypeStruct((HEADS, SPLATS, DIM), jnp.float32)
    return token, token, token, Splats(centers, jax.ShapeDtypeStruct((HEADS, SPLATS), jnp.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [forward, pytest.param(forward_backward, marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", [64, *(pytest.param(x, marks=pytest.mark.slow) for x in (0, 300))])
def test_operations_are_linear_in_tokens(window: int, function) -> None:
    def count(length: int, implementation: str | None = None) -> int:
        run = functools.partial(function, window=window, implementation=implementation)
        return operations(jax.make_jaxpr(run)(*shapes(length)).jaxpr)

    for length in (1024, 16384):
        assert count(2 * length) <= 2.2 * count(length)
    # The count can tell: the definition is quadratic.
    assert count(2048, "reference") > 3 * count(1024, "reference")


@pytest.mark.slow
@pytest.mark.parametrize("function", [forward, forward_backward])
@pytest.mark.parametrize("window", [0, 64])
def test_memory_is_linear_in_tokens(window: int, function) -> None:
    def temporary_bytes(length: int) -> int:
        run = jax.jit(functools.partial(function, window=window))
        analysis = run.lower(*shapes(length)).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(4096)
    assert 0 < long <= 2.2 * short


@pytest.mark.slow
def test_backward_keeps_only_states_at_chunk_boundaries() -> None:
    """Twice the splats cost no more than twice the saved states, far below what each token's features would take."""
    length = 4096
    run = jax.jit(functools.partial(forward_backward, window=64))
    analysis = run.lower(*shapes(length)).compile().memory_analysis()
    assert analysis is not None
    tokens = 4 * length * HEADS * DIM
    features = 4 * length * HEADS * SPLATS
    assert analysis.temp_size_in_bytes < 12 * tokens + 3 * features


def test_decoding_updates_the_window_in_place() -> None:
    window = 8192
    token = jnp.ones((1, 1, HEADS, DIM))
    splats = Splats(jnp.ones((HEADS, SPLATS, DIM)), jnp.zeros((HEADS, SPLATS)))

    def decode(splats, state):
        def step(carried):
            slot, token, state = carried
            mask = jnp.ones((1, 1), bool)
            result = splat_attention(
                token, token, token, splats, window=window, attention_mask=mask, initial_state=state
            )
            return slot + 1, *result

        return jax.lax.while_loop(lambda carried: carried[0] < 100, step, (0, token, state))

    state = init_splat_state(splats, 1, window, jnp.float32)
    analysis = jax.jit(decode, donate_argnums=1).lower(splats, state).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < state.key.nbytes / 2
    assert analysis.alias_size_in_bytes >= state.key.nbytes + state.value.nbytes
