"""What is minimised: cross-entropy, and distances from the exact model.

May be changed here: the objectives. Each is a function of parameters and a batch; which parameters it is
differentiated by, and how they move, is `gsa_jax.train.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.attention import GPTNeoSelfAttention
from gsa_jax.loss import Head, blockwise_mean_divergence, blockwise_mean_loss
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.ops.segments import positions_from_mask

Tensors = Mapping[str, jax.Array]
Batch = Mapping[str, Int[Array, "B T"]]
Build = Callable[[Tensors], GPTNeoForCausalLM]
"""Makes a model of parameters."""

Objective = Callable[[Tensors, Tensors, Batch], tuple[Float[Array, ""], dict[str, Array]]]
"""Parameters, the teacher's parameters and a batch, to what is minimised and what is reported beside it."""


def cross_entropy(student: Build) -> Objective:
    """Mean next-token loss. After a document's last token, the start token of the next one is predicted, as its end."""

    def objective(params: Tensors, teacher_params: Tensors, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        ids, segments = batch["input_ids"], batch["segment_ids"]
        return blockwise_mean_loss(_head(student(params), batch), ids, segments > 0), {}

    return objective


def prediction_divergence(student: Build, teacher: Build, weight: float | jax.Array = 1.0) -> Objective:
    """`weight` KL(teacher || student) of the next token's distribution, and `1 - weight` cross-entropy.

    Hinton et al. (2015), at temperature 1.
    """

    def objective(params: Tensors, teacher_params: Tensors, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        ids, segments = batch["input_ids"], batch["segment_ids"]
        heads = _head(student(params), batch), _head(teacher(teacher_params), batch)
        total, divergence, loss = blockwise_mean_divergence(*heads, weight, ids, segments > 0)
        return total, {"divergence": divergence, "cross_entropy": loss}

    return objective


def output_error(student: Build, teacher: Build) -> Objective:
    """Squared error of the output of attention, relative to the output's square; mean over the layers with splats.

    Every layer is fed the teacher's hidden states, so one pass trains all of them, and no gradient passes a layer.
    """

    def objective(params: Tensors, teacher_params: Tensors, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        errors = {}
        counted = (batch["segment_ids"] > 0)[..., None]
        for layer, exact, attention, hidden_states in _layers(student(params), teacher(teacher_params), batch):
            output, _ = attention(hidden_states, *_masks(batch))
            error = jnp.sum(jnp.where(counted, (output - exact) ** 2, 0).astype(jnp.float32))
            errors[f"error_{layer}"] = error / jnp.sum(jnp.where(counted, exact**2, 0).astype(jnp.float32))
        return sum(errors.values(), jnp.zeros(())) / len(errors), errors

    return objective


def _head(model: GPTNeoForCausalLM, batch: Batch) -> Head:
    hidden_states = model.hidden_states(batch["input_ids"], segment_ids=batch["segment_ids"])
    return Head(hidden_states, model.transformer.wte.embedding[...])


def _masks(batch: Batch) -> tuple[Bool[Array, "B T"], Int[Array, "B T"]]:
    return batch["segment_ids"] > 0, batch["segment_ids"]


def _layers(
    student: GPTNeoForCausalLM, teacher: GPTNeoForCausalLM, batch: Batch
) -> Iterator[tuple[int, jax.Array, GPTNeoSelfAttention, jax.Array]]:
    """Layers that have splats: number, exact output, the student's attention, and the input of both."""
    masks = _masks(batch)
    hidden_states = teacher.transformer.embed(batch["input_ids"], positions_from_mask(*masks))
    for layer in range(student.config.splat_layers[-1] + 1):
        block = teacher.transformer.h[layer]
        normed = block.ln_1(hidden_states)
        exact, _ = block.attn.attention(normed, *masks)
        if layer in student.config.splat_layers:
            yield layer, exact, student.transformer.h[layer].attn.attention, normed
        hidden_states = block.finish(hidden_states, exact)
