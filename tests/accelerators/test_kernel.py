"""The kernel of splat attention, as the compilers of TPUs take it: in every program that `kernel_takes` says has one.

May be changed here: which calls are compiled. That one is as right as another is tested in `tests/ops/test_kernel.py`.
"""

import pytest

from helpers.covering import covering
from helpers.programs import OpCase, compiled, lower_op

pytestmark = pytest.mark.accelerators

FACTORS = {
    "direction": ("backward", "forward"),
    "machine": ("v5e:1x1", "v4:1x1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"),
    "dtype": ("bfloat16", "float32"),
    "heads": (2, 3),
    "head_dim": (64, 48, 128),
    "window": (64, 0, 100, 256),
    "num_splats": (64, 2, 128),
    "masks": ("segment_ids", "none"),
}
CASES = covering(FACTORS)


def kernels(case):
    """How many kernels a program has."""
    settings = {"rows": 2, "length": 512, **case}
    found = compiled(settings.pop("machine"), lower_op, OpCase(**settings))
    return found.text.count('custom_call_target="tpu_custom_call"')


@pytest.mark.quick
@pytest.mark.parametrize("machine", ["v4:1x1x1", "v5e:1x1", "v6e:1x1"])
def test_a_training_step_has_a_kernel_in_each_direction(machine):
    assert kernels(CASES[0] | {"machine": machine}) == 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_every_pair_of_settings(case):
    assert kernels(case) == (2 if case["direction"] == "backward" else 1)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("machine", ["v4:1x1x1", "v5e:1x1"])
def test_the_largest_chunk_fits_into_vector_memory(machine, head_dim):
    settings = {"direction": "backward", "dtype": "float32", "masks": "segment_ids", "heads": 2}
    assert kernels(settings | {"machine": machine, "head_dim": head_dim, "window": 256, "num_splats": 128}) == 2
