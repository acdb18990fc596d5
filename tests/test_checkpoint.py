"""Bad checkpoints and bad requests: one line that names the thing, exit code 2, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gsa_jax import InputError, generate, load
from gsa_jax.checkpoint import save
from helpers.tiny_models import tiny_config, tiny_weights

# Each of these damages a checkpoint folder and returns what the message has to name.


def weights_truncated(folder: Path) -> list[object]:
    file = max((folder / "weights").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    return [folder / "weights", "damaged checkpoint"]


def tree_truncated(folder: Path) -> list[object]:
    for file in (folder / "weights" / "state" / "d").iterdir():
        os.truncate(file, 500)
    return [folder / "weights", "damaged checkpoint"]


def weights_deleted(folder: Path) -> list[object]:
    max((folder / "weights").rglob("*"), key=lambda path: path.stat().st_size).unlink()
    return [folder / "weights", "damaged checkpoint"]


def weights_missing(folder: Path) -> list[object]:
    shutil.rmtree(folder / "weights")
    return [folder, "not a gsa-jax checkpoint (no weights/ in it)"]


def weights_empty(folder: Path) -> list[object]:
    shutil.rmtree(folder / "weights")
    (folder / "weights").mkdir()
    return [folder / "weights", "damaged checkpoint"]


def checkpoint_config_missing(folder: Path) -> list[object]:
    (folder / "config.json").unlink()
    return [folder / "config.json", "no such file"]


def checkpoint_config_of_another_shape(folder: Path) -> list[object]:
    config = json.loads((folder / "config.json").read_text()) | {"window_size": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return [folder / "config.json", "window_size = 0"]


CHECKPOINTS: list[Callable[[Path], list[object]]] = [
    weights_truncated, tree_truncated, weights_deleted, weights_missing, weights_empty, checkpoint_config_missing,
    checkpoint_config_of_another_shape,
]  # fmt: skip


# The command mutes what threads of TensorStore raise after it has failed; they may outlive it in this process.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", CHECKPOINTS, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint(run_gsa, tmp_path, story_checkpoint, damage):
    folder = tmp_path / "checkpoint"
    shutil.copytree(story_checkpoint, folder)
    words = damage(folder)
    run_gsa("export", folder, tmp_path / "out").assert_refused(*words)
    run_gsa("generate", folder, "--prompt", "Once").assert_refused(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_weights_that_do_not_fit_the_configuration(run_gsa, tmp_path, story_checkpoint):
    folder = tmp_path / "checkpoint"
    shutil.copytree(story_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 511}
    (folder / "config.json").write_text(json.dumps(config))
    expected = [folder, "transformer.wpe.weight has shape [512, 192], expected [511, 192]"]
    run_gsa("generate", folder, "--prompt", "Once").assert_refused(*expected)
    run_gsa("export", folder, tmp_path / "out").assert_refused(*expected)
    assert not (tmp_path / "out").exists()


def test_a_damaged_report(run_gsa, tmp_path, story_checkpoint):
    shutil.copytree(story_checkpoint, tmp_path / "checkpoint")
    for content in ("not json", "[]", '{"dialect": "klingon"}', '{"dialect": 3}'):
        (tmp_path / "checkpoint" / "conversion.json").write_text(content)
        outcome = run_gsa("export", tmp_path / "checkpoint", tmp_path / "out", "--exact")
        outcome.assert_refused(tmp_path / "checkpoint" / "conversion.json", "damaged")


def test_a_hugging_face_folder_is_not_a_checkpoint(run_gsa, tmp_path, story_neo):
    words = [story_neo, "not a gsa-jax checkpoint", f"gsa convert {story_neo} OUT"]
    run_gsa("generate", story_neo, "--prompt", "Once").assert_refused(*words)
    run_gsa("export", story_neo, tmp_path / "out").assert_refused(*words)
    run_gsa("verify", story_neo, story_neo).assert_refused(*words)


def test_what_may_not_be_read_is_not_called_damaged(run_gsa, story_checkpoint, monkeypatch):
    secret = story_checkpoint / "weights" / "commit_success.txt"
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **options: path != secret and allowed(path, mode, **options))
    outcome = run_gsa("generate", story_checkpoint, "--prompt", "Once")
    outcome.assert_refused(secret, "cannot be read (no permission)")
    assert "damaged" not in outcome.err


def test_a_platform_that_is_not_there_is_not_called_damage(story_checkpoint, story_neo, tmp_path):
    gsa = Path(sys.executable).parent / "gsa"
    for command in (["generate", story_checkpoint, "--prompt", "Once"], ["convert", story_neo, tmp_path / "out"]):
        done = subprocess.run(
            [gsa, *command], env=os.environ | {"JAX_PLATFORMS": "tpu"}, capture_output=True, text=True
        )
        assert done.returncode == 2 and "JAX_PLATFORMS=tpu" in done.stderr.splitlines()[-1]
        assert "damaged" not in done.stderr and not (tmp_path / "out").exists()


def test_a_model_of_the_hub_is_not_a_checkpoint(run_gsa):
    outcome = run_gsa("generate", "someone/some-model", "--prompt", "Once")
    outcome.assert_refused("someone/some-model: no such checkpoint folder", "gsa convert someone/some-model OUT")


def test_no_checkpoint_at_all(run_gsa, tmp_path):
    run_gsa("generate", tmp_path / "nowhere", "--prompt", "Once").assert_refused(tmp_path / "nowhere", "no such")


def test_a_checkpoint_without_a_tokenizer(run_gsa, tmp_path):
    save(tmp_path / "checkpoint", tiny_config(), tiny_weights(), copied=[])
    outcome = run_gsa("generate", tmp_path / "checkpoint", "--prompt", "Once")
    outcome.assert_refused(tmp_path / "checkpoint", "no tokenizer")


def test_a_tokenizer_that_cannot_be_read(run_gsa, tmp_path, story_checkpoint):
    shutil.copytree(story_checkpoint, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    outcome = run_gsa("generate", tmp_path / "checkpoint", "--prompt", "Once")
    outcome.assert_refused(tmp_path / "checkpoint", "tokenizer cannot be read")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "Once", "--max-new-tokens", "600"], ["600", "512 positions"]),
        (["--prompt", "Once", "--max-new-tokens", "0"], ["max_new_tokens = 0"]),
        (["--prompt", ""], ["prompt 0 is empty"]),
        (["--prompt", "Once", "--prompt", ""], ["prompt 1 is empty"]),
        (["--prompt", "Once", "--temperature=-1"], ["temperature = -1"]),
        (["--prompt", "Once", "--temperature", "nan"], ["temperature = nan"]),
        (["--prompt", "Once", "--temperature", "1", "--top-k", "0"], ["top_k = 0"]),
        (["--prompt", "Once", "--temperature", "1", "--top-p", "2"], ["top_p = 2"]),
        (["--prompt", "Once", "--top-k", "5"], ["temperature = 0 is greedy"]),
        (["--prompt", "Once", "--num-samples", "0"], ["--num-samples 0"]),
        (["--prompt", "Once", "--num-samples", "2"], ["--num-samples 2", "--temperature"]),
        (["--prompt", "Once", "--prompt", "Twice", "--stream"], ["--stream"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_bad_request(run_gsa, story_checkpoint, options, words):
    run_gsa("generate", story_checkpoint, *options).assert_refused(*words)


def test_nothing_is_printed_before_a_request_is_refused(run_gsa, story_checkpoint):
    outcome = run_gsa("generate", story_checkpoint, "--prompt", "Once", "--stream", "--max-new-tokens", "600")
    outcome.assert_refused("512 positions")


@pytest.mark.parametrize("token", [-1, 1024, 10**12])
def test_token_ids_outside_of_the_vocabulary(story_checkpoint, token):
    model = load(story_checkpoint)
    with pytest.raises(InputError, match=rf"prompt 1 holds token id {token}, outside of the vocabulary of 1024"):
        generate(model, [[1, 2], [3, token]], max_new_tokens=4)
