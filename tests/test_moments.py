"""When is a prediction made?"""

from collections.abc import Iterable

import numpy as np
import pytest

from behrt.config import UserError
from behrt.prepare_options import PrepareOptions
from behrt.tasks.moments import moments
from behrt.tasks.task_options import (
    DiseaseOptions,
    PhenotypingOptions,
    ReadmissionOptions,
    SurvivalOptions,
    TaskOptions,
)
from behrt.tasks.timelines import Timelines, timelines

from .small_records import BIRTH, day, events
from .small_tasks import stay, visit


def found(rows: Iterable[tuple], **options: object) -> Timelines:
    return timelines(events(*rows, visit_id=True), PrepareOptions(**options))


def days(rows: Iterable[tuple], **options: object) -> list[float]:
    at, counts = moments(found(rows), DiseaseOptions(**options))
    reasons = ("candidates", "moments")
    assert counts["candidates"] == counts["moments"] + sum(
        count for name, count in counts.items() if name not in reasons
    )
    return [(time - day(0)).total_seconds() / 86_400 for time in at["prediction_time"]]


ROWS = [*visit(0), *stay(10, 12), *visit(30), *stay(40, 45), *visit(50)]


def test_each_rule_has_its_moments() -> None:
    assert days(ROWS) == [0, 12, 30, 45, 50]
    assert days(ROWS, at="first-visit") == [0]
    assert days(ROWS, at="last-visit", by=day(44).date()) == [30]
    assert days(ROWS, at="last-visit", by=day(45).date()) == [45]
    assert days(ROWS, at="each-discharge") == [12, 45]
    assert days(ROWS, at="each-admission") == [11, 41]
    assert days(ROWS, at="each-admission", hours=72) == [43]


def test_visits_and_days_of_history_are_asked_for_before_one_is_chosen() -> None:
    assert days(ROWS, min_visits=3) == [30, 45, 50]
    assert days(ROWS, at="first-visit", min_visits=3) == [30]
    assert days(ROWS, at="first-visit", min_days=31) == [45]
    assert days([(1, day(-9000), BIRTH), *ROWS], at="first-visit", min_days=31) == [45]


def test_one_visit_is_drawn_for_each_patient_and_all_of_them_are() -> None:
    rows = [row for subject in range(300) for when in range(4) for row in visit(10 * when, subject=subject)]
    drawn = days(rows, at="one-visit")
    assert len(drawn) == 300
    shares = np.bincount(np.array(drawn, int) // 10) / 300
    assert (np.abs(shares - 0.25) < 0.1).all()  # four standard deviations
    assert days(rows, at="one-visit") == drawn
    assert days(rows, at="one-visit", seed=1) != drawn


def test_two_visits_that_end_at_once_are_one_moment() -> None:
    rows = [(1, day(0), "A", None, "a"), (1, day(0), "B", None, "b")]
    assert days(rows) == [0]


def test_stays_come_from_spans_where_there_are_no_visit_ids() -> None:
    rows = [(1, day(0), "IN//X"), (1, day(3), "LAB"), (1, day(9), "OUT"), (1, day(20), "LAB"), (1, day(22), "IN"),
            (1, day(23), "OUT")]  # fmt: skip
    stays = timelines(events(*rows), PrepareOptions(admission_code="IN", discharge_code="OUT")).stays
    assert stays.select("begin", "end").rows() == [(day(0), day(9)), (day(22), day(23))]


def test_a_stay_without_a_discharge_ends_with_its_visits_last_event() -> None:
    stays = found([(1, day(0), "ADMISSION", None, "a"), (1, day(4), "LAB", None, "a")]).stays
    assert stays.select("begin", "end").rows() == [(day(0), day(4))]


@pytest.mark.parametrize("code", ["DIED", "Expired", "DEAD/EXPIRED", "DIED_IN_HOSPITAL", "20//DECEASED"])
@pytest.mark.parametrize(
    "options", [{"at": "each-discharge"}, {"at": "each-visit"}, {"at": "last-visit", "by": day(99).date()}]
)
def test_no_prediction_is_made_at_the_end_of_a_stay_that_was_a_death(code: str, options: dict[str, object]) -> None:
    rows = [*stay(0, 2), *stay(10, 12, to=code), (1, day(12.1), "LAB", None, "1/10")]
    assert days(rows, **options) == [2]


@pytest.mark.parametrize("code", ["UNDEADLY", "SKILLED", "HOME"])
def test_a_discharge_that_only_sounds_like_a_death_is_a_moment(code: str) -> None:
    assert days(stay(0, 2, to=code)) == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": "last-visit"}, "--at last-visit and --by only work together"),
        ({"by": day(0).date()}, "--at last-visit and --by only work together"),
        ({"observed_until": "forever"}, "observed_until: expected last-event, always or a day like"),
        ({"horizon": 0}, "horizon: input should be greater than 0"),
        ({"horizn": 3}, "horizn: unknown key.*horizon"),
        ({"planned": ("A",)}, "planned: unknown key"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiseaseOptions(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DiseaseOptions, {"hours": 24}, "--hours has no effect without --at each-admission"),
        (DiseaseOptions, {"seed": 0}, "--seed has no effect without --at one-visit"),
        (SurvivalOptions, {"seed": 3, "at": "first-visit"}, "--seed has no effect without --at one-visit"),
        (PhenotypingOptions, {"horizon": 30}, "--horizon has no effect with --at each-admission"),
        (PhenotypingOptions, {"observed_until": "always"}, "--observed-until has no effect with --at each-admission"),
        (ReadmissionOptions, {"planned": ("A",), "stays": "visits"}, "--planned has no effect with --stays visits"),
    ],
)
def test_a_flag_without_effect_is_refused(kind: type[TaskOptions], options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"{kind.where}: {message}.*; leave it out$"):
        kind(**options)


def test_a_flag_that_has_its_effect_is_taken() -> None:
    assert DiseaseOptions(at="each-admission", hours=6, horizon=30, observed_until="always").hours == 6
    assert SurvivalOptions(seed=3).seed == 3
    assert PhenotypingOptions(hours=6, gap=1).hours == 6
    assert PhenotypingOptions(at="each-visit", horizon=30, observed_until="always").horizon == 30
    assert ReadmissionOptions(planned=("A",)).planned == ("A",)


def test_a_readmission_is_predicted_at_discharges_only() -> None:
    with pytest.raises(UserError, match="labels readmission: at"):
        ReadmissionOptions(at="each-visit")
