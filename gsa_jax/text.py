"""Text files as rows of tokens that a model can be run on.

May be changed here: what a document is, and how documents that are longer than a row are cut.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError

if TYPE_CHECKING:
    from gsa_jax.tokenizer import Tokenizer

DOCUMENT_SEPARATOR = "<|endoftext|>"


def read_documents(path: str | Path) -> list[str]:
    """The documents of a UTF-8 file, which `DOCUMENT_SEPARATOR` separates; without white space around them.

    Raises:
        InputError: the file is missing, is not UTF-8, or holds nothing but white space and separators.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a text file") from None
    documents = [stripped for part in content.split(DOCUMENT_SEPARATOR) if (stripped := part.strip())]
    if not documents:
        raise InputError(f"{path}: no text in it; give a file with at least one document")
    return documents


def context_length(config: GPTNeoConfig, context: int | None) -> int:
    """Tokens of a row of text: `context`, or all that the model has positions for if None.

    Raises:
        InputError: it is less than 2 or more than the model has positions for.
    """
    context = config.max_position_embeddings if context is None else context
    if not 2 <= context <= config.max_position_embeddings:
        raise InputError(
            f"context = {context}: must be >= 2 and at most {config.max_position_embeddings}, "
            "the number of positions of the model"
        )
    return context


def start_token(config: GPTNeoConfig) -> int:
    """What a document begins with: the model's `bos_token_id`, or its (first) `eos_token_id` if it has no other.

    Raises:
        InputError: it has neither, or this one is not in its vocabulary.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    start = next((token for token in (config.bos_token_id, *ends) if token is not None), None)
    if start is None:
        raise InputError(
            "documents need a token to start with; set bos_token_id or eos_token_id in the model's config.json"
        )
    if not 0 <= start < config.vocab_size:
        raise InputError(
            f"documents would start with token {start}, which is not in the vocabulary of {config.vocab_size} tokens; "
            "set bos_token_id in the model's config.json to the token that stands between its documents"
        )
    return start


def document_tokens(documents: Sequence[str], tokenizer: Tokenizer, config: GPTNeoConfig) -> list[list[int]]:
    """The token ids of each document, the start token first.

    Raises:
        InputError: the model has no start token, or the tokenizer gives a document ids outside of the vocabulary, or
            none at all.
    """
    start = start_token(config)
    rows: Any = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    for number, row in enumerate(rows, 1):
        if not row:
            raise InputError(f"document {number} has no tokens; does the tokenizer belong to this model?")
        if min(row) < 0 or max(row) >= config.vocab_size:
            outside = next(token for token in row if not 0 <= token < config.vocab_size)
            raise InputError(
                f"token id {outside} is outside of the vocabulary of {config.vocab_size}; "
                "does the tokenizer belong to this model?"
            )
    return [[start, *row] for row in rows]


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Documents as rows of at most L tokens, padded on the right.

    A row holds tokens of one document only. Its first token is only there for the others to follow: the document's
    start token, or the last token of the row before. The other tokens of all rows are the documents' tokens, each once.

    Attributes:
        input_ids: int32; padding is the start token.
        attention_mask: False for padding.
        document: which document a row is from; rows of a document follow one another.
    """

    input_ids: Int[np.ndarray, "N L"]
    attention_mask: Bool[np.ndarray, "N L"]
    document: Int[np.ndarray, "N"]


def text_rows(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    config: GPTNeoConfig,
    context: int | None = None,
) -> TextRows:
    """Cuts documents into rows of L = `context` tokens; all that the model has positions for by default.

    Raises:
        InputError: `context_length` or `document_tokens` finds something wrong.
    """
    context = context_length(config, context)
    start = start_token(config)
    by_document = document_tokens(documents, tokenizer, config)
    counts = np.fromiter(map(len, by_document), np.int64, len(by_document)) - 1
    tokens = np.fromiter(itertools.chain.from_iterable(by_document), np.int64)

    stride = context - 1
    cuts = -(-counts // stride)
    document = np.repeat(np.arange(len(by_document)), cuts)
    cut = np.arange(len(document)) - np.repeat(np.cumsum(cuts) - cuts, cuts)  # number of a row in its document
    begins = (np.cumsum(counts + 1) - counts - 1)[document]
    column = np.arange(context)
    mask = (cut * stride)[:, None] + column <= counts[document, None]
    index = np.where(mask, (begins + cut * stride)[:, None] + column, 0)
    return TextRows(np.where(mask, tokens[index], start).astype(np.int32), mask, document)
