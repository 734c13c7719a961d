"""How long until death or a disease, and when is time censored?"""

import pytest

from behrt.tasks.codesets import CodeSets

from .small_records import DEATH, day
from .small_tasks import HEART, SETS, label, stay, visit

ONE = SETS.only(("heart",), "test")


def days(*rows: tuple, sets: CodeSets | None = None, **options: object) -> list[tuple]:
    return label("survival", *rows, sets=sets, **{"at": "each-visit", **options})[0]


def test_time_to_death_is_in_days_and_parts_of_days() -> None:
    assert days(*visit(0), (1, day(10.25), DEATH)) == [(0, True, 10.25)]


def test_who_lives_is_censored_at_the_last_event() -> None:
    labels, counts = label("survival", *visit(0), *visit(40), at="each-visit")
    assert labels == [(0, False, 40)]
    assert counts["not_observed_after"] == 1


def test_the_horizon_censors_what_comes_later() -> None:
    rows = [*visit(0), (1, day(100), DEATH)]
    assert days(*rows, horizon=99) == [(0, False, 99)]
    assert days(*rows, horizon=100) == [(0, True, 100)]


def test_a_code_set_is_an_event_and_death_censors_it() -> None:
    assert days(*visit(0), *visit(30, HEART), sets=ONE) == [(0, True, 30)]
    assert days(*visit(0), (1, day(30), DEATH), sets=ONE) == [(0, False, 30)]


def test_who_has_the_code_set_is_not_at_risk() -> None:
    assert days(*visit(0, HEART), *visit(30, HEART), sets=ONE) == []


def test_time_begins_after_the_gap() -> None:
    rows = [*visit(0), (1, day(100), DEATH)]
    assert days(*rows, gap=40) == [(0, True, 60)]
    assert days(*rows, gap=100) == []


def test_an_end_of_the_data_censors_instead_of_the_last_event() -> None:
    assert days(*visit(0), observed_until=day(9).date())[0][:2] == (0, False)
    assert days(*visit(0), observed_until=day(9).date())[0][2] == pytest.approx(9.5)


def test_a_date_of_death_is_the_end_of_its_day() -> None:
    assert days(*visit(0), (1, day(10).replace(hour=0), DEATH))[0][2] == pytest.approx(10.5)


def test_survival_from_a_stay_is_followed_beyond_its_end() -> None:
    rows = [*stay(0, 5), (1, day(100), DEATH)]
    assert days(*rows, at="each-admission") == [(1, True, 99)]
    assert days(*rows, at="each-admission", horizon=50) == [(1, False, 50)]
