"""What a training run is told: recipes as dataclasses, presets of them, and how they are checked and compared.

May be changed here: which settings exist, their defaults, and the presets. A recipe's fields are the options of
`gsa train`; the resolved values are written beside every checkpoint, so a field that changes what is computed belongs
here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import tyro

from gsa_jax.config import AttentionImplementation, GPTNeoConfig, require_seed
from gsa_jax.errors import InputError

Tracker = Literal["tensorboard", "trackio", "wandb"]
"""Libraries that show the metrics of runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with a schedule; learning rates are per optimiser step."""

    learning_rate: float = 3e-4
    """Of everything but splats, at its highest."""
    splat_learning_rate: float = 1e-2
    """Of splat parameters, at its highest."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How learning rates fall after the warm-up."""
    warmup_steps: int = 0
    """Steps in which learning rates rise from 0."""
    final_share: float = 0.1
    """What learning rates fall to, as a share of their highest."""
    b1: float = 0.9
    """Decay of the mean of gradients."""
    b2: float = 0.95
    """Decay of the mean of their squares."""
    weight_decay: float = 0.0
    """Of matrices; never of splats, biases and norms."""
    clip_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it; 0 leaves them."""
    accumulate: int = 1
    """Parts that a step's rows are computed in, one after another, for less memory."""
    ema_decay: float | None = None
    """Decay per step of a moving average of the parameters, which becomes the result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many ways each axis of `gsa_jax.sharding` cuts; their product is the number of devices."""

    data: int | None = None
    """Groups of devices that have all parameters; by default as many as there are devices for."""
    fsdp: int = 1
    """Devices that share one copy of the parameters and have different rows of the batch."""
    tensor: int = 1
    """Devices that share the heads and the MLP of the same rows."""

    def sizes(self, devices: int) -> dict[str, int]:
        """The size of each axis on so many devices.

        Raises:
            InputError: a size is below 1, or their product is not the number of devices.
        """
        for axis, size in dataclasses.asdict(self).items():
            if size is not None and size < 1:
                raise InputError(f"mesh {axis} = {size}: must be >= 1")
        fixed = self.fsdp * self.tensor
        if self.data is None and devices % fixed:
            raise InputError(
                f"mesh fsdp x tensor = {self.fsdp} x {self.tensor} = {fixed} does not divide the {devices} devices; "
                "change one of them"
            )
        data = devices // fixed if self.data is None else self.data
        if data * fixed != devices:
            raise InputError(
                f"mesh data x fsdp x tensor = {data} x {self.fsdp} x {self.tensor} = {data * fixed}, but there are "
                f"{devices} devices; leave data out to use all of them"
            )
        return {"data": data, "fsdp": self.fsdp, "tensor": self.tensor}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FromCheckpoint:
    """Of recipes that start from a checkpoint; a base class of its own, so that it comes first on the command line."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder to start from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all recipes share."""

    out: tyro.conf.Positional[Path]
    """Folder of the run; the same command goes on with a run that was stopped."""
    text: tuple[Path, ...]
    """Training text: files of UTF-8 text, .jsonl or .parquet, .gz as well; or one .bin file of uint16 token ids."""
    eval_text: tuple[Path, ...] = ()
    """Held-out text, in files of the same kinds but .bin; without any nothing is evaluated."""
    text_field: str = "text"
    """Field of .jsonl and .parquet files that holds the text."""
    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 8
    """Rows of text per step, over all devices."""
    context: int | None = None
    """Tokens of a row. By default all that the model has positions for."""
    seed: int = 0
    """Of the order of the text, and of initial weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters and moments are float32."""
    remat: bool = False
    """Recompute blocks in the backward pass, for less memory."""
    deterministic: bool = True
    """On a GPU: the same bits in each run, and after each restart, for more time; elsewhere that is so anyway."""
    attention_implementation: AttentionImplementation = "auto"
    """What computes exact attention: a kernel of the platform in bfloat16 (splash on TPU; cudnn on NVIDIA, with
    --no-deterministic), or XLA."""
    eval_every: int = 500
    """Steps between two evaluations; the last step is always evaluated."""
    eval_documents: int = 50
    """Evaluate on the first so many documents; 0 for all."""
    save_every: int = 200
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones."""
    track: Tracker | None = None
    """Give the metrics to this as well: event files in RUN/tensorboard, or a run of Trackio or of Weights & Biases."""
    profile: bool = False
    """Record what a few steps after compilation do, in RUN/profile, for TensorBoard or xprof to show."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        for name in ("text", "eval_text"):  # of one file, in Python, the path will do
            path = getattr(self, name)
            if isinstance(path, str | Path):
                object.__setattr__(self, name, (Path(path),))

    @property
    def recipe(self) -> str:
        """`"pretrain"`, `"distill"` or `"finetune"`."""
        return type(self).__name__.lower()

    def check(self) -> None:
        """Raises `InputError` if a number is out of range."""
        at_least = {"steps": 1, "batch_size": 1, "eval_every": 1, "save_every": 1, "keep": 1}
        at_least |= {"eval_documents": 0}
        for name, minimum in at_least.items():
            if getattr(self, name) < minimum:
                raise InputError(f"{name} = {getattr(self, name)}: must be >= {minimum}")
        require_seed(self.seed)
        optimizer = self.optimizer
        for name in ("learning_rate", "splat_learning_rate", "weight_decay", "clip_norm", "final_share"):
            value = getattr(optimizer, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} = {value}: must be finite and >= 0")
        for name in ("b1", "b2", "ema_decay"):
            value = getattr(optimizer, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"{name} = {value}: must be in [0, 1)")
        if optimizer.final_share > 1:
            raise InputError(f"final_share = {optimizer.final_share}: must be at most 1")
        if not 0 <= optimizer.warmup_steps < self.steps:
            raise InputError(
                f"warmup_steps = {optimizer.warmup_steps}: must be >= 0 and less than steps = {self.steps}"
            )
        if optimizer.accumulate < 1 or self.batch_size % optimizer.accumulate:
            raise InputError(f"accumulate = {optimizer.accumulate}: must divide batch_size = {self.batch_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(TrainConfig):
    """Train a plain model from scratch, by cross-entropy."""

    tokenizer: Path
    """Folder with a tokenizer, e.g. a checkpoint's."""
    model: Literal["story", "story-9M", "125M", "1.3B", "2.7B"] = "story"
    """Shape: that of the bundled model, a larger one for its tokenizer, or of EleutherAI's gpt-neo-*."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(TrainConfig, _FromCheckpoint):
    """Train a checkpoint's splats, and nothing else, against the exact model with the same weights."""

    objective: Literal["output", "logits"] = "logits"
    """What is compared: each layer's output of attention, or the model's predictions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(TrainConfig, _FromCheckpoint):
    """Train a checkpoint, by cross-entropy and the exact model's predictions."""

    train: Literal["all", "attention", "splats"] = "all"
    """Which parameters are trained."""
    teacher_weight: float = 0.0
    """Weight of the divergence from the exact model at the start of the run; cross-entropy has the rest."""
    max_positions: int | None = None
    """Positions to extend the model to, before training."""
    position_extension: Literal["interpolate", "tile"] = "interpolate"
    """How learned positions are extended."""

    def check(self) -> None:
        super().check()
        if not 0 <= self.teacher_weight <= 1:
            raise InputError(f"teacher_weight = {self.teacher_weight}: must be in [0, 1]")


def _gpt_neo(hidden_size: int, num_layers: int, num_heads: int) -> GPTNeoConfig:
    pairs = ((("global", "local"), num_layers // 2),)
    return GPTNeoConfig(hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, attention_types=pairs)


MODELS = {
    "story": GPTNeoConfig(
        vocab_size=1024,
        max_position_embeddings=512,
        hidden_size=192,
        num_layers=4,
        num_heads=4,
        attention_types=((("global", "local"), 2),),
        window_size=64,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "story-9M": GPTNeoConfig(
        vocab_size=1024,
        max_position_embeddings=1024,
        hidden_size=336,
        num_layers=6,
        num_heads=7,
        attention_types=((("global", "local"), 3),),
        window_size=128,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "125M": _gpt_neo(768, 12, 12),
    "1.3B": _gpt_neo(2048, 24, 16),
    "2.7B": _gpt_neo(2560, 32, 20),
}
"""Shapes that `pretrain` can make: that of the bundled model, a larger one for its tokenizer, and EleutherAI's."""

_LARGE = {"steps": 100_000, "dtype": "bfloat16", "remat": True}


def _adam(learning_rate: float, **values: Any) -> OptimizerConfig:
    return OptimizerConfig(learning_rate=learning_rate, **values)


PRESETS: dict[str, tuple[type[TrainConfig], dict[str, Any]]] = {
    "pretrain": (Pretrain, {"optimizer": _adam(1e-3, warmup_steps=100, weight_decay=0.1)}),
    "pretrain-125M": (
        Pretrain,
        {"model": "125M", "batch_size": 256, "optimizer": _adam(6e-4, warmup_steps=3000, weight_decay=0.1), **_LARGE},
    ),
    "pretrain-1.3B": (
        Pretrain,
        {"model": "1.3B", "batch_size": 512, "optimizer": _adam(2e-4, warmup_steps=3000, weight_decay=0.1), **_LARGE},
    ),
    "pretrain-2.7B": (
        Pretrain,
        {"model": "2.7B", "batch_size": 512, "optimizer": _adam(1.6e-4, warmup_steps=3000, weight_decay=0.1), **_LARGE},
    ),
    "distill": (Distill, {}),
    "finetune": (Finetune, {}),
}
"""Recipes with numbers that suit them; the command line overrides any of them. Learning rates of the large models are
those of GPT-3 (Brown et al. 2020, table 2.1) at their sizes."""
