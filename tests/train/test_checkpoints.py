"""Checkpoints of a training run: bit for bit, whole or absent, and damage is noticed and passed over."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from gsa_jax import InputError
from gsa_jax.train.checkpoints import RunCheckpoints

CONFIG = {"recipe": "finetune", "model": {"window": [16, None]}, "note": "as written"}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def state_after(step: int, *, width: int = 16) -> dict:
    """A state that depends on the step everywhere, with what a float may hold.

    More than 1 KB in a tensor, because TensorStore puts smaller ones into its compressed index.
    """
    keys = jax.random.split(jax.random.key(step), 2)
    params = {
        "transformer.wte.weight": jax.random.normal(keys[0], (32, width))
        .at[0, :4]
        .set(jnp.asarray([jnp.nan, -jnp.inf, -0.0, 1e-42])),
        "transformer.ln_f.bias": jax.random.normal(keys[1], (width,)),
    }
    opt_state = OPTIMIZER.init(params)
    return {"params": params, "opt_state": jax.tree.map(lambda leaf: leaf + step, opt_state)}


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def bits(state: dict) -> list[tuple[str, np.dtype, tuple[int, ...], bytes]]:
    leaves = [(jax.tree_util.keystr(path), np.array(leaf)) for path, leaf in jax.tree.leaves_with_path(state)]
    return [(name, leaf.dtype, leaf.shape, leaf.tobytes()) for name, leaf in leaves]


def save_steps(folder: Path, *steps: int, keep: int = 3) -> None:
    with RunCheckpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_after(step), {"next_index": step * 7}, CONFIG)


def assert_restores(folder: Path, step: int, *, passed_over: tuple[int, ...] = ()) -> None:
    with RunCheckpoints(folder, keep=3) as checkpoints:
        restored = checkpoints.restore(abstract(state_after(0)))
    assert restored is not None
    assert (restored.step, restored.data) == (step, {"next_index": step * 7})
    assert bits(restored.state) == bits(state_after(step))
    assert jax.tree.structure(restored.state) == jax.tree.structure(state_after(step))
    assert len(restored.passed_over) == len(passed_over)
    for line, bad in zip(restored.passed_over, passed_over, strict=True):
        assert line.startswith(f"{folder / str(bad)}.damaged: passed over, damaged (") and "\n" not in line


def test_the_newest_are_kept_and_come_back_bit_for_bit(tmp_path):
    folder = tmp_path / "run" / "steps"
    with RunCheckpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest is None and checkpoints.restore(abstract(state_after(0))) is None
    save_steps(folder, 1, 5, 20, 100, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["100", "20"]
    assert_restores(folder, 100)
    # Read without Orbax: it is there for people.
    assert json.loads((folder / "100" / "config" / "data.json").read_text()) == CONFIG


def test_a_step_is_saved_once_and_steps_rise(tmp_path):
    with RunCheckpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(4, state_after(4), {"next_index": 28}, CONFIG)
        assert checkpoints.latest == 4
        checkpoints.save(4, state_after(5), {"next_index": 0}, CONFIG, wait=True)
        with pytest.raises(ValueError, match="step 3 cannot be saved after step 4"):
            checkpoints.save(3, state_after(3), {"next_index": 21}, CONFIG)
    assert_restores(tmp_path, 4)


def test_buffers_may_be_donated_while_they_are_written(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 7, tree), donate_argnums=0)
    start = np.arange(2_000_000, dtype=np.float32)  # large enough to be on its way to the disk for a while
    # `state` itself is never looked at through numpy: JAX does not reuse a buffer that has been.
    state, other = ({"params": {"w": jax.jit(lambda: jnp.arange(start.size, dtype=jnp.float32))()}} for _ in range(2))
    jax.block_until_ready(overwrite(other))
    assert other["params"]["w"].is_deleted()
    with RunCheckpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, {}, CONFIG)
        for _ in range(3):
            state = jax.block_until_ready(overwrite(state))
        restored = checkpoints.restore(abstract(state)) if checkpoints.latest == 1 else None
    assert restored is not None and np.asarray(restored.state["params"]["w"]).tobytes() == start.tobytes()
    assert float(state["params"]["w"][1]) == -7


def damaged_files(step: Path, damage: str) -> None:
    """Does to a checkpoint what its name says."""
    data_files = [path for path in (step / "state").rglob("d/*") if path.is_file()]
    if damage == "truncated":
        for path in data_files:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "flipped":
        weights = np.asarray(state_after(int(step.name))["params"]["transformer.wte.weight"]).tobytes()
        flipped = 0
        for path in data_files:
            content = bytearray(path.read_bytes())
            place = content.find(weights)
            if place >= 0:
                content[place + 77] ^= 0x10
                path.write_bytes(content)
                flipped += 1
        assert flipped
    elif damage == "missing":
        for path in data_files:
            path.unlink()
    elif damage == "emptied":
        for path in step.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    elif damage == "empty folder":
        shutil.rmtree(step)
        step.mkdir()
    elif damage == "other checksums":
        (step / "checksums" / "data.json").write_text("[]")
    elif damage == "other data":
        (step / "data" / "data.json").write_text('{"next_index": 211}')
    elif damage == "no state":
        shutil.rmtree(step / "state")
    else:
        (step / damage).write_bytes(b'\xff{"garbage')


DAMAGE = [
    "truncated",
    "flipped",
    "missing",
    "emptied",
    "empty folder",
    "no state",
    "other checksums",
    "other data",
    "state/_METADATA",
    "state/manifest.ocdbt",
    "data/data.json",
    "checksums/data.json",
]


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "steps"
    save_steps(folder, 10, 20, 30)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over(tmp_path, three_steps, damage):
    folder = shutil.copytree(three_steps, tmp_path / "steps")
    (folder / "30.damaged" / "state").mkdir(parents=True)  # it happened before
    damaged_files(folder / "30", damage)
    assert_restores(folder, 20, passed_over=(30,))
    # The steps after 20 come again: what is damaged must not count as the newest, or stand in their way.
    save_steps(folder, 30, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["30", "30.damaged"]
    assert_restores(folder, 30)


def test_all_damaged_is_an_error_that_changes_nothing(tmp_path, three_steps):
    folder = shutil.copytree(three_steps, tmp_path / "steps")
    for step, damage in {"10": "truncated", "20": "flipped", "30": "no state"}.items():
        damaged_files(folder / step, damage)
    with RunCheckpoints(folder, keep=3) as checkpoints, pytest.raises(InputError) as refused:
        checkpoints.restore(abstract(state_after(0)))
    message = str(refused.value)
    assert message.startswith(f"{folder}: every checkpoint is damaged (step 30: ") and "\n" not in message
    assert "step 20: params.transformer.wte.weight is not what was saved" in message and "step 10: " in message
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30"]


def test_what_is_not_damage_renames_nothing(three_steps, monkeypatch):
    """A file that this user may not read, and a platform that is not there."""
    secret, allowed = three_steps / "30" / "state", os.access
    with RunCheckpoints(three_steps, keep=3) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(os, "access", lambda path, mode, **options: path != secret and allowed(path, mode, **options))
            with pytest.raises(InputError, match=r"30/state: cannot be read \(no permission\)"):
                checkpoints.restore(abstract(state_after(0)))
        with monkeypatch.context() as patch:

            def no_device(*arguments, **options):
                raise RuntimeError("Unable to initialize backend 'cuda'")

            patch.setattr(ocp, "load_checkpointables", no_device)
            with pytest.raises(RuntimeError, match="Unable to initialize backend"):
                checkpoints.restore(abstract(state_after(0)))
        assert sorted(path.name for path in three_steps.iterdir()) == ["10", "20", "30"]
        restored = checkpoints.restore(abstract(state_after(0)))
    assert restored is not None and restored.step == 30 and not restored.passed_over


def test_another_shape_is_not_damage(three_steps):
    asked = abstract(state_after(0, width=32))
    asked["params"]["transformer.ln_f.bias"] = jax.ShapeDtypeStruct((16,), jnp.bfloat16)
    asked["ema"] = {"transformer.ln_f.bias": jax.ShapeDtypeStruct((16,), jnp.float32)}
    with RunCheckpoints(three_steps, keep=3) as checkpoints, pytest.raises(InputError) as refused:
        checkpoints.restore(asked)
    message = str(refused.value)
    assert message.startswith(f"{three_steps / '30'}: does not fit this run: missing ema.transformer.ln_f.bias [16]; ")
    assert "params.transformer.wte.weight has shape [32, 16], expected [32, 32]" in message
    assert "params.transformer.ln_f.bias has dtype float32, expected bfloat16" in message
    assert "opt_state.1.0.mu.transformer.wte.weight has shape [32, 16], expected [32, 32]" in message
    assert sorted(path.name for path in three_steps.iterdir()) == ["10", "20", "30"]


def test_it_comes_back_where_it_is_asked_for(three_steps):
    place = SingleDeviceSharding(jax.devices()[-1])
    asked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state_after(0))
    with RunCheckpoints(three_steps, keep=3) as checkpoints:
        restored = checkpoints.restore(asked)
    assert restored is not None and bits(restored.state) == bits(state_after(30))
    assert {leaf.sharding for leaf in jax.tree.leaves(restored.state)} == {place}


# Saves small states until the disk, of which most is taken after the second one, is full.
FILLS_THE_DISK = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from gsa_jax import InputError
from gsa_jax.train.checkpoints import RunCheckpoints

folder = Path(sys.argv[1]) / "steps"
state = lambda step: {"params": {"w": jnp.full(100_000, step, jnp.float32)}}
saves = 0
try:
    with RunCheckpoints(folder, keep=2) as checkpoints:
        for step in range(1, 9):
            if step == 3:
                checkpoints.wait()
                try:
                    (folder.parent / "ballast").write_bytes(bytes(10**9))
                except OSError:
                    pass
                with open(folder.parent / "ballast", "r+b") as ballast:
                    ballast.truncate(ballast.seek(0, 2) - int(sys.argv[2]))
            checkpoints.save(step, state(step), {"next_index": step}, {})
            saves += 1
    print("no error")
except InputError as error:
    print(error)
(folder.parent / "ballast").unlink()
with RunCheckpoints(folder, keep=2) as checkpoints:
    restored = checkpoints.restore(jax.eval_shape(lambda: state(0)))
    print(restored.step, restored.data, float(restored.state["params"]["w"].min()), restored.passed_over)
    checkpoints.save(3, state(3), {"next_index": 3}, {}, wait=True)
    print(sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("free_bytes", [0, 300_000], ids=["at once", "while arrays are written"])
def test_a_full_disk_loses_nothing_that_was_saved(tmp_path, free_bytes):
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=8m tmpfs "$1"; exec "$3" -c "$4" "$1" "$2"'
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", disk, str(free_bytes), sys.executable, FILLS_THE_DISK],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout.splitlines() == [
        f"{disk / 'steps'}: the disk is full; last good checkpoint: step 2",
        "2 {'next_index': 2} 2.0 []",
        "['2', '3']",
    ], ended
    assert ended.returncode == 0


# Saves step after step; ends itself while the arrays of the fourth one are being written.
KILLED_WHILE_SAVING = """
import os, signal, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoints import CONFIG, RunCheckpoints, jax, jnp, state_after

folder = Path(sys.argv[1])

def watch():
    while not list(folder.glob("40.orbax*/state*/ocdbt*/d/*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

with RunCheckpoints(folder, keep=2) as checkpoints:
    for step in (10, 20, 30):
        checkpoints.save(step, state_after(step), {"next_index": step * 7}, CONFIG, wait=True)
    threading.Thread(target=watch, daemon=True).start()
    checkpoints.save(40, {"params": {"w": jnp.ones(20_000_000)}}, {}, CONFIG, wait=True)
"""


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, tmp_path, Path(__file__).parent],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == -9, ended
    left = {path.name for path in tmp_path.iterdir()} - {"20", "30"}
    assert len(left) == 1 and left.pop().startswith("40.orbax")
    assert_restores(tmp_path, 30)
    save_steps(tmp_path, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "30", "40"]
    assert_restores(tmp_path, 40)
