"""What is read from the text of a compiled program, against programs whose numbers are known by hand.

May be changed here: which programs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.hlo import COLLECTIVES, Program

SPREAD = """
HloModule spread, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start.0 (p0: bf16[4,8]) -> bf16[32,8] {
  %p0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.0 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=7, dimensions={0}
}

%under_way.0 (p1: bf16[4,8]) -> bf16[32,8] {
  %p1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %gather.1 = bf16[32,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p1), channel_id=7, dimensions={0}
}

%all-reduce-scatter.0 (p2: f32[64]) -> f32[8] {
  %p2 = f32[64]{0} parameter(0)
  %zero = s32[] constant(0)
  %whole = f32[64]{0} all-reduce(%p2), channel_id=8, to_apply=%add
  ROOT %slice = f32[8]{0} dynamic-slice(%whole, %zero), dynamic_slice_sizes={8}
}

%more (state: (s32[], bf16[4,8])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %number = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(13)
  ROOT %less = pred[]{:T(512)} compare(%number, %limit), direction=LT
}

%again (state.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %state.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %number.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%state.1), index=1
  %begun = bf16[32,8]{1,0} fusion(%x), kind=kCustom, calls=%start.0
  %going = bf16[32,8]{1,0} fusion(%x), kind=kCustom, calls=%under_way.0
  %sent = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=9
  %got = bf16[4,8]{1,0} collective-permute-done(%sent)
  %two = s32[] constant(2)
  %next = s32[]{:T(128)} add(%number.1, %two)
  ROOT %state.2 = (s32[], bf16[4,8]{1,0}) tuple(%next, %got)
}

ENTRY %main (x.1: bf16[4,8], y: f32[64], z: f32[32]) -> f32[8] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %z = f32[32]{0} parameter(2)
  %three = s32[] constant(3)
  %begin = (s32[], bf16[4,8]{1,0}) tuple(%three, %x.1)
  %loop = (s32[], bf16[4,8]{1,0}) while(%begin), condition=%more, body=%again
  %both = (f32[64]{0}, f32[]) all-reduce(%y, %y), channel_id=10, to_apply=%add
  %another = f32[32]{0} all-reduce(%z), channel_id=10, to_apply=%add
  %pieces = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) all-to-all(%x.1, %x.1), channel_id=11
  ROOT %part = f32[8]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.0
}
"""


def test_bytes_of_each_kind_of_collective():
    """The loop counts 3, 5, ... 11: five times; its gather is in two fusions, and starts in one of them. Two
    exchanges of `shard_map` have one channel."""
    assert Program(SPREAD).collective_bytes() == {
        "all-gather": 5 * 32 * 8 * 2,
        "all-reduce": (2 * 64 + 32) * 4,
        "reduce-scatter": 64 * 4,
        "all-to-all": 2 * 4 * 8 * 2,
        "collective-permute": 5 * 4 * 8 * 2,
    }


# As a TPU writes a product of [256, 64] and [1024, 64] for each of 12 heads, a product that meets padding, and one of
# two matrices.
PRODUCTS = """
HloModule products

ENTRY %main (a: f32[256,12,64], b: f32[1024,12,64], c: bf16[2048,2,96], d: bf16[768,2,96]) -> f32[12,256,1024] {
  %a = f32[256,12,64]{2,1,0} parameter(0)
  %b = f32[1024,12,64]{2,1,0} parameter(1)
  %c = bf16[2048,2,96]{2,1,0} parameter(2)
  %d = bf16[768,2,96]{2,1,0} parameter(3)
  %heads = f32[12,256,1024] convolution(%a, %b), window={size=12 stride=11 lhs_dilate=12}, dim_labels=b0f_o0i->0bf
  %padded = f32[2048,768,3]{1,0,2} convolution(%c, %d), window={size=2 pad=1_1}, dim_labels=b0f_o0i->bf0
  ROOT %plain = f32[2048,768,1]{1,0,2} convolution(%c, %d), window={size=2}, dim_labels=b0f_o0i->bf0
}
"""


def test_products_that_are_written_as_convolutions():
    heads = 12 * 2 * 256 * 1024 * 64
    padded = 2 * 2048 * 768 * 96 * (1 + 2 + 1)  # places of a window of two over two, padded on both sides
    assert Program(PRODUCTS).matrix_flops() == heads + padded + 2 * 2048 * 768 * 2 * 96


# As CUDA's compiler has cuBLAS multiply four pairs of [16, 512] and [16, 512]; the workspace is a result as well.
LIBRARY = """
HloModule library

ENTRY %main (a: f32[4,16,512], b: f32[4,16,512]) -> f32[4,16,16] {
  %a = f32[4,16,512]{2,1,0} parameter(0)
  %b = f32[4,16,512]{2,1,0} parameter(1)
  %both = (f32[4,16,16]{2,1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %product = f32[4,16,16]{2,1,0} get-tuple-element(%both), index=0
}
"""


def test_products_of_a_library():
    assert Program(LIBRARY).matrix_flops() == 4 * 2 * 16 * 16 * 512


@pytest.mark.parametrize("loops", [1, 7])
def test_products_of_a_real_program(loops):
    def run(x, weights):
        def step(x, weight):
            return jnp.tanh(jnp.einsum("bij,bjk->bik", x, weight)), None

        return jax.lax.scan(step, x, weights)[0]

    x, weights = jnp.zeros((3, 16, 24)), jnp.zeros((loops, 3, 24, 24))
    text = jax.jit(run).lower(x, weights).compile().as_text()
    assert Program(text).matrix_flops() == loops * 2 * 3 * 16 * 24 * 24


def test_the_dearer_branch_counts():
    def run(dear, x):
        return jax.lax.cond(dear, lambda x: x @ x @ x, lambda x: x @ x, x)

    text = jax.jit(run).lower(True, np.zeros((32, 32), np.float32)).compile().as_text()
    program = Program(text)
    assert program.matrix_flops() == 2 * 2 * 32**3
    assert program.collective_bytes() == dict.fromkeys(COLLECTIVES, 0)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("module {}")
