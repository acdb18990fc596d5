"""A checkpoint folder for others: its model card, made of the reports in it, and its way to a hub.

May be changed here: what a card says. Its figures are those of `config.json` and of the reports in the folder; what was
not measured is said not to have been, with the command that measures it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsa_jax.checkpoint import REPORT_FILE, WEIGHTS_FOLDER
from gsa_jax.config import CONFIG_FILE, GPTNeoConfig, read_config
from gsa_jax.convert.folder import holds_checkpoint
from gsa_jax.convert.hub import hub_errors
from gsa_jax.errors import InputError, first_line
from gsa_jax.evaluation.intervals import Estimate
from gsa_jax.files import refuse_foreign
from gsa_jax.fitting.fitted import FIT_REPORT_FILE
from gsa_jax.hf_fields import DONORS
from gsa_jax.json_files import read_json
from gsa_jax.parameters import expected_shapes, is_splat
from gsa_jax.splat_config import SplatConfig, describe

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD_FILE = "README.md"
VERIFY_REPORT_FILE = "verify.json"
EVAL_REPORT_FILE = "eval.json"
"""Where `gsa verify --json` and `gsa eval --json` are to leave their reports for a card to show them."""

_TAGS = ["gsa-jax", "jax", "flax"]


def model_card(folder: str | Path, repo_id: str | None = None) -> ModelCard:
    """The card of a checkpoint folder: what it is, what its splats cost, how it is loaded.

    Figures come from `conversion.json`, `fit_init.json`, and, if they were written into the folder, `verify.json`
    (`gsa verify --json`) and `eval.json` (`gsa eval --json`). The licence is not known here: `card.data.license = ...`.
    `card.save(folder / "README.md")` makes it the one that `push_to_hub` takes.

    Args:
        repo_id: `owner/name`, where it will be; the name of the folder if None.

    Raises:
        InputError: the folder is not a checkpoint, or a report cannot be read.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = _checkpoint(folder)
    config = read_config(folder / CONFIG_FILE)
    name = repo_id or folder.resolve().name
    base_model = _read(folder / REPORT_FILE).get("hub_id")
    data = ModelCardData(
        base_model=base_model,
        library_name="gsa-jax",
        pipeline_tag="text-generation",
        tags=[*_TAGS, config.donor, *(["gaussian-splats"] if config.splats is not None else [])],
    )
    parts = [
        f"# {name.split('/')[-1]}",
        _what_it_is(config, base_model),
        *_loading(name, config),
        *_costs(folder, config),
        *_fit(folder, config),
        *_verification(folder),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool | None = None) -> str:
    """Uploads a checkpoint folder, whole, with its `README.md` as the model card, or, without one, with `model_card`.

    Everything in the folder becomes public with it, reports included; they and the card name sources and texts as
    they were given to the commands, paths of this machine among them. The repository is made if there is none; weights
    that were there before are replaced. `from_pretrained(repo_id)` loads it. The login is that of
    `hf auth login`, or `HF_TOKEN`.

    Args:
        repo_id: `owner/name`, or a name of the user's own.
        private: of a new repository; as the hub has it if None.

    Returns:
        The address of the repository.

    Raises:
        InputError: the folder is not a checkpoint, a report in it cannot be read, or the hub does not take it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    folder = _checkpoint(folder)
    has_card = (folder / CARD_FILE).exists()
    if not has_card:
        model_card(folder)  # a damaged report is found before anything is made
    api = HfApi()
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        name, message = repository.repo_id, "Checkpoint of gsa-jax"
        weights = f"{WEIGHTS_FOLDER}/*"
        api.upload_folder(folder_path=folder, repo_id=name, delete_patterns=weights, commit_message=message)
        if not has_card:
            card = str(model_card(folder, name)).encode()
            api.upload_file(path_or_fileobj=card, path_in_repo=CARD_FILE, repo_id=name, commit_message=message)
    except HFValidationError:
        raise InputError(f"{repo_id!r}: no name of a repository; give it as owner/name") from None
    except hub_errors() as error:
        raise InputError(
            f"{repo_id}: the hub does not take it ({first_line(error)}); log in with a token that may write: "
            "hf auth login"
        ) from error
    return str(repository)


def _checkpoint(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder")
    if not holds_checkpoint({path.name for path in folder.iterdir()}):
        raise InputError(f"{folder}: not a gsa-jax checkpoint (no {WEIGHTS_FOLDER}/ in it); make one with gsa convert")
    refuse_foreign(folder)  # it is uploaded with whatever links in it lead to
    return folder


def _read(file: Path) -> dict[str, Any]:
    """A report; nothing if there is none."""
    try:
        values = read_json(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read ({error}); make it anew, or remove it") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: not a report (not a JSON object); make it anew, or remove it")
    return values


def _what_it_is(config: GPTNeoConfig, base_model: str | None) -> str:
    sizes = {name: math.prod(shape) for name, shape in expected_shapes(config).items()}
    origin = "" if base_model is None else f", converted from `{base_model}`"
    what = (
        f"A {DONORS[config.donor].title} for gsa-jax (JAX/Flax){origin}: {config.num_layers} layers, "
        f"hidden size {config.hidden_size}, {config.num_heads} heads, {config.vocab_size:,} tokens, "
        f"{config.max_position_embeddings:,} positions, "
        f"{sum(sizes.values()):,} parameters."
    )
    if config.splats is None:
        return f"{what} It has no splats: its attention is exact."
    splats = sum(size for name, size in sizes.items() if is_splat(name))
    through = (
        "which are unused: its window is infinite"
        if config.splats.window == "all"
        else "through which layers see the keys that are not in their window"
    )
    return (
        f"{what} {splats:,} of these belong to Gaussian splats, {through} "
        f"({describe(config.splats)}; layers {', '.join(map(str, config.splat_layers))})."
    )


def _loading(name: str, config: GPTNeoConfig) -> Iterator[str]:
    yield "## In JAX"
    yield f'```python\nimport gsa_jax\n\nmodel, tokenizer = gsa_jax.from_pretrained("{name}")\n```'
    yield "## In PyTorch"
    code = "" if config.splats is None else ", trust_remote_code=True"
    yield f"```sh\nhf download {name} --local-dir checkpoint\ngsa export checkpoint exported\n```"
    yield (
        "```python\nimport transformers\n\n"
        f'model = transformers.AutoModelForCausalLM.from_pretrained("exported"{code})\n```'
    )


def _costs(folder: Path, config: GPTNeoConfig) -> Iterator[str]:
    file = folder / EVAL_REPORT_FILE
    found = _read(file)
    yield "## What the splats cost" if config.splats is not None else "## Perplexity"
    if not found:
        yield _missing("This", "gsa eval CHECKPOINT --text FILE", EVAL_REPORT_FILE)
        return
    with _report_of("gsa eval", file):
        splats = None if found["splats"] is None else SplatConfig(**found["splats"])
        if found["layers"] != list(config.splat_layers) or _numbers_of(splats) != _numbers_of(config.splats):
            raise InputError(f"{file}: is of a model with other splats; make it anew, or remove it")
        rows = [
            [arm["name"], _estimate(arm["perplexity"]).shown(3), _estimate(arm["perplexity_ratio"]).shown(4)]
            for arm in found["arms"]
        ]
        if splats is not None:
            yield f"Measured with {describe(splats)}, beside the exact model and controls, with 95 % intervals:"
        yield _table(["model", "perplexity", "ratio to exact"], rows)
        documents, tokens = found["documents"], found["tokens"]
        said = f"{documents:,} documents, {tokens:,} tokens of {_names(found['text'])}; context {found['context']:,}."
        if splats is not None:
            said += f" The layers with splats remember {found['state_bytes']:,} bytes of a text of any length."
        if found["gap_closed"] is not None:
            closed = _estimate(found["gap_closed"]).shown(3)
            said += f" Share of the gap from the window alone to exact attention that is closed: {closed}."
        yield said


def _fit(folder: Path, config: GPTNeoConfig) -> Iterator[str]:
    file = folder / FIT_REPORT_FILE
    found = _read(file)
    if config.splats is None:
        return
    yield "## Where the splats come from"
    if not found:
        yield f"There is no report of `gsa fit-init` ({FIT_REPORT_FILE}) with this checkpoint."
        return
    with _report_of("gsa fit-init", file):
        tokens, text, seed = found["tokens"], found["text"], found["seed"]
        yield f"`gsa fit-init` placed them by {tokens:,} tokens of {_names(text)}, seed {seed}."


def _verification(folder: Path) -> Iterator[str]:
    file = folder / VERIFY_REPORT_FILE
    found = _read(file)
    yield "## Agreement with the PyTorch model"
    if not found:
        yield _missing("Agreement", "gsa verify SOURCE CHECKPOINT", VERIFY_REPORT_FILE)
        return
    with _report_of("gsa verify", file):
        rows = [
            [
                comparison["oracle"],
                comparison["inputs"],
                f"{comparison['tokens']:,}",
                f"{comparison['relative_rms']:.1e}",
                f"{comparison['tolerance']:.0e}",
                f"{comparison['top1_agreement']:.2%}",
                f"{comparison['loss']:.5f}",
                f"{comparison['oracle_loss']:.5f}",
                "agrees" if comparison["agrees"] else "**differs**",
            ]
            for comparison in found["comparisons"]
        ]
        yield (
            "Logits beside those of the source's own code, with exact attention; through the splats if the source is "
            "an export of them:"
        )
        yield _table(["oracle", "input", "tokens", "relative RMS", "tolerance", "top-1", "loss", "its loss", ""], rows)


@contextlib.contextmanager
def _report_of(command: str, file: Path) -> Iterator[None]:
    """Refuses, in one line, values that are not those of a report, such as texts in place of numbers."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not a report of {command} ({error!r}); make it anew, or remove it") from None


def _estimate(values: dict[str, Any]) -> Estimate:
    interval = values["interval"]
    return Estimate(values["value"], None if interval is None else (interval[0], interval[1]))


def _missing(what: str, command: str, file: str) -> str:
    return f"{what} has not been measured; `{command} --json CHECKPOINT/{file}` does."


def _names(text: str) -> str:
    """Files without the folders of whoever measured."""
    return ", ".join(Path(path).name for path in text.split(", "))


def _numbers_of(splats: SplatConfig | None) -> int | tuple[int, ...] | None:
    """What `gsa eval` has no option to change."""
    return None if splats is None else splats.num_splats


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
