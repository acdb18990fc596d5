"""The one exception that stands for bad input, how it quotes another one, and how it lists many things.

Raise `InputError` with a single line that names the thing and the remedy; the command line prints that line and
exits with code 2. Anything else that escapes is a bug and keeps its traceback.

May be changed here: how a message is cut to one line, and how much of another one it quotes.
"""

from collections.abc import Sequence

_LONGEST = 1500
"""Characters of a message; what is longer quotes something without end."""


class InputError(ValueError):
    """Input from outside (a file, a flag, an argument) that cannot be used as it is.

    Its message is one line, whatever it quotes: what does not print is escaped, and of a long one the middle left out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        if not line.isprintable():
            line = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in line)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST * 2 // 3]} ... {line[-_LONGEST // 3 :]}"
        super().__init__(line)


def first_line(error: BaseException) -> str:
    """What another library's exception says, short enough to be quoted in an `InputError`."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def listed(phrases: Sequence[str], shown: int = 5) -> str:
    """The first of them, and how many more there are."""
    more = f"; and {len(phrases) - shown} more" if len(phrases) > shown else ""
    return "; ".join(phrases[:shown]) + more
