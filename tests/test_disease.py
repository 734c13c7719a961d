"""Which first occurrences and next visits become labels?"""

from datetime import timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from behrt.prepare_options import PrepareOptions
from behrt.tasks.building import OPTIONS, Task
from behrt.tasks.codesets import CodeSets
from behrt.tasks.timelines import timelines

from .small_records import DEATH, day, events
from .small_tasks import HEART, LUNG, SETS, label, stay, visit

ONE = CodeSets({"heart": ("ICD9CM//428*",)})


def heart(*rows: tuple, **options: object) -> list[tuple[float, bool]]:
    return [(when, value) for when, value, _ in label("disease", *rows, sets=ONE, **options)[0]]


def test_a_first_code_within_the_horizon_is_true_and_its_own_visit_gets_no_label() -> None:
    assert heart(*visit(0), *visit(100, HEART), *visit(600)) == [(0, True)]


def test_observed_to_the_end_without_the_code_is_false() -> None:
    assert heart(*visit(0), *visit(365)) == [(0, False)]


def test_not_observed_to_the_end_is_no_label() -> None:
    assert heart(*visit(0), *visit(364)) == []


def test_the_horizons_last_moment_counts() -> None:
    assert heart(*visit(0), *visit(365, HEART))[0] == (0, True)
    assert heart(*visit(0), *visit(365.01, HEART))[0] == (0, False)


def test_who_has_the_disease_before_gets_no_label() -> None:
    labels, counts = label("disease", *visit(0, HEART), *visit(100), *visit(200, HEART), *visit(900), sets=ONE)
    assert labels == []
    assert counts["had_it_before"] == 4


def test_a_code_in_the_gap_is_had_before_the_window() -> None:
    rows = [*visit(0), *visit(20, HEART), *visit(900)]
    assert heart(*rows, gap=10) == [(0, True)]
    assert heart(*rows, gap=20) == []


def test_the_gap_moves_the_end_of_the_window_too() -> None:
    rows = [*visit(0), *visit(370, HEART), *visit(900)]
    assert heart(*rows)[0] == (0, False)
    assert heart(*rows, gap=10)[0] == (0, True)


def test_death_ends_observation() -> None:
    rows = [*visit(0), (1, day(200), DEATH)]
    assert heart(*rows) == []
    assert heart(*rows, observed_until="always") == []
    assert heart(*visit(0), observed_until="always") == [(0, False)]


def test_nothing_is_predicted_at_the_visit_of_death() -> None:
    assert label("disease", *visit(0), (1, day(0.1), DEATH), sets=ONE)[1]["on_or_after_the_day_of_death"] == 1


def test_an_outcome_after_the_end_of_observation_is_not_seen() -> None:
    assert heart(*visit(0), *visit(100, HEART), observed_until=day(50).date()) == []


def test_each_set_has_its_own_fate_at_a_moment() -> None:
    labels, counts = label("disease", *visit(0, LUNG), *visit(100, HEART), *visit(600), sets=SETS)
    assert labels == [(0, True, "heart")]
    assert counts["pairs"] == 6
    fates = ("had_it_before", "occurrences", "without_occurrence", "not_observed_to_the_end")
    assert sum(counts[fate] for fate in fates) == 6


@settings(max_examples=60, deadline=None)
@given(
    visits=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=8, unique_by=lambda v: v[0]),
    horizon=st.integers(1, 20),
    gap=st.integers(0, 5),
    death=st.none() | st.integers(41, 60),
)
def test_labels_are_those_of_a_search_in_plain_python(
    visits: list[tuple[int, bool]], horizon: int, gap: int, death: int | None
) -> None:
    rows = [row for when, ill in visits for row in visit(when, HEART if ill else "VISIT")]
    rows += [(1, day(death), DEATH)] if death is not None else []
    last = max(when for when, _ in visits) if death is None else death
    expected = []
    for when, _ in sorted(visits):
        ill = sorted(other for other, has in visits if has)
        if any(other <= when + gap for other in ill):
            continue
        if any(other <= when + gap + horizon for other in ill):
            expected.append((when, True))
        elif last >= when + gap + horizon:
            expected.append((when, False))
    assert heart(*rows, horizon=horizon, gap=gap) == expected


# The next visit.


def test_the_next_visits_codes_are_labels_and_later_ones_are_not() -> None:
    labels, counts = label("next-visit", *visit(0), *visit(10, HEART), *visit(20, LUNG), sets=SETS)
    assert labels == [(0, True, "heart"), (0, False, "lung"), (10, False, "heart"), (10, True, "lung")]
    assert counts["without_a_next_visit"] == 1


def test_a_condition_that_was_known_counts_again_at_the_next_visit() -> None:
    assert label("next-visit", *visit(0, HEART), *visit(10, HEART), sets=ONE)[0] == [(0, True, "heart")]


def test_at_discharges_the_next_visit_is_the_next_stay() -> None:
    rows = [*stay(0, 5), *visit(7, HEART), *stay(20, 22, LUNG)]
    labels, _ = label("next-visit", *rows, sets=SETS, at="each-discharge")
    assert labels == [(5, False, "heart"), (5, True, "lung")]


def test_the_next_stays_codes_are_those_of_all_its_transfers() -> None:
    rows = [*stay(0, 5), *stay(20, 22, LUNG), *stay(22.1, 25, HEART)]
    labels, _ = label("next-visit", *rows, sets=SETS, at="each-discharge")
    assert labels == [(5, True, "heart"), (5, True, "lung")]


# Shards and patients.


@pytest.mark.parametrize(("task", "options"), [("disease", {}), ("next-visit", {}), ("survival", {}),
                                               ("phenotyping", {"at": "each-visit"}), ("readmission", {})])  # fmt: skip
def test_a_patients_labels_do_not_depend_on_who_else_is_there(task: str, options: dict[str, object]) -> None:
    rows = []
    for subject in range(12):
        rows += stay(subject, subject + 2, *([HEART] if subject % 3 == 0 else []), subject=subject)
        rows += stay(30 + 3 * subject, 32 + 3 * subject, *([LUNG] if subject % 2 else [HEART]), subject=subject)
        rows += visit(500 + subject, subject=subject)
    table = events(*rows, visit_id=True)
    sets = None if task in ("readmission", "survival") else SETS
    labelling = Task(task, OPTIONS[task](**options), sets).labelling()

    def labelled(part: pl.DataFrame) -> pl.DataFrame:
        return labelling(timelines(part, PrepareOptions()))[0]

    together = labelled(table)
    alone = pl.concat([labelled(own) for _, own in table.group_by("subject_id", maintain_order=True)])
    assert together.height > 5
    assert together.equals(alone)


def test_a_longer_horizon_than_the_calendar_overflows_nothing() -> None:
    late = day(0) + timedelta(days=365 * 7900)
    rows = [(1, day(0), "VISIT", None, "a"), (1, late, "VISIT", None, "b")]
    assert label("disease", *rows, sets=ONE, horizon=100_000)[1]["pairs"] == 2


def test_the_horizon_of_a_disease_does_not_end_with_the_stay() -> None:
    rows = [*stay(0, 5), *visit(100, HEART), *visit(600)]
    assert heart(*rows, at="each-admission") == [(1, True)]
    assert heart(*rows, at="each-admission", horizon=50) == [(1, False)]
    assert heart(*stay(0, 5), *visit(30), at="each-admission", horizon=50) == []
