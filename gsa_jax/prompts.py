"""Prompts as users have them, and as a model reads them.

May be changed here: what a prompt may be, what is refused, and how rows are padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError, first_line
from gsa_jax.ops.segments import token_mask
from gsa_jax.tokenizer import Tokenizer

Ids = Sequence[int] | np.ndarray | jax.Array

Prompts = str | Sequence[str] | Ids | Sequence[Ids]
"""A text or several, the token ids of a prompt or of several, or a padded array of ids `[B, T]`."""

Mask = np.ndarray | jax.Array | Sequence[Sequence[int]]
"""Bools or Hugging Face's integers `[B, T]`: 0 for padding."""

_ARE = "give a text, a list of texts, token ids, lists of them, or an array of ids [rows, tokens] with attention_mask"

_SMALLEST_BUCKET = 16


def prompt_ids(
    prompts: Prompts, tokenizer: Tokenizer | None = None, attention_mask: Mask | None = None
) -> list[list[int]]:
    """The token ids of each prompt, without padding.

    Args:
        prompts: one or several. Ids in one dimension are one prompt.
        tokenizer: for texts.
        attention_mask: `[B, T]`, 0 for padding, wherever it stands; for an array, or lists of equal lengths.

    Raises:
        InputError: `prompts` is none of these, is a text that is not UTF-8, or comes without what it needs.
    """
    if isinstance(prompts, Mapping):
        raise InputError('prompts is a mapping; give its ["input_ids"], and its ["attention_mask"] as attention_mask')
    listed = [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, Sequence) else []
    texts = [text for text in listed if isinstance(text, str)]
    if texts and len(texts) == len(listed):
        if tokenizer is None:
            raise InputError("prompts are texts; give the tokenizer as well: tokenizer=gsa_jax.open_tokenizer(folder)")
        if attention_mask is not None:
            raise InputError("prompts are texts; an attention_mask belongs to token ids")
        return [_encode(tokenizer, text, number) for number, text in enumerate(texts)]
    if attention_mask is not None or isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        return _unpadded(prompts, attention_mask)
    if texts:
        raise InputError(f"prompts are a list of texts and of other things; {_ARE}")
    rows = [np.asarray(prompt) for prompt in prompts]
    if rows and all(row.ndim == 0 for row in rows):
        rows = [np.asarray(prompts)]
    return [_ids(row, number) for number, row in enumerate(rows)]


def _encode(tokenizer: Tokenizer, text: str, number: int) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # what the operating system could not decode, Python keeps as surrogates
        raise InputError(f"prompt {number} is not UTF-8 (at character {error.start}); convert it to UTF-8") from None
    return list(tokenizer.encode(text))


def _unpadded(prompts: Any, attention_mask: Mask | None) -> list[list[int]]:
    try:
        array = np.asarray(prompts)
    except ValueError as error:  # lists of different lengths
        raise InputError(
            f"prompts with an attention_mask must be an array [rows, tokens] ({first_line(error)})"
        ) from None
    if array.ndim not in (1, 2) or array.dtype == object:
        raise InputError(f"prompts is {_kind(prompts, array)}; {_ARE}")
    array = np.atleast_2d(array)
    mask = None if attention_mask is None else np.asarray(attention_mask)
    mask = np.asarray(token_mask(mask, array.shape))
    return [_ids(row[of_row], number) for number, (row, of_row) in enumerate(zip(array, mask, strict=True))]


def _ids(row: np.ndarray, number: int) -> list[int]:
    if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
        raise InputError(f"prompt {number} is {_kind(row, row)}; {_ARE}")
    return [int(token) for token in row]


def _kind(value: Any, array: np.ndarray) -> str:
    if isinstance(value, np.ndarray | jax.Array) or array.dtype != object:
        return f"{array.dtype}{list(array.shape)}" if array.ndim else str(array.dtype)
    return f"of type {type(value).__name__}"


def check_prompts(config: GPTNeoConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises `InputError` unless the model can read each prompt and go on for so many tokens."""
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens = {max_new_tokens}: must be a whole number >= 1")
    if not len(prompts):
        raise InputError("no prompt given")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {row} is empty; start it with the beginning-of-sequence token at least")
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise InputError(
                    f"prompt {row} holds token id {token}, outside of the vocabulary of {config.vocab_size}; "
                    "does the tokenizer belong to this model?"
                )
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens, with {max_new_tokens} new ones more than the "
                f"{config.max_position_embeddings} positions of the model; shorten one of the two"
            )


def pad_left(prompts: Sequence[Sequence[int]], chunk: int) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """Ids and mask, as long as the bucket of the longest prompt, so that prompts of about a length share programs.

    Args:
        chunk: buckets are powers of two up to this, and its multiples beyond.
    """
    longest = max(len(prompt) for prompt in prompts)
    bucket = max(_SMALLEST_BUCKET, 1 << (longest - 1).bit_length())
    bucket = bucket if bucket <= chunk else -(-longest // chunk) * chunk
    input_ids = np.zeros((len(prompts), bucket), np.int32)
    attention_mask = np.zeros((len(prompts), bucket), bool)
    for row, prompt in enumerate(prompts):
        input_ids[row, bucket - len(prompt) :] = prompt
        attention_mask[row, bucket - len(prompt) :] = True
    return input_ids, attention_mask
