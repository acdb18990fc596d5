"""Texts that tests read.

May be changed here: which texts there are.
"""

from pathlib import Path

import gsa_jax.assets

STORIES = Path(__file__).parents[1] / "data" / "stories.txt"
"""A few stories of TinyStories."""

TOLD = gsa_jax.assets.told_stories()
"""Many stories that the bundled model told."""
