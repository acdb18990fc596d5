"""Checkpoint folder -> Hugging Face folder.

May be changed here: what an export holds. Names are the business of `gsa_jax.convert.names`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gsa_jax.checkpoint import REPORT_FILE, copy_files, load_tensors
from gsa_jax.config import CONFIG_FILE, carried_fields, read_config_values
from gsa_jax.convert import pytorch
from gsa_jax.convert.donors import LAYOUTS
from gsa_jax.convert.names import EXPORT_LEAVES, export_names
from gsa_jax.convert.splat_folder import write_splats
from gsa_jax.errors import InputError
from gsa_jax.files import new_folder
from gsa_jax.json_files import read_json
from gsa_jax.tokenizer_folder import tokenizer_files


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        tensors: how many.
        bytes: of the tensors.
        dialect: of the splats' names: `"plain"` for those that they have here, `"none"` without splats.
        holds: `"model with splats"`, `"exact model"` or `"splats"`.
    """

    tensors: int
    bytes: int
    dialect: str
    holds: str


def export(checkpoint: str | Path, out: str | Path, *, exact: bool = False, splats_only: bool = False) -> ExportReport:
    """Writes a folder that `transformers` 4 and 5 load, every tensor bit for bit; all or nothing.

    A model with splats goes with its code, `gsa_jax.convert.pytorch`, and `AutoModelForCausalLM` computes through the
    splats if it is given `trust_remote_code=True`; otherwise it refuses to load, as GPT-Neo's own classes do. That code
    names tensors as we do, whatever the donor.

    Args:
        exact: write a plain model, as the donor's (GPT-Neo or GPT-2) is stored. Splats go along, under the names of the
            dialect that they were imported from, or `gsa_splat_centers` and `gsa_splat_log_scales`; `transformers`
            reports them as unused.
        splats_only: write the splats alone, for `gsa_jax.convert.convert(splats=out)` to put beside the model again.

    Raises:
        InputError: the checkpoint cannot be read, the output cannot be written, or both options are given.
    """
    if exact and splats_only:
        raise InputError("an exact model and splats alone are two exports; give --exact or --splats-only")
    checkpoint, out = Path(checkpoint), Path(out)
    config, tensors = load_tensors(checkpoint)
    if splats_only:
        splats = write_splats(out, config, tensors)
        return ExportReport(len(splats), sum(tensor.nbytes for tensor in splats.values()), "plain", "splats")
    through_splats = config.splats is not None and not exact
    if through_splats:
        dialect, exported, values = "plain", tensors, config.to_hf_with_splats()
        values["auto_map"] = pytorch.AUTO_MAP
        code = [Path(pytorch.__file__).parent / name for name in pytorch.CODE_FILES]
    else:
        dialect, code = _dialect(checkpoint), []
        names, values = export_names(list(tensors), dialect), config.to_hf()
        exported = LAYOUTS[config.donor].write({names[name]: tensor for name, tensor in tensors.items()})
        dialect = "none" if config.splats is None else "gsa" if dialect == "plain" else dialect
    total = sum(tensor.nbytes for tensor in tensors.values())
    dtypes = [str(tensor.dtype) for tensor in tensors.values()]
    # transformers 4 reads `torch_dtype`, 5 prefers `dtype` and still knows the old name.
    carried = carried_fields(read_config_values(checkpoint / CONFIG_FILE))
    values = carried | values | {"torch_dtype": max(set(dtypes), key=dtypes.count)}
    with new_folder(out, needed_bytes=total) as staging:
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in exported.items()}
        save_file(contiguous, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "model.safetensors").chmod(0o644)  # the writer makes it private
        copy_files([*tokenizer_files(checkpoint), *code], staging)
        (staging / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return ExportReport(len(exported), total, dialect, "model with splats" if through_splats else "exact model")


def _dialect(checkpoint: Path) -> str:
    file = checkpoint / REPORT_FILE
    try:
        dialect = read_json(file)["dialect"]
    except FileNotFoundError:
        return "plain"  # a checkpoint that did not come out of a conversion
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{file}: damaged ({error})") from None
    if dialect not in ("plain", *EXPORT_LEAVES):
        raise InputError(f"{file}: damaged (dialect = {dialect!r})")
    return dialect
