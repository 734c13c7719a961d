"""Events: order, shards, splits."""

import numpy as np
import polars as pl
import pytest

from behrt.events import is_in_order, split_by_hash, subject_ranges

from .small_records import day, events

SHARES = (0.8, 0.1, 0.1)


@pytest.mark.parametrize("step", [1, 10, 1024, -7])
def test_splits_by_hash_have_their_shares_whatever_the_pattern_of_ids(step):
    splits = split_by_hash(10_000_032 + step * np.arange(100_000), SHARES, seed=0)
    shares = np.bincount(splits, minlength=3) / len(splits)
    assert shares == pytest.approx(SHARES, abs=5 * 0.4 / np.sqrt(len(splits)))  # five standard errors


def test_a_subject_keeps_its_split_when_others_leave():
    subjects = np.arange(1000)
    everyone = split_by_hash(subjects, SHARES, seed=3)
    assert (split_by_hash(subjects[::7], SHARES, seed=3) == everyone[::7]).all()
    assert (split_by_hash(subjects, SHARES, seed=4) != everyone).any()


def test_no_patient_is_in_a_split_of_zero_percent():
    assert set(split_by_hash(np.arange(10_000), (0.9, 0.0, 0.1), seed=0).tolist()) == {0, 2}


def test_subject_ranges_hold_every_subject_once_and_are_bounded():
    generator = np.random.default_rng(0)
    counts = pl.DataFrame(
        {"subject_id": np.sort(generator.choice(10_000, 500, replace=False)), "events": generator.integers(1, 50, 500)}
    )
    ranges = subject_ranges(counts, max_events=200)
    held = [counts.filter(pl.col("subject_id").is_between(low, high)) for low, high in ranges]
    assert pl.concat(held).equals(counts)
    assert max(part["events"].sum() for part in held) <= 200 + 49
    assert len(ranges) > 10


def test_order_means_by_subject_then_time_with_static_events_first():
    ordered = events((1, None, "A"), (1, day(0), "B"), (1, day(0), "A"), (2, None, "A"), (2, day(-5), "A"))
    assert is_in_order(ordered)
    assert is_in_order(ordered.head(0))
    for rows in ([1, 0, 2, 3, 4], [3, 4, 0, 1, 2], [0, 1, 2, 4, 3]):
        assert not is_in_order(ordered[rows])
    assert not is_in_order(events((1, day(1), "A"), (1, day(0), "A")))
