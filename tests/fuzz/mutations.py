"""Strategies of hypothesis: what a valid input becomes.

Bytes are flipped, cut, spliced and overwritten with extremes; what has a structure (JSON, the header of safetensors,
pickles, archives, gzip, the arrays of a checkpoint) is also changed in it and put together anew, so that what is wrong
lies deeper than the first check. Files become links, folders and pipes.

May be changed here: kinds of changes. `changed` is the strategy for a reader.
"""

from __future__ import annotations

import copy
import functools
import gzip
import io
import json
import pickletools
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fuzz.harness import Files, Link, Special
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

_SECRETS = ("secret", "model.safetensors", "config.json", "canary.py", "vocab.json")

_NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    2**16,
    10**6,
    10**9,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    10**30,
]
_VALUES = [
    *_NUMBERS, -(2**63), 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), True, False, None, "",
    "0",
    "all", "\0", "\ud800", "\x1b[31m", "a\nb", "x" * 100_000, "/", ".", "..", "[" * 1000, [], {}, [[]], [0] * 1000,
    [[["global"], 10**9]], [[["global"] * 1000, 1000]], {"": None}, [None], {"type": "x"}, "<|endoftext|>",
    "F64", "BF16",
]  # fmt: skip
_DEEP = ("[" * 100_000, '{"a":' * 100_000, "[" * 50_000 + "]" * 50_000, "9" * 5000, "1e999", '"\\ud800"', "nul")
"""What JSON of no value says."""

_BYTES = [
    b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b"\0" * 8,
    b"\xff" * 7 + b"\x7f", struct.pack("<Q", 2**40), struct.pack("<Q", 100_000_000), struct.pack("<I", 10**6),
    b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PAR1", b"\x1f\x8b", b"{", b"}", b"[", b"]", b'"', b"\n", b"../",
    b"<|endoftext|>", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"NaN", b"-1", b"99999999999999999999", b"x" * 1000,
]  # fmt: skip

_PLACE = st.integers(0, 2**16 - 1)
_value = st.sampled_from(_VALUES).map(copy.deepcopy)
_bytes = st.one_of(st.sampled_from(_BYTES), st.binary(max_size=12))

_BOMB = gzip.compress(b"a" * 2**24, mtime=0) * 64
"""A gigabyte of one word in a megabyte."""


def _at(draw: Draw, size: int) -> int:
    return draw(_PLACE) * size >> 16


def change_bytes(draw: Draw, data: bytes) -> bytes:
    """One to four changes of bytes."""
    for _ in range(draw(st.integers(1, 4))):
        start = _at(draw, len(data) + 1)
        end = min(len(data), start + draw(st.sampled_from([1, 2, 4, 8, 16, 64, 1000])))
        match draw(st.sampled_from(["flip", "cut", "remove", "insert", "overwrite", "splice", "number"])):
            case "flip" if start < len(data):
                data = data[:start] + bytes([data[start] ^ 1 << draw(st.integers(0, 7))]) + data[start + 1 :]
            case "cut":
                data = data[:start]
            case "remove":
                data = data[:start] + data[end:]
            case "insert":
                data = data[:start] + draw(_bytes) + data[start:]
            case "overwrite":
                new = draw(_bytes)
                data = data[:start] + new + data[start + len(new) :]
            case "splice":
                there = _at(draw, len(data) + 1)
                data = data[:there] + data[start:end] + data[there:]
            case "number":
                numbers = list(re.finditer(rb"\d+", data))
                if numbers:
                    found = numbers[_at(draw, len(numbers))]
                    new = str(draw(st.sampled_from(_NUMBERS))).encode()
                    data = data[: found.start()] + new + data[found.end() :]
    return data


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    for key, inner in items:
        found += _paths(inner, (*path, key))
    return found


class _Raw:
    """Stands in JSON for text that is put in as it is."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def mark(self, text: str) -> str:
        name = f"raw-{len(self.texts)}"
        self.texts[f'"{name}"'] = text
        return name

    def dumps(self, value: Any) -> str:
        text = json.dumps(value)
        for mark, raw in self.texts.items():
            text = text.replace(mark, raw)
        return text


def change_json(draw: Draw, text: str, names: list[str], outside: str) -> str:
    """One to three values replaced, removed, renamed, doubled, moved, or added."""
    value, raw = json.loads(text), _Raw()
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in _paths(value) if path]
        if not paths:
            break
        *where, key = paths[_at(draw, len(paths))]
        holder = functools.reduce(lambda inner, step: inner[step], where, value)
        kinds = ["value", "value", "raw", "outside", "remove", "swap", "add", "twice", "twice"]
        match draw(st.sampled_from(kinds)):
            case "value":
                holder[key] = draw(_value)
            case "raw":
                holder[key] = raw.mark(draw(st.sampled_from(_DEEP)))
            case "outside":
                secret = draw(st.sampled_from(_SECRETS))
                holder[key] = draw(st.sampled_from(["../outside/", f"{outside}/", "./../outside/"])) + secret
            case "remove":
                del holder[key]
            case "swap":
                *other, name = paths[_at(draw, len(paths))]
                try:
                    source = functools.reduce(lambda inner, step: inner[step], other, value)
                    holder[key] = copy.deepcopy(source[name])
                except (KeyError, IndexError, TypeError):
                    pass
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(names))] = draw(_value)
            case "twice" if isinstance(holder, dict):
                # A key that stands there twice.
                old, new = json.dumps(holder[key]), json.dumps(draw(_value))
                holder[key] = raw.mark(f"{old}, {json.dumps(key)}: {new}")
    return raw.dumps(value)


_FIELDS = [
    "splats", "quantization_config", "auto_map", "attention_layers", "num_hidden_layers", "num_attention_heads",
    "torch_dtype", "vocab_file", "merges_file", "tokenizer_file", "fast_tokenizer_files", "tokenizer_class",
    "pad_token",
    "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "chat_template", "name_or_path",
    "normalizer", "pre_tokenizer", "post_processor", "n_head", "intermediate_size", "max_length", "__class__", "text",
    "head_dim", "eos_token_id", "init_inputs", "special_tokens_map_file", "_name_or_path", "transformers_version",
]  # fmt: skip


def _change_header(draw: Draw, data: bytes, outside: str) -> bytes:
    """The header of safetensors changed as JSON, its length as a number."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode()
    rest = data[8 + length :]
    if draw(st.booleans()):
        header = change_json(draw, header, ["__metadata__", "x", "data_offsets", "dtype", "shape"], outside)
    encoded = header.encode("utf-8", "surrogatepass")
    claimed = draw(st.sampled_from([len(encoded)] * 6 + [0, 1, len(encoded) - 1, len(encoded) + 1, *_NUMBERS]))
    return struct.pack("<Q", claimed % 2**64) + encoded + rest


_EVIL = [
    b"cos\nsystem\n(Vtouch pwned\ntR", b"cposix\nsystem\n(Vtouch pwned\ntR", b"cbuiltins\nexec\n(Vimport canary\ntR",
    b"cbuiltins\neval\n(V__import__('canary')\ntR", b"ccanary\nrun\n)R", b"csubprocess\nPopen\n(Vtrue\ntR",
    b"ccanary\nX\n)\x81",
    b"(Vtouch pwned\nios\nsystem\n", b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R", b"ctorch\nload\n(Vx\ntR",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"ccollections\nOrderedDict\n)R}b", b"c__builtin__\ngetattr\n",
    b"}]\x94b",
]  # fmt: skip
_OPCODES = [
    b"N", b"0", b"1", b"2", b"(", b")", b"]", b"}", b"t", b"l", b"d", b"e", b"a", b"s", b"u", b"R", b"b", b"o", b"Q",
    b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x94", b"\x8f", b"\x91", b".", b"q\xff",
    b"r\xff\xff\xff\x7f", b"h\0",
    b"j\xff\xff\xff\xff", b"K\xff", b"J\xff\xff\xff\x7f", b"J\0\0\0\x80", b"\x8a\x08" + b"\xff" * 8,
    b"X\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f", b"I" + b"9" * 5000 + b"\n", b"F1e999\n", b"\x96" + b"\xff" * 7 + b"\x7f", b"\x80\x05",
    b"(" * 10_000, b"]" * 10_000, b"\x85" * 100_000, b"(Na" * 1000, b"p99999999999\n", b"Vx\n", b"Pexternal\n",
    b"\x8a\xff" + b"\x7f" * 255, b"\x82\x01", b"X\x03\0\0\0\xed\xa0\x80", b"Vdata/../../outside/secret\n",
]  # fmt: skip


def _change_pickle(draw: Draw, data: bytes) -> bytes:
    """Instructions removed, doubled, exchanged and put in, among them those that call what is in no state dict."""
    if draw(st.integers(0, 3)) == 0:
        return change_bytes(draw, data)
    places = [place for _, _, place in pickletools.genops(data) if place is not None]
    parts = [data[start:end] for start, end in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(draw(st.integers(1, 4))):
        n, m = _at(draw, len(parts)), _at(draw, len(parts))
        match draw(st.sampled_from(["remove", "double", "exchange", "insert", "evil", "replace", "number"])):
            case "remove" if len(parts) > 1:
                del parts[n]
            case "double":
                parts.insert(m, parts[n])
            case "exchange":
                parts[n], parts[m] = parts[m], parts[n]
            case "insert":
                parts.insert(n, draw(st.sampled_from(_OPCODES)))
            case "evil":
                parts.insert(n, draw(st.sampled_from(_EVIL)))
            case "replace":
                parts[n] = draw(st.sampled_from(_OPCODES))
            case "number":
                numbers = [i for i, part in enumerate(parts) if part[:1] in (b"K", b"M", b"J", b"\x8a")]
                if numbers:
                    number = draw(st.sampled_from(_NUMBERS))
                    parts[numbers[_at(draw, len(numbers))]] = b"\x8a\x10" + number.to_bytes(16, "little", signed=True)
    return b"".join(parts)


def _change_archive(draw: Draw, data: bytes) -> bytes:
    if draw(st.integers(0, 3)) == 0:
        return change_bytes(draw, data)
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        records = [(info.filename, opened.read(info)) for info in opened.infolist()]
    records = [(name, _change_pickle(draw, held) if name.endswith("data.pkl") else held) for name, held in records]
    stream = io.BytesIO()
    kind = draw(st.sampled_from(["stored"] * 5 + ["deflated", "bomb", "names", "records"]))
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if kind in ("deflated", "bomb") else 0) as made:
        for n, (name, held) in enumerate(records):
            if kind == "names" and n == _at(draw, len(records)):
                name = draw(
                    st.sampled_from(["../outside/secret", "/data.pkl", "data.pkl", "archive/data/0", "a/\x1b[31m"])
                )
            if kind == "records" and n == _at(draw, len(records)):
                held = change_bytes(draw, held)
            if kind == "bomb" and name.endswith("data.pkl"):
                held = held[:-1] + b"N0" * 2**22 + b"."
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a name that is there twice
                made.writestr(name, held)
    return stream.getvalue()


def _change_legacy(draw: Draw, data: bytes) -> bytes:
    if draw(st.booleans()):
        return change_bytes(draw, data)
    stream = io.BytesIO(data)
    places = [0]
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        places.append(stream.tell())
    parts = [data[start:end] for start, end in zip(places, [*places[1:], len(data)], strict=True)]
    n = draw(st.sampled_from([3, 3, 3, 0, 1, 2, 4]))
    parts[n] = _change_pickle(draw, parts[n])
    return b"".join(parts)


def _change_gzip(draw: Draw, data: bytes) -> bytes:
    kind = draw(st.sampled_from(["bytes"] * 8 + ["inside"] * 8 + ["twice", "bomb"]))
    if kind == "bomb" and draw(st.integers(0, 20)) == 0:  # which takes long to refuse
        return _BOMB
    if kind == "inside":
        return gzip.compress(change_bytes(draw, gzip.decompress(data)), mtime=0)
    return data + data if kind == "twice" else change_bytes(draw, data)


def _change_arrays(draw: Draw, files: dict[str, Any], state: str, outside: str) -> None:
    """Keys of the database in which Orbax keeps arrays, written anew with the checksums that belong to them."""
    import tensorstore

    with tempfile.TemporaryDirectory() as made:
        for name, content in files.items():
            if name.startswith(state) and isinstance(content, bytes):
                path = Path(made) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        held = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{made}/{state}/"}}
        store = tensorstore.KvStore.open(held).result()
        keys = sorted(store.list().result())
        for key in draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2, unique=True)):
            content = store.read(key).result().value
            if key.endswith((b".zarray", b"zarr.json")) and draw(st.integers(0, 4)):
                content = change_json(draw, content.decode(), _FIELDS, outside).encode("utf-8", "surrogatepass")
            else:
                content = change_bytes(draw, content)
            store.write(key, content).result()
        for name in [name for name in files if name.startswith(state)]:
            del files[name]
        for path in sorted(Path(made).rglob("*")):
            if path.is_file():
                files[str(path.relative_to(made))] = path.read_bytes()


_STAND_INS = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1\n",
    b"<!DOCTYPE html>\n<html><title>404</title></html>\n",
    b"  <HTML>\xff",
    b"",
)
"""What lies in the place of a file that was not fetched."""


def _change_file(draw: Draw, name: str, data: bytes, outside: str) -> bytes:
    if draw(st.integers(0, 31)) == 0:
        return draw(st.sampled_from(_STAND_INS))
    structured = draw(st.integers(0, 3)) > 0
    if name.endswith(".safetensors") and structured:
        return _change_header(draw, data, outside)
    if name == "pytorch_model.bin":
        return _change_archive(draw, data) if data[:2] == b"PK" else _change_legacy(draw, data)
    if name.endswith(".gz"):
        return _change_gzip(draw, data)
    if name.endswith(".jsonl") and structured:
        lines = data.decode().split("\n")
        n = _at(draw, len(lines))
        if lines[n]:
            lines[n] = change_json(draw, lines[n], _FIELDS, outside)
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    if structured:
        try:
            text = data.decode()
            json.loads(text)
        except ValueError:
            return change_bytes(draw, data)
        return change_json(draw, text, _FIELDS, outside).encode("utf-8", "surrogatepass")
    return change_bytes(draw, data)


@st.composite
def changed(draw: Draw, valid: Mapping[str, bytes], outside: str, owned: bool = True) -> Files:
    """The files of a reader with one or two of them changed; of a folder that is read as a whole, if it is `owned`."""
    files: dict[str, Any] = dict(valid)
    # Of the files of a checkpoint, those that hold its arrays are many, and `config.json` is one.
    names = sorted(files)
    small = [name for name in names if "/" not in name]
    states = sorted({name.partition("/manifest.ocdbt")[0] for name in names if name.endswith("/manifest.ocdbt")})
    states = [state for state in states if "ocdbt.process" not in state]
    if states and draw(st.booleans()):
        _change_arrays(draw, files, draw(st.sampled_from(states)), outside)
        return files
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        name = draw(st.sampled_from(small if small and draw(st.booleans()) else names))
        match draw(st.sampled_from(["file"] * 17 + ["link", "special", "missing"] * owned)):
            case "file" if isinstance(files.get(name), bytes):
                twice = files[name] is not valid[name]  # what is changed may have no structure any more
                files[name] = (
                    change_bytes(draw, files[name]) if twice else _change_file(draw, name, files[name], outside)
                )
            case "link":
                targets = [f"{outside}/{Path(name).name}", f"{'../' * (name.count('/') + 1)}outside/{Path(name).name}"]
                loop = [Path(name).name, "/dev/zero", "/proc/self/environ", f"{outside}/secret", outside]
                files[name] = Link(draw(st.sampled_from([*targets, *loop])))
            case "special":
                files[name] = Special(draw(st.sampled_from(["fifo", "folder"])))
            case "missing":
                files.pop(name, None)
    if owned and draw(st.integers(0, 15)) == 0:
        extra = ["adapter_config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "weights"]
        kinds = [b"{}", b"[", b"\xff", Link(f"{outside}/secret"), Link(outside), Special("fifo"), Special("folder")]
        name = draw(st.sampled_from([name for name in extra if not any(file.startswith(f"{name}/") for file in files)]))
        files.setdefault(name, draw(st.sampled_from(kinds)))
    return files
