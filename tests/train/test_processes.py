"""One run on several devices and in several processes: what it computes is what one device computes.

May be changed here: how devices and processes come and go. The oracle is the same run on one device, in this process.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gsa_jax import SplatConfig
from gsa_jax.checkpoint import load_tensors
from gsa_jax.train.config import Finetune, OptimizerConfig
from gsa_jax.train.loop import train
from gsa_jax.train.metrics import read_metrics
from helpers.texts import STORIES, TOLD
from helpers.tiny_checkpoints import tiny_checkpoint
from helpers.train_command import command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion_throughout")]

SPLATS = SplatConfig(num_splats=3, window=4, layers="all", norm_gain=True, far_gain=True)
ON_CPU = {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


@pytest.fixture(scope="module")
def config(tmp_path_factory, story_neo) -> Finetune:
    return Finetune(
        checkpoint=tiny_checkpoint(tmp_path_factory.mktemp("tiny"), story_neo, splats=SPLATS),
        out=tmp_path_factory.mktemp("runs") / "one",
        text=TOLD,
        eval_text=STORIES,
        steps=30,
        batch_size=8,
        context=24,
        eval_every=15,
        eval_documents=1,
        save_every=2,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        teacher_weight=0.5,
    )


@pytest.fixture(scope="module")
def one_device(config):
    """What the run records on one device, and its result."""
    train(config)
    return results(config)


def results(config: Finetune):
    records = {(record["kind"], record["step"]): record for record in read_metrics(config.out)}
    return records, load_tensors(config.out / "model")[1]


def assert_close(found, expected) -> None:
    assert found[0].keys() == expected[0].keys()
    for at, record in expected[0].items():
        for name, value in record.items():
            if isinstance(value, float) and name not in ("seconds_per_step", "tokens_per_s"):
                assert found[0][at][name] == pytest.approx(value, rel=2e-4), (at, name)
    for name, tensor in expected[1].items():
        np.testing.assert_allclose(found[1][name], tensor, rtol=0, atol=2e-4, err_msg=name)


def start(config: Finetune, devices: int, *options: object) -> subprocess.Popen[str]:
    """`gsa train` with these settings on so many simulated devices."""
    environment = os.environ | ON_CPU | {"JAX_NUM_CPU_DEVICES": str(devices)}
    environment |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*command(config), *map(str, options)], env=environment, text=True, **pipes)


def wait_for_step(run: Path, step: int, processes: Sequence[subprocess.Popen[str]]) -> None:
    wanted, path = f'"step": {step},', run / "metrics.jsonl"
    while not (path.exists() and wanted in path.read_text()):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.001)


def test_eight_devices_then_two_then_one(tmp_path, config, one_device):
    config = dataclasses.replace(config, out=tmp_path / "run")
    for devices, until, mesh in ((8, 5, ("--mesh.fsdp", 2, "--mesh.tensor", 2)), (2, 15, ("--mesh.tensor", 2))):
        process = start(config, devices, *mesh)
        wait_for_step(config.out, until, [process])
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "told to stop, and saved after step" in said, said
    train(config)
    assert_close(results(config), one_device)


def test_two_processes_of_which_one_is_killed_go_on_together(tmp_path, config, one_device):
    config = dataclasses.replace(config, out=tmp_path / "run")
    mesh = ("--mesh.fsdp", 2, "--mesh.tensor", 2)

    def start_both() -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2)
        return [start(config, 2, *mesh, *together, "--process-id", number) for number in range(2)]

    processes = start_both()
    wait_for_step(config.out, 9, processes)
    processes[1].kill()
    processes[0].kill()  # as a launcher does when one is gone
    for process in processes:
        process.communicate(timeout=60)
    assert not (config.out / "model").exists()

    processes = start_both()
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "going on from step" in said[0] and "going on from" not in said[1]
    assert_close(results(config), one_device)
