"""How small a state may be to recall many pairs from a context: `python benchmarks/recall.py`.

    python benchmarks/recall.py [--out FOLDER]

A small exact GPT-Neo learns multi-query associative recall (`recall_task.py`). Then the attention of its global layer
is replaced by something whose state does not grow: splats, kept keys, both, a window, or Based's Taylor features
(`recall_based.py`). The local layer, which sees two tokens, stays as it is, as `gsa fit-init` leaves local layers. What
has parameters of its own is fitted (`placed`), then trained with everything else frozen, by the divergence from the
exact model's predictions at the questions (`distilled`); at two contexts, for states up to about an eighth of the exact
cache, all of the model is trained once more, likewise (`tuned`). Each learns from rows of both densities, one
pair in 16 tokens and one in 8, and is measured on new rows of either.

A state's size is what has to be remembered of a text, in float32: `state_bytes` for ours, the sums for Based; shares
are of the exact cache, which is a window as long as the context. FOLDER (build/recall) keeps the exact model and what
was distilled; what benchmarks/results/recall.json has is not measured again. Draws docs/recall.svg (needs matplotlib).

May be changed here: which states are compared, and how they are trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plot_recall
import side_by_side
from jaxtyping import Array, Float
from recall_based import MAPS, build_based, initial_maps, state_bytes_of_based
from recall_task import CONFIG, NO_ANSWER, Rows, Tensors, answered, make_rows, train_exact

from gsa_jax import GPTNeoConfig, GPTNeoForCausalLM, SplatConfig
from gsa_jax.attention import state_bytes
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.fitting.importance import fit_importance
from gsa_jax.fitting.placing import fit_layers
from gsa_jax.fitting.statistics import RowSample, projections, take_rows
from gsa_jax.ops import no_splats
from gsa_jax.parameters import attention_tensor, build_model, expected_shapes, is_splat

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "recall.json"

CONTEXTS = (128, 256, 512, 1024)
DENSITIES = (16, 8)
"""Tokens for each pair."""
LAYER = 1
"""The global one."""

EVALUATED_ROWS = 256
FITTED_TOKENS = 32768
TOKENS_PER_STEP = 4096
STEPS = 200
LEARNING_RATE = {"splats": 2e-2, "both": 2e-2, "based": 1e-2}
"""Of what is distilled, at its highest. At 512 tokens, one pair in 16, Based with d' = 16 answers 6 % with 0.002, 10 %
with 0.05, and 11 % after 800 steps with 0.02; 64 splats 44 % with 0.05, and 64 % after 800 steps with 0.02."""
DETAILED_CONTEXTS = (128, 512)
"""Where what is trained has several sizes, and some are tuned; elsewhere it has an eighth of the exact cache."""
TUNED_STEPS = 200
TUNED_LEARNING_RATE = 1e-3

Build = Callable[[Tensors], GPTNeoForCausalLM]


class Arm(NamedTuple):
    """Something in place of exact attention.

    Attributes:
        kind: a window; keys kept by norm, by learned importance, or by importance learned at questions alone;
            splats; splats and the last of these; or Based.
        size: what it has: splats, keys, tokens, or dimensions that Based projects to.
        config: of the model, but for Based.
        bytes: of its state.
        trained: whether there is something to distil.
        tuned: whether everything is to be trained after that.
    """

    kind: str
    size: str
    config: GPTNeoConfig | None
    bytes: int
    trained: bool
    tuned: bool


def with_splats(**splats: Any) -> GPTNeoConfig:
    """The model with something else in its global layer."""
    return dataclasses.replace(CONFIG, splats=SplatConfig(norm_gain=True, far_gain=True, **splats))


def arms(context: int) -> Iterator[Arm]:
    """What is compared at a context, what needs no training first.

    Kept keys have a window of one token beside them: before any key has left it, a query needs something to see.
    """

    def ours(kind: str, size: str, trained: bool, and_tuned: bool = False, **splats: Any) -> Arm:
        config = with_splats(**splats)
        return Arm(kind, size, config, state_bytes(config), trained, and_tuned)

    counts = [context // 32, context // 16, context // 8, context // 4]
    cache, tuned = exact_bytes(context), context in DETAILED_CONTEXTS
    trained_counts = counts[1:] if tuned else [context // 8]
    for count in counts:
        yield ours("window", f"W = {count}", False, num_splats=0, window=count)
    for importance in ("norm", "learned", "questions"):
        for count in (context * part // 64 for part in (2, 4, 5, 6, 8, 10, 12, 16)):
            kind, by = f"kept, {importance}", "norm" if importance == "norm" else "learned"
            yield ours(kind, f"M = {count}", False, num_splats=0, window=1, kept=count, importance=by)
    for count in trained_counts:
        yield ours("splats", f"S = {count}", True, count == context // 8 and tuned, num_splats=count, window=0)
    for count in trained_counts:
        both: dict[str, Any] = {"num_splats": count // 2, "window": 1, "kept": count // 2, "importance": "learned"}
        yield ours("both", f"S = M = {count // 2}", True, count == context // 8 and tuned, **both)
    sizes = {count: state_bytes_of_based(count, CONFIG.head_dim, CONFIG.num_heads) for count in (4, 8, 12, 16, 24)}
    nearest = min(sizes, key=lambda count: abs(sizes[count] - cache / 8))
    for count, size in sizes.items():
        if count == nearest or (tuned and cache / 24 < size < cache / 2.5):
            yield Arm("based", f"d' = {count}", None, size, True, tuned and size < cache / 5)


def exact_bytes(context: int) -> int:
    """Of the exact cache of the global layer."""
    return state_bytes(with_splats(num_splats=0, window=context))


def fitted(arm: Arm, exact: Tensors, rows: Rows) -> tuple[Build, Tensors]:
    """How a model of an arm is built, and its parameters before any training."""
    model, mask = build_model(CONFIG, exact), np.ones(rows.tokens.shape, bool)
    if arm.config is None:
        _, (query, key, _) = next(projections(model, rows.tokens, mask, (LAYER,)))
        maps = initial_maps(LAYER, np.asarray(query), np.asarray(key), int(arm.size.split()[-1]))
        return lambda params: build_based(CONFIG, LAYER, params), {**exact, **maps}
    config, found = arm.config, dict(exact)
    wanted = [name for name in expected_shapes(config) if is_splat(name)]
    if wanted:
        _, splats, _, _ = next(fit_layers(model, config, rows.tokens, mask, seed=0))
        for name in wanted:
            term = name.rsplit("splat_", 1)[1]
            found[name] = jnp.asarray(getattr(splats, term))
    if arm.kind in ("kept, questions", "both"):
        found[attention_tensor(LAYER, "splat_importance")] = importance_at_questions(config, model, rows)
    return lambda params: build_model(config, params), found


def importance_at_questions(config: GPTNeoConfig, model: GPTNeoForCausalLM, rows: Rows) -> Float[Array, "H 2*D+1"]:
    """What `gsa_jax.fitting.importance` fits if it looks at tokens that ask, instead of any tokens."""
    own = config.layer_splats[LAYER]
    asked = rows.answers != NO_ANSWER
    many = min(asked.sum(axis=1))  # the same of each row; all pairs have been told before
    sample = RowSample(np.arange(len(asked)), np.stack([np.flatnonzero(row)[-many:] for row in asked]))
    mask = np.ones(asked.shape, bool)
    _, projected = next(projections(model, rows.tokens, mask, (LAYER,)))
    there = take_rows(sample, projected, mask)
    none = no_splats(config.num_heads, config.head_dim)
    return fit_importance(LAYER, there, none, window=1, kept=own.kept, seen="all")[0]


def rows_of_both_densities(draws: np.random.Generator, context: int, count: int) -> Rows:
    """Half of the rows of each density."""
    return make_rows(draws, context, np.resize([context // density for density in DENSITIES], count))


def distil(
    build: Build,
    params: Tensors,
    exact: Tensors,
    context: int,
    is_trained: Callable[[str], bool],
    steps: int,
    lr: float,
) -> Tensors:
    """All parameters after training some of them by KL(exact || student) at the questions (Hinton et al. 2015)."""
    draws = np.random.default_rng(1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(lr, steps, 0.05)))
    frozen = {name: tensor for name, tensor in params.items() if not is_trained(name)}
    trained = {name: tensor for name, tensor in params.items() if is_trained(name)}

    def divergence(trained: Tensors, rows: Rows) -> jax.Array:
        teacher = jax.nn.log_softmax(build_model(CONFIG, exact)(rows.tokens))
        student = jax.nn.log_softmax(build({**frozen, **trained})(rows.tokens))
        each = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
        return jnp.mean(each, where=rows.answers != NO_ANSWER)

    @jax.jit
    def step(trained: Tensors, state: Any, rows: Rows) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(divergence)(trained, rows)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    state = optimizer.init(trained)
    loss: Any = np.nan
    for _ in range(steps):
        rows = rows_of_both_densities(draws, context, TOKENS_PER_STEP // context)
        trained, state, loss = step(trained, state, rows)
    if not np.isfinite(loss):
        raise SystemExit(f"the loss at {context} tokens is {loss}; choose a lower learning rate")
    return {**frozen, **trained}


def accuracy(build: Build, params: Tensors, context: int) -> dict[str, float]:
    """Share of answered questions by density, on rows that nothing else sees."""

    @jax.jit
    def of_rows(params: Tensors, rows: Rows) -> jax.Array:
        return answered(build(params)(rows.tokens), rows.answers)

    found = {}
    for density in DENSITIES:
        draws, shares = np.random.default_rng([2, density]), []
        for _ in range(EVALUATED_ROWS * context // TOKENS_PER_STEP):  # as many questions in each: no weights needed
            counts = np.full(TOKENS_PER_STEP // context, context // density)
            shares.append(float(of_rows(params, make_rows(draws, context, counts))))
        found[f"1/{density}"] = float(np.mean(shares))
    return found


def exact_model(folder: Path) -> Tensors:
    """Loads it, or trains and saves it."""
    if not folder.exists():
        save(folder, CONFIG, train_exact(seed=0), copied=[])
    return {name: jnp.asarray(tensor) for name, tensor in load_tensors(folder)[1].items()}


def measure(arm: Arm, exact: Tensors, context: int, out: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """What an arm answers as it is, distilled, and tuned, as far as there is something to train."""
    tokens = rows_of_both_densities(np.random.default_rng(0), context, FITTED_TOKENS // context)
    build, params = fitted(arm, exact, tokens)
    yield "placed", accuracy(build, params, context)
    if arm.trained:
        own = {attention_tensor(LAYER, name) for name in MAPS} if arm.config is None else {*filter(is_splat, params)}
        params = distil(build, params, exact, context, lambda name: name in own, STEPS, LEARNING_RATE[arm.kind])
        arrays: dict[str, Any] = {name: np.asarray(params[name]) for name in own}
        np.savez(out / f"{context} {arm.kind} {arm.size}.npz", **arrays)
        yield "distilled", accuracy(build, params, context)
    if arm.tuned:
        params = distil(build, params, exact, context, lambda name: True, TUNED_STEPS, TUNED_LEARNING_RATE)
        yield "tuned", accuracy(build, params, context)


def main() -> None:
    """Trains, replaces, measures, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "recall", help="folder for parameters")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    exact = exact_model(out / "exact")
    written: dict[str, Any] = {"environment": side_by_side.environment(), "exact": {}, "results": []}
    if RESULTS.exists():
        written = json.loads(RESULTS.read_text(encoding="utf-8"))

    def write() -> None:
        RESULTS.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")

    for context in CONTEXTS:
        if str(context) not in written["exact"]:
            found = accuracy(lambda params: build_model(CONFIG, params), exact, context)
            written["exact"][str(context)] = {"bytes": exact_bytes(context), "accuracy": found}
            print(context, "exact", json.dumps(found), flush=True)
            write()
    every = [(context, arm) for context in CONTEXTS for arm in arms(context)]
    done = {(row["context"], row["kind"], row["size"]) for row in written["results"]}
    for context, arm in sorted(every, key=lambda pair: pair[1].trained):  # what is soon done first
        if (context, arm.kind, arm.size) in done:
            continue
        started, rows = time.monotonic(), []
        row = {"context": context, "kind": arm.kind, "size": arm.size, "bytes": arm.bytes}
        row["share"] = arm.bytes / exact_bytes(context)
        for stage, found in measure(arm, exact, context, out):
            rows.append({**row, "stage": stage, "accuracy": found})
            print(*row.values(), stage, json.dumps(found), f"{time.monotonic() - started:.0f} s", flush=True)
        written["results"].extend(rows)
        write()
    plot_recall.draw(written)


if __name__ == "__main__":
    main()
