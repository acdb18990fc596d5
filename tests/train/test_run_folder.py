"""Which runs may go on: those with the same text and checkpoint by content, wherever they lie, and perhaps more steps.

May be changed here: what may differ. What a run computes when it goes on is tested in `test_resume`.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gsa_jax.errors import InputError
from gsa_jax.train.config import MODELS, Finetune, OptimizerConfig, Pretrain
from gsa_jax.train.data import TokenStream
from gsa_jax.train.run_folder import RUN_FILE, fingerprint, open_run

MODEL = MODELS["story"]
CONTENT = {"text": "aa", "checkpoint": "bb"}


@pytest.fixture
def begun(tmp_path: Path) -> Finetune:
    config = Finetune(checkpoint=Path("ck"), out=tmp_path / "run", text=Path("t.txt"), steps=10)
    resolved, notes = open_run(config, MODEL, CONTENT)
    assert notes == () and stored(config) == resolved
    return config


def stored(config: Finetune) -> dict:
    return json.loads((config.out / RUN_FILE).read_text())


def refused(config: Finetune, content: dict[str, str] = CONTENT) -> str:
    before = (config.out / RUN_FILE).read_bytes()
    with pytest.raises(InputError) as error:
        open_run(config, MODEL, content)
    assert (config.out / RUN_FILE).read_bytes() == before and "\n" not in str(error.value)
    return str(error.value)


def test_the_same_content_in_other_places_goes_on(begun: Finetune) -> None:
    moved = dataclasses.replace(
        begun, checkpoint=Path("/b/ck"), text=(Path("a.jsonl"), Path("b.parquet")), text_field="body"
    )
    resolved, notes = open_run(moved, MODEL, CONTENT)
    assert notes == () and resolved["text"] == ["a.jsonl", "b.parquet"]


def test_other_content_in_the_same_place_is_refused_and_named(begun: Finetune) -> None:
    said = refused(begun, {**CONTENT, "text": "xx"})
    assert "the text in t.txt is not the one that it was begun with" in said and "checkpoint" not in said
    said = refused(dataclasses.replace(begun, batch_size=3), {"text": "xx", "checkpoint": "yy"})
    for words in ("the text in t.txt", "the checkpoint in ck", "batch_size was 8 and is 3"):
        assert words in said


def test_more_steps_go_on_and_fewer_do_not(begun: Finetune) -> None:
    assert "steps was 10 and is 9, and may only grow" in refused(dataclasses.replace(begun, steps=9))
    (begun.out / "model").mkdir()
    (begun.out / "model" / "config.json").write_text("{}")
    longer = dataclasses.replace(begun, steps=2000)
    resolved, notes = open_run(longer, MODEL, CONTENT)
    assert notes == ("steps was 10 and is 2,000; learning rates go on as in a run of that many",)
    assert stored(longer) == resolved and resolved["steps"] == 2000
    assert not (begun.out / "model").exists() and (begun.out / "model-10" / "config.json").read_text() == "{}"
    assert open_run(longer, MODEL, CONTENT)[1] == ()
    assert "steps was 2000 and is 10" in refused(begun)


def test_links_of_weights_and_biases_do_not_keep_a_run_from_going_on(begun: Finetune, tmp_path: Path) -> None:
    """Its own folder has some that lead to logs elsewhere; no other link is taken, and the folder may not be one."""
    (tmp_path / "elsewhere").mkdir()
    (begun.out / "wandb" / "run-1" / "logs").mkdir(parents=True)
    (begun.out / "wandb" / "run-1" / "logs" / "debug-core.log").symlink_to(tmp_path / "elsewhere")
    assert open_run(begun, MODEL, CONTENT)[1] == ()
    (begun.out / "steps").symlink_to(tmp_path / "elsewhere")
    assert "is a link that leads out of its folder" in refused(begun)
    (begun.out / "steps").unlink()
    shutil.rmtree(begun.out / "wandb")
    (begun.out / "wandb").symlink_to(tmp_path / "elsewhere")
    assert "is a link that leads out of its folder" in refused(begun)


def test_a_model_is_never_overwritten(begun: Finetune) -> None:
    for name in ("model", "model-10"):
        (begun.out / name).mkdir()
    assert "model-10 exists already" in refused(dataclasses.replace(begun, steps=20))


def test_a_run_of_an_earlier_version_goes_on_and_learns_its_content(begun: Finetune) -> None:
    """It named one text, by its place, and knew no fingerprints."""
    old = stored(begun) | {"text": "t.txt", "eval_text": None}
    del old["content"], old["text_field"]
    (begun.out / RUN_FILE).write_text(json.dumps(old))
    assert "text was ['t.txt'] and is ['u.txt']" in refused(dataclasses.replace(begun, text=Path("u.txt")))
    resolved, notes = open_run(begun, MODEL, CONTENT)
    assert notes == () and stored(begun) == resolved
    assert "the text in t.txt" in refused(begun, {**CONTENT, "text": "xx"})


def test_a_run_from_scratch_is_known_by_its_text_alone(tmp_path: Path) -> None:
    config = Pretrain(
        out=tmp_path / "run", text=Path("t.txt"), tokenizer=Path("tok"), optimizer=OptimizerConfig(schedule="constant")
    )
    open_run(config, MODEL, {"text": "aa"})
    moved = dataclasses.replace(config, tokenizer=Path("elsewhere"), text=Path("u.txt"), steps=config.steps + 1)
    assert open_run(moved, MODEL, {"text": "aa"})[1] == ("steps was 1,000 and is 1,001",)


def test_fingerprints_tell_a_single_bit() -> None:
    draws = np.random.default_rng(0)
    tensors = {"a": draws.standard_normal((3, 4), np.float32), "b": np.ones(5, ml_dtypes.bfloat16)}
    same = {"b": tensors["b"].copy(), "a": np.asfortranarray(tensors["a"])}
    assert fingerprint(same) == fingerprint(tensors)
    others = [
        {**tensors, "a": np.nextafter(tensors["a"], np.inf)},
        {**tensors, "a": tensors["a"].reshape(4, 3)},
        {"a": tensors["a"], "c": tensors["b"]},
        {**tensors, "b": tensors["b"].view(np.float16)},
    ]
    assert len({fingerprint(other) for other in [tensors, *others]}) == 5
    ids = np.arange(9, dtype=np.uint16)
    prints = [TokenStream(x, "").fingerprint() for x in (ids, ids[::1].copy(), ids[:8], ids[::-1])]
    assert prints[0] == prints[1] and len(set(prints)) == 3
