"""One step of full fine-tuning, side by side: `python benchmarks/train.py`.

A random model of the shape of TinyStories-33M, float32, AdamW with clipping, cross-entropy; 2,048 tokens per step, as
rows of 512 or one row of 2,048. Ours with exact attention, with splats and no kept keys, and with the preset `hybrid`,
against Hugging Face Flax with the step of its `run_clm_flax.py` (`optax.adamw` on a `TrainState`, jitted, donated) and
Hugging Face PyTorch. Each contender in a process of its own, in turn.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import tinystories_33m

TOKENS = 2048
LEARNING_RATE = 1e-4
SPLATS: dict[str, dict[str, Any]] = {
    "gsa-jax hybrid": {},
    "gsa-jax, S = 64, W = 64": {"num_splats": 64, "window": 64, "kept": 0, "importance": "norm"},
}
"""What differs from the preset."""


def _ids(context: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50257, (TOKENS // context, context), dtype=np.int32)


def ours(folder: str, context: int, splats: dict[str, Any] | None) -> Callable[[], Any]:
    """The step of `gsa train finetune`."""
    import dataclasses

    import jax

    from gsa_jax.attention import init_splats
    from gsa_jax.parameters import attention_tensor, build_model, named_parameters
    from gsa_jax.splat_config import SPLAT_PRESETS
    from gsa_jax.train.config import OptimizerConfig
    from gsa_jax.train.objectives import cross_entropy
    from gsa_jax.train.optimizer import make_optimizer
    from gsa_jax.train.step import init_state, make_step

    model = tinystories_33m.load_ours(folder, "float32")
    config, params = model.config, named_parameters(model)
    if splats is not None:
        config = dataclasses.replace(config, splats=dataclasses.replace(SPLAT_PRESETS["hybrid"], **splats))
        for layer in config.splat_layers:
            for name, array in init_splats(jax.random.key(layer), config, layer).items():
                params[attention_tensor(layer, name)] = array
    optimizer = make_optimizer(OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", final_share=1.0), 1000)
    objective = cross_entropy(lambda params: build_model(config, params))
    step = jax.jit(make_step(objective, optimizer, accumulate=1, ema_decay=None), donate_argnums=0)
    state = init_state(params, optimizer, None)
    ids = _ids(context)
    batch = {"input_ids": ids, "segment_ids": np.ones_like(ids)}

    def run() -> float:
        nonlocal state
        state, metrics = step(state, {}, {}, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return run


def flax(folder: str, context: int) -> Callable[[], Any]:
    """Hugging Face Flax."""
    import jax
    import optax
    from flax.training import train_state

    model = tinystories_33m.load_flax(folder)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE, b2=0.95, weight_decay=0.0))
    state = train_state.TrainState.create(apply_fn=model.__call__, params=model.params, tx=optimizer)
    ids = _ids(context)

    def train_step(state: Any, ids: Any) -> tuple[Any, Any]:
        def loss_of(params: Any) -> Any:
            logits = state.apply_fn(ids, params=params, train=True, dropout_rng=jax.random.key(0)).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=gradients), loss

    step = jax.jit(train_step, donate_argnums=0)

    def run() -> float:
        nonlocal state
        state, loss = step(state, ids)
        jax.block_until_ready(state.params)
        return float(loss)

    return run


def pytorch(folder: str, context: int) -> Callable[[], Any]:
    """Hugging Face PyTorch."""
    import torch

    model = tinystories_33m.load_torch(folder, "float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    ids = torch.from_numpy(_ids(context)).long()

    def run() -> float:
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return run


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train.json")
    arguments = parser.parse_args()
    measured: dict[str, dict[str, Any]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tinystories_33m.write(Path(folder))
        for context in (512, 2048):
            found = side_by_side.measure(
                {
                    "gsa-jax exact": (ours, (folder, context, None)),
                    **{name: (ours, (folder, context, splats)) for name, splats in SPLATS.items()},
                    "HF Flax": (flax, (folder, context)),
                    "HF PyTorch": (pytorch, (folder, context)),
                },
                arguments.rounds,
            )
            rival = min(found[name]["median"] for name in ("HF Flax", "HF PyTorch"))
            for name, entry in found.items():
                entry["tokens_per_second"] = TOKENS / entry["median"]
                entry["speed_over_faster_rival"] = rival / entry["median"]
                entry["last_loss"] = entry.pop("result")
                assert math.isfinite(entry["last_loss"])
                rows.append(
                    [
                        f"{context:,}",
                        name,
                        f"{entry['median']:.2f}",
                        f"{entry['tokens_per_second']:.0f}",
                        f"{entry['speed_over_faster_rival']:.2f}",
                    ]
                )
            measured[str(context)] = found
    side_by_side.report(
        "One step of full fine-tuning, 2,048 tokens, TinyStories-33M shape, float32",
        ["context", "contender", "seconds", "tokens/s", "speed / faster of HF Flax and PyTorch"],
        rows,
        {"contexts": measured},
        arguments.out,
    )


if __name__ == "__main__":
    main()
