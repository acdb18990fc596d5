"""Training text as rows of tokens, through grain: deterministic, seekable, and each process reads its own share.

May be changed here: what a row is, and the order of rows. The stream of tokens holds the documents one after another,
each begun by the model's start token, which also ends the document before. Rows are cut from the stream without gaps,
so a row may hold several documents and parts of documents. Rows overlap by one token: each token is predicted once per
epoch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Integer

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError
from gsa_jax.files import new_file
from gsa_jax.progress import Progress
from gsa_jax.text import context_length, start_token, stream_tokens, token_dtype
from gsa_jax.text_files import TextFiles, as_text_files

TOKEN_SUFFIX = ".bin"

TOKEN_DTYPE = np.dtype("<u2")
"""Of a file of token ids: 16 bits hold the vocabulary of GPT-2 and GPT-Neo, 50,257."""


_ROWS_OF_A_RUN = 2**52
"""More than any run reads, and few enough for a float, in which grain counts batches, to count them all."""


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The tokens of a training text.

    Attributes:
        ids: documents one after another, each begun by the start token.
        source: where they are from, for messages.
    """

    ids: Integer[np.ndarray, "N"]
    source: str

    def fingerprint(self) -> str:
        """What tells these tokens from others, wherever they are read from: the SHA-256 of their ids."""
        return hashlib.sha256(np.ascontiguousarray(self.ids).data).hexdigest()


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


def read_tokens(files: TextFiles, tokenizer: Any, config: GPTNeoConfig, *, progress: Progress = iter) -> TokenStream:
    """The tokens of text, in an array of `token_dtype`; or of one `.bin` file of uint16 token ids, which stays on disk.

    Args:
        progress: wraps names, one for each MB of text.

    Raises:
        InputError: the files cannot be used, or hold ids outside of the vocabulary.
    """
    files = as_text_files(files)
    if any(path.suffix == TOKEN_SUFFIX for path in files.paths):
        return TokenStream(_token_file(files, config), str(files))
    ids = bytearray()  # grows in place, where joining parts at the end would hold all of them twice
    for part in stream_tokens(files, tokenizer, config, progress):
        ids += part.data
    return TokenStream(np.frombuffer(ids, token_dtype(config)), str(files))


def _token_file(files: TextFiles, config: GPTNeoConfig) -> Integer[np.ndarray, "N"]:
    if len(files.paths) != 1:
        raise InputError(f"{files}: a {TOKEN_SUFFIX} file is a training text of its own; give it alone")
    path = files.paths[0]
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


def write_tokens(
    files: TextFiles, out: Path, tokenizer: Any, config: GPTNeoConfig, *, progress: Progress = iter
) -> int:
    """Makes a `.bin` file of the tokens of text, for `read_tokens`; gives their number.

    Args:
        progress: wraps names, one for each MB of text.

    Raises:
        InputError: the text cannot be used, the vocabulary does not fit 16 bits, or the file cannot be written.
    """
    if out.suffix != TOKEN_SUFFIX:
        raise InputError(f"{out}: give it a name that ends in .bin, by which gsa train tells token ids from text")
    if token_dtype(config) != TOKEN_DTYPE:
        raise InputError(f"a vocabulary of {config.vocab_size} does not fit uint16 token ids; train on the text itself")
    written = 0
    with new_file(out) as staging, staging.open("wb") as file:
        for part in stream_tokens(files, tokenizer, config, progress):
            file.write(part.data)
            written += len(part)
    return written


def row_batches(
    tokens: TokenStream,
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
        batch_size: rows of a batch, of all processes together; each gets `batch_size / processes`.

    Raises:
        InputError: the context is out of range, or the text is shorter than one row.
    """
    context = context_length(config, context)
    if batch_size % processes:
        raise InputError(f"batch_size = {batch_size}: must be a multiple of the number of processes, {processes}")
    rows = TokenRows(tokens.ids, context, start_token(config))
    if not len(rows):
        raise InputError(
            f"{tokens.source}: {len(tokens.ids)} tokens are less than a row of {context}; give more text or --context"
        )
    # Repeated for ever, grain's length is the largest that Python has, and batches of one row round it up beyond.
    epochs = _ROWS_OF_A_RUN // len(rows) + 1
    dataset = grain.MapDataset.source(rows).shuffle(seed=seed).repeat(epochs)[process::processes]
    dataset = dataset.batch(batch_size // processes)
    # Reading a row is too quick to be worth a thread.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
