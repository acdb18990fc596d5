"""What compilers make of products: float32 is multiplied as float32, and a 16-bit model pays nothing for that.

May be changed here: which programs are looked at.
"""

import dataclasses
import re

import pytest

from gsa_jax.topology import compile_for, parse_topology
from gsa_jax.train.compiled import lower_step
from gsa_jax.train.config import Finetune, MeshConfig
from helpers.programs import HYBRID_STORY, OpCase, compiled_text, lower_op, lower_prefill, run

pytestmark = [pytest.mark.accelerators, pytest.mark.quick]

CASE = OpCase(
    direction="backward",
    dtype="float32",
    rows=2,
    length=248,  # in longer texts, a TPU's products are in a kernel: tests/ops/test_kernel.py looks at those
    heads=2,
    head_dim=64,
    num_splats=64,
    window=64,
    masks="attention_mask",
)


def products(text: str) -> list[str]:
    """Lines of matrix products: instructions, or calls of NVIDIA's library."""
    return [line for line in text.splitlines() if re.search(r" (convolution|dot)\(|custom-call.*gemm", line)]


def is_exact(product: str) -> bool:
    """Whether it multiplies all bits of its operands; how many it has, says their type."""
    return bool(re.search(r'operand_precision(=\{highest,highest\}|":\["HIGHEST","HIGHEST"\])', product))


@pytest.mark.parametrize("machine", ["v5e:1x1", "h100"])
def test_a_float32_model_multiplies_float32(machine):
    """Exact attention of local layers, scores, features and sums through splats, projections and the head."""
    for text in (
        compiled_text(machine, lower_prefill, HYBRID_STORY, 2, 256),
        compiled_text(machine, lower_op, CASE),
    ):
        found = products(text)
        assert len(found) > 10
        assert [product for product in found if not is_exact(product)] == []


@pytest.mark.parametrize("machine", ["v5e:1x1", "h100"])
def test_a_bfloat16_model_takes_fast_products_but_for_exponents(machine):
    """Log features of queries and of keys are exponents; a compiler may put both into one product."""
    forward = dataclasses.replace(CASE, dtype="bfloat16", direction="forward")
    found = products(compiled_text(machine, lower_op, forward))
    assert len(found) > 10 and sum(map(is_exact, found)) in (1, 2)


@pytest.mark.parametrize("machine", ["v5e:2x4", "h100:8"])
def test_devices_add_up_gradients_in_float32(machine, hybrid):
    """Also those of a bfloat16 computation. Over `fsdp`, each device gets its own part of the embedding's, as it has of
    the parameter."""
    config = run(Finetune, hybrid, mesh=MeshConfig(fsdp=8))
    text = compile_for(parse_topology(machine), lower_step, config).text
    sums = [line for line in text.splitlines() if re.search(r" (all-reduce|reduce-scatter)(-start)?\(", line)]
    assert any("f32[" in line for line in sums)
    assert [line for line in sums if "bf16[" in line] == []
    if machine == "h100:8":
        shape = f"{HYBRID_STORY.vocab_size},{HYBRID_STORY.hidden_size // 8}"
        assert re.search(rf"f32\[{shape}\].* reduce-scatter(-start)?\(", text)
