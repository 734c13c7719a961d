"""Does a model see what it may see at the prediction time, and nothing later?"""

from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt.tasks.features import features_until, telling_codes, visible

from .small_records import day, events

MOMENT = timedelta(microseconds=1)


def moments(*pairs: tuple[int, float]) -> pl.DataFrame:
    rows = [(subject, day(when)) for subject, when in pairs]
    return pl.DataFrame(rows, schema={"subject_id": pl.Int64, "prediction_time": pl.Datetime("us")}, orient="row")


def test_an_event_at_the_prediction_time_is_seen_and_one_after_it_is_not() -> None:
    table = events((1, day(0), "A"), (1, day(5), "B"), (1, day(5) + MOMENT, "C"))
    assert features_until(table, moments((1, 5)))["code"].to_list() == ["A", "B"]


def test_the_gap_hides_the_last_days() -> None:
    table = events((1, day(0), "A"), (1, day(3), "B"), (1, day(3) + MOMENT, "C"), (1, day(5), "D"))
    assert features_until(table, moments((1, 5)), gap=2)["code"].to_list() == ["A", "B"]


def test_each_moment_sees_its_own_history_of_its_own_patient() -> None:
    table = events((1, day(0), "A"), (1, day(5), "B"), (2, day(0), "C"))
    seen = features_until(table, moments((1, 1), (1, 5), (1, 5), (3, 5)))
    assert sorted(seen.select("prediction_time", "code").rows()) == [(day(1), "A"), (day(5), "A"), (day(5), "B")]


@given(when=st.lists(st.none() | st.integers(0, 20), max_size=8), until=st.integers(0, 20), gap=st.integers(0, 40))
def test_tokens_and_events_are_seen_by_the_same_rule(when: list[int | None], until: int, gap: int) -> None:
    table = events(*((1, None if time is None else day(time / 2), str(place)) for place, time in enumerate(when)))
    seen = features_until(table, moments((1, until / 2)), gap=gap / 4)["code"].to_list()
    times = table["time"].to_numpy().astype("datetime64[us]")
    mask = visible(times, np.datetime64(day(until / 2)), gap=gap / 4)
    assert [str(place) for place in np.flatnonzero(mask)] == seen
    assert seen == [str(p) for p, time in enumerate(when) if time is not None and time / 2 <= until / 2 - gap / 4]


# A leak: a code that stands exactly with the label, in the events around the prediction time.


def cohort(leak_after: timedelta | None, patients: int = 400) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Random histories up to day 10, the moment, and labels; the code LEAK with every true label, if asked for."""
    generator = np.random.default_rng(0)
    true = generator.random(patients) < 0.3
    rows: list[tuple] = []
    for subject in range(patients):
        rows += [(subject, day(generator.uniform(0, 10)), f"C{generator.integers(20)}") for _ in range(8)]
        if true[subject] and leak_after is not None:
            rows.append((subject, day(10) + leak_after, "LEAK"))
    labels = moments(*((subject, 10) for subject in range(patients))).with_columns(boolean_value=pl.Series(true))
    return events(*rows), labels


def most_telling(table: pl.DataFrame, labels: pl.DataFrame, gap: float = 0) -> tuple[str, float]:
    best = telling_codes(features_until(table, labels, gap=gap), labels).row(0, named=True)
    return best["code"], best["auroc"]


def test_a_planted_leak_is_found_where_features_reach_beyond_the_prediction_time() -> None:
    table, labels = cohort(timedelta(hours=1))
    leaking = labels.with_columns(pl.col("prediction_time") + timedelta(days=1))  # as a builder that is a day off
    assert most_telling(table, leaking) == ("LEAK", 1.0)


def test_the_planted_leak_is_not_among_the_features() -> None:
    table, labels = cohort(MOMENT)
    code, auroc = most_telling(table, labels)
    assert code != "LEAK"
    assert auroc < 0.6


def test_a_leak_at_the_prediction_time_is_found_and_a_gap_hides_it() -> None:
    table, labels = cohort(timedelta(0))
    assert most_telling(table, labels) == ("LEAK", 1.0)
    assert most_telling(table, labels, gap=0.01)[0] != "LEAK"


def test_without_a_leak_none_is_found() -> None:
    assert most_telling(*cohort(None))[1] < 0.6


def test_a_code_that_excludes_the_label_tells_as_much() -> None:
    table, labels = cohort(timedelta(0))
    assert most_telling(table, labels.with_columns(~pl.col("boolean_value"))) == ("LEAK", 1.0)


def test_labels_of_one_class_tell_nothing() -> None:
    table, labels = cohort(timedelta(0))
    assert telling_codes(features_until(table, labels), labels.with_columns(boolean_value=pl.lit(True))).is_empty()


def test_what_a_code_tells_is_scikit_learns_auroc() -> None:
    from sklearn.metrics import roc_auc_score

    table, labels = cohort(None)
    found = telling_codes(features_until(table, labels), labels)
    for code in ("C0", "C7"):
        have = set(table.filter(pl.col("code") == code)["subject_id"].to_list())
        score = roc_auc_score(labels["boolean_value"], [subject in have for subject in labels["subject_id"]])
        assert found.filter(pl.col("code") == code)["auroc"].item() == pytest.approx(max(score, 1 - score))
