"""Rows of training text: which tokens are in them, in which order they come, and how processes share them.

May be changed here: how a row is cut. The oracle packs documents with lists.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from gsa_jax.config import GPTNeoConfig, read_config
from gsa_jax.errors import InputError
from gsa_jax.text_files import DOCUMENT_SEPARATOR, TextFiles
from gsa_jax.tokenizer_folder import load_tokenizer
from gsa_jax.train.data import read_tokens, row_batches
from helpers.texts import STORIES

START, CONTEXT, BATCH = 0, 8, 4
CONFIG = GPTNeoConfig(
    vocab_size=27,
    max_position_embeddings=16,
    hidden_size=4,
    num_layers=1,
    num_heads=1,
    attention_types=((("global",), 1),),
    bos_token_id=START,
    eos_token_id=START,
)
DOCUMENTS = ["abcdefghijklmnopqrstuvwxyz", "a", "hello", "bc", "thequickbrownfoxjumpsoverthelazydog" * 4, "xyz" * 5]
"""All of them are cut by rows of 8, or share one."""


def letters(documents, **_):
    """A tokenizer: a is 1, b is 2."""
    return {"input_ids": [[ord(letter) - ord("a") + 1 for letter in document] for document in documents]}


def packed() -> list[tuple[list[int], list[int]]]:
    """The rows of `DOCUMENTS`: ids, and numbers of documents in the row."""
    stream: list[tuple[int, int]] = []
    for number, ids in enumerate(letters(DOCUMENTS)["input_ids"]):
        stream += [(token, number) for token in [START, *ids]]
    rows = []
    for begin in range(0, len(stream) - CONTEXT + 1, CONTEXT - 1):
        row = stream[begin : begin + CONTEXT]
        rows.append(([token for token, _ in row], [number - row[0][1] + 1 for _, number in row]))
    return rows


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(DOCUMENT_SEPARATOR.join(DOCUMENTS), encoding="utf-8")
    return path


def batches(path: Path, **changes):
    settings = {"context": CONTEXT, "batch_size": BATCH, "seed": 0} | changes
    return row_batches(read_tokens(TextFiles((path,)), letters, CONFIG), CONFIG, **settings)


def first_rows(iterator, count: int) -> list[tuple[list[int], list[int]]]:
    rows = []
    while len(rows) < count:
        batch = next(iterator)
        assert set(batch) == {"input_ids", "segment_ids"}
        assert all(array.dtype == np.int32 and array.shape[1] == CONTEXT for array in batch.values())
        rows += zip(batch["input_ids"].tolist(), batch["segment_ids"].tolist(), strict=True)
    return rows[:count]


def assert_same_batches(found, expected) -> None:
    for name in ("input_ids", "segment_ids"):
        assert np.array_equal(found[name], expected[name]), name


def test_each_epoch_holds_every_row_once_in_an_order_of_its_own(text):
    expected = packed()
    assert len(expected) % BATCH, "so that a batch spans two epochs"
    found = first_rows(batches(text), 3 * len(expected))
    epochs = [found[begin : begin + len(expected)] for begin in range(0, len(found), len(expected))]
    for epoch in epochs:
        assert sorted(epoch) == sorted(expected)
    assert epochs[0] != expected and epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert first_rows(batches(text), len(found)) == found
    assert first_rows(batches(text, seed=1), len(expected)) != epochs[0]


def test_an_epoch_predicts_each_token_of_the_stream_once(text):
    """All but the first, and fewer than a row at the end. A document's last token predicts the next one's start."""
    rows = [row for row, _ in packed()]
    stream = [token for ids in letters(DOCUMENTS)["input_ids"] for token in (START, *ids)]
    predicted = list(itertools.chain.from_iterable(row[1:] for row in rows))
    assert predicted == stream[1 : len(predicted) + 1] and len(stream) - 1 - len(predicted) < CONTEXT - 1
    assert sorted(first_rows(batches(text), len(rows))) == sorted(packed())


def test_documents_are_numbered_within_a_row_also_one_that_began_before_it(text):
    """Whether a row begins with a start token or in the middle of a document, its first document is number 1."""
    by_ids = {tuple(ids): segments for ids, segments in first_rows(batches(text), len(packed()))}
    assert by_ids[(14, 15, 16, 17, 18, 19, 20, 21)] == [1, 1, 1, 1, 1, 1, 1, 1]
    assert by_ids[(21, 22, 23, 24, 25, 26, START, 1)] == [1, 1, 1, 1, 1, 1, 2, 2]
    assert by_ids[(1, START, 8, 5, 12, 12, 15, START)] == [1, 2, 2, 2, 2, 2, 2, 3]
    assert by_ids[(START, 2, 3, START, 20, 8, 5, 17)] == [1, 1, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(text, processes):
    alone = batches(text)
    together = [batches(text, process=process, processes=processes) for process in range(processes)]
    for _ in range(15):
        whole = first_rows(alone, BATCH)
        shares = [first_rows(iterator, BATCH // processes) for iterator in together]
        assert sorted(itertools.chain.from_iterable(shares)) == sorted(whole)


@pytest.mark.parametrize("processes", [1, BATCH])
def test_a_batch_may_be_one_row(text, processes):
    """Of the run, or of each process: the same rows one by one."""
    rows = 3 * len(packed()) // BATCH * BATCH
    together = [batches(text, batch_size=processes, process=n, processes=processes) for n in range(processes)]
    found = [row for _ in range(rows // processes) for share in together for row in first_rows(share, 1)]
    for begin in range(0, rows, BATCH):
        assert sorted(found[begin : begin + BATCH]) == sorted(first_rows(batches(text), rows)[begin : begin + BATCH])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_saved_state_goes_on_with_the_next_batch_also_on_more_processes(text, processes):
    iterator = batches(text)
    for _ in range(13):  # into the second epoch
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = [batches(text, process=process, processes=processes) for process in range(processes)]
    for share in resumed:
        share.set_state(state)
    for _ in range(10):
        following, shares = next(iterator), [next(share) for share in resumed]
        if processes == 1:
            assert_same_batches(shares[0], following)
        found = [first_rows(iter([share]), BATCH // processes) for share in shares]
        assert sorted(itertools.chain.from_iterable(found)) == sorted(first_rows(iter([following]), BATCH))


def test_a_file_of_token_ids_is_the_text_it_was_made_from(text, tmp_path, story_neo):
    """Also with a real tokenizer, whose ids are taken document by document."""
    stream = [token for ids in letters(DOCUMENTS)["input_ids"] for token in (START, *ids)]
    np.array(stream, "<u2").tofile(tmp_path / "letters.bin")
    tokenizer, config = load_tokenizer(story_neo), read_config(story_neo / "config.json")
    stories = STORIES
    documents = [part.strip() for part in stories.read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)]
    ids = [[START, *tokenizer(part, add_special_tokens=False)["input_ids"]] for part in documents if part]
    np.array(list(itertools.chain.from_iterable(ids)), "<u2").tofile(tmp_path / "stories.bin")
    settings = {"context": CONTEXT, "batch_size": BATCH, "seed": 3}
    pairs = [
        (batches(text, seed=3), batches(tmp_path / "letters.bin", seed=3)),
        tuple(
            row_batches(read_tokens(TextFiles((path,)), tokenizer, config), config, **settings)
            for path in (stories, tmp_path / "stories.bin")
        ),
    ]
    for from_text, from_ids in pairs:
        for _ in range(12):
            assert_same_batches(next(from_ids), next(from_text))


def test_a_file_that_cannot_be_used_is_refused(text, tmp_path):
    def refused(name: str, content: bytes | None, *words: str, **changes) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError) as error:
            batches(path, **changes)
        for word in (str(path), *words):
            assert word in str(error.value) and "\n" not in str(error.value)

    refused("empty.bin", b"", "0 bytes")
    refused("odd.bin", b"\0\0\1", "3 bytes", "gsa tokenize")
    refused("outside.bin", np.array([0, 26, 27, 3] * 9, "<u2").tobytes(), "token id 27", "vocabulary of 27")
    refused("short.bin", np.arange(7, dtype="<u2").tobytes(), "7 tokens", "row of 8", "--context")
    refused("missing.bin", None, "no such file")
    refused("missing.txt", None, "no such file")
    refused("empty.txt", b" \n", "no text")
    refused("latin.txt", b"na\xefve", "not UTF-8")
    refused("short.txt", b"abcdef", "7 tokens", "row of 8")
    (tmp_path / "folder.bin").mkdir()
    refused("folder.bin", None, "cannot be read")
    assert len(first_rows(batches(text, context=8), 1)) == 1


@pytest.mark.parametrize("context", [-1, 1, 17])
def test_a_context_that_the_model_has_no_positions_for_is_refused(text, context):
    with pytest.raises(InputError, match=rf"context = {context}: must be >= 2 and at most 16"):
        batches(text, context=context)


def test_a_batch_that_processes_cannot_share_is_refused(text):
    with pytest.raises(InputError, match="batch_size = 4: must be a multiple of the number of processes, 3"):
        batches(text, process=0, processes=3)


def test_one_row_is_enough_and_comes_in_every_place(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("abcdefg", encoding="utf-8")
    assert first_rows(batches(path), 9) == [([START, 1, 2, 3, 4, 5, 6, 7], [1] * 8)] * 9
