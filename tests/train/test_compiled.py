"""`gsa train --dry-run --topology`: what is refused, tabled and proposed; compilers are played here.

What real ones say is in `tests/accelerators`. May be changed here: the order in which remedies are tried.
"""

import importlib.util
from pathlib import Path

import jax
import pytest

from gsa_jax import InputError
from gsa_jax.topology import Compiled, CompilerAborted, DoesNotFit, parse_topology
from gsa_jax.train import compiled
from gsa_jax.train.compiled import compile_step, find_remedy, lower_step
from gsa_jax.train.config import MeshConfig, OptimizerConfig, Pretrain
from helpers.texts import STORIES

GIB = 2**30
PROGRAM = """
%more (n: (s32[])) -> pred[] {
  %n = (s32[]) parameter(0)
  %count = s32[] get-tuple-element(%n), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}
%step (m: (s32[])) -> (s32[]) {
  %m = (s32[]) parameter(0)
  %x = f32[1000,1000] custom-call(), custom_call_target="x"
  %sum = f32[1000,1000] all-reduce(%x), channel_id=1, to_apply=%add
  %product = f32[1000,1000] dot(%x, %sum), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (s32[]) tuple(%product)
}
ENTRY %main (k: (s32[])) -> (s32[]) {
  %k = (s32[]) parameter(0)
  ROOT %loop = (s32[]) while(%k), condition=%more, body=%step
}
"""


def pretrain(**settings):
    paths = dict.fromkeys(("out", "text", "tokenizer"), Path("x"))
    return Pretrain(**{"batch_size": 32, "context": 64} | paths | settings)


@pytest.fixture
def play(monkeypatch):
    """Lets `fits(config)` answer for the compiler; gives the configurations that it was asked about."""

    def with_verdict(fits):
        asked = []

        def compile_for(topology, function, config, *, what):
            assert function is lower_step
            asked.append(config)
            if fits(config):
                return Compiled(PROGRAM, "TPU v5 lite", 3 * GIB, GIB, 2 * GIB, 12.0)
            return DoesNotFit(20 * GIB, "RESOURCE_EXHAUSTED", 5.0)

        monkeypatch.setattr(compiled, "compile_for", compile_for)
        return asked

    return with_verdict


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--topology", "v5e:2x4"),
            "--topology compiles for a machine that is not here and trains nothing; add --dry-run",
        ),
        (("--dry-run", "--topology", "v5e-8"), "topology v5e-8: unknown; known, with other numbers as well: v4:2x2x1"),
        (("--dry-run", "--topology", "v5e:2x4", "--mesh.fsdp", 3), "v5e:2x4: mesh fsdp x tensor = 3 x 1 = 3 does not"),
        (("--dry-run", "--topology", "h100", "--mesh.data", 2), "h100: mesh data x fsdp x tensor = 2 x 1 x 1 = 2, but"),
        (
            ("--dry-run", "--topology", "v5e:2x4"),
            "v5e:2x4: its compiler is missing: pip install 'gsa-jax[tpu-compiler]'",
        ),
        (("--dry-run", "--topology", "a100"), "a100: its compiler is missing: pip install 'gsa-jax[gpu-compiler]'"),
    ],
)
def test_what_is_refused(tmp_path, run_gsa, monkeypatch, options, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command = ("train", "pretrain", tmp_path / "run", "--text", STORIES, "--tokenizer", "any")
    run_gsa(*command, *options).assert_refused(words)
    assert not (tmp_path / "run").exists()


def test_several_machines_make_a_table(tmp_path, run_gsa, play):
    play(lambda config: True)
    command = ("train", "pretrain", tmp_path / "run", "--text", "any", "--tokenizer", "any", "--dry-run")
    shown = run_gsa(*command, "--topology", "v5e:2x4", "h100", "--batch-size", 16)
    assert shown.code == 0 and "compiled and not run" in shown.out
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines(shown.out)}
    assert rows["data x fsdp x tensor"] == ["8 x 1 x 1", "1 x 1 x 1"]
    assert rows["rows at a time"] == ["2", "16"]
    assert rows["peak, GiB"] == ["3.00", "3.00"] and rows["memory, GiB"] == ["15.75", "79.14"]
    assert rows["verdict"] == ["fits", "fits"]
    assert rows["all-reduce, MB a step"] == ["12.0"] * 2 and rows["all-gather, MB a step"] == ["0.0"] * 2
    assert rows["matrix TFLOP a step"] == ["0.006"] * 2  # 3 x 2 x 1000^3
    assert not (tmp_path / "run").exists()


def lines(table):
    return [line.split("│") for line in table.splitlines() if "│" in line]


def test_a_compiler_that_aborts_is_one_line_after_what_others_said(tmp_path, run_gsa, monkeypatch):
    def compile_for(topology, function, config, *, what):
        if topology.kind == "v4":
            raise CompilerAborted(f"{topology.name}: aborted at fusion.cc:1")
        return Compiled(PROGRAM, "", 3 * GIB, GIB, 2 * GIB, 12.0)

    monkeypatch.setattr(compiled, "compile_for", compile_for)
    command = ("train", "pretrain", tmp_path / "run", "--text", "any", "--tokenizer", "any", "--dry-run")
    shown = run_gsa(*command, "--topology", "v5e:2x4", "v4:2x2x1")
    assert shown.code == 2 and shown.err == "gsa: v4:2x2x1: aborted at fusion.cc:1\n"
    assert "v5e:2x4" in shown.out and "v4" not in shown.out


def test_a_step_that_does_not_fit_is_no_error(tmp_path, run_gsa, play):
    play(lambda config: config.remat and config.mesh.fsdp == 8)
    command = ("train", "pretrain", tmp_path / "run", "--text", "any", "--tokenizer", "any", "--dry-run")
    shown = run_gsa(*command, "--topology", "v5e:2x4")
    assert shown.code == 0 and "does not fit" in shown.out and "20.00" in shown.out
    assert shown.out.endswith("v5e:2x4: fits with --remat --mesh.fsdp 8\n")


@pytest.mark.parametrize(
    ("fits", "options"),
    [
        (lambda c: c.remat, "--remat"),
        (lambda c: c.mesh.fsdp == 8, "--remat --mesh.fsdp 8"),
        (lambda c: c.optimizer.accumulate == 4, "--remat --mesh.fsdp 8 --optimizer.accumulate 4"),
        (lambda c: c.batch_size == 8, "--remat --mesh.fsdp 8 --batch-size 8"),
        (lambda c: False, None),
    ],
)
def test_remedies_are_tried_in_order_each_on_top_of_those_before(play, fits, options):
    asked = play(fits)
    noted = []
    config, machine = pretrain(mesh=MeshConfig(fsdp=2)), parse_topology("v5e:2x4")
    assert find_remedy(config, machine, note=noted.append) == options
    assert options is None or noted[-1] == options
    assert len(asked) == len(noted) <= 5
    assert all(changed.remat for changed in asked)


def test_what_is_done_already_is_not_proposed(play):
    play(lambda config: config.batch_size == 8)
    settings = {"remat": True, "mesh": MeshConfig(data=1, fsdp=8), "optimizer": OptimizerConfig(accumulate=4)}
    found = find_remedy(pretrain(**settings), parse_topology("v5e:2x4"))
    assert found == "--optimizer.accumulate 1 --batch-size 8"
    assert find_remedy(pretrain(remat=True, batch_size=1), parse_topology("h100")) is None


def test_more_memory_than_there_is_does_not_fit_even_where_the_compiler_says_nothing(monkeypatch):
    """CUDA's never refuses a program for its size."""
    made = Compiled(PROGRAM, "", 81 * GIB, GIB, 80 * GIB, 1.0)
    monkeypatch.setattr(compiled, "compile_for", lambda *arguments, what: made)
    report = compile_step(pretrain(), parse_topology("h100"))
    assert not report.fits and report.needed == 81 * GIB and report.temporaries == 80 * GIB


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(InputError, match="does not divide the 2 rows"):
        lower_step(jax.devices() * 8, pretrain(batch_size=2))


def test_the_step_that_is_lowered_takes_the_whole_batch(standard_promotion):
    """And donates the state, which is what a checkpoint holds."""
    lowered = lower_step(jax.devices(), pretrain(optimizer=OptimizerConfig(accumulate=2, ema_decay=0.5)))
    (state, frozen, teacher, batch), _ = lowered.args_info
    assert {name: tuple(info.shape) for name, info in batch.items()} == dict.fromkeys(batch, (32, 64))
    assert set(state) == {"params", "opt_state", "ema"} and frozen == teacher == {}
    assert all(info.donated for info in jax.tree.leaves(state))
    assert not any(info.donated for info in batch.values())
