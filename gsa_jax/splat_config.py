"""Which splats a model has: a frozen dataclass, presets of it, and what it says in words.

May be changed here: which settings splats have, and how they are checked. Nothing here touches arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from gsa_jax.errors import InputError


def require_int(name: str, value: Any, minimum: int) -> None:
    """Raises `InputError` for anything but a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InputError(f"{name} = {value!r}: must be a whole number >= {minimum}")


Window = int | Literal["all"]
"""Tokens seen exactly, the query's own included; `"all"` is an infinite window."""


class LayerSplats(NamedTuple):
    """What one layer with splats has: S splats per head, a window of W tokens, and M kept keys per head."""

    num_splats: int
    window: Window
    kept: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplatConfig:
    """Attention through Gaussian splats: where, how many, and which terms of the far score are parameters.

    The first three may be one number for all layers, or a list of one for each layer that has splats.

    Attributes:
        num_splats: splats per head, S >= 0; with 0, a query sees its window and kept keys, and nothing else.
        window: tokens that a query sees exactly, W >= 0, its own included. With `"all"`, each layer attends as it does
            in the plain model, and the splats are attached but unused.
        kept: keys beyond the window that each head sees exactly, M >= 0: those of most importance.
        layers: `"global"` for the global ones, `"all"`, or their numbers. A local layer reaches beyond its own window
            through splats, as a global one does, once `window` is finite.
        log_amplitudes: each splat has an amplitude.
        norm_gain: each head weighs the squared norms of query and far key.
        far_gain: each head weighs far keys against near ones.
        importance: what makes a key one to keep: its `"norm"`, or weights of each head that are `"learned"`.
    """

    num_splats: int | tuple[int, ...]
    window: Window | tuple[int, ...] = "all"
    kept: int | tuple[int, ...] = 0
    layers: str | tuple[int, ...] = "global"
    log_amplitudes: bool = False
    norm_gain: bool = False
    far_gain: bool = False
    importance: Literal["norm", "learned"] = "norm"

    def __post_init__(self) -> None:
        for name in ("num_splats", "window", "kept"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))
                for number in value:
                    require_int(name, number, 0)
            elif not (name == "window" and value == "all"):
                require_int(name, value, 0)
        if isinstance(self.layers, list | tuple):
            for layer in self.layers:
                require_int("layers", layer, 0)
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        elif self.layers not in ("all", "global"):
            raise InputError(f"layers = {self.layers!r}: must be 'all', 'global' or a list of layer numbers")
        for name in OPTIONAL_TERMS:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} = {getattr(self, name)!r}: must be true or false")
        if self.importance not in ("norm", "learned"):
            raise InputError(f"importance = {self.importance!r}: must be 'norm' or 'learned'")
        if self.window == "all" and self.keeps:
            raise InputError(
                f"kept = {self.kept} with window = 'all': no key leaves the window; give a number of tokens"
            )
        self.of_layers(max(len(x) if isinstance(x, tuple) else 1 for x in (self.num_splats, self.window, self.kept)))

    def of_layers(self, count: int) -> tuple[LayerSplats, ...]:
        """What each of `count` layers has.

        Raises:
            InputError: a list has another length, or a layer has nothing to attend to.
        """
        columns = []
        for name in ("num_splats", "window", "kept"):
            value = getattr(self, name)
            column = value if isinstance(value, tuple) else (value,) * count
            if len(column) != count:
                raise InputError(f"{name} = {list(column)}: give one number for each layer with splats, {count} in all")
            columns.append(column)
        layers = tuple(LayerSplats(*values) for values in zip(*columns, strict=True))
        if (0, 0, 0) in layers:
            raise InputError(
                "num_splats = 0 with window = 0 and kept = 0 leaves nothing to attend to; raise one of them"
            )
        return layers

    @property
    def has_splats(self) -> bool:
        """Whether any layer has any."""
        return any(self.num_splats) if isinstance(self.num_splats, tuple) else self.num_splats > 0

    @property
    def keeps(self) -> bool:
        """Whether any layer keeps keys."""
        return any(self.kept) if isinstance(self.kept, tuple) else self.kept > 0


OPTIONAL_TERMS = ("log_amplitudes", "norm_gain", "far_gain")
"""Terms of the far score that `SplatConfig` can make parameters; named as in `gsa_jax.ops.Splats`."""

SPLAT_PRESETS = {
    "hybrid": SplatConfig(num_splats=32, window=64, kept=64, norm_gain=True, far_gain=True, importance="learned"),
    "seed-phase1": SplatConfig(num_splats=2, window=0, layers="all"),
}
"""The recommended configuration, with the two terms that let far scores stand beside near ones; and that of the
PyTorch prototype, whose two splats replace the products of queries and keys in every layer."""


def describe(splats: SplatConfig) -> str:
    """What layers with splats have, in words."""

    def numbers(value: int | str | tuple[int, ...]) -> str:
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    kept = f", {numbers(splats.kept)} kept keys" if splats.keeps else ""
    return f"{numbers(splats.num_splats)} splats, a window of {numbers(splats.window)} tokens{kept}"
