"""Splats that fit a model: placed by its real queries and keys, and looked at.

    fitted.py       a checkpoint with fitted splats; `gsa fit-init`
    placing.py      centres, scales and gains of a layer from its queries and keys
    importance.py   which keys are worth keeping, learned from what keeping them saves
    budget.py       bytes of state, spent over layers; `gsa fit-init --state-budget`
    statistics.py   queries and keys of a text, and what attention does with them
    diagnosis.py    how the splats of a model are doing, head by head; `gsa diagnose`
    kmeans.py       clusters of points

May be changed here: this map, and which names are public. Training splats is `gsa_jax.train`.
"""

from gsa_jax.fitting.diagnosis import diagnose
from gsa_jax.fitting.fitted import fit_init

__all__ = ["diagnose", "fit_init"]
