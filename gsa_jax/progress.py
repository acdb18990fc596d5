"""How a library function reports progress: a function of the caller wraps its steps, and shows how far it has come.

May be changed here: the type. `gsa_jax.cli` shows a bar.
"""

from collections.abc import Callable, Iterable

Progress = Callable[[Iterable[str]], Iterable[str]]
"""Wraps an iterable of the names of steps. The library function iterates over the result. `iter` shows nothing."""
