"""The command `gsa`.

May be changed here: which commands there are, and what an error looks like. A command is a dataclass in a module of
this package; its fields are its options, and its `run` calls one library function; nothing is computed here. Heavy
imports wait until a command runs, so that `gsa --help` answers at once.

Exit codes: 0 done, 1 `verify` found a difference, 2 bad input (one line on stderr; a traceback with `--debug`),
130 interrupted, 141 nobody reads the output any more, 143 terminated.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from typing import Any, NoReturn

import tyro

from gsa_jax.cli.base import Command
from gsa_jax.cli.conversion import Convert, Export, Verify
from gsa_jax.cli.evaluation import Eval
from gsa_jax.cli.fitting import Diagnose, FitInit
from gsa_jax.cli.generation import Generate
from gsa_jax.cli.harness import LmEval
from gsa_jax.cli.inspection import Inspect
from gsa_jax.cli.training import Tokenize, Train, check_preset
from gsa_jax.errors import InputError
from gsa_jax.files import is_disk_full

COMMANDS: dict[str, Any] = {
    "convert": Convert,
    "verify": Verify,
    "generate": Generate,
    "fit-init": FitInit,
    "diagnose": Diagnose,
    "inspect": Inspect,
    "tokenize": Tokenize,
    "train": Train,
    "eval": Eval,
    "lm-eval": LmEval,
    "export": Export,
}


def main() -> None:
    """Entry point of `gsa`; exits with the code of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # which it is unless it is closed, or someone has put another there
            stream.reconfigure(errors="backslashreplace")  # a character that a terminal cannot show
    try:
        try:
            _run()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, and not when nothing can be done about it any more
    except OSError as error:
        closed = isinstance(error, BrokenPipeError)  # `gsa ... | head -1`
        if not closed and not is_disk_full(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes what is left once more when it ends
        if closed:
            sys.exit(128 + signal.SIGPIPE)
        _fail(InputError("the disk is full; what was printed is not all there"))


def _run() -> NoReturn:
    if sys.argv[1:2] == ["train"]:
        try:
            check_preset(sys.argv[2:])
        except InputError as error:  # before tyro lists, in many lines, what it expected
            _fail(error)
    command: Command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="gsa",
        description="GPT-Neo and GPT-2 in JAX/Flax, with attention through Gaussian splats.",
        # An option of `gsa train` may stand after the preset.
        config=(tyro.conf.CascadeSubcommandArgs,),
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not there, which is no fault
    if not command.debug:
        for logger in ("absl", "asyncio"):  # where Orbax and its event loop report what is raised to us anyway
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        sys.unraisablehook = _drop_late_callbacks
    # A terminated command unwinds like an interrupted one, so that half-written output is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(command.run())
    except InputError as error:
        if command.debug:
            raise
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _fail(error: InputError) -> NoReturn:
    print(f"gsa: {error}", file=sys.stderr)
    sys.exit(2)


def _drop_late_callbacks(unraisable: sys.UnraisableHookArgs) -> None:
    """Prints what a callback raised, except the error that a closed event loop gives after a failed read or write.

    Orbax closes its event loop after such a failure, while threads of TensorStore may still report to it.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
