"""What `diagnose` reports, against float64 rows of attention and finite differences of the loss."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsa_jax.checkpoint import load_tensors
from gsa_jax.config import GPTNeoConfig
from gsa_jax.convert import convert
from gsa_jax.errors import InputError
from gsa_jax.fitting.diagnosis import Diagnostics, diagnose, diagnose_model, words_of
from gsa_jax.fitting.fitted import FIT_REPORT_FILE, fit_init
from gsa_jax.fitting.placing import ENTROPY_BAND
from gsa_jax.fitting.statistics import calibration_tokens, sample_rows
from gsa_jax.loss import mean_next_token_loss
from gsa_jax.parameters import build_model, without_splats
from gsa_jax.splat_config import SplatConfig
from gsa_jax.tokenizer_folder import load_tokenizer
from helpers.attention_oracle import DEAD_SHARE, head_splats, head_statistics, hf_queries_and_keys
from helpers.texts import STORIES

WINDOW, KEPT = 16, 8
SPLATS = SplatConfig(num_splats=5, window=WINDOW, kept=KEPT, layers=(1, 2), norm_gain=True, far_gain=True)


class Diagnosed(NamedTuple):
    folder: Path
    config: GPTNeoConfig
    tensors: dict[str, np.ndarray]
    ids: np.ndarray
    mask: np.ndarray
    diagnostics: Diagnostics

    def changed(self, **terms: float | np.ndarray) -> Diagnostics:
        """Of the same model with other splats: each term by its name, broadcast to its shape, in every layer."""
        tensors = dict(self.tensors)
        for name in tensors:
            term = name.rpartition(".splat_")[2]
            if ".splat_" in name and term in terms:
                tensors[name] = np.broadcast_to(terms[term], tensors[name].shape).astype(np.float32)
        return diagnose_model(build_model(self.config, tensors), self.ids, self.mask, [[]] * len(self.ids))


@pytest.fixture(scope="module")
def diagnosed(story_neo: Path, tmp_path_factory: pytest.TempPathFactory) -> Diagnosed:
    """The bundled model with fitted splats in a local and in a global layer."""
    parent = tmp_path_factory.mktemp("diagnosed")
    convert(story_neo, parent / "plain")
    fit_init(parent / "plain", parent / "fitted", STORIES, splats=SPLATS)
    config, tensors = load_tensors(parent / "fitted")
    ids, mask = calibration_tokens(parent / "fitted", STORIES, config, 4096)
    return Diagnosed(parent / "fitted", config, tensors, ids, mask, diagnose(parent / "fitted", STORIES))


@pytest.mark.slow
@pytest.mark.parity
def test_statistics_are_those_of_float64_rows(diagnosed: Diagnosed, story_neo: Path) -> None:
    sample = sample_rows(diagnosed.mask, 0)
    projections = hf_queries_and_keys(story_neo, diagnosed.ids, 4)
    heads = diagnosed.diagnostics.heads
    assert [(head.layer, head.head) for head in heads] == [(layer, head) for layer in (1, 2) for head in range(4)]
    assert (diagnosed.diagnostics.splats, diagnosed.diagnostics.tokens) == (SPLATS, int(diagnosed.mask.sum()))
    for got in heads:
        query, key = (x[:, :, got.head] for x in projections[got.layer])
        splats = head_splats(diagnosed.tensors, got.layer, got.head)
        seen = diagnosed.config.window_size if got.layer == 1 else None
        exact = head_statistics(query, key, sample, window=WINDOW, kept=KEPT, seen=seen)
        through = head_statistics(query, key, sample, window=WINDOW, kept=KEPT, splats=splats)
        np.testing.assert_allclose(
            [got.exact_entropy, got.entropy, got.exact_far_mass, got.far_mass],
            [exact.entropy, through.entropy, exact.far_mass, through.far_mass],
            atol=1e-4,
        )
        positive = through.usage[through.usage > 0]
        np.testing.assert_allclose(got.usage, np.exp(-np.sum(positive * np.log(positive))), rtol=1e-3)
        assert got.dead_splats == np.sum(through.usage < DEAD_SHARE / SPLATS.num_splats)
        np.testing.assert_allclose(got.sigma, np.exp(np.mean(splats.log_scales)), rtol=1e-5)


@pytest.mark.parity  # keys are PyTorch's
def test_words_that_are_kept_are_those_of_the_longest_keys(diagnosed: Diagnosed, story_neo: Path) -> None:
    """Token by token: which keys a head keeps is told by their norms, and for how long by counting."""
    tokenizer = load_tokenizer(diagnosed.folder)
    projections = hf_queries_and_keys(story_neo, diagnosed.ids, 4)
    for head in diagnosed.diagnostics.heads:
        kept: dict[str, list[int]] = {}
        for row, (ids, valid) in enumerate(zip(diagnosed.ids, diagnosed.mask, strict=True)):
            norms = np.square(projections[head.layer][1][row, valid, head.head]).sum(axis=-1)
            durations = np.zeros(len(norms), int)
            for query in range(WINDOW, len(norms)):
                durations[np.argsort(-norms[: query - WINDOW + 1], kind="stable")[:KEPT]] += 1
            words = words_of(tokenizer.convert_ids_to_tokens(ids[valid].tolist()))
            for word, tokens in zip(words, durations.tolist(), strict=True):
                if tokens:
                    kept.setdefault(word, []).append(tokens)
        assert len(head.kept_words) == 20
        totals = [sum(kept[word.word]) for word in head.kept_words]
        assert totals == sorted(map(sum, kept.values()), reverse=True)[:20]
        for word in head.kept_words:
            assert (word.times, word.tokens) == (len(kept[word.word]), pytest.approx(np.mean(kept[word.word])))


def test_pieces_make_words() -> None:
    pieces = [
        "<|endoftext|>",
        "Once",
        "\u0120up",
        "on",
        "\u0120a",
        "\u0120time",
        ",",
        "\u0120Li",
        "ly",
        "'",
        "s",
        "\u010a",
    ]
    words = ["<|endoftext|>", "Once", "upon", "upon", "a", "time", ",", "Lily", "Lily", "'", "s", "\\n"]
    assert words_of(pieces) == words


def test_every_head_starts_alive(diagnosed: Diagnosed) -> None:
    report = json.loads((diagnosed.folder / FIT_REPORT_FILE).read_text())
    for fit, head in zip(report["heads"], diagnosed.diagnostics.heads, strict=True):
        assert ENTROPY_BAND[0] - 1e-3 <= fit["entropy"] <= ENTROPY_BAND[1] + 1e-3
        assert not head.is_dead, head
        assert 0 < head.centers_gradient < np.inf and 0 < head.log_scales_gradient < np.inf


@pytest.mark.slow
def test_gradients_are_slopes_of_the_loss(diagnosed: Diagnosed) -> None:
    graphdef = nnx.graphdef(build_model(diagnosed.config, diagnosed.tensors))

    @jax.jit
    def loss_of(state: nnx.State) -> jax.Array:
        return mean_next_token_loss(nnx.merge(graphdef, state)(ids, mask), ids, mask)

    def loss(name: str, change: np.ndarray) -> float:
        model = build_model(diagnosed.config, diagnosed.tensors | {name: diagnosed.tensors[name] + change})
        return float(loss_of(nnx.state(model)))

    ids, mask = jnp.asarray(diagnosed.ids), jnp.asarray(diagnosed.mask)
    name = "transformer.h.2.attn.attention.splat_log_scales"
    nothing = np.zeros_like(diagnosed.tensors[name])
    np.testing.assert_allclose(diagnosed.diagnostics.loss, loss(name, nothing), rtol=1e-5)
    got = max((head for head in diagnosed.diagnostics.heads if head.layer == 2), key=lambda x: x.log_scales_gradient)
    slopes = []
    for splat in range(SPLATS.num_splats):
        step = nothing.copy()
        step[got.head, splat] = 0.02
        slopes.append((loss(name, step) - loss(name, -step)) / 0.04)
    np.testing.assert_allclose(got.log_scales_gradient, np.linalg.norm(slopes), rtol=0.03)


@pytest.mark.slow
def test_random_centers_near_zero_are_poor(diagnosed: Diagnosed) -> None:
    """Splats that are all the same tell no query from another, and without a gain little weight reaches them."""
    centers = 0.01 * np.random.default_rng(0).normal(size=(4, SPLATS.num_splats, 48))
    bare = diagnosed._replace(config=diagnosed.config.with_window(kept=0))
    fitted, poor = bare.changed(), bare.changed(centers=centers, log_scales=0.0, norm_gain=0.0, far_gain=0.0)
    assert poor.loss > fitted.loss
    for bad, good in zip(poor.heads, fitted.heads, strict=True):
        assert bad.far_mass < 0.5 * min(good.far_mass, good.exact_far_mass)
        assert bad.centers_gradient < good.centers_gradient
        assert bad.usage == pytest.approx(SPLATS.num_splats, abs=0.01)
    bad, good = (sum(head.centers_gradient for head in x.heads) for x in (poor, fitted))
    assert bad < 0.2 * good


def test_splats_out_of_reach_are_dead(diagnosed: Diagnosed) -> None:
    """Of all weights one splat gets everything; with a far gain that underflows, not even that one gets any."""
    distant = np.full((4, SPLATS.num_splats, 48), 1e3)
    distant[:, 0] = 0
    for head in diagnosed.changed(centers=distant).heads:
        assert head.dead_splats == SPLATS.num_splats - 1
        assert head.usage == pytest.approx(1)
    for head in diagnosed.changed(far_gain=-1e4).heads:
        assert (head.far_mass, head.usage, head.centers_gradient, head.log_scales_gradient) == (0, 0, 0, 0)
        assert head.dead_splats == SPLATS.num_splats and head.is_dead


def test_a_gradient_that_is_not_finite_is_dead(diagnosed: Diagnosed) -> None:
    alive = diagnosed.diagnostics.heads[0]
    assert not alive.is_dead
    assert dataclasses.replace(alive, centers_gradient=float("nan")).is_dead
    assert dataclasses.replace(alive, log_scales_gradient=float("inf")).is_dead


def test_json_has_everything(diagnosed: Diagnosed) -> None:
    values = json.loads(json.dumps(diagnosed.diagnostics.to_json()))
    assert (values["splats"]["window"], values["loss"]) == (WINDOW, diagnosed.diagnostics.loss)
    expected = [dataclasses.asdict(head) | {"is_dead": False} for head in diagnosed.diagnostics.heads]
    expected = json.loads(json.dumps(expected))
    assert values["heads"] == expected


def test_bad_input_is_refused(diagnosed: Diagnosed, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        diagnose(diagnosed.folder, tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match="no such checkpoint"):
        diagnose(tmp_path / "nothing", STORIES)
    with pytest.raises(InputError, match="longer text or a smaller window"):
        diagnose(diagnosed.folder, STORIES, window=500)
    without = build_model(*without_splats(diagnosed.config, diagnosed.tensors))
    with pytest.raises(InputError, match="no splats to diagnose"):
        diagnose_model(without, diagnosed.ids, diagnosed.mask, [])
    unused = build_model(diagnosed.config.with_window("all"), diagnosed.tensors)
    with pytest.raises(InputError, match="leaves the splats unused"):
        diagnose_model(unused, diagnosed.ids, diagnosed.mask, [])
