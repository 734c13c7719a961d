"""The lines that a loss is read against."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from behrt.metrics import (
    chance_loss,
    closed_gap,
    unigram,
    unigram_loss_and_accuracy,
    wilson_interval,
)


def test_chance_is_what_the_guide_calls_random_guessing():
    assert chance_loss(1000) == math.log(1000)
    assert round(chance_loss(1000), 1) == 6.9


def test_the_unigram_is_a_distribution_over_ordinary_codes_that_orders_them_by_count():
    train = np.array([1, 2, 3, 4, 5, 7, 7, 7, 8, 8], dtype=np.int32)
    log_probabilities = unigram(train, 10)
    assert np.isneginf(log_probabilities[:5]).all()
    assert np.exp(log_probabilities).sum() == pytest.approx(1, abs=1e-12)
    assert np.exp(log_probabilities[5:]).tolist() == pytest.approx([2 / 11, 1 / 11, 4 / 11, 3 / 11, 1 / 11])


def test_on_its_own_counts_the_unigram_loss_is_their_entropy():
    """Statistically: 100,000 tokens of a known distribution."""
    probabilities = np.random.default_rng(0).dirichlet(np.ones(50))
    codes = (5 + np.random.default_rng(1).choice(50, size=200_000, p=probabilities)).astype(np.int32)
    loss, accuracy = unigram_loss_and_accuracy(unigram(codes[:100_000], 55), codes[100_000:])
    assert loss == pytest.approx(-(probabilities * np.log(probabilities)).sum(), abs=0.02)
    assert accuracy == pytest.approx(probabilities.max(), abs=0.005)


def test_the_unigram_gives_codes_unseen_in_training_a_finite_loss():
    loss, _ = unigram_loss_and_accuracy(unigram(np.array([5] * 98, dtype=np.int32), 7), np.array([6], dtype=np.int32))
    assert loss == pytest.approx(math.log(100))


def test_a_special_token_is_never_scored():
    with pytest.raises(AssertionError, match="special"):
        unigram_loss_and_accuracy(unigram(np.array([5], dtype=np.int32), 7), np.array([1], dtype=np.int32))


def test_nothing_scored_has_no_loss():
    scores = unigram_loss_and_accuracy(unigram(np.array([5], dtype=np.int32), 7), np.array([], dtype=np.int32))
    assert all(map(math.isnan, scores))


@pytest.mark.parametrize(("loss", "share"), [(6.0, 0.0), (3.0, 1.0), (4.5, 0.5), (7.5, -0.5)])
def test_the_closed_gap_runs_from_counting_to_the_floor(loss, share):
    assert closed_gap(loss, unigram_loss=6.0, floor_loss=3.0) == pytest.approx(share)


def test_without_a_gap_nothing_can_be_closed():
    assert math.isnan(closed_gap(6.9, unigram_loss=6.9, floor_loss=6.9))
    assert math.isnan(closed_gap(6.9, unigram_loss=6.9, floor_loss=math.nan))


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (1, 3000), (750, 3000), (10, 10)])
def test_the_wilson_interval_equals_scipys(hits, total):
    expected = binomtest(hits, total).proportion_ci(method="wilson")
    assert wilson_interval(hits, total, z=1.959963984540054) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_wilson_interval_of_nothing_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)
