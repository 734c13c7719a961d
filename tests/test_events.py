"""Events: order, shards, splits."""

import os
import threading

import numpy as np
import polars as pl
import pytest

from behrt.events import SPLITS, SubjectSplits, is_in_order, readable, split_by_hash, subject_ranges

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


def test_the_splits_of_a_shard_are_those_of_its_subjects():
    generator = np.random.default_rng(0)
    subjects = generator.choice(1000, 300, replace=False) - 500
    numbers = generator.integers(0, 3, 300)
    table = SubjectSplits(subjects.astype(np.int64), numbers.astype(np.int8))
    expected = dict(zip(subjects.tolist(), numbers.tolist(), strict=True))
    asked = [None, *generator.integers(-600, 600, 200).tolist()]
    found = table.among(pl.Series(asked, dtype=pl.Int64))
    assert dict(found.iter_rows()) == {subject: expected[subject] for subject in asked if subject in expected}
    assert found["subject_id"].is_unique().all()
    assert table.names() == {subject: SPLITS[number] for subject, number in expected.items()}
    assert SubjectSplits(subjects[:0].astype(np.int64), numbers[:0].astype(np.int8)).among(pl.Series([1])).is_empty()


def test_subjects_in_two_splits_are_counted_wherever_their_rows_are():
    subjects, splits = np.array([5, 3, 5, 3, 4, 5], np.int64), np.array([0, 1, 2, 1, 0, 0], np.int8)
    assert SubjectSplits(subjects, splits).in_two_splits() == 1
    assert SubjectSplits(subjects[1:2], splits[1:2]).in_two_splits() == 0


def test_threads_that_read_at_the_same_time_leave_the_standard_error_where_it_was(tmp_path):
    before = os.fstat(2)
    inside, may_leave = threading.Event(), threading.Event()

    def first() -> None:
        with readable(tmp_path):
            inside.set()
            may_leave.wait(0.2)  # another thread comes in, if it can, and leaves after this one

    def second() -> None:
        inside.wait()
        with readable(tmp_path):
            may_leave.set()
            one.join(0.2)

    one, other = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    other.start()
    one.join()
    other.join()
    assert os.path.samestat(os.fstat(2), before)
