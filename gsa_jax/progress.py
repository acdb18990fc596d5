"""How library functions report progress without knowing who watches.

May be changed here: the type. `gsa_jax.cli` shows a bar.
"""

from collections.abc import Callable, Iterable

Progress = Callable[[Iterable[str]], Iterable[str]]
"""Wraps an iterable of names of steps, which the function that was given it iterates over; `iter` shows nothing."""
