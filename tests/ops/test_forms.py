"""Attention through splats: each implementation against the definition, and the properties that follow from it."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_jax.ops.api import splat_attention
from gsa_jax.ops.softmax import causal_attention
from gsa_jax.ops.state import FLOOR, Splats
from helpers.splat_cases import Case, assert_close, compiled, compiled_gradients, draw, relative_error

FAST = ("chunked", "recurrent")
"""Chunks in groups here; `None` takes them one by one (`splat_cases.AT_ONCE`)."""

ALL = ("reference", *FAST)

LENGTH, SPLATS, WINDOW = 50, 3, 8
"""Of most cases: the same shapes are the same programs, which all tests of this file share."""

SLOW = pytest.mark.slow


def oracle(case: Case, window: int | str) -> np.ndarray:
    """The definition in float64, one pair of tokens at a time. Padded slots give 0."""
    query, key, value, mask = (np.asarray(x, np.float64) for x in (case.query, case.key, case.value, case.mask))
    splats = jax.tree.map(lambda x: np.asarray(x, np.float64), case.splats)
    centers, log_scales = splats.centers, splats.log_scales
    output = np.zeros_like(value)
    batch, length, heads, _ = query.shape
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        if not mask[b, i]:
            continue
        scores, values = [], []
        for j in range(i + 1):
            if not mask[b, j]:
                continue
            q, k = query[b, i, h], key[b, j, h]
            if window == "all" or i - j < window:
                scores.append(q @ k)
            else:
                terms = -(((q - centers[h]) ** 2).sum(-1) + ((k - centers[h]) ** 2).sum(-1)) / 2
                terms = terms / np.exp(log_scales[h]) ** 2
                if splats.log_amplitudes is not None:
                    terms = terms + splats.log_amplitudes[h]
                score = terms.max() + np.log(np.exp(terms - terms.max()).sum()) if terms.size else -np.inf
                if splats.norm_gain is not None:
                    score += splats.norm_gain[h] * (q @ q + k @ k)
                if splats.far_gain is not None:
                    score += splats.far_gain[h]
                scores.append(score)
            values.append(value[b, j, h])
        weights = np.exp(np.array(scores) - max(scores))
        output[b, i, h] = weights @ np.array(values) / weights.sum()
    return output


def valid_only(case: Case, output: jax.Array) -> np.ndarray:
    return np.where(np.asarray(case.mask)[:, :, None, None], np.asarray(output, np.float32), 0)


@pytest.mark.parametrize(
    ("window", "splats", "optional"),
    [
        (0, 1, False),
        (0, 3, True),
        (1, 2, True),
        (4, 3, False),
        (4, 3, True),
        (4, 0, False),
        (11, 2, True),
        ("all", 2, True),
    ],
)
def test_reference_is_the_definition(window: int | str, splats: int, optional: bool) -> None:
    with jax.enable_x64(True):
        case = draw(11, splats, optional=optional, pads=0.2, scale=1.0, dtype=jnp.float64)
        output, _ = compiled(window, "reference")(case)
        assert output.dtype == jnp.float64
        assert relative_error(output, oracle(case, window)) < 1e-13


@pytest.mark.parametrize(
    ("window", "length"),
    [
        *itertools.product((0, 5), (1, 15, LENGTH)),
        *itertools.product((40,), (7, LENGTH)),
        ("all", LENGTH),
        *(pytest.param(*x, marks=SLOW) for x in itertools.product((0, 5, 40), (1, 7, 16, 17))),
        *(pytest.param(*x, marks=SLOW) for x in ((1, 1), (1, 7), (1, LENGTH), ("all", 1))),
    ],
)
def test_implementations_agree(window: int | str, length: int) -> None:
    """Lengths around one chunk and of several, windows shorter and longer than a chunk."""
    # Each window meets splats in numbers that take turns with the length.
    splats = {1: 16, 7: 2, 15: 1, 16: 0 if window else 2, 17: 16, 50: 2}[length]
    case = draw(length, splats, optional=length in (7, 17, 50), pads=0.1 if length > 1 else 0.0)
    want, state = compiled(window, "reference")(case)
    # A scan of steps does the same at any length, so it joins in at three of them.
    for implementation in FAST if window != "all" and length in (1, LENGTH) else ("chunked",):
        output, final = compiled(window, implementation)(case)
        assert relative_error(valid_only(case, output), want) < 3e-6
        assert_close(final, state, 1e-5)


@pytest.mark.parametrize(
    ("length", "batch", "window", "splats"),
    [
        (1, 1, 0, 1),
        (LENGTH, 1, WINDOW, SPLATS),
        *(pytest.param(*x, marks=SLOW) for x in ((LENGTH, 2, 0, SPLATS), (17, 1, 0, 16))),
    ],
)
def test_gradients_agree(length: int, batch: int, window: int, splats: int) -> None:
    case = draw(length, splats, batch=batch, optional=splats == SPLATS, pads=0.1 if length > 1 else 0.0)
    want, gradients = compiled_gradients(window, "reference")(case)
    for implementation in FAST:
        got, got_gradients = compiled_gradients(window, implementation)(case)
        assert_close(got, want, 1e-5)
        assert_close(got_gradients, gradients, 2e-5)


def test_long_sequence_in_chunks_of_the_default_size() -> None:
    case = draw(1000, 2, heads=1, batch=1, optional=True, pads=0.1)
    want = compiled(16, "reference")(case)
    assert_close(compiled(16, "chunked", None)(case), want, 1e-5)
    assert_close(compiled(16, "recurrent")(case), want, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["chunked", "recurrent"])
def test_bfloat16_inputs_are_computed_in_float32(implementation: str) -> None:
    window = 16
    case = draw(65, 2, dtype=jnp.bfloat16, optional=True)
    wide = case._replace(**{name: getattr(case, name).astype(jnp.float32) for name in ("query", "key", "value")})
    (output, state), gradients = compiled_gradients(window, implementation)(case)
    (want, want_state), want_gradients = compiled_gradients(window, "reference")(wide)
    assert output.dtype == state.key.dtype == jnp.bfloat16 and state.kv.dtype == state.m.dtype == jnp.float32
    # The output is rounded once, at the end: half a unit in the last of 8 bits.
    assert bool(jnp.all(jnp.abs(output.astype(jnp.float32) - want) <= 2**-8 * jnp.abs(want) + 1e-5))
    assert_close((state.kv, state.z, state.m), (want_state.kv, want_state.z, want_state.m), 1e-5)
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        assert relative_error(got, expected) < 2e-2  # the gradient of the output is rounded to 8 bits


@pytest.mark.parametrize("window", [WINDOW, pytest.param(0, marks=SLOW), pytest.param(20, marks=SLOW)])
def test_sizes_of_chunks_and_groups_do_not_matter(window: int) -> None:
    case = draw(LENGTH, SPLATS, pads=0.1, optional=True)
    want = compiled_gradients(window, "reference")(case)
    for sizes in ((5, 2),) if window == WINDOW else ((5, 2), (5, 100), (100, 1)):
        assert_close(compiled_gradients(window, "chunked", *sizes)(case), want, 2e-5)
    for sizes in ((1, 7), (16, 2)) if window == WINDOW else ((1, 7), (16, 1), (16, 2), (32, 1)):
        assert_close(compiled(window, "chunked", *sizes)(case), want[0], 1e-5)


def test_platforms_have_sizes_of_their_own() -> None:
    """A program that is lowered for a platform has that platform's chunks and groups, wherever it is lowered."""
    case = draw(1024, SPLATS)
    trips = {}
    for platform in ("cpu", "tpu", "cuda"):
        lowered = (
            jax.jit(functools.partial(splat_attention, window=WINDOW))
            .trace(*case[:4])
            .lower(lowering_platforms=(platform,))
        )
        trips[platform] = {int(n) for n in re.findall(r"tensor<(\d+)x2x\d+x2x8xf32>", lowered.as_text())}
    assert 16 in trips["cpu"] and 8 in trips["tpu"] and 16 not in trips["tpu"] and not {8, 16} & trips["cuda"]


@pytest.mark.slow
def test_the_gradient_by_the_maximum_of_a_given_state() -> None:
    """What a state holds counts as `exp(m)` times its sums, so that sums and maximum can be traded for one another."""
    case = draw(LENGTH, SPLATS, optional=True)
    _, state = compiled(WINDOW)(case)

    def gradient(implementation: str | None):
        def loss(m: jax.Array) -> jax.Array:
            given = dataclasses.replace(state, m=m)
            return jnp.sum(jnp.sin(compiled(WINDOW, implementation)(case.slots(0, 40), given)[0]))

        return jax.grad(loss)(state.m)

    want = gradient("reference")
    assert jnp.any(jnp.abs(want) > 1e-3)
    for implementation in (None, "chunked"):
        assert_close(gradient(implementation), want, 1e-5)


@pytest.mark.parametrize(
    ("implementation", "window", "splats"),
    [
        ("chunked", 0, 3),
        ("recurrent", 3, 3),
        *(
            pytest.param(*x, marks=SLOW)
            for x in (("chunked", 3, 3), ("chunked", 32, 3), ("recurrent", 0, 3), ("chunked", 16, 0))
        ),
        pytest.param("reference", 3, 3, marks=SLOW),
    ],
)
def test_split_and_carry_is_the_whole(implementation: str, window: int, splats: int) -> None:
    case = draw(49, splats, pads=0.1, optional=True)
    want = compiled(window, "reference")(case)
    for cuts in ((0, 16, 32, 48, 49), (0, 1, 17, 33, 49), (0, 16, 17, 33, 49)):
        state, outputs = None, []
        for start, stop in itertools.pairwise(cuts):
            output, state = compiled(window, implementation)(case.slots(start, stop), state)
            outputs.append(output)
        # The first part may fit into the window, where a padded query has an arbitrary result.
        assert relative_error(valid_only(case, jnp.concatenate(outputs, axis=1)), want[0]) < 3e-6
        assert_close(state, want[1], 1e-5)


@pytest.mark.slow
def test_gradients_cross_a_carried_state() -> None:
    case = draw(60, 3, optional=True)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(case: Case, cuts: tuple[int, ...]):
        def loss(*arrays):
            parts, state, total = case._replace(**dict(zip(case._fields, arrays, strict=False))), None, 0.0
            for start, stop in itertools.pairwise(cuts):
                output, state = compiled(8, "chunked", 16)(parts.slots(start, stop), state)
                total += jnp.sum(output * jnp.sin(1.0 + jnp.arange(start, stop, dtype=output.dtype))[:, None, None])
            return total

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*case[:4])

    assert_close(gradient(case, (0, 5, 33, 60)), gradient(case, (0, 60)), 1e-5)


@pytest.mark.parametrize("window", [5, *(pytest.param(x, marks=SLOW) for x in (0, 16))])
def test_prefill_and_single_steps_are_the_whole(window: int) -> None:
    case = draw(40, 4, batch=1, pads=0.2, optional=True)
    want = compiled(window, "reference")(case)
    for prompt in (1, 22):
        output, state = compiled(window)(case.slots(0, prompt))
        outputs = [output]
        for slot in range(prompt, 40):
            output, state = compiled(window)(case.slots(slot, slot + 1), state)
            outputs.append(output)
        assert relative_error(valid_only(case, jnp.concatenate(outputs, axis=1)), want[0]) < 3e-6
        assert_close(state, want[1], 1e-5)


def test_window_of_the_state_is_a_ring() -> None:
    case = draw(21, 2)
    _, state = compiled(8)(case)
    for slot in range(13, 21):
        assert jnp.array_equal(state.key[:, :, slot % 8], case.key[:, slot])
        assert jnp.array_equal(state.value[:, :, slot % 8], case.value[:, slot])
    assert state.valid.all() and state.length == 21
    _, state = compiled(8)(case.slots(0, 3))
    assert jnp.array_equal(state.valid, jnp.arange(8)[None, :] < jnp.array([[3], [3]]))
    assert (state.z == 0).all() and (state.m == FLOOR).all()


def test_sums_of_the_state_are_those_of_the_definition() -> None:
    case = draw(30, 3, optional=True, pads=0.2)
    _, state = compiled(8)(case)
    left = np.asarray(case.mask, np.float64)[:, :22, None, None]
    key, value = (np.asarray(x, np.float64)[:, :22] for x in (case.key, case.value))
    centers, log_scales, gain = (
        np.asarray(x, np.float64) for x in (case.splats.centers, case.splats.log_scales, case.splats.norm_gain)
    )
    squared = ((key[:, :, :, None] - centers) ** 2).sum(-1) - (centers**2).sum(-1)
    feature = -squared / (2 * np.exp(2 * log_scales)) + gain[:, None] * (key**2).sum(-1, keepdims=True)
    total = np.exp(np.asarray(state.m, np.float64))
    assert relative_error(total * state.z, (left * np.exp(feature)).sum(1)) < 1e-5
    want = np.einsum("bths,bthd->bhsd", left * np.exp(feature), value)
    assert relative_error(total[..., None] * state.kv, want) < 1e-5


@settings(derandomize=True, deadline=None, max_examples=15)
@given(data=st.data())
@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("window", [0, WINDOW, 200])
def test_future_cannot_change_the_past(implementation: str, window: int, data: st.DataObject) -> None:
    case = draw(LENGTH, SPLATS, seed=data.draw(st.integers(0, 3)), pads=0.1, optional=True)
    cut = data.draw(st.integers(1, LENGTH - 1))
    other = draw(LENGTH, SPLATS, seed=99, pads=0.3)
    size = data.draw(st.sampled_from([1.0, 30.0, 1e4]))

    def join(past: jax.Array, future: jax.Array) -> jax.Array:
        return jnp.concatenate([past[:, :cut], future[:, cut:]], axis=1)

    changed = Case(
        join(case.query, size * other.query),
        join(case.key, size * other.key),
        join(case.value, size * other.value),
        case.splats,
        join(case.mask, other.mask),
    )
    attend = compiled(window, implementation)
    # Padded queries too, but on the exact path, where they have an arbitrary result.
    before, after = (valid_only(c, attend(c)[0]) for c in (case, changed))
    assert np.array_equal(before[:, :cut], after[:, :cut])
    assert not np.array_equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize("implementation", ["chunked", pytest.param("recurrent", marks=SLOW)])
def test_the_past_has_no_gradient_from_the_future(implementation: str) -> None:
    case = draw(LENGTH, SPLATS)

    @jax.jit
    def gradient(query, key, value):
        def early(query, key, value):
            return jnp.sum(compiled(WINDOW, implementation)(Case(query, key, value, *case[3:]))[0][:, :30] ** 2)

        return jax.grad(early, argnums=(0, 1, 2))(query, key, value)

    for x in gradient(*case[:3]):
        assert (x[:, 30:] == 0).all() and (x[:, :30] != 0).any()


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(("window", "splats"), [(0, SPLATS), (WINDOW, SPLATS), (WINDOW, 0)])
def test_weights_sum_to_one(window: int, splats: int, implementation: str) -> None:
    case = draw(LENGTH, splats, pads=0.2, optional=True, scale=0.5)
    output, _ = compiled(window, implementation)(case._replace(value=jnp.ones_like(case.value)))
    want = jnp.broadcast_to(case.mask[:, :, None, None], output.shape).astype(output.dtype)
    assert jnp.allclose(output, want, atol=1e-5, rtol=0)


@settings(derandomize=True, deadline=None, max_examples=10)
@given(order=st.permutations(range(3)))
@pytest.mark.parametrize("implementation", FAST)
def test_order_of_splats_does_not_matter(implementation: str, order: list[int]) -> None:
    case = draw(LENGTH, SPLATS, optional=True)
    shuffled = dataclasses.replace(
        case.splats,
        **{x: getattr(case.splats, x)[:, np.array(order)] for x in ("centers", "log_scales", "log_amplitudes")},
    )
    attend = compiled(WINDOW, implementation)
    (output, state), (got, got_state) = attend(case), attend(case._replace(splats=shuffled))
    assert relative_error(got, output) < 2e-6
    assert relative_error(got_state.kv, state.kv[:, :, np.array(order)]) < 2e-6


MASKS = {
    "left": lambda n: np.arange(n) >= 9,
    "middle": lambda n: (np.arange(n) < 10) | (np.arange(n) >= 31),
    "right": lambda n: np.arange(n) < n - 9,
    "random": lambda n: np.random.default_rng(3).random(n) < 0.6,
    "all": lambda n: np.zeros(n, bool),
}


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(("batch", "window"), [(1, WINDOW), pytest.param(2, 0, marks=SLOW)])
@pytest.mark.parametrize("pads", MASKS)
def test_padding_contributes_nothing(pads: str, batch: int, window: int, implementation: str) -> None:
    case = draw(LENGTH, SPLATS, batch=batch, optional=True)
    mask = np.tile(MASKS[pads](LENGTH), (batch, 1))
    mask[1:] = mask[1:, ::-1]
    case = case._replace(mask=jnp.asarray(mask))
    call = compiled_gradients(window, implementation)
    clean = call(case.poisoned(0.0))
    for poison in (1e30, -3e38, np.inf, np.nan):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, clean, call(case.poisoned(poison)))), poison
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(clean))
    (output, _), gradients = clean
    assert (output[~mask] == 0).all()
    assert all((x[~mask] == 0).all() for x in gradients[:3])
    assert relative_error(output, oracle(case, window)) < 3e-6
    # A second call, whose window and sums hold padding of the first.
    attend = compiled(window, implementation)
    continued, again = (attend(c.slots(25, 50), attend(c.slots(0, 25))[1]) for c in (case, case.poisoned(np.inf)))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, continued, again))
    assert relative_error(continued[0], output[:, 25:]) < 3e-6


def test_padding_on_the_exact_path() -> None:
    case = draw(30, 3, pads=0.3)
    for window in ("all", 30):
        (clean, state), (output, final) = (compiled(window)(c) for c in (case.poisoned(0.0), case.poisoned(1e30)))
        assert jnp.array_equal(clean[case.mask], output[case.mask])
        assert jax.tree.all(jax.tree.map(jnp.array_equal, state, final))


@pytest.mark.parametrize("implementation", [None, "chunked"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_window_that_holds_everything_is_exact_attention(dtype, implementation: str | None) -> None:
    case = draw(50, 3, dtype=dtype, pads=0.3, optional=True)
    want = jax.jit(causal_attention)(case.query, case.key, case.value, case.mask.astype(jnp.int32))
    for window in (50, 64, "all"):
        output, state = compiled(window, implementation)(case)
        assert output.dtype == dtype and jnp.array_equal(output, want)
        if window == "all":
            assert state is None
        else:
            assert_close(state, compiled(window, "reference")(case)[1], 0)


@pytest.mark.slow
def test_more_splats_come_closer_to_softmax() -> None:
    """With centres on a sphere and sigma = R / sqrt(n), the splats average exp(q . k) over directions.

    For centres R u, the score is log E exp(R u . (q + k) / sigma^2) - (|q|^2 + |k|^2) / (2 sigma^2) + constant, and the
    expectation over the sphere grows as exp(R^2 |q + k|^2 / (2 n sigma^4)): with R^2 / n = sigma^2 the squares cancel
    and q . k / sigma^2 remains.
    """
    random = np.random.default_rng(0)
    dim, radius = 3, 6.0
    query, key, value = (jnp.asarray(0.7 * random.normal(size=(1, 64, 1, dim)), jnp.float32) for _ in range(3))
    mask = jnp.ones((1, 64), bool)
    sigma = radius / np.sqrt(dim)
    want = causal_attention(query, key / sigma**2, value, mask.astype(jnp.int32))
    errors = []
    for count in (2, 16, 256, 4096):
        centers = random.normal(size=(1, count, dim))
        centers *= radius / np.linalg.norm(centers, axis=-1, keepdims=True)
        splats = Splats(jnp.asarray(centers, jnp.float32), jnp.full((1, count), np.log(sigma), jnp.float32))
        output, _ = splat_attention(query, key, value, splats, window=0, attention_mask=mask)
        errors.append(relative_error(output, want))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 < 5 * 0.02 < errors[0]


@pytest.mark.slow
def test_a_grid_of_splats_with_norm_gain_is_softmax() -> None:
    """phi_s(q) phi_s(k) = exp(-|q - k|^2 / (4 sigma^2)) exp(-|c_s - (q + k) / 2|^2 / sigma^2), and over a grid of
    centres the second factor sums to a constant. With beta = 1 / (4 sigma^2) the first is exp(q . k / (2 sigma^2)): at
    sigma^2 = 1/2 and with a far gain that takes the constant away, far scores are near scores."""
    random = np.random.default_rng(0)
    query, key, value = (jnp.asarray(random.normal(size=(1, 64, 1, 2)), jnp.float32) for _ in range(3))
    mask = jnp.ones((1, 64), bool)
    spacing = 0.5
    line = np.arange(-6, 6.1, spacing)
    centers = jnp.asarray(np.stack(np.meshgrid(line, line), axis=-1).reshape(1, -1, 2), jnp.float32)
    splats = Splats(
        centers,
        jnp.full(centers.shape[:2], np.log(0.5) / 2, jnp.float32),
        norm_gain=jnp.array([0.5]),
        far_gain=jnp.array([-np.log(np.pi / 2 / spacing**2)], jnp.float32),
    )
    want = causal_attention(query, key, value, mask.astype(jnp.int32))
    for window in (0, 16):
        output, _ = splat_attention(query, key, value, splats, window=window, attention_mask=mask)
        assert relative_error(output, want) < 1e-4


def test_default_implementation() -> None:
    case = draw(20, 2)
    _, state = compiled(8)(case)
    token = case.slots(0, 1)
    assert jnp.array_equal(compiled(8)(token, state)[0], compiled(8, "recurrent")(token, state)[0])
    assert jnp.array_equal(compiled(8)(case)[0], compiled(8, "chunked")(case)[0])
