"""The loss of a language model.

May be changed here: how token losses are computed and averaged. Everything that reports a loss uses this module.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def next_token_losses(logits: Float[Array, "B T V"], input_ids: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    """Cross-entropy in nats of each token but the first, given those before it; float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), input_ids[:, 1:])


def mean_next_token_loss(
    logits: Float[Array, "B T V"], input_ids: Int[Array, "B T"], attention_mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Mean of `next_token_losses` over the tokens that are real and follow a real token."""
    return mean_predicted(next_token_losses(logits, input_ids), attention_mask)


def mean_predicted(losses: Float[Array, "B P"], attention_mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean of the losses of the P = T - 1 tokens after the first, over those that are real and follow a real token."""
    counted = attention_mask[:, 1:] & attention_mask[:, :-1]
    return jnp.sum(jnp.where(counted, losses, 0)) / jnp.maximum(jnp.sum(counted, dtype=losses.dtype), 1)
