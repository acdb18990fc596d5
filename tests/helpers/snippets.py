"""Commands and Python in the pages of the documentation.

May be changed here: what is a page, what in it is a command, and which other lines of shell there may be.
"""

import ast
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs").glob("*.ipynb")),
]
"""Of notebooks, what stands between their cells of code."""

_COMMAND = re.compile(r"(?:^|(?<=[\s;\"]))(?:gsa|make|pip|(?:\.venv/bin/)?python) (?=[\w.'-])")
"""Where one of our commands begins, also behind `srun` or in what `ssh` is given."""
_OTHERS = re.compile(r"#SBATCH |export |for .* do$|done; wait$")
"""Lines of shell without a command of ours."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code: its page, the line it stands on, whether it is `sh`, `python` or `text`, and itself."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    def commands(self) -> list[list[str]]:
        """Its commands of ours, as words.

        Raises:
            AssertionError: a line is neither a command nor one of `_OTHERS`.
        """
        found = []
        text = self.text.replace("$i", "0")  # of the loop over processes, whose option takes a number
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            if not line.strip() or re.match(r"\s*#(?!SBATCH)", line):
                continue
            starts = [match.start() for match in _COMMAND.finditer(line)]
            assert starts or _OTHERS.match(line.strip()), f"{self}: neither a command that is tested nor known: {line}"
            # One command to a line; what stands before it launches it.
            found += [_words(line[starts[0] :])] if starts else []
        return found


def _words(command: str) -> list[str]:
    if command.count('"') % 2:  # in the quotes of a launcher
        command = command[: command.rindex('"')]
    words = shlex.split(command, comments=True)
    return words[: words.index("&")] if "&" in words else words


def blocks(page: Path) -> Iterator[Block]:
    """All blocks of code of a page, in order.

    Raises:
        AssertionError: a fence does not say which language it is, or what seems to be text is code.
    """
    for token in MarkdownIt().parse(_markdown(page)):
        if token.type not in ("fence", "code_block"):
            continue
        assert token.map is not None
        block = Block(page, token.map[0] + 1, token.info, token.content)
        if token.type == "fence":
            assert token.info in ("sh", "python", "text"), f"{block}: a fence of {token.info!r}; sh, python or text"
        else:  # indented, which says nothing
            first = token.content.strip().splitlines()[0]
            is_shell = _COMMAND.search(first) or _OTHERS.match(first)
            block = dataclasses.replace(block, language="sh" if is_shell else "text")
        if block.language == "text":
            assert not any(_COMMAND.match(line.strip()) for line in block.text.splitlines()), f"{block}: has commands"
            assert not _is_python(block.text), f"{block}: is Python; put it into a fence"
        yield block


def inline_commands(page: Path) -> Iterator[str]:
    """What stands between backticks in running text, and begins like a command of ours."""
    for token in MarkdownIt().enable("table").parse(_markdown(page)):
        for child in token.children or ():
            if child.type == "code_inline" and _COMMAND.match(child.content):
                yield child.content


def _markdown(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
