"""Where a model folder comes from: this machine, or a hub.

May be changed here: which files of a repository are downloaded, and in which order. Downloads, tokens and the cache are
`huggingface_hub`'s.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import NamedTuple

from gsa_jax.checkpoint import OWN_FILES, WEIGHTS_FOLDER, is_hub_id
from gsa_jax.config import CONFIG_FILE
from gsa_jax.convert.folder import (
    check_config,
    holds_checkpoint,
    refuse_adapter,
    refuse_checkpoint,
    shard_names,
    weight_file,
)
from gsa_jax.errors import InputError, first_line, listed
from gsa_jax.tokenizer_folder import TOKENIZER_FILES


class FoundFolder(NamedTuple):
    """Where a model is on this machine, and the hub's repository (`owner/name`) that it came from, if it did."""

    path: Path
    hub_id: str | None


def find_folder(
    source: str, *, revision: str | None = None, subfolder: str | None = None, checkpoints: bool = False
) -> FoundFolder:
    """A local folder, or the local copy of a hub's repository (`owner/name`) with what a conversion needs of it.

    Weights are downloaded in one format, the one that would be read, and after the configuration was found usable. If
    the hub cannot be reached, what was downloaded before is taken.

    Args:
        revision: a branch, a tag or a commit of the repository.
        subfolder: of the folder or repository, that holds the model.
        checkpoints: a repository may also be a checkpoint of this package, and is then downloaded as a whole.

    Raises:
        InputError: there is no such folder or repository, or its list of files or its configuration cannot be used.
    """
    folder = Path(source)
    if os.path.isdir(folder):  # unlike Path.is_dir, False of a folder that may not be looked at
        if revision is not None:
            raise InputError(f"{source}: is a folder of this machine, which has no revisions; leave --revision out")
        folder = folder / (subfolder or "")
        if not os.path.isdir(folder):
            raise InputError(f"{folder}: no such folder")
        return FoundFolder(folder, None)
    if os.path.exists(folder):
        raise InputError(f"{source}: is a file; give the folder that holds config.json and the weights")
    if not is_hub_id(source):
        raise InputError(f"{source}: no such folder")
    inside = "/".join(part for part in (subfolder or "").split("/") if part)
    repository = _Repository(source, revision, f"{inside}/" if inside else "")
    return FoundFolder(repository.download(checkpoints), source)


class _Repository:
    def __init__(self, name: str, revision: str | None, prefix: str) -> None:
        self._name, self._revision, self._prefix = name, revision, prefix
        self._label = f"{name}{f'@{revision}' if revision else ''}{f'/{prefix[:-1]}' if prefix else ''}"

    def download(self, checkpoints: bool) -> Path:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = HfApi().model_info(self._name, revision=self._revision)
        except GatedRepoError:
            raise InputError(
                f"{self._name}: its owners grant access to it; ask on its page of the hub, then log in: hf auth login"
            ) from None
        except RevisionNotFoundError:
            raise InputError(f"{self._name}: the hub has no revision {self._revision!r} of it") from None
        except RepositoryNotFoundError:
            raise InputError(
                f"{self._name}: no such folder, and no such model on the hub; log in if it is private: hf auth login"
            ) from None
        except hub_errors() as error:
            return self._from_cache(error)
        paths = [sibling.rfilename for sibling in info.siblings or []]
        files = {path.removeprefix(self._prefix) for path in paths if path.startswith(self._prefix)}
        refuse_adapter(self._label, files)
        if CONFIG_FILE not in files:
            raise InputError(f"{self._label}: no {CONFIG_FILE} in it; a model needs one")
        top = {name.split("/")[0] for name in files}
        others = [name for name in TOKENIZER_FILES if name in files]
        others += [name for name in files if name.startswith("additional_chat_templates/")]
        if checkpoints and holds_checkpoint(top):
            weights = [name for name in files if name.startswith(f"{WEIGHTS_FOLDER}/")]
            check_config(self._fetch([CONFIG_FILE]))
            return self._fetch([CONFIG_FILE, *(files & set(OWN_FILES)), *others, *weights])
        remedy = f"fetch it for the commands: hf download {self._name} --local-dir OUT; or gsa_jax.from_pretrained"
        refuse_checkpoint(self._label, top, remedy)
        chosen = weight_file(self._label, files)
        check_config(self._fetch([CONFIG_FILE]))
        weights = [chosen]
        if chosen.endswith(".json"):
            weights += shard_names(self._fetch([chosen]) / chosen)
            missing = [name for name in weights if name not in files]
            if missing:
                raise InputError(f"{self._label}: {chosen} lists shards that are not there: {listed(missing)}")
        return self._fetch([CONFIG_FILE, *others, *weights])

    def _fetch(self, names: list[str]) -> Path:
        """The folder of the model in the cache, with these files in it."""
        from huggingface_hub import snapshot_download

        patterns = [glob.escape(self._prefix + name) for name in names]
        try:
            snapshot = snapshot_download(self._name, revision=self._revision, allow_patterns=patterns)
        except hub_errors() as error:
            raise InputError(f"{self._label}: cannot be had from the hub ({first_line(error)})") from error
        return Path(snapshot, self._prefix)

    def _from_cache(self, reason: Exception) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            # Not a whole snapshot, which the client would find incomplete: not every file was wanted.
            config = hf_hub_download(
                self._name, self._prefix + CONFIG_FILE, revision=self._revision, local_files_only=True
            )
        except hub_errors():
            raise InputError(
                f"{self._name}: no such folder, and not to be had from the hub ({first_line(reason)})"
            ) from reason
        return Path(config).parent


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises, and what it lets through of its HTTP library, another one in each major version."""
    from huggingface_hub.errors import HfHubHTTPError

    # The client's own error is derived from the one that all errors of its HTTP library have in common.
    bases = [base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base is not Exception]
    return (OSError, ValueError, *bases)
