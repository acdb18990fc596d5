"""Checkpoints of tiny random models that can read text; PyTorch has the same models, as `hf_model(**SHAPE)`.

May be changed here: which models these are.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from gsa_jax import SplatConfig
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.convert import convert
from gsa_jax.tokenizer_folder import tokenizer_files
from helpers.tiny_models import tiny_config, tiny_weights

SHAPE = {"vocab_size": 1024}
WINDOW = 8
"""As many tokens as the tiny model's local layer sees."""


def tiny_folder(folder: Path, story_neo: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """`hf_model(seed, **SHAPE, **overrides)` as a Hugging Face folder, with the bundled model's tokenizer."""
    folder.mkdir(parents=True)
    settings = SHAPE | overrides
    (folder / "config.json").write_text(json.dumps(tiny_config(**settings).to_hf()), encoding="utf-8")
    save_file(tiny_weights(seed, **settings), folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(story_neo / name, folder / name)
    return folder


def tiny_checkpoint(
    folder: Path, story_neo: Path, *, seed: int = 0, splats: SplatConfig | None = None, **overrides: Any
) -> Path:
    """The same as a checkpoint; a global and a local layer.

    Splats are wide enough for its keys to reach them.
    """
    source = tiny_folder(folder / "source", story_neo, seed=seed, **overrides)
    convert(source, folder / "checkpoint", splats=splats)
    if splats is None:
        return folder / "checkpoint"
    config, tensors = load_tensors(folder / "checkpoint")
    wider = {name: tensor + 1 for name, tensor in tensors.items() if name.endswith("splat_log_scales")}
    save(folder / "wide", config, tensors | wider, copied=tokenizer_files(folder / "checkpoint"))
    return folder / "wide"
