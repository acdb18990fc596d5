"""Attention through Gaussian splats: exact for near keys, linear in time for far ones.

May be changed here: what is checked, which implementation runs by default, and how it is spread over heads, rows and
devices. The definition is `reference`; the other implementations give the same outputs, gradients and states.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gsa_jax.config import AttentionImplementation
from gsa_jax.errors import InputError
from gsa_jax.ops.chunked import chunked
from gsa_jax.ops.flash import exact_attention
from gsa_jax.ops.partition import BATCH, HEADS, ROWS_AND_HEADS, TOKENS_AND_HEADS, per_rows_and_heads
from gsa_jax.ops.recurrent import recurrent
from gsa_jax.ops.reference import reference
from gsa_jax.ops.segments import check_segment_ids, join_masks, token_mask
from gsa_jax.ops.softmax import causal_attention
from gsa_jax.ops.state import (
    STATE_HEADS,
    STATE_ROWS,
    Splats,
    SplatState,
    append_to_windows,
    init_splat_state,
    per_head,
    roll_window,
    without_paddings,
)
from gsa_jax.splat_config import Window

Implementation = Literal["reference", "chunked", "recurrent"]

_SPECS: dict[str, Any] = {field.name: ROWS_AND_HEADS for field in dataclasses.fields(SplatState)}
_SPECS |= {"valid": BATCH, "length": P()}
_STATE_SPECS = SplatState(**_SPECS)
"""How a mesh cuts the state."""


def splat_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H D"],
    splats: Splats,
    *,
    window: Window,
    kept: int = 0,
    attention_mask: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    initial_state: SplatState | None = None,
    implementation: Implementation | None = None,
    chunk_size: int | None = None,
    chunks_at_once: int | None = None,
    attention_implementation: AttentionImplementation = "auto",
) -> tuple[Float[Array, "B T H D"], SplatState | None]:
    """Softmax attention over exact scores of near and kept keys and splat scores of others, with one normaliser.

    Per head, with S splats of centre c_s and scale sigma_s:

        log phi_s(x) = -|x - c_s|^2 / (2 sigma_s^2)
        score(i, j)  = q_i . k_j                                              if 0 <= i - j < window, or j is kept at i
                     = logsumexp_s(log phi_s(q_i) + log phi_s(k_j) + log a_s)
                       + beta (|q_i|^2 + |k_j|^2) + lambda                     if i - j >= window
                     = -inf                                                   if j > i, or j is padding
        out_i        = sum_j softmax_j(score(i, .)) v_j

    Kept at i are, of the keys with i - j >= window, the `kept` ones of most importance: `gsa_jax.ops.kept.importance`,
    by default |k_j|^2; of equals, the older one. Keys that differ in importance by rounding may be taken for one
    another.

    The near scores are NOT divided by sqrt(D): where a model does so, its queries and keys come scaled. Distances i - j
    count slots, padding included, and go on across `initial_state`. Scores, sums and state are float32 whatever the
    inputs are.

    Far scores are sums over S features of the query times features of the key, so keys that leave the window are added
    to a state of constant size. Cost: O(window + kept + S) per token, in time and memory, forward and backward; O(T^2)
    for `implementation="reference"` and wherever the window holds everything.

    Float32 rounds a far score by about 1e-7 * (|x|^2 + |x| |c|) / sigma^2, x being a query or key: nothing for scales
    near the norms, visible where scales are far smaller and several far keys compete. Sums are taken relative to
    maxima per splat and per query, never clamped, so that scores of any size give finite results and gradients.

    Args:
        window: tokens seen exactly, the query's own included; `"all"` for every token. With 0, even the query's own
            token is seen through the splats. Without `initial_state`, "chunked" with a window that holds all tokens
            gives the same bits as `causal_attention`.
        kept: M, how many keys beyond the window stay exact; needs a finite window.
        attention_mask: `[B, T]`, bools or Hugging Face's integers: 1 for tokens, 0 for padding, anywhere; all tokens if
            None. Padding contributes nothing to outputs, state or gradients, whatever finite numbers it holds. Its own
            output is 0, or arbitrary and finite where the window holds everything.
        segment_ids: integers `[B, T]`, the number of each token's document where rows hold several; numbers must never
            fall along a row, and 0 is padding. The score of a key of another document is -inf: no output depends on it,
            and no gradient but in its rounding. One document if None.
        initial_state: what an earlier call returned for the tokens before these.
        implementation: `None` is "recurrent" for one token that continues a state, otherwise "chunked".
        chunk_size: tokens per chunk of "chunked"; affects speed and memory, results only in rounding. What suits the
            platform if None; on a TPU that is a kernel of its own.
        chunks_at_once: chunks that are computed in one product; likewise.
        attention_implementation: how "chunked" computes what is exact attention, because the window holds everything or
            there are no splats: `gsa_jax.ops.flash`.

    Returns:
        The output, in the dtype of `value`, and the state after the last token; no state for `window="all"` or with
        `segment_ids`.

    Raises:
        InputError: an argument has a wrong value, shape or dtype; `segment_ids` come with `initial_state` or
            "recurrent"; splats are not finite or `segment_ids` fall (which can be seen only outside of `jit`).
    """
    _check_inputs(query, key, value, splats, window, kept)
    _check_choices(window, initial_state, implementation, chunk_size=chunk_size, chunks_at_once=chunks_at_once)
    batch, length = query.shape[:2]
    packed = segment_ids is not None
    if packed:
        _check_packing(initial_state, implementation)
        segment_ids = check_segment_ids(segment_ids, (batch, length))
    segments = join_masks(token_mask(attention_mask, (batch, length)), segment_ids)
    if implementation is None:
        implementation = "recurrent" if length == 1 and initial_state is not None else "chunked"
    size = length if window == "all" else window
    has_state = window != "all" and not packed

    run = _run(implementation, chunk_size, chunks_at_once, initial_state is None)
    empty = functools.partial(init_splat_state, splats, batch, size, key.dtype, kept)
    holds_everything = size >= length
    is_exact = holds_everything or not (splats.centers.shape[1] or kept)
    if implementation == "chunked" and initial_state is None and is_exact:

        def through_chunks(*arguments: jax.Array) -> jax.Array:
            return run(*arguments, splats, empty())[0].astype(value.dtype)

        output = exact_attention(
            causal_attention if holds_everything else through_chunks,
            query,
            key,
            value,
            segments,
            window=None if holds_everything else size,
            implementation=attention_implementation,
        )
        if not holds_everything:
            output = without_paddings(output, segments)
        if not has_state:
            return output, None
        return output, roll_window(append_to_windows(empty(), key, value, segments), length)

    state = empty()
    if initial_state is not None:
        _check_state(initial_state, state)
        state = initial_state
    output, state = run(query, key, value, segments, splats, state)
    return without_paddings(output.astype(value.dtype), segments), state if has_state else None


def _run(implementation: Implementation, chunk_size: int | None, chunks_at_once: int | None, is_first: bool) -> Any:
    """The implementation for all heads and rows, with the window of the state as a ring.

    Args:
        is_first: whether the state will be empty.
    """
    if implementation == "recurrent":
        return recurrent
    if implementation == "reference":
        head_axes, row_axes = (1, 1, 1, None, 0, STATE_HEADS), (0, 0, 0, 0, None, STATE_ROWS)
        run = per_head(reference, head_axes, row_axes, (1, STATE_HEADS), (0, STATE_ROWS))
    else:
        tokens = TOKENS_AND_HEADS
        run = per_rows_and_heads(
            functools.partial(chunked, is_first=is_first, chunk_size=chunk_size, chunks_at_once=chunks_at_once),
            in_specs=(tokens, tokens, tokens, BATCH, HEADS, _STATE_SPECS),
            out_specs=(tokens, _STATE_SPECS),
        )

    def in_order_of_time(*arguments: Any) -> tuple[jax.Array, SplatState]:
        *arrays, state = arguments
        output, state = run(*arrays, roll_window(state, -state.length))
        return output, roll_window(state, state.length)

    return in_order_of_time


def _check_inputs(
    query: jax.Array, key: jax.Array, value: jax.Array, splats: Splats, window: Window, kept: int
) -> None:
    if not (query.ndim == 4 and query.shape == key.shape == value.shape and query.shape[1] > 0):
        raise InputError(
            f"query, key and value have shapes {query.shape}, {key.shape} and {value.shape}; "
            "give each the same [batch, tokens, heads, head_dim], with at least one token"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise InputError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; cast them to one dtype"
        )
    heads, head_dim = query.shape[2:]
    if splats.centers.ndim != 3 or splats.centers.shape[::2] != (heads, head_dim):
        raise InputError(f"splats.centers has shape {splats.centers.shape}; give [{heads} heads, splats, {head_dim}]")
    per_splat = splats.centers.shape[:2]
    expected = {
        "log_scales": per_splat,
        "log_amplitudes": per_splat,
        "norm_gain": (heads,),
        "far_gain": (heads,),
        "importance": (heads, 2 * head_dim + 1),
    }
    for name, shape in expected.items():
        array = getattr(splats, name)
        if array is not None and array.shape != shape:
            raise InputError(f"splats.{name} has shape {array.shape}; give {shape}, which suits splats.centers")
    for field in dataclasses.fields(splats):
        array = getattr(splats, field.name)
        if array is None or isinstance(array, Tracer):
            continue
        if not np.all(np.isfinite(np.asarray(array))):
            raise InputError(f"splats.{field.name} holds numbers that are not finite; train or load it again")
    if window != "all" and (not isinstance(window, int) or isinstance(window, bool) or window < 0):
        raise InputError(f"window = {window!r}; give a number of tokens >= 0, or 'all' of them")
    if not isinstance(kept, int) or isinstance(kept, bool) or kept < 0:
        raise InputError(f"kept = {kept!r}; give a number of keys >= 0")
    if window == "all" and kept:
        raise InputError(f"kept = {kept} with window = 'all': no key leaves the window; give a window, or kept = 0")
    if window == 0 and per_splat[1] == 0 and kept == 0:
        raise InputError("window = 0 without splats leaves nothing to attend to; give a window, splats or kept keys")


def _check_choices(
    window: Window, initial_state: SplatState | None, implementation: str | None, **sizes: int | None
) -> None:
    if implementation not in (None, "reference", "chunked", "recurrent"):
        raise InputError(f"implementation = {implementation!r}; give 'reference', 'chunked', 'recurrent' or None")
    if window == "all" and initial_state is not None:
        raise InputError("initial_state needs a window: with window = 'all' all keys are seen exactly, give a number")
    if window == "all" and implementation == "recurrent":
        raise InputError("implementation = 'recurrent' needs a window: give a number of tokens, or implementation None")
    for name, size in sizes.items():
        if size is None:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{name} = {size!r}; give a number >= 1, or None")
        if implementation not in (None, "chunked"):
            raise InputError(f"{name} does nothing for implementation = {implementation!r}; leave it out")


def _check_packing(initial_state: SplatState | None, implementation: str | None) -> None:
    if initial_state is not None:
        raise InputError("segment_ids begin their documents anew; leave initial_state out, or segment_ids")
    if implementation == "recurrent":
        raise InputError("implementation = 'recurrent' reads one document; leave segment_ids out, or give None")


def _check_state(state: SplatState, expected: SplatState) -> None:
    for field in dataclasses.fields(expected):
        got, want = getattr(state, field.name), getattr(expected, field.name)
        if got.shape != want.shape or got.dtype != want.dtype:
            raise InputError(
                f"initial_state.{field.name} is {got.dtype}{list(got.shape)} where {want.dtype}{list(want.shape)} "
                "belongs; start from init_splat_state with the same splats, batch, window, kept and dtype"
            )
