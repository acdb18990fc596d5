"""Fields of a Hugging Face `config.json`: other names for ours, and what must not be in it.

May be changed here: these tables. What our fields are, and how they are checked, is `gsa_jax.config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gsa_jax.errors import InputError

SPLAT_MODEL_TYPE = "gsa_gpt_neo"
"""The `model_type` of a Hugging Face folder whose attention goes through its splats; `gpt_neo` is exact there."""

MAX_LAYERS = 512
"""Ten times as many as any GPT-Neo has; a `config.json` that claims more would keep a program busy."""

ALIASES = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
"""Other names that Hugging Face's GPT-Neo takes for its fields (its `attribute_map`)."""

_NAMES_ELSEWHERE = {
    "n_head": "num_heads", "n_layer": "num_layers", "n_embd": "hidden_size", "d_model": "hidden_size",
    "n_positions": "max_position_embeddings", "n_ctx": "max_position_embeddings", "n_inner": "intermediate_size",
    "ffn_dim": "intermediate_size", "hidden_act": "activation_function", "activation": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon", "sliding_window": "window_size", "num_key_value_heads": "num_heads",
    "head_dim": "hidden_size / num_heads",
}  # fmt: skip
"""Names of other models for what our fields are. GPT-Neo does not read them, so they must not say anything else."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "tie_word_embeddings": (True,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "pruned_heads": ({},), "quantization_config": ({},), "auto_map": ({},), "rope_scaling": ({},),
    "rope_parameters": ({},), "position_embedding_type": ("absolute",), "scale_attn_weights": (False,),
    "scale_attn_by_inverse_layer_idx": (False,), "attention_multiplier": (1, 1.0), "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0), "logits_scaling": (1, 1.0), "logit_scale": (1, 1.0),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "use_parallel_residual": (False,),
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


def own_names(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields, with aliases by our names and `attention_types` always there if the layers are named at all.

    Raises:
        InputError: a field changes what is computed and is not supported, or two names of one field contradict.
    """
    values = dict(hf)
    if values.get("model_type") == SPLAT_MODEL_TYPE:
        values.pop("auto_map", None)  # of this package's own code
    for name, harmless in _WITHOUT_EFFECT.items():
        if values.get(name) not in (None, *harmless):
            remedy = "an output head of its own is" if name == "tie_word_embeddings" else "what it stands for is"
            raise InputError(f"{name} = {json.dumps(values[name], default=str)[:100]}: {remedy} not supported")
    for alias, name in ALIASES.items():
        if (given := values.pop(alias, None)) is not None and values.setdefault(name, given) != given:
            raise InputError(f"{alias} = {given!r} contradicts {name} = {values[name]!r}; remove one of them")
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
    return values


def _pattern(layers: list[str]) -> list[Any]:
    """The shortest pattern of which these layers are repeats, and how many there are."""
    for length in range(1, len(layers)):
        repeats = len(layers) // length
        if layers[:length] * repeats == layers:
            return [layers[:length], repeats]
    return [layers, 1]


def refuse_other_names(values: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises `InputError` if a field of another model says something else than ours, by our names in `own`."""
    for other, name in _NAMES_ELSEWHERE.items():
        if values.get(other) not in (None, own[name]):
            raise InputError(
                f"{other} = {values[other]!r} is no field of GPT-Neo and contradicts {name} = {own[name]!r}; "
                f"set {name}, and remove {other}"
            )
