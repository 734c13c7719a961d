"""Visits: by the source's id, by admission and discharge, by the gap."""

import polars as pl

from behrt.prepare_options import PrepareOptions
from behrt.visits import assign_visits

from .small_records import day, events

SPANS = PrepareOptions(admission_code="IN", discharge_code="OUT")


def visits(frame: pl.DataFrame, options: PrepareOptions) -> list[int]:
    rows = frame.sort("subject_id", "time", maintain_order=True).with_row_index("row")
    return assign_visits(rows.with_columns(pl.col("row").cast(pl.Int64)), options)[0]["visit"].to_list()


def test_the_sources_own_visit_ids_come_first_and_belong_to_one_subject():
    frame = events((1, day(0), "A", None, "x"), (1, day(9), "A", None, "x"), (2, day(0), "A", None, "x"), visit_id=True)
    assert visits(frame, PrepareOptions()) == [0, 0, 2]


def test_events_without_a_visit_id_go_by_the_gap_rule():
    frame = events(
        (1, day(0), "A"), (1, day(0.4), "A", None, "x"), (1, day(0.8), "A"), (1, day(1.9), "A"), visit_id=True
    )
    assert visits(frame, PrepareOptions(visit_gap_hours=24)) == [0, 1, 0, 3]


def test_a_pause_of_exactly_the_gap_stays_in_the_visit():
    frame = events((1, day(0), "A"), (1, day(1), "A"), (1, day(2.01), "A"))
    assert visits(frame, PrepareOptions(visit_gap_hours=24)) == [0, 0, 2]
    assert visits(frame, PrepareOptions(visit_gap_hours=25)) == [0, 0, 0]


def test_the_gap_rule_never_joins_two_subjects():
    assert visits(events((1, day(0), "A"), (2, day(0), "A")), PrepareOptions()) == [0, 1]


def test_events_between_admission_and_discharge_are_one_visit_however_long_it_takes():
    frame = events((1, day(0), "A"), (1, day(5), "IN//ER"), (1, day(9), "A"), (1, day(20), "OUT"), (1, day(20.5), "A"))
    assert visits(frame, SPANS) == [0, 1, 1, 1, 4]


def test_an_admission_without_discharge_opens_no_span_and_is_counted():
    frame = events((1, day(0), "IN"), (1, day(9), "A"), (1, day(20), "IN"), (1, day(29), "OUT"), (2, day(0), "IN"))
    rows = frame.with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))
    assigned, unclosed = assign_visits(rows, SPANS)
    assert assigned["visit"].to_list() == [0, 1, 2, 2, 4]
    assert unclosed == 2


def test_back_to_back_admissions_stay_apart():
    frame = events((1, day(0), "IN"), (1, day(5), "OUT"), (1, day(5), "IN"), (1, day(9), "A"), (1, day(11), "OUT"))
    found = visits(frame, SPANS)
    assert found[0] != found[3] == found[4]


def test_an_admission_that_ends_at_once_is_a_visit_of_its_own():
    frame = events((1, day(0), "IN"), (1, day(0), "OUT"), (1, day(0.5), "A"), (1, day(5), "IN"), (1, day(6), "OUT"))
    assert visits(frame, SPANS) == [0, 0, 2, 3, 3]


def test_a_discharge_of_another_subject_closes_nothing():
    frame = events((1, day(0), "IN"), (1, day(3), "A"), (2, day(1), "OUT"))
    assert visits(frame, SPANS) == [0, 1, 2]
