"""Splats that fit a model: placed by its real queries and keys, and looked at.

    placing.py      centres, scales and gains from calibration text; `gsa fit-init`
    statistics.py   queries and keys of a text, and what attention does with them
    diagnosis.py    how the splats of a model are doing, head by head; `gsa diagnose`
    kmeans.py       clusters of points

May be changed here: this map, and which names are public. Training splats is `gsa_jax.train`.
"""

from gsa_jax.fitting.diagnosis import diagnose
from gsa_jax.fitting.placing import fit_init

__all__ = ["diagnose", "fit_init"]
