"""A model in one line, from wherever it is; and one in memory as a folder.

May be changed here: what a model comes with, and what is kept of its source when it is saved. How folders are read is
`gsa_jax.checkpoint` and `gsa_jax.convert`; what a hub is given is `gsa_jax.publishing`.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from gsa_jax.checkpoint import load_tensors, model_of, save, travelling_files
from gsa_jax.convert.folder import holds_checkpoint
from gsa_jax.convert.hub import find_folder
from gsa_jax.convert.importer import open_conversion
from gsa_jax.convert.reader import open_folder
from gsa_jax.files import refuse_existing
from gsa_jax.generation_config import GENERATION_CONFIG_FILE, GenerationConfig
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.parameters import named_parameters
from gsa_jax.splat_config import Window
from gsa_jax.tokenizer_folder import TOKENIZER_FILES, load_tokenizer, tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model and its tokenizer: `model, tokenizer = from_pretrained(...)`, or by their names.

    Attributes:
        model: the model; changed in place where it is trained.
        folder: it was read from, on this machine; in the hub's cache if it came from a hub.
        files: that go with the weights when it is saved, such as the tokenizer's.
        reports: files that go with them and are not in the folder, by their names: what a conversion has to say.
    """

    model: GPTNeoForCausalLM
    folder: Path
    files: tuple[Path, ...]
    reports: Mapping[str, Mapping[str, Any]]

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of `transformers`, as `load_tokenizer` gives it; read when it is first asked for.

        Importing `transformers` takes seconds. `gsa_jax.open_tokenizer(self.folder)` does without where it can.

        Raises:
            InputError: the folder has none, or it cannot be read.
        """
        return load_tokenizer(self.folder)

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.tokenizer


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    window: Window | None = None,
    kept: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike | None = None,
    remat: bool = False,
    attention_implementation: str = "auto",
) -> Pretrained:
    """A model and its tokenizer, from a checkpoint folder, a Hugging Face folder or a hub.

    What is in Hugging Face's format is converted in memory, as `gsa convert` does it; nothing is written but the hub's
    own cache. A model without a tokenizer loads: what raises is asking for the tokenizer, as unpacking does, so take
    `from_pretrained(...).model`.

    Args:
        source: a folder, of this package or of Hugging Face, or else a hub id (`owner/name`) of either.
        revision: of the hub's repository: a branch, a tag or a commit.
        subfolder: of the folder or repository, that holds the model.
        window, kept, dtype, param_dtype, remat, attention_implementation: as in `gsa_jax.load`. As there, parameters
            have the dtype that they are stored in unless `param_dtype` says otherwise; `dtype` is the computation's.

    Raises:
        InputError: there is no such model, it is of no donor, is damaged or has weights that are not finite; it has
            no splats and the window is finite; or its `generation_config.json` cannot be used.
    """
    found = find_folder(str(source), revision=revision, subfolder=subfolder, checkpoints=True)
    if holds_checkpoint({path.name for path in found.path.iterdir()}):
        config, tensors = load_tensors(found.path)
        files, reports = travelling_files(found.path), {}
    else:
        conversion = open_conversion(open_folder(found))
        config, tensors = conversion.config, conversion.read()
        files, reports = conversion.copied, conversion.reports(conversion.report(str(source), tensors))
    model = model_of(
        found.path,
        config,
        tensors,
        window=window,
        kept=kept,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
        attention_implementation=attention_implementation,
    )
    return Pretrained(model, found.path, tuple(files), reports)


@runtime_checkable
class SavedTokenizer(Protocol):
    """A tokenizer that can write its files into a folder, as those of `transformers` can."""

    def save_pretrained(self, save_directory: str) -> Any: ...


def save_pretrained(
    model: Pretrained | GPTNeoForCausalLM, folder: str | Path, *, tokenizer: SavedTokenizer | None = None
) -> None:
    """Writes a checkpoint folder, as `gsa convert` does and every command reads it; all or nothing.

    Parameters are written in the dtypes that they have, splats with the window that the model has, and
    `generation_config.json` as `model.generation_config` is. On a mesh, each process calls this.

    Args:
        model: what `from_pretrained` gave, whose tokenizer and report of conversion go along; or a model alone.
        folder: to make; must not exist.
        tokenizer: to write beside it, instead of the one that it came with.

    Raises:
        InputError: the folder exists or cannot be written, or the disk is full.
    """
    folder = Path(folder)
    refuse_existing(folder)
    files, reports = (model.files, dict(model.reports)) if isinstance(model, Pretrained) else ((), {})
    files = [file for file in files if file.name != GENERATION_CONFIG_FILE]
    if isinstance(model, Pretrained):
        model = model.model
    if model.generation_config != GenerationConfig.of_model(model.config):
        reports[GENERATION_CONFIG_FILE] = model.generation_config.to_hf()
    with tempfile.TemporaryDirectory() as written:
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
            files = [file for file in files if file.name not in TOKENIZER_FILES]
            files += tokenizer_files(Path(written))
        save(folder, model.config, named_parameters(model), copied=files, reports=reports)
