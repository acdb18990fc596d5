"""Hedgehog's feature map where splats alone would be, at the same size of state: `python benchmarks/hedgehog.py`.

    python benchmarks/hedgehog.py --text TRAIN --eval-text VALID --out FOLDER [--reference CHECKPOINT]

The global layers of the bundled model attend through phi(x) = [exp(Wx + b), exp(-Wx - b)] of queries and keys, with
learned maps of each head's own (Zhang et al. 2024, "The Hedgehog & the Porcupine"); local layers stay exact. Data,
steps, objective and optimiser are those of row `pure` of benchmarks/quality.py. Prints a line for each stage, and
writes benchmarks/results/hedgehog.json.

`--reference` is the exact model after the same number of steps, which quality.py leaves at exact-400/model of its
folder; without it, the fine-tuned model is compared with the exact one as is.

May be changed here: the feature map, where it starts, and its learning rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import side_by_side
import tyro
from jaxtyping import Array, Float
from mapped_attention import MappedSelfAttention
from quality import FINETUNE, MODEL, ROWS, TOKENS_A_STEP

from gsa_jax import GPTNeoConfig, GPTNeoForCausalLM, SplatConfig
from gsa_jax.checkpoint import load_tensors
from gsa_jax.cli.base import progress
from gsa_jax.convert import convert
from gsa_jax.evaluation.intervals import estimates, sum_by_document
from gsa_jax.loss import next_token_losses
from gsa_jax.ops import Splats, SplatState
from gsa_jax.parameters import attention_tensor, build_model, expected_shapes, is_splat
from gsa_jax.text import TextRows, read_documents, text_rows
from gsa_jax.text_files import TextFiles
from gsa_jax.tokenizer_folder import load_tokenizer
from gsa_jax.train.config import Distill, Finetune, OptimizerConfig
from gsa_jax.train.data import read_tokens, row_batches
from gsa_jax.train.objectives import Build, Objective, Tensors, prediction_divergence
from gsa_jax.train.optimizer import make_optimizer
from gsa_jax.train.step import init_state, make_step

RESULTS = Path(__file__).parent / "results" / "hedgehog.json"
FEATURES = 128
SPLATS = SplatConfig(num_splats=FEATURES, window=0)
"""Of the row to compare with. Hedgehog has as many features per head, half of them of either sign."""

LEARNING_RATE = 0.1
"""Of the maps, at its highest; half of it in fine-tuning, as for splats. After 60 steps, on 50 stories, 0.003, 0.01,
0.03 and 0.1 give perplexity ratios of 5.5, 2.75, 1.60 and 1.47; without `NORMALISED`, 0.01 and 0.03 give 3.7 and 1.77.
"""
NORMALISED = True
"""Whether a key's features are divided by their sum, as a softmax over them does."""
SPREAD = 0.1
"""Of the rows of W that the identity has none for."""

MAPS = ("splat_query_map", "splat_query_bias", "splat_key_map", "splat_key_bias")
"""W and b, named so that the optimiser trains them as it trains splats: with their learning rate, without decay."""


class HedgehogSelfAttention(MappedSelfAttention):
    """Attention through Hedgehog's features: `splat_attention` with one splat for each feature.

    A splat at the unit vector e_s of scale 1 with norm_gain 1/2 has log phi_s(x) = x_s and what all splats share, so
    features given as their logarithms come out as they are.
    """

    def _attn(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B T H D"],
        value: Float[Array, "B T H D"],
        **call: Any,
    ) -> tuple[Float[Array, "B T H D"], SplatState | None]:
        log_query, log_key = self._log_features("query", query), self._log_features("key", key)
        if NORMALISED:  # a query's sum would cancel
            log_key = jax.nn.log_softmax(log_key)
        head_dim, features = value.shape[-1], FEATURES
        splats = Splats(
            jnp.broadcast_to(jnp.eye(features), (self.num_heads, features, features)),
            jnp.zeros((self.num_heads, features)),
            norm_gain=jnp.full(self.num_heads, 0.5),
        )
        wide = jnp.pad(value, [(0, 0)] * 3 + [(0, features - head_dim)])  # the op wants equal sizes
        context, state = super()._attn(log_query, log_key, wide, splats=splats, **call)
        return context[..., :head_dim], state

    def _log_features(self, kind: str, x: Float[Array, "B T H D"]) -> Float[Array, "B T H S"]:
        weight, bias = getattr(self, f"splat_{kind}_map"), getattr(self, f"splat_{kind}_bias")
        mapped = jnp.einsum("bthd,hfd->bthf", x, weight[...]) + bias[...]
        return jnp.concatenate([mapped, -mapped], axis=-1)


def initial_maps(config: GPTNeoConfig) -> dict[str, jax.Array]:
    """W is the identity as far as it goes, with small random rows below; b is 0."""
    heads, rows = config.num_heads, FEATURES // 2
    below = (heads, rows - config.head_dim, config.head_dim)
    identity = jnp.broadcast_to(jnp.eye(config.head_dim), (heads, config.head_dim, config.head_dim))
    found = {}
    for layer in with_splats(config).splat_layers:
        for kind, key in zip(("query", "key"), jax.random.split(jax.random.key(layer)), strict=True):
            random = SPREAD * jax.random.normal(key, below)
            found[attention_tensor(layer, f"splat_{kind}_map")] = jnp.concatenate([identity, random], axis=1)
            found[attention_tensor(layer, f"splat_{kind}_bias")] = jnp.zeros((heads, rows))
    return found


def with_splats(config: GPTNeoConfig) -> GPTNeoConfig:
    """The model that this one is compared with; also says which layers are not exact."""
    return dataclasses.replace(config, splats=SPLATS)


def exact_model(config: GPTNeoConfig) -> Build:
    """Makes the plain model, of parameters that may hold maps as well."""
    names = expected_shapes(config)
    return lambda params: build_model(config, {name: params[name] for name in names})


def hedgehog_model(config: GPTNeoConfig) -> Build:
    """Makes the model with maps."""
    exact, replaced = exact_model(config), with_splats(config)

    def build(params: Tensors) -> GPTNeoForCausalLM:
        model = exact(params)
        for layer in replaced.splat_layers:
            attn = model.transformer.h[layer].attn
            attn.attention = HedgehogSelfAttention(
                attn.attention, {name: params[attention_tensor(layer, name)] for name in MAPS}
            )
        model.config = replaced
        return model

    return build


def train(
    config: Distill | Finetune,
    model: GPTNeoConfig,
    objective: Objective,
    params: Tensors,
    is_trained: Callable[[str], bool],
    label: str,
) -> dict[str, jax.Array]:
    """All parameters after the steps of `config`; the teacher has those from before."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    data = row_batches(
        read_tokens(TextFiles(config.text), load_tokenizer(MODEL), model),
        model,
        context=model.max_position_embeddings,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    step = jax.jit(make_step(objective, optimizer, accumulate=1, ema_decay=None))
    frozen = {name: tensor for name, tensor in params.items() if not is_trained(name)}
    state = init_state({name: params[name] for name in params if is_trained(name)}, optimizer, None)
    for number in progress(map(str, range(1, config.steps + 1)), label):
        state, metrics = step(state, frozen, params, next(data))
        if not math.isfinite(metrics["loss"]):
            raise SystemExit(f"{label}: the loss of step {number} is {metrics['loss']}; choose a lower learning rate")
    return {**frozen, **state["params"]}


def token_losses(build: Build, params: Mapping[str, Any], text: TextRows, rows_at_once: int = 8) -> np.ndarray:
    """Nats of each token but the first of its row, `[N, L - 1]`."""

    @jax.jit
    def of_rows(params: Tensors, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return next_token_losses(build(params)(ids, mask), ids)

    count = len(text.input_ids)
    losses = np.zeros((count, text.input_ids.shape[1] - 1), np.float32)
    for start in range(0, count, rows_at_once):
        rows = np.arange(start, start + rows_at_once) % count  # one shape: the last ones go with some from the start
        losses[rows] = of_rows(params, text.input_ids[rows], text.attention_mask[rows])
    return losses


def scores(documents: list[str], rows: TextRows, exact: np.ndarray, hedgehog: np.ndarray) -> dict[str, Any]:
    """As quality.py gives them."""
    found = estimates(sum_by_document(documents, rows, {"exact": exact, "hedgehog": hedgehog}))
    return {
        "tokens": int(rows.attention_mask[:, 1:].sum()),
        "exact_perplexity": found["perplexity", "exact"].value,
        "ratios": {"hedgehog": dataclasses.asdict(found["perplexity_ratio", "hedgehog"])},
    }


def options(recipe: type[Any], text: Path, given: str, learning_rate: float) -> Any:
    """What `gsa train` makes of the options of a row, with the learning rate of the maps in place of that of splats."""
    config = tyro.cli(recipe, args=["", "", "--text", str(text), *shlex.split(given)])
    optimizer: OptimizerConfig = dataclasses.replace(config.optimizer, splat_learning_rate=learning_rate)
    return dataclasses.replace(config, optimizer=optimizer)


def plain_tensors() -> tuple[GPTNeoConfig, dict[str, np.ndarray]]:
    """The bundled model."""
    with tempfile.TemporaryDirectory() as folder:
        convert(MODEL, Path(folder) / "plain")
        return load_tensors(Path(folder) / "plain")


def main() -> None:
    """Distils, fine-tunes, scores, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="training text")
    parser.add_argument("--eval-text", type=Path, required=True, help="held-out text")
    parser.add_argument("--out", type=Path, required=True, help="folder for parameters")
    parser.add_argument("--reference", type=Path, help="checkpoint of the exact model, fine-tuned")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    row = ROWS["pure"]
    model, tensors = plain_tensors()
    batch = f"--batch-size {TOKENS_A_STEP // model.max_position_embeddings}"
    distilling = options(Distill, given.text, f"{batch} {row.distill}", LEARNING_RATE)
    tuning = options(Finetune, given.text, f"{batch} --steps {row.finetune_steps} {FINETUNE}", LEARNING_RATE / 2)

    exact, hedgehog = exact_model(model), hedgehog_model(model)
    documents = read_documents(given.eval_text)
    rows = text_rows(documents, load_tokenizer(MODEL), model)
    exact_losses = token_losses(exact, tensors, rows)
    found: dict[str, Any] = {}

    def report(stage: str, params: Tensors, exact_losses: np.ndarray) -> None:
        arrays: dict[str, Any] = {name: np.asarray(tensor) for name, tensor in params.items()}
        np.savez(given.out / f"{stage}.npz", **arrays)
        found[stage] = scores(documents, rows, exact_losses, token_losses(hedgehog, params, rows))
        print(stage, json.dumps(found[stage]), flush=True)

    start = {**jax.tree.map(jnp.asarray, tensors), **initial_maps(model)}
    report("start", start, exact_losses)
    objective = prediction_divergence(hedgehog, exact)
    distilled = train(distilling, model, objective, start, is_splat, "distilled")
    report("distilled", distilled, exact_losses)
    objective = prediction_divergence(hedgehog, exact, tuning.teacher_weight)
    tuned = train(tuning, model, objective, distilled, lambda name: True, "finetuned")
    if given.reference is not None:
        reference, tensors = load_tensors(given.reference)
        exact_losses = token_losses(exact_model(reference), tensors, rows)
    report("finetuned", tuned, exact_losses)
    used = {"learning_rate": LEARNING_RATE, "normalised": NORMALISED, "spread": SPREAD}
    written = {"environment": side_by_side.environment(), "options": {**dataclasses.asdict(row), **used}, **found}
    RESULTS.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
