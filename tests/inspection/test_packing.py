"""Weights as the page has them."""

import base64
import json
import zlib

import hypothesis
import numpy as np
from hypothesis import strategies

from gsa_jax.inspection.packing import UNIT, token_rows, visible, whole_units


@hypothesis.given(strategies.integers(1, 40), strategies.integers(0, 2**32 - 1), strategies.floats(0.01, 40))
@hypothesis.settings(deadline=None)
def test_rounded_rows_still_sum_to_one(length: int, seed: int, spread: float) -> None:
    scores = np.random.default_rng(seed).normal(size=(length, length)) * spread
    weights = np.where(np.tri(length) > 0, np.exp(scores - scores.max()), 0)
    weights += np.eye(length) * 1e-9
    weights /= weights.sum(axis=1, keepdims=True)
    units = whole_units(weights)
    assert (units.astype(int).sum(axis=1) == UNIT).all()
    assert (units[np.tri(length) == 0] == 0).all()
    np.testing.assert_allclose(units / UNIT, weights, atol=1 / UNIT)


def test_tokens_are_visible_and_harmless() -> None:
    assert [visible(token) for token in (" cat", "\n", "", "\x07")] == [" cat", "\u21b5", "\u2205", "\ufffd"]
    rows = token_rows(["Once", " up", "on", " a", " time"])
    assert [row["context"] for row in rows][1:3] == ["Once [up]on a time", "Once up[on] a time"]


def test_arrays_are_packed_as_browsers_unpack_them() -> None:
    """`deflate` of a browser's `DecompressionStream` is the format of zlib, RFC 1950."""
    from gsa_jax.inspection.packing import _packed

    numbers = np.arange(-3, 400, dtype="<i2").reshape(13, 31)
    unpacked = np.frombuffer(zlib.decompress(base64.b64decode(_packed(numbers))), "<i2")
    np.testing.assert_array_equal(unpacked, numbers.ravel())
    assert json.loads(json.dumps(_packed(numbers))) == _packed(numbers)
