"""Configurations of the model, as frozen dataclasses that mirror Hugging Face's field names.

May be changed here: which fields exist, how they are checked, and how they map from and to a Hugging Face
`config.json`. Nothing here touches arrays.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from gsa_jax.errors import InputError
from gsa_jax.hf_fields import (
    DONORS,
    MAX_LAYERS,
    REPLACED,
    SPLAT_MODEL_TYPE,
    format_of,
    own_names,
    refuse_other_names,
)
from gsa_jax.json_files import read_json
from gsa_jax.splat_config import LayerSplats, SplatConfig, Window, require_int

CONFIG_FILE = "config.json"

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu", "silu", "swish", "tanh")
"""Names of Hugging Face activations that `gsa_jax.layers` implements."""

ATTENTION_KINDS = ("global", "local")

DTYPES = ("float32", "bfloat16", "float16")
"""Of parameters and of the computation."""

AttentionImplementation = Literal["auto", "xla", "splash", "cudnn"]
"""How exact attention is computed: `xla` is ours, compiled from plain products; `splash` and `cudnn` are kernels.
`auto` takes the kernel of the platform for 16-bit inputs, and ours otherwise."""

_NOT_STORED = ("dtype", "remat", "attention_implementation")
"""Fields that say how a model computes, not what it is."""

_OF_LOCAL_LAYERS = ("attention_types", "attention_layers", "window_size")
"""Fields that say nothing of a donor whose layers are all global."""


def require_seed(seed: int) -> None:
    """Raises `InputError` for a seed that one of the generators of random numbers (JAX, NumPy, grain) does not take."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed = {seed!r}: must be a whole number from 0 to {2**32 - 1}")


def _require_probability(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{name} = {value!r}: must be a probability in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTNeoConfig:
    """Shape of a GPT-Neo, with the fields and defaults of `transformers.GPTNeoConfig`; or of a GPT-2, which differs by
    `attention_bias` and the two fields after it.

    Dropout probabilities are carried so that an export keeps them; a forward pass here never drops anything.

    Attributes:
        attention_types: pairs `(pattern, repeats)`; `((("global", "local"), 12),)` is 24 alternating layers.
        window_size: tokens seen by a local layer, its own included.
        intermediate_size: width of the MLP; `None` means `4 * hidden_size`.
        bos_token_id: may be beyond the vocabulary, as the default is for small models; it is not embedded unless a text
            is to start with it.
        attention_bias: the projections to queries, keys and values have biases.
        scale_attn_weights: exact scores are divided by the square root of the dimension of a head.
        scale_attn_by_inverse_layer_idx: they are divided by the number of the layer, counted from 1.
        eos_token_id: one, or several of which each ends a text; may be beyond the vocabulary, and then no text ends.
        splats: splats attached to the attention, or `None` for the plain model.
        donor: the `model_type` of the Hugging Face model that this is without its splats: how a folder names and stores
            it. Nothing is computed from it.
        dtype: of the computation, one of `DTYPES`. Not part of a `config.json`, whose `dtype` is that of the stored
            weights; nor are the fields after it.
        remat: recompute each block in the backward pass instead of keeping its activations. Layers that repeat are
            then one loop, which compiles faster; it copies their parameters, so this is for programs with gradients.
        attention_implementation: what computes exact attention, an `AttentionImplementation`.

    Raises:
        InputError: a field is out of range, or fields contradict one another.
    """

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    num_layers: int = 24
    attention_types: tuple[tuple[tuple[str, ...], int], ...] = ((("global", "local"), 12),)
    num_heads: int = 16
    intermediate_size: int | None = None
    window_size: int = 256
    activation_function: str = "gelu_new"
    resid_dropout: float = 0.0
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    attention_bias: bool = False
    scale_attn_weights: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    splats: SplatConfig | None = None
    donor: str = "gpt_neo"
    dtype: str = "float32"
    remat: bool = False
    attention_implementation: str = "auto"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "max_position_embeddings",
            "hidden_size",
            "num_layers",
            "num_heads",
            "window_size",
        ):
            require_int(name, getattr(self, name), 1)
        object.__setattr__(self, "attention_types", _freeze_attention_types(self.attention_types))
        if self.intermediate_size is not None:
            require_int("intermediate_size", self.intermediate_size, 1)
        if self.num_layers > MAX_LAYERS:
            raise InputError(f"num_layers = {self.num_layers}: more than {MAX_LAYERS}")
        for name in ("resid_dropout", "embed_dropout", "attention_dropout"):
            _require_probability(name, getattr(self, name))
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{name} = {value!r}: must be a number")
            if not 0 <= value <= sys.float_info.max:
                raise InputError(f"{name} = {value!r}: must be finite and >= 0")
        if isinstance(self.eos_token_id, list | tuple):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id) or None)
        for name, value in self._special_tokens():
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{name} = {value!r}: must be the number of a token")
        for name in ("attention_bias", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} = {getattr(self, name)!r}: must be true or false")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype = {self.dtype!r}: must be one of {', '.join(DTYPES)}")
        if self.attention_implementation not in get_args(AttentionImplementation):
            raise InputError(
                f"attention_implementation = {self.attention_implementation!r}: must be one of "
                f"{', '.join(get_args(AttentionImplementation))}"
            )
        if self.hidden_size % self.num_heads:
            raise InputError(f"num_heads = {self.num_heads} does not divide hidden_size = {self.hidden_size}")
        if self.activation_function not in ACTIVATIONS:
            raise InputError(
                f"activation_function = {self.activation_function!r} is unknown; known: {', '.join(ACTIVATIONS)}"
            )
        for kind in (kind for pattern, _ in self.attention_types for kind in pattern):
            if kind not in ATTENTION_KINDS:
                raise InputError(f"attention_types names {kind!r}; known: {', '.join(ATTENTION_KINDS)}")
        described = sum(len(pattern) * repeats for pattern, repeats in self.attention_types)
        if described != self.num_layers:
            raise InputError(f"attention_types describes {described} layers, num_layers = {self.num_layers}")
        self._check_donor()
        if self.splats is not None:
            if not self.splat_layers:
                raise InputError(f"splats.layers = {self.splats.layers!r}: the model has no such layer")
            if self.splat_layers[-1] >= self.num_layers:
                raise InputError(f"splats.layers = {self.splats.layers!r}: the model has {self.num_layers} layers")
            self.splats.of_layers(len(self.splat_layers))

    def _check_donor(self) -> None:
        if not isinstance(self.donor, str) or self.donor not in DONORS:
            raise InputError(f"donor = {self.donor!r}: must be one of {', '.join(DONORS)}")
        donor = DONORS[self.donor]
        for name, value in donor.fixed.items():
            if getattr(self, name) != value:
                raise InputError(f"{name} = {getattr(self, name)}: it is {value} in every {donor.title}")
        if "local" in self.attention_layers and not donor.has_local_layers:
            raise InputError(f"attention_types names 'local': a {donor.title} has no such layers")

    def _special_tokens(self) -> list[tuple[str, int]]:
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        named = [("bos_token_id", self.bos_token_id), *(("eos_token_id", end) for end in ends)]
        return [(name, value) for name, value in named if value is not None]

    @property
    def beyond_vocabulary(self) -> list[str]:
        """A phrase for each special token that is no token of the model: it is never generated, and never embedded."""
        return [
            f"{name} = {value} is beyond the vocabulary of {self.vocab_size} tokens"
            for name, value in self._special_tokens()
            if not 0 <= value < self.vocab_size
        ]

    @property
    def attention_layers(self) -> tuple[str, ...]:
        """`"global"` or `"local"` for each layer."""
        return tuple(kind for pattern, repeats in self.attention_types for _ in range(repeats) for kind in pattern)

    @property
    def splat_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have splats."""
        if self.splats is None:
            return ()
        if isinstance(self.splats.layers, tuple):
            return self.splats.layers
        return tuple(n for n, kind in enumerate(self.attention_layers) if self.splats.layers in ("all", kind))

    @property
    def layer_splats(self) -> dict[int, LayerSplats]:
        """What each layer with splats has, by its number."""
        layers = self.splat_layers
        return {} if self.splats is None else dict(zip(layers, self.splats.of_layers(len(layers)), strict=True))

    @property
    def windows(self) -> tuple[Window, ...]:
        """Tokens that each layer attends to exactly, the query's own included; `"all"` for all of the past."""
        kinds: dict[str, Window] = {"global": "all", "local": self.window_size}
        windows: list[Window] = [kinds[kind] for kind in self.attention_layers]
        for layer, splats in self.layer_splats.items():
            if splats.window != "all":
                windows[layer] = splats.window
        return tuple(windows)

    def with_window(self, window: Window | None = None, kept: int | None = None) -> GPTNeoConfig:
        """The same model with another exact window, or other kept keys, of its splat layers.

        Args:
            window: as it is if None. With `"all"` nothing is kept, unless `kept` says so.
            kept: as it is if None.

        Raises:
            InputError: there are no splats to attend through, or `kept` is given with `window = "all"`.
        """
        if self.splats is None:
            if window in ("all", None) and not kept:
                return self
            what = f"window = {window}" if kept is None else f"kept = {kept}"
            raise InputError(f"{what}: the model has no splats; attach and fit them first: gsa fit-init")
        change: dict[str, Window] = {} if window is None else {"window": window}
        if kept is not None or window == "all":
            change["kept"] = kept or 0
        return dataclasses.replace(self, splats=dataclasses.replace(self.splats, **change))

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def score_scales(self, layer: int) -> tuple[float, float]:
        """What a layer multiplies its queries and its keys by, so that exact scores are products of the two.

        Each takes about half, because a splat serves both: where queries are far shorter than keys, splats stand where
        no query is. The key's share is a power of two, and so is the query's where the whole is one.
        """
        whole = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        if self.scale_attn_by_inverse_layer_idx:
            whole /= layer + 1
        of_keys = 2.0 ** round(math.log2(whole) / 2)
        return whole / of_keys, of_keys

    @property
    def mlp_dim(self) -> int:
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size

    @classmethod
    def from_hf(cls, hf: Any) -> GPTNeoConfig:
        """Reads a Hugging Face configuration: a `transformers` config object or the dict of its `config.json`.

        A key `splats` written by `to_hf` is read back. Raises `InputError` if the configuration describes something
        that this model is not (another `model_type`, an untied head, fields that contradict one another).
        """
        hf = hf if isinstance(hf, Mapping) else hf.to_dict()
        values = own_names(hf)
        splats = values.get("splats")
        if splats is not None and not isinstance(splats, SplatConfig):
            try:
                splats = dict(splats)
                if splats.get("window") is None:  # how an infinite window was written before 0.1.0
                    splats["window"] = "all"
                splats = SplatConfig(**splats)
            except (TypeError, ValueError) as error:
                raise InputError(f"splats = {splats!r}: {error}") from None
        own = {field.name for field in dataclasses.fields(cls)} - {"splats", *_NOT_STORED}
        config = cls(splats=splats, **{name: value for name, value in values.items() if name in own})
        listed = None if hf.get("model_type") == SPLAT_MODEL_TYPE else values.get("attention_layers")
        if listed is not None and listed not in (config.attention_layers, list(config.attention_layers)):
            raise InputError(f"attention_layers = {listed!r} contradicts attention_types")
        refuse_other_names(
            hf,
            {field: getattr(config, field) for field in own}
            | {"intermediate_size": config.mlp_dim, "hidden_size / num_heads": config.head_dim},
        )
        return config

    def to_hf(self) -> dict[str, Any]:
        """The dict for a `config.json` that `transformers` 4 and 5 read as the donor's: as the exact model."""
        donor = DONORS[self.donor]
        values = {name: value for name, value in self._by_our_names().items() if name not in ("donor", *donor.fixed)}
        if not donor.has_local_layers:
            values = {name: value for name, value in values.items() if name not in _OF_LOCAL_LAYERS}
        named = {donor.names.get(name, name): value for name, value in values.items()}
        return {"architectures": [donor.architecture], "model_type": self.donor, **named}

    def to_hf_with_splats(self) -> dict[str, Any]:
        """The same for the classes of `gsa_jax.convert.pytorch`, which compute through the splats; by our names.

        GPT-Neo's own classes refuse it, because they know no layer of the kind `"splats"`.
        """
        kinds = enumerate(self.attention_layers)
        return self._by_our_names() | {
            "architectures": ["GSAForCausalLM"],
            "model_type": SPLAT_MODEL_TYPE,
            "tokenizer_class": "GPT2Tokenizer",  # which transformers knows of donors, if its files name no other
            "attention_layers": ["splats" if n in self.splat_layers else kind for n, kind in kinds],
        }

    def _by_our_names(self) -> dict[str, Any]:
        """All fields that are stored, as JSON has them."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in _NOT_STORED}
        values["attention_types"] = [[list(pattern), repeats] for pattern, repeats in self.attention_types]
        values["attention_layers"] = list(self.attention_layers)
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        if self.splats is None:
            del values["splats"]
        return values


def read_config(path: Path) -> GPTNeoConfig:
    """Reads a `config.json`. Raises `InputError`, naming the file, if it is missing or cannot be used."""
    values = read_config_values(path)
    try:
        return GPTNeoConfig.from_hf(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def carried_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the fields of a Hugging Face `config.json`, those for which this model has no use and others may."""
    own = {field.name for field in dataclasses.fields(GPTNeoConfig)}
    return {name: value for name, value in values.items() if name not in own | format_of(values).own | REPLACED}


def read_config_values(path: Path) -> dict[str, Any]:
    """All fields of a `config.json`; raises as `read_config` does."""
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model folder needs a config.json") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(values, dict) or "model_type" not in values:
        titles = " or ".join(fields.title for fields in DONORS.values())
        raise InputError(f"{path}: no model_type in it; expected the config.json of a {titles}")
    return values


def _freeze_attention_types(value: Any) -> tuple[tuple[tuple[str, ...], int], ...]:
    try:
        frozen = tuple((tuple(pattern), repeats) for pattern, repeats in value)
    except (TypeError, ValueError):
        raise InputError(f"attention_types = {value!r}: expected pairs [[kinds...], repeats]") from None
    for pattern, repeats in frozen:
        if not pattern or not all(isinstance(kind, str) for kind in pattern):
            raise InputError(f"attention_types = {value!r}: kinds must be names")
        require_int("attention_types repeats", repeats, 1)
    return frozen
