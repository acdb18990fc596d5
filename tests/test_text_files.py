"""Files of text: each format gives the documents that were written, whatever blocks they are read in.

May be changed here: formats and bad files. The oracles are the documents themselves, what `str.split` makes of a whole
file, and the tokenizer's own ids of a whole document.
"""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

import gsa_jax.text
import gsa_jax.text_files
from gsa_jax import InputError, load_tokenizer, open_tokenizer
from gsa_jax.config import GPTNeoConfig, read_config
from gsa_jax.text import read_documents, stream_tokens
from gsa_jax.text_files import DOCUMENT_SEPARATOR, TextFiles, read_pieces
from gsa_jax.train.data import read_tokens
from helpers.texts import STORIES, TOLD

DOCUMENTS = ["One.\n\n  Indented, é and 😀.", "two", '{"text": "three"}', "  four\t", "five\u2028six"]
STRIPPED = [document.strip() for document in DOCUMENTS]
BOM = "\ufeff".encode()


def plain(path: Path, documents: list[str], field: str) -> None:
    path.write_bytes(BOM + DOCUMENT_SEPARATOR.join(documents).encode())


def json_lines(path: Path, documents: list[str], field: str) -> None:
    items = ({"id": number, field: document} for number, document in enumerate(documents))
    path.write_bytes(BOM + b"\r\n\r\n".join(json.dumps(item, ensure_ascii=False).encode() for item in items))


def table(path: Path, documents: list[str], field: str) -> None:
    columns = {"id": list(range(len(documents))), field: documents}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)


def zipped(write: Callable[[Path, list[str], str], None]) -> Callable[[Path, list[str], str], None]:
    def write_zipped(path: Path, documents: list[str], field: str) -> None:
        write(path, documents, field)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_zipped


WRITERS = {
    ".txt": plain,
    "": plain,
    ".txt.gz": zipped(plain),
    ".jsonl": json_lines,
    ".JSONL.GZ": zipped(json_lines),
    ".parquet": table,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_each_format_gives_the_documents(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"my text{suffix}"
    WRITERS[suffix](path, DOCUMENTS, "text")
    assert read_documents(path) == STRIPPED
    assert read_documents(str(path), 2) == STRIPPED[:2]


def test_files_are_read_in_their_order_each_in_its_format(tmp_path: Path) -> None:
    paths = []
    for number, (suffix, write) in enumerate(WRITERS.items()):
        paths.append(tmp_path / f"part{suffix}")
        write(paths[-1], [f"{number}: {document}" for document in DOCUMENTS], "story")
    expected = [f"{n}: {document}".strip() for n in range(len(WRITERS)) for document in DOCUMENTS]
    assert read_documents(TextFiles(tuple(paths), "story")) == expected
    read = [piece.read for piece in read_pieces(TextFiles(tuple(paths), "story"))]
    assert read == sorted(read) and read[-1] == sum(path.stat().st_size for path in paths)


def test_a_separator_ends_a_document_in_every_format(tmp_path: Path) -> None:
    for suffix, write in WRITERS.items():
        write(tmp_path / f"text{suffix}", ["one", f" two {DOCUMENT_SEPARATOR}\n{DOCUMENT_SEPARATOR}three"], "text")
        assert read_documents(tmp_path / f"text{suffix}") == ["one", "two", "three"], suffix


CONTENT = st.lists(
    st.sampled_from(
        ["a", "bc", " ", "  ", "\n", "\r\n", "\r", "é", "😀", "'s", "<|endof", DOCUMENT_SEPARATOR, "\u3000", "."]
    )
).map("".join)


@given(content=CONTENT, block=st.integers(1, 7), longest=st.none() | st.integers(1, 6))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_block_and_no_piece_changes_a_document(
    tmp_path: Path, content: str, block: int, longest: int | None
) -> None:
    path = tmp_path / "text"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gsa_jax.text_files, "_BLOCK", block)
        read = content.replace("\r\n", "\n").replace("\r", "\n")
        expected = [stripped for part in read.split(DOCUMENT_SEPARATOR) if (stripped := part.strip())]
        if not expected:
            with pytest.raises(InputError, match="no text in it"):
                list(read_pieces(TextFiles((path,)), longest))
            return
        pieces = list(read_pieces(TextFiles((path,)), longest))
    documents: list[str] = []
    for piece in pieces:
        if piece.begins:
            documents.append("")
        documents[-1] += piece.text
        assert piece.begins or re.match(r"[ \n]\S", piece.text)
        if longest is not None:  # it is cut at the first place behind `longest`
            assert not re.search(r"\S[ \n]\S", piece.text[longest:])
    assert documents == expected


@pytest.fixture(scope="module")
def bundled(story_neo: Path) -> tuple[object, GPTNeoConfig]:
    return load_tokenizer(story_neo), read_config(story_neo / "config.json")


def whole(documents: list[str], tokenizer, config: GPTNeoConfig) -> list[int]:
    rows = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return [token for row in rows for token in (config.bos_token_id, *row)]


def streamed(path: Path, tokenizer, config: GPTNeoConfig) -> list[int]:
    """In the smallest pieces and batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gsa_jax.text, "_PIECE", 1)
        patch.setattr(gsa_jax.text, "_AT_ONCE", 5)
        patch.setattr(gsa_jax.text_files, "_BLOCK", 16)
        return np.concatenate(list(stream_tokens(TextFiles((path,)), tokenizer, config))).tolist()


@given(
    st.lists(
        st.sampled_from(
            [
                " ",
                "\n",
                "\t",
                "  ",
                "it's",
                "I'll",
                "'",
                "'ve",
                "word",
                "Word",
                "12",
                "é",
                "😀",
                "!?",
                "-",
                "\xa0",
                "日本",
                "_",
            ]
        )
        | st.characters(exclude_categories=["Cs"]),
        max_size=30,
    ).map("".join)
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_of_pieces_are_those_of_the_whole(tmp_path: Path, bundled, text: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(text.encode())
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff").strip()
    if text and DOCUMENT_SEPARATOR not in text:
        assert streamed(path, *bundled) == whole([text], *bundled)


def test_tokens_of_stories_are_those_of_whole_stories(bundled) -> None:
    tokenizer, config = bundled
    for one in (tokenizer, open_tokenizer(gsa_jax.assets.story_neo())):
        assert gsa_jax.text._may_be_cut(one), "GPT-Neo's long documents are cut"
    assert streamed(STORIES, tokenizer, config) == whole(read_documents(STORIES), tokenizer, config)


@pytest.mark.parametrize("change", ["normalizer", "prefix space", "added token", "stripping token"])
def test_a_tokenizer_that_sees_further_than_a_word_gets_whole_documents(tmp_path, story_neo: Path, change: str) -> None:
    """With each of them, pieces alone would have other tokens."""
    tokenizer, config = load_tokenizer(story_neo), read_config(story_neo / "config.json")
    backend = tokenizer.backend_tokenizer
    match change:
        case "normalizer":
            backend.normalizer = normalizers.Strip()
        case "prefix space":
            backend.pre_tokenizer.add_prefix_space = True
        case "added token":
            tokenizer.add_tokens(["one two"])
        case "stripping token":
            tokenizer.add_tokens([type(next(iter(tokenizer.added_tokens_decoder.values())))("two", rstrip=True)])
    config = GPTNeoConfig(**{**config.__dict__, "vocab_size": 1100})
    path = tmp_path / "text"
    path.write_text("zero one two\nthree four")
    expected = whole(["zero one two\nthree four"], tokenizer, config)
    assert streamed(path, tokenizer, config) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gsa_jax.text, "_may_be_cut", lambda tokenizer: True)
        assert streamed(path, tokenizer, config) != expected


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1024, "<u2"), (2**16, "<u2"), (2**16 + 1, "<i4")])
def test_ids_are_as_small_as_the_vocabulary_allows(bundled, vocabulary: int, dtype: str) -> None:
    tokenizer, config = bundled
    config = GPTNeoConfig(**{**config.__dict__, "vocab_size": vocabulary})
    tokens = read_tokens(TextFiles((STORIES,)), tokenizer, config)
    assert tokens.ids.dtype == dtype and tokens.ids.tolist() == whole(read_documents(STORIES), tokenizer, config)


def test_progress_follows_the_bytes(bundled) -> None:
    shown, at = [], []

    def progress(names):
        for name in names:
            shown.append(name)
            yield name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gsa_jax.text, "_AT_ONCE", 2**14)
        for _ in stream_tokens(TextFiles((TOLD,) * 20), *bundled, progress):
            at.append(len(shown))
    megabytes = round(20 * TOLD.stat().st_size / 1e6)
    assert shown == [f"MB {step}" for step in range(1, megabytes + 1)] and at == sorted(at)
    assert all(abs(now - megabytes * n / len(at)) < 2 for n, now in enumerate(at, 1))


def refused(path: Path, content: bytes, field: str = "text") -> str:
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_documents(TextFiles((path,), field))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "line 1: not JSON ('utf-8' codec can't decode"),
        ("a.jsonl", b'[{"text": "one"}]', "line 1: list, not an object; .jsonl has one object in each line"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "no field 'text' in it; choose of 'body', 'id' with --text-field"),
        ("a.jsonl", b'\n{"text": null}', "line 2: 'text' is NoneType, not text; name another field or leave it out"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "line 1: 'text' has half of a surrogate pair in it"),
        ("a.jsonl", b"", "no text in it"),
        ("a.txt.gz", b"plain", "not a whole gzip file (Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"one " * 999, mtime=0)[:-9], "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}', mtime=0)[:20] + b"\0\0\0\0\0\0", "not a whole gzip file"),
        ("a.txt", "naïve".encode("utf-16"), "not UTF-8 (invalid start byte at byte 0); convert it to UTF-8"),
        ("a.txt", b"\xef\xbb\xbf" + b"x" * 10**5 + b"\xe9 ", "at byte 100003)"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        ("a.json", b'[{"text": "one"}]', ".json is not read; give .jsonl"),
        ("a.csv.gz", gzip.compress(b"text\none\n", mtime=0), ".csv is not read; give .jsonl"),
        ("a.tsv", b"text\tlabel\none\t1\n", ".tsv is not read; give .jsonl"),
        ("a.NDJSON", b'{"text": "one"}\n', ".ndjson is not read; give .jsonl"),
        ("a.arrow", b"ARROW1\x00\x00", ".arrow is not read; give .jsonl"),
        ("a.parquet", b"PAR1", "not a Parquet file that can be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_place(tmp_path, name: str, content: bytes, words: str) -> None:
    assert words in refused(tmp_path / name, content)


def test_tables_are_refused_with_the_row_and_the_names(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x", None], "b": [1, 2]}), tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    assert "no column 'text' in it; choose of 'a', 'b'" in refused(tmp_path / "t.parquet", content)
    assert "row 2: 'a' is NoneType" in refused(tmp_path / "t.parquet", content, "a")
    assert "row 1: 'b' is int" in refused(tmp_path / "t.parquet", content, "b")
    with pytest.raises(InputError, match=r"missing\.parquet: no such file"):
        read_documents(tmp_path / "missing.parquet")
    with pytest.raises(InputError, match="no text given"):
        read_documents(TextFiles(()))


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch) -> None:
    table(tmp_path / "t.parquet", ["one"], "text")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow; pip install 'gsa-jax\[parquet\]'"):
        read_documents(tmp_path / "t.parquet")


def test_the_command_makes_the_same_ids_of_every_format(tmp_path: Path, run_gsa, story_checkpoint: Path) -> None:
    documents = read_documents(STORIES)
    parts = []
    for suffix, part in ((".jsonl.gz", documents[:1]), (".txt", documents[1:2]), (".parquet", documents[2:])):
        parts.append(tmp_path / f"part{suffix}")
        {**WRITERS, ".jsonl.gz": zipped(json_lines)}[suffix](parts[-1], part, "story")
    outcome = run_gsa("tokenize", story_checkpoint, *parts, tmp_path / "parts.bin", "--text-field", "story")
    assert (outcome.code, outcome.err) == (0, "")
    assert run_gsa("tokenize", story_checkpoint, STORIES, tmp_path / "one.bin").out == outcome.out
    assert (tmp_path / "parts.bin").read_bytes() == (tmp_path / "one.bin").read_bytes()
    tokens = whole(documents, load_tokenizer(story_checkpoint), read_config(story_checkpoint / "config.json"))
    assert np.fromfile(tmp_path / "one.bin", "<u2").tolist() == tokens
    assert outcome.out == f"{len(tokens):,} tokens\n"


@pytest.mark.slow
@pytest.mark.parametrize("separator", [DOCUMENT_SEPARATOR, "\n"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, story_checkpoint: Path, separator: str) -> None:
    """Many documents, or a single one; of lists of all ids, the difference would be 400 MB."""
    told = separator.join(read_documents(TOLD))
    peaks = []
    for megabytes in (4, 16):
        copies = megabytes * 10**6 // len(told) + 1
        (tmp_path / "text").write_text(separator.join([told] * copies), encoding="utf-8")
        (tmp_path / "out.bin").unlink(missing_ok=True)
        gsa = [
            sys.executable,
            "-m",
            "gsa_jax.cli",
            "tokenize",
            story_checkpoint,
            tmp_path / "text",
            tmp_path / "out.bin",
        ]
        measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2); " + (
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", measure, *map(str, gsa)], check=True, capture_output=True, text=True
        )
        peaks.append(int(done.stdout) * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 40e6, peaks
