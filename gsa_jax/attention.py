"""The attention of a GPT-Neo block, and the one override that splats make of it.

May be changed here: projections and head bookkeeping (`GPTNeoSelfAttention`), and what attention through splats does
(`GSASelfAttention._attn`, nothing else). The arithmetic itself lives in `gsa_jax.ops`.
"""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.cache import LayerCache
from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.layers import Linear
from gsa_jax.ops import causal_attention, single_query_attention
from gsa_jax.splats import init_splats


class GPTNeoSelfAttention(nnx.Module):
    """Multi-head attention as in `transformers` v4.57 `GPTNeoSelfAttention`: unscaled, q/k/v without bias."""

    def __init__(
        self,
        config: GPTNeoConfig,
        kind: str,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_heads = config.num_heads
        self.window = config.window_size if kind == "local" else None

        def projection(use_bias: bool) -> Linear:
            return Linear(
                config.hidden_size,
                config.hidden_size,
                use_bias=use_bias,
                stddev=config.initializer_range,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.q_proj = projection(use_bias=False)
        self.k_proj = projection(use_bias=False)
        self.v_proj = projection(use_bias=False)
        self.out_proj = projection(use_bias=True)

    def __call__(
        self, hidden_states: Float[Array, "B T E"], attention_mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T E"]:
        """Attends over the whole sequence."""
        query, key, value = self._project(hidden_states)
        return self._merge(self._attn(query, key, value, attention_mask))

    def prefill(
        self, hidden_states: Float[Array, "B T E"], attention_mask: Bool[Array, "B T"], cache: LayerCache
    ) -> tuple[Float[Array, "B T E"], LayerCache]:
        """The same, for slots 0 .. T-1 of a sequence that decoding will go on with."""
        query, key, value = self._project(hidden_states)
        return self._merge(self._attn(query, key, value, attention_mask)), cache.fill(key, value)

    def decode(
        self,
        hidden_states: Float[Array, "B 1 E"],
        cache_mask: Bool[Array, "B L"],
        slot: Int[Array, ""],
        cache: LayerCache,
    ) -> tuple[Float[Array, "B 1 E"], LayerCache]:
        """Attends from the one token at `slot` over the cache and itself, then enters the cache."""
        query, key, value = self._project(hidden_states)
        context = single_query_attention(
            query[:, 0], key[:, 0], value[:, 0], cache.key, cache.value, cache.visible(cache_mask, slot)
        )
        return self._merge(context[:, None]), cache.append(key, value, slot)

    def _project(self, hidden_states: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], self.num_heads, -1)

        return heads(self.q_proj(hidden_states)), heads(self.k_proj(hidden_states)), heads(self.v_proj(hidden_states))

    def _merge(self, context: jax.Array) -> jax.Array:
        return self.out_proj(context.reshape(*context.shape[:-2], -1))

    def _attn(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B T H D"],
        value: Float[Array, "B T H D"],
        attention_mask: Bool[Array, "B T"],
    ) -> Float[Array, "B T H D"]:
        return causal_attention(query, key, value, attention_mask, window=self.window)


class GSASelfAttention(GPTNeoSelfAttention):
    """Attention that carries Gaussian splats: centres `[H, S, D]` and logarithms of their scales `[H, S]`.

    With an infinite window (the default) the splats are attached and unused: every key attends exactly, and the result
    is bit for bit that of `GPTNeoSelfAttention`.

    Raises:
        InputError: the window is finite, which is not implemented yet.
    """

    def __init__(
        self,
        config: GPTNeoConfig,
        kind: str,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, kind, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        splats = config.splats
        assert splats is not None, "GSASelfAttention needs config.splats"
        if splats.window is not None:
            raise InputError(
                f"splats.window = {splats.window}: attention through splats is not implemented yet; "
                "use window = None (exact attention, splats attached)"
            )
        centers, log_scales = init_splats(rngs.params(), config, param_dtype)
        self.splat_centers = nnx.Param(centers)
        self.splat_log_scales = nnx.Param(log_scales)

    def _attn(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B T H D"],
        value: Float[Array, "B T H D"],
        attention_mask: Bool[Array, "B T"],
    ) -> Float[Array, "B T H D"]:
        return super()._attn(query, key, value, attention_mask)


class GPTNeoAttention(nnx.Module):
    """The level that Hugging Face's names have between a block and its attention (`attn.attention`)."""

    def __init__(
        self,
        config: GPTNeoConfig,
        kind: str,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        attention = GPTNeoSelfAttention if config.splats is None else GSASelfAttention
        self.attention = attention(config, kind, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
