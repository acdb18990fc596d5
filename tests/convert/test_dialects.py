"""Names under which the PyTorch prototype stored its splats: read, reported, and written back."""

import json

import numpy as np
import pytest
import torch

from gsa_jax import InputError, SplatConfig
from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert import convert, export
from helpers.bits import assert_same_tensors
from helpers.hf_folders import (
    ATTENTION,
    GSA,
    HEAD_DIM,
    NUM_HEADS,
    NUM_LAYERS,
    UNUSED,
    read_safetensors,
    splat_tensors,
    tiny_config,
    tiny_tensors,
    write_bin_folder,
    write_folder,
)

# Leaf -> shape of what a dialect stores besides centres and scales, and has no meaning here.
EXTRAS = {
    "mix weight": {"gsa_mix_weight": ()},
    "strength": {"gsa_strength": ()},
    "temperature": {
        "temperature": (1,),
        "position_scale_factor": (),
        "long_range_boost": (),
    },
}

DIALECTS = {
    "unused": (UNUSED, {}),
    "gsa": (GSA, {}),
    "gsa, mix weight": (GSA, EXTRAS["mix weight"]),
    "gsa, strength": (GSA, EXTRAS["strength"]),
    "gsa, temperature": (GSA, EXTRAS["mix weight"] | EXTRAS["temperature"]),
}


def ours(splats: dict[str, torch.Tensor], leaves: dict[str, str]) -> dict[str, torch.Tensor]:
    """The same tensors by the names that they have here."""
    new = {leaves["centers"]: "splat_centers", leaves["scales"]: "splat_log_scales"}
    return {f"{name.rpartition('.')[0]}.{new[name.rpartition('.')[2]]}": tensor for name, tensor in splats.items()}


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(x, marks=pytest.mark.slow) for x in (torch.float32, torch.float16))],
    ids=str,
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_there_and_back(tmp_path, dialect, dtype):
    leaves, extras = DIALECTS[dialect]
    tensors, splats = tiny_tensors(dtype), splat_tensors(leaves, dtype=dtype)
    dropped = {
        ATTENTION.format(layer) + leaf: torch.full(shape, 0.5, dtype=dtype)
        for layer in range(NUM_LAYERS)
        for leaf, shape in extras.items()
    }
    source = write_folder(tmp_path / "source", tensors | splats | dropped)

    report = convert(source, tmp_path / "checkpoint")
    config, got = load_tensors(tmp_path / "checkpoint")
    assert config.splats == SplatConfig(num_splats=2, layers="all")
    assert_same_tensors(got, tensors | ours(splats, leaves))
    assert report.dialect == dialect.split(",")[0]
    assert report.splats == "imported"
    assert report.splat_parameters == NUM_LAYERS * NUM_HEADS * 2 * (HEAD_DIM + 1)
    assert set(report.ignored) == set(dropped)
    assert all(report.ignored.values())
    assert json.loads((tmp_path / "checkpoint" / "conversion.json").read_text())["ignored"] == report.ignored

    exported = export(tmp_path / "checkpoint", tmp_path / "exported", exact=True)
    assert exported.dialect == report.dialect
    assert_same_tensors(read_safetensors(tmp_path / "exported"), tensors | splats)

    convert(tmp_path / "exported", tmp_path / "again")
    again_config, again = load_tensors(tmp_path / "again")
    assert again_config == config
    assert_same_tensors(again, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_amplitudes_are_a_softmax_over_splats(tmp_path, dtype):
    tensors, splats = tiny_tensors(dtype), splat_tensors(GSA, 3, dtype=dtype)
    torch.manual_seed(0)
    raw = {ATTENTION.format(n) + "gsa_splat_amplitudes": torch.randn(NUM_HEADS, 3).to(dtype) for n in range(NUM_LAYERS)}
    convert(write_folder(tmp_path / "source", tensors | splats | raw), tmp_path / "checkpoint")
    config, got = load_tensors(tmp_path / "checkpoint")
    assert config.splats == SplatConfig(num_splats=3, layers="all", log_amplitudes=True)
    for name, tensor in raw.items():
        found = got.pop(name.replace("gsa_splat_amplitudes", "splat_log_amplitudes"))
        expected = torch.softmax(tensor.double(), dim=-1).numpy()
        np.testing.assert_allclose(np.exp(found.astype(np.float64)), expected, rtol=2 * torch.finfo(dtype).eps)
    assert_same_tensors(got, tensors | ours(splats, GSA))
    export(tmp_path / "checkpoint", tmp_path / "exported", exact=True)
    convert(tmp_path / "exported", tmp_path / "again")
    again_config, again = load_tensors(tmp_path / "again")
    assert again_config == config
    assert_same_tensors(again, load_tensors(tmp_path / "checkpoint")[1])


def test_zero_scales_are_logarithms(tmp_path):
    tensors = splat_tensors(UNUSED)
    for name in tensors:
        if name.endswith("scales"):
            tensors[name] = torch.zeros_like(tensors[name])
    convert(write_folder(tmp_path / "source", tiny_tensors() | tensors), tmp_path / "checkpoint")
    got = load_tensors(tmp_path / "checkpoint")[1]
    scales = np.concatenate([np.exp(got[ATTENTION.format(layer) + "splat_log_scales"]) for layer in range(NUM_LAYERS)])
    np.testing.assert_array_equal(scales, 1)


@pytest.mark.parametrize("num_splats", [1, 5])
def test_the_number_of_splats_is_read_from_their_shape(tmp_path, num_splats):
    splats = splat_tensors(GSA, num_splats)
    convert(write_folder(tmp_path / "source", tiny_tensors() | splats), tmp_path / "checkpoint")
    config, got = load_tensors(tmp_path / "checkpoint")
    assert config.splats == SplatConfig(num_splats=num_splats, layers="all")
    assert_same_tensors(got, tiny_tensors() | ours(splats, GSA))


def test_splats_behind_a_wrapper_in_a_base_model(tmp_path):
    everything = tiny_tensors() | splat_tensors(UNUSED)
    state = {"_orig_mod.module." + name.removeprefix("transformer."): tensor for name, tensor in everything.items()}
    convert(write_bin_folder(tmp_path / "source", state), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported", exact=True)
    assert_same_tensors(read_safetensors(tmp_path / "exported"), everything)


def test_attached_splats_are_exported_as_gsa(tmp_path):
    convert(write_folder(tmp_path / "source"), tmp_path / "checkpoint", splats=SplatConfig(num_splats=2, layers="all"))
    assert export(tmp_path / "checkpoint", tmp_path / "exported", exact=True).dialect == "gsa"
    expected = {ATTENTION.format(layer) + leaf for layer in range(NUM_LAYERS) for leaf in GSA.values()}
    assert set(read_safetensors(tmp_path / "exported")) == set(tiny_tensors()) | expected


def test_without_splats_there_is_no_dialect(tmp_path):
    assert convert(write_folder(tmp_path / "source"), tmp_path / "checkpoint").dialect == "plain"
    assert export(tmp_path / "checkpoint", tmp_path / "exported").dialect == "none"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(ATTENTION.format(1) + GSA["centers"]), ["missing", "h.1.attn.attention.splat_centers"]),
        (lambda t: t.pop(ATTENTION.format(0) + GSA["scales"]), ["missing", "h.0.attn.attention.splat_log_scales"]),
        (
            lambda t: t.update({ATTENTION.format(1) + GSA["centers"]: torch.zeros(NUM_HEADS, 3, HEAD_DIM)}),
            ["h.1.attn.attention.gsa_splat_centers has shape [4, 3, 8], expected [4, 2, 8]"],
        ),
        (lambda t: t.update(splat_tensors(UNUSED)), ["gsa_splat_centers", "unused_gsa_splat_centers", "both"]),
        (
            lambda t: t.update({ATTENTION.format(0) + GSA["centers"]: torch.zeros(NUM_HEADS, HEAD_DIM)}),
            ["[4, 8]", "expected [num_heads, num_splats, head_dim]"],
        ),
    ],
    ids=["centres missing", "scales missing", "splats uneven", "two dialects", "no axis of splats"],
)
def test_splats_that_do_not_fit(tmp_path, change, words):
    tensors = tiny_tensors() | splat_tensors(GSA)
    change(tensors)
    source = write_folder(tmp_path / "source", tensors)
    with pytest.raises(InputError) as error:
        convert(source, tmp_path / "checkpoint")
    for word in [str(source / "model.safetensors"), *words]:
        assert word in str(error.value)
    assert not (tmp_path / "checkpoint").exists()


def test_a_configuration_that_announces_splats_which_are_not_there(tmp_path):
    source = write_folder(
        tmp_path / "source", config=tiny_config(splats={"num_splats": 2, "window": None, "layers": "all"})
    )
    with pytest.raises(InputError, match=r"4 tensors do not fit.*missing .*splat_centers \[4, 2, 8\]"):
        convert(source, tmp_path / "checkpoint")
