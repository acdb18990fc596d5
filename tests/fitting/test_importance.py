"""What makes a key one to keep, learned from what keeping it would have saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax.errors import InputError
from gsa_jax.fitting.importance import fit_importance
from gsa_jax.fitting.statistics import AttentionRows
from gsa_jax.ops import Splats
from helpers.attention_oracle import HeadSplats, row_weights

SEQUENCES, LENGTH, ROWS, DIM, WINDOW, KEPT = 8, 60, 20, 8, 4, 6


@pytest.fixture(scope="module")
def rows() -> AttentionRows:
    """Queries of the first head look for keys in one direction, which are shorter than most; those of the second have
    no such wish, but some keys are three times as long as others."""
    draws = np.random.default_rng(0)
    query = draws.normal(size=(SEQUENCES, ROWS, 2, DIM))
    key = draws.normal(size=(SEQUENCES, LENGTH, 2, DIM))
    key[..., 0, 0] = 0
    key *= draws.uniform(1.8, 3, (SEQUENCES, LENGTH, 2, 1)) / np.linalg.norm(key, axis=-1, keepdims=True)
    wanted = draws.random((SEQUENCES, LENGTH)) < 0.08
    value = draws.normal(size=(SEQUENCES, LENGTH, 2, DIM))
    query[..., 0, :] = 0.1 * query[..., 0, :] + 2 * np.eye(DIM)[0]
    key[..., 0, :] = np.where(wanted[..., None], 2 * np.eye(DIM)[0], key[..., 0, :])
    key[..., 1, :] *= 1 + 2 * wanted[..., None]
    places = np.sort(draws.integers(WINDOW + 20, LENGTH, (SEQUENCES, ROWS)), axis=1)
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, key, value))
    return AttentionRows(*arrays, jnp.asarray(places), jnp.ones((SEQUENCES, LENGTH), bool))


SPLATS = Splats(jnp.zeros((2, 1, DIM)), jnp.zeros((2, 1)))


def test_weights_find_the_keys_that_are_looked_for(rows: AttentionRows) -> None:
    weights, heads = fit_importance(3, rows, SPLATS, window=WINDOW, kept=KEPT, seen="all")
    first, second = heads
    assert (first.layer, first.head, second.head) == (3, 0, 1)
    assert first.chosen == "learned" and first.learned < 0.6 * first.norm < first.nothing_kept
    assert weights.shape == (2, 2 * DIM + 1)
    assert int(jnp.argmax(jnp.abs(weights[0, :DIM]))) == 0 and weights[0, 0] > 0
    for head in heads:
        assert min(head.norm, head.learned) <= head.nothing_kept
    if second.chosen == "norm":
        assert weights[1].tolist() == [0.0] * (2 * DIM) + [1.0]


def test_errors_are_those_of_float64_rows(rows: AttentionRows) -> None:
    """Half of the sum of absolute differences between rows of weights, over the held-out sequences."""
    _, heads = fit_importance(0, rows, SPLATS, window=WINDOW, kept=KEPT, seen="all")
    splats = HeadSplats(np.zeros((1, DIM)), np.zeros(1))
    for head in heads:
        errors: dict[str, list[float]] = {"nothing_kept": [], "first_tokens": [], "norm": []}
        for sequence in range(SEQUENCES // 2, SEQUENCES):
            for n, row in enumerate(np.asarray(rows.row[sequence])):
                query = np.asarray(rows.query[sequence, n, head.head], np.float64)
                keys = np.asarray(rows.key[sequence, : row + 1, head.head], np.float64)
                beyond = np.arange(row + 1) <= row - WINDOW
                longest = sorted(np.flatnonzero(beyond), key=lambda j: (-np.sum(keys[j] ** 2), j))[:KEPT]
                exact, _ = row_weights(query, keys, np.zeros_like(beyond), None, None)
                for name, stays in (("nothing_kept", []), ("first_tokens", range(KEPT)), ("norm", longest)):
                    far = beyond & ~np.isin(np.arange(row + 1), list(stays))
                    through, _ = row_weights(query, keys, far, None, splats)
                    errors[name].append(np.abs(exact - through).sum() / 2)
        for name, found in errors.items():
            assert getattr(head, name) == pytest.approx(np.mean(found), rel=1e-4), name


def test_rows_that_the_window_holds_say_nothing(rows: AttentionRows) -> None:
    """Their first half, that is; of a single row it is empty."""
    single = jax.tree.map(lambda x: x[:1], rows)
    for too_short, window in ((rows, LENGTH), (single, WINDOW)):
        with pytest.raises(InputError, match=f"layer 3: .* longer than the window of {window}, .* --importance norm"):
            fit_importance(3, too_short, SPLATS, window=window, kept=KEPT, seen="all")
