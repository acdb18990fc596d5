"""Packed rows: each document of a row gets what it gets alone, and nothing of another one reaches it.

May be changed here: how rows are packed. The oracle is a dense float64 computation of one document at a time.
"""

import dataclasses
import functools
import importlib
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_jax import GPTNeoForCausalLM, SplatConfig
from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.ops import init_splat_state, splat_attention
from gsa_jax.ops.chunked import _SCHEDULES, Schedule
from gsa_jax.parameters import build_model, named_parameters
from helpers.splat_cases import Case, assert_close, draw, relative_error

api = importlib.import_module("gsa_jax.ops.api")

LENGTH, CHUNK = 70, 16
FORMS = [
    ("chunked", 5),
    ("reference", 5),
    (None, "all"),
    *(pytest.param(x, 0, marks=pytest.mark.slow) for x in ("chunked", "reference")),
]


def pack(length: int, *lengths: int) -> np.ndarray:
    """Documents of these lengths one after another, numbered 2, 4, ...; a negative length is padding."""
    numbers = [np.full(abs(n), 2 * i + 2 if n > 0 else 0) for i, n in enumerate(lengths)]
    row = np.concatenate(numbers)
    return np.pad(row, (0, length - len(row))).astype(np.int32)


ROWS = np.stack([pack(LENGTH, 20, 1, 40, 3), pack(LENGTH, -3, 5, -2, 19, 33, -1)])


def by_definition(case: Case, window: int | str) -> np.ndarray:
    """Each document by itself, float64, distances counted in slots; 0 elsewhere."""
    query, key, value = (np.asarray(x, np.float64) for x in case[:3])
    splats = jax.tree.map(lambda x: np.asarray(x, np.float64), case.splats)
    output = np.zeros_like(value)
    for row, numbers in enumerate(np.asarray(case.mask)):
        for number in set(numbers[numbers > 0].tolist()):
            slots = np.flatnonzero(numbers == number)
            q, k, v = query[row, slots], key[row, slots], value[row, slots]
            near = np.einsum("thd,khd->htk", q, k)
            squares = [((x[:, :, None] - splats.centers) ** 2).sum(-1) for x in (q, k)]
            log_q, log_k = (-x / (2 * np.exp(2 * splats.log_scales)) for x in squares)
            if splats.log_amplitudes is not None:
                log_q = log_q + splats.log_amplitudes
            far = np.logaddexp.reduce(log_q[:, None] + log_k[None], axis=-1, initial=-np.inf).transpose(2, 0, 1)
            if splats.norm_gain is not None:
                norms = [(x**2).sum(-1).T for x in (q, k)]
                far += splats.norm_gain[:, None, None] * (norms[0][:, :, None] + norms[1][:, None, :])
            if splats.far_gain is not None:
                far += splats.far_gain[:, None, None]
            distance = slots[:, None] - slots
            scores = near if window == "all" else np.where(distance < window, near, far)
            scores = np.where(distance >= 0, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            output[row, slots] = np.einsum("htk,khd->thd", weights / weights.sum(-1, keepdims=True), v)
    return output


@functools.cache
def attend(implementation: str | None, window: int | str):
    """`call(case, cotangent) -> output, gradients` by query, key, value and splats; the output is 0 at padding."""

    def call(case: Case, cotangent: jax.Array):
        def forward(*arrays):
            output, state = splat_attention(
                *arrays,
                window=window,
                segment_ids=case.mask,
                implementation=implementation,  # type: ignore[arg-type]
                chunk_size=CHUNK if implementation == "chunked" else None,
            )
            assert state is None
            return jnp.where(case.mask[:, :, None, None] > 0, output, 0)

        output, pull_back = jax.vjp(forward, *case[:4])
        return output, pull_back(cotangent)

    return jax.jit(call)


def packed_case(documents: np.ndarray, seed: int = 0) -> Case:
    return draw(documents.shape[1], 3, optional=True, seed=seed)._replace(mask=jnp.asarray(documents))


@pytest.mark.parametrize(("implementation", "window"), FORMS)
def test_documents_are_strangers(implementation: str | None, window: int | str) -> None:
    """Outputs are those of each document alone. Other documents get a gradient of exactly 0, and whatever they hold
    changes no bit of an output and nothing but rounding of a gradient."""
    case, call = packed_case(ROWS), attend(implementation, window)
    cotangent = draw(LENGTH, 0, seed=5).value
    output, _ = call(case, cotangent)
    assert relative_error(output, by_definition(case, window)) < 3e-6
    for number in sorted(set(ROWS[ROWS > 0].tolist())):
        own = np.equal(ROWS, number)
        wide = own[:, :, None, None].astype(np.float32)
        gradients = call(case, cotangent * wide)[1][:3]
        assert all((np.asarray(x)[~own] == 0).all() for x in gradients)
        assert (np.asarray(gradients[2])[own] != 0).all()
        query, key, value = (
            jnp.where(wide > 0, x, 30 * y) for x, y in zip(case[:3], draw(LENGTH, 0, seed=9)[:3], strict=True)
        )
        changed = call(Case(query, key, value, case.splats, case.mask), cotangent * wide)
        assert np.array_equal(np.asarray(changed[0])[own], np.asarray(output)[own])
        # Where the other documents' features are steep, a chunk takes the other branch, whose gradient newer compilers
        # round differently in the last bit.
        for got, want in zip(changed[1][:3], gradients, strict=True):
            np.testing.assert_allclose(np.asarray(got)[own], np.asarray(want)[own], rtol=1e-5, atol=1e-6)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_any_packing(window: int, data: st.DataObject) -> None:
    """Against float64, and gradients against those of the definition in the same precision."""
    lengths = st.lists(st.sampled_from([1, 2, 5, 15, 16, 17, 33, -1, -4, -20]), min_size=1, max_size=8)
    rows = [list(itertools.chain(data.draw(lengths), [LENGTH])) for _ in range(2)]
    documents = np.stack([pack(400, *row)[:LENGTH] for row in rows])
    case = packed_case(documents, data.draw(st.integers(0, 3)))
    cotangent = draw(LENGTH, 0, seed=5).value
    output, gradients = attend("chunked", window)(case, cotangent)
    assert relative_error(output, by_definition(case, window)) < 3e-6
    assert_close(gradients, attend("reference", window)(case, cotangent)[1], 1e-4)


def clusters(levels: tuple[float, ...], steep: int | None = None) -> Case:
    """Documents whose log features lie `levels` above one another's for each splat; the one numbered `steep` comes
    from far away to where it is, so that its later keys outweigh its earlier ones by hundreds of nats."""
    documents = np.stack([pack(LENGTH, 9, 21, 37), pack(LENGTH, 30, 3, 31)])
    case = packed_case(documents, seed=3)
    # One direction c for all splats: a feature is c . k - |k|^2 / 2, largest for k = c, and 200 with |c| = 20.
    center = jnp.zeros(8).at[0].set(20.0)
    splats = dataclasses.replace(
        case.splats,
        centers=center + 0.1 * case.splats.centers,
        log_scales=jnp.zeros_like(case.splats.log_scales),
        norm_gain=jnp.zeros(2),
    )
    level = np.select([documents == 2, documents == 4, documents == 6], levels)
    along = 20 - np.sqrt(400 - 2 * np.maximum(level, 0))
    if steep is not None:
        begins = np.argmax(documents == steep, axis=1)[:, None]
        along = np.where(documents == steep, along * np.minimum(1, (np.arange(LENGTH) - begins) / 6), along)
    key = (0.3 * case.key).at[..., 0].add(jnp.asarray(along, jnp.float32)[:, :, None])
    query = 0.1 * case.query
    return Case(query, key, case.value, splats, case.mask)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(
    ("levels", "steep"), [((200, 0, 0), None), ((0, 200, 0), None), ((200, 100, 0), 4), ((200, 0, 200), 6)], ids=str
)
def test_features_far_above_those_of_another_document(
    levels: tuple[float, ...], steep: int | None, window: int
) -> None:
    """Sums relative to another document's maxima would be 0 here."""
    case = clusters(levels, steep)
    features = np.einsum("bthd,hsd->bths", case.key, case.splats.centers) - np.sum(case.key**2, -1, keepdims=True) / 2
    numbers = np.asarray(case.mask)
    assert np.ptp([features[numbers == number].max() for number in (2, 4, 6)]) > 150
    cotangent = draw(LENGTH, 0, seed=5).value
    output, gradients = attend("chunked", window)(case, cotangent)
    assert relative_error(output, by_definition(case, window)) < 1e-4
    chex.assert_tree_all_finite(gradients)
    assert_close(gradients[:3], attend("reference", window)(case, cotangent)[1][:3], 1e-3)


def test_many_blocks_of_exact_attention() -> None:
    documents = np.stack([pack(600, 250, 1, 300), pack(600, -10, 512, 70)])
    case = draw(600, 0, heads=1, head_dim=4)._replace(mask=jnp.asarray(documents))
    output, _ = attend(None, "all")(case, case.value)
    assert relative_error(output, by_definition(case, "all")) < 3e-6


MODES = {
    "exact": (("global", "local"), None),
    "hybrid": (
        ("global", "local"),
        SplatConfig(num_splats=3, window=6, log_amplitudes=True, norm_gain=True, far_gain=True),
    ),
    "window 0": (("global",), SplatConfig(num_splats=3, window=0)),
    "all layers": (("local",), SplatConfig(num_splats=2, window=0, layers="all")),
    "window alone": (("global",), SplatConfig(num_splats=0, window=6)),
}


def random_model(mode: str):
    """`forward(params, ids, ...)` of a model, and its parameters: all random and large enough to matter."""
    kinds, splats = MODES[mode]
    config = GPTNeoConfig(
        vocab_size=50,
        hidden_size=16,
        num_layers=len(kinds),
        num_heads=2,
        attention_types=((kinds, 1),),
        window_size=7,
        max_position_embeddings=160,
        bos_token_id=0,
        eos_token_id=0,
        splats=splats,
    )
    random = np.random.default_rng(0)
    tensors = {
        name: tensor + jnp.asarray(0.3 * random.normal(size=tensor.shape), jnp.float32)
        for name, tensor in named_parameters(GPTNeoForCausalLM(config, rngs=nnx.Rngs(0))).items()
    }
    graphdef, params = nnx.split(build_model(config, tensors))
    return lambda params, ids, **masks: nnx.merge(graphdef, params)(ids, **masks), params


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_SCHEDULES, "cpu", Schedule(CHUNK, 0))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize(
    "mode",
    ["window 0", *(pytest.param(x, marks=pytest.mark.slow) for x in MODES if x != "window 0")],
)
def test_a_packed_row_is_its_documents_alone(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, and gradients of the parameters, of the whole model: documents of 1 token, and of several chunks. Alone,
    a document runs without segments and through the dense form of the op."""
    documents = np.stack([pack(190, 30, 1, 150), pack(190, -3, 100, -1, 70, 12)])
    ids = np.random.default_rng(1).integers(0, 50, documents.shape)
    slots = [np.flatnonzero(row == number) for row in documents for number in sorted(set(row[row > 0].tolist()))]
    rows = [row for row, numbers in enumerate(documents) for _ in set(numbers[numbers > 0].tolist())]
    alone = np.zeros((len(slots), 150), ids.dtype)
    mask = np.arange(150) < np.array([len(own) for own in slots])[:, None]
    for document, row, own in zip(alone, rows, slots, strict=True):
        document[: len(own)] = ids[row, own]
    forward, params = random_model(mode)

    def loss(params, ids, real, **masks):
        logits = forward(params, ids, **masks)
        weights = 1 + jnp.sin(ids[:, :, None] + jnp.arange(50))
        return jnp.sum(jnp.where(real[:, :, None], weights * jnp.sin(logits), 0)), logits

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    got, logits = gradient(params, ids, documents > 0, segment_ids=documents)
    monkeypatch.setattr(api, "_run", lambda *_, run=api._run: run("reference", None, None, is_first=False))
    want, expected = gradient(params, alone, mask, attention_mask=mask)
    for n, (row, own) in enumerate(zip(rows, slots, strict=True)):
        assert relative_error(logits[row, own], expected[n, : len(own)]) < 1e-5, f"document {n}"
    assert_close(got, want, 1e-4)


def test_an_attention_mask_makes_padding_in_documents() -> None:
    forward, params = random_model("window alone")
    forward = jax.jit(forward)
    documents = pack(40, 20, 20)[None]
    ids = np.random.default_rng(2).integers(0, 50, documents.shape)
    mask, everything = np.arange(40)[None] % 7 != 3, np.ones((1, 40), bool)
    got = forward(params, ids, attention_mask=mask, segment_ids=documents)
    want = forward(params, ids, attention_mask=everything, segment_ids=np.where(mask, documents, 0))
    assert jnp.array_equal(got, want)
    other = forward(params, ids, attention_mask=everything, segment_ids=documents)
    assert relative_error(got[mask], other[mask]) > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segment_ids": np.array([[1, 1, 2, 1]])}, "fall along a row"),
        ({"segment_ids": np.array([[-1, -1, 1, 1]])}, "fall along a row"),
        ({"segment_ids": np.ones((1, 3), np.int32)}, "segment_ids is int32"),
        ({"segment_ids": np.ones((1, 4), np.float32)}, "segment_ids is float32"),
        ({"attention_mask": np.array([[1, 1, 2, 2]])}, "attention_mask holds 2"),
        ({"implementation": "recurrent"}, "'recurrent' reads one document"),
        ({"initial_state": True}, "leave initial_state out"),
    ],
    ids=str,
)
def test_documents_that_cannot_be_read(change: dict, words: str) -> None:
    case = draw(4, 2, batch=1)
    if "initial_state" in change:
        change = {"initial_state": init_splat_state(case.splats, 1, 2, jnp.float32)}
    arguments = {"window": 2, "segment_ids": np.array([[1, 1, 2, 0]])} | change
    with pytest.raises(InputError, match=words) as error:
        splat_attention(*case[:4], **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("segment_ids", "words"),
    [
        (np.ones((1, 5), np.int32), r"segment_ids is int32\[1, 5\]"),
        (np.ones((1, 4), np.float32), "segment_ids is float32"),
        (np.ones((1, 4), bool), "segment_ids is bool"),
        (np.array([[2, 2, 1, 1]]), "fall along a row"),
        (np.array([[1, 1, 2**31, 2**31]]), "segment_ids holds 2147483648, which 32 bits cannot"),
    ],
)
def test_segments_that_do_not_fit(segment_ids: np.ndarray, words: str) -> None:
    forward, params = random_model("window alone")
    with pytest.raises(InputError, match=words):
        forward(params, jnp.zeros((1, 4), jnp.int32), segment_ids=segment_ids)
