"""GPT-Neo and GPT-2 in JAX/Flax, with attention through Gaussian splats.

What most programs need is here; everything else is in the modules. Names are imported when they are first used, so
that `import gsa_jax` and `gsa --help` do not wait for JAX.

May be changed here: which names programs find at the top.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gsa_jax import assets

if TYPE_CHECKING:
    from gsa_jax.checkpoint import load
    from gsa_jax.completion import Completion, complete, stream_text
    from gsa_jax.config import GPTNeoConfig
    from gsa_jax.errors import InputError
    from gsa_jax.generation import generate, generate_stream
    from gsa_jax.model import GPTNeoForCausalLM
    from gsa_jax.pretrained import Pretrained, from_pretrained, save_pretrained
    from gsa_jax.publishing import model_card, push_to_hub
    from gsa_jax.sampling import Categorical, Greedy, make_sampler
    from gsa_jax.splat_config import SplatConfig
    from gsa_jax.tokenizer_folder import load_tokenizer, open_tokenizer

__all__ = [
    "Categorical",
    "Completion",
    "GPTNeoConfig",
    "GPTNeoForCausalLM",
    "Greedy",
    "InputError",
    "Pretrained",
    "SplatConfig",
    "assets",
    "complete",
    "from_pretrained",
    "generate",
    "generate_stream",
    "load",
    "load_tokenizer",
    "make_sampler",
    "model_card",
    "open_tokenizer",
    "push_to_hub",
    "save_pretrained",
    "stream_text",
]

_MODULES = {
    "checkpoint": ("load",),
    "completion": ("Completion", "complete", "stream_text"),
    "config": ("GPTNeoConfig",),
    "errors": ("InputError",),
    "generation": ("generate", "generate_stream"),
    "model": ("GPTNeoForCausalLM",),
    "publishing": ("model_card", "push_to_hub"),
    "pretrained": ("Pretrained", "from_pretrained", "save_pretrained"),
    "sampling": ("Categorical", "Greedy", "make_sampler"),
    "splat_config": ("SplatConfig",),
    "tokenizer_folder": ("load_tokenizer", "open_tokenizer"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"gsa_jax.{module}"), name)
    raise AttributeError(f"module 'gsa_jax' has no attribute {name!r}")
