"""Passkeys: the items are what they are said to be, and the scores are those of PyTorch's logits."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax import InputError, SplatConfig, load, load_tokenizer
from gsa_jax.checkpoint import load_tensors
from gsa_jax.evaluation.arms import ARMS
from gsa_jax.evaluation.passkey import CANDIDATES, Items, Passkey, evaluate_passkey, key_scores, make_items, score_keys
from gsa_jax.text import read_documents
from helpers.texts import STORIES, TOLD
from helpers.tiny_checkpoints import SHAPE, WINDOW, tiny_checkpoint
from helpers.tiny_models import random_ids, tiny_model

CONTEXT, POSITIONS, KEPT = 100, 128, 4
"""The tiny model has positions for one training length only."""


@pytest.fixture(scope="module")
def checkpoint(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("passkey"), story_neo, splats=SplatConfig(num_splats=3, window=WINDOW, kept=KEPT)
    )


@pytest.fixture(scope="module")
def passkey(checkpoint: Path) -> Passkey:
    return evaluate_passkey(checkpoint, TOLD, context=CONTEXT, items=CANDIDATES)


def items_of(checkpoint: Path, length: int, count: int, seed: int = 0) -> Items:
    config, _ = load_tensors(checkpoint)
    return make_items(read_documents(TOLD), load_tokenizer(checkpoint), config, length, count, seed)


def test_a_number_is_hidden_in_the_text_and_asked_for(checkpoint: Path) -> None:
    length, count = 200, 40
    items, tokenizer = items_of(checkpoint, length, count), load_tokenizer(checkpoint)
    text = "\n\n".join(read_documents(TOLD))
    assert items.prompts.shape[1] + items.keys.shape[2] == length
    for number in range(count):
        keys = [key.strip() for key in tokenizer.batch_decode(items.keys[number])]
        assert len(set(keys)) == CANDIDATES and all(re.fullmatch("[1-9][0-9]{4}", key) for key in keys)
        start, prompt = items.prompts[number, 0], tokenizer.decode(items.prompts[number, 1:])
        before, told, after = re.fullmatch(
            r"(.*) The secret number is (\d{5})\. Remember it\.(.*) The secret number is", prompt, re.DOTALL
        ).groups()
        assert start == 0 and told == keys[items.told[number]]
        assert before + after in text and not any(key in before + after for key in keys)
        assert (not before or before[-1] in ".!?\"'") and (not after or after[0].isspace())
        assert tokenizer.decode(items.prompts[number, 1 : items.depth[number]]) == before
    by_group = items.keys.reshape(-1, CANDIDATES, *items.keys.shape[1:])
    assert (by_group == by_group[:, :1]).all() and not (by_group[0] == by_group[1]).all()
    assert (np.sort(items.told.reshape(-1, CANDIDATES)) == np.arange(CANDIDATES)).all(), "each key is told once"


def test_depths_are_spread_evenly_and_items_of_a_seed_are_always_the_same(checkpoint: Path) -> None:
    items, again = items_of(checkpoint, 1000, 200), items_of(checkpoint, 1000, 200)
    assert all(np.array_equal(getattr(items, field), getattr(again, field)) for field in ("prompts", "keys", "depth"))
    numbers, others = (
        {key.tobytes() for key in of_seed.reshape(-1, of_seed.shape[-1])}
        for of_seed in (items.keys, items_of(checkpoint, 1000, 200, seed=1).keys)
    )
    assert len(numbers & others) < 10, "the model may be taught with those of another seed"
    quarters = np.histogram(items.depth, bins=4, range=(0, items.prompts.shape[1]))[0]
    assert quarters.min() > 30 and quarters.sum() == 200, "50 are expected in each, 6 is the standard deviation"


@pytest.mark.parity
def test_scores_of_keys_are_those_of_pytorch() -> None:
    """And a key is said exactly if PyTorch's greedy decoding says it."""
    import torch

    from helpers.hf_oracle import hf_model

    model = hf_model()
    prompts, keys = random_ids(1, 2, 30), random_ids(2, 2, 4, 3)
    with torch.no_grad():
        spoken = model.generate(
            torch.from_numpy(prompts).long(), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    keys[:, 1] = spoken[:, 30:].numpy()
    keys[:, 2] = keys[:, 1]
    keys[:, 2, -1] = (keys[:, 1, -1] + 1) % 97
    nats, said = key_scores(*nnx.split(tiny_model()), jnp.asarray(prompts), jnp.asarray(keys))
    for row in range(2):
        for candidate in range(4):
            ids = torch.from_numpy(np.concatenate([prompts[row], keys[row, candidate]])).long()[None]
            with torch.no_grad():
                log_probabilities = model(ids).logits.double().log_softmax(-1)[0, 29:-1]
            expected = log_probabilities.gather(1, ids[0, 30:, None]).sum().item()
            assert float(nats[row, candidate]) == pytest.approx(expected, abs=2e-4)
    assert np.asarray(said).tolist() == [[False, True, False, False]] * 2


def full_forward_margin(run, items: Items) -> float:
    """The margin from logits of whole sequences; `run` gives those of `[N, T]` ids."""
    import torch

    nats = np.zeros(items.keys.shape[:2])
    for candidate in range(CANDIDATES):
        keys = items.keys[:, candidate]
        logits = torch.from_numpy(run(np.concatenate([items.prompts, keys], axis=1))).double()
        found = logits[:, items.prompts.shape[1] - 1 : -1].log_softmax(-1)
        nats[:, candidate] = found.gather(2, torch.from_numpy(keys).long()[..., None]).sum((1, 2)).numpy()
    assert len(nats) == CANDIDATES, "one group"
    return float(np.trace(nats) / CANDIDATES - nats[~np.eye(CANDIDATES, dtype=bool)].mean())


@pytest.mark.slow
@pytest.mark.parity
def test_arms_score_as_their_models_do_without_a_cache(checkpoint: Path, passkey: Passkey) -> None:
    import torch

    from helpers.hf_oracle import hf_model

    def of_pytorch(pattern: str):
        model = hf_model(**SHAPE, attention_types=[[[pattern, "local"], 1]], window_size=WINDOW)
        return lambda ids: model(torch.from_numpy(ids).long()).logits.numpy()

    def of_ours(kept: int):
        graphdef, params = nnx.split(load(checkpoint, kept=kept))
        forward = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids))
        return lambda ids: np.array(forward(params, ids))

    runs = {
        "exact": of_pytorch("global"),
        "hybrid": of_ours(KEPT),
        "without-kept": of_ours(0),
        "window-only": of_pytorch("local"),
    }
    (row,) = passkey.rows
    assert (row.multiple, row.length) == (1, CONTEXT) and tuple(arm.name for arm in row.arms) == ARMS
    items = items_of(checkpoint, CONTEXT, CANDIDATES)
    with torch.no_grad():
        expected = {arm: full_forward_margin(run, items) for arm, run in runs.items()}
    assert {arm.name: arm.margin.value for arm in row.arms if arm.name in runs} == pytest.approx(expected, abs=2e-4)
    margins = sorted(expected.values())
    assert np.diff(margins).min() > 1e-3, "the arms can be told apart"


def test_shares_and_margins_of_a_model_that_remembers_some() -> None:
    """Three of 20 are not remembered; what the model thinks of a number anyway does not count in the margin."""
    draws = np.random.default_rng(0)
    told = np.arange(2 * CANDIDATES) % CANDIDATES
    right = np.eye(CANDIDATES, dtype=bool)[told]
    taste = np.repeat(draws.normal(scale=30, size=(2, CANDIDATES)), CANDIDATES, axis=0)
    remembered = np.where(np.arange(20) < 17, 1000.0, 0.0)
    score = score_keys("exact", taste + right * 4.0, right & (remembered > 0)[:, None], told)
    assert score.margin.value == pytest.approx(4.0) and score.margin.interval == pytest.approx((4.0, 4.0))
    assert score.said.value == 17 / 20
    low, high = score.said.interval
    for bound in (low, high):  # where Wilson's score test is just at 5 %
        assert abs(17 / 20 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 20), rel=1e-5)
    strong = score_keys("exact", taste + right * remembered[:, None], right, told)
    guessed = int((taste.argmax(axis=1) == told)[17:].sum())
    assert strong.chosen.value == (17 + guessed) / 20 and strong.said.value == 1.0
    of_group = [1000.0, 700.0]  # Student's interval of two values
    reach = 12.7062 * np.std(of_group, ddof=1) / math.sqrt(2)
    assert strong.margin.interval == pytest.approx((850 - reach, 850 + reach), rel=1e-4)
    assert score_keys("exact", np.zeros((10, 10)), right[:10], told[:10]).chosen.value == 0.0, "a tie is no choice"


@pytest.mark.slow
def test_lengths_are_multiples_and_those_without_positions_are_left_out(
    checkpoint: Path, passkey: Passkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passkey.notes == (
        f"left out: 2x (200 tokens), 4x (400 tokens), 8x (800 tokens); the model has {POSITIONS} positions; "
        "give it more: --max-positions 800",
    )
    assert (passkey.context, passkey.items, passkey.candidates, passkey.splats.window) == (CONTEXT, 10, 10, WINDOW)
    read = []

    def stand_in(graphdef, params, prompts: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        read.append(prompts)
        return np.zeros(keys.shape[:2]), np.zeros(keys.shape[:2], bool)

    monkeypatch.setattr("gsa_jax.evaluation.passkey.key_scores", stand_in)
    longer = evaluate_passkey(checkpoint, TOLD, window=0, kept=0, items=20, max_positions=4 * POSITIONS, batch_size=15)
    assert [(row.multiple, row.length) for row in longer.rows] == [(1, 128), (2, 256), (4, 512)]
    assert [arm.name for arm in longer.rows[0].arms] == ["exact", "hybrid", "none"]
    assert longer.rows[0].arms[0].chosen.interval is not None and longer.items == 20
    shapes = [(15, 128)] * 2 + [(15, 256)] * 2 + [(8, 512)] * 3
    assert [(len(prompts), prompts.shape[1] + 6) for prompts in read] == 3 * shapes
    for first, second in zip(read[:7], read[7:14], strict=True):
        assert np.array_equal(first, second), "all arms read the same items"
    assert len(longer.notes) == 3 and "window-only is left out" in longer.notes[1]
    with pytest.raises(InputError, match="context = 200: the model has 128 positions; give it more: --max-positions 2"):
        evaluate_passkey(checkpoint, TOLD, context=200)


def test_what_cannot_be_asked_is_refused(checkpoint: Path, run_gsa) -> None:
    with pytest.raises(InputError, match="items = 15: must be a multiple of 10"):
        evaluate_passkey(checkpoint, TOLD, items=15)
    with pytest.raises(InputError, match="items = 0: must be >= 1"):
        evaluate_passkey(checkpoint, TOLD, items=0)
    with pytest.raises(InputError, match=r"context = 30: must be >= \d+, for a number and the question"):
        evaluate_passkey(checkpoint, TOLD, context=30)
    with pytest.raises(InputError, match=r"the text has \d+ tokens, too few for items of \d+; give a longer one"):
        evaluate_passkey(checkpoint, STORIES, max_documents=1, max_positions=8 * POSITIONS, items=10)
    words = ["eval", checkpoint, "--text", TOLD]
    run_gsa(*words, "--items", 10).assert_refused("--items belongs to --task passkey")
    run_gsa(*words, "--position-extension", "tile").assert_refused("--position-extension", "--max-positions N")


@pytest.mark.slow
def test_the_command_prints_and_writes_what_the_library_finds(
    run_gsa, checkpoint: Path, passkey: Passkey, tmp_path: Path
) -> None:
    out = tmp_path / "passkey.json"
    words = ["--task", "passkey", "--context", CONTEXT, "--items", CANDIDATES, "--json", out]
    outcome = run_gsa("eval", checkpoint, "--text", TOLD, *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(out.read_text(encoding="utf-8")) == json.loads(json.dumps(dataclasses.asdict(passkey)))
    for row in passkey.rows:
        for arm in row.arms:
            lines = [
                line for line in outcome.out.splitlines() if f" {arm.name} " in line and f" ({row.multiple}x)" in line
            ]
            assert len(lines) == 1 and f"{arm.chosen.value:.3f} [" in lines[0] and f"{arm.margin.value:.3f}" in lines[0]
    assert passkey.notes[0] in outcome.out and "10 items of each length" in outcome.out
