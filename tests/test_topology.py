"""Names of machines, and how a compiler that dies, refuses or is missing is quoted; without one.

May be changed here: names, and what compilers have been seen to say.
"""

import signal

import pytest

from gsa_jax import InputError, topology
from gsa_jax.topology import CompilerAborted, DoesNotFit, compile_for, parse_topology
from helpers.covering import covering, pairs
from helpers.mishaps import TOO_LARGE, TooLarge, Unsupported, dies, is_wrong, lowered, refuses

# Of libtpu 0.0.42, shortened.
ABORT = """Failed to find host bounds for accelerator type: WARNING: could not determine TPU accelerator type
F1126 00:39:22.326654   24628 fusion_util.cc:3959] Check failed: chunks == 1 TransformWindow: Loop will not progress.
dynamic_base_bounds: ()
*** Check failure stack trace: ***
    @     0x7fe24569bc54  absl::log_internal::LogMessage::SendToLog()
E1126 00:39:22.717616   24628 coredump_hook.cc:310] RAW: Remote crash data gathering hook invoked.
"""


@pytest.mark.parametrize(
    ("name", "platform", "devices", "gib"),
    [
        ("v4:2x2x1", "tpu", 4, 30.75),
        ("v5e:1x1", "tpu", 1, 15.75),
        ("v5e:8x8", "tpu", 64, 15.75),
        ("v5p:2x2x4", "tpu", 16, 95.74),
        ("v6e:2x4", "tpu", 8, 31.25),
        ("tpu7x:2x2x1", "tpu", 8, 94.75),
        ("h100", "cuda", 1, 79.1),
        ("h100:8", "cuda", 8, 79.1),
        ("a100:16", "cuda", 16, 79.2),
    ],
)
def test_names(name, platform, devices, gib):
    found = parse_topology(name)
    assert (found.name, found.platform, found.devices) == (name, platform, devices)
    assert found.memory / 2**30 == pytest.approx(gib, abs=0.1)


@pytest.mark.parametrize(
    "name", ["v7x", "v5e-8", "v5e", "v5e:8", "v5e:0x4", "v5e:2x2x2x2", "h100:", "h100:0", "h100:12"]
)
def test_an_unknown_machine_is_refused_and_the_known_ones_are_listed(name):
    with pytest.raises(InputError, match="unknown") as error:
        parse_topology(name)
    assert all(known in str(error.value) for known in ("v5e:2x4", "tpu7x:2x2x1", "h100:8", "a100"))


@pytest.fixture
def no_compiler_needed(monkeypatch):
    """For programs that never reach the compiler; the CPU's devices stand for those of the machine."""
    monkeypatch.setattr(topology, "_require_compiler", lambda topology: None)
    monkeypatch.setattr(
        topology, "_PROGRAM", "from gsa_jax import topology as t; t._devices = lambda topology: ([], {}); t._serve()"
    )


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        (ABORT, signal.SIGABRT, "aborted at fusion_util.cc:3959: Check failed: chunks == 1 TransformWindow: Loop will"),
        ("", signal.SIGKILL, "was killed; this machine may have too little memory"),
        ("a\nout of luck\n", signal.SIGSEGV, "ended with SIGSEGV: out of luck"),
    ],
)
def test_a_compiler_that_dies_is_quoted_in_one_line(no_compiler_needed, said, code, words):
    with pytest.raises(CompilerAborted) as error:
        compile_for(parse_topology("v5e:1x1"), dies, said, code, what="the step")
    line = str(error.value)
    assert line.startswith("v5e:1x1: the step does not compile") and words in line
    assert "try" in line and "\n" not in line


def test_what_the_program_raises_is_raised_here(no_compiler_needed):
    with pytest.raises(InputError, match="no such run"):
        compile_for(parse_topology("v5e:1x1"), refuses)
    with pytest.raises(RuntimeError, match="IndexError"):
        compile_for(parse_topology("v5e:1x1"), is_wrong)


def test_too_little_memory_is_a_verdict_and_other_refusals_are_errors(no_compiler_needed):
    found = compile_for(parse_topology("v5e:1x1"), lowered, TooLarge)
    assert isinstance(found, DoesNotFit)
    assert found.needed == 18.25 * 2**30 and found.line == TOO_LARGE
    with pytest.raises(InputError, match="v5e:1x1: the program does not compile: UNIMPLEMENTED: not on this chip"):
        compile_for(parse_topology("v5e:1x1"), lowered, Unsupported)


def test_a_covering_set_has_every_pair_and_is_small():
    factors = {"a": range(4), "b": range(5), "c": range(3), "d": "xy"}

    def allowed(case):
        return (case.get("a"), case.get("b")) != (0, 0)

    cases = covering(factors, allowed)
    assert cases == covering(factors, allowed)
    assert all(map(allowed, cases)) and len(cases) < 40 < 4 * 5 * 3 * 2
    found = set().union(*map(pairs, cases))
    values = [(factor, value) for factor, values in factors.items() for value in values]
    wanted = {frozenset((x, y)) for x in values for y in values if x[0] < y[0]} - {frozenset((("a", 0), ("b", 0)))}
    assert found == wanted
