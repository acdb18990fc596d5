"""Programs for machines that are not here, lowered: what `compile_for` hands to their compilers.

May be changed here: which programs there are. Each function is imported by name in the process that compiles.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from gsa_jax import generation
from gsa_jax.config import GPTNeoConfig
from gsa_jax.model import GPTNeoForCausalLM
from gsa_jax.ops import Splats, splat_attention
from gsa_jax.sampling import Greedy
from gsa_jax.splat_config import SPLAT_PRESETS
from gsa_jax.topology import Compiled, compile_for, parse_topology
from gsa_jax.train.compiled import lower_step
from gsa_jax.train.config import MODELS, Pretrain, TrainConfig

HYBRID_STORY = dataclasses.replace(MODELS["story"], splats=SPLAT_PRESETS["hybrid"])
"""The shape of the bundled model, with splats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpCase:
    """One call of `splat_attention`, and perhaps its gradient."""

    direction: Literal["forward", "backward"]
    dtype: str
    rows: int
    length: int
    heads: int
    head_dim: int
    num_splats: int
    window: int
    kept: int = 0
    masks: Literal["none", "attention_mask", "segment_ids"]


def compiled(name: str, function: Any, *arguments: Any) -> Compiled:
    """What the compiler of a machine makes of a program; fails, in its own words, if that needs too much memory."""
    found = compile_for(parse_topology(name), function, *arguments, what=f"{function.__name__}{arguments}")
    assert isinstance(found, Compiled), found.line
    return found


def compiled_text(name: str, function: Any, *arguments: Any) -> str:
    """The optimised HLO of a program for a machine.

    Args:
        name: of the machine, e.g. `"v5e:1x1"` or `"h100"`.
        function: at the top of a module, of the machine's devices and `arguments`, to a `jax.stages.Lowered`.
    """
    return compiled(name, function, *arguments).text


def on_one_device(devices: list[Any], tree: Any) -> Any:
    """Shapes, on the first of these devices."""
    where = SingleDeviceSharding(devices[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def lower_op(devices: list[Any], case: OpCase) -> Any:
    """`splat_attention`, and its gradient by all arrays."""
    tokens = (case.rows, case.length)
    array = jax.ShapeDtypeStruct((*tokens, case.heads, case.head_dim), jnp.dtype(case.dtype))
    per_head = jax.ShapeDtypeStruct((case.heads,), jnp.float32)
    splats = Splats(
        jax.ShapeDtypeStruct((case.heads, case.num_splats, case.head_dim), jnp.float32),
        jax.ShapeDtypeStruct((case.heads, case.num_splats), jnp.float32),
        None,
        per_head,
        per_head,
    )
    kinds = {"none": {}, "attention_mask": {"attention_mask": jnp.bool_}, "segment_ids": {"segment_ids": jnp.int32}}
    masks = {name: jax.ShapeDtypeStruct(tokens, dtype) for name, dtype in kinds[case.masks].items()}

    def forward(query: Any, key: Any, value: Any, splats: Splats, masks: Any) -> Any:
        return splat_attention(query, key, value, splats, window=case.window, kept=case.kept, **masks)[0]

    def backward(query: Any, key: Any, value: Any, splats: Splats, masks: Any) -> Any:
        def total(*arguments: Any) -> Any:
            return jnp.sum(forward(*arguments, masks).astype(jnp.float32))

        return jax.grad(total, argnums=(0, 1, 2, 3))(query, key, value, splats)

    function = forward if case.direction == "forward" else backward
    return jax.jit(function).lower(*on_one_device(devices, (array, array, array, splats, masks)))


def lower_prefill(devices: list[Any], config: GPTNeoConfig, rows: int, length: int) -> Any:
    """The program that reads prompts."""
    graphdef, params = _split(devices, config)
    return generation._prefill.lower(graphdef, params, *_prompt(devices, rows, length), capacity=_capacity(config))


def lower_decode(devices: list[Any], config: GPTNeoConfig, rows: int, length: int) -> Any:
    """The loop that generates tokens."""
    graphdef, params = _split(devices, config)

    def read(params: Any, ids: Any, mask: Any) -> Any:
        return generation._prefill(graphdef, params, ids, mask, capacity=_capacity(config))

    logits, cache = jax.eval_shape(read, params, *_prompt(devices, rows, length))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    tokens, done = jax.ShapeDtypeStruct((rows, 64), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.bool_)
    state = generation._State(cache, logits, tokens, None, number, done, jax.eval_shape(lambda: jax.random.key(0)))
    ends = jax.ShapeDtypeStruct((1,), jnp.int32)
    state, number, ends = on_one_device(devices, (state, number, ends))
    choice = generation._Choice(Greedy(), None, None, ends, number)
    return generation._decode.lower(graphdef, params, state, choice, number)


def _capacity(config: GPTNeoConfig) -> int:
    return generation._capacity(config, config.max_position_embeddings)


def _prompt(devices: list[Any], rows: int, length: int) -> Any:
    ids, mask = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.bool_))
    return on_one_device(devices, (ids, mask))


def _split(devices: list[Any], config: GPTNeoConfig) -> tuple[Any, Any]:
    graphdef, params = nnx.split(nnx.eval_shape(lambda: GPTNeoForCausalLM(config, rngs=nnx.Rngs(0))))
    return graphdef, on_one_device(devices, params)


def run(recipe: type[TrainConfig], checkpoint: Path, **settings: Any) -> TrainConfig:
    """A small run in bfloat16, whose files need not be there, but for those of the checkpoint."""
    where = {"tokenizer": checkpoint} if recipe is Pretrain else {"checkpoint": checkpoint}
    paths = {"out": checkpoint / "run", "text": checkpoint / "text"}
    return recipe(**{"context": 256, "batch_size": 16, "dtype": "bfloat16"} | where | paths | settings)


def lower_pretraining(devices: list[Any], config: Pretrain, model: GPTNeoConfig) -> Any:
    """The step of a run that trains a model of another shape than those that have names."""
    MODELS[config.model] = model  # in the process that compiles, and nowhere else
    return lower_step(devices, config)
