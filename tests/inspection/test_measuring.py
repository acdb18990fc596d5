"""The numbers of the page, against float64 rows of the queries and keys that the model itself computes with."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsa_jax import SplatConfig
from gsa_jax.attention import GSASelfAttention
from gsa_jax.checkpoint import load_tensors, save
from gsa_jax.inspection.measuring import KEPT, NEAR, UNSEEN, HeadPicture, Inspection, measure
from gsa_jax.parameters import build_model
from gsa_jax.text import document_tokens
from gsa_jax.tokenizer_folder import open_tokenizer, tokenizer_files
from helpers.attention_oracle import far_keys, head_splats, row_weights
from helpers.texts import STORIES
from helpers.tiny_checkpoints import tiny_checkpoint

pytestmark = pytest.mark.slow  # it compiles for longer than it measures

WINDOW, KEPT_KEYS = 8, 3
SPLATS = SplatConfig(num_splats=5, window=WINDOW, kept=KEPT_KEYS, layers="all", norm_gain=True, far_gain=True)


class Inspected(NamedTuple):
    """An inspection, the tensors of its model, and per layer what its attention was given and gave there."""

    found: Inspection
    tensors: dict[str, np.ndarray]
    seen: list[tuple[np.ndarray, ...]]


@pytest.fixture(scope="module")
def inspected(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Inspected:
    """A tiny model whose second layer, a local one, gets what the splats of the first one gave."""
    parent = tmp_path_factory.mktemp("inspected")
    tiny = tiny_checkpoint(parent, story_neo, splats=SPLATS)
    config, tensors = load_tensors(tiny)
    later = {name: x + 0.25 if name.endswith("splat_centers") else x for name, x in tensors.items()}
    save(parent / "later", config, later, copied=tokenizer_files(tiny))
    found = measure(parent / "later", STORIES, compare=tiny)
    ids = document_tokens([STORIES.read_text().split("<|endoftext|>")[0].strip()], open_tokenizer(tiny), config)[0]
    seen = []

    class Watched(GSASelfAttention):
        def _attn(self, query: jax.Array, key: jax.Array, value: jax.Array, **call: Any) -> Any:
            output = super()._attn(query, key, value, **call)
            seen.append(tuple(np.asarray(x[0], np.float64) for x in (query, key, value, output[0])))
            return output

    model = build_model(config, later)
    for block in model.transformer.h:
        block.attn.attention.__class__ = Watched
    model(jnp.asarray(ids[: len(found.tokens)])[None])
    return Inspected(found, later, seen)


def heads(inspected: Inspected) -> list[tuple[HeadPicture, tuple[np.ndarray, ...]]]:
    return [(head, tuple(x[:, head.head] for x in inspected.seen[head.layer])) for head in inspected.found.heads]


def test_every_head_is_there(inspected: Inspected) -> None:
    found = inspected.found
    assert [(head.layer, head.head) for head in found.heads] == [(layer, head) for layer in (0, 1) for head in range(4)]
    assert (found.all_heads, len(found.tokens)) == (8, WINDOW + KEPT_KEYS + 96)
    text = STORIES.read_text().split("<|endoftext|>")[0].strip()
    assert text.startswith("".join(found.tokens[1:]))


def test_weights_make_the_output_of_the_model(inspected: Inspected) -> None:
    """Through another form of the op: the model's own call computes in chunks, and never has these weights."""
    for head, (_, _, value, output) in heads(inspected):
        np.testing.assert_allclose(head.weights @ value, output, atol=2e-5 * np.abs(output).max())


def test_rows_are_those_of_float64(inspected: Inspected) -> None:
    exact_windows = [None, 8]
    for head, (query, key, _, _) in heads(inspected):
        splats = head_splats(inspected.tensors, head.layer, head.head)
        for row in range(len(query)):
            far = far_keys(key[: row + 1], WINDOW, KEPT_KEYS)
            exact, _ = row_weights(query[row], key[: row + 1], far, exact_windows[head.layer], None)
            weights, through = row_weights(query[row], key[: row + 1], far, None, splats)
            np.testing.assert_allclose(head.exact[row, : row + 1], exact, atol=1e-5)
            np.testing.assert_allclose(head.weights[row, : row + 1], weights, atol=1e-5)
            np.testing.assert_allclose(head.through[row], through, atol=1e-5)


def test_how_a_key_is_seen(inspected: Inspected) -> None:
    for head, (query, key, _, _) in heads(inspected):
        splats = head_splats(inspected.tensors, head.layer, head.head)
        for row in (5, WINDOW, 40, len(query) - 1):
            via, far = head.via[row, : row + 1], far_keys(key[: row + 1], WINDOW, KEPT_KEYS)
            beyond = np.arange(row + 1) <= row - WINDOW
            assert (head.via[row, row + 1 :] == UNSEEN).all()
            np.testing.assert_array_equal(via == NEAR, ~beyond)
            np.testing.assert_array_equal(via == KEPT, beyond & ~far)
            assert (via == KEPT).sum() == min(KEPT_KEYS, max(0, row + 1 - WINDOW))
            for place in np.flatnonzero(far):
                alone = np.arange(row + 1) == place
                # The score of this key alone, splat by splat: everything else is taken exactly.
                _, through = row_weights(query[row], key[: row + 1], alone, None, splats)
                assert through[via[place]] >= through.max() * (1 - 1e-4)


def test_rows_sum_to_one(inspected: Inspected) -> None:
    for head in inspected.found.heads:
        for weights in (head.exact, head.weights):
            np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12)
        far = np.where(head.via >= 0, head.weights, 0).sum(axis=1)
        np.testing.assert_allclose(head.through.sum(axis=1), far, atol=1e-5)


def test_the_plane_is_that_of_the_largest_variances(inspected: Inspected) -> None:
    for head, (query, key, _, _) in heads(inspected):
        points = np.concatenate([query, key])
        variances = np.linalg.eigvalsh(np.cov(points.T))[::-1]
        np.testing.assert_allclose(head.plane.explained, variances[:2] / variances.sum(), rtol=1e-4)
        drawn = np.concatenate([head.plane.query, head.plane.key])
        np.testing.assert_allclose(drawn.var(axis=0, ddof=1), variances[:2], rtol=1e-4)
        centers = inspected.tensors[f"transformer.h.{head.layer}.attn.attention.splat_centers"][head.head]
        # Distances in the plane are at most those in all dimensions, and those along it add up.
        np.testing.assert_array_less(
            np.linalg.norm(head.plane.centers[-1] - head.plane.query[0], axis=1),
            np.linalg.norm(centers - query[0], axis=1) + 1e-4,
        )


def test_how_far_splats_have_moved(inspected: Inspected) -> None:
    assert len(inspected.found.stages) == 2
    for head in inspected.found.heads:
        log_scales = inspected.tensors[f"transformer.h.{head.layer}.attn.attention.splat_log_scales"][head.head]
        dimensions = inspected.found.config.head_dim
        np.testing.assert_allclose(head.moved, 0.25 * np.sqrt(dimensions) / np.exp(log_scales), rtol=1e-5)


def test_losses_are_those_of_the_arms(inspected: Inspected) -> None:
    """All rows of this short text are shown, so their means are those of the table."""
    found = inspected.found
    arms = {arm.name: arm.cross_entropy.value for arm in found.evaluation.arms}
    assert sum(len(row.exact) for row in found.losses) == found.evaluation.tokens
    for name, arm in (("exact", "exact"), ("splats", "hybrid")):
        mean = np.concatenate([getattr(row, name) for row in found.losses]).mean()
        np.testing.assert_allclose(mean, arms[arm], rtol=1e-5)
    extra = [np.mean(row.splats - row.exact) for row in found.losses]
    assert extra == sorted(extra, reverse=True)


def test_masses_of_all_keys_sum_to_one(inspected: Inspected) -> None:
    for head in inspected.found.diagnostics.heads:
        for kept, far in ((head.exact_kept_mass, head.exact_far_mass), (head.kept_mass, head.far_mass)):
            assert 0 <= kept <= 1 and 0 <= far <= 1 and kept + far <= 1 + 1e-5
        np.testing.assert_allclose(sum(head.shares), 1, atol=1e-5)
        used = np.array([share for share in head.shares if share])
        np.testing.assert_allclose(head.usage, np.exp(-np.sum(used * np.log(used))), rtol=1e-4)
    assert dataclasses.asdict(inspected.found.diagnostics.splats) == dataclasses.asdict(SPLATS)
