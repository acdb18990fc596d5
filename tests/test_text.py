"""Text as windows of tokens: each token is predicted once, in order, and no window spans two documents."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa_jax import GPTNeoConfig, InputError, load_tokenizer
from gsa_jax.config import read_config
from gsa_jax.text import read_documents, text_rows
from gsa_jax.text_files import DOCUMENT_SEPARATOR
from helpers.texts import STORIES

VOCAB, START = 50, 7


class Numbers:
    """A tokenizer for documents that are written as numbers."""

    def __call__(self, documents: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in document.split()] for document in documents]}


def config(**changes) -> GPTNeoConfig:
    values = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 12,
        "hidden_size": 8,
        "num_heads": 2,
        "num_layers": 2,
        "attention_types": ((("global", "local"), 1),),
        "bos_token_id": START,
        "eos_token_id": 3,
    }
    return GPTNeoConfig(**(values | changes))


@given(
    st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40), min_size=1, max_size=6), st.integers(2, 12)
)
@settings(deadline=None, max_examples=200)
def test_each_token_is_predicted_once(documents: list[list[int]], context: int) -> None:
    windows = text_rows([" ".join(map(str, tokens)) for tokens in documents], Numbers(), config(), context)
    assert windows.input_ids.shape == windows.attention_mask.shape == (len(windows.document), context)
    assert windows.input_ids.dtype == np.int32 and windows.attention_mask.dtype == bool
    predicted: list[list[int]] = [[] for _ in documents]
    for ids, mask, document in zip(windows.input_ids.tolist(), windows.attention_mask, windows.document, strict=True):
        real = int(mask.sum())
        assert real >= 2 and mask[:real].all(), "padding is on the right, and something is predicted"
        assert set(ids[real:]) <= {START}
        assert ids[0] == (predicted[document] or [START])[-1], "a window begins where the one before has ended"
        assert len(predicted[document]) % (context - 1) == 0, "only a document's last window has padding"
        predicted[document] += ids[1:real]
    assert predicted == documents
    assert (np.diff(windows.document) >= 0).all()


def test_the_bundled_model_reads_the_stories(story_neo: Path) -> None:
    """The oracle is the text: decoded windows are the documents again."""
    documents, tokenizer = read_documents(STORIES), load_tokenizer(story_neo)
    windows = text_rows(documents, tokenizer, read_config(story_neo / "config.json"))
    assert windows.input_ids.shape == (len(documents), 512) and len(documents) == 3
    for ids, mask, document in zip(windows.input_ids, windows.attention_mask, documents, strict=True):
        assert tokenizer.decode(ids[mask]) == DOCUMENT_SEPARATOR + document


def test_the_end_token_starts_documents_where_there_is_no_other() -> None:
    assert text_rows(["1 2"], Numbers(), config(bos_token_id=None), 4).input_ids.tolist() == [[3, 1, 2, 3]]


@pytest.mark.parametrize(
    ("documents", "changes", "context", "message"),
    [
        (["1"], {}, 13, "context = 13: must be >= 2 and at most 12"),
        (["1"], {}, 1, "context = 1: must be >= 2"),
        (["1", "1 50"], {}, None, "token id 50 is outside of the vocabulary of 50; does the tokenizer belong"),
        (["1", " "], {}, None, "document 2 has no tokens; does the tokenizer belong"),
        (["1"], {"bos_token_id": None, "eos_token_id": None}, None, "set bos_token_id or eos_token_id in the model's"),
    ],
)
def test_what_cannot_be_cut_is_refused(documents, changes, context, message) -> None:
    with pytest.raises(InputError, match=message):
        text_rows(documents, Numbers(), config(**changes), context)


def test_documents_are_what_separators_leave(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(
        f"{DOCUMENT_SEPARATOR} one é\n\ntwo \n{DOCUMENT_SEPARATOR}\n\n{DOCUMENT_SEPARATOR}three", encoding="utf-8"
    )
    assert read_documents(path) == ["one é\n\ntwo", "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give a text file"),
        (b"caf\xe9 au lait", r"not UTF-8 \(invalid continuation byte at byte 3\); convert it"),
        (b"", "no text in it; give a file with at least one document"),
        (b" \n<|endoftext|>\n", "no text in it"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "held-out.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"held-out.txt: {message}"):
        read_documents(path)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); give a text file"):
        read_documents(tmp_path)
