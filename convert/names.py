"""Which tensor of a PyTorch checkpoint is which parameter, and which is none.

May be changed here: wrappers that are stripped, buffers that are ignored, and the dialects of splat names. How a donor
names and stores everything else is `gsa_jax.convert.donors`; our names are those of `gsa_jax.parameters`. Pure
functions of names and shapes; no file is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from gsa_jax.config import GPTNeoConfig
from gsa_jax.convert.donors import LAYOUTS, Piece
from gsa_jax.errors import InputError, listed
from gsa_jax.hf_fields import DONORS
from gsa_jax.parameters import TOKEN_EMBEDDING, attention_tensor, expected_shapes, shape_problems
from gsa_jax.splat_config import SplatConfig

_WRAPPERS = (
    "module",
    "model",
    "base_model",
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
"""Parts of names that DataParallel, trainers, PEFT, `torch.compile`, Fabric, FSDP and activation checkpointing put
before a name or inside of it, where a module is wrapped."""

_HEADS = ("score", "classifier", "qa_outputs", "multiple_choice_head", "v_head")
"""First parts of names of heads that stand in for the language model's, or beside it: of Hugging Face's for
classification and for answering questions, and of TRL's for values."""

_BASE_PREFIX = "transformer."
LM_HEAD = "lm_head.weight"

_IN_ATTENTION = re.compile(r"transformer\.h\.(\d+)\.attn\.(?:attention\.)?(\w+)")
"""What stands beside the projections, in GPT-Neo and in GPT-2."""

_MASK_BUFFERS = ("bias", "masked_bias")

_SPLAT_LEAVES = {
    "unused_gsa_splat_centers": "splat_centers",
    "unused_gsa_splat_scales": "splat_log_scales",
    "gsa_splat_centers": "splat_centers",
    "gsa_splat_log_scales": "splat_log_scales",
    "gsa_splat_amplitudes": "splat_log_amplitudes",
}

_SOFTMAXED = ("gsa_splat_amplitudes",)
"""Leaves whose softmax over splats are the amplitudes."""

_NO_MEANING_HERE = {
    "gsa_mix_weight": "exact and splat attention are not mixed here",
    "gsa_strength": "exact and splat attention are not mixed here",
    "temperature": "scores have no temperature here",
    "position_scale_factor": "splats do not depend on positions here",
    "long_range_boost": "splats do not depend on positions here",
}

EXPORT_LEAVES = {
    "unused": {"splat_centers": "unused_gsa_splat_centers", "splat_log_scales": "unused_gsa_splat_scales"},
    "gsa": {"splat_centers": "gsa_splat_centers", "splat_log_scales": "gsa_splat_log_scales"},
}
"""Dialect -> our leaf -> the prototype's leaf, for export."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a source checkpoint becomes a model.

    Attributes:
        config: of the model, with the splats that the source carries.
        sources: our name -> the tensor in the source that it lies in, and where, for every parameter that the source
            provides; parameters of one tensor follow one another.
        dialect: `"plain"` without splats, else a key of `EXPORT_LEAVES`; `"gsa"` covers its extensions as well.
        ignored: name in the source -> why it is left behind.
        softmaxed: names in the source of tensors whose logarithmic softmax over the last axis is the parameter.
        tied_head: name in the source of an output head that must equal the token embedding, if there is one.
        wrappers: parts of the source's names that were left out, such as `"module"`.
    """

    config: GPTNeoConfig
    sources: dict[str, Piece]
    dialect: str
    ignored: dict[str, str]
    softmaxed: frozenset[str]
    tied_head: str | None
    wrappers: tuple[str, ...]


def plan(config: GPTNeoConfig, model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """Assigns every source tensor parameters or a reason to ignore it.

    Args:
        config: from the source's `config.json`.
        model_type: that it names.
        shapes: name -> shape of every tensor in the source.

    Raises:
        InputError: tensors are missing, unexpected or of a wrong shape, by source name; or are of something that is
            no language model with its weights in place.
    """
    names, wrappers = _canonical_names(shapes)
    _refuse_other_models(names, shapes, config.donor)
    layout = LAYOUTS[model_type]
    ignored: dict[str, str] = {}
    stored: dict[str, str] = {}
    splat_leaves: set[str] = set()
    softmaxed: set[str] = set()
    for name, source in names.items():
        match = _IN_ATTENTION.fullmatch(name)
        leaf = match[2] if match else ""
        if leaf in _MASK_BUFFERS:
            ignored[source] = "mask buffer of old transformers versions; masks are computed"
        elif leaf in _NO_MEANING_HERE:
            ignored[source] = _NO_MEANING_HERE[leaf]
        elif leaf in _SPLAT_LEAVES:
            splat_leaves.add(leaf)
            if leaf in _SOFTMAXED:
                softmaxed.add(source)
            assert match is not None, "a leaf comes from a match"
            _add(stored, attention_tensor(int(match[1]), _SPLAT_LEAVES[leaf]), source)
        else:
            _add(stored, name, source)

    tied_head = stored.pop(LM_HEAD, None)
    if tied_head is not None:
        if TOKEN_EMBEDDING in stored:
            ignored[tied_head] = "tied to the token embedding, and equal to it"
        else:
            # safetensors keeps one of two tied tensors, and some writers keep this one.
            stored[TOKEN_EMBEDDING], tied_head = tied_head, None

    found = {name: tuple(shapes[source]) for name, source in stored.items()}
    config = _with_splats(config, found)
    expected = layout.shapes(expected_shapes(config))
    problems = shape_problems(expected, found, labels=stored)
    if problems:
        hint = "" if found.keys() & expected.keys() else f"; all of its names are others, such as {next(iter(shapes))}"
        raise InputError(f"{len(problems)} tensors do not fit the config.json: {listed(problems)}{hint}")
    sources = {
        ours: dataclasses.replace(piece, tensor=source)
        for name, source in stored.items()
        for ours, piece in layout.read(name).items()
    }
    dialect = "plain"
    if splat_leaves:
        dialect = "unused" if any(leaf.startswith("unused_") for leaf in splat_leaves) else "gsa"
    return Plan(config, sources, dialect, ignored, frozenset(softmaxed), tied_head, wrappers)


def export_names(names: list[str], dialect: str) -> dict[str, str]:
    """Our name -> name in an exported Hugging Face folder; splats without a dialect of their own go as `"gsa"`.

    Optional terms keep our names: no dialect has them in our form.
    """
    leaves = EXPORT_LEAVES["gsa" if dialect == "plain" else dialect]

    def exported(name: str) -> str:
        prefix, _, leaf = name.rpartition(".")
        return f"{prefix}.{leaves.get(leaf, leaf)}"

    return {name: exported(name) for name in names}


def _canonical_names(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Hugging Face's full name -> name in the source; and the wrappers that were left out."""
    names: dict[str, str] = {}
    wrappers: dict[str, None] = {}
    for source in shapes:
        parts = source.split(".")
        wrappers |= dict.fromkeys(part for part in parts if part in _WRAPPERS)
        _add(names, ".".join(part for part in parts if part not in _WRAPPERS), source)
    if not any(name.startswith(_BASE_PREFIX) for name in names):
        # A base model (GPTNeoModel, GPT2Model) was saved, without a head around it.
        names = {name if name == LM_HEAD else _BASE_PREFIX + name: source for name, source in names.items()}
    return names, tuple(wrappers)


def _refuse_other_models(names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], donor: str) -> None:
    for name, source in names.items():
        if "lora_" in name or ".base_layer." in name:
            raise InputError(
                f"{source} belongs to a LoRA adapter; merge it first (PEFT: merge_and_unload), then convert the result"
            )
        if name.removeprefix(_BASE_PREFIX).split(".")[0] in _HEADS:
            raise InputError(
                f"{source} is a head for another task, such as classification; save the language model without it: "
                f"{DONORS[donor].architecture}.from_pretrained(SOURCE).save_pretrained(NEW)"
            )
    empty = [source for source in names.values() if 0 in shapes[source]]
    if empty:
        raise InputError(
            f"{len(empty)} tensors are empty, as DeepSpeed's ZeRO-3 leaves them ({empty[0]} {list(shapes[empty[0]])}); "
            "gather the weights first, with the zero_to_fp32.py beside the checkpoint"
        )


def _add(names: dict[str, str], name: str, source: str) -> None:
    if name in names:
        raise InputError(f"{names[name]} and {source} are both {name}; the checkpoint holds two models or is damaged")
    names[name] = source


def _with_splats(config: GPTNeoConfig, shapes: Mapping[str, tuple[int, ...]]) -> GPTNeoConfig:
    """Adds the splats to a configuration that names none, as far as names and shapes of the tensors describe them."""
    shape = next((shape for name, shape in shapes.items() if name.endswith(".splat_centers")), None)
    if shape is None or config.splats is not None:
        return config
    if len(shape) != 3 or not shape[1]:
        raise InputError(f"splat centres have shape {list(shape)}, expected [num_heads, num_splats, head_dim]")
    matches = [_IN_ATTENTION.fullmatch(name) for name in shapes]
    layers = {int(match[1]) for match in matches if match and match[2].startswith("splat_")}
    splats = SplatConfig(
        num_splats=shape[1],
        layers="all" if len(layers) == config.num_layers else tuple(layers),
        log_amplitudes=any(name.endswith(".splat_log_amplitudes") for name in shapes),
    )
    return dataclasses.replace(config, splats=splats)
