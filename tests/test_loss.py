"""Losses in blocks against PyTorch's on whole float64 logits, and that no program holds as many numbers as logits have.

May be changed here: how the loss is computed. The oracle is PyTorch, and its gradients are automatic. What devices of a
mesh make of it is in `test_sharding.py`.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gsa_jax import loss
from gsa_jax.loss import (
    Head,
    blockwise_mean_divergence,
    blockwise_mean_loss,
    blockwise_next_token_losses,
    mean_next_token_loss,
)

WIDTH = 6
WEIGHT = 0.3


def example(rows: int, length: int, vocab_size: int) -> tuple[Head, Head, jax.Array, jax.Array]:
    """Two heads, ids and a mask: padding on the left, on the right, and in the middle."""
    random = np.random.default_rng(rows * length + vocab_size)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    student, teacher = (Head(draw(rows, length, WIDTH), draw(vocab_size, WIDTH)) for _ in range(2))
    mask = np.ones((rows, length), bool)
    mask[0, :2] = mask[0, -1] = mask[-1, length // 2] = False
    ids = random.integers(0, vocab_size, (rows, length), dtype=np.int32)
    return student, teacher, jnp.asarray(ids), jnp.asarray(mask)


def by_pytorch(student: Head, teacher: Head, ids: jax.Array, mask: jax.Array) -> dict[str, tuple[float, list]]:
    """The mean loss, the mean divergence and their weighted mean, each with its gradients in the student's head."""
    found = {}
    of_teacher = [torch.tensor(np.array(x), dtype=torch.float64) for x in teacher]
    counted = torch.tensor(np.array(mask[:, 1:] & mask[:, :-1]))
    targets = torch.tensor(np.array(ids[:, 1:])).long()
    for name, weight in (("loss", 0.0), ("divergence", 1.0), ("both", WEIGHT)):
        own = [torch.tensor(np.array(x), dtype=torch.float64, requires_grad=True) for x in student]
        logs = torch.log_softmax((own[0] @ own[1].T)[:, :-1][counted], -1)
        wanted = torch.log_softmax((of_teacher[0] @ of_teacher[1].T)[:, :-1][counted], -1)
        entropy = torch.nn.functional.nll_loss(logs, targets[counted])
        divergence = torch.nn.functional.kl_div(logs, wanted, reduction="batchmean", log_target=True)
        value = weight * divergence + (1 - weight) * entropy
        value.backward()
        found[name] = value.item(), [x.grad.numpy() for x in own]
    return found


def set_tokens_of_a_block(monkeypatch: pytest.MonkeyPatch, tokens: int, vocab_size: int) -> None:
    monkeypatch.setattr(loss, "BLOCK_BYTES", 4 * tokens * vocab_size)


# Tokens, and how many fit in a block: all; a divisor; with a smaller divisor; with none, so that a block is filled up.
@pytest.mark.parametrize(
    ("rows", "length", "fitting", "blocks"),
    [(3, 10, 99, 1), (3, 10, 10, 3), (3, 10, 7, 5), (1, 31, 4, 8), (2, 5, 1, 10)],
)
@pytest.mark.parametrize("vocab_size", [32, 53])
def test_losses_and_gradients_are_those_of_whole_logits(monkeypatch, rows, length, fitting, blocks, vocab_size):
    student, teacher, ids, mask = example(rows, length, vocab_size)
    set_tokens_of_a_block(monkeypatch, fitting, vocab_size)
    expected = by_pytorch(student, teacher, ids, mask)

    function = jax.value_and_grad(lambda head: blockwise_mean_loss(head, ids, mask))
    assert f"length={blocks}" in str(jax.make_jaxpr(function)(student))
    for name, (found, gradients) in {
        "loss": jax.jit(function)(student),
        "both": jax.jit(
            jax.value_and_grad(lambda head: blockwise_mean_divergence(head, teacher, WEIGHT, ids, mask)[0])
        )(student),
    }.items():
        np.testing.assert_allclose(found, expected[name][0], rtol=1e-6)
        for gradient, own in zip(gradients, expected[name][1], strict=True):
            np.testing.assert_allclose(gradient, own, rtol=1e-4, atol=1e-6)
    _, divergence, entropy = jax.jit(lambda head: blockwise_mean_divergence(head, teacher, WEIGHT, ids, mask))(student)
    np.testing.assert_allclose([divergence, entropy], [expected["divergence"][0], expected["loss"][0]], rtol=1e-6)


def test_losses_of_tokens_are_those_of_pytorch(monkeypatch):
    """And so is their mean, of logits as of heads."""
    head, teacher, ids, mask = example(2, 9, 53)
    set_tokens_of_a_block(monkeypatch, 4, 53)
    hidden_states, embedding = (torch.tensor(np.array(x), dtype=torch.float64) for x in head)
    logits = hidden_states @ embedding.T
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].swapaxes(1, 2), torch.tensor(np.array(ids[:, 1:])).long(), reduction="none"
    )
    np.testing.assert_allclose(jax.jit(blockwise_next_token_losses)(head, ids), expected, rtol=1e-5)
    mean = mean_next_token_loss(jnp.asarray(logits.numpy(), jnp.float32), ids, mask)
    np.testing.assert_allclose(mean, by_pytorch(head, teacher, ids, mask)["loss"][0], rtol=1e-6)


def test_a_teacher_has_no_gradient():
    student, teacher, ids, mask = example(2, 9, 53)
    gradients = jax.grad(lambda teacher: blockwise_mean_divergence(student, teacher, WEIGHT, ids, mask)[0])(teacher)
    assert not any(np.any(gradient) for gradient in gradients)


def test_many_small_gradients_of_an_embedding_add_up_in_float32(monkeypatch):
    """In bfloat16, 1,000 equal numbers, one after another, come to 256 times one of them."""
    monkeypatch.setattr(loss, "BLOCK_BYTES", 1)
    tokens = 1001
    hidden_states = jnp.ones((1, tokens, 1), jnp.bfloat16)
    ids, mask = jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens), bool)
    head = Head(hidden_states, jnp.zeros((4, 1), jnp.float32))
    gradients = jax.jit(jax.grad(lambda head: blockwise_mean_loss(head, ids, mask)))(head)
    assert gradients.embedding.dtype == jnp.float32 and gradients.hidden_states.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradients.embedding[:, 0], [-0.75, 0.25, 0.25, 0.25], rtol=1e-5)


def test_a_word_outside_of_the_vocabulary_has_no_loss():
    head, _, ids, mask = example(2, 9, 53)
    for unknown in (-1, 53):
        assert math.isnan(blockwise_mean_loss(head, ids.at[1, 2].set(unknown), mask))


def test_without_tokens_to_count_the_loss_is_0():
    head, _, ids, mask = example(2, 9, 53)
    found, gradients = jax.value_and_grad(lambda head: blockwise_mean_loss(head, ids, jnp.zeros_like(mask)))(head)
    assert found == 0 and not any(np.any(gradient) for gradient in gradients)


def largest_array(function, *args: object) -> int:
    """How many numbers the largest array of a compiled program has."""
    program = jax.jit(function).lower(*args).compile().as_text()
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program))


def test_no_array_is_as_large_as_all_logits():
    """With GPT-Neo's vocabulary and the blocks that are always used; compiled, not run."""
    rows, length, vocab_size = 2, 1024, 50257
    head = Head(jnp.zeros((rows, length, 4)), jnp.zeros((vocab_size, 4)))
    ids, mask = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length), bool)

    def straightforward(head: Head) -> jax.Array:
        return mean_next_token_loss(head.hidden_states @ head.embedding.T, ids, mask)

    def with_teacher(student: Head, teacher: Head) -> jax.Array:
        return blockwise_mean_divergence(student, teacher, WEIGHT, ids, mask)[0]

    assert largest_array(jax.value_and_grad(straightforward), head) >= rows * length * vocab_size
    limit = loss.BLOCK_BYTES // 4
    assert limit < rows * length * vocab_size / 2
    assert largest_array(jax.value_and_grad(lambda head: blockwise_mean_loss(head, ids, mask)), head) <= limit
    assert largest_array(jax.value_and_grad(with_teacher), head, head) <= limit
    assert largest_array(lambda head: blockwise_next_token_losses(head, ids), head) <= limit
