"""Whether scripts take the arguments that they are given: JSON on stdin, a list of `[script, argument, ...]`.

Each script is imported, and its own parser reads the arguments; then it is left. A program of its own, because scripts
import those beside them by names that packages have as well. May be changed here: which parsers scripts may have.
"""

import argparse
import functools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import tyro


class Understood(BaseException):
    """The arguments were read."""


def main() -> None:
    parse_args, cli = argparse.ArgumentParser.parse_args, tyro.cli

    def parsed(self: argparse.ArgumentParser, *arguments: Any) -> None:
        parse_args(self, *arguments)
        raise Understood

    def called(function: Any, **options: Any) -> None:
        cli(functools.wraps(function)(lambda *given, **named: None), **options)
        raise Understood

    argparse.ArgumentParser.parse_args, tyro.cli = parsed, called
    for script, *arguments in json.load(sys.stdin):
        sys.path.insert(0, str(Path(script).parent))
        sys.argv = [script, *arguments]
        has_parser = any(
            parser in Path(script).read_text(encoding="utf-8") for parser in ("ArgumentParser", "tyro.cli")
        )
        if has_parser:
            try:
                runpy.run_path(script, run_name="__main__")
            except Understood:
                pass
            else:
                raise AssertionError(f"{script}: did not read its arguments")
        else:
            assert not arguments, f"{script}: takes no arguments"
            assert callable(runpy.run_path(script)["main"])
        sys.path.pop(0)
        print("understood:", script, *arguments, flush=True)


if __name__ == "__main__":
    main()
