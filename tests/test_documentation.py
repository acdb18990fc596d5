"""Commands and Python in README, CONTRIBUTING and docs/: what is cheap is run, and everything else is understood.

Nothing is skipped: a block, or a line of one, that is of no kind that is known here fails. The notebooks are run by
`test_notebooks.py`.

May be changed here: what is too expensive to be run, and what a page finds in its folder. How commands are found is
`helpers.snippets`.
"""

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gsa_jax
from gsa_jax.cli import COMMANDS
from gsa_jax.cli.base import Command
from gsa_jax.cli.training import Train
from gsa_jax.convert import convert, export
from gsa_jax.train.config import PRESETS, MeshConfig, OptimizerConfig
from helpers.snippets import PAGES, ROOT, Block, blocks, inline_commands

IDS = [str(page.relative_to(ROOT)) for page in PAGES]
RUN = ("convert", "diagnose", "export", "generate", "tokenize")
"""Commands that are run. The others fit, train or evaluate, or need PyTorch; the notebooks do that."""
HUB_ID = "roneneldan/TinyStories-33M"
"""The bundled model stands for it."""


def is_run(words: list[str]) -> bool:
    if words[:2] == ["gsa", "train"]:  # estimates for one device
        return "--dry-run" in words and not any(word.startswith(("--topology", "--mesh")) for word in words)
    return words[0] == "gsa" and words[1] in RUN


def scripts(page: Path) -> list[list[str]]:
    """Calls of Python on a script of the repository, in blocks and in running text."""
    found = [words for block in blocks(page) if block.language == "sh" for words in block.commands()]
    found += [shlex.split(text) for text in inline_commands(page)]
    return [words[1:] for words in found if words[0].endswith("python")]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_is_understood(page, run_gsa, monkeypatch) -> None:
    understood = []

    def run(command: Command) -> int:
        if isinstance(command, Train):
            command.config.check()
        understood.append(command)
        return 0

    for kind in COMMANDS.values():
        monkeypatch.setattr(kind, "run", run)
    for block in blocks(page):
        for words in block.commands() if block.language == "sh" else ():
            if words[0] == "gsa":
                before = len(understood)
                outcome = run_gsa(*words[1:])
                assert outcome.code == 0 and len(understood) == before + 1, (str(block), words, outcome)
            elif words[0] == "make":
                check_make(words)
            elif words[0] == "pip":
                check_pip(words)
            else:  # scripts are in test_every_script_takes_its_arguments
                assert words[0].endswith("python") and words[1].endswith(".py"), (str(block), words)
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, str(block), "exec")


def check_make(words: list[str]) -> None:
    dry = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, (words, dry.stderr)


def check_pip(words: list[str]) -> None:
    """What is installed, and the extras of it, are there."""
    assert words[:2] == ["pip", "install"] and len(words) > 2
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words[2:]:
        requirement = Requirement(re.sub(r"^\.", "gsa-jax", word))
        known = extras if requirement.name == "gsa-jax" else metadata(requirement.name).get_all("Provides-Extra") or ()
        assert requirement.extras <= set(known), words


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_in_running_text_name_what_there_is(page) -> None:
    for text in inline_commands(page):
        words = re.sub(r"[\[\]]", " ", text).split()
        if words[0] == "make":
            check_make(words)
        elif words[0] == "pip":
            check_pip(shlex.split(text))
        elif words[0] == "gsa" and words[1] not in ("COMMAND", "--help"):
            options = {word for word in words if word.startswith("--")} - {"--help"}
            assert options <= options_of(words[1], words[2:3]), text


def options_of(name: str, following: list[str]) -> set[str]:
    """All options of a command; of `train`, with those of the preset that follows, or of any."""
    fields = dataclasses.fields(COMMANDS[name])
    names = {field.name for field in fields}
    if name == "train":
        presets = [PRESETS[word] for word in following if word in PRESETS] or PRESETS.values()
        names |= {field.name for recipe, _ in presets for field in dataclasses.fields(recipe)}
        for prefix, kind in (("optimizer", OptimizerConfig), ("mesh", MeshConfig)):
            names |= {f"{prefix}.{field.name}" for field in dataclasses.fields(kind)}
    return {f"--{name.replace('_', '-')}" for name in names}


@pytest.mark.slow
def test_every_script_takes_its_arguments() -> None:
    calls = [words for page in PAGES for words in scripts(page)]
    assert {"benchmarks/quality.py", "docs/near_and_far.py"} <= {words[0] for words in calls}
    # A capital word stands for what the reader has to put there: a row of the table, or a path.
    calls = [["short" if word == "ROW" else word for word in words] for words in calls]
    program = [sys.executable, ROOT / "tests/helpers/script_arguments.py"]
    ended = subprocess.run(program, cwd=ROOT, input=json.dumps(calls), capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and ended.stdout.count("understood:") == len(calls), ended


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with its trained splats."""
    folder = tmp_path_factory.mktemp("documentation") / "trained"
    convert(gsa_jax.assets.story_neo(), folder, splats=gsa_jax.assets.story_neo_splats())
    return folder


def prepare(folder: Path, page: Path, trained: Path) -> None:
    """What pages take for granted."""
    (folder / "gsa_jax").symlink_to(ROOT / "gsa_jax")
    (folder / "model").symlink_to(gsa_jax.assets.story_neo())
    stories = gsa_jax.assets.told_stories().read_text(encoding="utf-8").split("<|endoftext|>")
    for name, part in (("train.txt", stories[:40]), ("valid.txt", stories[40:])):
        (folder / name).write_text("<|endoftext|>".join(part), encoding="utf-8")
    (folder / "prompts.txt").write_text("Once upon a time\nLily had a cat\n", encoding="utf-8")
    (folder / "run").mkdir()
    for name in ("fitted", "run/model"):
        shutil.copytree(trained, folder / name)
    if page.name == "README.md":  # which says how, in words
        export(trained, folder / "exported")


def cheap_blocks(page: Path) -> list[Block]:
    return [
        block
        for block in blocks(page)
        if block.language == "python" or (block.language == "sh" and any(map(is_run, block.commands())))
    ]


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("page", [page for page in PAGES if cheap_blocks(page)], ids=lambda page: page.name)
def test_what_is_cheap_runs(page, trained, tmp_path, run_gsa, monkeypatch, standard_promotion) -> None:
    prepare(tmp_path, page, trained)
    monkeypatch.chdir(tmp_path)
    names = {"gsa_jax": gsa_jax, "transformers": importlib.import_module("transformers")}
    for block in cheap_blocks(page):
        block = dataclasses.replace(block, text=block.text.replace(HUB_ID, "model"))
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)  # the page's own code
            continue
        for words in filter(is_run, block.commands()):
            outcome = run_gsa(*words[1:])
            assert outcome.code == 0, (str(block), words, outcome)
    assert os.environ["JAX_PLATFORMS"] == "cpu"
