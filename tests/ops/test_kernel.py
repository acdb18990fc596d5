"""The kernel for TPUs, interpreted, against the definition; and which programs have it.

May be changed here: which cases are computed. What the compilers of TPUs make of the kernel is in `tests/accelerators`.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.ops.api import splat_attention
from gsa_jax.ops.kernel import kernel_attention
from gsa_jax.ops.segments import join_masks
from gsa_jax.ops.state import Splats, init_splat_state, roll_window, without_paddings
from helpers.covering import covering
from helpers.splat_cases import Case, assert_close, draw, gradients_of, relative_error

SLOW = pytest.mark.slow
LENGTH = 260


def interpreted(case: Case, window: int):
    """What `splat_attention` returns, by the kernel; a mask of integers is `segment_ids`."""
    packed = case.mask.dtype != bool
    segments = case.mask if packed else join_masks(case.mask, None)
    state = init_splat_state(case.splats, len(case.key), window, case.key.dtype)
    output, state = kernel_attention(*case[:3], segments, case.splats, state, interpret=True)
    output = without_paddings(output.astype(case.value.dtype), segments)
    return output, None if packed else roll_window(state, state.length)


def by_definition(case: Case, window: int):
    masks: Any = {"attention_mask" if case.mask.dtype == bool else "segment_ids": case.mask}
    return splat_attention(*case[:4], window=window, implementation="reference", **masks)


@functools.cache
def gradients(window: int, *, definition: bool = False):
    return jax.jit(gradients_of(functools.partial(by_definition if definition else interpreted, window=window)))


def packed(case: Case) -> Case:
    """Documents of all lengths, with padding at random and at the end."""
    random = np.random.default_rng(5)
    shape = case.mask.shape
    numbers = 1 + np.cumsum(random.random(shape) < 0.02, axis=1)
    numbers[random.random(shape) < 0.05] = 0
    numbers[0, -40:] = 0
    return case._replace(mask=jnp.asarray(numbers, jnp.int32))


def steep(case: Case) -> Case:
    """Keys that come nearer and nearer to the centres, so that features rise by more than `STEEP` within a chunk."""
    far = jnp.geomspace(6.0, 0.1, case.key.shape[1])[None, :, None, None].astype(jnp.float32)
    return case._replace(key=(case.splats.centers[:, 0] + far * case.key).astype(case.key.dtype))


FACTORS: dict[str, Any] = {
    "window": (64, 0, 16, 130),
    "head_dim": (64, 48, 128),
    "splats": (2, 64, 128),
    "masks": ("segment_ids", "attention_mask"),
    "keys": ("steep", "level"),
}
CASES = covering(FACTORS)


@pytest.mark.parametrize(
    "settings",
    [pytest.param(x, marks=[SLOW] if i else [], id="-".join(map(str, x.values()))) for i, x in enumerate(CASES)],
)
def test_outputs_gradients_and_states_are_those_of_the_definition(settings: dict[str, Any]) -> None:
    case = draw(LENGTH, settings["splats"], head_dim=settings["head_dim"], scale=4.0, optional=True, pads=0.1)
    if settings["keys"] == "steep":
        case = steep(case)
    if settings["masks"] == "segment_ids":
        case = packed(case)
    got, got_gradients = gradients(settings["window"])(case)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, case)
        want, want_gradients = gradients(settings["window"], definition=True)(wide)
    narrow = functools.partial(
        jax.tree.map, lambda x: np.asarray(x, np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    )
    assert_close(got, narrow(want), 1e-5)
    assert_close(got_gradients, narrow(want_gradients), 3e-4)


@pytest.mark.slow
def test_bfloat16_is_rounded_in_products_and_at_the_end_alone() -> None:
    case = packed(draw(LENGTH, 64, head_dim=64, scale=4.0, optional=True, dtype=jnp.bfloat16))
    wide = case._replace(**{name: getattr(case, name).astype(jnp.float32) for name in ("query", "key", "value")})
    (output, _), found = gradients(64)(case)
    (want, _), wanted = gradients(64, definition=True)(wide)
    assert output.dtype == found[0].dtype == jnp.bfloat16
    assert relative_error(output, want) < 4e-3  # half a unit of 8 bits
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert relative_error(got, expected) < 2e-2


@pytest.mark.parametrize("window", [16, pytest.param(0, marks=SLOW), pytest.param(130, marks=SLOW)])
def test_no_bit_depends_on_a_later_token(window: int) -> None:
    """Nor on one that makes its chunk steep."""
    attend = jax.jit(lambda case: interpreted(case, window)[0])
    case = draw(LENGTH, 4, batch=1, heads=1, head_dim=128, optional=True)
    before = attend(case)
    other = draw(LENGTH, 4, batch=1, heads=1, head_dim=128, seed=9)
    for cut, size in ((1, 1.0), (100, 1e4), (140, 30.0), (140, 0.0), (250, 30.0), (LENGTH - 1, 30.0)):

        def join(past: jax.Array, future: jax.Array, cut: int = cut) -> jax.Array:
            return jnp.concatenate([past[:, :cut], future[:, cut:]], axis=1)

        # Size 0 puts keys on a centre, from where they are seen better than any before.
        keys = size * other.key if size else jnp.broadcast_to(case.splats.centers[:, 0], case.key.shape)
        changed = case._replace(
            query=join(case.query, size * other.query),
            key=join(case.key, keys),
            value=join(case.value, size * other.value),
        )
        after = attend(changed)
        assert np.array_equal(before[:, :cut], after[:, :cut])
        assert not np.array_equal(before[:, cut:], after[:, cut:])


def program(platform: str, case: Case, window: int = 64, **settings: Any) -> str:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array, splats: Splats):
        if settings.get("initial_state"):
            settings["initial_state"] = init_splat_state(splats, len(key), window, key.dtype)
        return splat_attention(query, key, value, splats, window=window, **settings)

    return jax.jit(attend).trace(*case[:4]).lower(lowering_platforms=(platform,)).as_text()


def test_a_program_has_the_kernel_where_a_tpu_can_run_it() -> None:
    kernel = "tpu_custom_call"
    case = draw(256, 2, head_dim=32)
    assert kernel in program("tpu", case)
    for platform in ("cpu", "cuda"):
        assert "custom_call" not in program(platform, case)
    assert kernel not in program("tpu", case, initial_state=True)
    assert kernel not in program("tpu", case, chunk_size=64)
    assert kernel not in program("tpu", case, chunks_at_once=2)
    assert kernel not in program("tpu", draw(300, 2, head_dim=32), window=257)
    assert kernel not in program("tpu", draw(256, 2, head_dim=16))
    assert kernel not in program("tpu", draw(255, 2, head_dim=32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_the_kernel_state_their_precision(dtype) -> None:
    """All bits of float32; the operands of a 16-bit model's products are rounded, but for those of log features."""
    case = draw(256, 2, batch=1, heads=1, head_dim=128, dtype=dtype)

    def loss(*arrays: Any) -> jax.Array:
        return jnp.sum(interpreted(Case(*arrays, case.mask), 64)[0].astype(jnp.float32))

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(*case[:4]))
    found = re.findall(r"= dot_general\[(.*?)\] (\w+) (\w+)", text, re.DOTALL)
    exact = ["Precision.HIGHEST" in settings for settings, *_ in found]
    assert len(found) > 20
    if dtype == jnp.float32:
        assert all(exact)
    else:
        assert 0 < sum(exact) < len(found) / 2
