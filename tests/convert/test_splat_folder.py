"""Splats on their own: out of a checkpoint, and beside the model again.

May be changed here: what goes with them. The oracle is the checkpoint that they came from.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert import export
from gsa_jax.convert.splat_folder import SPLATS_FILE


@pytest.fixture(scope="module")
def folder(story_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("splats") / "only"
    export(story_checkpoint, out, splats_only=True)
    return out


def test_splats_come_back_bit_for_bit_on_the_same_model(tmp_path, run_gsa, story_neo, story_checkpoint, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", SPLATS_FILE]
    assert all(".splat_" in name for name in load_file(folder / SPLATS_FILE))
    assert run_gsa("convert", story_neo, tmp_path / "again", "--splats-from", folder).code == 0
    (config, tensors), (expected_config, expected) = load_tensors(tmp_path / "again"), load_tensors(story_checkpoint)
    assert config == expected_config and tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("another model", "another model: window_size is 64 and was 63"),
        ("no splats", f"no {SPLATS_FILE} in it; make it with gsa export"),
        ("damaged", "damaged"),
        ("missing", "missing transformer.h.0.attn.attention.splat_centers"),
        ("both", "--splats-from brings a configuration of its own"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, run_gsa, story_neo, folder, case, words):
    given = shutil.copytree(folder, tmp_path / "given")
    options = []
    if case == "another model":
        config = json.loads((given / "config.json").read_text()) | {"window_size": 63}
        (given / "config.json").write_text(json.dumps(config))
    elif case == "no splats":
        (given / SPLATS_FILE).unlink()
    elif case == "damaged":
        (given / SPLATS_FILE).write_bytes((given / SPLATS_FILE).read_bytes()[:-4])
    elif case == "missing":
        tensors = load_file(given / SPLATS_FILE)
        del tensors["transformer.h.0.attn.attention.splat_centers"]
        save_file(tensors, given / SPLATS_FILE)
    else:
        options = ["--preset", "hybrid"]
    run_gsa("convert", story_neo, tmp_path / "out", "--splats-from", given, *options).assert_refused(words)
    assert not (tmp_path / "out").exists()


def test_a_model_without_splats_has_none_to_export(tmp_path, run_gsa, story_neo):
    assert run_gsa("convert", story_neo, tmp_path / "plain").code == 0
    run_gsa("export", tmp_path / "plain", tmp_path / "out", "--splats-only").assert_refused("has no splats to export")
