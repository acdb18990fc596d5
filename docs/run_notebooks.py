"""Runs the notebooks of this folder and stores what they print: `python docs/run_notebooks.py`.

May be changed here: how a notebook is run, and what of its output is kept. `tests/test_notebooks.py` runs them in the
same way and stores nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NOTEBOOKS = ("tour", "convert_your_own", "tpu")


def execute(name: str, folder: Path) -> nbformat.NotebookNode:
    """Runs a notebook in a folder.

    Cells that are tagged `skip-execution` are left out: they install.

    Raises:
        CellExecutionError: of nbclient; a cell failed.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where `gsa` is
    environment = os.environ | {"PATH": path}
    # tqdm misses a package for widgets, which a run without a browser has no use for.
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    return client.execute(env=environment)


def main() -> None:
    """Stores every notebook with its outputs."""
    for name in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(name, Path(folder))
        notebook.metadata["language_info"] = {"name": "python"}  # not the version of who ran it
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
