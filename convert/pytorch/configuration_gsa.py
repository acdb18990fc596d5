"""Configuration of a GPT-Neo whose attention goes through Gaussian splats, for `transformers` 4.57 and 5.

May be changed here: how the splats of a layer are read from a `config.json`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import GPTNeoConfig


class LayerSplats(NamedTuple):
    """What one layer has: S splats per head, a window of W tokens or `"all"`, and M kept keys per head."""

    num_splats: int
    window: int | str
    kept: int


class GSAConfig(GPTNeoConfig):
    """That of GPT-Neo, and `splats`.

    Attributes:
        splats: `num_splats`, `window` and `kept`, each a number or a list of one for each layer with splats; `layers`,
            which are `"global"`, `"all"` or numbers; which optional terms there are (`log_amplitudes`, `norm_gain`,
            `far_gain`); and `importance`, which is `"norm"` or `"learned"`. Without any, every layer is GPT-Neo's own.
    """

    model_type = "gsa_gpt_neo"

    def __init__(self, splats: dict[str, Any] | None = None, **kwargs: Any) -> None:
        kwargs.pop("attention_layers", None)  # as `to_dict` writes it; attention_types says it all
        super().__init__(**kwargs)
        self.splats = splats

    def to_dict(self) -> dict[str, Any]:
        """The dict for a `config.json`. Its `attention_layers` are there to be refused by GPT-Neo's own classes: they
        would leave the splats out, and compute another model."""
        kinds = enumerate(self.attention_layers)
        return super().to_dict() | {
            "attention_layers": [kind if self.layer_splats(n) is None else "splats" for n, kind in kinds]
        }

    def layer_splats(self, layer: int) -> LayerSplats | None:
        """What a layer has, or None for a layer of GPT-Neo's own."""
        if self.splats is None:
            return None
        layers = self.splats["layers"]
        if isinstance(layers, str):
            layers = [n for n, kind in enumerate(self.attention_layers) if layers in ("all", kind)]
        if layer not in layers:
            return None
        values = (self.splats[name] for name in LayerSplats._fields)
        return LayerSplats(*(x[layers.index(layer)] if isinstance(x, list | tuple) else x for x in values))
