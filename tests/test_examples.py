"""Do the examples of a task show what may be seen of each labelled patient, and the labels as they are?"""

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from behrt.config import UserError
from behrt.labels import write_labels
from behrt.prepare import prepare
from behrt.prepare_options import PrepareOptions
from behrt.sequences import PreparedData, open_prepared
from behrt.tasks.examples import LabelledRecords, last_moments, read_examples

from .small_records import BIRTH, day, events, write_meds

MOMENT = timedelta(microseconds=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """30 patients with a code every ten days; two visits of the last one overlap."""
    folder = tmp_path_factory.mktemp("examples")
    rows: list[tuple] = []
    for subject in range(1, 30):
        rows.append((subject, datetime(1950, 1, 1), BIRTH))
        rows += [(subject, day(10 * number), f"C{number}", None, f"{subject}/{number}") for number in range(6)]
    rows += [(30, datetime(1950, 1, 1), BIRTH), (30, day(0), "C0", None, "30/a"), (30, day(20), "C1", None, "30/a")]
    rows += [(30, day(5), "C2", None, "30/b"), (30, day(6), "C3", None, "30/b")]
    splits = {subject: ("train", "tuning", "held_out")[subject % 3] for subject in range(1, 31)}
    source = write_meds(folder / "meds", events(*rows, visit_id=True), splits=splits)
    prepare(source, folder / "prepared", PrepareOptions(min_patients=1))
    return open_prepared(folder / "prepared")


def write(folder: Path, *rows: tuple, values: tuple[str, ...] = ("boolean_value",)) -> Path:
    table = pl.DataFrame(rows, schema=["subject_id", "prediction_time", *values], orient="row")
    write_labels(folder / "labels.parquet", [table], values)
    return folder / "labels.parquet"


def shown(found: LabelledRecords, data: PreparedData, split: str, row: int) -> list[str]:
    codes = found[split].sequences([row]).codes
    return [data.vocabulary.tokens[code] for code in codes]


def test_a_row_sees_the_tokens_up_to_its_time_and_none_after_it(data: PreparedData, tmp_path: Path) -> None:
    found = read_examples(write(tmp_path, (3, day(10), True), (3, day(10) - MOMENT, False)), data)
    assert shown(found, data, "train", 0) == ["[CLS]", "C0", "[SEP]"]
    assert shown(found, data, "train", 1) == ["[CLS]", "C0", "[SEP]", "C1", "[SEP]"]
    assert found["train"].visible.tolist() == [3, 5]
    assert found["train"].targets.tolist() == [[0], [1]]


def test_the_gap_hides_the_last_days(data: PreparedData, tmp_path: Path) -> None:
    found = read_examples(write(tmp_path, (3, day(10), True)), data, gap=1)
    assert found["train"].visible.tolist() == [3]


def test_of_visits_that_overlap_each_token_is_asked_for_its_time(data: PreparedData, tmp_path: Path) -> None:
    found = read_examples(write(tmp_path, (30, day(5), True)), data)
    assert [code for code in shown(found, data, "train", 0) if code != "[SEP]"] == ["[CLS]", "C0", "C2"]


def test_the_end_of_a_visit_does_not_tell_whether_anything_else_of_it_is_to_come(
    data: PreparedData, tmp_path: Path
) -> None:
    found = read_examples(write(tmp_path, (30, day(5), True), (30, day(6), True)), data)
    assert shown(found, data, "train", 0) == ["[CLS]", "C0", "[SEP]", "C2", "[SEP]"]
    assert shown(found, data, "train", 1) == ["[CLS]", "C0", "[SEP]", "C2", "C3", "[SEP]"]
    assert found["train"].visible.tolist() == [5, 6]


def test_rows_that_cannot_be_used_are_counted(data: PreparedData, tmp_path: Path) -> None:
    rows = [(3, day(10), True), (77, day(10), True), (78, day(10), True), (4, day(-1), False)]
    found = read_examples(write(tmp_path, *rows), data)
    assert found.counts == {"rows": 4, "no_patient": 2, "nothing_visible": 1}
    assert [len(found[split]) for split in ("train", "tuning", "held_out")] == [1, 0, 0]
    assert found["train"].subjects.tolist() == [3]


@pytest.mark.parametrize("rows", [[(77, day(10), True)], [(3, day(-1), True)]])
def test_labels_of_which_no_row_can_be_used_are_refused(data: PreparedData, tmp_path: Path, rows: list) -> None:
    with pytest.raises(UserError, match="none of its 1 rows can be used"):
        read_examples(write(tmp_path, *rows), data)


@pytest.mark.parametrize(("value", "filled"), [("float_value", 2.5), ("integer_value", 4), ("categorical_value", "a")])
def test_labels_that_are_not_predicted_here_are_refused(
    data: PreparedData, tmp_path: Path, value: str, filled: object
) -> None:
    with pytest.raises(UserError, match="expected binary or multilabel or survival"):
        read_examples(write(tmp_path, (3, day(10), filled), values=(value,)), data)


def test_a_name_without_a_row_is_not_known(data: PreparedData, tmp_path: Path) -> None:
    rows = [(3, day(10), True, "b"), (3, day(10), False, "a"), (6, day(10), True, "a")]
    found = read_examples(write(tmp_path, *rows, values=("boolean_value", "categorical_value")), data)
    assert found["train"].names == ("a", "b")
    np.testing.assert_array_equal(found["train"].targets, [[0, 1], [1, np.nan]])
    turned = read_examples(
        write(tmp_path, *rows, values=("boolean_value", "categorical_value")), data, names=("b", "a")
    )
    np.testing.assert_array_equal(turned["train"].targets, [[1, 0], [np.nan, 1]])
    with pytest.raises(UserError, match="'c' is in one of them only"):
        read_examples(tmp_path / "labels.parquet", data, names=("a", "b", "c"))


def test_survival_has_days_and_whether_the_event_was_seen(data: PreparedData, tmp_path: Path) -> None:
    rows = [(3, day(10), True, 4.5), (6, day(10), False, 100.0)]
    found = read_examples(write(tmp_path, *rows, values=("boolean_value", "float_value")), data)["train"]
    assert found.days is not None
    assert (found.seen_events.tolist(), found.days.tolist()) == ([True, False], [4.5, 100.0])


def test_smaller_samples_are_parts_of_larger_ones(data: PreparedData, tmp_path: Path) -> None:
    rows = [(subject, day(when), True) for subject in range(3, 30, 3) for when in (1, 11, 21)]
    everything = read_examples(write(tmp_path, *rows), data)["train"]
    few, more = (set(zip(part.subjects, part.times, strict=True)) for part in (
        everything.subsample(5, seed=1), everything.subsample(12, seed=1),
    ))  # fmt: skip
    assert (len(few), len(more)) == (5, 12)
    assert few < more
    other = everything.subsample(12, seed=2)
    assert set(zip(other.subjects, other.times, strict=True)) != more


def test_without_labels_the_end_of_each_record_sees_all_of_it(data: PreparedData) -> None:
    split = data.split("tuning")
    found = last_moments(split)
    for row in range(len(found)):
        np.testing.assert_array_equal(found.sequences([row]).codes, split.sequence(row)[0])
    assert (found.visible == split.lengths).all()


def test_a_patient_of_two_splits_is_one_line(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = data.split("train").subject_ids()
    monkeypatch.setattr(data.split("tuning"), "subject_ids", lambda: ids[:10])
    with pytest.raises(UserError, match=r"patients stand in more than one of its splits \(20 rows\)") as error:
        read_examples(write(tmp_path, (3, day(10), True)), data)
    assert "\n" not in str(error.value)
