"""What a `generation_config.json` means here, against what it means to Hugging Face."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from gsa_jax import GPTNeoConfig, InputError, load
from gsa_jax.generation_config import GENERATION_CONFIG_FILE, GenerationConfig, read_generation_config
from gsa_jax.train.config import Pretrain
from gsa_jax.train.loop import train
from helpers.texts import STORIES
from helpers.tiny_checkpoints import tiny_checkpoint
from helpers.tiny_models import tiny_config

SETTINGS: list[dict[str, Any]] = [
    {"eos_token_id": 7},
    {"eos_token_id": [7, 9], "pad_token_id": 1},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0, "temperature": 0.7, "top_p": 0.95, "min_p": 0.05},
    {"do_sample": False, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
    {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "max_new_tokens": 12},
]


def read(folder: Path, **values: Any) -> GenerationConfig:
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    return read_generation_config(folder, tiny_config())


@pytest.mark.parity
@pytest.mark.parametrize("said", SETTINGS, ids=str)
def test_fields_mean_what_they_mean_to_hugging_face(said: dict[str, Any], tmp_path: Path) -> None:
    """The file is Hugging Face's own, and so are the processors that it makes of it."""
    from transformers import GenerationConfig as HFGenerationConfig
    from transformers import GPTNeoForCausalLM as HFModel

    from helpers.hf_oracle import hf_model

    HFGenerationConfig(**said).save_pretrained(tmp_path)
    got = read_generation_config(tmp_path, tiny_config())
    theirs = HFGenerationConfig.from_pretrained(tmp_path)
    if "eos_token_id" in said:
        assert list(got.eos_token_id) == (
            [theirs.eos_token_id] if isinstance(theirs.eos_token_id, int) else theirs.eos_token_id
        )
    model: HFModel = hf_model()
    model._prepare_special_tokens(theirs, device="cpu")
    made = model._get_logits_processor(theirs, input_ids_seq_length=3, device="cpu")
    found = {type(x).__name__: x for x in made}
    assert (got.repetition_penalty is not None) == ("RepetitionPenaltyLogitsProcessor" in found)
    assert got.no_repeat_ngram_size == getattr(found.get("NoRepeatNGramLogitsProcessor"), "ngram_size", None)
    if got.do_sample:
        assert got.temperature == getattr(found.get("TemperatureLogitsWarper"), "temperature", 1.0)
        assert got.top_k == getattr(found.get("TopKLogitsWarper"), "top_k", None)
        assert got.top_p == getattr(found.get("TopPLogitsWarper"), "top_p", None)
        assert got.min_p == getattr(found.get("MinPLogitsWarper"), "min_p", None)
    assert got.do_sample == theirs.do_sample
    assert got.max_new_tokens == theirs.max_new_tokens
    assert (got.pad_token_id, got.unsupported) == (theirs.pad_token_id, ())


def test_the_end_is_the_models_where_the_file_has_none(tmp_path: Path) -> None:
    config = tiny_config(eos_token_id=[5, 6])
    assert read_generation_config(tmp_path, config).eos_token_id == (5, 6)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_generation_config(tmp_path, config).eos_token_id == (5, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}', encoding="utf-8-sig")
    assert read_generation_config(tmp_path, config).eos_token_id == ()


def test_a_token_that_the_model_cannot_say_ends_nothing(tmp_path: Path) -> None:
    """As 50256 in a file of a model with a small vocabulary, which transformers writes there by itself."""
    got = read(tmp_path, eos_token_id=[50256, 3], pad_token_id=50256)
    assert (got.eos_token_id, got.pad_token_id) == ((3,), None)


def test_a_temperature_of_zero_is_greedy(tmp_path: Path) -> None:
    assert read(tmp_path, do_sample=False, temperature=0.0, top_p=0.0) == GenerationConfig.of_model(tiny_config())
    assert read(tmp_path, temperature=0.7).temperature == 0.7


def test_what_is_not_supported_is_named_if_it_asks_for_anything(tmp_path: Path) -> None:
    got = read(
        tmp_path, num_beams=4, length_penalty=1.0, bad_words_ids=[[3]], suppress_tokens=[], early_stopping=False,
        typical_p=1.0, _from_model_config=True, transformers_version="4.57.6", bos_token_id=0, output_scores=True,
    )  # fmt: skip
    assert got.unsupported == ("num_beams = 4", "bad_words_ids = [[3]]")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("\xff", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"eos_token_id": "end"}', "eos_token_id = 'end': must be a token id"),
        ('{"eos_token_id": [1.5]}', "must be a token id"),
        ('{"do_sample": "yes"}', "do_sample = 'yes'"),
        ('{"do_sample": true, "temperature": 0.0}', "temperature = 0.0"),
        ('{"top_p": 2}', "top_p = 2"),
        ('{"top_k": -1}', "top_k = -1"),
        ('{"min_p": "much"}', "min_p = 'much'"),
        ('{"repetition_penalty": -1}', "repetition_penalty = -1"),
        ('{"max_new_tokens": 0}', "max_new_tokens = 0"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "generation_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"generation_config\.json: ") as refused:
        read_generation_config(tmp_path, tiny_config())
    assert words in str(refused.value)


def test_a_model_knows_its_own(story_checkpoint: Path) -> None:
    assert load(story_checkpoint).generation_config.eos_token_id == (0,)


def test_a_model_may_have_several_ends() -> None:
    """And keeps them in the folder it is exported to."""
    config = tiny_config(eos_token_id=[3, 4])
    assert config.eos_token_id == (3, 4)
    assert GPTNeoConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    for wrong in ("3", [[3]]):  # numbers beyond the vocabulary end nothing
        with pytest.raises(InputError, match="eos_token_id = "):
            tiny_config(eos_token_id=wrong)


@pytest.mark.slow
def test_a_model_from_scratch_does_not_generate_as_its_tokenizers_model(tmp_path: Path, story_neo: Path) -> None:
    tokenizer = tiny_checkpoint(tmp_path / "other", story_neo)
    (tokenizer / GENERATION_CONFIG_FILE).write_text('{"do_sample": true, "max_new_tokens": 7}', encoding="utf-8")
    config = Pretrain(out=tmp_path / "run", tokenizer=tokenizer, text=STORIES, steps=1, batch_size=1, context=16)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
        files = {path.name for path in train(config).model.iterdir()}
    assert "tokenizer.json" in files and GENERATION_CONFIG_FILE not in files
