"""Decoding against Hugging Face's `generate`, and against the forward pass that it must equal."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax import Categorical, GPTNeoForCausalLM, Greedy, InputError, generate, generate_stream, load, open_tokenizer
from gsa_jax.assets import story_neo
from gsa_jax.generation import _Choice, _decode, _prefill, _State, decode_steps, make_request
from gsa_jax.generation_config import read_generation_config
from gsa_jax.sampling import LogitsProcessor
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
    """240 tokens: the local layers' ring of 64 wraps several times. Prompts of different lengths in a batch."""
    prompts = [list(range(100, 100 + n)) for n in (1, 5, 17, 70)]
    got = generate(load(story_checkpoint), prompts, max_new_tokens=240, eos_token_id=-1)
    np.testing.assert_array_equal(got, hf_greedy(story, prompts, 240))


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("length", [5, 17])
def test_greedy_of_one_prompt_equals_hugging_face(story: Any, story_checkpoint: Path, length: int) -> None:
    prompts = [list(range(100, 100 + length))]
    got = generate(load(story_checkpoint), prompts, max_new_tokens=240, eos_token_id=-1)
    np.testing.assert_array_equal(got, hf_greedy(story, prompts, 240))


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


@pytest.mark.parity
def test_any_of_several_tokens_ends_a_sequence(model: GPTNeoForCausalLM) -> None:
    import torch

    from helpers.hf_oracle import hf_model

    settings: dict[str, Any] = {"window_size": 6, "attention_types": [[["local", "global"], 1]]}
    prompt = random_ids(3, 8).tolist()
    free = generate(model, [prompt], max_new_tokens=30, eos_token_id=-1)[0]
    ends = [int(free[12]), int(free[5]), 50256]  # the last of them is no token of the model
    with torch.no_grad():
        expected = hf_model(**settings).generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
    got = generate(tiny_model(**settings, eos_token_id=ends), [prompt], max_new_tokens=30)
    np.testing.assert_array_equal(got, expected[:, len(prompt) :].numpy())
    assert got.shape[1] <= 6


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


def test_no_tokens_at_a_time_is_an_error(model: GPTNeoForCausalLM) -> None:
    for number in (0, -1):
        with pytest.raises(InputError, match=f"tokens_per_step = {number}: must be >= 1"):
            next(generate_stream(model, [[3, 4]], max_new_tokens=2, tokens_per_step=number))


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


@pytest.mark.parity
@pytest.mark.parametrize(
    "said",
    [
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"eos_token_id": [5, 60, 7], "pad_token_id": 3, "min_new_tokens": 9},
        {"no_repeat_ngram_size": 1, "min_new_tokens": 20, "eos_token_id": list(range(1, 40))},
    ],
    ids=str,
)
def test_what_generation_config_json_says_is_done_as_by_hugging_face(said: dict[str, Any], tmp_path: Path) -> None:
    """One row at a time: in Hugging Face's batches, padding counts as repeated."""
    import torch
    from transformers import GenerationConfig as HFGenerationConfig

    from helpers.hf_oracle import hf_model

    reference, ours = hf_model(), tiny_model()
    reference.generation_config = HFGenerationConfig(**said)
    reference.generation_config.save_pretrained(tmp_path)
    ours.generation_config = read_generation_config(tmp_path, ours.config)
    prompts = [random_ids(n, n).tolist() for n in (3, 11, 16)]
    together = generate(ours, prompts, max_new_tokens=30)
    for prompt, row in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30)
        expected = out[0, len(prompt) :].numpy()
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert (row[len(expected) :] == said.get("pad_token_id", said.get("eos_token_id", [0])[0])).all()


@pytest.mark.parity
def test_logprobs_are_those_of_hugging_face() -> None:
    """By the model alone: the penalty chooses another token, and changes nothing of what the model says of it."""
    import torch

    from helpers.hf_oracle import hf_model

    reference, prompt = hf_model(), [3, 9, 4]
    options = {"max_new_tokens": 12, "eos_token_id": -1, "repetition_penalty": 3.0}
    request = make_request(tiny_model(), prompt, **options)
    steps = list(decode_steps(tiny_model(), request, tokens_per_step=5, logprobs=True))
    got = np.concatenate([step.logprobs for step in steps], axis=1)
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
            repetition_penalty=3.0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    new = out.sequences[0, len(prompt) :]
    np.testing.assert_array_equal(np.concatenate([step.tokens for step in steps], axis=1)[0], new)
    expected = torch.stack(out.logits).log_softmax(-1)[:, 0].gather(1, new[:, None])[:, 0]
    np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-5)


def test_options_that_are_off_are_not_in_the_loop(model: GPTNeoForCausalLM) -> None:
    """Nothing of the size of the vocabulary is made but the logits; each option makes more."""
    graphdef, params = nnx.split(model)
    ids, mask = random_ids(0, 2, 16), np.ones((2, 16), bool)
    logits, cache = jax.eval_shape(lambda: model.prefill(ids, mask, 80))
    number, room, done, key = jnp.int32(0), jnp.zeros((2, 64), jnp.int32), jnp.zeros(2, bool), jax.random.key(0)

    def wide(processor: LogitsProcessor | None, logprobs: bool = False) -> int:
        """Operations with a result that is as long as the vocabulary along one axis."""
        kept = jnp.zeros((2, 64)) if logprobs else None
        prompt = (jnp.asarray(ids), jnp.asarray(mask)) if processor is not None and processor.reads_history else None
        choice = _Choice(Greedy(), processor, prompt, number[None], number)

        def run(logits: jax.Array, cache: Any) -> Any:
            state = _State(cache, logits, room, kept, number, done, key)
            return _decode(graphdef, params, state, choice, number)

        found, todo = 0, [jax.make_jaxpr(run)(logits, cache).jaxpr]
        while todo:
            for equation in todo.pop().eqns:
                inner = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
                todo += [getattr(x, "jaxpr", x) for x in inner if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
                found += any(VOCAB in getattr(x.aval, "shape", ()) for x in equation.outvars)
        return found

    step = jax.make_jaxpr(lambda logits, cache: model.extend(ids[:, :1], mask[:, :1], cache))(logits, cache).jaxpr
    of_model = sum(any(VOCAB in getattr(x.aval, "shape", ()) for x in equation.outvars) for equation in step.eqns)
    plain = wide(None)
    assert 0 < plain <= of_model + 3, "the loop and the calls around it have logits as results as well"
    for processor in ({"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 3}, {"min_new_tokens": 2}):
        assert wide(LogitsProcessor(**processor)) > plain
    assert wide(None, logprobs=True) > plain


def test_a_prompt_may_have_several_forms(story_checkpoint: Path) -> None:
    story, tokenizer = load(story_checkpoint), open_tokenizer(story_checkpoint)
    texts = ["Once upon a time", "The cat sat on the"]
    ids = [tokenizer.encode(text) for text in texts]
    expected = generate(story, ids, max_new_tokens=6)
    longest = max(map(len, ids))
    for right in (False, True):
        padded, mask = np.full((2, longest + 2), 10**6), np.zeros((2, longest + 2), np.int64)
        for row, prompt in enumerate(ids):
            place = slice(0, len(prompt)) if right else slice(longest + 2 - len(prompt), None)
            padded[row, place], mask[row, place] = prompt, 1
        np.testing.assert_array_equal(generate(story, padded, attention_mask=mask, max_new_tokens=6), expected)
        as_lists = generate(story, padded.tolist(), attention_mask=mask.tolist(), max_new_tokens=6)
        np.testing.assert_array_equal(as_lists, expected)
    np.testing.assert_array_equal(generate(story, texts, tokenizer=tokenizer, max_new_tokens=6), expected)
    one = [texts[0], ids[0], tuple(ids[0]), np.array(ids[0]), np.array(ids[:1]), jnp.array(ids[:1]), [np.array(ids[0])]]
    for prompt in one:
        np.testing.assert_array_equal(generate(story, prompt, tokenizer=tokenizer, max_new_tokens=6), expected[:1])


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ("Once", {}, "give the tokenizer as well"),
        (["Once"], {"tokenizer": "story", "attention_mask": [[1]]}, "belongs to token ids"),
        (["caf\udce9"], {"tokenizer": "story"}, "prompt 0 is not UTF-8"),
        (["Once", [3]], {"tokenizer": "story"}, "a list of texts and of other things"),
        ("", {"tokenizer": "story"}, "prompt 0 is empty"),
        ({"input_ids": [[3]]}, {}, 'give its \\["input_ids"'),
        (b"Once", {}, "of type bytes|bytes|S4"),
        (None, {}, "of type NoneType"),
        (3, {}, "int64"),
        (1.5, {}, "float64"),
        ([1.5, 2.5], {}, "prompt 0 is float64"),
        ([[True, False]], {}, "prompt 0 is bool"),
        ([[[3]]], {}, r"prompt 0 is int64\[1, 1\]"),
        (np.zeros((1, 2, 3), int), {}, r"int64\[1, 2, 3\]"),
        (np.ones((1, 2)), {}, "prompt 0 is float64"),
        ([[1], [2, 3]], {"attention_mask": [[1], [1]]}, "must be an array"),
        ([[1, 2]], {"attention_mask": [[1]]}, "attention_mask is"),
        ([[1, 2]], {"attention_mask": [[0, 0]]}, "prompt 0 is empty"),
        ([[1, 2]], {"attention_mask": [[1, 2]]}, "attention_mask holds 2"),
        ([1], {"seed": -1}, "seed = -1"),
        ([1], {"seed": 2**32}, "seed = 4294967296"),
        ([1], {"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ([1], {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size = -1"),
        ([1], {"min_new_tokens": -1}, "min_new_tokens = -1"),
        ([1], {"eos_token_id": [1, VOCAB]}, f"eos_token_id = {VOCAB}"),
        ([1], {"pad_token_id": -1}, "pad_token_id = -1"),
        ([1], {"stop": "x"}, "give the tokenizer"),
        ([1], {"stop": ["x", ""], "tokenizer": "story"}, "an empty text"),
        ([1], {"max_new_tokens": None}, "max_new_tokens: say how many"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_what_is_no_request_is_refused(
    model: GPTNeoForCausalLM, unchecked: None, prompts: Any, options: dict[str, Any], words: str
) -> None:
    if "tokenizer" in options:
        options = options | {"tokenizer": open_tokenizer(STORY)}
    with pytest.raises(InputError, match=words):
        generate(model, prompts, **({"max_new_tokens": 2} | options))


def test_an_unknown_option_is_no_option(model: GPTNeoForCausalLM) -> None:
    with pytest.raises(TypeError, match="no such option: max_new_token;"):
        generate(model, [1], max_new_token=2)


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_any_seed_of_32_bits(model: GPTNeoForCausalLM, seed: int) -> None:
    drawn = generate(model, [1, 2], max_new_tokens=16, sampler=Categorical(temperature=3.0), seed=seed, eos_token_id=-1)
    other = generate(
        model, [1, 2], max_new_tokens=16, sampler=Categorical(temperature=3.0), seed=seed ^ 1, eos_token_id=-1
    )
    assert (drawn != other).any()


def test_numbers_of_numpy_are_numbers(model: GPTNeoForCausalLM, unchecked: None) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "seed": 3, "sampler": Categorical(temperature=3.0)}
    expected = generate(model, [1, 2], eos_token_id=[5], **options)
    options |= {"max_new_tokens": np.int64(3), "seed": np.uint32(3), "eos_token_id": np.array([5])}
    np.testing.assert_array_equal(generate(model, [1, 2], **options), expected)
    with pytest.raises(InputError, match=r"max_new_tokens = 3\.0: must be a whole number"):
        generate(model, [1], max_new_tokens=3.0)


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
