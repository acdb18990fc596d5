"""The notebooks of docs/, run as a reader runs them: each in a folder of its own, on the bundled model.

May be changed here: what a run must have shown. How they are run is `docs/run_notebooks.py`.
"""

import contextlib
import importlib.util
import re
import threading
import time
from pathlib import Path
from types import ModuleType

import nbformat
import psutil
import pytest

from gsa_jax.train.metrics import read_metrics

DOCS = Path(__file__).parents[1] / "docs"
LARGEST = 300_000
"""Bytes of a notebook with its outputs."""


def load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_notebooks", DOCS / "run_notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNNER = load_runner()


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def everything_printed(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(printed(cell) for cell in notebook.cells if cell.cell_type == "code")


def is_installation(cell: nbformat.NotebookNode) -> bool:
    return "skip-execution" in cell.metadata.get("tags", ())


@pytest.mark.parametrize("name", RUNNER.NOTEBOOKS)
def test_a_notebook_is_stored_with_what_a_run_printed(name) -> None:
    file = DOCS / f"{name}.ipynb"
    assert file.stat().st_size < LARGEST
    text = file.read_text(encoding="utf-8")
    assert "site-packages" not in text and str(DOCS.parent) not in text and "\\u001b" not in text
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    run = [cell for cell in cells if not is_installation(cell)]
    assert [cell.execution_count for cell in run] == list(range(1, len(run) + 1))
    assert all(output.output_type != "error" for cell in run for output in cell.outputs)
    assert all(cell.source.startswith("!pip install ./gsa-jax") for cell in cells if is_installation(cell))


def test_all_notebooks_are_run() -> None:
    assert sorted(RUNNER.NOTEBOOKS) == sorted(file.stem for file in DOCS.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_tour(tmp_path) -> None:
    notebook = RUNNER.execute("tour", tmp_path)
    (costs,) = (printed(cell) for cell in notebook.cells if "import evaluate" in cell.source)
    placed, trained = (
        {name: float(ratio) for name, ratio in re.findall(r"^ +(\S+) +([\d.]+)$", part, re.MULTILINE)}
        for part in costs.split("run/model")
    )
    assert trained["hybrid"] < placed["hybrid"] < placed["window-only"] < placed["none"]
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", ())
    ]
    assert len(pictures) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parity
def test_convert_your_own(tmp_path) -> None:
    said = everything_printed(RUNNER.execute("convert_your_own", tmp_path))
    assert "20 steps done" in said and "GSAForCausalLM" in said
    assert (tmp_path / "exported/modeling_gsa.py").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_tpu(tmp_path) -> None:
    """On eight simulated devices. The training is told to stop once it has begun, and its line repeated."""
    stopper = threading.Thread(target=stop_training, args=(tmp_path / "run",))
    stopper.start()
    notebook = RUNNER.execute("tpu", tmp_path)
    stopper.join()
    said = everything_printed(notebook)
    assert "8 cpu" in said
    first, second = (printed(cell) for cell in notebook.cells if "timeout" in cell.source and "8h gsa" in cell.source)
    assert "told to stop, and saved" in first
    assert "20 steps done" in second
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert steps == list(range(1, 21))
    assert (tmp_path / "result.tgz").is_file()


def stop_training(run: Path) -> None:
    """Sends SIGTERM to `gsa train distill` after its first step, as `timeout` in its cell would after hours."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        if (run / "metrics.jsonl").exists() and any(record["kind"] == "train" for record in read_metrics(run)):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "distill" in process.cmdline() and process.name() != "timeout":
                        process.terminate()
            return
        time.sleep(0.05)
