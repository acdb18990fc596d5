"""More positions for a model than it was trained with.

May be changed here: how the rows of a longer position embedding follow from those of the shorter one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import jax
import numpy as np

from gsa_jax.config import GPTNeoConfig
from gsa_jax.errors import InputError

PositionExtension = Literal["interpolate", "tile"]
"""`interpolate` stretches the embedding over the new length: all positions lie between trained ones, and neighbours
closer together (Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation",
who do so to rotary positions). `tile` repeats it: short texts give what they gave before (as Beltagy et al. 2020,
"Longformer", section 5)."""

POSITIONS_TENSOR = "transformer.wpe.weight"


def extend_positions(
    config: GPTNeoConfig,
    tensors: Mapping[str, np.ndarray | jax.Array],
    max_positions: int,
    method: PositionExtension,
) -> tuple[GPTNeoConfig, dict[str, np.ndarray | jax.Array]]:
    """The same model with `max_positions` positions; with as many as it has, the model itself.

    Of the new embedding `[max_positions, E]`, `interpolate` keeps the first and the last row and takes the others on
    straight lines between neighbouring old rows; `tile` starts again with the first row after the last one. Computed in
    float32, in the dtype of the tensor.

    Raises:
        InputError: `max_positions` is smaller than the number of positions now, or the method is unknown.
    """
    positions = config.max_position_embeddings
    if method not in get_args(PositionExtension):
        raise InputError(f"position_extension = {method!r}: must be one of {', '.join(get_args(PositionExtension))}")
    if max_positions < positions:
        raise InputError(
            f"max_positions = {max_positions}: the model has {positions} positions already; give at least as many"
        )
    if max_positions == positions:
        return config, dict(tensors)
    rows = np.asarray(tensors[POSITIONS_TENSOR])
    if method == "tile":
        longer = rows[np.arange(max_positions) % positions]
    else:
        place = np.arange(max_positions) * (positions - 1) / (max_positions - 1)
        below = np.minimum(place.astype(int), max(positions - 2, 0))
        share = (place - below).astype(np.float32)[:, None]
        wide = rows.astype(np.float32)
        longer = ((1 - share) * wide[below] + share * wide[np.minimum(below + 1, positions - 1)]).astype(rows.dtype)
    config = dataclasses.replace(config, max_position_embeddings=max_positions)
    return config, {**tensors, POSITIONS_TENSOR: longer}
