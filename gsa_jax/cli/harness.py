"""`gsa lm-eval`.

May be changed here: its options and what it prints. The model that the harness runs is `gsa_jax.lm_eval`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from gsa_jax.cli.base import Command, json_report
from gsa_jax.errors import InputError, first_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEval(Command):
    """Run tasks of EleutherAI's lm-evaluation-harness on a checkpoint; needs `pip install 'gsa-jax[lm-eval]'`."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder, with splats or without."""
    tasks: tuple[str, ...]
    """Names of tasks or groups."""
    include_path: Path | None = None
    """Folder with tasks of your own, as YAML."""
    num_fewshot: int | None = None
    """Examples in front of each question. By default what the task says."""
    limit: int | None = None
    """Take the first so many documents of each task."""
    batch_size: int = 8
    """Requests that run together."""
    window: int | Literal["all"] | None = None
    """Tokens that splat layers see exactly: a number, 0 for none, or `all`. By default the checkpoint's."""
    kept: int | None = None
    """Keys beyond the window that each head of a splat layer sees exactly. By default the checkpoint's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    json: Path | None = None
    """File to make with all results."""

    def run(self) -> int:
        try:
            from lm_eval.evaluator import simple_evaluate
            from lm_eval.tasks import TaskManager
            from lm_eval.utils import handle_non_serializable, make_table
        except ModuleNotFoundError:
            raise InputError("gsa lm-eval needs lm-evaluation-harness; pip install 'gsa-jax[lm-eval]'") from None
        from gsa_jax.lm_eval import GaussianSplatLM

        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit = {self.limit}: must be >= 1")
        if self.include_path is not None and not self.include_path.is_dir():
            raise InputError(f"{self.include_path}: no such folder; --include-path names one with tasks as YAML")
        manager = TaskManager(include_path=None if self.include_path is None else str(self.include_path))
        unknown = [name for name in self.tasks if not manager.match_tasks([name])]
        if unknown or not self.tasks:
            raise InputError(f"unknown tasks: {', '.join(unknown) or 'none given'}; `lm-eval ls tasks` lists them")
        with json_report(self.json) as write:
            model = GaussianSplatLM(
                self.checkpoint, window=self.window, kept=self.kept, dtype=self.dtype, batch_size=self.batch_size
            )
            try:
                results = simple_evaluate(
                    model=model,
                    tasks=[*manager.match_tasks(list(self.tasks))],
                    task_manager=manager,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    log_samples=False,
                )
            except OSError as error:  # also that there is no network, or no such data set
                raise InputError(f"the data of a task cannot be loaded ({first_line(error)})") from error
            assert results is not None, "there is one process"
            write(results, default=handle_non_serializable, ensure_ascii=False)
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
        return 0
