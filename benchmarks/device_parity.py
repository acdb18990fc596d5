"""Does a device compute what the CPU computes? Parts of `device.py`, all on the bundled model with its splats.

May be changed here: what is compared, and how far apart it may be. Float32 may differ by rounding in another order;
bfloat16 may be off by twice what the CPU's own bfloat16 is off from its float32.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from device_bench import Bench, Device, Finding, concurrently
from flax import nnx

import gsa_jax
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.convert import convert
from gsa_jax.parameters import build_model, named_parameters
from gsa_jax.text import document_tokens, read_documents, text_rows
from gsa_jax.tokenizer_folder import tokenizer_files
from gsa_jax.train.config import Finetune, OptimizerConfig
from gsa_jax.train.loop import train
from gsa_jax.train.metrics import Record
from gsa_jax.train.objectives import cross_entropy

MODES: dict[str, dict[str, Any]] = {
    "exact": {"window": "all"},
    "hybrid": {},
    "without kept keys": {"kept": 0},
    "pure": {"window": 0, "kept": 0},
}
"""Options of `gsa_jax.load` for the splat layers."""

DTYPES = ("float32", "bfloat16")
FLOAT32_LIMIT = 1e-4
GRADIENT_LIMIT = 1e-3
"""Of float32; gradients of scales and centres sum over all tokens."""
BFLOAT16_LIMIT = 2.0
"""Times the CPU's own error in bfloat16."""
BFLOAT16_LOSS_LIMIT = 5e-3
"""Of the loss alone, whose own error on the CPU can be small by accident."""


def story(bench: Bench) -> Path:
    """The bundled model with its splats as a checkpoint, made at the first call; with one layer where time is short."""
    folder = bench.folder / "story"
    if not folder.exists():
        whole = bench.folder / "whole" if bench.brief else folder
        convert(gsa_jax.assets.story_neo(), whole, splats=gsa_jax.assets.story_neo_splats())
        if bench.brief:
            config, tensors = load_tensors(whole)
            config = dataclasses.replace(config, num_layers=1, attention_types=((("global",), 1),))
            kept = {name: x for name, x in tensors.items() if ".h." not in name or ".h.0." in name}
            save(folder, config, kept, copied=tokenizer_files(whole))
    return folder


def _rows(bench: Bench) -> dict[str, np.ndarray]:
    folder, (rows, context) = story(bench), (4, 256) if bench.accelerator else (2, 128)
    documents = read_documents(gsa_jax.assets.told_stories())[:rows]
    config, _ = load_tensors(folder)
    found = text_rows(documents, gsa_jax.load_tokenizer(folder), config, context)
    return {"ids": found.input_ids[:rows], "mask": found.attention_mask[:rows]}


def _devices(bench: Bench) -> list[Device]:
    return [bench.reference] if bench.reference == bench.device else [bench.reference, bench.device]


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of what was expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _verdict(dtype: str, error: float, error_on_cpu: float, limit: float) -> dict[str, Any]:
    """The limit as text, and whether an error keeps to it."""
    if dtype == "float32":
        return {"against": f"<= {limit:.0e}", "ok": error <= limit}
    limit = BFLOAT16_LIMIT * error_on_cpu
    return {"against": f"<= {limit:.1e}, {BFLOAT16_LIMIT:g} x the CPU's bfloat16", "ok": error <= limit}


@functools.partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef: Any, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params)(ids, mask)


def logits(bench: Bench) -> Iterator[Finding]:
    """Logits over told stories, in each mode and dtype, against the CPU's in float32."""
    folder, rows = story(bench), _rows(bench)

    def compute(device: Device, mode: str, dtype: str) -> np.ndarray:
        with jax.default_device(device):
            graphdef, params = nnx.split(gsa_jax.load(folder, dtype=dtype, **MODES[mode]))
            return np.asarray(_forward(graphdef, params, rows["ids"], rows["mask"]))[rows["mask"]]

    dtypes = {mode: DTYPES[:1] if bench.brief and mode != "hybrid" else DTYPES for mode in MODES}
    cases = [(device, mode, dtype) for device in _devices(bench) for mode in MODES for dtype in dtypes[mode]]
    results = concurrently([functools.partial(compute, *case) for case in cases])
    by_case = dict(zip(cases, results, strict=True))
    for mode in MODES:
        exact = by_case[bench.reference, mode, "float32"]
        for dtype in dtypes[mode]:
            found, on_cpu = (by_case[device, mode, dtype] for device in (bench.device, bench.reference))
            error, error_on_cpu = _relative(found, exact), _relative(on_cpu, exact)
            agreement = float(np.mean(found.argmax(-1) == exact.argmax(-1)))
            yield {
                "what": f"{mode}, {dtype}",
                "found": f"relative RMS {error:.1e}, same first choice {agreement:.2%}",
                **_verdict(dtype, error, error_on_cpu, FLOAT32_LIMIT),
                "relative_rms": error,
                "relative_rms_of_cpu": error_on_cpu,
                "same_first_choice": agreement,
                "tokens": len(found),
            }


def greedy_tokens(bench: Bench) -> Iterator[Finding]:
    """Greedy continuations in float32, token for token."""
    folder, new = story(bench), 16 if bench.brief else 64
    config, _ = load_tensors(folder)
    documents = read_documents(gsa_jax.assets.told_stories())[:3]
    prompts = [row[:12].tolist() for row in document_tokens(documents, gsa_jax.load_tokenizer(folder), config)]

    def continuation(device: Device, mode: str) -> np.ndarray:
        with jax.default_device(device):
            model = gsa_jax.load(folder, **MODES[mode])
            return gsa_jax.generate(model, prompts, max_new_tokens=new, eos_token_id=-1)

    cases = [(device, mode) for device in _devices(bench) for mode in MODES]
    by_case = dict(zip(cases, concurrently([functools.partial(continuation, *x) for x in cases]), strict=True))
    for mode in MODES:
        found, expected = by_case[bench.device, mode], by_case[bench.reference, mode]
        differences = []
        for row, prompt in enumerate(prompts):
            places = np.flatnonzero(found[row] != expected[row])
            if len(places):
                before = [*prompt, *expected[row, : places[0]].tolist()]
                margin = _margin(bench, folder, mode, before, len(prompt) + new)
                differences.append({"row": row, "first_difference": int(places[0]), "margin_on_cpu": margin})
        said = [
            f"row {x['row']} from token {x['first_difference']}, margin {x['margin_on_cpu']:.1e}" for x in differences
        ]
        yield {
            "what": f"{mode}, float32",
            "found": "other tokens: " + "; ".join(said) if said else "the same tokens",
            "against": f"{len(prompts)} x {new} tokens of the CPU",
            "ok": not differences,
            "differences": differences,
        }


def _margin(bench: Bench, folder: Path, mode: str, before: list[int], length: int) -> float:
    """By how much the CPU's first choice after these tokens is ahead of its second, in logits."""
    ids, mask = np.zeros((1, length), np.int32), np.arange(length)[None] < len(before)
    ids[0, : len(before)] = before
    with jax.default_device(bench.reference):
        graphdef, params = nnx.split(gsa_jax.load(folder, **MODES[mode]))
        ranked = np.sort(np.asarray(_forward(graphdef, params, ids, mask))[0, len(before) - 1])
    return float(ranked[-1] - ranked[-2])


def gradients(bench: Bench) -> Iterator[Finding]:
    """Loss and gradients of a training step in hybrid mode, against the CPU's in float32."""
    folder, rows = story(bench), _rows(bench)
    batch = {"input_ids": rows["ids"], "segment_ids": rows["mask"].astype(np.int32)}

    def compute(device: Device, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        with jax.default_device(device):
            model = gsa_jax.load(folder, dtype=dtype)
            objective = cross_entropy(functools.partial(build_model, model.config))
            step = jax.jit(jax.value_and_grad(lambda params: objective(params, {}, batch)[0]))
            loss, gradient = step(named_parameters(model))
            flat = np.concatenate([np.asarray(gradient[name], np.float32).ravel() for name in sorted(gradient)])
            return np.asarray(loss), flat

    dtypes = DTYPES[:1] if bench.brief else DTYPES
    cases = [(device, dtype) for device in _devices(bench) for dtype in dtypes]
    by_case = dict(zip(cases, concurrently([functools.partial(compute, *case) for case in cases]), strict=True))
    exact_loss, exact = by_case[bench.reference, "float32"]
    for dtype in dtypes:
        (loss, found), (_, on_cpu) = by_case[bench.device, dtype], by_case[bench.reference, dtype]
        error = float(abs(loss - exact_loss) / exact_loss)
        limit = FLOAT32_LIMIT if dtype == "float32" else BFLOAT16_LOSS_LIMIT
        yield {
            "what": f"loss, {dtype}",
            "found": f"relative difference {error:.1e}",
            "against": f"<= {limit:.0e}",
            "ok": error <= limit,
            "relative_difference": error,
            "loss": float(loss),
        }
        error, error_on_cpu = _relative(found, exact), _relative(on_cpu, exact)
        yield {
            "what": f"gradient of all parameters, {dtype}",
            "found": f"relative RMS {error:.1e}",
            **_verdict(dtype, error, error_on_cpu, GRADIENT_LIMIT),
            "relative_rms": error,
            "relative_rms_of_cpu": error_on_cpu,
        }


def resume(bench: Bench) -> Iterator[Finding]:
    """Training that is told to stop half-way and goes on, against training at once: the same bits."""
    steps = 8

    def config(out: str) -> Finetune:
        return Finetune(
            checkpoint=story(bench),
            out=bench.folder / out,
            text=(gsa_jax.assets.told_stories(),),
            steps=steps,
            # The loop spreads rows over all devices of the machine.
            batch_size=4 * jax.device_count(),
            context=64,
            optimizer=OptimizerConfig(learning_rate=1e-3),
        )

    def stop(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == steps // 2:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = _trained(config("at-once"))
    stopped = train(config("stopped"), report=stop)
    if stopped.status != "stopped":
        raise RuntimeError(f"told to stop, the run went on to step {stopped.step}")
    changed = _changed(whole, _trained(config("stopped")))
    found = "the same bits"
    if changed:
        repeats = not _changed(whole, _trained(config("again")))
        how = (
            "the run without a stop repeats its bits" if repeats else "nor does the run without a stop repeat its bits"
        )
        found = f"{len(changed)} of {len(whole)} tensors differ, {changed[0]} first; {how}"
    yield {
        "what": f"{steps} steps, stopped after {stopped.step}",
        "found": found,
        "against": f"{steps} steps at once",
        "ok": not changed,
        "devices": jax.device_count(),
        "changed": changed,
    }


def _trained(config: Finetune) -> dict[str, np.ndarray]:
    return load_tensors(train(config).model)[1]


def _changed(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> list[str]:
    return [name for name in expected if expected[name].tobytes() != found[name].tobytes()]
