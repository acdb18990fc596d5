"""The PyTorch code of an export computes what this package computes: two implementations of one definition.

May be changed here: the grid of configurations. Neither implementation knows of the other.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from gsa_jax import SplatConfig, generate
from gsa_jax.convert.pytorch import modeling_gsa
from gsa_jax.convert.pytorch.modeling_gsa import GSASelfAttention
from gsa_jax.ops import Splats, splat_attention
from gsa_jax.ops.chunked import _SCHEDULES, Schedule
from helpers.hf_oracle import torch_logits
from helpers.hf_splats import hf_config, hf_splat_model
from helpers.splat_cases import Case, draw, relative_error
from helpers.tiny_models import random_ids, relative_rms, tiny_splat_model

pytestmark = pytest.mark.parity

SLOW = pytest.mark.slow
LENGTH = 30
TERMS = ("log_amplitudes", "norm_gain", "far_gain")
NAMES = ("centers", "log_scales", *TERMS)

ALL_TERMS = dict.fromkeys(TERMS, True)
MODES = {
    "pure": SplatConfig(num_splats=3, window=0),
    "hybrid": SplatConfig(num_splats=3, window=6, norm_gain=True),
    "kept": SplatConfig(num_splats=3, window=5, kept=4, layers="all", importance="learned", **ALL_TERMS),
    "kept by norm": SplatConfig(num_splats=3, window=2, kept=3, far_gain=True),
    "by layer": SplatConfig(num_splats=(2, 5), window=(0, 6), kept=(0, 3), layers="all", log_amplitudes=True),
    "window alone": SplatConfig(num_splats=0, window=6, layers="all"),
    "kept alone": SplatConfig(num_splats=0, window=5, kept=4),
    "a local layer": SplatConfig(num_splats=3, window=5, layers=(0,)),
    "attached": SplatConfig(num_splats=3, layers="all"),
}


def attention(splats: Splats, window: int, kept: int) -> GSASelfAttention:
    """The attention of one layer that has these splats."""
    heads, count, head_dim = splats.centers.shape
    terms = {name: count > 0 and getattr(splats, name) is not None for name in TERMS}
    settings = {
        "num_splats": count,
        "window": window,
        "kept": kept,
        "layers": "all",
        "importance": "norm" if splats.importance is None else "learned",
    }
    shape = {"hidden_size": heads * head_dim, "num_heads": heads, "num_layers": 1}
    layer = GSASelfAttention(
        hf_config(shape | {"attention_types": [[["global"], 1]], "splats": settings | terms}), "global", 0
    )
    own = {field.name: getattr(splats, field.name) for field in dataclasses.fields(splats)}
    tensors = {f"splat_{name}": torch.from_numpy(np.array(x)) for name, x in own.items() if x is not None and x.size}
    assert not layer.load_state_dict(tensors, strict=False).unexpected_keys
    return layer


def to_torch(x: jax.Array) -> torch.Tensor:
    """`[B, T, H, D]` as `[B, H, T, D]`."""
    return torch.from_numpy(np.array(x)).transpose(1, 2)


def additive_mask(mask: jax.Array) -> torch.Tensor:
    """`[B, 1, T, T]`, as transformers makes it."""
    seen = torch.from_numpy(np.array(mask))[:, None, None, :] & torch.ones(mask.shape[1], mask.shape[1]).bool().tril()
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def attend(layer: GSASelfAttention, case: Case, queries: int = LENGTH) -> np.ndarray:
    """Outputs `[B, T, H, D]` of the last tokens, as a cache of the others makes them."""
    query, key, value = map(to_torch, case[:3])
    with torch.no_grad():
        output, weights = layer._attn(query[:, :, -queries:], key, value, additive_mask(case.mask)[:, :, -queries:])
    assert weights is None
    return output.transpose(1, 2).numpy()


@functools.cache
def definition(window: int, kept: int):
    """Outputs by this package, and gradients of their weighted sum by all floats of a case."""

    def call(case: Case, weights: jax.Array):
        def loss(query: jax.Array, key: jax.Array, value: jax.Array, splats: Splats):
            options: dict[str, Any] = {"window": window, "kept": kept, "implementation": "reference"}
            output, _ = splat_attention(query, key, value, splats, attention_mask=case.mask, **options)
            return jnp.sum(jnp.where(case.mask[:, :, None, None], output, 0) * weights), output

        return jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*case[:4])

    return jax.jit(call)


def weights_of(case: Case) -> np.ndarray:
    return np.random.default_rng(5).normal(size=case.value.shape).astype(np.float32)


CASES = {
    "pure": (0, 0, {"num_splats": 3}),
    "hybrid": (5, 0, {"num_splats": 3, "optional": True, "pads": 0.2}),
    "one token": (1, 0, {"num_splats": 1, "optional": True}),
    "kept": (5, 4, {"num_splats": 3, "optional": True, "learned": True, "pads": 0.2}),
    "kept, pure": (0, 4, {"num_splats": 3, "pads": 0.2}),
    "kept, no splats": (3, 4, {"num_splats": 0, "learned": True, "pads": 0.2}),
    "all kept": (3, 50, {"num_splats": 2}),
    "window, no splats": (4, 0, {"num_splats": 0, "pads": 0.2}),
    "window holds all": (40, 3, {"num_splats": 2, "pads": 0.2}),
    # Each Gaussian is far below what float32 can hold.
    "underflow": (4, 2, {"num_splats": 8, "head_dim": 48, "scale": 0.3}),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_definition(name):
    window, kept, options = CASES[name]
    case = draw(LENGTH, seed=len(name), **options)
    gradients, want = definition(window, kept)(case, weights_of(case))
    layer = attention(case.splats, window, kept)
    tokens = np.array(case.mask)
    tolerance = 1e-3 if name == "underflow" else 2e-6
    assert relative_error(attend(layer, case)[tokens], np.array(want)[tokens]) < tolerance
    assert relative_error(attend(layer, case, 1)[tokens[:, -1:]], np.array(want)[:, -1:][tokens[:, -1:]]) < tolerance

    inputs = [to_torch(x).requires_grad_() for x in case[:3]]
    output, _ = layer._attn(*inputs, additive_mask(case.mask))
    real = to_torch(np.broadcast_to(tokens[:, :, None, None], case.value.shape))
    (output * real * to_torch(weights_of(case))).sum().backward()
    for got, expected in zip(inputs, gradients[:3], strict=True):
        assert got.grad is not None
        assert relative_error(got.grad.transpose(1, 2), expected, 1.0) < 10 * tolerance
    for term in NAMES:
        parameter, expected = getattr(layer, f"splat_{term}"), getattr(gradients[3], term)
        if parameter is not None:
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert relative_error(got, expected, 1.0) < 10 * tolerance, term


def test_of_keys_that_are_as_important_the_older_ones_are_kept():
    case = draw(LENGTH, 3)
    case = case._replace(key=jnp.sign(case.key))  # all norms are the same number
    layer = attention(case.splats, 5, 4)
    _, want = definition(5, 4)(case, weights_of(case))
    assert relative_error(attend(layer, case), want) < 2e-6
    kept = layer._is_kept(
        layer._rank(to_torch(case.key), to_torch(case.value)), torch.ones(1, 1, LENGTH, LENGTH).bool()
    )
    assert torch.equal(kept, (torch.arange(LENGTH) < 4).expand_as(kept))


@pytest.mark.parametrize("name", ["kept", "window, no splats"])
def test_queries_a_few_at_a_time_give_the_same(monkeypatch, name):
    window, kept, options = CASES[name]
    case = draw(LENGTH, **options)
    layer = attention(case.splats, window, kept)
    want = attend(layer, case)
    for at_once in (1, 2 * 2 * 3 * LENGTH * 7):
        monkeypatch.setattr(modeling_gsa, "_AT_ONCE", at_once)
        np.testing.assert_allclose(attend(layer, case), want, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, list | tuple) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_memory_is_bounded_in_both_passes(monkeypatch):
    """All scores `[B, H, T, T]` would be 2^16 numbers, and through single splats 2^20."""
    monkeypatch.setattr(modeling_gsa, "_AT_ONCE", 2**15)
    case = draw(128, 16, optional=True)
    inputs = [to_torch(x).requires_grad_() for x in case[:3]]
    layer = attention(case.splats, 5, 4)
    with Largest() as largest:
        layer._attn(*inputs)[0].sum().backward()
    assert largest.elements == 2**15


def test_a_window_that_holds_all_is_gpt_neos_attention():
    """Heads are masked, and weights dropped, as there."""
    case = draw(LENGTH, 2)
    layer = attention(case.splats, LENGTH, 0)
    plain = GPTNeoSelfAttention(layer.config, "global", 0)
    inputs = [*map(to_torch, case[:3]), additive_mask(case.mask), torch.tensor([0.0, 1.0])[None, :, None, None]]
    for share in (0.0, 0.5):
        outputs = []
        for module in (layer, plain):
            module.attn_dropout.p = share
            torch.manual_seed(0)
            outputs.append(module._attn(*inputs)[0])
        assert not outputs[0][:, 0].any() and outputs[0][:, 1].any()
        torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_and_sums_are_float32(dtype):
    """Also under autocast."""
    window, kept, options = CASES["kept"]
    case = draw(LENGTH, **options)
    layer = attention(case.splats, window, kept)
    narrow = [to_torch(x).to(dtype) for x in case[:3]]
    want, _ = layer._attn(*(x.float() for x in narrow), additive_mask(case.mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = layer._attn(*narrow, additive_mask(case.mask))
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=0, atol=0)


def test_a_mask_may_be_of_bools_and_hold_more_keys_than_there_are():
    case = draw(LENGTH, 3, pads=0.2)
    layer = attention(case.splats, 5, 4)
    inputs = [to_torch(x) for x in case[:3]]
    mask = additive_mask(case.mask)
    want, _ = layer._attn(*inputs, mask)
    assert torch.equal(layer._attn(*inputs, mask == 0)[0], want)
    assert torch.equal(layer._attn(*inputs, torch.nn.functional.pad(mask, (0, 3)))[0], want)


@pytest.mark.parametrize("mode", [x if x == "kept" else pytest.param(x, marks=SLOW) for x in MODES])
def test_logits_and_greedy_tokens_of_a_padded_batch(monkeypatch, mode):
    """With a cache there, and a state here."""
    monkeypatch.setitem(_SCHEDULES, "cpu", Schedule(8, 0))  # small programs
    ours = tiny_splat_model(MODES[mode])
    theirs = hf_splat_model(ours)
    ids, mask = random_ids(0, 3, 40), np.arange(40) >= 4 * np.arange(3)[:, None]
    want = nnx.jit(lambda model: model(ids, mask))(ours)
    assert relative_rms(torch_logits(theirs, ids, mask)[mask], np.array(want)[mask]) < 1e-5

    prompts = [random_ids(n, n).tolist() for n in (2, 11, 24)]
    want = generate(ours, prompts, max_new_tokens=20, eos_token_id=-1)
    given = torch.tensor([[0] * (24 - len(prompt)) + prompt for prompt in prompts])
    given_mask = torch.tensor([[0] * (24 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = theirs.generate(given, attention_mask=given_mask, max_new_tokens=20, **options)
    np.testing.assert_array_equal(got[:, 24:], want)


def test_a_model_that_has_learned_nothing():
    """Its splats are distinct, and its optional terms change nothing."""
    torch.manual_seed(0)
    model = modeling_gsa.GSAForCausalLM(hf_config(tiny_splat_model(MODES["kept"]).config.to_hf_with_splats()))
    layer = model.transformer.h[1].attn.attention
    assert 0.7 < layer.splat_centers.std() < 1.3
    for name in ("log_scales", *TERMS):
        assert not getattr(layer, f"splat_{name}").any()
    assert torch.equal(layer.splat_importance, torch.eye(17)[-1].expand(4, 17))
    assert 0.2 < layer.q_proj.weight.std() < 0.4  # the configuration says 0.3
