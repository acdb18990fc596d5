"""`benchmarks/device.py`: what it finds on a CPU, and that it loses nothing when parts fail, disagree or take too long.

May be changed here: which mishaps it has to survive. The script runs in a process of its own, as a user's does; what
replaces its parts is a few lines before its `main`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = [
    "environment",
    "logits",
    "greedy tokens",
    "gradients",
    "resume",
    "bounds",
    "operation",
    "decoding",
    "training",
]


def run(tmp_path: Path, changes: str, minutes: float, **settings: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, parts of the JSON file, and what was printed."""
    out = tmp_path / "found" / "device.json"
    program = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nimport device, time\n{changes}\n"
    program += f"sys.exit(device.main(['--minutes', '{minutes}', '--out', {str(out)!r}]))"
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **settings}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert out.exists(), ended
    return ended.returncode, json.loads(out.read_text())["parts"], ended.stdout


MISHAPS = """
def good(bench):
    yield {"what": "a figure", "found": "42", "number": 42}
def broken(bench):
    yield {"what": "before", "found": "kept", "ok": True}
    raise RuntimeError("a part that broke\\nsecond line")
def disagreeing(bench):
    yield {"what": "sums", "found": "3", "against": "4", "ok": False}
def endless(bench):
    yield {"what": "begun", "found": "kept"}
    time.sleep(3600)
"""


def test_parts_that_fail_or_disagree_are_named_and_cost_no_other(tmp_path):
    changes = MISHAPS + "device.PARTS = {'broken': (broken, 1, 1), 'disagreeing': (disagreeing, 1, 1), "
    code, parts, printed = run(tmp_path, changes + "'huge': (good, 9999, 9999), 'good': (good, 1, 1)}", 2)
    assert code == 1
    assert {name: part["status"] for name, part in parts.items()} == {
        "broken": "failed",
        "disagreeing": "NOT ok",
        "huge": "left out",
        "good": "ok",
    }
    assert parts["broken"]["reason"] == "RuntimeError: a part that broke"
    assert parts["broken"]["findings"][0]["found"] == "kept"
    assert parts["good"]["findings"][0]["number"] == 42
    assert "broken: RuntimeError: a part that broke" in printed and "disagreeing: disagrees with the CPU" in printed
    assert "takes about 9999 s" in printed


def test_it_ends_in_time_with_what_it_has(tmp_path):
    changes = MISHAPS + "device.STARTED = time.monotonic()\n"
    changes += "device.PARTS = {'good': (good, 0, 0), 'endless': (endless, 0, 0), 'later': (good, 0, 0)}"
    code, parts, printed = run(tmp_path, changes, 0.05)
    assert code == 0
    assert [part["status"] for part in parts.values()] == ["ok", "cut", "left out"]
    assert parts["endless"]["findings"] == [{"what": "begun", "found": "kept"}]
    assert printed.count("the time was over") == 2


@pytest.mark.slow
@pytest.mark.benchmarks
def test_another_device_that_computes_something_else_is_found_out(tmp_path):
    # Two devices of the host's: the second multiplies one tensor by 2, or by 1.
    changes = """
import jax, device_parity
factor = FACTOR
load = device_parity.gsa_jax.load
def loaded(folder, **choices):
    model = load(folder, **choices)
    if jax.config.jax_default_device == jax.devices()[1]:
        weight = model.transformer.h[0].mlp.c_proj.weight
        weight.set_value(weight[...] * factor)
    return model
device_parity.gsa_jax.load = loaded
device_parity.MODES = {"hybrid": {}}
def on_second(part):
    return lambda bench: part(device.dataclasses.replace(bench, device=jax.devices()[1]))
names = ("logits", "greedy tokens", "gradients")
device.PARTS = {name: (on_second(device.PARTS[name][0]), 1, 1) for name in names}
"""
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    code, parts, _ = run(tmp_path, changes.replace("FACTOR", "2.0"), 3, **two)
    assert code == 1
    float32 = [part["findings"][0] for part in parts.values()]
    assert [finding["ok"] for finding in float32] == [False, False, False]
    difference = parts["greedy tokens"]["findings"][0]["differences"][0]
    assert difference["first_difference"] >= 0 and difference["margin_on_cpu"] > 0
    code, parts, _ = run(tmp_path, changes.replace("FACTOR", "1"), 3, **two)
    assert code == 0
    assert all(finding["ok"] for part in parts.values() for finding in part["findings"])


@pytest.mark.slow
@pytest.mark.benchmarks
def test_on_a_cpu_every_part_has_its_say_and_the_cpu_agrees_with_itself(tmp_path):
    # Much more than the minute that it takes on two idle cores, so that a busy machine leaves nothing out.
    code, parts, printed = run(tmp_path, "device.BRIEF_MINUTES = 60", 20)
    assert code == 0, printed
    assert list(parts) == PARTS
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(PARTS, "ok")
    assert all(part["findings"] for part in parts.values())
    verdicts = {name: [finding.get("ok") for finding in part["findings"]] for name, part in parts.items()}
    for name in ("logits", "greedy tokens", "gradients", "resume"):
        assert verdicts[name] and all(verdicts[name])
    assert any(finding.get("ratio") for finding in parts["operation"]["findings"])
    assert len(parts["decoding"]["findings"]) == 6
    assert [finding["utilisation"] > 0 for finding in parts["training"]["findings"]] == [True] * 3


@pytest.mark.slow
def test_half_a_minute_is_half_a_minute(tmp_path):
    code, parts, printed = run(tmp_path, "", 0.5)
    assert code == 0, printed
    assert list(parts) == PARTS
    assert {part["status"] for part in parts.values()} <= {"ok", "cut", "left out"}
    assert parts["logits"]["status"] != "left out"
