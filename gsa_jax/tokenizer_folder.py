"""The tokenizer in a folder: which files it is, how it is opened, and what is refused before `transformers` reads it.

May be changed here: which files travel with the weights, and which configurations of a tokenizer are refused. What the
package asks of a tokenizer, and the one that does without `transformers`, is `gsa_jax.tokenizer`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsa_jax.config import CONFIG_FILE
from gsa_jax.errors import InputError, first_line
from gsa_jax.files import refuse_foreign
from gsa_jax.generation_config import GENERATION_CONFIG_FILE
from gsa_jax.json_files import read_json
from gsa_jax.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer, light_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCABULARIES = (
    TOKENIZER_FILE,
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
"""Any of which is a tokenizer, with the files beside it."""

TOKENIZER_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    GENERATION_CONFIG_FILE,
)
"""Files, and a folder, that travel with the weights, unchanged, as far as the source has them."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that travel with its weights."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary in a folder."""
    return any((folder / name).exists() for name in _VOCABULARIES)


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint or Hugging Face folder, as everything in this package uses it.

    It gives the ids and texts that `load_tokenizer`'s gives under transformers 4, and is there in hundredths of a
    second where the folder has a `tokenizer.json`; `gsa_jax.tokenizer` says when `transformers` is needed all the same.

    Raises:
        InputError: the folder has none, or it cannot be read.
    """
    folder = _with_tokenizer(folder)
    # The model says how long a text may be, in an error; the tokenizer would say so too, in a warning.
    return light_tokenizer(folder) or _from_transformers(folder, model_max_length=sys.maxsize)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint or Hugging Face folder, of `transformers`, with all that those can do.

    Importing `transformers` takes seconds; `open_tokenizer` does without where it can.

    Raises:
        InputError: the folder has none, or it cannot be read.
    """
    return _from_transformers(_with_tokenizer(folder))


def _with_tokenizer(folder: str | Path) -> Path:
    folder = Path(folder)
    refuse_foreign(folder, [*TOKENIZER_FILES, CONFIG_FILE])  # in which transformers looks for what the others lack
    if not has_tokenizer(folder):
        raise InputError(
            f"{folder}: no tokenizer in it (tokenizer.json, or vocab.json and merges.txt); copy its files there, or "
            "convert the model again with --tokenizer FOLDER"
        )
    return folder


def _from_transformers(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    _refuse_traps(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise InputError(f"{folder}: its tokenizer cannot be read ({first_line(error)})") from error


_LONGEST_TOKEN = 10_000
"""Characters; adding one of ten times as many keeps `transformers` busy for longer than ten seconds."""


def _refuse_traps(folder: Path) -> None:
    """Raises `InputError` if a configuration would lead `transformers` out of the folder, or keep it busy."""
    names = (TOKENIZER_CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", CONFIG_FILE)
    for file in (folder / name for name in names):
        try:
            values = read_json(file)
        except FileNotFoundError:
            continue
        except (ValueError, OSError) as error:
            raise InputError(f"{file}: cannot be read ({first_line(error)})") from None
        if max(_lengths(values), default=0) > _LONGEST_TOKEN:
            raise InputError(f"{file}: a token of more than {_LONGEST_TOKEN:,} characters; remove it")
        for name, value in values.items() if isinstance(values, dict) else ():
            if not name.endswith(("_file", "_files")) or value is None:
                continue
            for named in value if isinstance(value, list) else [value]:
                # Many name where a file was on the machine that wrote them. One of that name beside it goes before, but
                # not in a list of versions, of which any may be chosen.
                own = isinstance(value, str) and os.path.exists(folder / Path(value).name)
                if isinstance(named, str) and not own and Path(named).name != named and _is_somewhere(folder, named):
                    raise InputError(
                        f"{file}: {name} names {named!r}, which does not stand beside it; remove the field"
                    )


def _lengths(value: Any) -> Iterator[int]:
    """Of all texts in JSON but those of chat templates."""
    if isinstance(value, str):
        yield len(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield len(key)
            yield from _lengths(inner) if key != "chat_template" else ()
    elif isinstance(value, list):
        for inner in value:
            yield from _lengths(inner)


def _is_somewhere(folder: Path, named: str) -> bool:
    """Whether there is such a file on this machine, seen from a folder or from here."""
    return os.path.lexists(folder / named) or os.path.lexists(named)
