"""Draws `near_and_far.svg`, the figure of attention.md: `python docs/near_and_far.py`.

Left, which score a pair of tokens gets. Then the weights of one head of the bundled model on the beginning of a real
text: exact, with a window and splats where `fit_init` puts them, and with the window alone. Weights are read off the op
itself: with as many tokens as a head has dimensions and the unit matrix as values, the output is the weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure

import gsa_jax
from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert import convert
from gsa_jax.fitting.fitted import fit_init
from gsa_jax.fitting.statistics import projections
from gsa_jax.ops import no_splats, splat_attention
from gsa_jax.parameters import build_model
from gsa_jax.splat_config import Window

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "tests" / "data" / "stories.txt"
TOKENS = 48
WINDOW = 12
LAYER, HEAD = 2, 0


def weights() -> dict[str, np.ndarray]:
    """`[T, T]` for each panel."""
    with tempfile.TemporaryDirectory() as folder:
        plain, fitted = Path(folder) / "plain", Path(folder) / "fitted"
        convert(ROOT / "gsa_jax" / "assets" / "story-neo", plain)
        fit_init(plain, fitted, TEXT, splats=gsa_jax.SplatConfig(num_splats=64, window=WINDOW, far_gain=True))
        config, tensors = load_tensors(fitted)
        tokenizer = gsa_jax.load_tokenizer(fitted)
    model = build_model(config.with_window("all"), tensors)
    ids = np.array([tokenizer.encode(TEXT.read_text(encoding="utf-8"), verbose=False)[:TOKENS]], np.int32)
    mask = np.ones(ids.shape, bool)
    _, (query, key, _) = next(projections(model, ids, mask, (LAYER,)))
    attention = model.transformer.h[LAYER].attn.attention
    value = jnp.broadcast_to(jnp.eye(TOKENS)[None, :, None], query.shape)

    def read(window: Window, splats: gsa_jax.ops.Splats) -> np.ndarray:
        output, _ = splat_attention(query, key, value, splats, window=window, attention_mask=jnp.asarray(mask))
        return np.asarray(output[0, :, HEAD])

    return {
        "exact": read("all", attention.splats),
        f"window {WINDOW} and 64 splats": read(WINDOW, attention.splats),
        f"window {WINDOW} alone": read(WINDOW, no_splats(*query.shape[2:])),
    }


def main() -> None:
    """Writes the picture beside this file."""
    matplotlib.rcParams["svg.hashsalt"] = "gsa-jax"
    figure = Figure(figsize=(13, 3.7), facecolor="white", layout="constrained")
    panels = figure.subplots(1, 4)
    distance = np.arange(TOKENS)[:, None] - np.arange(TOKENS)
    kinds = np.where(distance < 0, 0, np.where(distance < WINDOW, 2, 1))
    panels[0].imshow(kinds, cmap=ListedColormap(["white", "#fdba74", "#1d4ed8"]), interpolation="nearest")
    panels[0].set_title("which score")
    panels[0].text(21, 26.5, "near: q · k", color="white", rotation=-45, ha="center", va="center")
    panels[0].text(12, 38, "far: through splats", ha="center", color="#7c2d12")
    panels[0].text(33, 9, "future: none", ha="center", color="#6b7280")
    for axes, (title, matrix) in zip(panels[1:], weights().items(), strict=True):
        image = axes.imshow(matrix, cmap="magma_r", norm=PowerNorm(0.5, 0, 0.5), interpolation="nearest")
        axes.set_title(title)
    figure.colorbar(image, ax=panels[-1], label="weight", extend="max")
    for axes in panels:
        axes.set_xlabel("key")
        axes.set_xticks([0, 16, 32, 47])
        axes.set_yticks([0, 16, 32, 47])
    panels[0].set_ylabel("query")
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
