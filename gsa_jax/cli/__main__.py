"""`python -m gsa_jax.cli`, for where the script `gsa` is not on the path.

May be changed here: nothing; commands are in the modules beside.
"""

from gsa_jax.cli import main

main()
