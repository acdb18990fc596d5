"""Splat attention refuses arguments that do not fit, each with one line that names the thing and the remedy."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gsa_jax.errors import InputError
from gsa_jax.ops.api import splat_attention
from gsa_jax.ops.state import Splats, init_splat_state
from helpers.splat_cases import draw


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": -1}, "window = -1"),
        ({"window": 2.0}, "window = 2.0"),
        ({"window": True}, "window = True"),
        ({"window": 0, "num_splats": 0}, "window = 0 without splats"),
        ({"attention_mask": jnp.ones((2, 6), bool)}, "attention_mask"),
        ({"attention_mask": jnp.ones((2, 5))}, "attention_mask is float32"),
        ({"key": jnp.zeros((2, 5, 2, 7))}, "query, key and value have shapes"),
        ({"key": jnp.zeros((2, 5, 2, 8), jnp.bfloat16)}, "one dtype"),
        ({"splats": Splats(jnp.zeros((2, 3, 7)), jnp.zeros((2, 3)))}, "splats.centers"),
        ({"splats": Splats(jnp.zeros((2, 3, 8)), jnp.zeros((2, 4)))}, "splats.log_scales"),
        ({"splats": Splats(jnp.zeros((2, 3, 8)), jnp.zeros((2, 3)), far_gain=jnp.zeros(3))}, "splats.far_gain"),
        ({"splats": Splats(jnp.full((2, 3, 8), jnp.nan), jnp.zeros((2, 3)))}, "splats.centers holds"),
        ({"splats": Splats(jnp.zeros((2, 3, 8)), jnp.full((2, 3), -jnp.inf))}, "splats.log_scales holds"),
        ({"implementation": "fast"}, "implementation = 'fast'"),
        ({"implementation": "recurrent", "window": "all"}, "'recurrent' needs a window"),
        ({"implementation": "recurrent", "chunk_size": 4}, "chunk_size does nothing"),
        ({"chunk_size": 0}, "chunk_size = 0"),
        ({"window": "all", "state": {}}, "initial_state needs a window"),
        ({"state": {"z": jnp.zeros((2, 2, 4))}}, "initial_state.z"),
        ({"state": {"kv": jnp.zeros((2, 2, 3, 8), jnp.bfloat16)}}, "initial_state.kv is bfloat16"),
        ({"state": {"key": jnp.zeros((2, 2, 5, 8))}}, "initial_state.key"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_line(unchecked, change: dict, words: str) -> None:
    change = dict(change)
    case = draw(5, change.pop("num_splats", 3))
    arguments = {"query": case.query, "key": case.key, "value": case.value, "splats": case.splats, "window": 4}
    arguments |= {"attention_mask": case.mask}
    if "state" in change:
        state = init_splat_state(case.splats, 2, 4, jnp.float32)
        change["initial_state"] = dataclasses.replace(state, **change.pop("state"))
    with pytest.raises(InputError, match=words) as error:
        splat_attention(**(arguments | change))
    assert "\n" not in str(error.value)


def test_concrete_splats_are_checked_while_the_rest_is_traced() -> None:
    case = draw(5, 2)

    @jax.jit
    def attend(query):
        return splat_attention(query, *case[1:4], window=2, attention_mask=case.mask)[0]

    assert attend(case.query).shape == case.query.shape
