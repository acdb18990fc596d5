"""Measures and their intervals, on losses that are made up."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from gsa_jax.evaluation.intervals import Sums, bucket_firsts, estimates, sum_by_document
from gsa_jax.text import TextRows

DOCUMENTS = 40


def made_up_sums() -> Sums:
    """Documents of very different difficulty, on which arms differ by a constant per token; two buckets."""
    random = np.random.default_rng(0)
    tokens = random.integers(20, 60, (DOCUMENTS, 2))
    exact = tokens * random.uniform(1, 4, (DOCUMENTS, 1))
    extra = {"exact": 0.0, "hybrid": 0.025, "without-splats": 0.05, "window-only": 0.1, "none": 1.0}
    nats = {arm: exact + tokens * more for arm, more in extra.items()}
    nats["none"] = nats["none"] + random.normal(0, 5, exact.shape)
    return Sums(random.integers(100, 200, DOCUMENTS), tokens, nats)


def test_point_estimates_are_those_of_all_documents() -> None:
    sums = made_up_sums()
    found = estimates(sums)
    for arm, nats in sums.nats.items():
        mean = nats.sum() / sums.tokens.sum()
        assert found["cross_entropy", arm].value == pytest.approx(mean)
        assert found["perplexity", arm].value == pytest.approx(math.exp(mean))
        assert found["bits_per_byte", arm].value == pytest.approx(nats.sum() / math.log(2) / sums.size.sum())
        ratio = math.exp(mean - sums.nats["exact"].sum() / sums.tokens.sum())
        assert found["perplexity_ratio", arm].value == pytest.approx(ratio)
        for bucket in range(2):
            mean = nats[:, bucket].sum() / sums.tokens[:, bucket].sum()
            assert found["cross_entropy", arm, bucket].value == pytest.approx(mean)


def test_intervals_hold_the_estimate_and_come_out_the_same_again() -> None:
    found = estimates(made_up_sums())
    for key, estimate in found.items():
        assert estimate.interval is not None, key
        low, high = estimate.interval
        assert low - 1e-12 <= estimate.value <= high + 1e-12, key
    assert found == estimates(made_up_sums())


def test_intervals_are_those_of_a_paired_bootstrap_over_documents() -> None:
    """scipy pairs the samples itself when they are given to it one by one; another seed gives other resamples."""
    sums = made_up_sums()
    tokens = sums.tokens.sum(axis=1)
    samples = (sums.nats["none"].sum(axis=1), sums.nats["exact"].sum(axis=1), tokens)
    expected = scipy.stats.bootstrap(
        samples,
        lambda arm, exact, tokens, axis: np.exp((arm - exact).sum(axis) / tokens.sum(axis)),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = estimates(sums)["perplexity_ratio", "none"].interval
    assert found == pytest.approx(tuple(expected), abs=0.15 * (expected.high - expected.low))


def test_how_hard_documents_are_does_not_blur_ratios() -> None:
    found = estimates(made_up_sums())
    low, high = found["perplexity", "hybrid"].interval
    assert high / low > 1.2
    assert found["perplexity_ratio", "hybrid"].interval == pytest.approx((math.exp(0.025),) * 2)


def test_bits_per_byte_count_the_bytes_of_the_documents_drawn(unchecked) -> None:
    """Where a document has as many bytes as nats, no resample changes the ratio of the two."""
    sums = made_up_sums()
    found = estimates(dataclasses.replace(sums, size=sums.nats["exact"].sum(axis=1)))["bits_per_byte", "exact"]
    assert found.interval == pytest.approx((1 / math.log(2),) * 2)


def test_share_of_the_gap_that_is_closed() -> None:
    sums = made_up_sums()
    for control, share in (("window-only", 0.75), ("without-splats", 0.5)):
        closed = estimates(sums)["gap_closed", control]
        assert closed.value == pytest.approx(share) and closed.interval == pytest.approx((share, share))
        for gap in (0.0, -0.1):
            nats = sums.nats | {control: sums.nats["exact"] + gap * sums.tokens}
            assert ("gap_closed", control) not in estimates(dataclasses.replace(sums, nats=nats))
    assert ("gap_closed", "without-kept") not in estimates(sums), "no such arm"


def test_one_document_has_no_interval() -> None:
    sums = made_up_sums()
    one = Sums(sums.size[:1], sums.tokens[:1], {arm: nats[:1] for arm, nats in sums.nats.items()})
    assert {estimate.interval for estimate in estimates(one).values()} == {None}


def test_a_position_that_one_document_reaches_has_no_interval() -> None:
    sums = made_up_sums()
    reached = np.ones((DOCUMENTS, 2), int)
    reached[1:, 1] = 0
    nats = {arm: nats * reached for arm, nats in sums.nats.items()}
    found = estimates(dataclasses.replace(sums, tokens=sums.tokens * reached, nats=nats))
    assert found["perplexity_ratio", "hybrid", 1].value == pytest.approx(math.exp(0.025))
    assert found["perplexity_ratio", "hybrid", 1].interval is None
    assert found["perplexity_ratio", "hybrid", 0].interval is not None


@pytest.mark.parametrize(
    ("context", "firsts"),
    [(2, [1]), (64, [1]), (65, [1, 64]), (128, [1, 64]), (512, [1, 64, 128, 256]), (600, [1, 64, 128, 256, 512])],
)
def test_buckets_double(context: int, firsts: list[int]) -> None:
    assert bucket_firsts(context) == firsts


def test_losses_go_to_their_document_and_position() -> None:
    """A loop over single tokens is the oracle; what padding is said to cost must not count."""
    random = np.random.default_rng(0)
    lengths, document = np.array([130, 130, 9, 64, 65]), np.array([0, 0, 0, 1, 2])
    mask = np.arange(130) < lengths[:, None]
    losses = random.uniform(0, 5, (5, 129)).astype(np.float32)
    losses[~mask[:, 1:]] = 100
    sums = sum_by_document(
        ["é" * 5, "b", "c"], TextRows(np.zeros(mask.shape, np.int32), mask, document), {"exact": losses}
    )
    tokens, nats = np.zeros((3, 3), int), np.zeros((3, 3))
    for row, length in enumerate(lengths):
        for position in range(1, length):
            bucket = (position >= 64) + (position >= 128)
            tokens[document[row], bucket] += 1
            nats[document[row], bucket] += losses[row, position - 1]
    np.testing.assert_array_equal(sums.tokens, tokens)
    np.testing.assert_allclose(sums.nats["exact"], nats, rtol=1e-12)
    assert sums.size.tolist() == [10, 1, 1]
