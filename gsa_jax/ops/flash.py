"""Exact attention by the flash kernels of accelerators: JAX's splash attention on TPU, cuDNN on NVIDIA GPUs.

Both take 16-bit inputs. Scores are `q . k` without a scale, as everywhere here, and padding sees padding, so that every
row is finite.

May be changed here: which kernel runs where, and what it is given. The definition is `gsa_jax.ops.softmax`.
"""

import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsa_jax.config import AttentionImplementation
from gsa_jax.errors import InputError
from gsa_jax.ops.partition import BATCH, TOKENS_AND_HEADS, per_rows_and_heads

_BLOCKS = (512, 256, 128)
"""Tokens of a block of splash attention: the first that divides the length, padded to a multiple of the last."""

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def exact_attention(
    ours: Attend,
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    implementation: AttentionImplementation,
) -> Float[Array, "B T H D"]:
    """Attention to the last `window` tokens, the query's own included, or to all of the past if None.

    Args:
        ours: computes the same from query, key, value and segments, on any platform and in any dtype.
        segments: as `gsa_jax.ops.softmax.causal_attention` takes them. A query that sees no key gets an arbitrary
            finite result.

    Raises:
        InputError: a kernel is named that does not take the inputs' dtype or shape, or it is cuDNN's and there is no
            GPU. That splash attention needs a TPU, Pallas says, once the program's platform is known.
    """
    if implementation not in get_args(AttentionImplementation):
        raise InputError(
            f"attention_implementation = {implementation!r}: take {', '.join(get_args(AttentionImplementation))}"
        )
    # cuDNN can only be asked for where it is; a program for a GPU that is compiled elsewhere has our own attention.
    has_gpu = jax.default_backend() == "gpu"
    is_narrow = jnp.finfo(query.dtype).bits < 32
    if implementation == "xla" or (implementation == "auto" and not is_narrow):
        return ours(query, key, value, segments)
    if not is_narrow:
        raise InputError(
            f"attention_implementation = {implementation!r} computes in 16 bits, and the inputs are {query.dtype}; "
            "take 'xla', or compute in bfloat16"
        )
    if implementation == "cudnn" and not has_gpu:
        raise InputError("attention_implementation = 'cudnn' needs an NVIDIA GPU, and JAX finds none; take 'auto'")
    if implementation == "cudnn" and not _cudnn_takes(query):
        raise InputError(
            "attention_implementation = 'cudnn' takes an even number of tokens and heads of a multiple of 8 up to 128, "
            f"and there are {query.shape[1]} tokens and heads of {query.shape[3]}; take 'auto'"
        )

    def on_device(kernel: Callable[..., jax.Array]) -> Attend:
        tokens = TOKENS_AND_HEADS
        return per_rows_and_heads(functools.partial(kernel, window=window), (tokens, tokens, tokens, BATCH), tokens)

    kernels = {"splash": on_device(splash), "cudnn": on_device(_cudnn)}
    if implementation != "auto":
        return kernels[implementation](query, key, value, segments)
    platforms = {"tpu": kernels["splash"], **({"cuda": kernels["cudnn"]} if has_gpu and _cudnn_takes(query) else {})}
    return jax.lax.platform_dependent(query, key, value, segments, **platforms, default=ours)


def splash(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    segments: Int[Array, "B T"] | None,
    *,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """JAX's splash attention, on a TPU or interpreted on any platform; one document without padding if None."""
    # Imported here, because loading Pallas takes a second that most programs need not wait.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, length, heads, _ = query.shape
    padded = -(-length // _BLOCKS[-1]) * _BLOCKS[-1]
    block = next(size for size in _BLOCKS if padded % size == 0)
    past = masks.LocalMask((padded, padded), (None if window is None else window - 1, 0), 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([past] * heads),
        block_sizes=kernels.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(jnp.pad(x, [(0, 0), (0, padded - length), (0, 0), (0, 0)]), 1, 2)

    arguments: list[Any] = [heads_first(x) for x in (query, key, value)]
    if segments is not None:
        segments = jnp.pad(segments, [(0, 0), (0, padded - length)])
        arguments.append(kernels.SegmentIds(segments, segments))
    output: Any = jax.vmap(kernel)(*arguments)
    return jnp.swapaxes(output, 1, 2)[:, :length]


def _cudnn_takes(query: Float[Array, "B T H D"]) -> bool:
    """What JAX lets cuDNN's flash attention have on every GPU; odd lengths it refuses once gradients are asked for."""
    _, length, _, head_dim = query.shape
    return length % 2 == 0 and head_dim % 8 == 0 and head_dim <= 128


def _cudnn(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
) -> Float[Array, "B T H D"]:
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=(segments[:, :, None] == segments[:, None])[:, None],
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
