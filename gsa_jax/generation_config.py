"""What a model says of how text is generated with it: Hugging Face's `generation_config.json`.

May be changed here: which of its fields have a meaning here, and what stands for those that it leaves out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError

GENERATION_CONFIG_FILE = "generation_config.json"

_TOP_K_OF_SAMPLING = 50
"""What Hugging Face's `top_k` is where a file that says `do_sample` leaves it out."""

_SILENT = ("bos_token_id", "transformers_version", "use_cache", "return_dict_in_generate", "cache_implementation")
"""Fields without a bearing on which tokens are generated here. So are all whose names begin with an underscore."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "typical_p": (1.0,), "max_length": (20,),
    "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "diversity_penalty": (0.0,), "length_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,), "min_length": (0,), "guidance_scale": (1.0,), "penalty_alpha": (0.0,),
}  # fmt: skip
"""Fields that are not supported, with the values that ask for nothing. For all of them, so do null, false and []."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Defaults of generation; its fields are Hugging Face's. What is off is None.

    Attributes:
        eos_token_id: each of them ends a text.
        pad_token_id: fills a row after its end.
        do_sample: draw tokens; if False, the most likely one is taken and the next four are unused.
        temperature: > 0.
        top_k: >= 1.
        top_p: in (0, 1].
        min_p: in [0, 1].
        repetition_penalty: > 0.
        no_repeat_ngram_size: >= 1.
        min_new_tokens: >= 1.
        max_new_tokens: >= 1.
        unsupported: fields of the file that would change what is generated, but have no meaning here: `name = value`.

    Raises:
        InputError: a field is out of range.
    """

    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | None = None
    max_new_tokens: int | None = None
    unsupported: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise InputError(f"do_sample = {self.do_sample!r}: must be true or false")
        for name in ("pad_token_id", "top_k", "no_repeat_ngram_size", "min_new_tokens", "max_new_tokens"):
            value, least = getattr(self, name), int(name != "pad_token_id")
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"{name} = {value!r}: must be a whole number >= {least}")
        ranges = {"top_p": "in (0, 1]", "min_p": "in [0, 1]", "temperature": "> 0", "repetition_penalty": "> 0"}
        for name, range_ in ranges.items():
            value = getattr(self, name)
            if value is None:
                continue
            is_number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
            if is_number:
                object.__setattr__(self, name, float(value))
            if not is_number or value < 0 or (value == 0 and name != "min_p") or (value > 1 and name[-2:] == "_p"):
                raise InputError(f"{name} = {value!r}: must be a number {range_}")

    @classmethod
    def of_model(cls, config: GPTNeoConfig) -> GenerationConfig:
        """That of a model without a file: greedy, until its own end-of-sequence token."""
        return cls(eos_token_id=_ids("eos_token_id", config.eos_token_id, config))

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], config: GPTNeoConfig) -> GenerationConfig:
        """Reads the fields of a `generation_config.json`; the end-of-sequence tokens are the model's if it has none.

        Raises:
            InputError: a field is out of range.
        """
        found = {name: value for name, value in values.items() if value is not None}
        own = {field.name for field in dataclasses.fields(cls)} - {"unsupported"}
        if found.get("do_sample"):
            found = {"top_k": _TOP_K_OF_SAMPLING} | found
        for name, off in {"top_k": 0, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "repetition_penalty": 1}.items():
            if found.get(name) == off:
                del found[name]
        if not found.get("do_sample"):  # where files say so in their own way
            found = {name: value for name, value in found.items() if name not in ("temperature", "top_p") or value != 0}
        eos = values.get("eos_token_id", config.eos_token_id)
        pad = _ids("pad_token_id", found.pop("pad_token_id", None), config)
        settings: dict[str, Any] = {name: value for name, value in found.items() if name in own} | {
            "eos_token_id": _ids("eos_token_id", eos, config),
            "pad_token_id": pad[0] if pad else None,
        }
        unsupported = tuple(
            f"{name} = {json.dumps(value)}"
            for name, value in found.items()
            if name not in (*own, *_SILENT)
            and not name.startswith(("_", "output_"))
            and value not in (False, [], {}, *_WITHOUT_EFFECT.get(name, ()))
        )
        return cls(**settings, unsupported=unsupported)

    def to_hf(self) -> dict[str, Any]:
        """The fields of a `generation_config.json` that `from_hf` reads as the same."""
        values = dataclasses.asdict(self)
        del values["unsupported"]
        given = {name: value for name, value in values.items() if value is not None}
        given["eos_token_id"] = list(self.eos_token_id)
        if self.do_sample and self.top_k is None:
            given["top_k"] = 0  # left out, it would be Hugging Face's 50
        named = (setting.partition(" = ") for setting in self.unsupported)
        return given | {name: json.loads(value) for name, _, value in named}


def read_generation_config(folder: Path, config: GPTNeoConfig) -> GenerationConfig:
    """That of a model's folder; `GenerationConfig.of_model` if it has no file.

    Raises:
        InputError: the file cannot be used; the message names it.
    """
    file = folder / GENERATION_CONFIG_FILE
    remedy = "mend it, or remove it to do without"
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return GenerationConfig.of_model(config)
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{file}: not JSON ({error}); {remedy}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: not a JSON object; {remedy}")
    try:
        return GenerationConfig.from_hf(values, config)
    except InputError as error:
        raise InputError(f"{file}: {error}; {remedy}") from None


def _ids(name: str, value: Any, config: GPTNeoConfig) -> tuple[int, ...]:
    """Token ids as they may stand in a file: one, a list, or null. One that the model cannot say has no effect."""
    values = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    for token in values:
        if isinstance(token, bool) or not isinstance(token, int):
            raise InputError(f"{name} = {value!r}: must be a token id, or a list of them")
    return tuple(dict.fromkeys(token for token in values if 0 <= token < config.vocab_size))
