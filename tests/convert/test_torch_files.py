"""Files of `torch.save`, read without PyTorch: the same bits as PyTorch reads, and nothing that a file names is run."""

import io
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from gsa_jax import InputError
from gsa_jax.checkpoint import load_tensors
from gsa_jax.convert.torch_files import TorchFile, open_torch_file
from helpers.bits import assert_same_tensors
from helpers.hf_folders import read_safetensors, write_bin_folder, write_folder

pytestmark = pytest.mark.parity

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = "an attribute, for which PyTorch has another way of saving"  # type: ignore[attr-defined]
    return tensor


def all_kinds() -> dict[str, torch.Tensor]:
    """Every dtype, and every way in which a tensor can lie in its storage."""
    generator = torch.Generator().manual_seed(0)
    matrix, shared = torch.randn(5, 7, generator=generator), torch.randn(100, generator=generator)
    kinds = {str(dtype): (10 * matrix).to(dtype) for dtype in DTYPES}
    return kinds | {
        "transposed": matrix.T,
        "permuted": torch.randn(2, 3, 4, generator=generator).permute(2, 0, 1),
        "part of a storage": shared[10:22].view(3, 4),
        "other part of it": shared[::9],
        "all of it": shared,
        "transposed bfloat16": matrix.bfloat16().T[1:, 2:],
        "expanded": shared[:1].expand(4, 3),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(matrix.clone()),
        "parameter with an attribute": with_attribute(torch.nn.Parameter(matrix.clone())),
        "tensor with an attribute": with_attribute(matrix.clone()),
        "nonfinite": torch.tensor([float("nan"), -float("inf"), -0.0, 1e-45]),
    }


def assert_as_pytorch_reads(file: Path) -> TorchFile:
    opened = open_torch_file(file)
    expected = torch.load(file, weights_only=False)
    assert_same_tensors({name: opened.read(name) for name in opened.tensors}, expected)
    return opened


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
def test_every_tensor_is_read_as_pytorch_reads_it(tmp_path, archive, protocol):
    state = OrderedDict(all_kinds())
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=archive, pickle_protocol=protocol)
    opened = assert_as_pytorch_reads(tmp_path / "x.bin")
    assert {name: f"torch.{tensor.dtype}" for name, tensor in opened.tensors.items()} == {
        name: str(tensor.dtype) for name, tensor in state.items()
    }


def test_dtypes_of_newer_versions(tmp_path):
    state = {
        str(dtype): torch.arange(6).to(dtype)
        for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
    }
    torch.save(state, tmp_path / "x.bin")
    opened = open_torch_file(tmp_path / "x.bin")
    for name, tensor in state.items():
        got = opened.read(name)
        assert got.tobytes() == tensor.view(torch.uint8).numpy().tobytes() and f"torch.{got.dtype}" == name


def test_a_module_and_its_buffers_as_people_save_them(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).half()
    for archive in (True, False):
        torch.save(module.state_dict(), tmp_path / f"{archive}.bin", _use_new_zipfile_serialization=archive)
        assert_as_pytorch_reads(tmp_path / f"{archive}.bin")


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
def test_a_state_dict_is_taken_out_of_what_trainers_put_around_it(tmp_path, archive):
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    inner = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    for path in (["model"], ["state_dict"], ["module"], ["model_state_dict"], ["model", "module"]):
        content, left = inner, []
        for name in reversed(path):
            content = {"optimizer": optimizer, name: content, "step": 3, "betas": (0.9, 0.999), "name": None}
            left = ["optimizer", "step", "betas", "name", *left]
        torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=archive)
        opened = open_torch_file(tmp_path / "x.bin")
        assert (list(opened.opened), list(opened.left)) == (path, left)
        assert_same_tensors({name: opened.read(name) for name in opened.tensors}, inner)


def test_nothing_stays_mapped_and_large_storages_are_not_read_for_small_views(tmp_path):
    big = torch.zeros(16 * 2**20)
    torch.save({"part": big[2**20 : 2**20 + 8]}, tmp_path / "x.bin")
    code = (
        "import sys, resource; from pathlib import Path; from gsa_jax.convert.torch_files import open_torch_file\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "opened = open_torch_file(Path(sys.argv[1])); array = opened.read('part')\n"
        "assert str(sys.argv[1]) not in Path('/proc/self/maps').read_text()\n"
        "print(array.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.bin"], capture_output=True, text=True, check=True)
    size, grown = map(int, done.stdout.split())
    assert size == 8 and grown < 16 * 1024  # of 64 MiB, in KiB


BLOCKED = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("PyTorch is not installed")


sys.meta_path.insert(0, Blocked())
from gsa_jax.cli import main

main()
"""


@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["archive", "legacy"])
def test_conversion_needs_no_pytorch(tmp_path, story_neo, legacy):
    """The bundled model, from nothing but a .bin, in a process in which PyTorch cannot be imported."""
    tensors = read_safetensors(story_neo)
    source = write_bin_folder(tmp_path / "source", tensors, legacy=legacy)
    (source / "config.json").write_bytes((story_neo / "config.json").read_bytes())
    subprocess.run([sys.executable, "-c", BLOCKED, "convert", source, tmp_path / "out"], check=True)
    assert_same_tensors(load_tensors(tmp_path / "out")[1], tensors)


# Files that no trainer wrote.


def constant(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def archive_of(data: bytes, *, compression: int = zipfile.ZIP_STORED, twice: bool = False) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", bytes(48))
        if twice:
            archive.writestr("other/data.pkl", data)
    return made.getvalue()


def a_tensor(
    count: object = 12, offset: object = 0, size: object = (3, 4), strides: object = (4, 1), end: bytes = b""
) -> bytes:
    """A state dict with one tensor, of a storage that is said to have `count` floats and has 12."""
    storage = name("torch", "FloatStorage") + constant("0") + constant("cpu") + constant(count) + end
    view = constant(offset) + constant(size) + constant(strides) + b"\x89" + name("collections", "OrderedDict") + b")R"
    rebuilt = name("torch._utils", "_rebuild_tensor_v2") + b"((" + constant("storage") + storage + b"tQ" + view + b"tR"
    return pickled(b"}", constant("w"), rebuilt, b"s")


def nested(levels: int) -> bytes:
    return b")" + b"\x85" * levels


def doubled(levels: int) -> bytes:
    """A tuple of itself, twice, `levels` times: few bytes, but no end of walking through it."""
    return b")" + b"".join(b"q\x01h\x01\x86" for _ in range(levels))


LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
LEGACY_TENSOR = a_tensor(end=constant(None))
LEGACY_ARRAY = struct.pack("<q", 12) + bytes(48)

HOSTILE = {
    "a command": (archive_of(pickled(name("posix", "system"), constant("touch sprung"), b"\x85R")), "posix.system"),
    "a command, legacy": (LEGACY + pickled(name("os", "system"), constant("touch sprung"), b"\x85R"), "os.system"),
    "an import": (archive_of(pickled(name("antigravity", "fly"), b")R")), "antigravity.fly"),
    "a name by the stack": (archive_of(pickled(constant("os"), constant("system"), b"\x93)R")), "os.system"),
    "a name of newlines": (archive_of(pickled(constant("o\ns"), constant("\x1b[2J"), b"\x93)R")), "only tensors"),
    "an attribute of a name": (archive_of(pickled(name("torch", "Size"), b"}b")), "attributes of what is no dict"),
    "a call of a constant": (archive_of(pickled(constant(3), b")R")), "it calls what is no function"),
    "a new object": (archive_of(pickled(name("collections", "OrderedDict"), b")\x81")), "NEWOBJ"),
    "a key of many levels": (archive_of(pickled(b"}", nested(10**5), b"Ns")), "an entry without a name"),
    "a key that doubles": (archive_of(pickled(b"}", doubled(100), b"Ns")), "an entry without a name"),
    "lists of many levels": (archive_of(pickled(b"]" * 30_000, b"a" * 29_999)), "not a state dict but a list"),
    "a large memo": (archive_of(pickled(b"Nr\xff\xff\xff\xff")), "not a state dict but a NoneType"),
    "a long string": (archive_of(pickled(b"\x8d" + struct.pack("<Q", 2**62))), "not written by torch.save"),
    "a long string, legacy": (LEGACY + b"\x80\x02X\xff\xff\xff\x7f", "not written by torch.save"),
    "a long number": (archive_of(pickled(b"\x8b\xff\xff\xff\x7f")), "not written by torch.save"),
    "an empty stack": (archive_of(pickled(b"0")), "not written by torch.save"),
    "below a mark": (archive_of(pickled(b"N(0")), "below a mark"),
    "a large pickle": (archive_of(bytes(2**24 + 1)), "its pickle has 16,777,217 bytes"),
    "a zip bomb": (archive_of(bytes(2**26), compression=zipfile.ZIP_DEFLATED), "compressed"),
    "another archive": (archive_of(b"").replace(b"data.pkl", b"code.pkl"), "no data.pkl in it"),
    "two pickles": (archive_of(a_tensor(), twice=True), "two records"),
    "a large storage": (archive_of(a_tensor(2**50, 0, (2**50,), (1,))), "is not there, or not whole"),
    "a large shape": (archive_of(a_tensor(12, 0, (2**40, 2**40), (2**40, 1))), "beyond its storage"),
    "beyond the storage": (archive_of(a_tensor(offset=1)), "beyond its storage"),
    "before the storage": (archive_of(a_tensor(offset=-1)), "of no shape"),
    "backwards": (archive_of(a_tensor(strides=(4, -1))), "sizes that are no numbers"),
    "sizes of words": (archive_of(a_tensor(size=("3", "4"))), "sizes that are no numbers"),
    "more sizes than strides": (archive_of(a_tensor(size=(3, 4, 1))), "of no shape"),
    "a storage of fewer": (archive_of(a_tensor(-12)), "a storage that is none"),
    "a legacy storage too few": (LEGACY + LEGACY_TENSOR + pickle.dumps([], 2), "0 of 1 storages"),
    "a legacy storage cut off": (LEGACY + LEGACY_TENSOR + pickle.dumps(["0"], 2) + LEGACY_ARRAY[:-1], "not whole"),
    "a large legacy storage": (
        LEGACY + a_tensor(2**50) + pickle.dumps(["0"], 2) + struct.pack("<q", 2**50), "not whole",
    ),
    "another magic number": (pickle.dumps(1, 2) + LEGACY, "not written by torch.save"),
    "not a pickle": (b"weights" * 100, "not written by torch.save"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html>Sign in</html>", "an HTML page"),
}  # fmt: skip


def test_the_files_below_are_fine_but_for_what_is_wrong_with_them(tmp_path):
    for content in (archive_of(a_tensor()), LEGACY + LEGACY_TENSOR + pickle.dumps(["0"], 2) + LEGACY_ARRAY):
        (tmp_path / "x.bin").write_bytes(content)
        assert_as_pytorch_reads(tmp_path / "x.bin")


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file(run_gsa, tmp_path, monkeypatch, kind):
    content, words = HOSTILE[kind]
    source = write_folder(tmp_path / "source")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    before, modules = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, set(sys.modules)
    outcome = run_gsa("convert", source, tmp_path / "out")
    outcome.assert_refused(source / "pytorch_model.bin", words)
    assert len(outcome.err) < 600 and outcome.err[:-1].isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    assert os.listdir(tmp_path) == ["source"] and "antigravity" not in set(sys.modules) - modules


# A damaged byte may be the opcode of strings that are escaped as in Python's source.
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "legacy"])
def test_damage_anywhere_is_a_line_or_harmless(tmp_path, archive):
    """Bytes changed, lost and added: a file is read, or refused as bad input; no other error gets out."""
    torch.save(OrderedDict(list(all_kinds().items())[:3]), tmp_path / "x.bin", _use_new_zipfile_serialization=archive)
    good, drawn, refused = (tmp_path / "x.bin").read_bytes(), random.Random(0), 0
    for _ in range(600):
        damaged = bytearray(good)
        for _ in range(drawn.choice([1, 1, 3, 30])):
            if len(damaged) < 100:
                break
            # Half of the damage is done to the pickle, which stands in front.
            place = drawn.randrange(len(damaged) if drawn.random() < 0.5 else min(len(damaged), 900))
            how = drawn.randrange(4)
            if how == 0:
                damaged[place] = drawn.randrange(256)
            elif how == 1:
                del damaged[place : place + drawn.randrange(1, 9)]
            elif how == 2:
                damaged[place:place] = drawn.randbytes(drawn.randrange(1, 9))
            elif drawn.random() < 0.05:
                del damaged[max(place, 10) :]
        (tmp_path / "x.bin").write_bytes(damaged)
        try:
            opened = open_torch_file(tmp_path / "x.bin")
            for tensor in opened.tensors:
                opened.read(tensor)
        except InputError as error:
            assert str(tmp_path / "x.bin") in str(error)
            refused += 1
    assert 200 < refused < 600


def test_a_key_of_many_levels_would_crash_pythons_own_unpickler():
    """Why there is a machine of our own."""
    code = "import pickle, io, sys; pickle.Unpickler(io.BytesIO(sys.stdin.buffer.read())).load()"
    done = subprocess.run([sys.executable, "-c", code], input=pickled(b"}", nested(10**6), b"Ns"), capture_output=True)
    assert done.returncode < 0
