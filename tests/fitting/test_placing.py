"""Splats that are fitted to a model: clusters, entropies, masses and the checkpoint that holds them."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from gsa_jax.checkpoint import OWN_FILES, load, load_tensors, save
from gsa_jax.convert import convert
from gsa_jax.errors import InputError
from gsa_jax.fitting.fitted import FIT_REPORT_FILE, FitReport, fit_importance_anew, fit_init
from gsa_jax.fitting.kmeans import _lloyd_step, kmeans
from gsa_jax.fitting.placing import ENTROPY_BAND
from gsa_jax.fitting.statistics import RowSample, attended_midpoints, calibration_tokens, projections, sample_rows
from gsa_jax.parameters import attention_tensor, build_model, without_splats
from gsa_jax.splat_config import SplatConfig
from gsa_jax.tokenizer_folder import TOKENIZER_FILES, tokenizer_files
from helpers.attention_oracle import head_splats, head_statistics, hf_queries_and_keys
from helpers.bits import assert_same_tensors
from helpers.texts import STORIES

KEPT = 5
SPLATS = SplatConfig(
    num_splats=6, window=24, kept=KEPT, layers="all", log_amplitudes=True, norm_gain=True, far_gain=True
)
SEED = 3


def files_under(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


class Fitted(NamedTuple):
    source: Path
    folder: Path
    report: FitReport
    tensors: dict[str, np.ndarray]
    mask: np.ndarray
    sample: RowSample
    of_pytorch: list[tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def plain(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a checkpoint without splats."""
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    convert(story_neo, folder)
    return folder


@pytest.fixture(scope="module")
def fitted(plain: Path, story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Splats in all layers of it, and what PyTorch computes on the same tokens."""
    folder = tmp_path_factory.mktemp("fitted") / "checkpoint"
    report = fit_init(plain, folder, STORIES, splats=SPLATS, seed=SEED)
    config, tensors = load_tensors(folder)
    ids, mask = calibration_tokens(plain, STORIES, config, 32768)
    of_pytorch = hf_queries_and_keys(story_neo, ids, config.num_heads)
    return Fitted(plain, folder, report, tensors, mask, sample_rows(mask, SEED), of_pytorch)


def test_kmeans_finds_separated_clusters() -> None:
    draws = np.random.default_rng(0)
    means = 20 * draws.normal(size=(2, 5, 6)) + 100  # far from the origin: nothing may be lost to large norms
    points = (means[:, :, None] + draws.normal(size=(2, 5, 40, 6))).astype(np.float32)
    centers, inertia = kmeans(jax.random.key(0), jnp.asarray(points.reshape(2, 200, 6)), 5)
    wide = points.astype(np.float64)
    expected = wide.mean(axis=2)
    for head in range(2):
        order = [int(np.argmin(np.sum((np.asarray(centers[head]) - mean) ** 2, axis=1))) for mean in expected[head]]
        assert sorted(order) == [0, 1, 2, 3, 4]
        np.testing.assert_allclose(centers[head][np.array(order)], expected[head], rtol=1e-5)
    squared = np.sum((wide - expected[:, :, None]) ** 2, axis=-1).mean(axis=(1, 2))
    np.testing.assert_allclose(inertia, squared, rtol=1e-3)


def test_kmeans_is_as_good_as_scipy() -> None:
    draws = np.random.default_rng(1)
    points = (draws.normal(size=(2000, 8)) * draws.gamma(2.0, size=(2000, 1))).astype(np.float32)
    centers, inertia = kmeans(jax.random.key(1), jnp.asarray(points[None]), 16)

    def mean_squared(found: np.ndarray) -> float:
        return float(np.min(np.sum((points[:, None].astype(np.float64) - found) ** 2, axis=-1), axis=1).mean())

    scipy_best = min(mean_squared(kmeans2(points, 16, iter=30, minit="++", seed=seed)[0]) for seed in range(3))
    assert mean_squared(np.asarray(centers[0])) <= 1.05 * scipy_best
    np.testing.assert_allclose(inertia[0], mean_squared(np.asarray(centers[0])), rtol=1e-4)


def test_empty_clusters_move_to_the_farthest_points() -> None:
    points = jnp.array([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [0.0, 9.0]])
    centers = _lloyd_step(points, jnp.array([[100.0, 0.0], [0.0, 0.0], [-100.0, 0.0]]))
    np.testing.assert_allclose(centers, [[0.0, 9.0], [5.1 / 4, 9.0 / 4], [5.0, 0.0]], rtol=1e-6)


def test_identical_points_make_finite_centers() -> None:
    centers, inertia = kmeans(jax.random.key(0), jnp.ones((1, 8, 3)), 4)
    np.testing.assert_array_equal(centers, np.ones((1, 4, 3)))
    np.testing.assert_array_equal(inertia, [0.0])


def test_fewer_points_than_clusters_are_refused() -> None:
    with pytest.raises(InputError, match="3 points cannot make 4 clusters"):
        kmeans(jax.random.key(0), jnp.ones((1, 3, 2)), 4)


def test_midpoints_are_of_pairs_that_attend_to_one_another() -> None:
    """Each query is so close to one key that exact attention sees no other, or, if it may not see it, any it may."""
    draws = np.random.default_rng(2)
    keys = 20 * np.eye(6)[None, :, None] + draws.normal(size=(1, 6, 2, 6))
    wanted = draws.integers(0, 6, (6, 2))
    query = np.eye(6)[wanted][None] * 20
    mask = np.array([[True] * 5 + [False]])
    arrays = (jnp.asarray(x, jnp.float32) for x in (query, keys))
    midpoints = attended_midpoints(jax.random.key(0), *arrays, mask, seen=3)
    partners = 2 * np.asarray(midpoints) - query
    for row, head in np.ndindex(5, 2):
        found = int(np.argmin(np.abs(keys[0, :, head] - partners[0, row, head]).sum(axis=1)))
        np.testing.assert_allclose(partners[0, row, head], keys[0, found, head], atol=1e-4)
        assert max(row - 2, 0) <= found <= row
        if max(row - 2, 0) <= wanted[row, head] <= row:
            assert found == wanted[row, head]


@pytest.mark.parity
def test_queries_and_keys_are_those_of_pytorch(fitted: Fitted) -> None:
    config, tensors = load_tensors(fitted.folder)
    ids, mask = calibration_tokens(fitted.folder, STORIES, config, 32768)
    assert mask.sum() == fitted.report.tokens > 200 and not mask.all()
    model = build_model(*without_splats(config, tensors))
    collected = list(projections(model, ids, mask, config.splat_layers))
    assert [layer for layer, _ in collected] == [0, 1, 2, 3]
    for layer, ours in collected:
        for got, expected in zip(ours[:2], fitted.of_pytorch[layer], strict=True):
            np.testing.assert_allclose(np.asarray(got)[mask], expected[mask], atol=2e-4)


@pytest.mark.parity  # the fixture has PyTorch's queries and keys
def test_scales_reach_the_entropy_of_exact_attention(fitted: Fitted) -> None:
    config, _ = load_tensors(fitted.folder)
    assert [(head.layer, head.head) for head in fitted.report.heads] == [(n, h) for n in range(4) for h in range(4)]
    for fit in fitted.report.heads:
        query, key = (x[:, :, fit.head] for x in fitted.of_pytorch[fit.layer])
        splats = head_splats(fitted.tensors, fit.layer, fit.head)
        assert len(set(splats.log_scales)) == 1
        np.testing.assert_allclose(np.exp(splats.log_scales[0]), fit.sigma, rtol=1e-5)
        seen = config.window_size if config.attention_layers[fit.layer] == "local" else None
        exact = head_statistics(query, key, fitted.sample, window=0, seen=seen)
        pure = head_statistics(query, key, fitted.sample, window=0, splats=splats)
        np.testing.assert_allclose(fit.teacher_entropy, exact.entropy, atol=1e-4)
        np.testing.assert_allclose(fit.entropy, pure.entropy, atol=1e-4)
        np.testing.assert_allclose(pure.entropy, np.clip(exact.entropy, *ENTROPY_BAND), atol=1e-3)
        assert fit.entropy_target == pytest.approx(np.clip(fit.teacher_entropy, *ENTROPY_BAND))


@pytest.mark.parity  # the fixture has PyTorch's queries and keys
def test_far_gains_give_far_keys_their_exact_mass(fitted: Fitted) -> None:
    assert SPLATS.window is not None
    config, _ = load_tensors(fitted.folder)
    far_rows = float((fitted.sample.rows >= SPLATS.window + KEPT).mean())
    for fit in fitted.report.heads:
        query, key = (x[:, :, fit.head] for x in fitted.of_pytorch[fit.layer])
        seen = config.window_size if config.attention_layers[fit.layer] == "local" else None
        exact = head_statistics(query, key, fitted.sample, window=SPLATS.window, kept=KEPT, seen=seen)
        splats = head_splats(fitted.tensors, fit.layer, fit.head)
        hybrid = head_statistics(query, key, fitted.sample, window=SPLATS.window, kept=KEPT, splats=splats)
        assert fit.far_gain == pytest.approx(float(splats.far_gain))
        wanted = np.clip(exact.far_mass, 0.01 * far_rows, 0.99 * far_rows)
        np.testing.assert_allclose(hybrid.far_mass, wanted, atol=1e-3)


@pytest.mark.parity  # the fixture has PyTorch's queries and keys
def test_all_but_the_splats_is_kept(fitted: Fitted) -> None:
    config, tensors = load_tensors(fitted.folder)
    source_config, source = load_tensors(fitted.source)
    assert config == dataclasses.replace(source_config, splats=SPLATS)
    assert_same_tensors({name: tensor for name, tensor in tensors.items() if ".splat_" not in name}, source)
    for layer in range(4):
        prefix = f"transformer.h.{layer}.attn.attention.splat_"
        assert not tensors[prefix + "log_amplitudes"].any()
        quarters = np.exp(-2 * tensors[prefix + "log_scales"][:, 0]) / 4
        np.testing.assert_allclose(tensors[prefix + "norm_gain"], quarters, rtol=1e-5)
    copied = [name for name in (*TOKENIZER_FILES, *OWN_FILES) if (fitted.source / name).exists()]
    assert "tokenizer.json" in copied and "conversion.json" in copied
    for name in copied:
        assert (fitted.folder / name).read_bytes() == (fitted.source / name).read_bytes()
    saved = json.loads((fitted.folder / FIT_REPORT_FILE).read_text())
    assert saved == json.loads(json.dumps(dataclasses.asdict(fitted.report)))
    assert (saved["text"], saved["seed"], saved["tokens"]) == ("stories.txt", SEED, int(fitted.mask.sum()))
    load(fitted.folder)


@pytest.mark.slow
def test_same_seed_same_bits_other_seed_other_splats(fitted: Fitted, tmp_path: Path) -> None:
    """The source has splats this time: they are replaced, and their configuration is kept."""
    report = fit_init(fitted.folder, tmp_path / "again", STORIES, seed=SEED)
    assert report == fitted.report
    assert_same_tensors(load_tensors(tmp_path / "again")[1], fitted.tensors)
    fit_init(fitted.folder, tmp_path / "other", STORIES, seed=SEED + 1)
    name = "transformer.h.0.attn.attention.splat_centers"
    assert not np.array_equal(load_tensors(tmp_path / "other")[1][name], fitted.tensors[name])


@pytest.mark.slow
def test_importance_alone_is_learned_for_the_splats_that_are_there(plain: Path, tmp_path: Path) -> None:
    """Splats of another seed than the importance: the same as if both had been fitted with either, and nothing else
    changes. Another number of kept keys may be asked for, other splats may not."""
    splats = dataclasses.replace(SPLATS, layers=(0,), importance="learned")
    by_norm = fit_init(plain, tmp_path / "norm", STORIES, splats=dataclasses.replace(splats, importance="norm"))
    report = fit_importance_anew(tmp_path / "norm", tmp_path / "anew", STORIES)
    assert (report.splats, report.heads, report.tokens) == (splats, (), by_norm.tokens)
    config, tensors = load_tensors(tmp_path / "anew")
    assert config.splats == splats
    name = attention_tensor(0, "splat_importance")
    weights = tensors.pop(name)
    assert_same_tensors(tensors, load_tensors(tmp_path / "norm")[1])

    at_once = fit_init(plain, tmp_path / "at-once", STORIES, splats=dataclasses.replace(splats, far_gain=False))
    assert [head.nothing_kept for head in report.importances] != [head.nothing_kept for head in at_once.importances]
    again = fit_importance_anew(tmp_path / "at-once", tmp_path / "again", STORIES)
    assert again.importances == at_once.importances  # with the splats that it was first learned for
    np.testing.assert_array_equal(
        load_tensors(tmp_path / "again")[1][name], load_tensors(tmp_path / "at-once")[1][name]
    )

    fewer = fit_importance_anew(
        tmp_path / "anew", tmp_path / "fewer", STORIES, splats=dataclasses.replace(splats, kept=2)
    )
    assert [head.nothing_kept for head in fewer.importances] == [head.nothing_kept for head in report.importances]
    assert all(a.norm > b.norm for a, b in zip(fewer.importances, report.importances, strict=True))
    np.testing.assert_array_equal(load_tensors(tmp_path / "fewer")[1][name], weights)

    before = files_under(tmp_path)
    for folder, asked, words in (
        (plain, None, "has no splats"),
        (tmp_path / "anew", dataclasses.replace(splats, kept=0), "--kept"),
        (tmp_path / "anew", dataclasses.replace(splats, num_splats=3), "other splats"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            fit_importance_anew(folder, tmp_path / "out", STORIES, splats=asked)
        assert "\n" not in str(refused.value)
    assert files_under(tmp_path) == before


@pytest.mark.parametrize(
    "case",
    [
        "no text",
        "short text",
        "no checkpoint",
        "unconverted",
        "damaged",
        "out exists",
        "no splats",
        "not finite",
        "seed",
    ],
)
def test_bad_input_leaves_nothing(case: str, plain: Path, story_neo: Path, tmp_path: Path) -> None:
    folder, text, out, splats = plain, STORIES, tmp_path / "out", SPLATS
    words = {
        "no text": "nowhere.txt",
        "short text": "points cannot make 6 clusters",
        "no checkpoint": "no such checkpoint",
        "unconverted": "gsa convert",
        "damaged": "damaged checkpoint",
        "out exists": "exists already",
        "no splats": "num_splats = 0",
        "not finite": "not finite",
        "seed": "seed = -1: must be a whole number from 0",
    }[case]
    if case == "no text":
        text = tmp_path / "nowhere.txt"
    elif case == "short text":
        text = tmp_path / "short.txt"
        text.write_text("a", encoding="utf-8")
    elif case == "no checkpoint":
        folder = tmp_path / "nothing"
    elif case == "unconverted":
        folder = story_neo
    elif case == "damaged":
        folder = tmp_path / "damaged"
        shutil.copytree(plain, folder)
        for file in (folder / "weights").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    elif case == "out exists":
        out.mkdir()
    elif case == "no splats":
        splats = SplatConfig(num_splats=0, window=8)
    elif case == "not finite":
        folder = tmp_path / "infinite"
        config, tensors = load_tensors(plain)
        name = "transformer.h.0.attn.attention.q_proj.weight"
        infinite = tensors | {name: np.full_like(tensors[name], np.inf)}
        save(folder, config, infinite, copied=tokenizer_files(plain))
    before = files_under(tmp_path)
    with pytest.raises(InputError, match=words) as refused:
        fit_init(folder, out, text, splats=splats, seed=-1 if case == "seed" else 0)
    assert "\n" not in str(refused.value)
    assert files_under(tmp_path) == before
