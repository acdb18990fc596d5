"""What splats cost: a model with splats beside the exact one, with controls and intervals.

    arms.py         the models that are compared
    perplexity.py   on a text
    passkey.py      on finding a number that stands far back
    intervals.py    from losses to measures with 95 % intervals

May be changed here: this map, and which names are public.
"""

from gsa_jax.evaluation.passkey import evaluate_passkey
from gsa_jax.evaluation.perplexity import evaluate

__all__ = ["evaluate", "evaluate_passkey"]
