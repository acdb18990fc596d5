"""Every reader of the package, given inputs that were damaged or made to harm: it reads them, or says why not.

`--fuzz-examples N` says how many inputs there are in all; `make fuzz` has 100,000.

May be changed here: how many there are, and what is reported. Readers are in `readers`, changes in `mutations`, and
what is a fault in `worker`.
"""

import json
import time
from pathlib import Path

import hypothesis
import pytest
from fuzz.harness import Fuzzed
from fuzz.mutations import changed
from fuzz.readers import READERS
from hypothesis import HealthCheck, given, settings


def fuzz(reader: str, examples: int, root: Path, report: Path | None, seed: int | None) -> None:
    """Reads so many inputs; with a seed, others than those of every other run."""
    started = time.monotonic()
    faults = []
    with Fuzzed(reader, root) as fuzzed:

        @settings(
            max_examples=examples,
            derandomize=seed is None,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        @given(changed(fuzzed.files, str(fuzzed.outside), READERS[reader].owned))
        def read(files):
            fuzzed.check(files)

        try:
            (read if seed is None else hypothesis.seed(seed)(read))()
        except AssertionError as fault:
            faults.append(str(fault)[:1000])
            raise
        finally:
            if report is not None:
                found = {"reader": reader, **fuzzed.counts, "slowest_s": round(fuzzed.slowest, 2), "faults": faults}
                found |= {"seconds": round(time.monotonic() - started, 1), "seed": seed}
                with report.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
    assert fuzzed.counts["refused"] > 0, fuzzed.counts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # inputs are long to print
@pytest.mark.parametrize("reader", READERS)
def test_damaged_inputs(reader, tmp_path, pytestconfig):
    examples = pytestconfig.getoption("--fuzz-examples")
    report, seed = pytestconfig.getoption("--fuzz-report"), pytestconfig.getoption("--fuzz-seed")
    fuzz(reader, max(10, examples * READERS[reader].share // 1000), tmp_path / "fuzz", report and Path(report), seed)
