"""A conversion that is killed, terminated or runs out of disk leaves nothing that could be taken for a result."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gsa_jax import InputError, load
from gsa_jax.config import GPTNeoConfig
from gsa_jax.convert import convert
from gsa_jax.files import new_folder
from gsa_jax.parameters import expected_shapes
from helpers.hf_folders import tiny_config, write_folder

# Runs the command line after it, and sends this process a signal at a given moment of the conversion.
INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
import gsa_jax.checkpoint
import gsa_jax.convert.importer as importer
from gsa_jax.cli import main

moment, number = sys.argv.pop(1), signal.Signals[sys.argv.pop(1)]
folder = Path(sys.argv[3]).parent
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored

def interrupt():
    print("interrupted", moment, flush=True)
    os.kill(os.getpid(), number)

def reading(*args, read=importer._read):
    for count, item in enumerate(read(*args)):
        if count == 5:
            interrupt()
        yield item

def copying(*args, copy=gsa_jax.checkpoint.shutil.copyfile):
    copy(*args)
    interrupt()

def writing(*args, save=gsa_jax.checkpoint.ocp.save):
    def watch():
        while not list(folder.glob(".*/weights*/state/ocdbt*/d/*")):
            time.sleep(0.001)
        interrupt()
    threading.Thread(target=watch, daemon=True).start()
    save(*args)

def written(*args, save=gsa_jax.checkpoint.ocp.save):
    save(*args)
    interrupt()

if moment == "reading":
    importer._read = reading
elif moment == "copying":
    gsa_jax.checkpoint.shutil.copyfile = copying
else:
    gsa_jax.checkpoint.ocp.save = {"writing": writing, "written": written}[moment]
main()
"""

# The same with a disk that seems to have room.
NO_PRECHECK = """
import shutil
from gsa_jax.cli import main

usage = shutil.disk_usage("/")
shutil.disk_usage = lambda path: usage._replace(free=10**15)
main()
"""

MOMENTS = ["reading", "copying", "writing", "written"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Some 50 MB, which take a moment to be written, and a tokenizer file."""
    shape = {"hidden_size": 512, "vocab_size": 2048}
    config = tiny_config(**shape, num_layers=4, attention_types=[[["global", "local"], 2]], attention_layers=None)
    shapes = expected_shapes(GPTNeoConfig.from_hf(config))
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    folder = write_folder(tmp_path_factory.mktemp("large") / "source", tensors, config)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def interrupted(source: Path, out: Path, moment: str, signal_name: str) -> subprocess.CompletedProcess[str]:
    out.parent.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, moment, signal_name, "convert", source, out],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout == f"interrupted {moment}\n", ended
    return ended


@pytest.mark.parametrize(
    "moment", ["writing", *(pytest.param(x, marks=pytest.mark.slow) for x in MOMENTS if x != "writing")]
)
def test_a_killed_conversion_leaves_nothing_that_loads(tmp_path, source, moment):
    out = tmp_path / "new" / "out"
    assert interrupted(source, out, moment, "SIGKILL").returncode == -9
    assert not out.exists()
    left = list(out.parent.iterdir()) if out.parent.exists() else []
    assert [path.name.startswith(".out.partial-") for path in left] == [True] * (moment != "reading")
    for path in left:
        with pytest.raises(InputError):
            load(path)
    convert(source, out)
    load(out)


@pytest.mark.parametrize(
    "moment", [x if x in ("reading", "writing") else pytest.param(x, marks=pytest.mark.slow) for x in MOMENTS]
)
@pytest.mark.parametrize(
    ("signal_name", "code"), [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.slow)]
)
def test_a_terminated_conversion_cleans_up(tmp_path, source, moment, signal_name, code):
    out = tmp_path / "new" / "out"
    ended = interrupted(source, out, moment, signal_name)
    assert (ended.returncode, ended.stderr) == (code, "")
    assert not list(out.parent.iterdir())


def on_a_small_disk(folder: Path, *command: object) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs a command with a disk of 4 MB mounted on `folder`: how it ended, and what it left there."""
    folder.mkdir()
    script = 'mount -t tmpfs -o size=4m tmpfs "$1"; folder=$1; shift; "$@"; code=$?; ls -A "$folder"; exit $code'
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", folder, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return ended, ended.stdout.splitlines()


@pytest.mark.parametrize("command", ["convert", pytest.param("export", marks=pytest.mark.slow)])
def test_a_disk_that_is_too_small_is_noticed_before(tmp_path, story_neo, story_checkpoint, command):
    out, given = tmp_path / "disk" / "out", {"convert": story_neo, "export": story_checkpoint}[command]
    ended, left = on_a_small_disk(out.parent, sys.executable, "-m", "gsa_jax.cli", command, given, out)
    assert ended.returncode == 2 and not left
    assert ended.stderr.startswith(f"gsa: {out}: the disk is full: 8,2") and ended.stderr.count("\n") == 1
    assert "4,194,304 free" in ended.stderr


@pytest.mark.parametrize("command", ["convert", pytest.param("export", marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_meanwhile(tmp_path, story_neo, story_checkpoint, command):
    out, given = tmp_path / "disk" / "out", {"convert": story_neo, "export": story_checkpoint}[command]
    ended, left = on_a_small_disk(out.parent, sys.executable, "-c", NO_PRECHECK, command, given, out)
    assert ended.returncode == 2 and not left
    assert ended.stderr == f"gsa: {out}: the disk is full; nothing was written\n"


def test_writers_that_outlive_a_failure_leave_nothing(tmp_path, monkeypatch):
    """As the threads of a save do that fails in one of them: a file comes after the folder was emptied."""
    remove, late = shutil.rmtree, []

    def remove_too_early(folder, **options):
        remove(folder, **options)
        if not late:
            late.append(folder / "late")
            folder.mkdir()
            late[0].touch()

    monkeypatch.setattr(shutil, "rmtree", remove_too_early)
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", needed_bytes=0):
        raise RuntimeError
    assert late and not list(tmp_path.iterdir())
