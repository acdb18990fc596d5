"""What is fuzzed: for each reader, a valid small input, and the call that reads it.

May be changed here: which readers there are. `call` is what the package does with such an input, without writing
anything of its own.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pickle
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from gsa_jax.checkpoint import load, save
from gsa_jax.cli.generation import read_prompts
from gsa_jax.config import GPTNeoConfig
from gsa_jax.convert.donors import LAYOUTS
from gsa_jax.convert.exporter import export
from gsa_jax.convert.folder import check_config
from gsa_jax.convert.hub import find_folder
from gsa_jax.convert.importer import open_conversion
from gsa_jax.convert.reader import open_folder
from gsa_jax.convert.splat_folder import read_splats, write_splats
from gsa_jax.generation_config import read_generation_config
from gsa_jax.parameters import build_model, expected_shapes
from gsa_jax.pretrained import from_pretrained, save_pretrained
from gsa_jax.publishing import model_card
from gsa_jax.splat_config import SplatConfig
from gsa_jax.text_files import TextFiles, read_pieces
from gsa_jax.tokenizer_folder import open_tokenizer
from gsa_jax.train.checkpoints import RunCheckpoints
from gsa_jax.train.config import Finetune
from gsa_jax.train.data import read_tokens
from gsa_jax.train.metrics import read_metrics
from gsa_jax.train.plot import PLOT_FILE, plot_run
from gsa_jax.train.run_folder import open_run

SETTINGS = {
    "model_type": "gpt_neo", "vocab_size": 17, "max_position_embeddings": 8, "hidden_size": 4, "num_layers": 1,
    "num_heads": 2, "attention_types": [[["global"], 1]], "window_size": 4, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CONFIG = GPTNeoConfig.from_hf(SETTINGS)
GPT2 = GPTNeoConfig.from_hf(
    {"model_type": "gpt2", "vocab_size": 17, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2}
)
SPLATS = dataclasses.replace(CONFIG, splats=SplatConfig(num_splats=2, window=2, kept=1, norm_gain=True))
TEXTS = ("Once upon a time\n", "there was a café.\n", "The end")
VOCABULARY = ["<|endoftext|>", *"abcdehinopt", "Ġ", "th", "in", "on", "an"]


def weights(config: GPTNeoConfig) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape, np.float32) for name, shape in expected_shapes(config).items()}


def _config(folder: Path, config: GPTNeoConfig = CONFIG) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")


def _safetensors(folder: Path) -> None:
    _config(folder)
    save_file(weights(CONFIG), folder / "model.safetensors")


def _gpt2(folder: Path) -> None:
    _config(folder, GPT2)
    save_file(LAYOUTS["gpt2"].write(weights(GPT2)), folder / "model.safetensors")


def _sharded(folder: Path) -> None:
    _config(folder)
    tensors, where = weights(CONFIG), {}
    for number in range(2):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[number::2])
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


class Named:
    """Pickled as the name of something, which need not exist here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _Pickler(pickle._Pickler):  # the one in Python, which can be taught names that do not exist
    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_named(self, named: Named) -> None:
        self.write(b"c" + named.module.encode() + b"\n" + named.name.encode() + b"\n")

    dispatch[Named] = save_named

    def persistent_id(self, obj: object) -> object:
        return obj.described if isinstance(obj, _Stored) else None


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored:
    described: tuple


class _Called:
    """Pickled as a call."""

    def __init__(self, named: Named, *arguments: object) -> None:
        self.parts = (named, arguments)

    def __reduce__(self) -> tuple:
        raise AssertionError("saved by save_called")


def _save_called(pickler: _Pickler, called: _Called) -> None:
    named, arguments = called.parts
    pickler.save(named)
    pickler.save(arguments)
    pickler.write(pickle.REDUCE)


_Pickler.dispatch[_Called] = _save_called


def pickled(content: object) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(content)
    return stream.getvalue()


def state_dict(tensors: dict[str, np.ndarray]) -> dict[str, object]:
    """What `torch.save` pickles of a state dict."""
    described = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        storage = _Stored(("storage", Named("torch", "FloatStorage"), str(number), "cpu", tensor.size))
        strides = tuple(stride // 4 for stride in tensor.strides)
        hooks = _Called(Named("collections", "OrderedDict"))
        rebuild = Named("torch._utils", "_rebuild_tensor_v2")
        described[name] = _Called(rebuild, storage, 0, tensor.shape, strides, False, hooks)
    return described


def archive(pickle_: bytes, tensors: dict[str, np.ndarray], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as PyTorch 1.6 and later write it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as records:
        records.writestr("archive/data.pkl", pickle_)
        records.writestr("archive/byteorder", b"little")
        for number, tensor in enumerate(tensors.values()):
            records.writestr(f"archive/data/{number}", tensor.tobytes())
        records.writestr("archive/version", b"3\n")
    return stream.getvalue()


def legacy(pickle_: bytes, tensors: dict[str, np.ndarray]) -> bytes:
    """A file as PyTorch before 1.6 wrote it."""
    begin = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    parts = [*(pickle.dumps(part, 2) for part in begin), pickle_]
    parts.append(pickle.dumps([str(number) for number in range(len(tensors))], 2))
    parts += [struct.pack("<Q", tensor.size) + tensor.tobytes() for tensor in tensors.values()]
    return b"".join(parts)


def _archive(folder: Path) -> None:
    _config(folder)
    tensors = weights(CONFIG)
    (folder / "pytorch_model.bin").write_bytes(archive(pickled(state_dict(tensors)), tensors))


def _trainer(folder: Path) -> None:
    """The state dict in what a trainer saves beside it, and its names behind that of a wrapper."""
    _config(folder)
    tensors = weights(CONFIG)
    wrapped = state_dict({f"module.{name}": tensor for name, tensor in tensors.items()})
    saved = {"epoch": 3, "model_state_dict": wrapped, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}
    (folder / "pytorch_model.bin").write_bytes(archive(pickled(saved), tensors))


def _legacy(folder: Path) -> None:
    _config(folder)
    tensors = weights(CONFIG)
    (folder / "pytorch_model.bin").write_bytes(legacy(pickled(state_dict(tensors)), tensors))


def _tokenizer(folder: Path) -> None:
    """Byte-level BPE of 17 tokens, for the light tokenizer."""
    end = {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False}
    end |= {"normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = ["t h", "i n", "o n", "a n"]
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    described = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None}
    described |= {"pre_tokenizer": level, "post_processor": level, "decoder": level}
    described |= {"model": model | {"vocab": vocabulary, "merges": merges}}
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "model_max_length": 8}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    special = {"bos_token": end | {"__type": "AddedToken"}, "eos_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "added_tokens.json").write_text('{"<|endoftext|>": 0}', encoding="utf-8")


def _old_tokenizer(folder: Path) -> None:
    """The same as two files, which only transformers reads."""
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\ni n\no n\na n\n", encoding="utf-8")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "model_max_length": 8}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    # Of a fast tokenizer, transformers asks which file of several versions it is to read.
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()), encoding="utf-8")


def _checkpoint(folder: Path) -> None:
    shutil.rmtree(folder)
    save(folder, SPLATS, weights(SPLATS), copied=())
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 5, "temperature": 0.5}')


def _generation_config(folder: Path) -> None:
    values = {"do_sample": True, "top_k": 5, "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "eos_token_id": [0, 3]}
    values |= {"pad_token_id": 1, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "max_new_tokens": 4}
    values |= {"num_beams": 4, "bad_words_ids": [[1, 2]], "transformers_version": "4.57.6"}
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")


def _reports(folder: Path) -> None:
    """A checkpoint as commands leave it, with the reports that go along with it and into its card."""
    shutil.rmtree(folder)
    estimate = {"value": 2.5, "interval": [2.25, 2.75]}
    splats = dataclasses.asdict(SPLATS.splats)
    arms = [{"name": "splats", "perplexity": estimate, "perplexity_ratio": {"value": 1.0, "interval": None}}]
    scored = {"splats": splats, "layers": [0], "arms": arms, "documents": 3, "tokens": 30, "text": "a.txt, b.txt"}
    scored |= {"context": 8, "state_bytes": 128, "gap_closed": estimate}
    compared = {"oracle": "PyTorch", "inputs": "random", "tokens": 9, "relative_rms": 1e-7, "tolerance": 1e-4}
    compared |= {"top1_agreement": 1.0, "loss": 2.5, "oracle_loss": 2.5, "agrees": True}
    reports = {
        "conversion.json": {"source": "a", "hub_id": "owner/name", "dialect": "plain"},
        "config.carried.json": {"task_specific_params": {"text-generation": {"top_k": 5}}},
        "fit_init.json": {"tokens": 10, "text": "a.txt", "seed": 0},
        "verify.json": {"comparisons": [compared]},
        "eval.json": scored,
    }
    save(folder, SPLATS, weights(SPLATS), copied=(), reports=reports)


def _splat_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    write_splats(folder, SPLATS, weights(SPLATS))


def _run_settings(folder: Path) -> Finetune:
    return Finetune(checkpoint=Path("checkpoint"), out=folder, text=Path("text"), steps=3)


def _run(folder: Path) -> None:
    resolved, _ = open_run(_run_settings(folder), SPLATS, {"text": "0", "checkpoint": "1"})
    scored = {"step": 2, "kind": "eval", "tokens": 9, "perplexity_ratio/exact": 1.0, "perplexity_ratio/splats": 1.25}
    records = [{"step": 1, "kind": "train", "loss": 2.5}, {"step": 2, "kind": "train", "loss": 2.25}, scored]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with RunCheckpoints(folder / "steps", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": {"w": jnp.arange(6.0)}}, {"batch": step}, resolved)


def _text(folder: Path) -> None:
    (folder / "text.txt").write_text("<|endoftext|>".join(TEXTS), encoding="utf-8")


def _gzip(folder: Path) -> None:
    (folder / "text.txt.gz").write_bytes(gzip.compress("<|endoftext|>".join(TEXTS).encode(), mtime=0))
    lines = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def _json_lines(folder: Path) -> None:
    lines = [json.dumps({"text": text, "n": number}) for number, text in enumerate(TEXTS)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")


def _parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS, "n": [0, 1, 2]}), folder / "text.parquet")


def _prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    lines = [json.dumps({"prompt": text}) for text in TEXTS]
    (folder / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")


def _token_ids(folder: Path) -> None:
    np.arange(17, dtype="<u2").tofile(folder / "ids.bin")


def _read_config(folder: Path) -> None:
    expected_shapes(check_config(folder))


def _convert(folder: Path) -> None:
    conversion = open_conversion(open_folder(find_folder(str(folder))))
    tensors = conversion.read()
    conversion.reports(conversion.report(str(folder), tensors))
    build_model(conversion.config, tensors)


def _read_tokenizer(folder: Path) -> None:
    # What only some inputs need, and takes longer than an input may; the last one imports PyTorch where that is.
    from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedModel  # noqa: F401

    tokenizer = open_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("in the end")[:100])


def _read_generation_config(folder: Path) -> None:
    read = read_generation_config(folder, CONFIG)
    json.dumps(read.to_hf())


def _use_checkpoint(folder: Path) -> None:
    """What is made of a checkpoint lands beside it, inside of the folder that is watched."""
    made = folder / "made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    tempfile.tempdir = str(made)
    model_card(folder)
    save_pretrained(from_pretrained(folder), made / "saved")
    export(folder, made / "exported")
    export(folder, made / "exact", exact=True)


def _read_splats(folder: Path) -> None:
    read_splats(folder, CONFIG)


def _read_run(folder: Path) -> None:
    open_run(_run_settings(folder), SPLATS, {"text": "0", "checkpoint": "1"})
    read_metrics(folder)
    with RunCheckpoints(folder / "steps", keep=2) as checkpoints:
        checkpoints.restore({"params": {"w": jax.ShapeDtypeStruct((6,), jnp.float32)}})
    (folder / PLOT_FILE).unlink(missing_ok=True)
    plot_run(folder)


def _read_text(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        for longest in (None, 8):
            for _ in read_pieces(TextFiles((path,)), longest):
                pass


def _read_prompts(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        read_prompts(path)


def _read_token_ids(folder: Path) -> None:
    read_tokens(TextFiles((folder / "ids.bin",)), None, CONFIG)


@dataclasses.dataclass(frozen=True)
class Reader:
    """How an input is made, read, and how many in a thousand examples it gets.

    Attributes:
        owned: a folder is read; otherwise a file, which whoever names it may have linked or piped to.
    """

    make: Callable[[Path], None]
    call: Callable[[Path], object]
    share: int
    owned: bool = True


READERS = {
    "config": Reader(_config, _read_config, 90),
    "safetensors": Reader(_safetensors, _convert, 90),
    "gpt2": Reader(_gpt2, _convert, 60),
    "index": Reader(_sharded, _convert, 70),
    "archive": Reader(_archive, _convert, 110),
    "trainer": Reader(_trainer, _convert, 50),
    "legacy": Reader(_legacy, _convert, 80),
    "tokenizer": Reader(_tokenizer, _read_tokenizer, 90),
    "old-tokenizer": Reader(_old_tokenizer, _read_tokenizer, 30),
    "generation": Reader(_generation_config, _read_generation_config, 40),
    "checkpoint": Reader(_checkpoint, load, 50),
    "reports": Reader(_reports, _use_checkpoint, 30),
    "splats": Reader(_splat_folder, _read_splats, 50),
    "run": Reader(_run, _read_run, 30),
    "text": Reader(_text, _read_text, 30, owned=False),
    "gzip": Reader(_gzip, _read_text, 30, owned=False),
    "jsonl": Reader(_json_lines, _read_text, 30, owned=False),
    "parquet": Reader(_parquet, _read_text, 20, owned=False),
    "prompts": Reader(_prompts, _read_prompts, 10, owned=False),
    "ids": Reader(_token_ids, _read_token_ids, 10, owned=False),
}
assert sum(reader.share for reader in READERS.values()) == 1000
