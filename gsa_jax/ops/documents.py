"""Packed rows: several documents in one row of tokens, none of which sees another.

A mask of tokens is either bool, False for padding, or integer: 0 for padding, else the number of the token's document,
which never falls from one token of a row to the next. May be changed here: what an integer mask means.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def numbers_documents(mask: Bool[Array, "B T"] | Int[Array, "B T"]) -> bool:
    """Whether the mask is an integer one. Known while tracing, so that a bool mask costs nothing."""
    return mask.dtype != bool


def visible_keys(
    queries: Bool[Array, "B T"] | Int[Array, "B T"], keys: Bool[Array, "B K"] | Int[Array, "B K"]
) -> Bool[Array, "B 1 #T K"]:
    """The keys that a query may see at any distance: all tokens, or those of its own document."""
    if not numbers_documents(keys):
        return keys[:, None, None, :]
    return ((queries[:, :, None] == keys[:, None, :]) & (keys != 0)[:, None, :])[:, None]


class Runs(NamedTuple):
    """The document that a row has reached at each slot; padding belongs to the document before it.

    Attributes:
        number: of that document.
        first: slot at which it begins; 0 if it began before the first slot.
        goes_on: whether it began before the first slot.
    """

    number: Int[Array, "B T"]
    first: Int[Array, "B T"]
    goes_on: Bool[Array, "B T"]


def runs(documents: Int[Array, "B T"], before: Int[Array, " B"]) -> Runs:
    """Runs of a part of a row, where the part before reached the document `before`."""
    number = jnp.maximum(jax.lax.cummax(documents, axis=1), before[:, None])
    begins = jnp.pad(number[:, 1:] != number[:, :-1], [(0, 0), (1, 0)])
    first = jax.lax.cummax(jnp.where(begins, jnp.arange(documents.shape[1]), 0), axis=1)
    return Runs(number, first, number == before[:, None])
