"""Kept keys: which ones they are, and that all forms keep the same.

May be changed here: nothing but the definition. The oracle keeps keys one pair of tokens at a time, in float64.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_jax.errors import InputError
from gsa_jax.ops import causal_attention, splat_attention
from gsa_jax.ops.chunked import kernel_takes
from gsa_jax.ops.state import Splats, init_splat_state
from helpers.splat_cases import Case, assert_close, compiled, compiled_gradients, draw, relative_error

SLOW = pytest.mark.slow
LENGTH, SPLATS, WINDOW, KEPT = 50, 3, 5, 4
FORMS = ("reference", "chunked", "recurrent")


def importances(case: Case) -> np.ndarray:
    """`[B, T, H]`."""
    key, value = np.asarray(case.key, np.float64), np.asarray(case.value, np.float64)
    squares = (key**2).sum(-1)
    if case.splats.importance is None:
        return squares
    weights = np.asarray(case.splats.importance, np.float64)
    both = np.concatenate([key, value], axis=-1)
    return np.einsum("bthd,hd->bth", both, weights[:, :-1]) + weights[:, -1] * squares


def oracle(case: Case, window: int, kept: int, segments: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Outputs, 0 at padding, and which key each query keeps, `[B, H, T, T]`."""
    segments = np.asarray(case.mask).astype(int) if segments is None else segments
    query, key, value = (np.asarray(x, np.float64) for x in case[:3])
    splats = jax.tree.map(lambda x: np.asarray(x, np.float64), case.splats)
    gain = 0 if splats.norm_gain is None else splats.norm_gain
    important = importances(case)
    output, keeps = np.zeros_like(value), np.zeros((*query.shape[:1], query.shape[2], LENGTH, LENGTH), bool)
    for b, h, i in itertools.product(range(query.shape[0]), range(query.shape[2]), range(query.shape[1])):
        if segments[b, i] == 0:
            continue
        seen = [j for j in range(i + 1) if segments[b, j] == segments[b, i]]
        far = sorted((j for j in seen if i - j >= window), key=lambda j: (-important[b, j, h], j))
        keeps[b, h, i, far[:kept]] = True
        scores = np.full(i + 1, -np.inf)
        for j in seen:
            q, k = query[b, i, h], key[b, j, h]
            if i - j < window or keeps[b, h, i, j]:
                scores[j] = q @ k
                continue
            terms = -(((q - splats.centers[h]) ** 2).sum(-1) + ((k - splats.centers[h]) ** 2).sum(-1)) / 2
            terms = terms / np.exp(2 * splats.log_scales[h])
            if splats.log_amplitudes is not None:
                terms = terms + splats.log_amplitudes[h] + splats.far_gain[h] + gain[h] * (q @ q + k @ k)
            scores[j] = np.logaddexp.reduce(terms, initial=-np.inf)
        if np.isfinite(scores).any():
            weights = np.exp(scores - scores.max())
            output[b, i, h] = weights @ value[b, : i + 1, h] / weights.sum()
    return output, keeps


@pytest.mark.parametrize(("window", "splats", "learned"), [(0, 3, False), (5, 3, True), (5, 0, False)])
def test_reference_is_the_definition(window: int, splats: int, learned: bool) -> None:
    with jax.enable_x64(True):
        case = draw(LENGTH, splats, optional=True, learned=learned, pads=0.2, scale=1.0, dtype=jnp.float64)
        output, state = compiled(window, "reference", kept=KEPT)(case)
        want, keeps = oracle(case, window, KEPT)
        assert relative_error(output, want) < 1e-12
        assert relative_error(output, oracle(case, window, 0)[0]) > 0.01
    assert state is not None
    for b, h in itertools.product(range(2), range(2)):
        # At a padded last slot nothing is kept for the query, but the state still has the keys.
        last = int(np.flatnonzero(np.asarray(case.mask)[b])[-1])
        if last == LENGTH - 1:
            assert sorted(state.kept_slot[b, h].tolist()) == np.flatnonzero(keeps[b, h, last]).tolist()


@pytest.mark.parametrize(
    ("window", "splats", "kept", "learned"),
    [
        (WINDOW, SPLATS, KEPT, False),
        *(
            pytest.param(*x, marks=SLOW)
            for x in (
                (0, SPLATS, 1, True),
                (WINDOW, SPLATS, 100, False),
                (20, SPLATS, KEPT, False),
                (WINDOW, 0, KEPT, False),
                (0, 3, 20, True),
            )
        ),
    ],
)
def test_forms_agree(window: int, splats: int, kept: int, learned: bool) -> None:
    """Outputs, states, and gradients that go through kept scores; chunks in groups and one by one."""
    case = draw(LENGTH, splats, optional=True, learned=learned, pads=0.1)
    want, gradients = compiled_gradients(window, "reference", kept=kept)(case)
    if learned:
        assert gradients[3].importance is not None and not gradients[3].importance.any()
    for implementation, sizes in (("recurrent", ()), ("chunked", (16, 3)), ("chunked", (16, 1))):
        got, got_gradients = compiled_gradients(window, implementation, *sizes, kept=kept)(case)
        assert_close(got, want, 1e-5)
        assert_close(got_gradients, gradients, 2e-5)


def test_sizes_of_chunks_do_not_matter() -> None:
    """Chunks shorter than the kept keys are many, and longer than the blocks in which keys are compared."""
    case = draw(100, SPLATS, pads=0.1, optional=True)
    want = compiled(WINDOW, "reference", kept=KEPT)(case)
    for sizes in ((3, 7), (40, 2)):
        assert_close(compiled(WINDOW, "chunked", *sizes, kept=KEPT)(case), want, 1e-5)


@pytest.mark.parametrize(("window", "learned"), [(WINDOW, False), pytest.param(0, True, marks=SLOW)])
def test_prefill_steps_and_parts_are_the_whole(window: int, learned: bool) -> None:
    case = draw(49, SPLATS, pads=0.1, optional=True, learned=learned)
    want = compiled(window, "reference", kept=KEPT)(case)
    for cuts in ((0, 16, 33, 49), (0, 16, *range(17, 36))):
        state, outputs = None, []
        for start, stop in itertools.pairwise(cuts):
            output, state = compiled(window, kept=KEPT)(case.slots(start, stop), state)
            outputs.append(output)
        got = jnp.where(case.mask[:, : cuts[-1], None, None], jnp.concatenate(outputs, axis=1), 0)
        assert relative_error(got, want[0][:, : cuts[-1]]) < 3e-6
        if cuts[-1] == 49:
            assert_close(state, want[1], 1e-5)


def test_none_kept_is_the_attention_without() -> None:
    case = draw(LENGTH, SPLATS, optional=True, pads=0.1)
    for form in FORMS:
        for got, want in zip(
            jax.tree.leaves(compiled(WINDOW, form, kept=0)(case)),
            jax.tree.leaves(compiled(WINDOW, form)(case)),
            strict=True,
        ):
            assert jnp.array_equal(got, want)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(("window", "splats"), [(WINDOW, SPLATS), (0, SPLATS), pytest.param(WINDOW, 0, marks=SLOW)])
def test_as_many_as_there_are_far_keys_is_exact_attention(window: int, splats: int, implementation: str) -> None:
    case = draw(LENGTH, splats, optional=True, pads=0.1)
    output, state = compiled(window, implementation, kept=LENGTH)(case)
    want = causal_attention(*case[:3], case.mask.astype(jnp.int32))
    assert relative_error(output, jnp.where(case.mask[:, :, None, None], want, 0)) < 2e-6
    assert not state.z.any()


@settings(derandomize=True, deadline=None, max_examples=15)
@given(data=st.data())
@pytest.mark.parametrize("implementation", ["chunked", "recurrent"])
def test_future_cannot_change_the_past(implementation: str, data: st.DataObject) -> None:
    case = draw(LENGTH, SPLATS, seed=data.draw(st.integers(0, 3)), pads=0.1, optional=True)
    cut = data.draw(st.integers(1, LENGTH - 1))
    size = data.draw(st.sampled_from([1.0, 30.0, 1e4]))
    other = draw(LENGTH, SPLATS, seed=99, pads=0.3)
    query, key, value, mask = (
        jnp.concatenate([past[:, :cut], factor * future[:, cut:]], axis=1)
        for past, future, factor in zip(
            (*case[:3], case.mask), (*other[:3], other.mask), (size, size, size, True), strict=True
        )
    )
    attend = compiled(WINDOW, implementation, kept=KEPT)
    before, after = attend(case)[0], attend(Case(query, key, value, case.splats, mask))[0]
    assert jnp.array_equal(before[:, :cut], after[:, :cut])
    assert not jnp.array_equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize("implementation", ["chunked", "recurrent"])
def test_padding_contributes_nothing(implementation: str) -> None:
    case = draw(LENGTH, SPLATS, optional=True, learned=True, pads=0.4)
    call = compiled_gradients(WINDOW, implementation, kept=KEPT)
    clean = call(case.poisoned(0.0))
    for poison in (1e30, np.inf, np.nan):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, clean, call(case.poisoned(poison)))), poison
    assert relative_error(clean[0][0], oracle(case, WINDOW, KEPT)[0]) < 3e-6


ORDERS = {
    "equal": lambda key: key / jnp.linalg.norm(key, axis=-1, keepdims=True),
    "rising": lambda key: key * jnp.linspace(0.5, 2, LENGTH)[:, None, None],
    "falling": lambda key: key * jnp.linspace(2, 0.5, LENGTH)[:, None, None],
    "signs": jnp.sign,
    "zero": jnp.zeros_like,
}


@pytest.mark.parametrize("order", ORDERS)
def test_ties_and_orders_of_importance(order: str) -> None:
    """Of keys that are as important, the older one stays, and rounding decides between others that are close."""
    case = draw(LENGTH, SPLATS, optional=True)
    case = case._replace(key=ORDERS[order](case.key))
    want, state = compiled(WINDOW, "reference", kept=KEPT)(case)
    if order in ("signs", "zero", "falling"):
        oldest = jnp.sort(state.kept_slot, axis=-1)
        if order != "falling":
            assert (oldest == jnp.arange(KEPT)).all()
    if order != "equal":  # norms of 1 differ in their last bits
        assert relative_error(want, oracle(case, WINDOW, KEPT)[0]) < 3e-6
    for implementation, at_once in (("chunked", 1), ("chunked", 3), ("recurrent", None)):
        output, got = compiled(WINDOW, implementation, chunks_at_once=at_once, kept=KEPT)(case)
        assert relative_error(output, want) < 3e-6
        assert_close(got, state, 1e-5)


@pytest.mark.parametrize("implementation", FORMS)
def test_importances_of_any_size(implementation: str) -> None:
    """Weights that make importances of 1e30 and below zero decide as others do, and everything stays finite."""
    case = draw(LENGTH, SPLATS, optional=True, learned=True)
    for factor in (1e30, -1e30, 1e-30):
        scaled = dataclasses.replace(case.splats, importance=case.splats.importance * factor)
        (output, state), gradients = compiled_gradients(WINDOW, implementation, kept=KEPT)(case._replace(splats=scaled))
        assert relative_error(output, oracle(case._replace(splats=scaled), WINDOW, KEPT)[0]) < 3e-6
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((output, state, gradients)))


def test_a_sharp_key_far_away_is_seen_exactly() -> None:
    """What it is for: a key that one query wants above all others, which no splat can say."""
    case = draw(LENGTH, SPLATS, batch=1, heads=1)
    key = 0.1 * case.key.at[0, 3, 0].set(8 * jnp.ones(8))
    query = case.query.at[0, -1, 0].set(jnp.ones(8))
    value = case.value.at[0, 3, 0].set(10.0)
    case = Case(query, key.at[0, 3, 0].set(jnp.ones(8)), value, case.splats, case.mask)
    exact = causal_attention(*case[:3], case.mask.astype(jnp.int32))[0, -1]
    errors = [relative_error(compiled(WINDOW, kept=kept)(case)[0][0, -1], exact) for kept in (0, 1)]
    assert errors[1] < 0.02 < 0.5 < errors[0]


@pytest.mark.parametrize(("implementation", "at_once"), [("reference", None), ("chunked", 1), ("chunked", 2)])
def test_each_document_keeps_its_own(implementation: str, at_once: int | None) -> None:
    segments = np.stack([np.repeat([1, 2, 0, 5], [18, 1, 3, 28]), np.repeat([0, 3, 4, 0], [2, 30, 17, 1])])
    case = draw(LENGTH, SPLATS, optional=True)

    @jax.jit
    def call(key: jax.Array) -> jax.Array:
        return splat_attention(
            case.query,
            key,
            case.value,
            case.splats,
            window=WINDOW,
            kept=KEPT,
            segment_ids=segments,
            implementation=implementation,  # type: ignore[arg-type]
            chunk_size=16 if at_once else None,
            chunks_at_once=at_once,
        )[0]

    output = call(case.key)
    assert relative_error(output, oracle(case, WINDOW, KEPT, segments)[0]) < 3e-6
    # However important keys of other documents are, they take nobody's place.
    others = jnp.asarray(segments != 5)[:, :, None, None]
    changed = call(jnp.where(others, 50 * case.key, case.key))
    assert jnp.array_equal(output[0, 22:], changed[0, 22:])


def test_what_a_token_costs_does_not_grow() -> None:
    """Operations are linear in the tokens, and decoding compares one key with those that are kept: no sort of them."""
    case = draw(1, SPLATS)
    state = init_splat_state(case.splats, 2, WINDOW, jnp.float32, KEPT)
    step = functools.partial(splat_attention, window=WINDOW, kept=KEPT, implementation="recurrent")
    jaxpr = str(jax.make_jaxpr(lambda *arrays: step(*arrays[:4], initial_state=arrays[4]))(*case[:4], state))
    assert " sort[" not in jaxpr and "top_k" not in jaxpr and "argmax" in jaxpr


def test_a_tpu_takes_no_kernel() -> None:
    query = jnp.zeros((1, 512, 2, 64))
    splats = Splats(jnp.zeros((2, 8, 64)), jnp.zeros((2, 8)))
    assert kernel_takes(query, splats, 64, 0) and not kernel_takes(query, splats, 64, 8)


@pytest.mark.parametrize(
    ("kept", "window", "words"),
    [
        (-1, WINDOW, "kept = -1; give a number of keys >= 0"),
        (True, WINDOW, "kept = True"),
        (4, "all", "no key leaves the window"),
    ],
)
def test_what_cannot_be_kept(kept: int, window: int | str, words: str) -> None:
    case = draw(8, SPLATS)
    with pytest.raises(InputError, match=words):
        splat_attention(*case[:4], window=window, kept=kept)  # type: ignore[arg-type]


def test_bad_weights_and_states() -> None:
    case = draw(8, SPLATS, learned=True)
    weights = case.splats.importance
    assert weights is not None
    for importance, words in ((weights[:, 1:], "importance has shape"), (weights.at[0, 0].set(np.nan), "not finite")):
        with pytest.raises(InputError, match=words):
            splat_attention(*case[:3], dataclasses.replace(case.splats, importance=importance), window=4, kept=2)
    state = init_splat_state(case.splats, 2, 4, jnp.float32, kept=3)
    with pytest.raises(InputError, match=r"kept_key is float32\[2, 2, 3, 8\] where float32\[2, 2, 2, 8\] belongs"):
        splat_attention(*case[:4], window=4, kept=2, initial_state=state)
