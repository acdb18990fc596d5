"""Documents as tokens, and as rows of tokens that a model can be run on.

May be changed here: how text is tokenised, and how documents that are longer than a row are cut. How documents are read
is `gsa_jax.text_files`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int, Integer

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.progress import Progress
from gsa_jax.text_files import Piece, Text, TextFiles, as_text_files, read_pieces, total_bytes

if TYPE_CHECKING:
    from gsa_jax.tokenizer import Tokenizer

_AT_ONCE = 2**20
"""Characters that are tokenised together; the tokenizer takes some 35 bytes for each, and far more in one long text."""

_PIECE = 2**16
"""Characters of a piece of a long document."""


def iterate_documents(text: Text) -> Iterator[str]:
    """The documents of files, one by one, as `gsa_jax.text_files.read_pieces` finds them; each of them whole.

    Raises:
        InputError: as `read_pieces`, when the iteration comes to it.
    """
    for piece in read_pieces(as_text_files(text)):
        yield piece.text


def read_documents(text: Text, limit: int | None = None) -> list[str]:
    """The first `limit` documents of files, or all if None; what lies behind them is not read.

    Raises:
        InputError: as `iterate_documents`.
    """
    return list(itertools.islice(iterate_documents(text), limit))


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


def token_dtype(config: GPTNeoConfig) -> np.dtype:
    """The smaller one of uint16 and int32 that holds the vocabulary; little-endian."""
    return np.dtype("<u2" if config.vocab_size <= 2**16 else "<i4")


def document_tokens(
    documents: Iterable[str], tokenizer: Tokenizer, config: GPTNeoConfig
) -> list[Int[np.ndarray, " n"]]:
    """The token ids of each document, int32, the start token first.

    Raises:
        InputError: the model has no start token, or the tokenizer gives a document ids outside of the vocabulary, or
            none at all.
    """
    rows = []
    for ids, counts in _encoded((Piece(document, True, 0) for document in documents), tokenizer, config):
        rows += np.split(ids, np.cumsum(counts)[:-1])
    return rows


def stream_tokens(
    files: TextFiles, tokenizer: Tokenizer, config: GPTNeoConfig, progress: Progress = iter
) -> Iterator[Integer[np.ndarray, " n"]]:
    """The tokens of all documents of files, one document after another, each begun by the start token.

    They come in parts of `token_dtype`, and nothing of a part is kept: memory does not grow with the text. A document
    of any length is tokenised in pieces, if the tokenizer is known to give its pieces the tokens of the whole.

    Args:
        progress: wraps names, one for each MB of the files.

    Raises:
        InputError: as `read_pieces` and `document_tokens`.
    """
    dtype = token_dtype(config)
    pieces = read_pieces(files, _PIECE if _may_be_cut(tokenizer) else None)
    for ids, _ in _encoded(_shown(pieces, total_bytes(files), progress), tokenizer, config):
        yield ids.astype(dtype)


def _shown(pieces: Iterable[Piece], size: int, progress: Progress) -> Iterator[Piece]:
    """The same pieces, while the progress follows the bytes that are read."""
    steps = max(1, round(size / 1e6))
    names = iter(progress([f"MB {step}" for step in range(1, steps + 1)]))
    done = 0
    for piece in pieces:
        yield piece
        while done < min(steps, piece.read * steps // max(size, 1)):
            done += 1
            next(names, None)
    for _ in names:
        pass


def _encoded(
    pieces: Iterable[Piece], tokenizer: Any, config: GPTNeoConfig
) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " p"]]]:
    """For some pieces at a time: all their ids, with the start token where a document begins, and how many of each."""
    start = start_token(config)
    documents = 0
    for batch in _batches(pieces):
        rows = tokenizer([piece.text for piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        begins = np.fromiter((piece.begins for piece in batch), bool, len(batch))
        if not counts.all():
            number = documents + int(np.cumsum(begins)[counts.argmin()])
            raise InputError(f"document {number} has no tokens; does the tokenizer belong to this model?")
        documents += int(begins.sum())
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(counts.sum()))
        outside = ids[(ids < 0) | (ids >= config.vocab_size)]
        if outside.size:
            raise InputError(
                f"token id {outside[0]} is outside of the vocabulary of {config.vocab_size}; "
                "does the tokenizer belong to this model?"
            )
        first = np.cumsum(counts) - counts
        yield np.insert(ids.astype(np.int32), first[begins], start), counts + begins


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece.text) > _AT_ONCE:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.text)
    if batch:
        yield batch


def _may_be_cut(tokenizer: Any) -> bool:
    """Whether this is byte-level BPE as GPT-2 has it, with words found by its pattern and no step before.

    The pattern ends a word before a space or end of line between other characters, and merges stay within words; so
    the tokens of the pieces that `read_pieces` cuts there are those of the whole. An added token is found before words
    are, and must not reach over such a place.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is not None or type(backend.pre_tokenizer).__name__ != "ByteLevel":
        return False
    words, added = backend.pre_tokenizer, backend.get_added_tokens_decoder().values()
    return (words.use_regex and not words.add_prefix_space) and not any(
        token.lstrip or token.rstrip or set(token.content) & set(" \n") for token in added
    )


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
    tokens = np.concatenate(by_document)

    stride = context - 1
    cuts = -(-counts // stride)
    document = np.repeat(np.arange(len(by_document)), cuts)
    cut = np.arange(len(document)) - np.repeat(np.cumsum(cuts) - cuts, cuts)  # number of a row in its document
    begins = (np.cumsum(counts + 1) - counts - 1)[document]
    column = np.arange(context)
    mask = (cut * stride)[:, None] + column <= counts[document, None]
    index = np.where(mask, (begins + cut * stride)[:, None] + column, 0)
    return TextRows(np.where(mask, tokens[index], start).astype(np.int32), mask, document)
