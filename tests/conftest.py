"""Settings and fixtures of all tests, and `--strict-run`: a run in which nothing was left out.

Tests that are marked `accelerators` are deselected but with `--accelerators`, which names the compilers that are there.

May be changed here: what several test files share, and what `make test` refuses to call a success.
"""

import dataclasses
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

ROOT = Path(__file__).parents[1]
UNCHECKED = (
    "gsa_jax.cli",
    "gsa_jax.config",
    "gsa_jax.generation_config",
    "gsa_jax.splat_config",
    "gsa_jax.train.config",
)
"""Dataclasses that check themselves, and say what is wrong in a line of their own."""


def checked_modules() -> list[str]:
    """Every module of the package but `UNCHECKED`."""
    files = [*ROOT.glob("gsa_jax/**/*.py"), *ROOT.glob("convert/*.py"), *ROOT.glob("train/*.py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    names = [name if name.startswith("gsa_jax") else f"gsa_jax.{name}" for name in names]
    # A name stands for everything below it as well.
    packages = ("gsa_jax", "gsa_jax.train")
    return [name for name in names if name not in packages and not name.startswith(UNCHECKED)]


# Arguments and results are checked against their annotations, shapes included, in everything imported from here on.
jaxtyping.install_import_hook(checked_modules(), "beartype.beartype")

import gsa_jax
from gsa_jax.cli import main
from gsa_jax.convert import convert
from gsa_jax.topology import parse_topology

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_dtype_promotion", "strict")


class StrictRun:
    """Turns a run into a failure if a test was skipped or expected to fail, or if no parity test passed.

    Under xdist it sits in the controller, which hears of every test.
    """

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self.parity_passed = 0

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.left_out.append(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or hasattr(report, "wasxfail"):
            self.left_out.append(report.nodeid)
        elif report.when == "call" and report.passed and "parity" in report.keywords:
            self.parity_passed += 1

    def problems(self) -> list[str]:
        found = [f"skipped or expected to fail: {nodeid}" for nodeid in self.left_out]
        return found if self.parity_passed else [*found, "no test marked `parity` passed"]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.problems() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for problem in self.problems():
            terminalreporter.write_line(f"--strict-run: {problem}", red=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-run", action="store_true", help="fail if a test was skipped or xfailed, or if no parity test passed"
    )
    parser.addoption(
        "--accelerators",
        metavar="PLATFORMS",
        help="run the tests that compile for accelerators, and of them those for these platforms alone: tpu,cuda",
    )
    parser.addoption(
        "--fuzz-examples",
        type=int,
        default=10_000,
        help="damaged inputs that the slow part has for all readers together",
    )
    parser.addoption("--fuzz-report", metavar="FILE", help="append to it, as JSON lines, what came of damaged inputs")
    parser.addoption("--fuzz-seed", type=int, help="damage inputs in another way than every other run does")
    parser.addoption("--without-pytorch", action="store_true", help="leave out the files that import PyTorch")


# The harness has PyTorch for its oracle; it is not installed without it.
_NEEDS_PYTORCH = re.compile(r"^(import (torch|lm_eval)|from (torch|transformers|helpers\.hf_\w+) import)", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--without-pytorch") and collection_path.suffix == ".py":
        return bool(_NEEDS_PYTORCH.search(collection_path.read_text(encoding="utf-8"))) or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    platforms = (config.getoption("--accelerators") or "").split(",")

    def left_out(item: pytest.Item) -> bool:
        if "accelerators" not in item.keywords:
            return False
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        machine = parameters.get("machine") or parameters.get("case", {}).get("machine")
        return machine is None or parse_topology(machine).platform not in platforms

    deselected = [item for item in items if left_out(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not left_out(item)]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--strict-run") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(StrictRun())


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file() -> Iterator[None]:
    """Forgets compiled programs with the file that needed them.

    Each takes a few maps of memory, of which the system allows a process 65,530; beyond that, compilers crash.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For arguments that the annotations forbid, of which the package says itself what is wrong."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """For what is said of programs as users run them, their memory and their rounding, and for programs that run for
    longer than they compile. Holds in this process and in those that it starts."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """For code of others that mixes dtypes: Hugging Face's Flax, and Flax's layer norm in bfloat16."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def standard_promotion_throughout() -> Iterator[None]:
    """The same for all tests and fixtures of a file: optax mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def story_neo() -> Path:
    """The bundled model: a Hugging Face folder."""
    return gsa_jax.assets.story_neo()


@pytest.fixture(scope="session")
def story_checkpoint(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a checkpoint with two splats per head. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("story") / "checkpoint"
    convert(story_neo, folder, splats=gsa_jax.SplatConfig(num_splats=2))
    return folder


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def assert_refused(self, *words: object) -> None:
        """Bad input: exit code 2, nothing on stdout, and one line on stderr that has these words."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.startswith("gsa: ") and self.err.count("\n") == 1, self
        for word in words:
            assert str(word) in self.err


@pytest.fixture
def run_gsa(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Runs `gsa` with these arguments in this process."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # the command sets its own
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["gsa", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    yield run
    signal.signal(signal.SIGTERM, handler)
