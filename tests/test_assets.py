"""The bundled splats tell the bundled model's stories.

May be changed here: what they have to reach on text that they were not trained on.
"""

import pytest

from gsa_jax import load, load_tokenizer
from gsa_jax.convert import convert
from gsa_jax.evaluation.perplexity import evaluate
from gsa_jax.generation import generate
from helpers.texts import TOLD


def test_transformers_gives_the_model_what_it_takes(story_neo):
    # Types of tokens, which it gives unless it is told otherwise, GPT-Neo in PyTorch would add to the embeddings.
    assert set(load_tokenizer(story_neo)("Once upon a time")) == {"input_ids", "attention_mask"}


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_they_close_the_gap_and_tell_a_story(tmp_path, story_neo):
    convert(story_neo, tmp_path / "hybrid", splats=story_neo.with_name("story-neo-splats"))
    found = evaluate(tmp_path / "hybrid", TOLD)
    ratios = {arm.name: arm.perplexity_ratio.value for arm in found.arms}
    assert ratios["hybrid"] < 1.002 < ratios["without-kept"] < 1.02 < ratios["window-only"] and ratios["none"] > 5
    assert found.gap_closed is not None and found.gap_closed.value > 0.95

    model, tokenizer = load(tmp_path / "hybrid"), load_tokenizer(tmp_path / "hybrid")
    prompt = tokenizer.encode("Once upon a time, there was a little girl named Lily.")
    story = tokenizer.decode(generate(model, [prompt], max_new_tokens=120)[0])
    assert "Lily" in story and len(set(story.split())) > 30
