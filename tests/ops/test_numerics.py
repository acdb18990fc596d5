"""Splat attention where float32 is hard pressed: extreme scales, norms and orders of keys, and a million tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gsa_jax.ops.api import splat_attention
from gsa_jax.ops.state import Splats, init_splat_state
from helpers.splat_cases import CHUNK, Case, compiled_gradients, draw, relative_error

pytestmark = pytest.mark.usefixtures("optimised")

CHUNKS = {0: CHUNK, 16: None}
"""Tokens of a chunk for each window: small ones, and the default."""

FAST = ("chunked", "recurrent")
LENGTH, SPLATS, WINDOW = 150, 6, 16


def approaching(random: np.random.Generator, case: Case, log_scale: float) -> Case:
    """Each key far nearer to the centres than those before it: later keys outweigh earlier ones by hundreds of nats."""
    distance = jnp.geomspace(100.0, 0.1, LENGTH)[None, :, None, None]
    key = case.splats.centers[None, None, :, 0] + distance * random.normal(size=case.key.shape)
    return scaled(case._replace(key=key.astype(jnp.float32)), log_scale)


def scaled(case: Case, log_scales: jax.typing.ArrayLike) -> Case:
    shape = case.splats.log_scales.shape
    log_scales = jnp.broadcast_to(jnp.asarray(log_scales, jnp.float32), shape)
    return case._replace(splats=Splats(case.splats.centers, log_scales))


def moved(case: Case, centers: jax.Array) -> Case:
    return case._replace(splats=Splats(centers, case.splats.log_scales))


REGIMES = {
    **{f"sigma-{s:g}": functools.partial(lambda s, r, c: scaled(c, np.log(s)), s) for s in np.geomspace(1e-3, 1e3, 7)},
    "sigmas-mixed": lambda r, c: scaled(c, np.log(np.geomspace(1e-3, 1e3, SPLATS))),
    "sigma-quarter": lambda r, c: scaled(c, np.log(0.25)),
    "q-k-times-100": lambda r, c: scaled(c._replace(query=100 * c.query, key=100 * c.key), 0.0),
    "keys-times-100": lambda r, c: scaled(c._replace(key=100 * c.key), 0.0),
    "equal-keys": lambda r, c: scaled(c._replace(key=jnp.broadcast_to(c.key[:, :1], c.key.shape)), -1.0),
    "far-centers": lambda r, c: moved(scaled(c, 0.0), 1000 * c.splats.centers),
    "far-origin": lambda r, c: moved(scaled(c, 0.0), 1000 + c.splats.centers),
    "equal-centers": lambda r, c: moved(scaled(c, 0.0), jnp.zeros_like(c.splats.centers)),
    "approaching-keys": lambda r, c: approaching(r, c, 0.0),
    "approaching-keys-sigma-quarter": lambda r, c: approaching(r, c, np.log(0.25)),
    "leaving-keys": lambda r, c: (lambda a: a._replace(key=a.key[:, ::-1]))(approaching(r, c, 0.0)),
}


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), WINDOW])
@pytest.mark.parametrize("regime", REGIMES)
def test_extremes_match_float64(regime: str, window: int, implementation: str) -> None:
    case = REGIMES[regime](np.random.default_rng(1), draw(LENGTH, SPLATS, batch=1, pads=0.05, seed=2))
    (output, state), gradients = compiled_gradients(window, implementation, CHUNKS[window])(case)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.float64), case)
        (want, _), want_gradients = compiled_gradients(window, "reference")(wide)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(((output, state), gradients)))
    assert relative_error(output, want) < (1e-5 if regime.startswith("sigma-1") else 1e-4)

    # A score moves with a query or key by |x - c| / sigma^2. Where the exact gradient is far less than that allows, as
    # where one key takes all the weight, rounding is measured against what it allows.
    sigma = np.exp(np.asarray(case.splats.log_scales, np.float64))
    reach = max(float(jnp.max(jnp.abs(x))) for x in (case.query, case.key, case.splats.centers))
    allowed = (reach / sigma**2).max() + reach
    for name, got, exact in zip(("query", "key", "value"), gradients, want_gradients, strict=False):
        scale = np.sqrt(exact.size) * (1.0 if name == "value" else allowed)
        assert relative_error(got, exact, 0.01 * scale) < 1e-3, name
    scale = np.sqrt(LENGTH) * allowed
    assert relative_error(gradients[3].centers, want_gradients[3].centers, scale) < 1e-3
    assert relative_error(gradients[3].log_scales, want_gradients[3].log_scales, reach * scale) < 1e-3


def test_steep_features_in_chunks_of_any_length() -> None:
    """Features that rise above 88, the logarithm of the largest float32, in a chunk whose length is no power of two."""
    case = approaching(np.random.default_rng(1), moved(draw(LENGTH, 4, batch=1), 20 * draw(1, 4).splats.centers), 0.0)
    case = case.slots(LENGTH - 50, LENGTH)
    (output, _), gradients = compiled_gradients(0, "chunked", None)(case)
    (want, _), want_gradients = compiled_gradients(0, "reference")(case)
    assert relative_error(output, want) < 1e-4
    # One key takes nearly all of the weight, so that gradients by query and key are rounding.
    for got, expected in zip(gradients[:3], want_gradients[:3], strict=True):
        assert relative_error(got, expected, 1.0) < 1e-3


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    log_sigma=st.floats(np.log(1e-3), np.log(1e3)),
    spread=st.floats(0, 3),
    size=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    seed=st.integers(0, 5),
)
@example(log_sigma=-5.0, spread=0.0, size=100.0, seed=0)  # features of 1e9, which float32 rounds by hundreds
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("window", [0, WINDOW])
def test_always_finite(
    window: int, implementation: str, log_sigma: float, spread: float, size: float, seed: int
) -> None:
    case = draw(LENGTH, SPLATS, batch=1, pads=0.05, seed=seed)
    case = scaled(case, log_sigma + spread * jnp.linspace(-1.0, 1.0, SPLATS))
    case = case._replace(query=size * case.query, key=size * case.key)
    (output, state), gradients = compiled_gradients(window, implementation, CHUNKS[window])(case)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(((output, state), gradients)))
    # An average of values is never beyond them.
    assert float(jnp.max(jnp.abs(output))) <= float(jnp.max(jnp.abs(case.value))) * (1 + 1e-5)


@pytest.mark.parametrize("alike", [False, True], ids=["random", "alike"])
def test_a_million_tokens_through_the_recurrent_form(alike: bool) -> None:
    """Rounding must not pile up: without compensation, a sum of a million equal terms is wrong in its second digit."""
    tokens, window, dim, splats = 1_000_000, 4, 3, 2
    random = np.random.default_rng(0)
    query, key, value = (random.normal(size=(tokens, dim)).astype(np.float32) for _ in range(3))
    value += 1  # a mean that does not vanish
    if alike:
        key[1:], value[1:] = key[1], value[1]
    centers = random.normal(size=(1, splats, dim)).astype(np.float32)
    parameters = Splats(jnp.asarray(centers), jnp.zeros((1, splats)))

    @jax.jit
    def stream(*arrays):
        def step(slot, carried):
            query, key, value = (jax.lax.dynamic_slice_in_dim(x, slot, 1)[None, :, None] for x in arrays)
            mask = jnp.ones((1, 1), bool)
            return splat_attention(
                query, key, value, parameters, window=window, attention_mask=mask, initial_state=carried[1]
            )

        start = jnp.zeros((1, 1, 1, dim)), init_splat_state(parameters, 1, window, jnp.float32)
        return jax.lax.fori_loop(0, tokens, step, start)

    output, state = stream(query, key, value)
    assert state.length == tokens

    q, k, v, c = (x.astype(np.float64) for x in (query[-1], key, value, centers[0]))
    log_phi = -(((q - c) ** 2).sum(-1) + ((k[:, None] - c) ** 2).sum(-1)) / 2
    weights = np.exp(log_phi).sum(-1)
    weights[-window:] = np.exp(k[-window:] @ q)
    assert relative_error(output[0, 0, 0], weights @ v / weights.sum()) < 1e-6
