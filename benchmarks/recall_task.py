"""Recall of many pairs out of a context (MQAR), and a small exact GPT-Neo that has learned it.

Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927, section 4): a row tells pairs of a key
and a value, later asks for keys, and a model answers each with the value that the key was paired with. Two things
differ from Zoology's own rows. Pairs do not stand at the beginning one behind the other: they stand at random places of
the first half of a row, and the questions, one for each pair, at random places of the second half, with filler between,
so that no position says what is worth remembering. And the vocabulary is small, 512 instead of 8,192, with ranges of
their own for keys, values and filler, so that the model is learned in minutes on two cores.

The model is a GPT-Neo of two layers, the first one local with a window of two tokens, the second one global: the first
brings a value's key to the value's place, the second finds that place. From weights that are all random it did not
learn so: 1,000 steps of the first stage and more left it at guessing one of the values that it had seen. So its
attention starts with this laid out (`start`), which answers most questions of rows of 32 tokens, and it learns the
rest: longer rows, more pairs, all positions, and to be sure.

May be changed here: the rows, the shape of the model, and how it is trained.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from gsa_jax import GPTNeoConfig, GPTNeoForCausalLM
from gsa_jax.parameters import POSITION_EMBEDDING, attention_tensor, build_model, named_parameters

KEYS = range(256)
VALUES = range(256, 448)
FILLER = range(448, 512)

NO_ANSWER = -1
"""The answer at a token that asks nothing."""

CONFIG = GPTNeoConfig(
    vocab_size=FILLER.stop,
    hidden_size=64,
    num_layers=2,
    num_heads=1,
    intermediate_size=128,
    attention_types=((("local", "global"), 1),),
    window_size=2,
    max_position_embeddings=1024,
    initializer_range=0.1,
    bos_token_id=None,
    eos_token_id=None,
)

CURRICULUM = ((32, 64), (64, 32), (128, 32), (256, 16), (512, 8), (1024, 4))
"""Length and number of rows of each stage; an eighth of its longest row is pairs at most. The next stage begins when
the last `PATIENCE` steps answered `ENOUGH` of their questions."""
PATIENCE = 50
ENOUGH = 0.995
MOST_STEPS = 6000
LEARNING_RATE = 2e-3

Tensors = dict[str, jax.Array]


class Rows(NamedTuple):
    """Some rows of the task.

    Attributes:
        tokens: what the model reads.
        answers: the value to answer with after each token that asks for one, `NO_ANSWER` after all others.
    """

    tokens: Int[np.ndarray, "B T"]
    answers: Int[np.ndarray, "B T"]


def make_rows(draws: np.random.Generator, context: int, pairs: Int[np.ndarray, "B"]) -> Rows:
    """Rows of `context` tokens that tell and ask for as many pairs as `pairs` says of each, a quarter of it at most."""
    half = context // 2
    tokens = draws.choice(FILLER, (len(pairs), context)).astype(np.int32)
    answers = np.full_like(tokens, NO_ANSWER)
    for row, count in enumerate(pairs):
        keys, values = draws.choice(KEYS, count, replace=False), draws.choice(VALUES, count)
        told = np.sort(draws.choice(half - count, count, replace=False)) + np.arange(count)
        asked = half + draws.choice(context - half, count, replace=False)
        tokens[row, told], tokens[row, told + 1], tokens[row, asked] = keys, values, keys
        answers[row, asked] = values
    return Rows(tokens, answers)


def answered(logits: Float[Array, "B T V"], answers: Int[Array | np.ndarray, "B T"]) -> Float[Array, ""]:
    """Share of the questions for which the likeliest token, of all, is the answer."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == answers, where=answers != NO_ANSWER)


def answer_loss(logits: Float[Array, "B T V"], answers: Int[Array | np.ndarray, "B T"]) -> Float[Array, ""]:
    """Mean cross-entropy of the answers; other tokens do not count."""
    asked = answers != NO_ANSWER
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(asked, answers, 0))
    return jnp.mean(losses, where=asked)


def start(seed: int) -> Tensors:
    """Random weights, with the attention of a head that looks for its own token's last follower laid out in them.

    Layer 0 copies the token before into directions of its own, a rotation R; layer 1 undoes R in keys alone, so that
    the query of a token is like the keys after earlier ones of its kind, and unlike its own.
    """
    tensors = named_parameters(GPTNeoForCausalLM(CONFIG, rngs=nnx.Rngs(seed)))
    tensors[POSITION_EMBEDDING] *= 0.1  # as large as those of tokens, they would be noise that has to be unlearned
    for layer in range(CONFIG.num_layers):
        tensors[f"transformer.h.{layer}.mlp.c_proj.weight"] *= 0.05  # or noise of the MLP would drown embeddings
    identity = jnp.eye(CONFIG.hidden_size)
    rotation = jax.random.orthogonal(jax.random.key(seed), CONFIG.hidden_size)
    laid_out = {
        (0, "q_proj"): 0.2 * identity,
        (0, "k_proj"): -0.2 * identity,  # of the two tokens in the window, the one that is not the query's own
        (0, "v_proj"): identity,
        (0, "out_proj"): 0.1 * rotation,
        (1, "q_proj"): 0.35 * identity,
        (1, "k_proj"): 0.35 * rotation.T,
        (1, "v_proj"): identity,
        (1, "out_proj"): identity,
    }
    for (layer, leaf), weight in laid_out.items():
        tensors[attention_tensor(layer, f"{leaf}.weight")] = weight
    return tensors


def train_exact(seed: int) -> Tensors:
    """Parameters of a model of `CONFIG` that has gone through `CURRICULUM`."""
    draws = np.random.default_rng(seed)
    tensors: Any = start(seed)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, b2=0.98, weight_decay=0.01))

    def loss(tensors: Tensors, rows: Rows, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = build_model(CONFIG, tensors)(rows.tokens, positions=positions)
        return answer_loss(logits, rows.answers), answered(logits, rows.answers)

    @jax.jit
    def step(tensors: Tensors, state: Any, rows: Rows, positions: jax.Array) -> tuple[Any, Any, jax.Array]:
        (_, share), gradients = jax.value_and_grad(loss, has_aux=True)(tensors, rows, positions)
        updates, state = optimizer.update(gradients, state, tensors)
        return optax.apply_updates(tensors, updates), state, share

    state = optimizer.init(tensors)
    for context, count in CURRICULUM:
        shares: list[float] = []
        while len(shares) < MOST_STEPS and (len(shares) < PATIENCE or np.mean(shares[-PATIENCE:]) < ENOUGH):
            rows = make_rows(draws, context, draws.integers(2, context // 8, count, endpoint=True))
            # Short rows stand anywhere, so that all positions are learned from the beginning.
            first = draws.integers(0, CONFIG.max_position_embeddings - context, (count, 1), endpoint=True)
            tensors, state, share = step(tensors, state, rows, jnp.asarray(first + np.arange(context), jnp.int32))
            shares.append(float(share))
            if len(shares) % 50 == 0:
                print(f"{context} tokens, step {len(shares)}: {np.mean(shares[-PATIENCE:]):.3f} answered", flush=True)
        print(f"{context} tokens: {np.mean(shares[-PATIENCE:]):.4f} answered after {len(shares)} steps", flush=True)
    return tensors
