"""Configuration of a GPT-Neo or GPT-2 whose attention goes through Gaussian splats, for `transformers` 4.57 and 5.

May be changed here: how the splats of a layer are read from a `config.json`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from transformers import GPTNeoConfig


class LayerSplats(NamedTuple):
    """What one layer has: S splats per head, a window of W tokens or `"all"`, and M kept keys per head."""

    num_splats: int
    window: int | str
    kept: int


class GSAConfig(GPTNeoConfig):
    """That of GPT-Neo, what tells a GPT-2 from it, and `splats`.

    Attributes:
        attention_bias: the projections to queries, keys and values have biases, as GPT-2's have.
        scale_attn_weights: GPT-2's field: exact scores are divided by the square root of the dimension of a head.
        scale_attn_by_inverse_layer_idx: GPT-2's field: they are divided by the number of the layer, counted from 1.
        donor: `model_type` of the model without its splats.
        splats: `num_splats`, `window` and `kept`, each a number or a list of one for each layer with splats; `layers`,
            which are `"global"`, `"all"` or numbers; which optional terms there are (`log_amplitudes`, `norm_gain`,
            `far_gain`); and `importance`, which is `"norm"` or `"learned"`. Without any, every layer is exact.
    """

    model_type = "gsa_gpt_neo"

    def __init__(
        self,
        splats: dict[str, Any] | None = None,
        attention_bias: bool = False,
        scale_attn_weights: bool = False,
        scale_attn_by_inverse_layer_idx: bool = False,
        donor: str = "gpt_neo",
        **kwargs: Any,
    ) -> None:
        kwargs.pop("attention_layers", None)  # as `to_dict` writes it; attention_types says it all
        super().__init__(**kwargs)
        self.splats = splats
        self.attention_bias = attention_bias
        self.scale_attn_weights = scale_attn_weights
        self.scale_attn_by_inverse_layer_idx = scale_attn_by_inverse_layer_idx
        self.donor = donor

    def to_dict(self) -> dict[str, Any]:
        """The dict for a `config.json`. Its `attention_layers` are there to be refused by GPT-Neo's own classes: they
        would leave the splats out, and compute another model."""
        kinds = enumerate(self.attention_layers)
        return super().to_dict() | {
            "attention_layers": [kind if self.layer_splats(n) is None else "splats" for n, kind in kinds]
        }

    def score_scales(self, layer: int) -> tuple[float, float]:
        """What a layer multiplies its queries and its keys by: together, what GPT-2 multiplies their products by.

        The splats were placed for just these shares.
        """
        whole = (self.hidden_size // self.num_heads) ** -0.5 if self.scale_attn_weights else 1.0
        if self.scale_attn_by_inverse_layer_idx:
            whole /= layer + 1
        of_keys = 2.0 ** round(math.log2(whole) / 2)
        return whole / of_keys, of_keys

    def layer_splats(self, layer: int) -> LayerSplats | None:
        """What a layer has, or None for one without splats."""
        if self.splats is None:
            return None
        layers = self.splats["layers"]
        if isinstance(layers, str):
            layers = [n for n, kind in enumerate(self.attention_layers) if layers in ("all", kind)]
        if layer not in layers:
            return None
        values = (self.splats[name] for name in LayerSplats._fields)
        return LayerSplats(*(x[layers.index(layer)] if isinstance(x, list | tuple) else x for x in values))
