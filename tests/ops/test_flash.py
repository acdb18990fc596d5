"""The kernels that exact attention takes on accelerators: splash attention, interpreted, against the definition; and
which kernel a program has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.config import AttentionImplementation, GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.ops.api import splat_attention
from gsa_jax.ops.flash import exact_attention, splash
from gsa_jax.ops.softmax import causal_attention
from gsa_jax.ops.state import no_splats
from helpers.splat_cases import relative_error

LENGTH, HEADS, DIM = 200, 2, 64


def inputs(dtype=jnp.bfloat16) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=(2, LENGTH, HEADS, DIM)) / 2, dtype) for _ in range(3)]


def documents() -> jax.Array:
    """Two rows of packed documents, with padding at the end of one."""
    random = np.random.default_rng(1)
    numbers = 1 + np.cumsum(random.random((2, LENGTH)) < 0.03, axis=1)
    numbers[0, -30:] = 0
    return jnp.asarray(numbers, jnp.int32)


def dense(query, key, value, segments, window: int | None) -> np.ndarray:
    """The definition in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    segments = np.asarray(segments)
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = (distance >= 0) & (distance < (window or LENGTH)) & (segments[:, :, None] == segments[:, None])
    scores = np.where(seen[:, None], np.einsum("bthd,bkhd->bhtk", query, key), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhtk,bkhd->bthd", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("window", [None, 17])
def test_splash_is_the_definition_for_documents_windows_and_padding(window: int | None) -> None:
    query, key, value = inputs()
    segments = documents()
    output = jax.jit(functools.partial(splash, window=window, interpret=True))(query, key, value, segments)
    assert output.dtype == jnp.bfloat16 and bool(jnp.isfinite(output).all())
    assert relative_error(output, dense(query, key, value, segments, window)) < 4e-3  # half a unit of 8 bits


@pytest.mark.slow
def test_gradients_of_splash_are_those_of_our_own() -> None:
    segments = documents()

    def gradients(attend, *arrays):
        def loss(*arrays):
            output = attend(*arrays, segments).astype(jnp.float32)
            weights = jnp.sin(1.0 + jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
            return jnp.sum(jnp.where((segments != 0)[:, :, None, None], output * weights, 0))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    found = gradients(functools.partial(splash, window=None, interpret=True), *inputs())
    wanted = gradients(causal_attention, *(x.astype(jnp.float32) for x in inputs()))
    for got, want in zip(found, wanted, strict=True):
        assert relative_error(got, want) < 2e-2


def program(platform: str, dtype, implementation: AttentionImplementation, window: int | str) -> str:
    def attend(query, key, value):
        splats = no_splats(HEADS, DIM)
        return splat_attention(query, key, value, splats, window=window, attention_implementation=implementation)[0]

    return jax.jit(attend).trace(*inputs(dtype)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("window", ["all", 17])
def test_a_program_has_the_kernel_of_its_platform(window: int | str) -> None:
    kernel = "tpu_custom_call"
    assert kernel in program("tpu", jnp.bfloat16, "auto", window)
    assert kernel in program("tpu", jnp.bfloat16, "splash", window)
    assert kernel not in program("tpu", jnp.bfloat16, "xla", window)
    assert kernel not in program("tpu", jnp.float32, "auto", window)
    for platform in ("cpu", "cuda"):
        assert "custom_call" not in program(platform, jnp.bfloat16, "auto", window)


def test_shapes_that_cudnn_does_not_take_are_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, as this test says, JAX refuses heads of 4, and odd lengths with gradients."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def lower(length: int, size: int, implementation: AttentionImplementation = "auto") -> str:
        x, segments = jnp.ones((1, length, 2, size), jnp.bfloat16), jnp.ones((1, length), jnp.int32)
        attend = functools.partial(exact_attention, causal_attention, window=None, implementation=implementation)
        return jax.jit(attend).trace(x, x, x, segments).lower(lowering_platforms=("cuda",)).as_text()

    for length, size in ((16, 4), (17, 64), (16, 192)):
        assert "custom_call" not in lower(length, size)
        with pytest.raises(InputError, match=f"there are {length} tokens and heads of {size}; take 'auto'"):
            lower(length, size, "cudnn")
    with pytest.raises(RuntimeError, match="cuDNN"):  # what is asked for, and JAX does not find here
        lower(16, 64)


@pytest.mark.usefixtures("unchecked")
def test_an_implementation_that_cannot_run_is_refused() -> None:
    with pytest.raises(InputError, match=r"'splash' computes in 16 bits, and the inputs are float32; take 'xla'"):
        program("tpu", jnp.float32, "splash", "all")
    with pytest.raises(InputError, match=r"'cudnn' needs an NVIDIA GPU, and JAX finds none"):
        program("cuda", jnp.bfloat16, "cudnn", "all")
    with pytest.raises(InputError, match=r"'flash': take auto, xla, splash, cudnn"):
        exact_attention(causal_attention, *inputs(), documents(), window=None, implementation="flash")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"attention_implementation = 'flash': must be one of auto, xla"):
        GPTNeoConfig(attention_implementation="flash")
    with pytest.raises(Exception, match="interpret"):  # Pallas says so, when the program is made for a CPU
        program("cpu", jnp.bfloat16, "splash", "all")
