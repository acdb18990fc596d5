"""The splats of other checkpoints and of a run's steps."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax import SplatConfig
from gsa_jax.checkpoint import load_tensors
from gsa_jax.errors import InputError
from gsa_jax.inspection.stages import model_folder, stages
from gsa_jax.parameters import attention_tensor, is_splat
from gsa_jax.train.checkpoints import RunCheckpoints, saved_parameters
from helpers.tiny_checkpoints import tiny_checkpoint

SPLATS = SplatConfig(num_splats=5, window=8, layers="all")


@pytest.fixture(scope="module")
def tiny(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), story_neo, splats=SPLATS)


def run_of(tiny: Path, folder: Path, *, average: bool = False) -> dict[int, dict[str, np.ndarray]]:
    """A run whose splats have another place at each step; with a moving average, that is in the place of step + 100."""
    _, tensors = load_tensors(tiny)
    splats = {name: np.asarray(tensor) for name, tensor in tensors.items() if is_splat(name)}
    (folder / "steps").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    found = {}
    with RunCheckpoints(folder / "steps", keep=9) as checkpoints:
        for step in (2, 10):
            found[step] = {name: tensor + step for name, tensor in splats.items()}
            state = {"params": {**found[step], "transformer.wte.weight": np.zeros((3, 4), np.float32)}}
            if average:
                found[step] = {name: tensor + 100 for name, tensor in found[step].items()}
                state["ema"] = dict(found[step])
            state = {kind: {name: jnp.asarray(x) for name, x in tree.items()} for kind, tree in state.items()}
            checkpoints.save(step, state, {"at": step}, {"of": "a test"})
    (folder / "model").symlink_to(tiny)
    return found


@pytest.mark.parametrize("average", [False, True])
def test_steps_of_a_run_are_read_in_order(tiny: Path, tmp_path: Path, average: bool) -> None:
    expected = run_of(tiny, tmp_path / "run", average=average)
    got = saved_parameters(tmp_path / "run" / "steps", is_splat)
    assert list(got) == [2, 10]
    for step, tensors in expected.items():
        assert got[step].keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(got[step][name], tensor)


def test_stages_go_from_what_is_compared_to_the_model(tiny: Path, tmp_path: Path) -> None:
    run_of(tiny, tmp_path / "run")
    config, tensors = load_tensors(model_folder(tmp_path / "run"))
    found = stages(tmp_path / "run", tiny, config, tensors)
    assert [stage.name for stage in found] == [str(tiny), "step 2", "step 10", str(tmp_path / "run")]
    centers = np.asarray(tensors[attention_tensor(1, "splat_centers")], np.float64)
    for stage, moved in zip(found, (0, 2, 10, 0), strict=True):
        np.testing.assert_allclose(stage.centers[1], centers + moved, rtol=1e-6)


def test_other_splats_cannot_be_compared(tiny: Path, story_neo: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", story_neo, splats=SplatConfig(num_splats=4, window=8, layers="all"))
    plain = tiny_checkpoint(tmp_path / "plain", story_neo)
    for folder, words in ((other, r"\[4, 4, 8\] there"), (plain, "none there")):
        with pytest.raises(InputError, match=rf"{folder}: its splats cannot be compared.*{words}"):
            stages(tiny, folder, *load_tensors(tiny))


def test_a_run_that_has_no_model_yet(tiny: Path, tmp_path: Path) -> None:
    run_of(tiny, tmp_path / "run")
    (tmp_path / "run" / "model").unlink()
    with pytest.raises(InputError, match="has no model yet"):
        model_folder(tmp_path / "run")


def test_a_damaged_step_is_named(tiny: Path, tmp_path: Path) -> None:
    run_of(tiny, tmp_path / "run")
    step = tmp_path / "run" / "steps" / "10"
    for file in sorted((step / "state").rglob("*")):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match=f"{step}: damaged"):
        saved_parameters(tmp_path / "run" / "steps", is_splat)
