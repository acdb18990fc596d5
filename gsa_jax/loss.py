"""The loss of a language model, and how far its predictions are from those of another one.

Both exist twice: from logits, for whoever has them, and from hidden states, in blocks of tokens. Logits `[B, T, V]` are
by far the largest arrays of a training step, and only those of a block are ever in memory at a time.

May be changed here: how token losses are computed and averaged. Everything that reports a loss uses this module.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from gsa_jax.ops.partition import BATCH, TABLE, keep_whole, on_mesh, per_rows_and_heads, sum_of_table
from gsa_jax.ops.precision import precision_of

BLOCK_BYTES = 2**27
"""Of the float32 logits of a block, at most, unless those of one token are more."""

_PADDING = -1e30
"""The logit of a word that only fills the vocabulary up: its probability is 0, and 0 times its logarithm too."""


def next_token_losses(logits: Float[Array, "B T V"], input_ids: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    """Cross-entropy in nats of each token but the first, given those before it; float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), input_ids[:, 1:])


def mean_next_token_loss(
    logits: Float[Array, "B T V"], input_ids: Int[Array, "B T"], attention_mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Mean of `next_token_losses` over the tokens that are real and follow a real token."""
    counted = attention_mask[:, 1:] & attention_mask[:, :-1]
    return jnp.sum(jnp.where(counted, next_token_losses(logits, input_ids), 0)) / _count(counted)


class Head(NamedTuple):
    """What logits are made of: `hidden_states @ embedding.T`, in the dtype of the hidden states, summed in float32.

    Attributes:
        hidden_states: after the last layer norm.
        embedding: the tied head, in any floating dtype.
    """

    hidden_states: Float[Array, "B T E"]
    embedding: Float[Array, "V E"]


def blockwise_next_token_losses(head: Head, input_ids: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    """`next_token_losses` of the head's logits; not to be differentiated."""
    targets, counted = _following(input_ids, jnp.ones(input_ids.shape, bool))
    return _in_blocks(head, None, jnp.zeros(()), targets, counted, differentiate=False).losses[:, :-1]


def blockwise_mean_loss(
    head: Head, input_ids: Int[Array, "B T"], attention_mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """`mean_next_token_loss` of the head's logits. Its gradient is computed together with it, block by block."""
    targets, counted = _following(input_ids, attention_mask)
    total, _ = _total(head, None, jnp.zeros(()), targets, counted)
    return total / _count(counted)


def blockwise_mean_divergence(
    student: Head,
    teacher: Head,
    weight: float | Float[Array, ""],
    input_ids: Int[Array, "B T"],
    attention_mask: Bool[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """How far a student's predictions are from a teacher's and from the text.

    Args:
        weight: of the divergence.

    Returns:
        `weight * divergence + (1 - weight) * loss`, which is to be differentiated by the student; the mean of
        KL(teacher || student) of the next token's distribution, in nats; and the mean loss. Means are over the tokens
        that `blockwise_mean_loss` counts.
    """
    targets, counted = _following(input_ids, attention_mask)
    total, found = _total(student, jax.lax.stop_gradient(teacher), jnp.asarray(weight, jnp.float32), targets, counted)
    assert found.divergences is not None, "there is a teacher"
    divergence, loss = (
        jax.lax.stop_gradient(jnp.sum(jnp.where(counted, x, 0)) / _count(counted))
        for x in (found.divergences, found.losses)
    )
    return total / _count(counted), divergence, loss


def _following(
    input_ids: Int[Array, "B T"], attention_mask: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The token after each one, and whether both are real. The last one has none: moving ids is cheap, a copy of the
    hidden states or logits without the last is not."""
    end = [(0, 0), (0, 1)]
    return jnp.pad(input_ids[:, 1:], end), jnp.pad(attention_mask[:, 1:] & attention_mask[:, :-1], end)


def _count(counted: Bool[Array, "B P"]) -> Float[Array, ""]:
    return jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1)


class _Found(NamedTuple):
    """What the blocks give together: of each token, and the gradients of the sum over the counted ones."""

    losses: Float[Array, "B T"]
    divergences: Float[Array, "B T"] | None
    gradients: Head | None


@jax.custom_vjp
def _total(
    student: Head,
    teacher: Head | None,
    weight: Float[Array, ""],
    targets: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
) -> tuple[Float[Array, ""], _Found]:
    """Sum over the counted tokens, whose gradient the student gets; nothing else here has one."""
    found = _in_blocks(student, teacher, weight, targets, counted, differentiate=False)
    return _summed(found, weight, counted), found


def _summed(found: _Found, weight: Float[Array, ""], counted: Bool[Array, "B T"]) -> Float[Array, ""]:
    values = found.losses if found.divergences is None else weight * found.divergences + (1 - weight) * found.losses
    return jnp.sum(jnp.where(counted, values, 0))


def _total_forward(student: Head, teacher: Head | None, weight: Any, targets: Any, counted: Any) -> Any:
    # The gradient of a block's logits is at hand as soon as they are, so nothing is computed twice: three products
    # with the embedding, as if all logits had been kept.
    found = _in_blocks(student, teacher, weight, targets, counted, differentiate=True)
    return (_summed(found, weight, counted), found._replace(gradients=None)), found.gradients


def _total_backward(gradients: Head, cotangents: Any) -> Any:
    scale = cotangents[0]
    return jax.tree.map(lambda x: (scale * x.astype(jnp.float32)).astype(x.dtype), gradients), None, None, None, None


_total.defvjp(_total_forward, _total_backward)


def _in_blocks(
    student: Head,
    teacher: Head | None,
    weight: Float[Array, ""],
    targets: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    *,
    differentiate: bool,
) -> _Found:
    """On a mesh, each device has its own rows and, along `tensor`, its own part of the vocabulary."""
    is_on_mesh = on_mesh()
    parts = jax.sharding.get_abstract_mesh().shape["tensor"] if is_on_mesh else 1
    vocab_size = student.embedding.shape[0]

    def whole(head: Head) -> Head:
        embedding = keep_whole(head.embedding.astype(head.hidden_states.dtype))
        return head._replace(embedding=jnp.pad(embedding, [(0, -vocab_size % parts), (0, 0)]))

    def on_device(
        student: Head, teacher: Head | None, weight: jax.Array, targets: jax.Array, counted: jax.Array
    ) -> _Found:
        offset = 0 if parts == 1 else jax.lax.axis_index("tensor") * student.embedding.shape[0]
        vocabulary = _Vocabulary(vocab_size, offset, parts > 1)
        found = _over_blocks(vocabulary, student, teacher, weight, targets, counted, differentiate)
        if found.gradients is None or not is_on_mesh:
            return found
        hidden_states, embedding = found.gradients
        embedding = sum_of_table(embedding)
        if parts > 1:
            hidden_states = jax.lax.psum(hidden_states, "tensor")
            embedding = jax.lax.all_gather(embedding, "tensor", axis=0, tiled=True)
        return found._replace(gradients=Head(hidden_states, embedding))

    of_head = Head(BATCH, P("tensor"))  # type: ignore[arg-type]
    found = per_rows_and_heads(
        on_device,
        (of_head, teacher and of_head, P(), BATCH, BATCH),
        _Found(BATCH, teacher and BATCH, Head(BATCH, TABLE) if differentiate else None),  # type: ignore[arg-type]
    )(whole(student), teacher and whole(teacher), weight, targets, counted)
    if found.gradients is None:
        return found
    hidden_states, embedding = found.gradients
    gradients = Head(
        hidden_states.astype(student.hidden_states.dtype), embedding[:vocab_size].astype(student.embedding.dtype)
    )
    return found._replace(gradients=gradients)


class _Vocabulary(NamedTuple):
    """Which words a device has: `size` is that of all, `offset` the first of its own, and `cut` whether it has only a
    part of them."""

    size: int
    offset: int | jax.Array
    cut: bool

    def logits(self, hidden_states: Float[Array, "N E"], embedding: Float[Array, "V E"]) -> Float[Array, "N V"]:
        logits = _product("ne,ve->nv", hidden_states, embedding)
        return jnp.where(self.words(logits) < self.size, logits, _PADDING) if self.cut else logits

    def words(self, logits: Float[Array, "N V"]) -> Int[Array, "1 V"]:
        return self.offset + jnp.arange(logits.shape[1])[None]

    def sum(self, values: Float[Array, "N V"]) -> Float[Array, "N 1"]:
        own = jnp.sum(values, axis=1, keepdims=True)
        return jax.lax.psum(own, "tensor") if self.cut else own

    def log_total(self, logits: Float[Array, "N V"]) -> Float[Array, "N 1"]:
        """Of the sum of `exp(logits)`."""
        highest = jnp.max(logits, axis=1, keepdims=True)
        highest = jax.lax.pmax(highest, "tensor") if self.cut else highest
        return highest + jnp.log(self.sum(jnp.exp(logits - highest)))


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    precision = precision_of(x.dtype)
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def _over_blocks(
    vocabulary: _Vocabulary,
    student: Head,
    teacher: Head | None,
    weight: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
    differentiate: bool,
) -> _Found:
    """All tokens of a device, a block at a time; gradients are float32, and of this device's tokens and words."""
    hidden_states, embedding = student
    # What devices add up is float32.
    kept = jnp.float32 if vocabulary.cut else hidden_states.dtype

    def block(gradient: jax.Array | None, tokens: tuple[Any, ...]) -> tuple[jax.Array | None, tuple[Any, ...]]:
        hidden_states, of_teacher, targets, counted = tokens
        logits = vocabulary.logits(hidden_states, embedding)
        log_total = vocabulary.log_total(logits)
        is_target = vocabulary.words(logits) == targets[:, None]
        known = (targets >= 0) & (targets < vocabulary.size)
        losses = (log_total - vocabulary.sum(jnp.where(is_target, logits, 0)))[:, 0]
        losses = jnp.where(known, losses, jnp.nan)
        expected = is_target.astype(jnp.float32)
        divergences = None
        if teacher is not None:
            wanted = vocabulary.logits(of_teacher, teacher.embedding)
            wanted = wanted - vocabulary.log_total(wanted)
            divergences = vocabulary.sum(jnp.exp(wanted) * (wanted - (logits - log_total)))[:, 0]
            expected = weight * jnp.exp(wanted) + (1 - weight) * expected
        if gradient is None:
            return None, (losses, divergences, None)
        error = jnp.where(counted[:, None], jnp.exp(logits - log_total) - expected, 0).astype(hidden_states.dtype)
        gradient = gradient + _product("nv,ne->ve", error, hidden_states)
        return gradient, (losses, divergences, _product("nv,ve->ne", error, embedding).astype(kept))

    rows, length = targets.shape
    size = _block_size(rows * length, embedding.shape[0])
    fill = -(rows * length) % size

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(rows * length, *x.shape[2:])
        return jnp.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])

    def put_together(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])[: rows * length].reshape(rows, length, *x.shape[2:])

    start = jnp.zeros(embedding.shape, jnp.float32) if differentiate else None
    tokens = (hidden_states, None if teacher is None else teacher.hidden_states, targets, counted)
    gradient, found = jax.lax.scan(block, start, jax.tree.map(cut, tokens))
    losses, divergences, of_hidden = jax.tree.map(put_together, found)
    return _Found(losses, divergences, None if gradient is None else Head(of_hidden, gradient))


def _block_size(tokens: int, vocab_size: int) -> int:
    """Tokens of a block: as many as fit, and such that no block is filled up, if there are not twice as many then."""
    fitting = max(BLOCK_BYTES // (4 * vocab_size), 1)
    fewest = -(-tokens // fitting)
    count = next((count for count in range(fewest, 2 * fewest) if tokens % count == 0), fewest)
    return -(-tokens // count)
