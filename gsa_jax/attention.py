"""The attention of a GPT-Neo block, and the one override that splats make of it.

May be changed here: projections and head bookkeeping (`GPTNeoSelfAttention`), and what attention through splats does
(`GSASelfAttention._attn`, nothing else). The arithmetic itself lives in `gsa_jax.ops`.
"""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.config import OPTIONAL_TERMS, GPTNeoConfig
from gsa_jax.layers import Linear
from gsa_jax.ops import Splats, SplatState, no_splats, splat_attention
from gsa_jax.splats import init_splats


class GPTNeoSelfAttention(nnx.Module):
    """Multi-head attention as in `transformers` v4.57 `GPTNeoSelfAttention`: unscaled, q/k/v without bias."""

    def __init__(
        self,
        config: GPTNeoConfig,
        layer: int,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_heads = config.num_heads
        self.window = config.windows[layer]

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
        self, hidden_states: Float[Array, "B T E"], attention_mask: Bool[Array, "B T"] | Int[Array, "B T"]
    ) -> Float[Array, "B T E"]:
        """Attends over the whole sequence; with an integer mask, as in `splat_attention`, within each document."""
        context, _ = self._attn(*self.project(hidden_states), attention_mask, self.window)
        return self._merge(context)

    def prefill(
        self, hidden_states: Float[Array, "B T E"], attention_mask: Bool[Array, "B T"], capacity: int
    ) -> tuple[Float[Array, "B T E"], SplatState]:
        """The same, for the first T of at most `capacity` slots: also gives the state that `extend` goes on with."""
        window = capacity if self.window is None else min(self.window, capacity)
        context, state = self._attn(*self.project(hidden_states), attention_mask, window)
        assert state is not None, "a finite window has a state"
        return self._merge(context), state

    def extend(
        self, hidden_states: Float[Array, "B T E"], attention_mask: Bool[Array, "B T"], state: SplatState
    ) -> tuple[Float[Array, "B T E"], SplatState]:
        """The next T tokens."""
        window = state.key.shape[2]
        context, following = self._attn(*self.project(hidden_states), attention_mask, window, state)
        assert following is not None, "a finite window has a state"
        return self._merge(context), following

    def project(
        self, hidden_states: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H D"]]:
        """Queries, keys and values."""

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
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"],
        window: int | None,
        initial_state: SplatState | None = None,
    ) -> tuple[Float[Array, "B T H D"], SplatState | None]:
        splats = no_splats(self.num_heads, query.shape[-1])
        return splat_attention(
            query, key, value, splats, window=window, key_mask=attention_mask, initial_state=initial_state
        )


class GSASelfAttention(GPTNeoSelfAttention):
    """Attention that carries Gaussian splats: centres `[H, S, D]`, logarithms of their scales `[H, S]`, optional terms.

    With a finite `config.splats.window`, what lies beyond the window is seen through the splats. With an infinite one
    the splats are attached and unused, and the result is bit for bit that of `GPTNeoSelfAttention`.
    """

    def __init__(
        self,
        config: GPTNeoConfig,
        layer: int,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, layer, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        assert config.splats is not None, "GSASelfAttention needs config.splats"
        self.through_splats = config.splats.window is not None
        parameters = init_splats(rngs.params(), config, param_dtype)
        self.splat_centers = nnx.Param(parameters.pop("splat_centers"))
        self.splat_log_scales = nnx.Param(parameters.pop("splat_log_scales"))
        for name, parameter in parameters.items():
            setattr(self, name, nnx.Param(parameter))

    @property
    def splats(self) -> Splats:
        """The parameters as the op takes them."""
        terms = {name: getattr(self, f"splat_{name}", None) for name in OPTIONAL_TERMS}
        return Splats(
            self.splat_centers[...],
            self.splat_log_scales[...],
            **{name: term[...] for name, term in terms.items() if term is not None},
        )

    def _attn(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B T H D"],
        value: Float[Array, "B T H D"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"],
        window: int | None,
        initial_state: SplatState | None = None,
    ) -> tuple[Float[Array, "B T H D"], SplatState | None]:
        if not self.through_splats:
            return super()._attn(query, key, value, attention_mask, window, initial_state)
        return splat_attention(
            query, key, value, self.splats, window=window, key_mask=attention_mask, initial_state=initial_state
        )


class GPTNeoAttention(nnx.Module):
    """The level that Hugging Face's names have between a block and its attention (`attn.attention`)."""

    def __init__(
        self,
        config: GPTNeoConfig,
        layer: int,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        has_splats = config.splats is not None and config.splats.num_splats > 0 and layer in config.splat_layers
        attention = GSASelfAttention if has_splats else GPTNeoSelfAttention
        self.attention = attention(config, layer, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
