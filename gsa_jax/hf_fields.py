"""Fields of a Hugging Face `config.json`: how each donor names ours, and what must not be in it.

May be changed here: these tables. What our fields are, and how they are checked, is `gsa_jax.config`; how a donor's
weights are stored, `gsa_jax.convert.donors`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from gsa_jax.errors import InputError

SPLAT_MODEL_TYPE = "gsa_gpt_neo"
"""The `model_type` of a Hugging Face folder whose attention goes through its splats; those of donors are exact there.
It has all fields by our names, and `donor`."""

MAX_LAYERS = 512
"""Ten times as many as any GPT-Neo has; a `config.json` that claims more would keep a program busy."""


@dataclasses.dataclass(frozen=True)
class DonorFields:
    """How the `config.json` of one `model_type` says what a `gsa_jax.GPTNeoConfig` is.

    Attributes:
        title: what people call such a model.
        architecture: its class in `transformers`.
        names: our field -> its own, where it has another name for it.
        aliases: its own field -> other names that Hugging Face takes for it (its `attribute_map`, inverted).
        defaults: our field -> its default, where ours is another.
        fixed: our field -> its value in every such model; its `config.json` has no field for it.
        former: fields that it once had, and that nothing reads any more.
        has_local_layers: whether its `config.json` names the kinds of layers; otherwise all are global.
    """

    title: str
    architecture: str
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    former: frozenset[str] = frozenset()
    has_local_layers: bool = False

    @property
    def own(self) -> set[str]:
        """Fields that are ours under its names."""
        return {*self.names.values(), *self.aliases}


DONORS = {
    "gpt_neo": DonorFields(
        title="GPT-Neo",
        architecture="GPTNeoForCausalLM",
        aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
        fixed={"attention_bias": False, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": False},
        has_local_layers=True,
    ),
    "gpt2": DonorFields(
        title="GPT-2",
        architecture="GPT2LMHeadModel",
        names={
            "max_position_embeddings": "n_positions",
            "hidden_size": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "intermediate_size": "n_inner",
            "resid_dropout": "resid_pdrop",
            "embed_dropout": "embd_pdrop",
            "attention_dropout": "attn_pdrop",
        },
        aliases={
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
        defaults={
            "max_position_embeddings": 1024,
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "resid_dropout": 0.1,
            "embed_dropout": 0.1,
            "attention_dropout": 0.1,
            "scale_attn_weights": True,
        },
        fixed={"attention_bias": True},
        former=frozenset({"n_ctx"}),
    ),
}
"""`model_type` -> its fields."""

FORMATS = DONORS | {
    SPLAT_MODEL_TYPE: DonorFields(
        title="model with splats",
        architecture="GSAForCausalLM",
        aliases=DONORS["gpt_neo"].aliases,
        has_local_layers=True,
    )
}
"""The same, with the one that is none of a donor."""

_NAMES_ELSEWHERE = {
    "n_head": "num_heads", "n_layer": "num_layers", "n_embd": "hidden_size", "d_model": "hidden_size",
    "n_positions": "max_position_embeddings", "n_ctx": "max_position_embeddings", "n_inner": "intermediate_size",
    "ffn_dim": "intermediate_size", "hidden_act": "activation_function", "activation": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon", "sliding_window": "window_size", "num_key_value_heads": "num_heads",
    "head_dim": "hidden_size / num_heads",
}  # fmt: skip
"""Names of other models for what our fields are. A donor does not read them, so they must not say anything else."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (True,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "pruned_heads": ({},), "quantization_config": ({},), "auto_map": ({},), "rope_scaling": ({},),
    "rope_parameters": ({},), "position_embedding_type": ("absolute",), "attention_multiplier": (1, 1.0),
    "embedding_multiplier": (1, 1.0), "residual_multiplier": (1, 1.0), "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0), "attn_logit_softcapping": (), "final_logit_softcapping": (),
    "use_parallel_residual": (False,),
    "parallel_attn": (False,), "multi_query": (False,), "alibi": (False,), "rope_theta": (), "rotary_dim": (),
    "rotary_pct": (), "rotary_emb_base": (), "attention_scale": (1, 1.0), "attn_scale": (1, 1.0),
    "softmax_scale": (1, 1.0), "query_pre_attn_scalar": (1, 1.0), "scale_embedding": (False,),
    "use_rms_norm": (False,), "num_experts": (), "num_local_experts": (),
}  # fmt: skip
"""Fields that change what a model computes, and the values, beside null, with which this is the model they describe."""

REPLACED = {
    "architectures",
    "attention_layers",
    "auto_map",
    "dtype",
    "model_type",
    "splats",
    "torch_dtype",
    "transformers_version",
}
"""Fields of a `config.json` that are written anew, and so are not carried along."""


def format_of(hf: Mapping[str, Any]) -> DonorFields:
    """How a `config.json` names our fields; as GPT-Neo does if it does not say what it is.

    Raises:
        InputError: its `model_type` is not supported.
    """
    model_type = hf.get("model_type", "gpt_neo")
    if not isinstance(model_type, str) or model_type not in FORMATS:
        raise InputError(f"model_type = {model_type!r}: only {' and '.join(map(repr, DONORS))} models are supported")
    return FORMATS[model_type]


def own_names(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields by our names, with defaults of their model where ours are others, and `donor`.

    `attention_types` is always there if the layers are named at all.

    Raises:
        InputError: the model is not supported, a field changes what is computed and is not supported, or two names of
            one field contradict.
    """
    fields, values = format_of(hf), dict(hf)
    model_type = values.get("model_type", "gpt_neo")
    if model_type == SPLAT_MODEL_TYPE:
        values.pop("auto_map", None)  # of this package's own code
    else:
        values["donor"] = model_type
    only = _WITHOUT_EFFECT | {name: (value,) for name, value in fields.fixed.items()}
    for name, harmless in only.items():
        if values.get(name) not in (None, *harmless):
            remedy = "an output head of its own is" if name == "tie_word_embeddings" else "what it stands for is"
            raise InputError(f"{name} = {json.dumps(values[name], default=str)[:100]}: {remedy} not supported")
    for alias, name in fields.aliases.items():
        if (given := values.pop(alias, None)) is not None and values.setdefault(name, given) != given:
            raise InputError(f"{alias} = {given!r} contradicts {name} = {values[name]!r}; remove one of them")
    for ours, name in fields.names.items():
        values.pop(ours, None)  # no field of this model: `refuse_other_names` sees to it
        if name in values:
            values[ours] = values.pop(name)
    values = {**fields.defaults, **values, **fields.fixed}
    if fields.has_local_layers:
        _name_layers(values)
    else:
        for name in ("attention_types", "attention_layers", "window_size"):
            if values.pop(name, None) is not None:
                raise InputError(f"{name} is no field of {fields.title}, whose layers are all global; remove it")
        values["attention_types"] = [[["global"], values["num_layers"]]]
    return values


def _name_layers(values: dict[str, Any]) -> None:
    if values.get("attention_types") is None:
        layers = values.get("attention_layers")
        if isinstance(layers, list | tuple) and len(layers) > MAX_LAYERS:
            raise InputError(f"attention_layers describes {len(layers)} layers, more than {MAX_LAYERS}")
        if isinstance(layers, list | tuple) and all(isinstance(kind, str) for kind in layers):
            values["attention_types"] = [_pattern(list(layers))]
        elif layers is not None:
            raise InputError(f"attention_layers = {layers!r}: expected the kind of each layer")
        elif "attention_types" in values:
            raise InputError("attention_types = null: name the kinds of layers there or in attention_layers")


def _pattern(layers: list[str]) -> list[Any]:
    """The shortest pattern of which these layers are repeats, and how many there are."""
    for length in range(1, len(layers)):
        repeats = len(layers) // length
        if layers[:length] * repeats == layers:
            return [layers[:length], repeats]
    return [layers, 1]


def refuse_other_names(hf: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises `InputError` if a field of another model says something else than ours, by our names in `own`."""
    fields = format_of(hf)
    others = _NAMES_ELSEWHERE | {name: name for name in fields.names}
    for other, name in others.items():
        if other in fields.own or other in fields.former:
            continue
        if hf.get(other) not in (None, own[name]):
            named = fields.names.get(name, name)
            raise InputError(
                f"{other} = {hf[other]!r} is no field of {fields.title} and contradicts {named} = {own[name]!r}; "
                f"set {named}, and remove {other}"
            )
