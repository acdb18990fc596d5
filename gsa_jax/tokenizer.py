"""Tokenizers: what the package asks of one, the light one that does without `transformers`, and text made of tokens.

Importing `transformers`, and PyTorch with it where it is installed, takes seconds. A `tokenizer.json` is read by the
`tokenizers` library in hundredths of a second; `transformers` does no more with it than add what
`tokenizer_config.json` says. `light_tokenizer` takes a folder where that adds nothing that it does not know, and
`gsa_jax.tokenizer_folder.open_tokenizer` leaves all others to `transformers`.

May be changed here: which folders the light tokenizer takes, and how the text of new tokens is told from the prompt's.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gsa_jax.errors import InputError, first_line
from gsa_jax.json_files import read_json

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend", *_GPT2)
"""Classes of `transformers` that leave a `tokenizer.json` as it is; others may change how it cuts text."""

_ENDOFTEXT = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}
"""What a GPT-2 tokenizer has unless its configuration says otherwise."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip")

_CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""What `clean_up_tokenization_spaces` replaces, in this order."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the package asks of a tokenizer: a part of what those of `transformers` have.

    Both have `bos_token_id`, `eos_token_id` and `pad_token_id` as well; `transformers` makes them when they are asked
    for, which a protocol does not see.
    """

    clean_up_tokenization_spaces: bool
    """Whether decoded text loses the spaces before punctuation."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(
        self, token_ids: Any, *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str: ...

    def __call__(self, text: Any, *, add_special_tokens: bool = True, verbose: bool = True) -> Mapping[str, Any]:
        """`{"input_ids": ...}`: the ids of a text, or those of each text of a list."""
        ...

    def get_vocab(self) -> dict[str, int]: ...


class LightTokenizer:
    """A `tokenizer.json`, with the part of the interface of `transformers` that `Tokenizer` names."""

    def __init__(
        self, backend: tokenizers.Tokenizer, special: Mapping[str, str], clean_up_tokenization_spaces: bool
    ) -> None:
        self._backend = backend
        self._special = special
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """That of the library `tokenizers`, by the name that it has in `transformers`."""
        return self._backend

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    def _id(self, name: str) -> int | None:
        return self._backend.token_to_id(self._special[name]) if name in self._special else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; those that the tokenizer adds to every text, if any, are special tokens."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of ids; cleaned up as the tokenizer's configuration says if None."""
        text = self._backend.decode([int(token) for token in token_ids], skip_special_tokens=skip_special_tokens)
        cleans = clean_up_tokenization_spaces
        return _cleaned(text) if (self.clean_up_tokenization_spaces if cleans is None else cleans) else text

    def __call__(
        self, text: str | Sequence[str], *, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, Any]:
        del verbose  # it never warns
        if isinstance(text, str):
            return {"input_ids": self.encode(text, add_special_tokens=add_special_tokens)}
        found = self._backend.encode_batch_fast(list(text), add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in found]}

    def get_vocab(self) -> dict[str, int]:
        """Ids by tokens, added ones included."""
        return self._backend.get_vocab(with_added_tokens=True)


def light_tokenizer(folder: Path) -> LightTokenizer | None:
    """The tokenizer of a folder without `transformers`; None if only that knows what the folder says.

    Raises:
        InputError: a file cannot be read.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        return None
    import tokenizers

    try:
        described = _read_json(folder / TOKENIZER_FILE)
        config = _read_json(folder / TOKENIZER_CONFIG_FILE)
        if "added_tokens_decoder" not in config:  # where there is none, older files have the rest
            config |= {"added_tokens": _read_json(folder / "added_tokens.json")}
            config |= _read_json(folder / "special_tokens_map.json")
        if config.get("tokenizer_class") in (None, *_GPT2):  # GPT-Neo's own class is GPT-2's
            config = _ENDOFTEXT | config
        if (padding := described.get("padding")) is not None:
            config = {"pad_token": padding["pad_token"]} | config
        if not _adds_nothing(config, described):
            return None
        backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except InputError:
        raise
    except Exception as error:  # the library raises bare exceptions, and a damaged file may hold anything
        raise InputError(f"{folder}: its tokenizer cannot be read ({first_line(error)})") from error
    backend.no_truncation()
    backend.no_padding()
    special = {name: _content(config[name]) for name in _SPECIAL if config.get(name) is not None}
    return LightTokenizer(backend, special, bool(config.get("clean_up_tokenization_spaces", False)))


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    values = read_json(file)
    if not isinstance(values, dict):
        raise InputError(f"{file}: not a JSON object; restore it from where the model came from")
    return values


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _adds_nothing(config: Mapping[str, Any], described: Mapping[str, Any]) -> bool:
    """Whether `tokenizer_config.json` says nothing of how text is cut that is not in `tokenizer.json` as well."""
    if config.get("tokenizer_class") not in (None, *_PLAIN) or "auto_map" in config:
        return False
    if any(config.get(name) for name in ("add_bos_token", "add_eos_token", "split_special_tokens")):
        return False
    prefix = bool(config.get("add_prefix_space", False))
    if (described.get("pre_tokenizer") or {}).get("add_prefix_space", prefix) != prefix:
        return False
    extra = config.get("extra_special_tokens") or []
    listed = [*(config.get("additional_special_tokens") or []), *(extra.values() if isinstance(extra, dict) else extra)]
    special = [config[name] for name in _SPECIAL if config.get(name) is not None] + listed
    known = {token["content"]: token for token in described.get("added_tokens") or []}
    flags = [*_FLAGS, "normalized"] if described.get("normalizer") else _FLAGS
    for token in special:
        found = known.get(_content(token))
        if found is None or not found["special"]:
            return False
        if isinstance(token, dict) and any(token.get(flag, found[flag]) != found[flag] for flag in flags):
            return False
    if any(text not in known or known[text]["id"] != number for text, number in config.get("added_tokens", {}).items()):
        return False
    return all(
        (found := known.get(token["content"])) is not None
        and found["id"] == int(number)
        and all(token.get(flag, found[flag]) == found[flag] for flag in (*_FLAGS, "normalized", "special"))
        for number, token in config.get("added_tokens_decoder", {}).items()
    )


def _cleaned(text: str) -> str:
    for found, instead in _CLEANED:
        text = text.replace(found, instead)
    return text


class Continuation:
    """The text of tokens that follow a prompt: that of both together, without that of the prompt.

    Decoded alone, the new tokens may lose the space before their first word, or the first half of a character may be
    in the prompt. Special tokens have no text.

    Args:
        prompt: ids.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._prompt = list(prompt)
        self.prompt_text = self._decode(self._prompt)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of these tokens after the prompt."""
        whole = self._decode([*self._prompt, *tokens])
        if whole.startswith(self.prompt_text):
            return whole[len(self.prompt_text) :]
        return whole[len(os.path.commonprefix([self.prompt_text, whole])) :]  # noqa: RUF071 (these are no paths)

    def settled(self, tokens: Sequence[int]) -> str:
        """The part of their text that stays as it is whatever follows.

        What may change is a character whose bytes are not all there, a run of tokens that are a byte each, which are
        text only if the whole run is, and, where spaces are cleaned up, the last two words: `n` and `'` become `n't`.
        """
        settled = len(tokens)
        while settled and tokens[settled - 1] in self._bytes:
            settled -= 1
        text = self.text(tokens[:settled]).rstrip("\ufffd")
        if not self._tokenizer.clean_up_tokenization_spaces:
            return text
        before, *last = text.rsplit(" ", 2)
        return before if len(last) == 2 else ""

    @functools.cached_property
    def _bytes(self) -> set[int]:
        vocabulary = self._tokenizer.get_vocab()
        return {vocabulary[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in vocabulary}

    def _decode(self, tokens: list[int]) -> str:
        # Versions of `transformers` differ in whether they clean up the text of a BPE tokenizer that asks for it.
        tokenizer = self._tokenizer
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return _cleaned(text) if tokenizer.clean_up_tokenization_spaces else text
