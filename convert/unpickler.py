"""PyTorch's pickles, read without PyTorch and without running anything that they name.

A pickle is a program for a stack machine. This one knows constants, tuples, lists and dicts, and of all that a pickle
can name, what tensors are made of; any other name ends it. Python's own `pickle.Unpickler` would not do, however few
names its `find_class` lets in: a key that is a tuple of a million levels crashes the process, a memo of a large number
takes gigabytes, and a file may set attributes of whatever `find_class` returned.

May be changed here: the names that a file may use. Where bytes lie in a file is `gsa_jax.convert.torch_files`.
"""

from __future__ import annotations

import dataclasses
import io
import pickletools
from collections.abc import Callable
from typing import Any, NoReturn

from gsa_jax.errors import first_line

MAX_BYTES = 2**24
"""Of a pickle without the weights, which stand outside of it: enough for 80,000 tensors; 1 GB of objects at worst."""

DTYPES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1, "complex64": 8, "complex128": 16,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
"""Bytes of an element."""

_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}  # fmt: skip
_STORAGE_DTYPES = {
    **{f"{module}.{name}Storage": dtype for name, dtype in _STORAGES.items() for module in ("torch", "torch.cuda")},
    # Bytes, of whatever dtype the tensor says.
    "torch.storage.UntypedStorage": "uint8",
}


class PickleError(Exception):
    """The pickle is damaged, or does what no state dict does; the message is a phrase for an `InputError`."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """A run of bytes beside the pickle, by the key that the file has for it."""

    key: str
    dtype: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A strided view of a storage, inside of its bounds; offset and strides are in elements.

    Attributes:
        dtype: of `DTYPES`.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


@dataclasses.dataclass(frozen=True)
class _Name:
    """Something that a pickle names; it has no methods and no state."""

    name: str


def unpickle(stream: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """The next object of a stream, and the storages it describes: constants, tuples, lists, dicts, and `StoredTensor`.

    Raises:
        PickleError: the pickle is damaged, or names something that is no part of a state dict.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
        return machine.pop(), machine.storages
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # What a damaged program leads to here and in `pickletools`: bytes that end early, an empty stack, no such memo.
        _damaged(f"its pickle: {first_line(error)}", error)


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            _damaged("it reaches below a mark")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def step(self, opcode: str, argument: Any) -> None:
        push = self.stack.append
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case _ if opcode in _CONSTANTS:
                push(argument)
            case "EMPTY_TUPLE":
                push(())
            case "EMPTY_LIST":
                push([])
            case "EMPTY_DICT":
                push({})
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP":
                self.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([self.pop() for _ in range(int(opcode[-1]))][::-1]))
            case "TUPLE":
                items = self.pop_to_mark()
                push(tuple(items))
            case "APPEND":
                self._extend([self.pop()])
            case "APPENDS":
                self._extend(self.pop_to_mark())
            case "SETITEM":
                self._update([self.pop(), self.pop()][::-1])
            case "SETITEMS":
                self._update(self.pop_to_mark())
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                push(self.memo[argument])
            case "GLOBAL":
                push(_known(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                if not isinstance(module, str) or not isinstance(name, str):
                    _damaged("a name that is none")
                push(_known(f"{module}.{name}"))
            case "BINPERSID":
                storage = _storage(self.pop())
                self.storages[storage.key] = storage
                push(storage)
            case "REDUCE":
                arguments, called = self.pop(), self.pop()
                push(_call(called, arguments))
            case "BUILD":
                self.pop()  # attributes, such as the versions of modules that a state dict has
                if not isinstance(self.stack[-1], dict):
                    _damaged("attributes of what is no dict")
            case _:
                _damaged(f"{opcode} has no place in a state dict")

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            _damaged("items for what is no list")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        _set_items(self.stack[-1], list(zip(items[::2], items[1::2], strict=True)))


_CONSTANTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip


def _damaged(what: str, cause: Exception | None = None) -> NoReturn:
    raise PickleError(f"truncated, damaged, or not written by torch.save ({what})") from cause


def _known(name: str) -> _Name:
    if name in _CALLS or name in _STORAGE_DTYPES or name.removeprefix("torch.") in DTYPES or name in _CLASSES:
        return _Name(name)
    raise PickleError(
        f"it holds {name[:100] if name.isprintable() else ascii(name[:100])}, and only tensors are read; save the "
        "weights alone instead: torch.save(model.state_dict(), 'pytorch_model.bin')"
    )


def _call(called: Any, arguments: Any) -> Any:
    call = _CALLS.get(called.name) if isinstance(called, _Name) else None
    if call is None or not isinstance(arguments, tuple):
        _damaged("it calls what is no function")
    return call(arguments)


def _set_items(target: Any, items: list[tuple[Any, Any]]) -> None:
    if not isinstance(target, dict):
        _damaged("entries for what is no dict")
    for name, value in items:
        # A tuple would be hashed level by level, and nothing limits how deep it is.
        if not isinstance(name, str | bytes | int | float | None):
            _damaged("an entry without a name")
        target[name] = value


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    match arguments:
        case ():
            pass
        case ([*pairs],) if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            _set_items(made, [(name, value) for name, value in pairs])
        case _:
            _damaged("an OrderedDict of no pairs")
    return made


def _size(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    match arguments:
        case (tuple(size),):
            return _naturals(size)
        case _:
            _damaged("a size without numbers")


def _storage(described: Any) -> Storage:
    match described:
        # Before 1.6 there is a last item: which part of another storage this is. It has been None since 0.4.
        case ("storage", _Name(name), str(key), _, int(count), *view) if view in ([], [None]):
            dtype = _STORAGE_DTYPES.get(name)
            if dtype is not None and count >= 0:
                return Storage(key, dtype, count * DTYPES[dtype])
    _damaged("a storage that is none")


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """`torch._utils._rebuild_tensor`, and its second and third form."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(size), tuple(strides), *rest):
            pass
        case _:
            _damaged("a tensor without a storage")
    match rest:
        case [_, _, _Name(name), *metadata]:
            dtype = name.removeprefix("torch.")
        case [] | [_, _] | [_, _, _]:
            dtype, metadata = storage.dtype, rest[2:]
        case _:
            _damaged("a tensor of an unknown form")
    if any(metadata):
        _damaged("a tensor that is conjugated or negated")
    if dtype not in DTYPES or offset < 0 or len(size) != len(strides):
        _damaged("a tensor of no shape")
    tensor = StoredTensor(storage, dtype, offset, _naturals(size), _naturals(strides))
    if tensor.span and (offset + tensor.span) * DTYPES[dtype] > storage.bytes:
        _damaged("a tensor that reaches beyond its storage")
    return tensor


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments:
        case (StoredTensor() as tensor, *_):
            return tensor
        case _:
            _damaged("a parameter without a tensor")


def _with_attributes(arguments: tuple[Any, ...]) -> StoredTensor:
    """A tensor to which attributes were given: a function, a class, its arguments, and the attributes."""
    match arguments:
        case (_Name(name), _, tuple(inner), _) if _CALLS.get(name) in (_tensor, _parameter):
            return _CALLS[name](inner)
        case _:
            _damaged("a tensor with attributes, and without a tensor")


def _naturals(numbers: tuple[Any, ...]) -> tuple[int, ...]:
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        _damaged("sizes that are no numbers")
    return numbers


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
}

_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
"""Named beside the attributes of a tensor."""
