"""Checkpoints of tiny random models that can read text: PyTorch has the same models, as `hf_model(**SHAPE)`."""

import shutil
from pathlib import Path

from gsa_jax import SplatConfig
from gsa_jax.checkpoint import load_tensors, save, tokenizer_files
from gsa_jax.convert import convert
from helpers.hf_folders import write_folder
from helpers.hf_oracle import hf_model

SHAPE = {"vocab_size": 1024}
WINDOW = 8
"""As many tokens as the tiny model's local layer sees."""


def tiny_checkpoint(
    folder: Path, story_neo: Path, *, seed: int = 0, splats: SplatConfig | None = None, **overrides
) -> Path:
    """`hf_model(seed, **SHAPE, **overrides)` with the bundled model's tokenizer; a global and a local layer.

    Splats are wide enough for its keys to reach them.
    """
    model = hf_model(seed, **(SHAPE | overrides))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    config = model.config.to_dict() | {"architectures": ["GPTNeoForCausalLM"]}
    source = write_folder(folder / "source", tensors, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(story_neo / name, source / name)
    convert(source, folder / "checkpoint", splats=splats)
    if splats is None:
        return folder / "checkpoint"
    config, tensors = load_tensors(folder / "checkpoint")
    wider = {name: tensor + 1 for name, tensor in tensors.items() if name.endswith("splat_log_scales")}
    save(folder / "wide", config, tensors | wider, copied=tokenizer_files(folder / "checkpoint"))
    return folder / "wide"
