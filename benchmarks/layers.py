"""Where what splats cost comes from, layer by layer: `python benchmarks/layers.py CHECKPOINT ... --eval-text VALID`.

For each checkpoint with splats: the ratio of perplexity to the exact model with splats in all of its layers, and in one
of them alone, the others exact; and the squared error of each layer's output of attention, relative to the output's
square, on the exact model's hidden states. Prints a line for each checkpoint, and writes
benchmarks/results/layers.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gsa_jax.checkpoint import load_tensors
from gsa_jax.config import GPTNeoConfig
from gsa_jax.evaluation.perplexity import cross_entropy
from gsa_jax.parameters import build_model, without_splats
from gsa_jax.text import TextRows, read_documents, text_rows
from gsa_jax.tokenizer_folder import load_tokenizer
from gsa_jax.train.objectives import output_error

Model = tuple[GPTNeoConfig, Mapping[str, Any]]
"""Configuration and tensors."""

RESULTS = Path(__file__).parent / "results" / "layers.json"


def only(layer: int, config: GPTNeoConfig, tensors: Mapping[str, Any]) -> tuple[GPTNeoConfig, dict[str, Any]]:
    """The model with splats in one layer, and exact attention in the others."""
    assert config.splats is not None
    alone = dataclasses.replace(config, splats=dataclasses.replace(config.splats, layers=(layer,)))
    kept = {
        name: x for name, x in tensors.items() if ".splat_" not in name or name.startswith(f"transformer.h.{layer}.")
    }
    return alone, kept


def measure(folder: Path, documents: list[str]) -> dict[str, Any]:
    """Ratios and errors of one checkpoint."""
    config, tensors = load_tensors(folder)
    exact_model = without_splats(config, tensors)
    rows = text_rows(documents, load_tokenizer(folder), config)
    exact = cross_entropy(exact_model, rows)
    arms = {"all": (config, tensors)} | {
        f"layer {layer}": only(layer, config, tensors) for layer in config.splat_layers
    }
    ratios = {name: math.exp(cross_entropy(arm, rows) - exact) for name, arm in arms.items()}
    errors = _errors((config, tensors), exact_model, rows)
    return {"tokens": int(rows.attention_mask[:, 1:].sum()), "ratios": ratios, **errors}


def _errors(model: Model, exact_model: Model, text: TextRows) -> dict[str, float]:
    """Of each layer, means over batches of eight rows; those that do not fill one are left out."""
    student, teacher = (functools.partial(build_model, config) for config, _ in (model, exact_model))
    objective = jax.jit(output_error(student, teacher))
    params, exact_params = (jax.tree.map(jnp.asarray, dict(tensors)) for _, tensors in (model, exact_model))
    found = []
    for start in range(0, len(text.input_ids) - 7, 8):
        rows = slice(start, start + 8)
        batch = {"input_ids": text.input_ids[rows], "segment_ids": text.attention_mask[rows].astype("int32")}
        found.append(objective(params, exact_params, batch)[1])
    return {name: float(jnp.mean(jnp.array([errors[name] for errors in found]))) for name in found[0]}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--eval-text", type=Path, required=True, help="held-out text")
    parser.add_argument("--max-documents", type=int, default=60)
    given = parser.parse_args()
    documents = read_documents(given.eval_text)[: given.max_documents]
    results = {}
    for folder in given.checkpoints:
        results[str(folder)] = found = measure(folder, documents)
        print(folder, json.dumps(found), flush=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
