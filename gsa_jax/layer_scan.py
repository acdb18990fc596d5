"""Layers that repeat, as one loop: a program then has the code of one period instead of that of all layers.

May be changed here: which layers run in a loop, and how their parameters come together for it. What a layer computes
is `gsa_jax.model`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Carry = TypeVar("Carry")


class Run(NamedTuple):
    """Neighbouring layers that repeat their first `period` layers `repeats` times; 1 and 1 for a layer alone."""

    start: int
    period: int
    repeats: int


def repeated_runs(kinds: Sequence[Hashable]) -> list[Run]:
    """Cuts a model into runs; the first one found saves the most layers, and the rest is cut likewise.

    Args:
        kinds: of each layer; layers of equal kinds differ in their parameters' values only.
    """
    best = Run(0, 1, 1)
    for start in range(len(kinds)):
        for period in range(1, (len(kinds) - start) // 2 + 1):
            end = start + period
            while end < len(kinds) and kinds[end] == kinds[end - period]:
                end += 1
            repeats = (end - start) // period
            if period * (repeats - 1) > best.period * (best.repeats - 1):
                best = Run(start, period, repeats)
    if best.repeats == 1:
        return [Run(layer, 1, 1) for layer in range(len(kinds))]
    end = best.start + best.period * best.repeats
    after = [run._replace(start=end + run.start) for run in repeated_runs(kinds[end:])]
    return [*repeated_runs(kinds[: best.start]), best, *after]


def scan_layers(layers: Sequence[nnx.Module], run: Callable[[Any, Carry], Carry], carry: Carry) -> Carry:
    """`run(layer, carry)` of all layers in their order; those that repeat in a loop, with stacked parameters.

    The parameters stay where they are: their stack is made inside of the program, and along its first axis, the
    repeats, a mesh does not cut it.
    """
    split = [nnx.split(layer) for layer in layers]
    for start, period, repeats in repeated_runs([_kind(*parts) for parts in split]):
        if repeats == 1:
            carry = run(layers[start], carry)
            continue
        graphdefs = [graphdef for graphdef, _ in split[start : start + period]]
        states = [state for _, state in split[start : start + period * repeats]]
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *states[n::period]) for n in range(period)]

        def body(carry: Carry, states: Any, graphdefs: Any = graphdefs) -> tuple[Carry, None]:
            for graphdef, state in zip(graphdefs, states, strict=True):
                carry = run(nnx.merge(graphdef, state), carry)
            return carry, None

        carry, _ = jax.lax.scan(body, carry, stacked)
    return carry


def _kind(graphdef: nnx.GraphDef, state: nnx.State) -> Hashable:
    """Whatever of a layer is not the value of a parameter: its modules with their settings, and the shapes."""
    return graphdef, jax.tree.structure(state), tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
