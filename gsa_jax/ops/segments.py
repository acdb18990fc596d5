"""Which tokens of a row belong together: padding, one document, or several documents packed one after another.

Two masks come from outside: `attention_mask` says what is a token, `segment_ids` to which document it belongs. Inside
of `gsa_jax.ops` they are one array, the segments of a row: 0 for padding, else the number of the token's document,
which never falls along the row. A row without `segment_ids` is one document, number 1.

May be changed here: how masks are checked and joined, and how chunks keep documents apart.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from gsa_jax.errors import InputError


def token_mask(attention_mask: ArrayLike | None, shape: tuple[int, ...]) -> Bool[Array, "B T"]:
    """The mask as bools; all True for None.

    Args:
        attention_mask: bools or Hugging Face's integers, `[B, T]`: 1 for a token, 0 for padding.
        shape: `(B, T)`.

    Raises:
        InputError: it has another shape or dtype, or holds other numbers (which can be seen only outside of `jit`).
    """
    if attention_mask is None:
        return jnp.ones(shape, bool)
    mask = attention_mask if isinstance(attention_mask, jax.Array) else np.asarray(attention_mask)
    is_bool = mask.dtype == bool
    if mask.shape != shape or not (is_bool or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise InputError(
            f"attention_mask is {mask.dtype}{list(mask.shape)}; give {list(shape)} bools, or integers that are 1 for "
            "tokens and 0 for padding"
        )
    if not is_bool and not isinstance(mask, Tracer):
        others = set(np.unique(np.asarray(mask)).tolist()) - {0, 1}
        if others:
            raise InputError(
                f"attention_mask holds {min(others)}; give 1 for tokens and 0 for padding, and numbers of documents as "
                "segment_ids"
            )
    return jnp.asarray(mask if is_bool else mask != 0)


def check_integers(name: str, numbers: ArrayLike, shape: tuple[int, ...], remedy: str) -> Int[Array, "B T"]:
    """Numbers of tokens as int32.

    Raises:
        InputError: they have another shape or dtype, or do not fit in 32 bits (which can be seen only outside of
            `jit`).
    """
    array = numbers if isinstance(numbers, jax.Array) else np.asarray(numbers)
    if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise InputError(f"{name} is {array.dtype}{list(array.shape)}; {remedy}")
    if not isinstance(array, Tracer):
        known, bounds = np.asarray(array), np.iinfo(np.int32)
        outside = known[(known < bounds.min) | (known > bounds.max)]
        if outside.size:
            raise InputError(f"{name} holds {outside[0]}, which 32 bits cannot; {remedy}")
    return jnp.asarray(array).astype(jnp.int32)


def check_segment_ids(segment_ids: ArrayLike, shape: tuple[int, ...]) -> Int[Array, "B T"]:
    """Numbers of documents as int32.

    Raises:
        InputError: what `check_integers` refuses; or (which can be seen only outside of `jit`) they are negative, or
            fall along a row.
    """
    remedy = f"give integers of shape {list(shape)}, the number of each token's document"
    numbers = check_integers("segment_ids", segment_ids, shape, remedy)
    if not isinstance(numbers, Tracer):
        known = np.asarray(numbers)
        reached = np.maximum.accumulate(known, axis=1)
        if np.any((known != 0) & (known != reached)) or np.any(known < 0):
            raise InputError("segment_ids fall along a row; number documents 1, 2, ... and padding 0")
    return numbers


def join_masks(attention_mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """The segments of rows, as the rest of `gsa_jax.ops` takes them."""
    return jnp.where(attention_mask, 1 if segment_ids is None else segment_ids, 0).astype(jnp.int32)


def positions_from_mask(
    attention_mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """Position of each token among the tokens of its document, from 0.

    Padding has the position of the token before it, or 0; nothing looks at it.
    """
    segments = join_masks(attention_mask, segment_ids)
    tokens = jnp.cumsum(segments != 0, axis=1, dtype=jnp.int32)
    reached = jax.lax.cummax(segments, axis=1)
    begins = (segments != 0) & (reached != jnp.pad(reached[:, :-1], [(0, 0), (1, 0)]))
    return jnp.maximum(tokens - jax.lax.cummax(jnp.where(begins, tokens, 1), axis=1), 0)


def visible(queries: Int[Array, "*rows T"], keys: Int[Array, "*rows K"]) -> Bool[Array, "*rows T K"]:
    """Whether a query may see a key, at whatever distance: both are tokens of the same document."""
    return (queries[..., :, None] == keys[..., None, :]) & (keys != 0)[..., None, :]


class Reached(NamedTuple):
    """The document that the keys which left the window have reached, at each slot of a chunk of a row.

    Document numbers never fall along a row, so of all keys that left the window, a token can read only those of the
    last such document.

    Attributes:
        document: the number of that document; 1 before the first key.
        has_key: whether a key of this document has left the window since the beginning of the chunk.
        first: slot of the chunk at which the first such key left; arbitrary if there is none.
        goes_on: whether this document had been reached before the chunk, so that the state's sums belong to it.
    """

    document: Int[Array, "*B T"]
    has_key: Bool[Array, "*B T"]
    first: Int[Array, "*B T"]
    goes_on: Bool[Array, "*B T"]


def reached_by(left: Int[Array, "T"], before: Int[Array, ""]) -> Reached:
    """`Reached`, from the segment of the key that leaves the window at each slot, 0 where none does.

    Args:
        before: the document that the keys before the chunk had reached.
    """
    so_far = jax.lax.cummax(left)
    document = jnp.maximum(so_far, before)
    is_first = left > jnp.pad(so_far[:-1], (1, 0))
    first = jax.lax.cummax(jnp.where(is_first, jnp.arange(len(left)), 0))
    return Reached(document, so_far == document, first, document == before)


def documents_before(left: Int[Array, "*BH G C"], document: Int[Array, "*BH"]) -> Int[Array, "*BH G"]:
    """The document that the keys before each chunk have reached."""
    ends = jax.lax.cummax(jnp.max(left, axis=-1), axis=left.ndim - 2)
    return jnp.concatenate([document[..., None], jnp.maximum(ends, document[..., None])[..., :-1]], axis=-1)
