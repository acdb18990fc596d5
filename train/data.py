"""Training text as rows of tokens, through grain: deterministic, seekable, and each process reads its own share.

May be changed here: what a row is, and the order of rows. The stream of tokens holds the documents one after another,
each begun by the model's start token, which also ends the document before. Rows are cut from the stream without gaps,
so a row may hold several documents and parts of documents. Rows overlap by one token: each token is predicted once per
epoch.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Integer

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.files import new_file
from gsa_jax.text import context_length, document_tokens, read_documents, start_token

TOKEN_DTYPE = np.dtype("<u2")
"""Of a file of token ids: 16 bits hold GPT-Neo's vocabulary of 50,257."""


_ROWS_OF_A_RUN = 2**52
"""More than any run reads, and few enough for a float, in which grain counts batches, to count them all."""


class TokenRows:
    """Rows of a stream of tokens, by their number; what grain calls a random access source."""

    def __init__(self, tokens: Integer[np.ndarray, "N"], context: int, start: int) -> None:
        self._tokens = tokens
        self._context = context
        self._start = start

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // (self._context - 1)

    def __getitem__(self, index: int) -> dict[str, Int[np.ndarray, "L"]]:
        """`input_ids` and `segment_ids`, which number the documents of the row from 1."""
        begin = int(index) * (self._context - 1)
        ids = np.asarray(self._tokens[begin : begin + self._context], np.int32)
        starts = ids == self._start
        starts[0] = True
        return {"input_ids": ids, "segment_ids": np.cumsum(starts, dtype=np.int32)}


def read_tokens(path: Path, tokenizer: Any, config: GPTNeoConfig) -> Integer[np.ndarray, "N"]:
    """The stream of tokens of a text file, or of a `.bin` file of uint16 token ids, which stays on disk.

    Raises:
        InputError: the file cannot be used, or holds ids outside of the vocabulary.
    """
    if path.suffix != ".bin":
        rows = document_tokens(read_documents(path), tokenizer, config)
        return np.fromiter(itertools.chain.from_iterable(rows), np.int32)
    try:
        size = path.stat().st_size
        if size == 0 or size % TOKEN_DTYPE.itemsize:
            raise InputError(f"{path}: {size} bytes are not uint16 token ids; make it with gsa tokenize")
        tokens = np.memmap(path, TOKEN_DTYPE, mode="r")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a text file or a .bin file of uint16 token ids") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    largest = int(tokens.max())
    if largest >= config.vocab_size:
        raise InputError(
            f"{path}: token id {largest} is outside of the vocabulary of {config.vocab_size}; "
            "was it made with this model's tokenizer?"
        )
    return tokens


def write_tokens(text: Path, out: Path, tokenizer: Any, config: GPTNeoConfig) -> int:
    """Makes a `.bin` file of the tokens of a text file, for `read_tokens`; gives their number.

    Raises:
        InputError: the text cannot be used, the vocabulary does not fit 16 bits, or the file cannot be written.
    """
    if out.suffix != ".bin":
        raise InputError(f"{out}: give it a name that ends in .bin, by which gsa train tells token ids from text")
    if config.vocab_size > 2**16:
        raise InputError(f"a vocabulary of {config.vocab_size} does not fit uint16 token ids; train on the text itself")
    with new_file(out) as staging:
        tokens = read_tokens(text, tokenizer, config)
        tokens.astype(TOKEN_DTYPE).tofile(staging)
    return len(tokens)


def row_batches(
    path: Path,
    tokenizer: Any,
    config: GPTNeoConfig,
    *,
    context: int,
    batch_size: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator of batches, shuffled anew in each epoch.

    Batch n holds the same rows however many processes share it, and the iterator's state is n, so that a run can go on
    with another number of processes.

    Args:
        path: text, or token ids, as `read_tokens` takes it.
        batch_size: rows of a batch, of all processes together; each gets `batch_size / processes`.

    Raises:
        InputError: the context is out of range, the text is shorter than one row, or it cannot be used.
    """
    context = context_length(config, context)
    if batch_size % processes:
        raise InputError(f"batch_size = {batch_size}: must be a multiple of the number of processes, {processes}")
    tokens = read_tokens(path, tokenizer, config)
    rows = TokenRows(tokens, context, start_token(config))
    if not len(rows):
        raise InputError(f"{path}: {len(tokens)} tokens are less than a row of {context}; give more text or --context")
    # Repeated for ever, grain's length is the largest that Python has, and batches of one row round it up beyond.
    epochs = _ROWS_OF_A_RUN // len(rows) + 1
    dataset = grain.MapDataset.source(rows).shuffle(seed=seed).repeat(epochs)[process::processes]
    dataset = dataset.batch(batch_size // processes)
    # Reading a row is too quick to be worth a thread.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
