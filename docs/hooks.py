"""What `mkdocs build` does beside its plugins.

- Notebooks become pages, with the outputs that are stored in them.
- The help of every command becomes a page.
- Files of the repository that pages link to become pages of the site, because no address of a repository is known.
- A page that would load anything from another server is refused.

May be changed here: which pages are made, and from what.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from posixpath import dirname, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

from gsa_jax.cli import COMMANDS

ROOT = Path(__file__).parents[1]
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)")
"""The target of a link to a file."""
INCLUDED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Of the repository, and the pages that have them, or parts of them."""
_ELSEWHERE = r"""["']?(?:https?:)?//[^"'> ]+"""
LOADED = re.compile(
    rf"""<(?:script|img|iframe|source|video|audio)\b[^>]*\ssrc={_ELSEWHERE}"""
    rf"""|<link\b(?![^>]*\srel=["']?canonical)[^>]*\shref={_ELSEWHERE}"""
    rf"""|(?:@import\s+(?:url\()?|url\(){_ELSEWHERE}""",
    re.IGNORECASE,
)
"""What a browser would fetch from elsewhere while it shows a page."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            _add_notebook(files, file, config)
    files.append(File.generated(config, "commands.md", content=_commands()))
    texts = [(f"docs/{dirname(file.src_uri)}", file.content_string) for file in files if file.is_documentation_page()]
    texts += [(".", (ROOT / name).read_text(encoding="utf-8")) for name in INCLUDED]
    for folder, text in texts:
        for target in LINK.findall(text):
            _add_source(files, normpath(f"{folder}/{target}"), config)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to files of the repository into links to their pages."""
    here = dirname(page.file.src_uri)

    def inside(match: re.Match[str]) -> str:
        path = normpath(f"docs/{here}/{match[1]}")
        if path.startswith("docs/"):
            return re.sub(r"^(?!source/)(.*)\.ipynb$", r"\1.md", match[1])
        return relpath(_source_page(path), here or ".")

    return LINK.sub(inside, markdown)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Refuses a site that would load something from another server."""
    for file in Path(config.site_dir).rglob("*"):
        if file.suffix in (".html", ".css") and (found := LOADED.search(file.read_text(encoding="utf-8"))):
            raise PluginError(f"{file}: loads from another server: {found[0]}")


def _add_notebook(files: Files, notebook: File, config: MkDocsConfig) -> None:
    """A page with the notebook's outputs, and the notebook itself to download."""
    page, raw = notebook.src_uri.replace(".ipynb", ".md"), f"source/docs/{notebook.src_uri}"
    assert notebook.abs_src_path is not None
    body, resources = MarkdownExporter().from_filename(notebook.abs_src_path)
    heading, rest = body.lstrip().split("\n", 1)
    note = f"[This page as a notebook]({raw}){{ download }}; what it prints is from a real run.\n"
    files.append(File.generated(config, page, content=f"{heading}\n\n{note}\n{rest}"))
    files.append(File.generated(config, raw, abs_src_path=notebook.abs_src_path))
    for output, content in resources["outputs"].items():
        files.append(File.generated(config, output, content=content))


def _commands() -> str:
    """The page of all commands' help."""
    environment = os.environ | {"COLUMNS": "98", "NO_COLOR": "1"}
    parts = ["# The command line\n\nWhat `gsa COMMAND --help` prints.\n"]
    for command in COMMANDS:
        gsa = [sys.executable, "-m", "gsa_jax.cli", command, "--help"]
        said = subprocess.run(gsa, env=environment, check=True, capture_output=True, text=True).stdout
        parts.append(f"## gsa {command}\n\n```text\n{said.strip()}\n```\n")
    return "\n".join(parts)


def _source_page(path: str) -> str:
    """Where a file or folder of the repository is in the site."""
    if path in INCLUDED:
        return INCLUDED[path]
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}.md" if path.endswith(".py") else f"source/{path}"


def _add_source(files: Files, path: str, config: MkDocsConfig) -> None:
    place, source = _source_page(path), ROOT / path
    if path.startswith("docs/") or files.get_file_from_path(place) is not None:
        return
    if not source.exists():
        raise PluginError(f"a link to {path}, which is not there")
    if source.is_dir():
        names = sorted(child.name for child in source.iterdir() if child.is_file())
        listed = "".join(f"- [{name}]({name})\n" for name in names)
        files.append(File.generated(config, place, content=f"{NOT_SEARCHED}# {path}\n\n{listed}"))
        for name in names:
            files.append(File.generated(config, f"source/{path}/{name}", abs_src_path=str(source / name)))
    elif path.endswith(".py"):
        code = f"{NOT_SEARCHED}# {path}\n\n````python\n{source.read_text(encoding='utf-8')}````\n"
        files.append(File.generated(config, place, content=code))
    else:
        files.append(File.generated(config, place, abs_src_path=str(source)))
