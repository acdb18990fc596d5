"""What it costs splats when keys are longer than queries: `python benchmarks/balance.py --out FOLDER`.

The bundled model's queries are divided by a number, and its keys multiplied by it: its exact scores stay what they are.
Splats, without kept keys, are placed on the first half of the bundled stories, and scored on the second. Prints the
ratio of perplexity to the exact model for each window, and writes benchmarks/results/balance.json.

May be changed here: how unlike the lengths are, and the windows.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

from gsa_jax.assets import story_neo, told_stories
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.convert import convert
from gsa_jax.evaluation.perplexity import cross_entropy
from gsa_jax.fitting import fit_init
from gsa_jax.parameters import without_splats
from gsa_jax.splat_config import SplatConfig
from gsa_jax.text import read_documents, text_rows
from gsa_jax.text_files import DOCUMENT_SEPARATOR
from gsa_jax.tokenizer_folder import open_tokenizer, tokenizer_files

RESULTS = Path(__file__).parent / "results" / "balance.json"
LONGER = (1, 2, 8)
"""How many times as long as they are, relative to queries, keys become."""
WINDOWS = (64, 16, 0)
SPLATS = SplatConfig(num_splats=64, window=64, norm_gain=True, far_gain=True)


def stretched(plain: Path, out: Path, longer: int) -> None:
    """The same model with other lengths of queries and keys."""
    config, tensors = load_tensors(plain)
    factors = {"q_proj": longer**-0.5, "k_proj": longer**0.5}
    changed = {name: np.float32(factors.get(name.split(".")[-2], 1)) * tensor for name, tensor in tensors.items()}
    save(out, config, changed, copied=tokenizer_files(plain))


def main() -> None:
    """Places, scores, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for texts and checkpoints, to be made")
    out = parser.parse_args().out
    out.mkdir(parents=True)
    stories = told_stories().read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)
    half = len(stories) // 2
    for name, part in (("placing", stories[:half]), ("held-out", stories[half:])):
        (out / f"{name}.txt").write_text(DOCUMENT_SEPARATOR.join(part), encoding="utf-8")
    convert(story_neo(), out / "plain")
    found: dict[str, dict[str, float]] = {}
    for longer in LONGER:
        stretched(out / "plain", out / f"keys-{longer}", longer)
        fit_init(out / f"keys-{longer}", out / f"splats-{longer}", out / "placing.txt", splats=SPLATS)
        config, tensors = load_tensors(out / f"splats-{longer}")
        rows = text_rows(read_documents(out / "held-out.txt"), open_tokenizer(out / "plain"), config)
        exact = cross_entropy(without_splats(config, tensors), rows)
        found[str(longer)] = {
            f"W = {window}": math.exp(cross_entropy((config.with_window(window), tensors), rows) - exact)
            for window in WINDOWS
        }
        print(f"keys {longer} times as long:", json.dumps(found[str(longer)]), flush=True)
    RESULTS.write_text(json.dumps({"perplexity_ratios": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
