"""The bundled small model and what goes with it, as paths.

May be changed here: what is bundled. The model was trained by us on TinyStories, the stories were told by it.
"""

from importlib.resources import files
from pathlib import Path


def story_neo() -> Path:
    """The bundled model: a Hugging Face folder in PyTorch's layout, with its tokenizer."""
    return _path("story-neo")


def story_neo_splats() -> Path:
    """Trained splats of the bundled model, for `gsa_jax.convert.convert(splats=...)`."""
    return _path("story-neo-splats")


def told_stories() -> Path:
    """A text file of stories that the bundled model told, one document each: to calibrate and to try things on."""
    return _path("told.txt")


def _path(name: str) -> Path:
    return Path(str(files("gsa_jax.assets") / name))
