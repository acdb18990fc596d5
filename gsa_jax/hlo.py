"""What a compiled program does, read from its text: bytes that devices exchange, and operations of matrix products.

XLA's own totals count the body of a loop once, so the text of the optimised program (HLO) is walked here, and what a
loop repeats is multiplied. May be changed here: what is counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

COLLECTIVES: tuple[str, ...] = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
"""Of element types whose name does not end in their bits, as `f32`, `s8` and `f8e4m3fn` do."""

Array = tuple[str, tuple[int, ...]]
"""Element type and shape."""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    arrays: tuple[Array, ...]
    op: str
    operands: tuple[str, ...]
    line: str

    def computations(self, *roles: str) -> list[str]:
        """Names of the computations that have one of these roles, such as `body`."""
        found = []
        for role in roles:
            for names in re.findall(rf"\b{role}=(\{{[^}}]*\}}|%[\w.\-]+)", self.line):
                found += re.findall(r"%([\w.\-]+)", names)
        return found

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """Of an attribute such as `dimensions={0,1}`; none if it is not there."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.line)
        return tuple(map(int, found[1].split(","))) if found and found[1] else ()


class Program:
    """A compiled program as its text says it.

    Args:
        text: `jax.stages.Compiled.as_text()`; of one device, where the program is spread over several.
    """

    def __init__(self, text: str) -> None:
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._flops: dict[str, int] = {}
        instructions: dict[str, _Instruction] = {}
        entry = None
        for line in text.splitlines():
            if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                instructions = self._computations.setdefault(start[2], {})
                entry = start[2] if start[1] else entry
            elif found := _parse(line):
                instructions[found.name] = found
        if entry is None:
            raise ValueError("the text has no ENTRY; give that of a compiled program")
        self._entry = entry
        every = (instruction for there in self._computations.values() for instruction in there.values())
        self._fused = {name for one in every if one.op == "fusion" for name in one.computations("calls")}

    def collective_bytes(self) -> dict[str, int]:
        """Bytes that each kind of collective moves per run, as one device sees it: of what it takes or of what it
        gives, whichever is more. That is the whole array for an all-gather, an all-reduce and a reduce-scatter.

        Kinds that do not occur are 0. Both branches of a condition count.
        """
        # A TPU spreads one exchange over many fusions, which share its channel and name; it starts once. The channel
        # alone would not do: all exchanges that `shard_map` writes have number 1.
        exchanges: dict[tuple[str, object], tuple[int, int]] = {}
        for computation, instruction, times in self._walk(self._entry, 1):
            kind = instruction.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # how a TPU writes it: an all-reduce of which it keeps a slice
            size = self._exchanged(computation, instruction)
            channel = re.search(r"channel_id=(\d+)", instruction.line)
            key: tuple[str, object] = kind, (computation, instruction.name)
            if channel and computation in self._fused:
                name = re.search(r'op_name="([^"]*)"', instruction.line)
                key = kind, (channel[1], name and name[1], size)
            before = exchanges.get(key, (times, size))
            exchanges[key] = min(before[0], times), max(before[1], size)
        totals = dict.fromkeys(COLLECTIVES, 0)
        for (kind, _), (times, size) in exchanges.items():
            totals[kind] += times * size
        return totals

    def matrix_flops(self) -> int:
        """Multiplications and additions of matrix products and convolutions per run, on one device.

        Of a condition, the dearer branch counts. Products inside of kernels that are not HLO are not seen,
        but for those of cuBLAS, which are called by their own names.
        """
        return self._flops_of(self._entry)

    def _exchanged(self, computation: str, instruction: _Instruction) -> int:
        given = sum(map(_bytes, self._operand_arrays(computation, instruction)))
        arrays = instruction.arrays
        if instruction.op.endswith("-start"):
            # Its result repeats the operands before the results, and a TPU adds counters, which are four bytes each.
            arrays = [array for array in arrays if array[1]] or arrays
            return max(given, sum(map(_bytes, arrays)) - given)
        return max(given, sum(map(_bytes, arrays)))

    def _operand_arrays(self, computation: str, instruction: _Instruction) -> list[Array]:
        there = self._computations[computation]
        return [array for name in instruction.operands if name in there for array in there[name].arrays]

    def _walk(self, computation: str, times: int) -> Iterator[tuple[str, _Instruction, int]]:
        for instruction in self._computations.get(computation, {}).values():
            yield computation, instruction, times
            repeats = times * (self._trips(computation, instruction) if instruction.op == "while" else 1)
            for inner in self._called(instruction):
                yield from self._walk(inner, repeats)

    def _called(self, instruction: _Instruction) -> list[str]:
        """What runs where an instruction does; not the sums and comparisons that a reduction applies."""
        match instruction.op:
            case "while":
                return instruction.computations("body")
            case "conditional":
                return instruction.computations("branch_computations", "true_computation", "false_computation")
            case "call":
                return instruction.computations("to_apply")
        return instruction.computations("calls", "called_computations")

    def _flops_of(self, computation: str) -> int:
        if computation not in self._flops:
            total = 0
            for instruction in self._computations.get(computation, {}).values():
                inner = [self._flops_of(called) for called in self._called(instruction)]
                match instruction.op:
                    case "while":
                        total += sum(inner) and sum(inner) * self._trips(computation, instruction)
                    case "conditional":
                        total += max(inner, default=0)
                    case "dot" | "convolution":
                        operands = self._operand_arrays(computation, instruction)
                        total += (_dot_flops if instruction.op == "dot" else _convolution_flops)(instruction, operands)
                    case "custom-call" if '_target="__cublas$' in instruction.line:
                        total += _library_flops(instruction, self._operand_arrays(computation, instruction))
                    case _:
                        total += sum(inner)
            self._flops[computation] = total
        return self._flops[computation]

    def _trips(self, computation: str, loop: _Instruction) -> int:
        """How often a loop runs: as its line says, or else as its counter and its condition do; once if unknown."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(known[1])
        (condition,), (body,) = loop.computations("condition"), loop.computations("body")
        there = self._computations[condition]
        compared = next((i for i in there.values() if i.op == "compare"), None)
        if compared is None:
            return 1
        counters = [int(found[1]) for n in compared.operands if (found := re.search(r"index=(\d+)", there[n].line))]
        limits = [value for name in compared.operands if (value := _constant(there[name])) is not None]
        if len(counters) != 1 or len(limits) != 1:
            return 1
        begin = _constant(self._element(computation, loop.operands[0], counters[0])) or 0
        stride = self._stride(body, counters[0])
        return max(-(-(limits[0] - begin + ("LE" in compared.line)) // stride), 0)

    def _element(self, computation: str, name: str, index: int) -> _Instruction | None:
        there = self._computations[computation]
        found = there.get(name)
        if found is None or found.op != "tuple" or index >= len(found.operands):
            return None
        return there.get(found.operands[index])

    def _stride(self, body: str, index: int) -> int:
        there = self._computations[body]
        root = next((i for i in there.values() if i.line.lstrip().startswith("ROOT")), None)
        following = self._element(body, root.name, index) if root else None
        if following is None or following.op != "add":
            return 1
        steps = [value for name in following.operands if (value := _constant(there.get(name))) is not None]
        return steps[0] if steps else 1


def _parse(line: str) -> _Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", line)
    if not found:
        return None
    name, result, op, rest = found.groups()
    operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ", 1)[0]))
    return _Instruction(name, _arrays(result), op, operands, line)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        (kind, tuple(map(int, sizes.split(","))) if sizes else ())
        for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    )


def _bytes(array: Array) -> int:
    kind, shape = array
    bits = _BITS.get(kind) or int(re.findall(r"\d+", kind)[0])
    return math.prod(shape) * bits // 8


def _constant(instruction: _Instruction | None) -> int | None:
    found = re.search(r" constant\((-?\d+)\)", instruction.line) if instruction else None
    return int(found[1]) if found else None


def _dot_flops(dot: _Instruction, operands: Sequence[Array]) -> int:
    return _product_flops(dot, operands, dot.numbers("lhs_contracting_dims"))


def _library_flops(call: _Instruction, operands: Sequence[Array]) -> int:
    """A product by cuBLAS, whose first result is the product."""
    axes = re.search(r'"lhs_contracting_dimensions":\[([^]]*)\]', call.line)
    assert axes is not None, call.line
    return _product_flops(call, operands, map(int, re.findall(r"\d+", axes[1])))


def _product_flops(product: _Instruction, operands: Sequence[Array], contracted: Iterable[int]) -> int:
    return 2 * math.prod(product.arrays[0][1]) * math.prod(operands[0][1][axis] for axis in contracted)


def _convolution_flops(convolution: _Instruction, operands: Sequence[Array]) -> int:
    """A TPU's matrix products are convolutions, whose windows may hold one valid place, or be batch axes."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.line)
    assert labels is not None, convolution.line
    sizes = [
        dict(zip(names, shape, strict=True))
        for names, (_, shape) in zip(labels.groups(), (*operands[:2], convolution.arrays[0]), strict=True)
    ]
    image, kernel, result = sizes
    window = re.search(r"window=\{([^}]*)\}", convolution.line)
    settings = dict(setting.split("=") for setting in window[1].split()) if window else {}
    total = 2 * result["b"] * result["f"] * kernel["i"]
    for axis in range(len(image) - 2):

        def of_axis(setting: str, default: str, axis: int = axis) -> str:
            return settings[setting].split("x")[axis] if setting in settings else default

        total *= _valid_places(
            image[str(axis)],
            kernel[str(axis)],
            result[str(axis)],
            stride=int(of_axis("stride", "1")),
            before=int(of_axis("pad", "0_0").split("_")[0]),
            image_dilation=int(of_axis("lhs_dilate", "1")),
            kernel_dilation=int(of_axis("rhs_dilate", "1")),
        )
    return total


@functools.lru_cache
def _valid_places(
    image: int, kernel: int, result: int, *, stride: int, before: int, image_dilation: int, kernel_dilation: int
) -> int:
    """Pairs of places in the result and in the kernel that meet a place of the image, and neither padding nor a gap."""
    places = np.arange(result)[:, None] * stride - before + np.arange(kernel) * kernel_dilation
    inside = (places >= 0) & (places <= (image - 1) * image_dilation) & (places % image_dilation == 0)
    return int(np.count_nonzero(inside))
