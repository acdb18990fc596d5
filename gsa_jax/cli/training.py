"""`gsa train` and `gsa tokenize`.

May be changed here: what a run shows while it goes on. Recipes, presets and their options are `gsa_jax.train.config`.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gsa_jax.cli.base import Command, print_table, progress, progress_console, status
from gsa_jax.errors import InputError, first_line
from gsa_jax.train.config import PRESETS, TrainConfig

if TYPE_CHECKING:
    from gsa_jax.progress import Progress
    from gsa_jax.train.compiled import StepReport
    from gsa_jax.train.metrics import Record

_SECONDS_BETWEEN_LINES = 10.0
"""Where there is no terminal to show a bar."""


def _defaults() -> dict[str, TrainConfig]:
    """The presets, with what a user has to say left open."""
    found = {}
    for name, (recipe, values) in PRESETS.items():
        required = {
            field.name: tyro.MISSING
            for field in dataclasses.fields(recipe)
            if field.default is field.default_factory is dataclasses.MISSING and field.name not in values
        }
        found[name] = recipe(**required, **values)
    return found


if TYPE_CHECKING:
    _Preset = TrainConfig
else:
    _Preset = Annotated[tyro.extras.subcommand_type_from_defaults(_defaults()), tyro.conf.arg(name="")]


def check_preset(arguments: list[str]) -> None:
    """Raises `InputError` if the arguments of `gsa train` begin with the name of a preset that there is not."""
    if arguments and not arguments[0].startswith("-") and arguments[0] not in PRESETS:
        raise InputError(f"train {arguments[0]}: unknown preset; known: {', '.join(PRESETS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenize(Command):
    """Make a file of token ids once, so that trainings need not tokenise again."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder with the configuration and the tokenizer of a model."""
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="TEXT [TEXT ...] OUT.bin")]
    """Files of documents: UTF-8 text, .jsonl or .parquet, the first two also gzipped (.gz); then the file to make."""
    text_field: str = "text"
    """Field of .jsonl and .parquet files that holds the text."""

    def run(self) -> int:
        from gsa_jax.config import CONFIG_FILE, read_config
        from gsa_jax.text_files import TextFiles
        from gsa_jax.tokenizer_folder import open_tokenizer
        from gsa_jax.train.data import write_tokens

        if len(self.files) < 2:
            raise InputError("tokenize takes a checkpoint, files of text and, last, the file to make")
        *text, out = self.files
        config = read_config(self.checkpoint / CONFIG_FILE)
        tokens = write_tokens(
            TextFiles(tuple(text), self.text_field),
            out,
            open_tokenizer(self.checkpoint),
            config,
            progress=lambda names: progress(names, "tokenising"),
        )
        print(f"{tokens:,} tokens")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train from scratch, distil splats, or fine-tune; on one device or many, and on after an interruption."""

    config: tyro.conf.OmitSubcommandPrefixes[_Preset]
    dry_run: bool = False
    """Only show how much memory each device would need, estimated from shapes, for this mesh and others."""
    topology: tuple[str, ...] = ()
    """With --dry-run: compile the step for these machines instead, which need not be here: v5e:2x4, h100, a100:8."""
    plot: bool = False
    """Draw the loss and the arms into RUN/metrics.svg at the end."""
    distributed: bool = False
    """Be one of several processes, which find one another through Slurm, Kubernetes, Open MPI or the TPU's metadata."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where nothing else tells it; goes with --num-processes and --process-id."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""

    def run(self) -> int:
        if self.topology and not self.dry_run:
            raise InputError("--topology compiles for a machine that is not here and trains nothing; add --dry-run")
        if self.dry_run:
            return _show_compiled(self.config, self.topology) if self.topology else _show_memory(self.config)
        if self.plot:
            from gsa_jax.train.plot import require_matplotlib

            require_matplotlib()
        self._join()
        import jax

        from gsa_jax.train.loop import train

        with _display(self.config.steps) as (report, reading):
            outcome = train(self.config, report=report, progress=reading)
        if jax.process_index():
            return 0
        if self.plot:
            from gsa_jax.train.plot import plot_run

            print(f"drawn: {plot_run(self.config.out)}")
        if outcome.status == "stopped":
            print(f"told to stop, and saved after step {outcome.step}; the same command goes on from there")
        else:
            print(f"{outcome.step:,} steps done; the model is {outcome.model}")
        return 0

    def _join(self) -> None:
        import jax

        given = (self.coordinator, self.num_processes, self.process_id)
        if any(value is not None for value in given) and None in given:
            raise InputError("--coordinator, --num-processes and --process-id go together; give all three or none")
        if self.coordinator is None and not self.distributed:
            return
        try:
            jax.distributed.initialize(*given)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the processes did not find one another ({first_line(error)}); "
                "give --coordinator, --num-processes and --process-id"
            ) from error


@contextmanager
def _display(steps: int) -> Iterator[tuple[Callable[[Record], None], Progress]]:
    """Shows records as they come: a bar with loss, speed and time left on a terminal, else a line now and then.

    Gives the function to report records to, and the progress of tokenising, which has a bar of its own before.
    """
    import jax
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = progress_console()
    shown_at = 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
    with Bar(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=steps, told="", visible=False)

        def reading(names: Iterable[str]) -> Iterator[str]:
            names = list(names)
            text = bar.add_task("tokenising", total=len(names), told="")
            for name in names:
                yield name
                bar.advance(text)
            bar.remove_task(text)

        def report(record: Record) -> None:
            nonlocal shown_at
            if jax.process_index():
                return
            if record["kind"] != "train":
                bar.print(_told(record), highlight=False) if console.is_terminal else print(_told(record), flush=True)
                return
            told = f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s"
            bar.update(task, visible=True, completed=record["step"], told=told)
            if not console.is_terminal and time.monotonic() - shown_at > _SECONDS_BETWEEN_LINES:
                shown_at = time.monotonic()
                left = datetime.timedelta(seconds=round((steps - record["step"]) * record["seconds_per_step"]))
                print(f"step {record['step']:,} of {steps:,}: {told}, {left} left", flush=True)

        yield report, reading


def _told(record: Record) -> str:
    if record["kind"] == "note":
        return record["text"]
    from gsa_jax.evaluation.intervals import perplexity

    arms = [name.removeprefix("cross_entropy/") for name in record if name.startswith("cross_entropy/")]
    exact = perplexity(record["cross_entropy/exact"])
    ratios = [f"{arm} {record[f'perplexity_ratio/{arm}']:.4f}" for arm in arms if arm != "exact"]
    gap = [f"gap closed {record['gap_closed']:.1%}"] if "gap_closed" in record else []
    return f"step {record['step']:,}: " + ", ".join([f"exact perplexity {exact:.3f}", *ratios, *gap])


def _show_memory(config: TrainConfig) -> int:
    from gsa_jax.train.memory import meshes_like
    from gsa_jax.train.recipes import memory_of_step

    config.check()
    with status("counting"):
        reports = memory_of_step(config, meshes_like(config.mesh))
    columns = ("parameters", "gradients", "optimizer", "ema", "weights", "activations", "working", "total")
    print_table(
        f"GiB on each device, estimated from shapes; {_batch(config)}",
        ["data x fsdp x tensor", "rows", *columns],
        [
            [" x ".join(map(str, report.mesh.values())), str(report.rows)]
            + [f"{getattr(report, column) / 2**30:.2f}" for column in columns]
            for report in reports
        ],
    )
    return 0


def _show_compiled(config: TrainConfig, names: tuple[str, ...]) -> int:
    from gsa_jax.train.compiled import compile_step, find_remedy, step_topologies

    reports, remedies = [], []
    try:
        for topology in step_topologies(config, names):
            with status(f"compiling for {topology.name}"):
                reports.append(compile_step(config, topology))
            if not reports[-1].fits:
                with status(f"compiling for {topology.name}, which it does not fit") as shown:
                    remedy = find_remedy(config, topology, note=lambda text: shown.update(f"compiling with {text}"))
                found = (
                    f"fits with {remedy}" if remedy else "fits neither with remat, fsdp, accumulation nor fewer rows"
                )
                remedies.append(f"{topology.name}: {found}")
    finally:  # what was compiled is shown even if the next compiler aborts
        if reports:
            _print_compiled(config, reports)
        print("\n".join(remedies), end="\n" if remedies else "")
    return 0


def _print_compiled(config: TrainConfig, reports: list[StepReport]) -> None:
    from gsa_jax.hlo import COLLECTIVES

    def row(what: str, value: Callable[[StepReport], str | None]) -> list[str]:
        return [what, *(value(report) or "" for report in reports)]

    def gib(number: int | None) -> str | None:
        return None if number is None else f"{number / 2**30:.2f}"

    def exchanged(kind: str) -> Callable[[StepReport], str | None]:
        return lambda report: f"{report.collective_bytes[kind] / 1e6:,.1f}" if report.collective_bytes else None

    print_table(
        f"Each device, compiled and not run: a step of {_batch(config)}",
        ["", *(report.topology.name for report in reports)],
        [
            row("data x fsdp x tensor", lambda report: " x ".join(map(str, report.mesh.values()))),
            row("rows at a time", lambda report: str(report.rows)),
            row("peak, GiB", lambda report: gib(report.needed)),
            row("memory, GiB", lambda report: gib(report.topology.memory)),
            row("verdict", lambda report: "fits" if report.fits else "does not fit"),
            row("arguments, GiB", lambda report: gib(report.arguments)),
            row("temporaries, GiB", lambda report: gib(report.temporaries)),
            *(row(f"{kind}, MB a step", exchanged(kind)) for kind in COLLECTIVES),
            row("matrix TFLOP a step", lambda r: None if r.matrix_flops is None else f"{r.matrix_flops / 1e12:.3f}"),
            row("seconds to compile", lambda report: f"{report.seconds:.0f}"),
        ],
    )


def _batch(config: TrainConfig) -> str:
    return f"{config.batch_size} rows in {config.optimizer.accumulate} parts, {config.dtype}"
