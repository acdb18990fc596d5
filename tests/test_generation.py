"""Decoding against Hugging Face's `generate`, and against the forward pass that it must equal."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax import Categorical, GPTNeoForCausalLM, InputError, generate, generate_stream, load
from gsa_jax.assets import story_neo
from gsa_jax.generation import _Choice, _decode, _prefill, _State
from helpers.tiny_models import VOCAB, random_ids, relative_rms, tiny_model

STORY = story_neo()


def hf_greedy(model: Any, prompts: list[list[int]], new: int) -> np.ndarray:
    """Hugging Face's own left-padded batch, without an end of sequence."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return out[:, longest:].numpy()


@pytest.fixture(scope="module")
def story() -> Any:
    from transformers import GPTNeoForCausalLM as HFModel

    return HFModel.from_pretrained(STORY).eval()


@pytest.fixture(scope="module")
def model() -> GPTNeoForCausalLM:
    return tiny_model(window_size=6, attention_types=[[["local", "global"], 1]])


@pytest.mark.parity
def test_greedy_equals_hugging_face_on_the_bundled_model(story: Any, story_checkpoint: Path) -> None:
    """240 tokens: the local layers' ring of 64 wraps several times. Batched, of different lengths, and alone."""
    prompts = [list(range(100, 100 + n)) for n in (1, 5, 17, 70)]
    got = generate(load(story_checkpoint), prompts, max_new_tokens=240, eos_token_id=-1)
    np.testing.assert_array_equal(got, hf_greedy(story, prompts, 240))
    for row, prompt in enumerate(prompts[1:3], start=1):
        alone = generate(load(story_checkpoint), [prompt], max_new_tokens=240, eos_token_id=-1)
        np.testing.assert_array_equal(alone[0], got[row])


@pytest.mark.parity
@pytest.mark.parametrize("window", [2, 200, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 15))])
def test_greedy_equals_hugging_face_for_other_windows(window: int) -> None:
    from helpers.hf_oracle import hf_model

    reference = hf_model(window_size=window)
    prompts = [random_ids(n, n).tolist() for n in (1, 3, 16, 31)]
    got = generate(tiny_model(window_size=window), prompts, max_new_tokens=40, eos_token_id=-1)
    np.testing.assert_array_equal(got, hf_greedy(reference, prompts, 40))


def test_cache_equals_no_cache(model: GPTNeoForCausalLM) -> None:
    """Logits at each step, prefill and decoding, against the full forward pass; the ring of 6 wraps."""
    ids, mask = random_ids(0, 2, 40), np.ones((2, 40), bool)
    mask[1, :7] = False
    expected = np.asarray(model(ids, mask))
    graphdef, params = nnx.split(model)
    extend = jax.jit(lambda params, token, mask, cache: nnx.merge(graphdef, params).extend(token, mask, cache))
    for prompt in (9, 16):
        logits, cache = model.prefill(ids[:, :prompt], mask[:, :prompt], 40)
        for step in range(prompt, 40):
            assert relative_rms(logits, expected[:, step - 1]) < 1e-5, f"step {step}"
            logits, cache = extend(params, ids[:, step : step + 1], np.ones((len(ids), 1), bool), cache)


def test_a_local_layer_keeps_no_more_than_its_window(model: GPTNeoForCausalLM) -> None:
    _, cache = model.prefill(random_ids(0, 1, 20), np.ones((1, 20), bool), 80)
    assert [layer.key.shape for layer in cache.layers] == [(1, 4, 6, 8), (1, 4, 80, 8)]


def test_batch_equals_single_also_when_drawing_is_greedy_after_an_end(model: GPTNeoForCausalLM) -> None:
    prompts = [random_ids(n, n).tolist() for n in (3, 12, 8)]
    free = generate(model, prompts, max_new_tokens=30, eos_token_id=-1)
    eos = int(free[0, 10])  # ends row 0 at its 11th token at the latest
    ended = generate(model, prompts, max_new_tokens=30, eos_token_id=eos, pad_token_id=1)
    for row, expected in zip(ended, free, strict=True):
        (ends,) = np.nonzero(expected == eos)
        last = ends[0] if len(ends) else len(row)
        np.testing.assert_array_equal(row[: last + 1], expected[: min(last + 1, len(row))])
        assert (row[last + 1 :] == 1).all()
    alone = generate(model, prompts[:1], max_new_tokens=30, eos_token_id=eos)
    assert alone.shape[1] <= 11 and alone[0, -1] == eos


def test_seed_decides_the_draws(model: GPTNeoForCausalLM) -> None:
    def draw(seed: int) -> np.ndarray:
        return generate(
            model, [[5, 6], [7]], max_new_tokens=20, sampler=Categorical(temperature=2.0), seed=seed, eos_token_id=-1
        )

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()
    assert (draw(1)[0] != draw(1)[1]).any()


def test_stream_equals_whole(model: GPTNeoForCausalLM) -> None:
    settings = {"max_new_tokens": 23, "sampler": Categorical(temperature=2.0, top_k=9), "seed": 3, "eos_token_id": -1}
    pieces = list(generate_stream(model, [[3, 4, 5]], tokens_per_step=4, **settings))
    assert [piece.shape[1] for piece in pieces] == [4, 4, 4, 4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), generate(model, [[3, 4, 5]], **settings))


def test_a_new_prompt_compiles_nothing(model: GPTNeoForCausalLM) -> None:
    def run(length: int, new: int, temperature: float) -> None:
        sampler = Categorical(temperature=temperature)
        generate(model, [random_ids(length, length).tolist()], max_new_tokens=new, sampler=sampler, eos_token_id=-1)

    run(20, 10, 1.0)
    compiled: list[str] = []

    def record(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        for length, new, temperature in ((17, 10, 1.0), (32, 33, 0.7), (25, 64, 0.3)):
            run(length, new, temperature)
        assert not compiled
        run(33, 10, 1.0)  # the next bucket: the counter does count
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(record)


def test_decoding_donates_its_cache(model: GPTNeoForCausalLM) -> None:
    graphdef, params = nnx.split(model)
    logits, cache = _prefill(graphdef, params, random_ids(0, 1, 16), np.ones((1, 16), bool), capacity=80)
    number = jnp.int32(4)
    tokens, done = jnp.zeros((1, 64), int), jnp.zeros((1,), bool)
    state = _State(cache, logits, tokens, None, jnp.int32(0), done, jax.random.key(0))
    choice = _Choice(Categorical(), None, None, number[None], number)
    after = _decode(graphdef, params, state, choice, number)
    assert all(layer.key.is_deleted() and layer.value.is_deleted() for layer in state.cache.layers)
    chex.assert_trees_all_equal_shapes_and_dtypes(after.logits, state.logits)


@pytest.mark.slow
@pytest.mark.parity
def test_bfloat16_decodes_as_its_own_forward_pass(standard_promotion) -> None:
    reference = tiny_model(initializer_range=0.1, dtype="bfloat16", param_dtype=jnp.bfloat16)
    ids = random_ids(1, 1, 30)
    expected = np.asarray(reference(ids))
    logits, cache = reference.prefill(ids[:, :16], np.ones((1, 16), bool), 30)
    graphdef, params = nnx.split(reference)
    extend = jax.jit(lambda params, token, mask, cache: nnx.merge(graphdef, params).extend(token, mask, cache))
    for step in range(16, 30):
        assert relative_rms(logits, expected[:, step - 1]) < 3e-2
        logits, cache = extend(params, ids[:, step : step + 1], np.ones((len(ids), 1), bool), cache)


@pytest.mark.parametrize(
    ("prompts", "new", "words"),
    [
        ([], 4, "no prompt"),
        ([[1], []], 4, "prompt 1 is empty"),
        ([[1, VOCAB]], 4, f"token id {VOCAB}"),
        ([[-1]], 4, "token id -1"),
        ([[1] * 120], 9, "128 positions"),
        ([[1]], 0, "max_new_tokens = 0"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    model: GPTNeoForCausalLM, prompts: list[list[int]], new: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        generate(model, prompts, max_new_tokens=new)
