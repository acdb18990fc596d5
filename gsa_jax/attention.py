"""The attention of a block, and the subclass that sees far keys through splats.

May be changed here: projections and head bookkeeping (`GPTNeoSelfAttention`), what attention through splats does
(`GSASelfAttention._attn`, nothing else), and the initial splats of a model that has seen no data. The arithmetic itself
lives in `gsa_jax.ops`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.config import GPTNeoConfig
from gsa_jax.layers import Linear
from gsa_jax.ops import Splats, SplatState, init_splat_state, no_splats, splat_attention
from gsa_jax.splat_config import OPTIONAL_TERMS, LayerSplats, Window


class GPTNeoSelfAttention(nnx.Module):
    """Multi-head attention as in `transformers` v4.57 `GPTNeoSelfAttention`, or `GPT2Attention` with other fields."""

    def __init__(self, config: GPTNeoConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.query_scale, self.key_scale = config.score_scales(layer)
        self.window: Window = config.windows[layer]
        self.kept = config.layer_splats[layer].kept if layer in config.splat_layers else 0
        self.attention_implementation = config.attention_implementation

        def projection(use_bias: bool) -> Linear:
            size, stddev = config.hidden_size, config.initializer_range
            return Linear(size, size, use_bias=use_bias, stddev=stddev, rngs=rngs)

        self.q_proj = projection(use_bias=config.attention_bias)
        self.k_proj = projection(use_bias=config.attention_bias)
        self.v_proj = projection(use_bias=config.attention_bias)
        self.out_proj = projection(use_bias=True)

    def __call__(
        self,
        hidden_states: Float[Array, "B T E"],
        attention_mask: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: SplatState | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[Float[Array, "B T E"], SplatState | None]:
        """Attends over these tokens, and over those that a state remembers.

        Args:
            segment_ids: as in `splat_attention`; only without `state` and `capacity`.
            state: what an earlier call returned for the tokens before these.
            capacity: given at the first of several calls: how many slots all of them will take together.

        Returns:
            The output, and the state after the last token where `state` or `capacity` was given.
        """
        window = self.window
        if state is not None:
            window = state.key.shape[2]
        elif capacity is not None:
            window = capacity if window == "all" else min(window, capacity)
        context, following = self._attn(
            *self.project(hidden_states),
            window=window,
            kept=self.kept,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            initial_state=state,
            attention_implementation=self.attention_implementation,
        )
        output = self.out_proj(context.reshape(*context.shape[:-2], -1))
        return output, None if state is None and capacity is None else following

    def project(
        self, hidden_states: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H D"]]:
        """Queries, keys and values; exact scores are products of queries and keys as they are given here."""

        def heads(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], self.num_heads, -1)

        query, key = heads(self.q_proj(hidden_states)), heads(self.k_proj(hidden_states))
        if (self.query_scale, self.key_scale) != (1, 1):
            # Powers of two (heads of 64: 1/8 in all) give the bits that scaled weights and biases would give, in any
            # dtype. The weights stay as they were stored all the same: AdamW would train scaled ones at another pace,
            # and small ones would lose bits. Where the whole is none, the query is rounded once more.
            query, key = (
                (x.astype(jnp.float32) * scale).astype(x.dtype)
                for x, scale in ((query, self.query_scale), (key, self.key_scale))
            )
        return query, key, heads(self.v_proj(hidden_states))

    def _attn(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B T H D"],
        value: Float[Array, "B T H D"],
        *,
        splats: Splats | None = None,
        **call: Any,
    ) -> tuple[Float[Array, "B T H D"], SplatState | None]:
        splats = splats or no_splats(self.num_heads, self.head_dim)
        return splat_attention(query, key, value, splats, **call)


class GSASelfAttention(GPTNeoSelfAttention):
    """Attention that carries Gaussian splats: centres `[H, S, D]`, logarithms of their scales `[H, S]`, optional terms,
    and weights of the importance of keys.

    With a finite `config.splats.window`, what lies beyond the window is seen through the splats, but for kept keys.
    With `"all"` splats are attached and unused, and the result is bit for bit that of `GPTNeoSelfAttention`.
    """

    def __init__(self, config: GPTNeoConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, rngs=rngs)
        self.through_splats = config.layer_splats[layer].window != "all"
        for name, parameter in init_splats(rngs.params(), config, layer).items():
            setattr(self, name, nnx.Param(parameter))

    @property
    def splats(self) -> Splats:
        """The parameters as the op takes them."""
        names = ("centers", "log_scales", *OPTIONAL_TERMS, "importance")
        terms = {name: getattr(self, f"splat_{name}", None) for name in names}
        given = {name: term[...] for name, term in terms.items() if term is not None}
        return dataclasses.replace(no_splats(self.num_heads, self.head_dim), **given)

    def _attn(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B T H D"],
        value: Float[Array, "B T H D"],
        **call: Any,
    ) -> tuple[Float[Array, "B T H D"], SplatState | None]:
        if self.through_splats:
            call["splats"] = self.splats
        return super()._attn(query, key, value, **call)


class GPTNeoAttention(nnx.Module):
    """The level that Hugging Face's names have between a block and its attention (`attn.attention`)."""

    def __init__(self, config: GPTNeoConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        has_parameters = layer in config.splat_layers and bool(splat_shapes(config, layer))
        self.attention = (GSASelfAttention if has_parameters else GPTNeoSelfAttention)(config, layer, rngs=rngs)


def splat_shapes(config: GPTNeoConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the splat parameters of a layer that has splats, by their names in the model."""
    splats, count = config.splats, config.layer_splats[layer].num_splats
    assert splats is not None, "layers with splats come from config.splats"
    heads, head_dim = config.num_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if count:
        terms = {"log_amplitudes": (heads, count), "norm_gain": (heads,), "far_gain": (heads,)}
        shapes = {"splat_centers": (heads, count, head_dim), "splat_log_scales": (heads, count)}
        shapes |= {f"splat_{name}": terms[name] for name in OPTIONAL_TERMS if getattr(splats, name)}
    if splats.importance == "learned":
        shapes["splat_importance"] = (heads, 2 * head_dim + 1)
    return shapes


def init_splats(
    key: jax.Array, config: GPTNeoConfig, layer: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, jax.Array]:
    """The splat parameters of one layer of a model that has seen no data, by their names in the model.

    Standard normal centres `[H, S, D]` are distinct, which is all that can be asked of them before they see queries and
    keys; scales are 1 (their logarithms `[H, S]` 0), the optional terms that `config.splats` turns on start at 0, where
    they change nothing, and the importance of a key as its squared norm.
    """
    parameters = {name: jnp.zeros(shape, dtype) for name, shape in splat_shapes(config, layer).items()}
    if "splat_centers" in parameters:
        parameters["splat_centers"] = jax.random.normal(key, parameters["splat_centers"].shape, dtype)
    if "splat_importance" in parameters:
        parameters["splat_importance"] = parameters["splat_importance"].at[:, -1].set(1)
    return parameters


def state_bytes(config: GPTNeoConfig, tokens: int | None = None) -> int:
    """Bytes that the layers with splats remember of one text, in float32; what a layer has, `SplatState` says.

    Args:
        tokens: length of the text, for windows of `"all"`; otherwise it does not matter.
    """

    def state(splats: LayerSplats) -> SplatState:
        window = tokens if splats.window == "all" else splats.window
        assert window is not None, "an infinite window grows with the text"
        centers = jnp.zeros((config.num_heads, splats.num_splats, config.head_dim))
        return init_splat_state(Splats(centers, centers[..., 0]), 1, window, jnp.float32, splats.kept)

    states = jax.eval_shape(lambda: [state(splats) for splats in config.layer_splats.values()])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))
