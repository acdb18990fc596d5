"""What is minimised: cross-entropy, and distances from the exact model.

May be changed here: the objectives. Each is a function of parameters and a batch; which parameters it is
differentiated by, and how they move, is `gsa_jax.train.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsa_jax.attention import GPTNeoSelfAttention, GSASelfAttention
from gsa_jax.model import GPTNeoForCausalLM, positions_from_mask
from gsa_jax.ops.splat_state import key_features, query_features
from gsa_jax.train.loss import mean_next_token_loss, mean_predicted

Tensors = Mapping[str, jax.Array]
Batch = Mapping[str, Int[Array, "B T"]]
Build = Callable[[Tensors], GPTNeoForCausalLM]
"""Makes a model of parameters."""

Objective = Callable[[Tensors, Tensors, Batch], tuple[Float[Array, ""], dict[str, Array]]]
"""Parameters, the teacher's parameters and a batch, to what is minimised and what is reported beside it."""


def cross_entropy(student: Build) -> Objective:
    """Mean next-token loss. What follows a document's last token is the start token of the next one, its end."""

    def objective(params: Tensors, teacher_params: Tensors, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        ids, segments = batch["input_ids"], batch["segment_ids"]
        return mean_next_token_loss(student(params)(ids, segment_ids=segments), ids, segments > 0), {}

    return objective


def prediction_divergence(student: Build, teacher: Build, weight: float = 1.0) -> Objective:
    """`weight` KL(teacher || student) of the next token's distribution, and `1 - weight` cross-entropy.

    Hinton et al. (2015), at temperature 1.
    """

    def objective(params: Tensors, teacher_params: Tensors, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        ids, segments = batch["input_ids"], batch["segment_ids"]
        logits = student(params)(ids, segment_ids=segments)
        expected = jax.nn.log_softmax(jax.lax.stop_gradient(teacher(teacher_params)(ids, segment_ids=segments)))
        divergences = jnp.sum(jnp.exp(expected) * (expected - jax.nn.log_softmax(logits)), axis=-1)
        divergence = mean_predicted(divergences[:, :-1], segments > 0)
        loss = mean_next_token_loss(logits, ids, segments > 0)
        return weight * divergence + (1 - weight) * loss, {"divergence": divergence, "cross_entropy": loss}

    return objective


def output_error(student: Build, teacher: Build) -> Objective:
    """Squared error of the output of attention, relative to the output's square; mean over the layers with splats.

    Every layer is fed the teacher's hidden states, so one pass trains all of them, and no gradient passes a layer.
    """

    def objective(params: Tensors, teacher_params: Tensors, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        errors = {}
        for layer, exact, student_attention, hidden_states, mask in _layers(
            student(params), teacher(teacher_params), batch
        ):
            counted = (mask > 0)[..., None]
            output = student_attention(hidden_states, mask)
            error = jnp.sum(jnp.where(counted, (output - exact) ** 2, 0).astype(jnp.float32))
            errors[f"error_{layer}"] = error / jnp.sum(jnp.where(counted, exact**2, 0).astype(jnp.float32))
        return sum(errors.values(), jnp.zeros(())) / len(errors), errors

    return objective


def attention_divergence(student: Build, teacher: Build) -> Objective:
    """KL(exact attention || attention through splats), mean over queries, heads and the layers with splats.

    Dense, O(T^2 S): for comparison with `output_error`, which needs no attention weights.
    """

    def objective(params: Tensors, teacher_params: Tensors, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        divergences = {}
        exact_model = teacher(teacher_params)
        for layer, _, student_attention, hidden_states, mask in _layers(student(params), exact_model, batch):
            assert isinstance(student_attention, GSASelfAttention) and student_attention.window is not None
            query, key, _ = (x.swapaxes(1, 2).astype(jnp.float32) for x in student_attention.project(hidden_states))
            splats, window = student_attention.splats, student_attention.window
            distance = jnp.arange(mask.shape[1])[:, None] - jnp.arange(mask.shape[1])
            # The exact model's local layers see less than all.
            reached = distance < (exact_model.config.windows[layer] or mask.shape[1])

            @jax.checkpoint
            def row_divergences(
                of_row: tuple[jax.Array, ...], splats=splats, window=window, distance=distance, reached=reached
            ):
                query, key, mask = of_row
                far_query = query_features(splats, query[None])[0]
                far_key = key_features(splats, key[None], (mask > 0)[None])[0]
                near = jnp.einsum("htd,hkd->htk", query, key, precision=jax.lax.Precision.HIGHEST)
                far = jax.nn.logsumexp(far_query[:, :, None, :] + far_key[:, None, :, :], axis=-1)
                seen = (distance >= 0) & (mask == mask[:, None]) & (mask > 0)
                seen_exactly = seen & reached
                exact = jax.nn.log_softmax(near, where=seen_exactly)
                found = jax.nn.log_softmax(jnp.where(distance < window, near, far), where=seen)
                return jnp.sum(jnp.where(seen_exactly, jnp.exp(exact) * (exact - found), 0), axis=(0, 2)) / len(query)

            rows = jax.lax.map(row_divergences, (query, key, mask))
            divergences[f"error_{layer}"] = jnp.sum(rows) / jnp.sum(mask > 0)
        return sum(divergences.values(), jnp.zeros(())) / len(divergences), divergences

    return objective


def _layers(
    student: GPTNeoForCausalLM, teacher: GPTNeoForCausalLM, batch: Batch
) -> Iterator[tuple[int, jax.Array, GPTNeoSelfAttention, jax.Array, jax.Array]]:
    """Layers that have splats: number, exact output, the student's attention, and both's input and mask."""
    mask = batch["segment_ids"]
    positions = positions_from_mask(mask)
    hidden_states = teacher.transformer.wte(batch["input_ids"]) + teacher.transformer.wpe(positions)
    for layer in range(student.config.splat_layers[-1] + 1):
        block = teacher.transformer.h[layer]
        normed = block.ln_1(hidden_states)
        exact = block.attn.attention(normed, mask)
        if layer in student.config.splat_layers:
            yield layer, exact, student.transformer.h[layer].attn.attention, normed, mask
        hidden_states = block.finish(hidden_states, exact)
