"""Files of text, read piece by piece: plain UTF-8, JSON lines and Parquet, the first two also gzipped.

May be changed here: which formats there are, and what a document is. What becomes of documents is `gsa_jax.text`.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import gzip
import io
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gsa_jax.errors import InputError, first_line
from gsa_jax.json_files import parse_json
from gsa_jax.stand_ins import stand_in

DOCUMENT_SEPARATOR = "<|endoftext|>"

_BLOCK = 2**16
"""Bytes of a plain file that are read at once."""

_PARQUET_ROWS = 256

_LONGEST_LINE = 2**25
"""Bytes of a line of JSON; read into Python, it takes 0.8 GB at worst."""

_LONGEST_DOCUMENT = 2**26
"""Characters of a document, or of a part of it without a place to cut: what is held in memory at once."""

_NOT_TEXT = (".json", ".csv", ".tsv", ".ndjson", ".arrow")
"""Of files that hold documents among other things, which would be read as text."""

_BETWEEN_WORDS = re.compile(r"(?<=\S)[ \n](?=\S)")
"""Where a document may be cut: before a single space or end of line, to which the next piece belongs."""


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Files that are read one after another.

    The name of a file says what it is: `.jsonl` has a JSON object in each line, `.parquet` a table, and everything else
    is UTF-8 text. `.gz` behind the name of the first and of the last means gzip.

    Attributes:
        paths: at least one.
        field: of JSON objects and tables: which one holds the text.
    """

    paths: tuple[Path, ...]
    field: str = "text"

    def __str__(self) -> str:
        return ", ".join(map(str, self.paths))

    @property
    def name(self) -> str:
        """The files without their folders, for people to read."""
        return ", ".join(path.name for path in self.paths)


Text = str | Path | TextFiles
"""One file, or several."""


def as_text_files(text: Text) -> TextFiles:
    """The same files as one kind of object.

    Raises:
        InputError: there is none.
    """
    files = text if isinstance(text, TextFiles) else TextFiles((Path(text),))
    if not files.paths:
        raise InputError("no text given; name at least one file")
    return files


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        text: not empty.
        begins: whether the document begins with it; if not, the piece before is of the same document.
        read: bytes of all files that have been read for it and for those before.
    """

    text: str
    begins: bool
    read: int


def read_pieces(files: TextFiles, longest: int | None = None) -> Iterator[Piece]:
    """The documents of the files in order, without the white space around them; an empty one is left out.

    A document of plain text ends at `DOCUMENT_SEPARATOR` and with its file. Each object of JSON lines and each row of a
    table is a document, and a separator in it ends one there too. A byte order mark is dropped.

    Args:
        longest: a longer document, in characters, comes in pieces of about this length, cut where a single space or end
            of line stands between others; whole if None.

    Raises:
        InputError: a file is missing, is not what its name says, is not UTF-8, or holds no document.
    """
    before = 0
    for path in files.paths:
        found = False
        with _naming(path):
            for piece in _cut_documents(path, _blocks(path, files.field), longest):
                found = True
                yield piece._replace(read=before + piece.read)
            before += path.stat().st_size
        if not found:
            raise InputError(f"{path}: no text in it; give a file with at least one document")


def total_bytes(files: TextFiles) -> int:
    """Bytes of all files; those that are not there, which reading them will say, count nothing."""
    return sum(path.stat().st_size for path in files.paths if os.path.exists(path))


class _Block(NamedTuple):
    """Characters of a file in their order; `ends` says that a document ends behind them, `read` as in `Piece`."""

    text: str
    ends: bool
    read: int


def _blocks(path: Path, field: str) -> Iterator[_Block]:
    if path.suffix.lower() == ".parquet":
        yield from _table_rows(path, field)
        return
    with path.open("rb") as raw:
        zipped = path.suffix.lower() == ".gz"
        file = gzip.GzipFile(fileobj=raw) if zipped else raw
        suffix = (path.with_suffix("") if zipped else path).suffix.lower()
        if suffix in _NOT_TEXT:
            raise InputError(f"{path}: {suffix} is not read; give .jsonl, with an object in each line, or plain text")
        if suffix == ".jsonl":
            yield from _json_lines(path, file, raw, field)
        else:
            yield from _characters(path, file, raw)


def _characters(path: Path, file: io.BufferedIOBase, raw: BinaryIO) -> Iterator[_Block]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    read = 0
    ended = False
    while not ended:
        block = file.read(_BLOCK)
        if not read and (phrase := stand_in(block, may_be_a_page=True)) is not None:
            raise InputError(f"{path}: {phrase}")
        read += len(block)
        ended = not block
        try:
            text = decoder.decode(block, final=ended)
        except UnicodeDecodeError as error:
            # What is decoded has the last bytes of the block before in front of it.
            byte = read - len(error.object) + error.start
            raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {byte}); convert it to UTF-8") from None
        yield _Block(text, ended, _position(raw))


def _json_lines(path: Path, file: io.BufferedIOBase, raw: BinaryIO, field: str) -> Iterator[_Block]:
    for number in itertools.count(1):
        line = file.readline(_LONGEST_LINE + 1)
        if not line:
            return
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        if len(line) > _LONGEST_LINE:
            raise InputError(f"{where}: more than {_LONGEST_LINE:,} bytes; .jsonl has one object in each line")
        try:
            # A byte order mark can only be in the first one, and `loads` drops it.
            item = parse_json(line)
        except ValueError as error:  # JSON or UTF-8
            raise InputError(f"{where}: not JSON ({first_line(error)}); .jsonl has one object in each line") from None
        if not isinstance(item, dict):
            raise InputError(f"{where}: {type(item).__name__}, not an object; .jsonl has one object in each line")
        if field not in item:
            raise InputError(f"{where}: no field {field!r} in it; choose of {_names(item)} with --text-field")
        yield _Block(_checked(item[field], where, field), True, _position(raw))


def _position(raw: BinaryIO) -> int:
    return raw.tell() if raw.seekable() else 0  # of a pipe, nobody knows


def _table_rows(path: Path, field: str) -> Iterator[_Block]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise InputError(f"{path}: reading Parquet needs pyarrow; pip install 'gsa-jax[parquet]'") from None
    size = path.stat().st_size
    try:
        metadata = parquet.read_metadata(path)
        # Text that many rows repeat is held once; lists and structs, which the file splits up, have no such column.
        paths = (metadata.schema.column(number).path for number in range(metadata.num_columns))
        shared = [name for name in paths if name == field]
        with parquet.ParquetFile(path, metadata=metadata, read_dictionary=shared) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise InputError(f"{path}: no column {field!r} in it; choose of {_names(names)} with --text-field")
            done = 0
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[field]):
                for scalar in batch.column(0):  # not all at once: rows may name a long text often that is held once
                    value = scalar.as_py()
                    done += 1
                    where = f"{path}, row {done}"
                    yield _Block(_checked(value, where, field), True, size * done // table.metadata.num_rows)
    except (ArrowException, UnicodeDecodeError) as error:  # the latter if what is said to be text is none
        raise InputError(f"{path}: not a Parquet file that can be read ({first_line(error)})") from None


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _checked(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {field!r} is {type(value).__name__}, not text; name another field or leave it out")
    try:
        value.encode()  # JSON can hold halves of characters, which no tokenizer takes
    except UnicodeEncodeError:
        raise InputError(f"{where}: {field!r} has half of a surrogate pair in it; leave the line out") from None
    return value


def _cut_documents(path: Path, blocks: Iterable[_Block], longest: int | None) -> Iterator[Piece]:
    """Documents of a file. What has been read of one is held as blocks, so that each character is moved a few times."""
    held: list[str] = []
    tail = ""  # what may be the beginning of a separator
    begins, size, limit = True, 0, longest  # `size` of what is held; from `limit` on it is cut
    for block in blocks:
        *whole, rest = (tail + block.text).split(DOCUMENT_SEPARATOR)
        if block.ends:
            whole.append(rest)
            rest = ""
        for part in whole:
            text = "".join([*held, part]).rstrip()
            for piece in _cut(text.lstrip() if begins else text, longest):
                yield Piece(piece, begins, block.read)
                begins = False
            held, begins, size, limit = [], True, 0, longest
        kept = max(0, len(rest) - len(DOCUMENT_SEPARATOR) + 1)
        tail = rest[kept:]
        held.append(rest[:kept])
        size += kept
        if size > _LONGEST_DOCUMENT:
            raise InputError(
                f"{path}: a document of more than {_LONGEST_DOCUMENT:,} characters"
                f"{' without a space' if longest else ''}; put {DOCUMENT_SEPARATOR} between documents"
            )
        if longest is not None and limit is not None and size >= limit:
            text = "".join(held)
            *done, text = _cut(text.lstrip() if begins else text, longest) or [""]
            for piece in done:
                yield Piece(piece, begins, block.read)
                begins = False
            held, size = [text], len(text)
            limit = max(longest, 2 * size)  # a text without a place to cut is not searched block after block


def _cut(text: str, longest: int | None) -> list[str]:
    """Pieces of `longest` characters and what is left of a word, the last one aside; none of an empty text."""
    pieces, start = [], 0
    while longest is not None and (place := _BETWEEN_WORDS.search(text, start + longest)):
        pieces.append(text[start : place.start()])
        start = place.start()
    return [*pieces, text[start:]] if text else []


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give a text file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({first_line(error)})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)}); give a text file") from None
