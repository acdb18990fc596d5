"""`python -m gsa_jax.cli`, for where the script `gsa` is not on the path."""

from gsa_jax.cli import main

main()
