"""Which discharges are followed by a readmission, by rules that are written down?"""

from datetime import datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt.prepare_options import PrepareOptions
from behrt.tasks.readmission import readmissions
from behrt.tasks.task_options import ReadmissionOptions
from behrt.tasks.timelines import timelines

from .small_records import DEATH, day, events
from .small_tasks import label, stay


def test_a_stay_within_30_days_is_a_readmission_and_the_last_stay_has_none() -> None:
    labels, _ = label("readmission", *stay(0, 5), *stay(20, 22))
    assert labels == [(5, True), (22, False)]


@pytest.mark.parametrize(("days", "expected"), [(30, True), (31, False)])
def test_the_thirtieth_day_counts_and_the_next_does_not(days: int, expected: bool) -> None:
    labels, _ = label("readmission", *stay(0, 5), *stay(5 + days, 5 + days + 1))
    assert labels[0] == (5, expected)


def test_hours_do_not_move_a_day() -> None:
    late, early = 0.49, -0.49  # of noon: 23:45 and 00:14
    assert label("readmission", *stay(0, 5 + early), *stay(35 + late, 36))[0][0][1]
    assert not label("readmission", *stay(0, 5 + late), *stay(36 + early, 37))[0][0][1]


def test_an_admission_on_the_day_of_discharge_is_the_same_stay() -> None:
    labels, counts = label("readmission", *stay(0, 5), *stay(5.2, 9))
    assert labels == [(9, False)]
    assert counts["moments"] == 1


def test_an_admission_on_the_day_after_is_another_stay() -> None:
    assert label("readmission", *stay(0, 5), *stay(6, 9))[0] == [(5, True), (9, False)]


def test_a_stay_inside_another_ends_nothing() -> None:
    labels, _ = label("readmission", *stay(0, 20), *stay(3, 4), *stay(19, 21))
    assert labels == [(21, False)]


def test_a_chain_of_transfers_is_one_stay() -> None:
    labels, _ = label("readmission", *stay(0, 2), *stay(2, 4), *stay(4, 6), *stay(10, 11))
    assert labels == [(6, True), (11, False)]


def test_death_within_the_window_without_a_readmission_leaves_no_label() -> None:
    labels, counts = label("readmission", *stay(0, 5), (1, day(25), DEATH))
    assert labels == []
    assert counts["died_within_the_window"] == 1


def test_death_after_a_readmission_does_not_undo_it() -> None:
    labels, _ = label("readmission", *stay(0, 5), *stay(20, 22), (1, day(23), DEATH))
    assert labels == [(5, True)]


def test_death_after_the_window_leaves_a_negative() -> None:
    assert label("readmission", *stay(0, 5), (1, day(36), DEATH))[0] == [(5, False)]


def test_a_stay_with_death_in_hospital_is_no_index_but_is_a_readmission() -> None:
    labels, counts = label("readmission", *stay(0, 5), *stay(20, 22), (1, day(22), DEATH))
    assert labels == [(5, True)]
    assert counts["on_or_after_the_day_of_death"] == 1


def test_a_date_of_death_at_midnight_is_the_day_of_the_discharge() -> None:
    midnight = day(22).replace(hour=0)
    labels, counts = label("readmission", *stay(0, 5), *stay(20, 22), (1, midnight, DEATH))
    assert labels == [(5, True)]
    assert counts["on_or_after_the_day_of_death"] == 1


def test_a_discharge_that_says_death_is_one_without_a_death_event() -> None:
    labels, counts = label("readmission", *stay(0, 5, to="DIED"))
    assert labels == []
    assert counts["stays_that_ended_in_death"] == 1


def test_a_planned_stay_is_no_readmission_and_hides_what_follows_it() -> None:
    rows = [*stay(0, 5), *stay(10, 12, kind="ELECTIVE"), *stay(20, 21)]
    assert label("readmission", *rows)[0] == [(5, True), (12, True), (21, False)]
    planned, counts = label("readmission", *rows, planned=("ADMISSION//ELECTIVE",))
    assert planned == [(5, False), (12, True), (21, False)]
    assert counts["planned_readmissions"] == 1


def test_a_stay_is_planned_if_its_first_admission_is_whatever_its_transfers_are() -> None:
    first, later = [*stay(10, 12, kind="ELECTIVE"), *stay(12, 14)], [*stay(10, 12), *stay(12, 14, kind="ELECTIVE")]
    assert label("readmission", *stay(0, 5), *first, planned=("ADMISSION//ELECTIVE",))[0][0] == (5, False)
    assert label("readmission", *stay(0, 5), *later, planned=("ADMISSION//ELECTIVE",))[0][0] == (5, True)


def test_death_after_a_transfer_ends_the_whole_stay() -> None:
    labels, counts = label("readmission", *stay(0, 2), *stay(2, 5, to="EXPIRED"))
    assert labels == []
    assert counts["stays_that_ended_in_death"] == 1


def test_a_record_that_ends_within_the_window_is_no_negative_where_that_is_asked_for() -> None:
    rows = [*stay(0, 5), *stay(100, 101)]
    assert label("readmission", *rows, observed_until="last-event")[0] == [(5, False)]
    assert label("readmission", *rows, observed_until=day(130).date())[0] == [(5, False)]
    assert label("readmission", *rows, observed_until=day(131).date())[0] == [(5, False), (101, False)]


def test_visits_without_an_admission_are_neither_index_nor_readmission() -> None:
    rows = [*stay(0, 5), (1, day(10), "VISIT", None, "v"), *stay(60, 61)]
    assert label("readmission", *rows)[0] == [(5, False), (61, False)]
    assert label("readmission", *rows, stays="visits")[0] == [(5, True), (10, False), (61, False)]


# An independent account, day by day in plain Python, over random histories.


def by_hand(stays: list[tuple[int, int]], death: int | None, horizon: int) -> dict[int, bool]:
    """Labels by the last day of each stay, from days of admission and discharge."""
    in_hospital: list[tuple[int, int]] = []
    for begin, end in sorted(stays):
        if in_hospital and begin <= in_hospital[-1][1]:
            in_hospital[-1] = (in_hospital[-1][0], max(end, in_hospital[-1][1]))
        else:
            in_hospital.append((begin, end))
    found = {}
    for _, end in in_hospital:
        if death is not None and death <= end:
            continue
        again = any(end < begin <= end + horizon for begin, _ in in_hospital)
        if again or death is None or death > end + horizon:
            found[end] = again
    return found


histories = st.lists(
    st.tuples(st.integers(0, 90), st.integers(0, 15)), min_size=1, max_size=6, unique_by=lambda s: s[0]
)


@settings(max_examples=60, deadline=None)
@given(
    stays=histories, death=st.none() | st.integers(0, 150), horizon=st.sampled_from([7, 30]), hours=st.integers(0, 23)
)
def test_labels_are_those_of_an_account_day_by_day(
    stays: list[tuple[int, int]], death: int | None, horizon: int, hours: int
) -> None:
    spans = [(begin, begin + length) for begin, length in stays if death is None or begin + length <= death]
    if not spans:
        return
    rows = [row for begin, end in spans for row in stay(begin, end)]
    if death is not None:
        rows.append((1, day(death).replace(hour=0), DEATH))
    # neither the order of the rows nor hours of admissions matter
    shuffled = np.random.default_rng(hours).permutation(len(rows))
    table = events(*(rows[place] for place in shuffled), visit_id=True).with_columns(
        pl.when(pl.col("code").str.starts_with("ADMISSION"))
        .then(pl.col("time").dt.truncate("1d") + pl.duration(hours=hours % 12))
        .otherwise("time")
        .alias("time")
    )
    found, _ = readmissions(timelines(table, PrepareOptions()), ReadmissionOptions(horizon=horizon))
    days = (found["prediction_time"] - datetime(2020, 1, 1)).dt.total_days().to_list()
    assert dict(zip(days, found["boolean_value"], strict=True)) == by_hand(spans, death, horizon)
