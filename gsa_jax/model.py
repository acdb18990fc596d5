"""GPT-Neo in Flax NNX. Read this first.

The tree of modules and the names of its leaves are Hugging Face's (`transformer.h.0.attn.attention.q_proj.weight`),
so whoever knows `transformers` v4.57 `modeling_gpt_neo.py` knows this file. May be changed here: the blocks and how
they are put together. Attention is in `gsa_jax.attention`, generation in `gsa_jax.generation`.

Parameters have `param_dtype`, computation has `dtype`; attention scores, softmax, statistics of the layer norms and
logits are float32 always.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.attention import GPTNeoAttention
from gsa_jax.cache import Cache
from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.layers import ACTIVATION_FUNCTIONS, Linear
from gsa_jax.ops import SplatState, linear
from gsa_jax.ops.documents import numbers_documents, runs
from gsa_jax.sharding import keep_rows_apart, keep_whole


def positions_from_mask(attention_mask: Bool[Array, "B T"] | Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token among the real ones of its row, or of its document if the mask is integer; padding gets a
    neighbour's, which is never looked at."""
    if not numbers_documents(attention_mask):
        return jnp.maximum(jnp.cumsum(attention_mask, axis=1, dtype=jnp.int32) - 1, 0)
    tokens = jnp.cumsum(attention_mask != 0, axis=1, dtype=jnp.int32)
    # Also 0 at the first slot of a row that begins with padding, as padding comes before document 1.
    first = runs(attention_mask, jnp.zeros_like(attention_mask[:, 0])).first
    return tokens - jnp.take_along_axis(tokens, first, axis=1)


def _count(attention_mask: Bool[Array, "B T"]) -> Int[Array, " B"]:
    return jnp.sum(attention_mask, axis=1, dtype=jnp.int32)


def _layer_norm(config: GPTNeoConfig, dtype: jax.typing.DTypeLike, param_dtype: jax.typing.DTypeLike) -> nnx.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 cancels where PyTorch's does not.
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_epsilon,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(0),
    )


def _look_up(embedding: nnx.Embed, rows: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """`embedding(rows)`, from a table that a mesh gathers first: the head needs it whole anyway."""
    return jnp.take(keep_whole(embedding.embedding[...].astype(embedding.dtype)), rows, axis=0)


class GPTNeoMLP(nnx.Module):
    """`c_proj(activation(c_fc(x)))`."""

    def __init__(
        self,
        config: GPTNeoConfig,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        def projection(in_features: int, out_features: int) -> Linear:
            return Linear(
                in_features,
                out_features,
                use_bias=True,
                stddev=config.initializer_range,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.c_fc = projection(config.hidden_size, config.mlp_dim)
        self.c_proj = projection(config.mlp_dim, config.hidden_size)
        self.activation = config.activation_function

    def __call__(self, hidden_states: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        return self.c_proj(ACTIVATION_FUNCTIONS[self.activation](self.c_fc(hidden_states)))


class GPTNeoBlock(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(
        self,
        config: GPTNeoConfig,
        layer: int,
        *,
        dtype: jax.typing.DTypeLike,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.ln_1 = _layer_norm(config, dtype, param_dtype)
        self.attn = GPTNeoAttention(config, layer, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.ln_2 = _layer_norm(config, dtype, param_dtype)
        self.mlp = GPTNeoMLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, hidden_states: Float[Array, "B T E"], attention_mask: Bool[Array, "B T"] | Int[Array, "B T"]
    ) -> Float[Array, "B T E"]:
        return self.finish(hidden_states, self.attn.attention(self.ln_1(hidden_states), attention_mask))

    def prefill(
        self, hidden_states: Float[Array, "B T E"], attention_mask: Bool[Array, "B T"], capacity: int
    ) -> tuple[Float[Array, "B T E"], SplatState]:
        context, state = self.attn.attention.prefill(self.ln_1(hidden_states), attention_mask, capacity)
        return self.finish(hidden_states, context), state

    def extend(
        self, hidden_states: Float[Array, "B T E"], attention_mask: Bool[Array, "B T"], state: SplatState
    ) -> tuple[Float[Array, "B T E"], SplatState]:
        context, state = self.attn.attention.extend(self.ln_1(hidden_states), attention_mask, state)
        return self.finish(hidden_states, context), state

    def finish(self, residual: Float[Array, "B T E"], context: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """What follows attention: its output is added, then the MLP's."""
        hidden_states = residual + context
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPTNeoModel(nnx.Module):
    """Embeddings, blocks and the last layer norm: token ids to hidden states."""

    def __init__(
        self,
        config: GPTNeoConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.remat = remat

        def embedding(count: int) -> nnx.Embed:
            return nnx.Embed(
                count,
                config.hidden_size,
                embedding_init=nnx.initializers.normal(config.initializer_range),
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.wte = embedding(config.vocab_size)
        self.wpe = embedding(config.max_position_embeddings)
        self.h = nnx.List(
            [
                GPTNeoBlock(config, layer, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
                for layer in range(config.num_layers)
            ]
        )
        self.ln_f = _layer_norm(config, dtype, param_dtype)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"],
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T E"]:
        hidden_states = keep_rows_apart(_look_up(self.wte, input_ids) + _look_up(self.wpe, positions))
        run_block = nnx.remat(GPTNeoBlock.__call__) if self.remat else GPTNeoBlock.__call__
        for block in self.h:
            hidden_states = keep_rows_apart(run_block(block, hidden_states, attention_mask))
        return self.ln_f(hidden_states)

    def prefill(
        self, input_ids: Int[Array, "B T"], attention_mask: Bool[Array, "B T"], capacity: int
    ) -> tuple[Float[Array, "B T E"], Cache]:
        hidden_states = self.wte(input_ids) + self.wpe(positions_from_mask(attention_mask))
        states = []
        for block in self.h:
            hidden_states, state = block.prefill(hidden_states, attention_mask, capacity)
            states.append(state)
        return self.ln_f(hidden_states), Cache(tuple(states), _count(attention_mask))

    def extend(
        self, input_ids: Int[Array, "B T"], attention_mask: Bool[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T E"], Cache]:
        positions = cache.tokens[:, None] + positions_from_mask(attention_mask)
        hidden_states = self.wte(input_ids) + self.wpe(positions)
        states = []
        for block, state in zip(self.h, cache.layers, strict=True):
            hidden_states, state = block.extend(hidden_states, attention_mask, state)
            states.append(state)
        return self.ln_f(hidden_states), Cache(tuple(states), cache.tokens + _count(attention_mask))


class GPTNeoForCausalLM(nnx.Module):
    """GPT-Neo with its tied language-modelling head.

    Args:
        config: shape of the model; with `config.splats` its splat layers carry splat parameters.
        dtype: of the computation.
        param_dtype: of the parameters.
        remat: recompute each block in the backward pass instead of keeping its activations.
        rngs: for the initial weights, stream `params`.
    """

    def __init__(
        self,
        config: GPTNeoConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.transformer = GPTNeoModel(config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"] | Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, float32.

        Args:
            input_ids: must lie in the vocabulary; an id outside of it gives NaN.
            attention_mask: nonzero for real tokens, zero for padding anywhere; all real if None. Logits of padding are
                finite and mean nothing.
            positions: row of the position embedding for each token; counted from the mask if None, from 0 in each
                document.
            segment_ids: number of each token's document in its row; numbers rise along a row from 1. A token sees only
                its own document; 0 is padding.

        Raises:
            InputError: `segment_ids` has a wrong shape or dtype, or falls along a row (which can be seen only outside
                of `jit`).
        """
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids, bool)
        attention_mask = attention_mask.astype(bool)
        if segment_ids is not None:
            if segment_ids.shape != input_ids.shape or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
                raise InputError(
                    f"segment_ids is {segment_ids.dtype}{list(segment_ids.shape)}; "
                    f"give integers of shape {list(input_ids.shape)}, as input_ids has"
                )
            attention_mask = jnp.where(attention_mask, segment_ids, 0)
        if positions is None:
            positions = positions_from_mask(attention_mask)
        return self._logits(self.transformer(input_ids, attention_mask, positions))

    def prefill(
        self, input_ids: Int[Array, "B T"], attention_mask: Bool[Array, "B T"], capacity: int
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads the beginning of sequences.

        Args:
            attention_mask: False for padding; on the left, if the logits are to mean something.
            capacity: slots that these and all later calls of `extend` will take together, padding included. Layers
                that attend exactly to all of the past get room for as many, and would forget the oldest beyond that.

        Returns:
            Logits after the last slot, and what `extend` goes on from.
        """
        hidden_states, cache = self.transformer.prefill(input_ids, attention_mask, capacity)
        return self._logits(hidden_states[:, -1]), cache

    def extend(
        self, input_ids: Int[Array, "B T"], attention_mask: Bool[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads the next tokens, one when decoding or many of a long prompt: logits after the last, new cache."""
        hidden_states, cache = self.transformer.extend(input_ids, attention_mask, cache)
        return self._logits(hidden_states[:, -1]), cache

    def _logits(self, hidden_states: jax.Array) -> jax.Array:
        return linear(hidden_states, self.transformer.wte.embedding[...].astype(self.dtype)).astype(jnp.float32)
