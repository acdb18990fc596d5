"""GPT-Neo, and GPT-2, in Flax NNX. Read this first.

The tree of modules and the names of its leaves are Hugging Face's (`transformer.h.0.attn.attention.q_proj.weight`),
so whoever knows `transformers` v4.57 `modeling_gpt_neo.py` knows this file; a GPT-2 is the same model with other fields
of its configuration. May be changed here: the blocks and how they are put together. Attention is in
`gsa_jax.attention`, generation in `gsa_jax.generation`.

There is one path forward: every module's `__call__`, over whole texts, or over parts of them with a `Cache` of what
came before. Computation has `config.dtype`, whatever dtype the parameters have; attention scores, softmax, statistics
of the layer norms and logits are float32 always.
"""

import dataclasses
import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.attention import GPTNeoAttention
from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.generation_config import GenerationConfig
from gsa_jax.layer_scan import scan_layers
from gsa_jax.layers import ACTIVATION_FUNCTIONS, Linear
from gsa_jax.ops import SplatState, linear, look_up
from gsa_jax.ops.partition import keep_rows_apart
from gsa_jax.ops.segments import check_integers, check_segment_ids, join_masks, positions_from_mask, token_mask


@no_type_check  # a pytree also holds shapes and shardings
@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "tokens"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """What decoding remembers of the texts so far.

    A layer that attends exactly to all of the past has a ring with room for all of it; the state of any other layer
    does not grow with the context.

    Attributes:
        layers: one state per layer.
        tokens: how many tokens each text has so far, padding not counted.
    """

    layers: tuple[SplatState, ...]
    tokens: Int[Array, "B"]


def _parameters_in_float32(arrays: Any, **_: Any) -> Any:
    """Flax would cast a layer norm's parameters to `dtype`, and with them their gradients, which devices add up."""
    hidden_states, *parameters = arrays
    return hidden_states, *(parameter.astype(jnp.float32) for parameter in parameters)


def _layer_norm(config: GPTNeoConfig) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_epsilon,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where PyTorch's variance does not
        dtype=jnp.dtype(config.dtype),
        promote_dtype=_parameters_in_float32,
        rngs=nnx.Rngs(0),
    )


class GPTNeoMLP(nnx.Module):
    """`c_proj(activation(c_fc(x)))`."""

    def __init__(self, config: GPTNeoConfig, *, rngs: nnx.Rngs) -> None:
        stddev = config.initializer_range
        self.c_fc = Linear(config.hidden_size, config.mlp_dim, use_bias=True, stddev=stddev, rngs=rngs)
        self.c_proj = Linear(config.mlp_dim, config.hidden_size, use_bias=True, stddev=stddev, rngs=rngs)
        self.activation = config.activation_function

    def __call__(self, hidden_states: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        return self.c_proj(ACTIVATION_FUNCTIONS[self.activation](self.c_fc(hidden_states)))


class GPTNeoBlock(nnx.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: GPTNeoConfig, layer: int, *, rngs: nnx.Rngs) -> None:
        self.ln_1 = _layer_norm(config)
        self.attn = GPTNeoAttention(config, layer, rngs=rngs)
        self.ln_2 = _layer_norm(config)
        self.mlp = GPTNeoMLP(config, rngs=rngs)

    def __call__(
        self,
        hidden_states: Float[Array, "B T E"],
        attention_mask: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        state: SplatState | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[Float[Array, "B T E"], SplatState | None]:
        """Arguments and state as `GPTNeoSelfAttention` has them."""
        normed = self.ln_1(hidden_states)
        context, state = self.attn.attention(normed, attention_mask, segment_ids, state, capacity=capacity)
        return self.finish(hidden_states, context), state

    def finish(self, residual: Float[Array, "B T E"], context: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """What follows attention: its output is added, then the MLP's."""
        hidden_states = residual + context
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPTNeoModel(nnx.Module):
    """Embeddings, blocks and the last layer norm: token ids to hidden states."""

    def __init__(self, config: GPTNeoConfig, *, rngs: nnx.Rngs) -> None:
        self.remat = config.remat

        def embedding(count: int) -> nnx.Embed:
            init = nnx.initializers.normal(config.initializer_range)
            dtype = jnp.dtype(config.dtype)
            return nnx.Embed(count, config.hidden_size, embedding_init=init, dtype=dtype, rngs=rngs)

        self.wte = embedding(config.vocab_size)
        self.wpe = embedding(config.max_position_embeddings)
        self.h = nnx.List([GPTNeoBlock(config, layer, rngs=rngs) for layer in range(config.num_layers)])
        self.ln_f = _layer_norm(config)

    def embed(self, input_ids: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """The sum of both embeddings."""
        words = look_up(self.wte.embedding[...], input_ids, self.wte.dtype)
        return keep_rows_apart(words + look_up(self.wpe.embedding[...], positions, self.wpe.dtype))

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        capacity: int | None = None,
    ) -> tuple[Float[Array, "B T E"], Cache | None]:
        """Hidden states of these tokens, and the cache after them where `cache` or `capacity` was given.

        Args:
            positions: if None, counted from the masks, and continued from the tokens in the cache.
            cache: what an earlier call returned for the tokens before these.
            capacity: given at the first of several calls: how many slots all of them will take together.

        Raises:
            InputError: outside of `jit`, a token has an id or a position that there is none of.
        """
        before = jnp.zeros(input_ids.shape[0], jnp.int32) if cache is None else cache.tokens
        if positions is None:
            positions = before[:, None] + positions_from_mask(attention_mask, segment_ids)
        is_token = join_masks(attention_mask, segment_ids) != 0
        self._check_numbers(input_ids, positions, is_token)
        # Padding may hold any number. What it looks up is given a weight of 0, and 0 * NaN would be NaN.
        input_ids, positions = (jnp.where(is_token, x, jnp.zeros_like(x)) for x in (input_ids, positions))
        hidden_states = self.embed(input_ids, positions)

        def run(block: GPTNeoBlock, hidden_states: jax.Array, state: SplatState | None) -> Any:
            return block(hidden_states, attention_mask, segment_ids, state, capacity=capacity)

        if self.remat and cache is None and capacity is None:
            # A loop has to write down what a block keeps for the backward pass: with remat, its input and no more.

            def run_again(block: GPTNeoBlock, hidden_states: jax.Array) -> jax.Array:
                return keep_rows_apart(nnx.remat(run)(block, hidden_states, None)[0])

            return self.ln_f(scan_layers(self.h, run_again, hidden_states)), None
        states = [None] * len(self.h) if cache is None else cache.layers
        following = []
        for block, state in zip(self.h, states, strict=True):
            hidden_states, state = run(block, hidden_states, state)
            hidden_states = keep_rows_apart(hidden_states)
            following.append(state)
        hidden_states = self.ln_f(hidden_states)
        if cache is None and capacity is None:
            return hidden_states, None
        return hidden_states, Cache(tuple(following), before + jnp.sum(attention_mask, axis=1, dtype=jnp.int32))

    def _check_numbers(
        self, input_ids: Int[Array, "B T"], positions: Int[Array, "B T"], is_token: Bool[Array, "B T"]
    ) -> None:
        """Raises `InputError` for a token whose id or position the model does not have, where numbers can be seen."""
        ends = "give shorter texts, or the model more positions: gsa train finetune --max-positions"
        for what, numbers, count, remedy in (
            ("token id", input_ids, self.wte.num_embeddings, "does the tokenizer belong to this model?"),
            ("position", positions, self.wpe.num_embeddings, ends),
        ):
            if isinstance(numbers, Tracer) or isinstance(is_token, Tracer):
                continue
            known = np.asarray(numbers)
            outside = np.argwhere(np.asarray(is_token) & ((known < 0) | (known >= count)))
            if len(outside):
                row, slot = outside[0].tolist()
                raise InputError(
                    f"row {row} has a token with {what} {known[row, slot]}, the model has {count}; {remedy}"
                )


def _token_ids(input_ids: ArrayLike) -> Int[Array, "B T"]:
    shape = np.shape(input_ids)
    wanted = shape if len(shape) == 2 else (0, 0)  # which another number of axes never is
    return check_integers("input_ids", input_ids, wanted, "give integers of shape [rows, tokens]")


class GPTNeoForCausalLM(nnx.Module):
    """GPT-Neo, or GPT-2, with its tied language-modelling head.

    Args:
        config: shape of the model, and how it computes; with `config.splats` its splat layers carry splat parameters.
        rngs: for the initial weights, which are float32, stream `params`.

    Attributes:
        generation_config: defaults of `gsa_jax.generation`; `gsa_jax.load` takes them from the model's folder.
    """

    def __init__(self, config: GPTNeoConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.generation_config = GenerationConfig.of_model(config)
        self.transformer = GPTNeoModel(config, rngs=rngs)

    def __call__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the next token, float32.

        Args:
            input_ids: integers `[B, T]`; those of padding may be any.
            attention_mask: bools or Hugging Face's integers `[B, T]`: 1 for tokens, 0 for padding anywhere; all tokens
                if None. Logits of padding are finite and mean nothing.
            positions: row of the position embedding for each token; counted from the mask if None, from 0 in each
                document.
            segment_ids: integers `[B, T]`, the number of each token's document in its row; numbers rise along a row
                from 1, 0 is padding. A token sees only its own document.

        Raises:
            InputError: an argument has a wrong shape or dtype. Outside of `jit` also: `segment_ids` fall along a row, a
                token's id is not in the vocabulary, or a document has more tokens than the model has positions.
                Inside of `jit` a row with such a token gives NaN.
        """
        return self._logits(self.hidden_states(input_ids, attention_mask, positions, segment_ids))

    def hidden_states(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
    ) -> Float[Array, "B T E"]:
        """What `__call__` makes logits of, with the same arguments; in the dtype of the computation."""
        ids = _token_ids(input_ids)
        mask = token_mask(attention_mask, ids.shape)
        segments = None if segment_ids is None else check_segment_ids(segment_ids, ids.shape)
        if positions is not None:
            positions = check_integers("positions", positions, ids.shape, f"give integers of shape {list(ids.shape)}")
        return self.transformer(ids, mask, segments, positions)[0]

    def prefill(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None, capacity: int
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads the beginning of texts.

        Args:
            attention_mask: 0 for padding; on the left, if the logits are to mean something.
            capacity: slots that these and all later calls of `extend` will take together, padding included. Layers
                that attend exactly to all of the past get room for as many, and would forget the oldest beyond that.

        Returns:
            Logits after the last slot, and what `extend` goes on from.
        """
        return self._read(input_ids, attention_mask, capacity=capacity)

    def extend(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None, cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads the next tokens, one when decoding or many of a long prompt: logits after the last, new cache."""
        return self._read(input_ids, attention_mask, cache)

    def _read(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None,
        cache: Cache | None = None,
        capacity: int | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        ids = _token_ids(input_ids)
        mask = token_mask(attention_mask, ids.shape)
        hidden_states, following = self.transformer(ids, mask, cache=cache, capacity=capacity)
        assert following is not None, "a cache or a capacity gives a cache"
        return self._logits(hidden_states[:, -1]), following

    def _logits(self, hidden_states: Float[Array, "*rows E"]) -> Float[Array, "*rows V"]:
        return linear(hidden_states, self.transformer.wte.embedding[...]).astype(jnp.float32)
