"""The lines that a loss is read against."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from behrt.config import SHOWN_AS_MASK, SHOWN_AS_RANDOM
from behrt.floor import exact_floor
from behrt.masking import mask_tokens
from behrt.metrics import (
    chance_loss,
    closed_gap,
    copying_loss,
    unigram,
    unigram_loss_and_accuracy,
    wilson_interval,
)
from behrt.population import Population


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


def test_the_copying_loss_equals_bayes_rule_by_enumeration():
    """The posterior of the truth given what is shown, from the joint table of truths and what they are shown as."""
    log_p = unigram(np.array([5] * 6 + [6] * 3 + [7], dtype=np.int32), 9)
    p, mask, ordinary = np.exp(log_p[5:]), 4, 4
    joint = np.zeros((ordinary, 9))  # [truth, shown]
    for truth in range(ordinary):
        joint[truth, mask] += p[truth] * SHOWN_AS_MASK
        joint[truth, 5 + truth] += p[truth] * (1 - SHOWN_AS_MASK - SHOWN_AS_RANDOM)
        for replacement in range(ordinary):
            joint[truth, 5 + replacement] += p[truth] * SHOWN_AS_RANDOM / ordinary
    posterior = joint / np.maximum(joint.sum(axis=0), 1e-300)
    for truth in range(ordinary):
        for shown in (mask, *range(5, 9)):
            found = copying_loss(log_p, np.array([5 + truth], np.int32), np.array([shown], np.int32))
            assert found == pytest.approx(-math.log(posterior[truth, shown]), abs=1e-12)


def test_no_predictor_that_knows_only_frequencies_and_what_is_shown_is_better_than_copying():
    """Statistically: the entropy of the truth given what is shown, counted over a million tokens."""
    p = np.random.default_rng(0).dirichlet(np.ones(6))
    codes = (5 + np.random.default_rng(1).choice(6, size=1_000_000, p=p)).astype(np.int32)
    shown, scored = mask_tokens(codes, vocab_size=11, generator=np.random.default_rng(2))
    counted = np.zeros((11, 11))
    np.add.at(counted, (shown[scored], codes[scored]), 1)
    best = (
        -(counted * np.log(np.maximum(counted, 1) / np.maximum(counted.sum(1, keepdims=True), 1))).sum() / scored.sum()
    )
    log_p = unigram(codes, 11)
    assert copying_loss(log_p, codes[scored], shown[scored]) == pytest.approx(best, abs=2e-3)
    assert unigram_loss_and_accuracy(log_p, codes[scored])[0] > best + 0.05


@pytest.mark.parametrize("shares", [np.full(12, 1 / 12), np.arange(1, 13) / 78], ids=["uniform", "uneven"])
def test_where_codes_are_independent_copying_is_the_exact_floor(shares):
    """A hidden Markov model of one state has nothing but frequencies."""
    one_state = Population(
        codes=tuple("abcdefghijkl"),
        profiles=("p",),
        stages=("s",),
        prior=np.ones(1),
        initial=np.ones((1, 1)),
        transition=np.ones((1, 1, 1)),
        emission=shares.reshape(1, 1, 12),
    )
    generator = np.random.default_rng(0)
    codes = (5 + generator.choice(12, size=(300, 10), p=shares)).astype(np.int32)
    codes[:, 0], codes[:, -1] = 2, 3
    visits = np.tile([0, *[1] * 9], 300).astype(np.int32)
    codes = codes.ravel()
    shown, scored = mask_tokens(codes, vocab_size=17, generator=generator)
    floor = exact_floor(
        one_state,
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *one_state.codes],
        codes=codes,
        shown=shown,
        scored=scored,
        visits=visits,
        offsets=np.arange(0, 3001, 10),
    )
    log_p = np.concatenate([np.full(5, -np.inf), np.log(shares)])
    assert copying_loss(log_p, codes[scored], shown[scored]) == pytest.approx(floor.loss, abs=1e-9)
    assert unigram_loss_and_accuracy(log_p, codes[scored])[0] > floor.loss + 0.05


def test_nothing_scored_has_no_copying_loss():
    empty = np.array([], dtype=np.int32)
    assert math.isnan(copying_loss(unigram(empty, 9), empty, empty))


@pytest.mark.parametrize("shown", [0, 1, 2, 3])
def test_a_scored_token_is_never_shown_as_another_special_token(shown):
    with pytest.raises(AssertionError, match="special"):
        copying_loss(unigram(np.array([5], np.int32), 7), np.array([5], np.int32), np.array([shown], np.int32))


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
