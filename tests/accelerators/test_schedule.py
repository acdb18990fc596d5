"""The benchmark that reads the compiler's schedule of the kernels.

May be changed here: nothing but what it must print.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.accelerators


@pytest.mark.parametrize("machine", ["v5e:1x1"])
def test_kernels_are_counted_with_and_without_steep_features(machine):
    script = Path(__file__).parents[2] / "benchmarks/tpu_schedule.py"
    run = subprocess.run([sys.executable, script, "--lengths", "1024"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(machine)
    rows = re.findall(r"\| 1,024 \| ([\d.]+) \+ ([\d.]+) \(([\d.]+)\) \| ([\d.]+) \+ ([\d.]+) \|", run.stdout)
    (forward, _, steep, splash, _), (both, _, steep_both, splash_both, _) = (map(float, row) for row in rows)
    assert 0 < forward < steep < both < steep_both and 0 < splash < splash_both
