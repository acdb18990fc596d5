"""What is known of a Hugging Face folder, or of a hub's repository, before its weights are opened.

May be changed here: which files are read, and what is refused at first sight.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from gsa_jax.checkpoint import WEIGHTS_FOLDER
from gsa_jax.config import CONFIG_FILE, GPTNeoConfig, read_config
from gsa_jax.errors import InputError, listed
from gsa_jax.files import refuse_foreign
from gsa_jax.json_files import read_json
from gsa_jax.stand_ins import stand_in

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weights, whole or as an index of their shards, in the order in which they are looked for."""

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".ot", ".gguf", ".onnx")
"""How files end that are not read, and are named where there are no weights that are."""

_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
"""How those of them begin that trainers leave beside the weights."""


def check_config(folder: Path) -> GPTNeoConfig:
    """The configuration of a Hugging Face folder.

    Raises:
        InputError: it cannot be used, or this is an adapter for another model.
    """
    refuse_adapter(folder, {name for name in _ADAPTER_FILES if (folder / name).exists()})
    refuse_foreign(folder, [CONFIG_FILE])
    if (folder / CONFIG_FILE).is_file():
        refuse_stand_in(folder / CONFIG_FILE)
    return read_config(folder / CONFIG_FILE)


def refuse_stand_in(file: Path) -> None:
    """Raises `InputError` if a file cannot be read, or is what stands in for files that were not fetched."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    if (phrase := stand_in(head)) is not None:
        raise InputError(f"{file}: {phrase}")


def refuse_adapter(where: object, names: Collection[str]) -> None:
    """Raises `InputError` if there is an adapter among the files of a folder or repository."""
    adapter = next((name for name in _ADAPTER_FILES if name in names), None)
    if adapter is not None:
        raise InputError(
            f"{where}: holds an adapter ({adapter}), not a model; merge it into its model first (PEFT: "
            "merge_and_unload, then save_pretrained), then convert the result"
        )


def holds_checkpoint(names: Collection[str]) -> bool:
    """Whether a folder or repository with these files and folders at its top is a checkpoint of this package."""
    return WEIGHTS_FOLDER in names and not set(_WEIGHT_FILES) & set(names)


def refuse_checkpoint(where: object, names: Collection[str], remedy: str = "use it as it is") -> None:
    """Raises `InputError` if a folder or repository is a checkpoint of this package, which nothing is to be made of."""
    if holds_checkpoint(names):
        raise InputError(f"{where}: is a gsa-jax checkpoint already; {remedy}")


def weight_file(where: object, names: Collection[str]) -> str:
    """Which file of a folder or repository is read for its weights, or as the index of their shards.

    Raises:
        InputError: there is none.
    """
    for name in _WEIGHT_FILES:
        if name in names:
            return name
    if "zero_to_fp32.py" in names:
        raise InputError(
            f"{where}: holds parts that DeepSpeed saved; make them one first, there: python zero_to_fp32.py . "
            "pytorch_model.bin"
        )
    others = [name for name in sorted(names) if name.endswith(_OTHER_WEIGHTS) and not name.startswith(_NO_WEIGHTS)]
    found = (
        f", only {listed(others)}; a state dict of torch.save is read if it is named pytorch_model.bin"
        if others
        else ""
    )
    raise InputError(
        f"{where}: no weights in it (model.safetensors or pytorch_model.bin, whole or with an index){found}"
    )


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that its weights are read from, and their index if there is one.

    Raises:
        InputError: there are none, or some are missing.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    file = folder / weight_file(folder, names)
    if file.suffix != ".json":
        return [file]
    refuse_foreign(folder, [file.name])
    refuse_stand_in(file)
    shards = shard_names(file)
    missing = [name for name in shards if name not in names]
    if missing:
        raise InputError(f"{file}: shards are missing: {listed(missing)}")
    return [*(folder / name for name in shards), file]


def shard_names(index: Path) -> list[str]:
    """Names of the files that an index of shards lists, all of them beside it."""
    try:
        weight_map: dict[str, Any] = read_json(index)["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: not an index of shards (no weight_map in it)") from None
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InputError(f"{index}: names shards that do not stand beside it: {listed(outside)}")
    return names
