"""Which conditions are the labels of a moment?"""

from .small_records import DEATH, day
from .small_tasks import HEART, LUNG, SETS, label, stay, visit


def test_the_rest_of_the_stay_holds_the_labels() -> None:
    labels, _ = label("phenotyping", *stay(0, 5, HEART), *stay(20, 22, LUNG), sets=SETS)
    assert labels == [(1, True, "heart"), (1, False, "lung"), (21, False, "heart"), (21, True, "lung")]


def test_a_stay_that_ends_before_the_moment_has_none() -> None:
    labels, counts = label("phenotyping", *stay(0, 0.9, HEART), sets=SETS)
    assert labels == []
    assert counts["stays_that_ended_before"] == 1


def test_a_code_before_the_moment_is_no_label_of_the_rest() -> None:
    rows = [*stay(0, 5, LUNG), (1, day(0.5), HEART, None, "1/0")]
    assert label("phenotyping", *rows, sets=SETS)[0] == [(1, False, "heart"), (1, True, "lung")]
    assert label("phenotyping", *rows, sets=SETS, hours=6)[0] == [(0.25, True, "heart"), (0.25, True, "lung")]


def test_what_is_known_at_the_moment_is_no_label() -> None:
    rows = [*stay(0, 5, LUNG), (1, day(1), HEART, None, "1/0")]
    assert label("phenotyping", *rows, sets=SETS)[0] == [(1, False, "heart"), (1, True, "lung")]


def test_who_dies_in_the_stay_has_labels() -> None:
    labels, _ = label("phenotyping", *stay(0, 5, HEART, to="DIED"), (1, day(5), DEATH), sets=SETS)
    assert labels == [(1, True, "heart"), (1, False, "lung")]


def test_in_a_window_all_labels_of_a_moment_are_known_or_none() -> None:
    rows = [*visit(0), *visit(50, HEART), *visit(90)]
    labels, counts = label("phenotyping", *rows, sets=SETS, at="each-visit", horizon=60)
    assert labels == [(0, True, "heart"), (0, False, "lung")]
    assert counts["not_observed_to_the_end"] == 2


def test_a_known_condition_counts_again_in_a_window() -> None:
    rows = [*visit(0, HEART), *visit(50, HEART), *visit(90)]
    assert label("phenotyping", *rows, sets=SETS, at="first-visit", horizon=60)[0][0] == (0, True, "heart")
