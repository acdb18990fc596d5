"""The wheel: built twice from two copies of the sources, it is the same to the byte.

May be changed here: what else must not depend on where and when a wheel is built.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("gsa_jax", "convert", "train", "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.slow
def test_two_builds_are_the_same(tmp_path):
    hashes = []
    for number, name in enumerate(("one", "a-longer-name")):
        copy = tmp_path / name
        copy.mkdir()
        for source in SOURCES:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, copy / source, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, copy / source)
        for file in copy.rglob("*"):
            os.utime(file, (1_700_000_000 + number, 1_700_000_000 + number))
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "PYTHONHASHSEED": str(number)}
        wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "..", "."]
        subprocess.run(wheel, cwd=copy, env=environment, check=True, capture_output=True)
        (built,) = tmp_path.glob("gsa_jax-*.whl")
        hashes.append(hashlib.sha256(built.read_bytes()).hexdigest())
        built.rename(tmp_path / f"{name}.whl")
    assert hashes[0] == hashes[1]
