"""The light tokenizer against that of `transformers`, and the text of a continuation against that of the whole."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gsa_jax import InputError, load_tokenizer, open_tokenizer
from gsa_jax.assets import story_neo
from gsa_jax.tokenizer import Continuation, LightTokenizer, light_tokenizer

TEXTS = [
    "Once upon a time, there was a cat.",
    " Two  spaces\n\nand lines ",
    "caf\u00e9 \u4f60\u597d \U0001f600\U0001f1eb\U0001f1f7",
    "a<|endoftext|>b <|end|> c",
    "He said , \" no . \" It 's n't so !",
    "",
    "\u0130stanbul \u00df ligature \ufb01",
    "tabs\tand\x00zero",
]


def edit(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({key: x for key, x in (known | values).items() if x is not ...}), encoding="utf-8")


def as_bundled(folder: Path) -> None:
    pass


def as_on_the_hub(folder: Path) -> None:
    """As GPT-Neo's and TinyStories' own folders are: GPT-2's class, special tokens with flags, texts cleaned up."""
    token = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": True, "rstrip": False,
             "single_word": False}  # fmt: skip
    values = dict.fromkeys(("bos_token", "eos_token", "unk_token"), token)
    edit(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", add_prefix_space=False, add_bos_token=False,
         clean_up_tokenization_spaces=True, pad_token=None, added_tokens_decoder=..., model_max_length=4,
         **values)  # fmt: skip


def with_a_token_of_its_own(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"], "pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)


def with_truncation(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=20, pad_token="<|endoftext|>")
    backend.save(str(folder / "tokenizer.json"))


def with_a_template(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))


LIGHT = [as_bundled, as_on_the_hub, with_a_token_of_its_own, with_truncation, with_a_template]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copy(story_neo() / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("change", LIGHT, ids=lambda change: change.__name__)
def test_the_light_tokenizer_is_that_of_transformers(folder: Path, change: Callable[[Path], None]) -> None:
    change(folder)
    light, full = open_tokenizer(folder), load_tokenizer(folder)
    assert isinstance(light, LightTokenizer)
    assert light.clean_up_tokenization_spaces == full.clean_up_tokenization_spaces == (change is as_on_the_hub)

    def text_of(ids: list[int], skip: bool) -> str:
        """With the spaces that the folder wants, whatever a version of `transformers` thinks of that."""
        text = full.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        return full.clean_up_tokenization(text) if full.clean_up_tokenization_spaces else text

    for special in (True, False):
        for text in TEXTS:
            ids = full.encode(text, add_special_tokens=special, verbose=False)
            assert light.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                assert light.decode(ids, skip_special_tokens=skip) == text_of(ids, skip)
        batch = full(TEXTS, add_special_tokens=special, verbose=False)["input_ids"]
        assert light(TEXTS, add_special_tokens=special)["input_ids"] == batch
        assert light(TEXTS[0], add_special_tokens=special)["input_ids"] == batch[0]
    assert light.get_vocab() == full.get_vocab()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(light, name) == getattr(full, name), name


def adds_a_token(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", additional_special_tokens=["<|end|>"])


def of_another_class(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", tokenizer_class="GPTNeoXTokenizer")


def adds_a_prefix_space(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", add_prefix_space=True)


def without_its_end_token(folder: Path) -> None:
    values = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end|>")
    edit(folder, "tokenizer_config.json", added_tokens_decoder=..., tokenizer_class="GPT2Tokenizer")
    edit(folder, "special_tokens_map.json", **values)


def without_a_tokenizer_file(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").unlink()
    edit(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")


HEAVY = [adds_a_token, of_another_class, adds_a_prefix_space, without_its_end_token, without_a_tokenizer_file]


@pytest.mark.parametrize("change", HEAVY, ids=lambda change: change.__name__)
def test_what_only_transformers_knows_is_left_to_it(folder: Path, change: Callable[[Path], None]) -> None:
    before = open_tokenizer(folder).encode(TEXTS[3])
    change(folder)
    assert light_tokenizer(folder) is None
    opened, full = open_tokenizer(folder), load_tokenizer(folder)
    for text in TEXTS:
        assert opened.encode(text) == full.encode(text, verbose=False)
    if change in (adds_a_token, without_its_end_token):
        assert opened.encode(TEXTS[3]) != before, "the change does matter"


def test_a_long_text_is_no_warning_of_the_tokenizer(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model says how many tokens there may be, in an error."""
    edit(folder, "tokenizer_config.json", model_max_length=4)
    assert len(open_tokenizer(folder).encode(TEXTS[0])) > 4
    without_a_tokenizer_file(folder)
    assert len(open_tokenizer(folder).encode(TEXTS[0])) > 4
    assert capfd.readouterr() == ("", "")


def test_neither_transformers_nor_pytorch_is_imported() -> None:
    program = """
import sys
from gsa_jax import complete, generate, load, open_tokenizer
assert open_tokenizer(sys.argv[1]).encode("Once upon a time")
from gsa_jax.text import text_rows
assert not {"transformers", "torch"} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", program, str(story_neo())], check=True)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "none"}}'),
        ("tokenizer_config.json", "\xff"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"eos_token": 3, "added_tokens_decoder": {}}'),
    ],
)
def test_a_damaged_file_is_named(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=str(folder)):
        open_tokenizer(folder)


def byte_level() -> LightTokenizer:
    return LightTokenizer(Tokenizer.from_file(str(story_neo() / "tokenizer.json")), {}, False)


def cleaned_up() -> LightTokenizer:
    return LightTokenizer(Tokenizer.from_file(str(story_neo() / "tokenizer.json")), {}, True)


def sentence_pieces() -> LightTokenizer:
    """Words begin with a mark, and bytes stand for characters that the vocabulary does not have."""
    words = [*"abcdefghijklmnopqrstuvwxyz.,!'\u2581", "\u2581once", "\u2581upon", "\u2581a", "time"]
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    vocab |= {word: len(vocab) + n for n, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return LightTokenizer(backend, {}, False)


def word_pieces() -> LightTokenizer:
    """Lower case, words in pieces, and marks set apart: a text does not come back as it was."""
    vocab = {word: n for n, word in enumerate(["[UNK]", *"abcdefghijklmnopqrstuvwxyz.,!?'", "once", "upon", "time"])}
    vocab |= {f"##{letter}": len(vocab) + n for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return LightTokenizer(backend, {}, True)


KINDS = [byte_level, cleaned_up, sentence_pieces, word_pieces]
words = st.text(st.sampled_from("abno .,'!nt\u00e9\u4f60\U0001f600"), min_size=1, max_size=24)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_text_that_grows_is_the_text_as_a_whole(kind: Callable[[], LightTokenizer], data: st.DataObject) -> None:
    """Whatever the tokens are; and what has been given out stays."""
    tokenizer = kind()
    size = len(tokenizer.get_vocab())
    prompt = tokenizer.encode(data.draw(words))
    if data.draw(st.booleans()):
        tokens = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    else:
        tokens = tokenizer.encode(data.draw(words))
    continuation = Continuation(tokenizer, prompt)
    whole = continuation.text(tokens)
    for count in range(len(tokens) + 1):
        assert whole.startswith(continuation.settled(tokens[:count]))
    both = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    if both.startswith(continuation.prompt_text):
        assert continuation.prompt_text + whole == both
    assert both.endswith(whole)


def test_the_space_before_a_word_is_not_lost() -> None:
    """Decoded alone, the first word has none."""
    tokenizer = sentence_pieces()
    prompt, new = tokenizer.encode("once upon"), tokenizer.encode("a time")
    assert tokenizer.decode(new) == "a time"
    assert Continuation(tokenizer, prompt).text(new) == " a time"


def test_a_character_that_begins_in_the_prompt() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("\u4f60")
    assert len(ids) > 1
    assert Continuation(tokenizer, ids[:1]).text(ids[1:]) == "\u4f60"
    assert Continuation(tokenizer, []).settled(ids[:-1]) == ""


def test_tokens_that_are_added_are_special_or_text() -> None:
    backend = Tokenizer.from_file(str(story_neo() / "tokenizer.json"))
    backend.add_tokens([AddedToken("<|user|>", special=False)])
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer = LightTokenizer(backend, {}, False)
    said = tokenizer.encode(" yes<|user|>no<|end|>")
    assert Continuation(tokenizer, tokenizer.encode("So")).text(said) == " yes<|user|>no"
