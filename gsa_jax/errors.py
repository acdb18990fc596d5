"""The one exception that stands for bad input.

Raise `InputError` with a single line that names the thing and the remedy; the command line prints that line and
exits with code 2. Anything else that escapes is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """Input from outside (a file, a flag, an argument) that cannot be used as it is."""
