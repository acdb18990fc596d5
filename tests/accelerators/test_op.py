"""The op, forward and backward, as the compilers of TPUs and GPUs take it.

May be changed here: which calls are compiled. Every pair of two settings occurs in one of them, from small to large,
so that the first failure is the smallest program.
"""

import pytest

from helpers.covering import covering
from helpers.programs import OpCase, compiled, lower_op

pytestmark = pytest.mark.accelerators

MACHINES = ("v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1", "h100", "a100")
FACTORS = {
    "rows": (1, 2, 8),
    "window": (0, 16, 64, 256),
    "num_splats": (0, 2, 64, 128),
    "kept": (0, 8, 32),
    "head_dim": (48, 64, 128),
    "machine": MACHINES,
    "direction": ("backward", "forward"),
    "dtype": ("bfloat16", "float32"),
    "masks": ("attention_mask", "segment_ids", "none"),
}


def size(case):
    return case["rows"] * case["head_dim"] * (case["window"] + case["num_splats"])


CASES = sorted(covering(FACTORS, lambda case: bool(case.get("window", 1) or case.get("num_splats", 1))), key=size)


def compile_case(machine, **settings):
    found = compiled(machine, lower_op, OpCase(length=512, heads=2, **settings))
    assert found.peak > 0


@pytest.mark.quick
@pytest.mark.parametrize("machine", ["v4:1x1x1", "v5e:1x1", "v6e:1x1", "h100"])
def test_the_smallest_gradient(machine):
    settings = {"rows": 2, "head_dim": 64, "num_splats": 2, "window": 16, "direction": "backward"}
    compile_case(machine, **settings, dtype="bfloat16", masks="attention_mask")


@pytest.mark.quick
@pytest.mark.parametrize("machine", ["v5e:1x1", "h100"])
def test_the_smallest_gradient_with_kept_keys(machine):
    settings = {"rows": 2, "head_dim": 64, "num_splats": 2, "window": 16, "kept": 8, "direction": "backward"}
    compile_case(machine, **settings, dtype="bfloat16", masks="attention_mask")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_every_pair_of_settings(case):
    compile_case(**case)
