"""The exact arm from another checkpoint, arms with more positions, and arms that are scored in memory."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gsa_jax import InputError, SplatConfig, load_tokenizer
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.evaluation.arms import left_out, make_arms, rows_at_once
from gsa_jax.evaluation.perplexity import Evaluation, evaluate, score_arms
from gsa_jax.parameters import POSITION_EMBEDDING, extend_positions
from gsa_jax.text import read_documents, text_rows
from gsa_jax.tokenizer_folder import tokenizer_files
from helpers.texts import STORIES
from helpers.tiny_checkpoints import SHAPE, WINDOW, tiny_checkpoint

CONTEXT, LONGER = 100, 256


@pytest.fixture(scope="module")
def checkpoint(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return tiny_checkpoint(folder, story_neo, splats=SplatConfig(num_splats=3, window=WINDOW))


@pytest.fixture(scope="module")
def reference(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("reference"), story_neo, seed=1)


@pytest.fixture(scope="module")
def own(checkpoint: Path) -> Evaluation:
    return evaluate(checkpoint, STORIES, context=CONTEXT)


def scores(evaluation: Evaluation) -> dict[str, float]:
    return {arm.name: arm.cross_entropy.value for arm in evaluation.arms}


def cost(model, checkpoint: Path, context: int, max_documents: int | None = None) -> float:
    """Nats per token of the stories."""
    import torch

    documents = read_documents(STORIES)[:max_documents]
    config = dataclasses.replace(load_tensors(checkpoint)[0], max_position_embeddings=context)
    windows = text_rows(documents, load_tokenizer(checkpoint), config)
    ids = torch.from_numpy(windows.input_ids).long()
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return nats.numpy()[windows.attention_mask[:, 1:]].astype(np.float64).mean()


@pytest.mark.slow
@pytest.mark.parity
def test_the_reference_is_the_exact_arm(checkpoint: Path, reference: Path, own: Evaluation) -> None:
    from helpers.hf_oracle import hf_model

    found = evaluate(checkpoint, STORIES, context=CONTEXT, reference=reference)
    expected = cost(hf_model(1, **SHAPE), checkpoint, CONTEXT)
    assert scores(found) == scores(own) | {"exact": pytest.approx(expected, abs=1e-5)}
    assert scores(found)["exact"] != pytest.approx(scores(own)["exact"], abs=1e-3)
    for arm in found.arms:
        assert arm.perplexity_ratio.value == pytest.approx(np.exp(arm.cross_entropy.value - expected), rel=1e-4)
    assert evaluate(checkpoint, STORIES, context=CONTEXT, reference=checkpoint) == own, "its splats are not used"


@pytest.mark.slow
@pytest.mark.parity
def test_a_document_is_read_in_longer_windows(run_gsa, checkpoint: Path, reference: Path, tmp_path: Path) -> None:
    import torch

    from helpers.hf_oracle import hf_model

    out = tmp_path / "scores.json"
    words = ["--window", 0, "--max-positions", LONGER, "--position-extension", "tile", "--reference", reference]
    outcome = run_gsa("eval", checkpoint, "--text", STORIES, "--max-documents", 1, *words, "--json", out)
    assert (outcome.code, outcome.err) == (0, "")
    found = json.loads(out.read_text(encoding="utf-8"))
    assert (found["documents"], found["context"], found["buckets"][-1]["first"]) == (1, LONGER, 128)
    _, tensors = extend_positions(*load_tensors(reference), LONGER, "tile")
    rows = torch.from_numpy(np.array(tensors[POSITION_EMBEDDING]))
    model = hf_model(1, **SHAPE, max_position_embeddings=LONGER)
    model.load_state_dict(hf_model(1, **SHAPE).state_dict() | {POSITION_EMBEDDING: rows}, strict=False)
    expected = cost(model, checkpoint, LONGER, max_documents=1)
    assert found["arms"][0]["cross_entropy"]["value"] == pytest.approx(expected, abs=1e-5)


def test_arms_in_memory_score_as_those_of_the_checkpoint(checkpoint: Path, own: Evaluation) -> None:
    config, tensors = load_tensors(checkpoint)
    documents = read_documents(STORIES)
    windows = text_rows(documents, load_tokenizer(checkpoint), config, CONTEXT)
    found = score_arms(make_arms(config, tensors), documents, windows, checkpoint=own.checkpoint, text=own.text)
    assert found == own


def test_memory_of_a_batch_is_bounded() -> None:
    assert [rows_at_once(length, 8) for length in (64, 512, 1024, 2048, 4096, 9000)] == [8, 8, 4, 2, 1, 1]
    assert rows_at_once(512, 3) == 3


def test_a_reference_with_more_positions_does_not_lengthen_the_rows(checkpoint: Path, tmp_path: Path) -> None:
    config, tensors = load_tensors(checkpoint)
    save(tmp_path / "long", *extend_positions(config, tensors, LONGER, "tile"), copied=tokenizer_files(checkpoint))
    found = evaluate(checkpoint, STORIES, reference=tmp_path / "long")
    assert found.context == config.max_position_embeddings < LONGER
    assert found == evaluate(checkpoint, STORIES), "tiled, its first positions are the same"


@pytest.mark.parametrize(
    ("num_splats", "kept", "missing"),
    [((2, 1), (0, 4), "without-splats"), ((0, 2), (4, 4), "without-kept"), ((2, 1), (0, 0), "without-splats")],
)
def test_a_layer_that_would_see_nothing_is_no_arm(num_splats, kept, missing, story_neo: Path, tmp_path: Path) -> None:
    """Without a window, in layers that do not have the same."""
    splats = SplatConfig(num_splats=num_splats, window=0, kept=kept, layers="all")
    config, tensors = load_tensors(tiny_checkpoint(tmp_path / "model", story_neo, splats=splats))
    arms = {"exact", "hybrid", "without-splats", "without-kept", "none"}
    arms -= {missing, "without-kept"} if not any(kept) else {missing}
    assert set(make_arms(config, tensors)) == arms
    notes = " ".join(left_out(config))
    assert missing in notes and "window-only is left out" in notes


def test_what_is_no_reference_is_refused(checkpoint: Path, story_neo: Path, tmp_path: Path) -> None:
    config, tensors = load_tensors(checkpoint)
    smaller = tiny_checkpoint(tmp_path / "small", story_neo, vocab_size=1030)
    with pytest.raises(InputError, match="reference has a vocabulary of 1030, the checkpoint one of 1024"):
        evaluate(checkpoint, STORIES, reference=smaller)
    longer = extend_positions(config, tensors, LONGER, "tile")
    with pytest.raises(
        InputError, match="128 positions, fewer than the checkpoint's 256; extend it: --max-positions 2"
    ):
        make_arms(*longer, reference=(config, tensors))
    other = tmp_path / "other"
    save(other, config, tensors, copied=tokenizer_files(checkpoint))
    values = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    (other / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError, match="its tokenizer has another vocabulary than that of"):
        evaluate(checkpoint, STORIES, reference=other)
    with pytest.raises(InputError, match="nowhere: no such checkpoint folder"):
        evaluate(checkpoint, STORIES, reference=tmp_path / "nowhere")
