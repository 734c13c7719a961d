"""Cleaning: each event is kept or counted under the right reason."""

from datetime import datetime

import pytest

from behrt.cleaning import EVENT_FATES, account, clean_events
from behrt.prepare_options import PrepareOptions

from .small_records import BIRTH, DEATH, day, events, random_events

BORN = (1, datetime(1970, 1, 1), BIRTH)


def clean(*rows, visit_id=False, **options):
    cleaned, counts = clean_events(events(*rows, visit_id=visit_id), PrepareOptions(min_tokens=1, **options))
    fates = {fate: counts[fate] for fate in EVENT_FATES if counts[fate] and fate not in ("events_kept", "birth_events")}
    return cleaned, fates


def test_births_and_deaths_are_no_tokens_and_bound_the_history():
    cleaned, fates = clean(
        BORN, (1, datetime(1969, 12, 31), "EARLY"), (1, datetime(1970, 1, 1), "AT"), (1, day(0), "A"),
        (1, day(1), f"{DEATH}//HOSPITAL"), (1, day(1), "LAST"), (1, day(1.01), "LATE"),
    )  # fmt: skip
    assert cleaned["code"].to_list() == ["AT", "A", "LAST"]
    assert fates == {"death_events": 1, "events_before_birth": 1, "events_after_death": 1}


def test_a_death_at_midnight_is_a_date_and_keeps_its_day():
    cleaned, fates = clean(
        BORN, (1, datetime(2020, 5, 5), DEATH), (1, datetime(2020, 5, 5, 23, 59), "A"), (1, datetime(2020, 5, 6), "B")
    )
    assert cleaned["code"].to_list() == ["A"]
    assert fates == {"death_events": 1, "events_after_death": 1}


def test_ages_are_years_since_birth():
    cleaned, _ = clean(BORN, (1, datetime(2020, 1, 1), "A"))
    assert cleaned["age"].to_list() == [pytest.approx(50, abs=0.01)]


def test_without_a_birth_subjects_are_dropped_or_kept_without_ages_as_asked():
    cleaned, fates = clean((1, day(0), "A"), (2, day(0), "A"), (2, datetime(1970, 1, 1), BIRTH), missing_birth="drop")
    assert cleaned["subject_id"].to_list() == [2]
    assert fates == {"events_of_subjects_without_birth": 1}
    cleaned, fates = clean((1, day(0), "A"), missing_birth="keep")
    assert cleaned["age"].is_nan().all()
    assert fates == {}


def test_null_and_blank_codes_are_counted():
    cleaned, fates = clean(BORN, (1, day(0), None), (1, day(0), " "), (1, day(0), "A"), (None, day(0), "A"))
    assert cleaned["code"].to_list() == ["A"]
    assert fates == {"events_without_code": 2, "events_without_subject": 1}


def test_duplicates_agree_in_subject_time_code_and_visit():
    rows = [(1, day(0), "A", None, "x"), (1, day(0), "A", None, "x"), (1, day(0), "A", None, "y"),
            (1, day(0.1), "A", None, "x"), (1, day(0), "B", None, "x")]  # fmt: skip
    cleaned, fates = clean(BORN, *rows, visit_id=True)
    assert (cleaned.height, fates) == (4, {"duplicate_events": 1})


def test_different_values_are_duplicates_only_where_values_do_not_count():
    rows = [BORN, (1, day(0), "L", 1.0), (1, day(0), "L", 2.0), (1, day(0), "L", 2.0)]
    assert clean(*rows)[1] == {"duplicate_events": 2}
    assert clean(*rows, numeric_bins=4)[1] == {"duplicate_events": 1}


def test_codes_that_shorten_to_the_same_category_are_duplicates():
    cleaned, fates = clean(BORN, (1, day(0), "ICD10CM//E119"), (1, day(0), "ICD10CM//E110"), icd_digits=3)
    assert cleaned["code"].to_list() == ["ICD10CM//E11"]
    assert fates == {"duplicate_events": 1}


def test_patterns_choose_codes_and_never_births():
    rows = [BORN, (1, day(0), "LAB//1"), (1, day(0), "LAB//2"), (1, day(0), "DX//1")]
    cleaned, fates = clean(*rows, include=("^LAB", "^NONE"), exclude=("2$", "MEDS"))
    assert cleaned["code"].to_list() == ["LAB//1"]
    assert fates == {"events_not_included": 1, "events_excluded": 1}


def test_patterns_do_not_change_which_events_share_a_visit():
    rows = [BORN, (1, day(0), "A"), (1, day(0.9), "B"), (1, day(1.8), "A")]
    assert clean(*rows)[0]["visit"].to_list() == [1, 1, 1]
    assert clean(*rows, exclude=("B",))[0]["visit"].to_list() == [1, 1]


def test_static_codes_are_dropped_and_counted_or_open_the_first_visit():
    rows = [BORN, (1, None, "GENDER//F"), (1, day(0), "A"), (1, None, "RACE//X"), (1, day(9), "B")]
    cleaned, fates = clean(*rows)
    assert (cleaned["code"].to_list(), fates) == (["A", "B"], {"static_events_dropped": 2})
    cleaned, fates = clean(*rows, static_codes="keep")
    assert cleaned["code"].to_list() == ["GENDER//F", "RACE//X", "A", "B"]
    assert cleaned["visit"].to_list() == [1, 1, 1, 2]
    assert cleaned["time"].to_list() == [day(0), day(0), day(0), day(9)]
    assert fates == {}


def test_a_subject_with_nothing_but_static_codes_has_no_history():
    cleaned, fates = clean(BORN, (1, None, "GENDER//F"), static_codes="keep")
    assert (cleaned.height, fates) == (0, {"static_events_dropped": 1})


def test_short_histories_are_counted_with_their_events():
    frame = events(BORN, (1, day(0), "A"), (2, datetime(1970, 1, 1), BIRTH), (2, day(0), "A"), (2, day(1), "B"))
    cleaned, counts = clean_events(frame, PrepareOptions(min_tokens=2))
    assert cleaned["subject_id"].unique().to_list() == [2]
    assert counts["subjects_below_min_tokens"] == counts["events_of_subjects_below_min_tokens"] == 1


def test_every_event_and_subject_has_exactly_one_fate():
    # `account` asserts the sums inside; here, that the draws have the oddities that make the sums interesting.
    options = PrepareOptions(include=("C", "GENDER"), exclude=("C0[1-3]",), static_codes="keep", min_tokens=4)
    occurred = set()
    for seed in range(5):
        _, counts = clean_events(random_events(range(1, 60), seed), options)
        occurred |= {fate for fate in EVENT_FATES if counts[fate]}
    never = {"events_without_subject", "events_of_subjects_without_split", "events_of_subjects_without_birth",
             "events_outside_the_calendar", "events_not_included"}  # fmt: skip
    assert occurred == set(EVENT_FATES) - never


def test_the_account_notices_an_event_that_got_lost():
    _, counts = clean_events(random_events(range(1, 9), 0), PrepareOptions())
    account(counts)
    counts["events_read"] += 1
    with pytest.raises(AssertionError):
        account(counts)


def test_the_order_of_rows_does_not_matter_beyond_ties():
    frame = random_events(range(1, 40), 11).unique(["subject_id", "time"])
    options = PrepareOptions()
    first, _ = clean_events(frame.sort("subject_id", "time"), options)
    second, _ = clean_events(frame.reverse(), options)
    assert first.equals(second)
