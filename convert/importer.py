"""PyTorch folder -> checkpoint folder.

May be changed here: the order of steps, what is checked on each tensor, and what the report says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from gsa_jax.attention import init_splats
from gsa_jax.checkpoint import CARRIED_FILE, REPORT_FILE, save
from gsa_jax.config import CONFIG_FILE, DTYPES, GPTNeoConfig, carried_fields
from gsa_jax.convert.folder import refuse_stand_in
from gsa_jax.convert.names import Plan, plan
from gsa_jax.convert.reader import Source, SourceTensor, open_source
from gsa_jax.convert.splat_folder import read_splats
from gsa_jax.errors import InputError, listed
from gsa_jax.files import refuse_existing, refuse_full_disk
from gsa_jax.generation_config import GENERATION_CONFIG_FILE
from gsa_jax.parameters import TOKEN_EMBEDDING, attention_tensor, is_splat
from gsa_jax.progress import Progress
from gsa_jax.sharding import require_backend
from gsa_jax.splat_config import SplatConfig
from gsa_jax.tokenizer_folder import has_tokenizer, load_tokenizer, tokenizer_files


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: as the user named it.
        hub_id: `owner/name`, if it came from a hub.
        dialect: of the source's splat names, `"plain"` if it has none.
        tensors: in the checkpoint, splats included.
        parameters: in the checkpoint.
        bytes: of the checkpoint's tensors.
        dtypes: of the checkpoint's tensors -> how many.
        splats: `"imported"`, `"attached"` or `"none"`.
        splat_parameters: how many parameters the splats have.
        tokenizer: files copied.
        ignored: name in the source -> why it was left behind.
        containers: a phrase for each file whose state dict was taken out of another dict.
        wrappers: parts that were left out of the names of tensors.
        left_behind: files beside the weights that a checkpoint has no use for.
        warnings: what is odd about the configuration, and did not matter here.
    """

    source: str
    hub_id: str | None
    dialect: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    splats: str
    splat_parameters: int
    tokenizer: list[str]
    ignored: dict[str, str]
    containers: list[str]
    wrappers: list[str]
    left_behind: list[str]
    warnings: list[str]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    splats: SplatConfig | str | Path | None = None,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
    tokenizer: Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    progress: Progress = iter,
) -> ConversionReport:
    """Converts a PyTorch GPT-Neo or GPT-2 into a checkpoint folder; all or nothing.

    Tensors are read one by one; memory peaks at the output plus the largest tensor.

    Args:
        source: a Hugging Face folder, or a hub id.
        out: the checkpoint folder to make; must not exist.
        splats: to attach to a source that has none: a configuration, with which they start at random (seed 0), for
            `gsa_jax.fitting.fit_init` to place them later; or a folder of splats that were trained for this model.
        dtype: of the parameters; as the source stores them if None.
        allow_nonfinite: accept NaN and infinite weights.
        tokenizer: a folder whose tokenizer goes with a source that has none.
        revision: of a hub's repository: a branch, a tag or a commit.
        subfolder: of the folder or repository, that holds the model.
        progress: wraps the names of the tensors while they are read.

    Raises:
        InputError: the source cannot be used, or the output cannot be written. Nothing is left behind.
    """
    out = Path(out)
    refuse_existing(out)
    conversion = open_conversion(
        open_source(source, revision=revision, subfolder=subfolder),
        splats=splats,
        dtype=dtype,
        allow_nonfinite=allow_nonfinite,
        tokenizer=tokenizer,
    )
    refuse_full_disk(out, conversion.source_bytes)
    tensors = conversion.read(progress)
    report = conversion.report(str(source), tensors)
    save(out, conversion.config, tensors, copied=conversion.copied, reports=conversion.reports(report))
    return report


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A source whose tensors have not been read, but are known to be those of a model.

    Attributes:
        config: of the model, with the splats that the source carries or that are attached to it.
        copied: files that go with the weights.
        opened: the source.
        planned: which of its tensors is which parameter.
        attached: parameters that do not come from it.
        dtype: that parameters are converted to; as they are stored if None.
        allow_nonfinite: whether weights may be NaN or infinite.
    """

    config: GPTNeoConfig
    copied: list[Path]
    opened: Source
    planned: Plan
    attached: dict[str, np.ndarray]
    dtype: str | None
    allow_nonfinite: bool

    @property
    def source_bytes(self) -> int:
        """Of the tensors that come from the source, in the dtype that they are converted to."""
        stored = [self.opened.tensors[name] for name in _tensors_used(self.planned)]
        return sum(tensor.size * jnp.dtype(self.dtype or tensor.dtype).itemsize for tensor in stored)

    def read(self, progress: Progress = iter) -> dict[str, np.ndarray]:
        """The parameters of the model by their names, read one by one.

        Raises:
            InputError: a file is damaged, weights are not finite, or the head is not tied to the embedding.
        """
        read = _read(self.opened, self.planned, self.dtype, self.allow_nonfinite, progress)
        return dict(read) | self.attached

    def report(self, source: str, tensors: dict[str, np.ndarray]) -> ConversionReport:
        """What there is to say of it.

        Args:
            source: as the user named it.
            tensors: that `read` gave.
        """
        return _report(source, self.opened, self.planned, tensors, self.attached, self.copied)

    def reports(self, report: ConversionReport) -> dict[str, dict[str, Any]]:
        """Files that are written beside the weights: this report, and fields that the model has no use for."""
        carried = carried_fields(self.opened.values)
        return {REPORT_FILE: dataclasses.asdict(report)} | ({CARRIED_FILE: carried} if carried else {})


def open_conversion(
    opened: Source,
    *,
    splats: SplatConfig | str | Path | None = None,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
    tokenizer: Path | None = None,
) -> Conversion:
    """Finds out which tensor of a source is which parameter; the arguments are those of `convert`.

    Raises:
        InputError: the source is not of a donor, or does not go with what is to be added to it.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    require_backend()
    copied = _copied_files(opened.folder, tokenizer, opened.config)
    try:
        planned = plan_source(opened)
    except InputError as error:
        files = {tensor.file for tensor in opened.tensors.values()}
        raise InputError(f"{files.pop() if len(files) == 1 else opened.folder}: {error}") from None
    _check_dtypes(opened, planned)
    config, attached = _attach(planned.config, splats, dtype or _common_dtype(opened, planned))
    return Conversion(config, copied, opened, planned, attached, dtype, allow_nonfinite)


def plan_source(source: Source) -> Plan:
    """`plan` of an opened folder; raises as it does."""
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    return plan(source.config, source.model_type, shapes)


def _tensors_used(planned: Plan) -> list[str]:
    """Names in the source of the tensors that parameters lie in."""
    return list(dict.fromkeys(piece.tensor for piece in planned.sources.values()))


def read_tensors(source: Source, planned: Plan) -> dict[str, np.ndarray]:
    """Every parameter that the source provides, by our name, in the dtype it is stored in."""
    return dict(_read(source, planned, None, True, iter))


def _read(
    opened: Source, planned: Plan, dtype: str | None, allow_nonfinite: bool, progress: Progress
) -> Iterator[tuple[str, np.ndarray]]:
    nonfinite: list[str] = []
    read: np.ndarray | None = None  # the tensor that several parameters lie in, until the last one
    for name in progress(list(planned.sources)):
        piece = planned.sources[name]
        source_name = piece.tensor
        tensor = opened.tensors[source_name]
        if read is None:
            read = tensor.read()
        array = piece.of(read)
        if planned.tied_head is not None and name == TOKEN_EMBEDDING:
            _check_tied(tensor, opened.tensors[planned.tied_head], array, planned.tied_head)
        if source_name in planned.softmaxed:
            logs = array.astype(np.float32)
            array = (logs - np.asarray(scipy.special.logsumexp(logs, axis=-1, keepdims=True))).astype(array.dtype)
        if dtype is not None:
            with np.errstate(over="ignore"):
                array = array.astype(jnp.dtype(dtype))
        if not allow_nonfinite and not np.isfinite(array).all():
            nonfinite.append(f"{tensor.file.name}: {source_name} {list(tensor.shape)}")
        if piece.number + 1 == piece.count:
            read = None
        yield name, array
    if nonfinite:
        narrowed = f" (after narrowing to {dtype})" if dtype is not None else ""
        raise InputError(
            f"{opened.folder}: {len(nonfinite)} tensors hold NaN or infinite weights{narrowed}: {listed(nonfinite)}; "
            "pass --allow-nonfinite to convert them all the same"
        )


def _check_tied(embedding: SourceTensor, head: SourceTensor, array: np.ndarray, head_name: str) -> None:
    if head.shape != embedding.shape or not np.array_equal(head.read(), array, equal_nan=True):
        raise InputError(
            f"{head.file}: {head_name} {list(head.shape)} differs from the token embedding {list(embedding.shape)}; "
            "a model with an output head of its own is not supported"
        )


def _copied_files(folder: Path, tokenizer: Path | None, config: GPTNeoConfig) -> list[Path]:
    """The files that go with the weights, the tokenizer's own or from another folder."""
    files = tokenizer_files(folder)
    if tokenizer is not None:
        if has_tokenizer(folder):
            raise InputError(f"{folder}: has a tokenizer; leave --tokenizer out")
        size = len(load_tokenizer(tokenizer))
        if size > config.vocab_size:
            raise InputError(
                f"{tokenizer}: its tokenizer has {size} tokens, the model {config.vocab_size}; give its own"
            )
        own = {file.name for file in files}
        not_its = {*own, GENERATION_CONFIG_FILE}
        files += [file for file in tokenizer_files(tokenizer) if file.name not in not_its]
    for file in files:
        if file.is_file():
            refuse_stand_in(file)
    return files


def _check_dtypes(opened: Source, planned: Plan) -> None:
    odd = [
        f"{name} is {opened.tensors[name].dtype}"
        for name in _tensors_used(planned)
        if opened.tensors[name].dtype not in DTYPES
    ]
    if odd:
        raise InputError(
            f"{opened.folder}: {len(odd)} tensors are none of {', '.join(DTYPES)}: {listed(odd)}; "
            "save the model in one of these first, such as model.float().save_pretrained(NEW)"
        )


def _common_dtype(opened: Source, planned: Plan) -> str:
    """The dtype that most parameters have, for the splats that are added to them."""
    dtypes = [opened.tensors[piece.tensor].dtype for piece in planned.sources.values()]
    return max(DTYPES, key=dtypes.count)


def _attach(
    config: GPTNeoConfig, splats: SplatConfig | str | Path | None, dtype: str
) -> tuple[GPTNeoConfig, dict[str, np.ndarray]]:
    """Adds splats to a configuration without any: the configuration, and the parameters it gained."""
    if splats is None:
        return config, {}
    if config.splats is not None:
        raise InputError(
            f"the source carries {config.splats.num_splats} splats per head already, no others can be attached; "
            "leave the options of splats out to import its own"
        )
    if isinstance(splats, str | Path):
        splats, trained = read_splats(Path(splats), config)
        return dataclasses.replace(config, splats=splats), trained
    if not splats.has_splats:
        raise InputError("num_splats = 0: attach one splat at least, or leave the option out")
    config = dataclasses.replace(config, splats=splats)
    tensors = {}
    for layer in config.splat_layers:
        new = init_splats(jax.random.fold_in(jax.random.key(0), layer), config, layer, jnp.dtype(dtype))
        for name, tensor in new.items():
            tensors[attention_tensor(layer, name)] = np.asarray(tensor)
    return config, tensors


def _report(
    source: str,
    opened: Source,
    planned: Plan,
    tensors: dict[str, np.ndarray],
    attached: dict[str, np.ndarray],
    copied: list[Path],
) -> ConversionReport:
    used = {CONFIG_FILE, *(file.name for file in (*opened.files, *copied))}
    dtypes = [str(tensor.dtype) for tensor in tensors.values()]
    return ConversionReport(
        source=source,
        hub_id=opened.hub_id,
        dialect=planned.dialect,
        tensors=len(tensors),
        parameters=sum(tensor.size for tensor in tensors.values()),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtypes={dtype: dtypes.count(dtype) for dtype in sorted(set(dtypes))},
        splats="attached" if attached else "imported" if planned.config.splats is not None else "none",
        splat_parameters=sum(tensor.size for name, tensor in tensors.items() if is_splat(name)),
        tokenizer=[file.name for file in copied],
        ignored=planned.ignored,
        containers=list(opened.containers),
        wrappers=list(planned.wrappers),
        left_behind=sorted(
            file.name + "/" * file.is_dir()
            for file in opened.folder.iterdir()
            if file.name not in used and not file.name.startswith(".")
        ),
        warnings=planned.config.beyond_vocabulary,
    )
