"""The whole model with attention through splats: its forms agree, and every mode decodes what its forward pass says."""

import dataclasses
import functools
import importlib
import itertools
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax import GPTNeoForCausalLM, InputError, SplatConfig, generate, load
from gsa_jax import generation as generation_module
from gsa_jax.attention import state_bytes
from gsa_jax.config import GPTNeoConfig
from gsa_jax.ops.chunked import _SCHEDULES, Schedule
from gsa_jax.parameters import build_model, named_parameters
from gsa_jax.splat_config import SPLAT_PRESETS
from helpers.tiny_models import VOCAB, random_ids, relative_rms, tiny_model, tiny_splat_model

api = importlib.import_module("gsa_jax.ops.api")

TERMS = {"log_amplitudes": True, "norm_gain": True, "far_gain": True}

MODES = {
    "pure": SplatConfig(num_splats=3, window=0),
    "hybrid": SplatConfig(num_splats=3, window=6),
    "window of one": SplatConfig(num_splats=3, window=1),
    "window alone": SplatConfig(num_splats=0, window=6),
    "all layers": SplatConfig(num_splats=3, window=5, layers="all"),
    "one local layer": SplatConfig(num_splats=3, window=5, layers=(0,)),
    "optional terms": SplatConfig(num_splats=3, window=6, **TERMS),
    "kept": SplatConfig(num_splats=3, window=5, kept=4, layers="all", importance="learned", **TERMS),
    "kept alone": SplatConfig(num_splats=0, window=5, kept=4),
    "attached": SplatConfig(num_splats=3),
}


COMMON = ("kept", "attached")
ALL_MODES = [mode if mode in COMMON else pytest.param(mode, marks=pytest.mark.slow) for mode in MODES]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in a short text, and small programs."""
    monkeypatch.setitem(_SCHEDULES, "cpu", Schedule(8, 0))


@functools.cache
def splat_model(mode: str, dtype: str = "float32") -> GPTNeoForCausalLM:
    return tiny_splat_model(MODES[mode], dtype)


def jitted(model: GPTNeoForCausalLM):
    """`forward(ids, mask)` and `extend(ids, mask, cache)`."""
    graphdef, params = nnx.split(model)
    forward = jax.jit(lambda params, ids, mask: nnx.merge(graphdef, params)(ids, mask))
    extend = jax.jit(lambda params, ids, mask, cache: nnx.merge(graphdef, params).extend(ids, mask, cache))
    return functools.partial(forward, params), functools.partial(extend, params)


def padded(batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, of which each row but the first begins with some padding."""
    mask = np.arange(length) >= 4 * np.arange(batch)[:, None]
    return random_ids(length, batch, length), mask


@pytest.mark.parametrize("mode", ALL_MODES)
def test_prefill_and_decoding_equal_the_forward_pass(mode: str) -> None:
    """A prefill, a continued prefill of several tokens and single tokens, left-padded, past every ring's end."""
    model = splat_model(mode)
    forward, extend = jitted(model)
    ids, mask = padded(3, 40)
    expected = forward(ids, mask)
    logits, cache = model.prefill(ids[:, :9], mask[:, :9], 40)
    assert relative_rms(logits, expected[:, 8]) < 1e-5
    steps = [9, 21, *range(22, 41)]
    for start, stop in itertools.pairwise(steps):
        logits, cache = extend(ids[:, start:stop], mask[:, start:stop], cache)
        assert relative_rms(logits, expected[:, stop - 1]) < 1e-5, f"slots {start} to {stop}"
    np.testing.assert_array_equal(cache.tokens, mask.sum(axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["optional terms", "pure", "hybrid", "kept"])
def test_the_model_runs_through_the_definition(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients with the dense form of the op in place of the chunked one."""
    graphdef, params = nnx.split(splat_model(mode))
    ids, mask = padded(2, 30)

    def loss(params):
        logits = nnx.merge(graphdef, params)(ids, mask)
        return jnp.sum(jnp.sin(jnp.where(mask[:, :, None], logits, 0))), logits

    got = jax.jit(jax.grad(loss, has_aux=True))(params)
    monkeypatch.setattr(api, "_run", lambda *_, run=api._run: run("reference", None, None, is_first=False))
    want = jax.jit(jax.grad(lambda params: loss(params), has_aux=True))(params)
    assert relative_rms(got[1][mask], want[1][mask]) < 1e-5
    for name, one, other in zip(
        [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(want[0])],
        jax.tree.leaves(got[0]),
        jax.tree.leaves(want[0]),
        strict=True,
    ):
        assert jnp.linalg.norm(one - other) <= 1e-4 * jnp.linalg.norm(other) + 1e-6, name


@pytest.mark.parametrize("mode", ALL_MODES)
def test_the_future_does_not_change_the_past(mode: str) -> None:
    forward, _ = jitted(splat_model(mode))
    ids, mask = padded(2, 30)
    for edit in (1, 8, 20, 29):
        edited = np.where(np.arange(30) >= edit, random_ids(edit, 2, 30), ids)
        seen = mask & (np.arange(30) < edit)  # where all keys are exact, padding gets an average of everything
        chex.assert_trees_all_equal(forward(ids, mask)[seen], forward(edited, mask)[seen])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hybrid", "pure", "all layers"])
def test_padding_changes_nothing(mode: str) -> None:
    """Whatever it holds; and logits and gradients stay finite with a row that is padding altogether."""
    model = splat_model(mode)
    forward, _ = jitted(model)
    ids, mask = padded(3, 30)
    expected = forward(ids, mask)
    other = np.where(mask, ids, random_ids(9, 3, 30))
    chex.assert_trees_all_equal(forward(other, mask)[mask], expected[mask])
    alone = forward(ids[2:, 8:], mask[2:, 8:])
    assert relative_rms(expected[2:, 8:], alone) < 1e-5
    graphdef, params = nnx.split(model)
    mask[1] = False
    loss = jax.jit(jax.value_and_grad(lambda params: nnx.merge(graphdef, params)(ids, mask).sum()))
    chex.assert_tree_all_finite(loss(params))


@pytest.mark.parametrize("mode", [pytest.param("pure", marks=pytest.mark.slow), "hybrid"])
def test_a_window_that_holds_everything_is_the_exact_model(mode: str) -> None:
    """The one knob: the same weights with a window as long as the text, and with an infinite one, bit for bit."""
    plain = tiny_model(window_size=7, attention_types=[[["local", "global"], 1]])
    model = splat_model(mode)
    ids, mask = padded(2, 30)
    for window in (30, "all"):
        config = model.config.with_window(window)
        exact = build_model(config, named_parameters(model))
        chex.assert_trees_all_equal(exact(ids, mask), plain(ids, mask))
    assert relative_rms(model(ids, mask)[mask], plain(ids, mask)[mask]) > 1e-3


def greedy_by_forward(model: GPTNeoForCausalLM, prompt: list[int], new: int) -> list[int]:
    """Without any cache: the whole text again for each token."""
    forward, _ = jitted(model)
    ids = np.zeros((1, len(prompt) + new), np.int32)
    ids[0, : len(prompt)] = prompt
    for slot in range(len(prompt), ids.shape[1]):
        ids[0, slot] = int(jnp.argmax(forward(ids, np.ones(ids.shape, bool))[0, slot - 1]))
    return ids[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["hybrid", "pure", "all layers"])
def test_generation_equals_greedy_without_a_cache(mode: str) -> None:
    model = splat_model(mode)
    prompts = [random_ids(n, n).tolist() for n in (1, 5, 19)]
    got = generate(model, prompts, max_new_tokens=25, eos_token_id=-1)
    for row, prompt in zip(got, prompts, strict=True):
        assert row.tolist() == greedy_by_forward(model, prompt, 25)


@pytest.mark.parametrize("mode", ["hybrid", *(pytest.param(x, marks=pytest.mark.slow) for x in ("attached", "pure"))])
def test_a_long_prompt_is_read_in_chunks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = splat_model(mode)
    prompts = [random_ids(n, n).tolist() for n in (70, 3, 40)]
    whole = generate(model, prompts, max_new_tokens=12, eos_token_id=-1)
    monkeypatch.setattr(generation_module, "_CHUNK", 16)
    np.testing.assert_array_equal(generate(model, prompts, max_new_tokens=12, eos_token_id=-1), whole)


@pytest.mark.parametrize("mode", ["pure", "hybrid"])
def test_the_decoding_state_does_not_grow_with_the_context(mode: str) -> None:
    model = splat_model(mode)
    ids = np.ones((1, 8), np.int32)

    def shapes(capacity: int):
        return jax.eval_shape(lambda: model.prefill(ids, ids > 0, capacity))

    chex.assert_trees_all_equal_shapes_and_dtypes(shapes(16), shapes(100_000))
    assert len(jax.tree.leaves(shapes(16))) > 10


@pytest.mark.slow
def test_bfloat16_decodes_as_its_own_forward_pass(standard_promotion) -> None:
    model = splat_model("hybrid", "bfloat16")
    forward, extend = jitted(model)
    ids, mask = padded(2, 30)
    expected = np.asarray(forward(ids, mask))
    logits, cache = model.prefill(ids[:, :16], mask[:, :16], 30)
    assert {str(state.kv.dtype) for state in cache.layers} == {"float32"}
    for step in range(16, 30):
        assert relative_rms(logits, expected[:, step - 1]) < 5e-2
        logits, cache = extend(ids[:, step : step + 1], mask[:, step : step + 1], cache)


def test_presets_and_layers() -> None:
    config = GPTNeoConfig(vocab_size=VOCAB, num_layers=4, attention_types=((("global", "local"), 2),), window_size=9,
                          hidden_size=32, num_heads=4, bos_token_id=0, eos_token_id=0)  # fmt: skip
    hybrid, seed = (dataclasses.replace(config, splats=SPLAT_PRESETS[name]) for name in ("hybrid", "seed-phase1"))
    assert (hybrid.splat_layers, hybrid.windows) == ((0, 2), (64, 9, 64, 9))
    assert (seed.splat_layers, seed.windows) == ((0, 1, 2, 3), (0, 0, 0, 0))
    assert hybrid.with_window("all").windows == config.windows == ("all", 9, "all", 9)
    model = nnx.eval_shape(lambda: GPTNeoForCausalLM(hybrid, rngs=nnx.Rngs(0)))
    names = [name for name, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if "splat_centers" in name]
    assert [name[2] for name in names] == [0, 2]


@pytest.mark.parametrize("window", ["all", 16, *(pytest.param(x, marks=pytest.mark.slow) for x in (64, 0))])
def test_the_command_generates_in_every_mode(run_gsa, story_checkpoint, window) -> None:
    outcome = run_gsa(
        "generate", story_checkpoint, "--window", window, "--prompt", "Lily", "--prompt", "Tom had a red ball",
        "--max-new-tokens", 8,
    )  # fmt: skip
    assert outcome.code == 0 and "1 of 2" in outcome.out and "Tom had a red ball" in outcome.out
    model = load(story_checkpoint, window=window)
    assert model.config.windows[0] == window


def test_a_window_without_splats_is_refused(run_gsa, story_neo, tmp_path) -> None:
    assert run_gsa("convert", story_neo, tmp_path / "plain").code == 0
    run_gsa("generate", tmp_path / "plain", "--window", 4, "--prompt", "a").assert_refused("no splats", "gsa fit-init")
    assert run_gsa("generate", tmp_path / "plain", "--window", "all", "--prompt", "a", "--max-new-tokens", 1).code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "4"], ["--window", "--num-splats", "--preset"]),
        (["--num-splats", "2", "--window", "-1"], ["window = -1"]),
        (["--num-splats", "0", "--window", "0"], ["nothing to attend to"]),
        (["--preset", "hybrid", "--num-splats", "0"], ["attach one splat at least"]),
    ],
)
def test_options_of_splats_that_make_no_sense(run_gsa, story_neo, tmp_path, options, words) -> None:
    run_gsa("convert", story_neo, tmp_path / "out", *options).assert_refused(*words)
    assert not list(tmp_path.iterdir())


def test_layers_may_differ() -> None:
    """One number for all layers or one for each; what a layer has is what its parameters and its state have."""
    numbers = {"num_splats": (3, 0), "window": (0, 4), "kept": (2, 5)}
    splats = SplatConfig(**numbers, layers="all", norm_gain=True, importance="learned")
    config = dataclasses.replace(splat_model("hybrid").config, splats=splats)
    assert config.layer_splats == {0: (3, 0, 2), 1: (0, 4, 5)}
    assert GPTNeoConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    model = GPTNeoForCausalLM(config, rngs=nnx.Rngs(0))
    names = [
        name.split(".", 2)[2].replace("attn.attention.", "") for name in named_parameters(model) if "splat" in name
    ]
    assert sorted(names) == [
        "0.splat_centers", "0.splat_importance", "0.splat_log_scales", "0.splat_norm_gain", "1.splat_importance",
    ]  # fmt: skip
    ids, mask = padded(1, 30)
    _, cache = model.prefill(ids, mask, 30)
    sizes = [(state.z.shape[2], state.key.shape[2], state.kept_slot.shape[2]) for state in cache.layers]
    assert sizes == [(3, 0, 2), (0, 4, 5)]
    assert state_bytes(config) == sum(x.nbytes for x in jax.tree.leaves(cache.layers))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kept": -1}, "kept = -1: must be a whole number >= 0"),
        ({"kept": (1, -1)}, "kept = -1: must be a whole number >= 0"),
        ({"kept": 4, "window": "all"}, "no key leaves the window"),
        ({"num_splats": (1, 2, 3)}, r"num_splats = \[1, 2, 3\]: give one number for each layer with splats, 1 in all"),
        ({"num_splats": (1, 0), "window": (4, 0), "layers": "all"}, "leaves nothing to attend to"),
        ({"importance": "recency"}, "must be 'norm' or 'learned'"),
    ],
)
def test_what_layers_cannot_have(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        splats = dataclasses.replace(SplatConfig(num_splats=2, window=4), **change)
        dataclasses.replace(splat_model("hybrid").config, splats=splats)


def test_kept_keys_and_an_infinite_window(run_gsa, story_checkpoint) -> None:
    run_gsa("generate", story_checkpoint, "--window", "all", "--kept", 4, "--prompt", "a").assert_refused(
        "kept = 4 with window = 'all'"
    )
    assert load(story_checkpoint, window=16, kept=4).config.with_window("all").splats.kept == 0
