"""JSON that others wrote: read within limits of size and depth, with one kind of error.

May be changed here: those limits.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 2**25
"""Of a file. The largest vocabularies that are about have as many; read into Python, it takes 0.8 GB at worst."""

MAX_DEPTH = 100
"""Of lists and objects in one another; what reads them may go down a call for each."""


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is not JSON, not UTF-8, nested too deeply, or has a number of thousands of digits.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        held = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in held for item in items if isinstance(item, dict | list)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def read_json(file: Path) -> Any:
    """What a file of JSON says.

    Raises:
        ValueError: as `parse_json`; or it is too large, or a pipe or device.
        OSError: there is none, or it cannot be read.
    """
    if not stat.S_ISREG(file.stat().st_mode) and not file.is_dir():  # which opening it says
        raise ValueError("neither a file nor a folder")
    with file.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES:,} bytes")
    return parse_json(content.decode("utf-8-sig"))  # editors of Windows begin with a byte order mark
