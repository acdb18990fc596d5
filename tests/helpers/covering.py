"""Cases in which every pair of values of two factors occurs: far fewer than all combinations.

May be changed here: how cases are chosen.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Pair = frozenset[tuple[str, Any]]


def pairs(case: Mapping[str, Any]) -> set[Pair]:
    """All pairs of settings in a case."""
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}


def covering(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Mapping[str, Any]], bool] = lambda case: True
) -> list[dict[str, Any]]:
    """Cases that hold every pair that is allowed, the same ones whenever this is called.

    Each case begins with a pair that none had before, and takes of each further factor the value that adds most.

    Args:
        factors: the values of each.
        allowed: of a case in which some factors are still missing, whether it may be completed.
    """
    missing = [
        ((one, value), (other, second))
        for one, other in itertools.combinations(factors, 2)
        for value, second in itertools.product(factors[one], factors[other])
        if allowed({one: value, other: second})
    ]
    cases = []
    while missing:
        left = {frozenset(pair) for pair in missing}
        case = dict(missing[0])
        for factor, values in factors.items():
            if factor not in case:
                choices = [{**case, factor: value} for value in values]
                case = max(filter(allowed, choices), key=lambda choice: len(pairs(choice) & left))
        case = {factor: case[factor] for factor in factors}
        cases.append(case)
        missing = [pair for pair in missing if frozenset(pair) not in pairs(case)]
    return cases
