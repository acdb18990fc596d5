"""Where a model folder comes from: this machine, or a hub.

May be changed here: which files of a repository are downloaded, and in which order. Downloads, tokens and the cache are
`huggingface_hub`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gsa_jax.checkpoint import is_hub_id
from gsa_jax.errors import InputError, first_line


def find_folder(
    source: str,
    check: Callable[[Path], object],
    weight_stems: Sequence[str],
    *,
    revision: str | None,
    subfolder: str | None,
) -> Path:
    folder = Path(source)
    if folder.is_dir():
        if subfolder is not None:
            folder = folder / subfolder
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        if revision is not None:
            raise InputError(f"{source}: is a folder of this machine, which has no revisions; leave --revision out")
        return folder
    if folder.exists():
        raise InputError(f"{source}: is a file; give the folder that holds config.json and the weights")
    if not is_hub_id(source):
        raise InputError(f"{source}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.txt"]))
    except Exception as error:  # the hub's client lets errors of its HTTP library through, another one in each version
        raise InputError(f"{source}: no such folder, and not to be had from the hub ({first_line(error)})") from error
