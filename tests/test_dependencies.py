"""Dependencies between modules point one way, and PyTorch stays out of the package.

May be changed here: the order of the parts.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from gsa_jax.convert.pytorch import CODE_FILES

ROOT = Path(__file__).parents[1]

ORDER = [
    {"errors", "assets", "progress", "hlo", "json_files"},
    {"files", "hf_fields", "splat_config", "stand_ins"},
    {"config", "topology"},
    {"ops", "generation_config", "tokenizer"},
    {"layers", "layer_scan", "tokenizer_folder"},
    {"attention"},
    {"model"},
    {"parameters", "text_files"},
    {"sharding", "loss", "sampling", "text", "prompts"},
    {"checkpoint"},
    {"generation", "evaluation", "convert"},
    {"fitting", "completion", "pretrained"},
    {"train", "publishing", "lm_eval"},
    {"inspection"},
    {"cli"},
]
"""A part imports parts that stand before it, and itself; those that stand beside it are strangers."""

TORCH = {"gsa_jax.convert.pytorch.modeling_gsa", "gsa_jax.convert.verify"}

EXPORTED = {name.removesuffix(".py") for name in CODE_FILES}


def modules() -> Iterator[tuple[str, Path]]:
    for folder, package in (("gsa_jax", "gsa_jax"), ("convert", "gsa_jax.convert"), ("train", "gsa_jax.train")):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), file


MODULES = dict(modules())


def imports(file: Path) -> set[str]:
    """Full names of what a file imports, anywhere in it, types included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # Files that are copied beside an export know one another alone.
            assert node.level == (file.parent.name == "pytorch" and node.module in EXPORTED), f"{file}: full names only"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} - {None}
    return found


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_part_has_a_place() -> None:
    assert {part(module) for module in MODULES} - {""} == set.union(*ORDER)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"gsa_jax"}))  # which imports names when they are asked for
def test_dependencies_point_one_way(module: str) -> None:
    own = part(module)
    before = set.union(set(), *ORDER[: next(n for n, parts in enumerate(ORDER) if own in parts)])
    used = {part(name) for name in imports(MODULES[module]) if name.startswith("gsa_jax.") and name in MODULES}
    assert used <= before | {own}


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_files_that_are_exported_need_nothing_of_this_package(name: str) -> None:
    packages = {x.split(".")[0] for x in imports(MODULES[f"gsa_jax.convert.pytorch.{name}"])}
    assert packages <= {"__future__", "math", "typing", "torch", "transformers", *EXPORTED}


def test_pytorch_is_imported_where_it_is_compared_and_nowhere_else() -> None:
    users = {module for module, file in MODULES.items() if any(x.split(".")[0] == "torch" for x in imports(file))}
    assert users == TORCH
