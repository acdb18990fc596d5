"""Texts against what the tokenizer makes of prompt and new tokens together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gsa_jax import Categorical, GPTNeoForCausalLM, InputError, complete, generate, load, open_tokenizer, stream_text
from gsa_jax.completion import stream_completion
from gsa_jax.tokenizer import LightTokenizer

PROMPTS = ["Once upon a time, there was a", "Tom had a dog.", "The caf\u00e9"]


@pytest.fixture(scope="module")
def model(story_checkpoint: Path) -> GPTNeoForCausalLM:
    return load(story_checkpoint)


@pytest.fixture(scope="module")
def options(story_checkpoint: Path) -> dict[str, Any]:
    return {"tokenizer": open_tokenizer(story_checkpoint), "max_new_tokens": 40}


def test_a_text_is_that_of_the_new_tokens(model: GPTNeoForCausalLM, options: dict[str, Any]) -> None:
    tokenizer = options["tokenizer"]
    tokens = generate(model, PROMPTS, **options, eos_token_id=14)  # a full stop
    found = list(complete(model, PROMPTS, **options, eos_token_id=14))
    for prompt, row, completion in zip(PROMPTS, tokens, found, strict=True):
        (ends,) = np.nonzero(row == 14)
        kept = row[: ends[0] + 1].tolist() if len(ends) else row.tolist()
        assert completion.prompt == prompt and list(completion.tokens) == kept
        assert prompt + completion.text == tokenizer.decode([*tokenizer.encode(prompt), *kept])
        assert completion.finish_reason == ("eos" if len(ends) else "length")
        assert completion.logprobs is None
    assert {completion.finish_reason for completion in found} == {"eos"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stop": ["little girl", "\n"]},
        {"stop": "play w"},
        {"sampler": Categorical(temperature=3.0), "seed": 3, "eos_token_id": -1},  # bytes that are no characters
        {"sampler": Categorical(temperature=3.0), "seed": 3, "stop": ["e", "\ufffd"]},
    ],
    ids=str,
)
def test_pieces_are_the_whole(model: GPTNeoForCausalLM, options: dict[str, Any], more: dict[str, Any]) -> None:
    for prompt in PROMPTS[:2]:
        (whole,) = complete(model, prompt, **options, **more)
        pieces = list(stream_text(model, prompt, **options, **more))
        assert "".join(pieces) == whole.text
        assert len(pieces) > 1 or len(whole.tokens) < 3


def test_pieces_of_a_tokenizer_that_cleans_up(model: GPTNeoForCausalLM, options: dict[str, Any]) -> None:
    cleaning = LightTokenizer(options["tokenizer"]._backend, {}, True)
    options = options | {"tokenizer": cleaning, "sampler": Categorical(temperature=2.0), "seed": 5, "eos_token_id": -1}
    (whole,) = complete(model, PROMPTS[0], **options)
    assert PROMPTS[0] + whole.text == cleaning.decode(
        [*cleaning.encode(PROMPTS[0]), *whole.tokens], skip_special_tokens=True
    )
    assert "".join(stream_text(model, PROMPTS[0], **options)) == whole.text


def test_a_text_ends_where_it_is_told_to(model: GPTNeoForCausalLM, options: dict[str, Any]) -> None:
    """In the middle of a token or over several, with the tokens up to there, and without changing other rows."""
    free = list(complete(model, PROMPTS, **options))
    text = free[0].text
    for stop in (text[10:19], text[3:5], text[20]):
        ended = list(complete(model, PROMPTS, **options, stop=stop))
        assert ended[0].text == text[: text.find(stop)] and ended[0].finish_reason == "stop"
        count = len(ended[0].tokens)
        assert ended[0].tokens == free[0].tokens[:count]
        tokenizer, prompt = options["tokenizer"], options["tokenizer"].encode(PROMPTS[0])
        assert stop in tokenizer.decode([*prompt, *ended[0].tokens])[len(PROMPTS[0]) :]
        assert stop not in tokenizer.decode([*prompt, *ended[0].tokens[:-1]])[len(PROMPTS[0]) :]
        for before, after in zip(free[1:], ended[1:], strict=True):
            assert before.text.startswith(after.text)
            assert after.finish_reason == ("stop" if stop in before.text else before.finish_reason)
    tokens = generate(model, PROMPTS[0], **options, stop=text[3:5], pad_token_id=7)
    assert tokens.shape[1] == len(next(complete(model, PROMPTS[0], **options, stop=text[3:5])).tokens)


def test_logprobs_go_with_their_tokens(model: GPTNeoForCausalLM, options: dict[str, Any]) -> None:
    found = list(complete(model, PROMPTS, **options, logprobs=True, eos_token_id=14))
    tokenizer = options["tokenizer"]
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = [*tokenizer.encode(prompt), *completion.tokens]
        logits = np.asarray(model(np.array([ids[:-1]])))[0].astype(np.float64)
        said = (
            logits
            - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
            - logits.max(1, keepdims=True)
        )
        expected = [said[slot, token] for slot, token in enumerate(ids[1:])][-len(completion.tokens) :]
        np.testing.assert_allclose(completion.logprobs, expected, rtol=1e-3, atol=1e-4)
    *_, streamed = stream_completion(model, PROMPTS[0], **options, logprobs=True, eos_token_id=14)
    np.testing.assert_allclose(streamed.logprobs, found[0].logprobs, rtol=1e-3, atol=1e-4)


def test_many_prompts_run_in_batches(
    model: GPTNeoForCausalLM, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order; and samples of different batches differ, the first batch being as it is alone."""
    monkeypatch.setattr("gsa_jax.completion.ROWS_AT_ONCE", 2)
    greedy = list(complete(model, PROMPTS, **options))
    assert [completion.prompt for completion in greedy] == PROMPTS
    assert greedy[2] == next(complete(model, PROMPTS[2], **options))
    drawn = options | {"sampler": Categorical(temperature=2.0), "seed": 1}
    samples = [completion.text for completion in complete(model, PROMPTS[:1] * 4, **drawn)]
    assert len(set(samples)) == 4
    assert samples[:2] == [completion.text for completion in complete(model, PROMPTS[:1] * 2, **drawn)]


def test_ids_have_their_text_as_a_prompt(model: GPTNeoForCausalLM, options: dict[str, Any]) -> None:
    ids = options["tokenizer"].encode(PROMPTS[0])
    assert list(complete(model, ids, **options)) == list(complete(model, PROMPTS[0], **options))


def test_what_cannot_become_text_is_refused(model: GPTNeoForCausalLM, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give it: tokenizer="):
        next(complete(model, [1, 2], max_new_tokens=3))
    with pytest.raises(InputError, match="2 prompts: one text can be streamed"):
        next(stream_text(model, PROMPTS[:2], **options))
    with pytest.raises(InputError, match="no prompt given"):
        next(complete(model, [], **options))
