"""How the models that can be converted name and store the parameters that they share with ours.

One table for each donor, read in both directions: `Layout.read` on the way in, `Layout.write` on the way out, which
gives back the tensors that were read bit for bit. A further donor needs a table here, one of its fields in
`gsa_jax.hf_fields`, and the tests that the others have; docs/decisions.md says what it must satisfy.

May be changed here: the tables, and what an entry of one can say. Pure functions of names, shapes and arrays.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from gsa_jax.hf_fields import SPLAT_MODEL_TYPE


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a donor.

    Attributes:
        holds: our names of the parameters that lie in it, one behind the other along their first axis; all of one size.
        transposed: it is a matrix `[in, out]`; ours are `[out, in]`.
    """

    holds: tuple[str, ...]
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where one of our parameters lies: the `number`-th of `count` equal parts of a tensor."""

    tensor: str
    number: int = 0
    count: int = 1
    transposed: bool = False

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter, given the tensor."""
        if self.count == 1 and not self.transposed:
            return tensor
        whole = tensor.T if self.transposed else tensor
        size = len(whole) // self.count
        return np.ascontiguousarray(whole[self.number * size : (self.number + 1) * size])


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tensors of a donor.

    Attributes:
        tensors: its name -> what it holds, where that is another parameter than ours of the same name, or stored in
            another way. `{}` in names stands for the number of a layer.
    """

    tensors: Mapping[str, Stored] = dataclasses.field(default_factory=dict)

    def read(self, name: str) -> dict[str, Piece]:
        """Our names of what lies in the donor's tensor of this name, and where."""
        for template, stored in self.tensors.items():
            if (layer := _layer(template, name)) is not None:
                pieces = enumerate(stored.holds)
                return {ours.format(layer): Piece(name, n, len(stored.holds), stored.transposed) for n, ours in pieces}
        return {name: Piece(name)}

    def write(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Our parameters as the donor stores them."""
        written, used = {}, set()
        for name in tensors:
            if name in used:
                continue
            template, layer = self._template_of(name)
            if template is None:
                written[name] = tensors[name]
                continue
            stored = self.tensors[template]
            names = [ours.format(layer) for ours in stored.holds]
            parts = [tensors[name] for name in names]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            written[template.format(layer)] = whole.T if stored.transposed else whole
            used.update(names)
        return written

    def shapes(self, ours: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of what `write` gives, without the arrays."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in ours.items():
            template, layer = self._template_of(name)
            if template is None:
                shapes[name] = shape
                continue
            stored = self.tensors[template]
            whole = (shape[0] * len(stored.holds), *shape[1:])
            shapes[template.format(layer)] = whole[::-1] if stored.transposed else whole
        return shapes

    def _template_of(self, name: str) -> tuple[str | None, str]:
        """The donor's tensor that our parameter lies in, and the number of its layer; None for one of the same name."""
        for template, stored in self.tensors.items():
            for ours in stored.holds:
                if (layer := _layer(ours, name)) is not None:
                    return template, layer
        return None, ""


def _layer(template: str, name: str) -> str | None:
    """The number that stands for `{}`, empty without any, or None if the name does not fit."""
    match = re.fullmatch(re.escape(template).replace(re.escape("{}"), r"(\d+)"), name)
    return None if match is None else "".join(match.groups())


_ATTENTION, _GPT2 = "transformer.h.{}.attn.attention.", "transformer.h.{}.attn."

LAYOUTS = {
    "gpt_neo": Layout(),
    SPLAT_MODEL_TYPE: Layout(),
    "gpt2": Layout(
        {
            # Its `Conv1D` multiplies from the left.
            f"{_GPT2}c_attn.weight": Stored(tuple(f"{_ATTENTION}{x}_proj.weight" for x in "qkv"), transposed=True),
            f"{_GPT2}c_attn.bias": Stored(tuple(f"{_ATTENTION}{x}_proj.bias" for x in "qkv")),
            f"{_GPT2}c_proj.weight": Stored((f"{_ATTENTION}out_proj.weight",), transposed=True),
            f"{_GPT2}c_proj.bias": Stored((f"{_ATTENTION}out_proj.bias",)),
            "transformer.h.{}.mlp.c_fc.weight": Stored(("transformer.h.{}.mlp.c_fc.weight",), transposed=True),
            "transformer.h.{}.mlp.c_proj.weight": Stored(("transformer.h.{}.mlp.c_proj.weight",), transposed=True),
        }
    ),
}
"""`model_type` -> its layout."""
