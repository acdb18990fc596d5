"""The notebooks of docs/, run as a reader runs them: in folders of their own, on the bundled model.

May be changed here: what a run must have shown. How they are run is `docs/run_notebooks.py`.
"""

import importlib.util
import signal
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from packaging.requirements import Requirement

from gsa_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "docs/run_notebooks.py")
assert spec is not None and spec.loader is not None
run_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_notebooks)
