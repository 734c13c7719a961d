"""Are labels read as others write them, written as MEDS has them, and refused in one line that names no patient?"""

import stat
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from meds.schema import LabelSchema

from behrt.config import UserError
from behrt.labels import KINDS, read_labels, write_labels

from .small_records import day

SUBJECT = 40000123


def table(**columns: object) -> pl.DataFrame:
    rows = len(next(iter(columns.values()))) if columns else 2  # type: ignore[arg-type]
    base = {"subject_id": [SUBJECT + row for row in range(rows)], "prediction_time": [day(row) for row in range(rows)]}
    return pl.DataFrame(base | columns)


EXAMPLES = {
    ("boolean_value",): table(boolean_value=[True, False]),
    ("boolean_value", "categorical_value"): table(boolean_value=[True, False], categorical_value=["a", "b"]),
    ("boolean_value", "float_value"): table(boolean_value=[True, False], float_value=[1.5, 0.0]),
    ("integer_value",): table(integer_value=[3, 4]),
    ("categorical_value",): table(categorical_value=["x", "y"]),
    ("float_value",): table(float_value=[-1.0, 2.0]),
}


@pytest.mark.parametrize("values", EXAMPLES, ids="+".join)
def test_what_is_written_is_valid_meds_and_is_read_again(values: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "labels.parquet"
    assert write_labels(path, [EXAMPLES[values], EXAMPLES[values].clear()], values) == 2
    LabelSchema.validate(pq.read_table(path))
    labels = read_labels(path)
    assert labels.kind == KINDS[values]
    assert labels.table.select(EXAMPLES[values].columns).equals(EXAMPLES[values].cast(dict(labels.table.schema)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_shards_in_folders_with_all_columns_of_which_most_are_null_are_one_table(tmp_path: Path) -> None:
    """As ACES writes them: a folder a split, and every value column."""
    for number, split in enumerate(("train", "held_out")):
        (tmp_path / split).mkdir()
        own = table(boolean_value=[True]).with_columns(
            pl.col("subject_id") + number,
            pl.lit(None, dtype=pl.Int64).alias("integer_value"),
            pl.lit(None, dtype=pl.Float64).alias("float_value"),
            pl.lit(None).alias("categorical_value"),
            pl.lit(day(1)).alias("trigger"),
        )
        own.write_parquet(tmp_path / split / "0.parquet")
    labels = read_labels(tmp_path)
    assert labels.kind == "binary"
    assert labels.table["subject_id"].to_list() == [SUBJECT, SUBJECT + 1]


def test_an_empty_shard_is_no_contradiction(tmp_path: Path) -> None:
    EXAMPLES[("boolean_value",)].write_parquet(tmp_path / "0.parquet")
    table().clear().write_parquet(tmp_path / "1.parquet")
    assert read_labels(tmp_path).table.height == 2


def test_other_types_of_time_and_number_are_converted(tmp_path: Path) -> None:
    own = pl.DataFrame(
        {
            "subject_id": pl.Series([1, 2], dtype=pl.UInt32),
            "prediction_time": pl.Series([datetime(2020, 1, 1, tzinfo=UTC)] * 2).dt.convert_time_zone("Europe/Paris"),
            "integer_value": pl.Series([0, 1], dtype=pl.Int8),
        }
    )
    own.write_parquet(tmp_path / "a.parquet")
    read = read_labels(tmp_path / "a.parquet").table
    assert read["prediction_time"].to_list() == [datetime(2020, 1, 1)] * 2
    assert dict(read.schema) == {
        "subject_id": pl.Int64,
        "prediction_time": pl.Datetime("us"),
        "integer_value": pl.Int64,
    }


def test_rows_that_say_the_same_are_one(tmp_path: Path) -> None:
    pl.concat([EXAMPLES[("boolean_value",)]] * 2).write_parquet(tmp_path / "a.parquet")
    assert read_labels(tmp_path / "a.parquet").table.height == 2


def test_names_of_a_moment_may_differ(tmp_path: Path) -> None:
    own = EXAMPLES[("boolean_value", "categorical_value")].with_columns(subject_id=pl.lit(1), prediction_time=day(0))
    own.write_parquet(tmp_path / "a.parquet")
    assert read_labels(tmp_path / "a.parquet").names == ["a", "b"]


MALFORMED = {
    "no rows": (table().clear(), "holds no labels"),
    "no subject": (table(boolean_value=[True]).drop("subject_id"), "no column 'subject_id'"),
    "no time": (table(boolean_value=[True]).drop("prediction_time"), "no column 'prediction_time'"),
    "ids as text": (table(boolean_value=[True]).with_columns(pl.col("subject_id").cast(pl.String)), "expected Int64"),
    "ids beyond 64 bits": (
        table(boolean_value=[True]).with_columns(pl.lit(2**63 + SUBJECT, dtype=pl.UInt64).alias("subject_id")),
        "beyond 64 bits",
    ),
    "labels as text": (table(boolean_value=["yes"]), "'boolean_value' is String, expected Boolean"),
    "labels as numbers": (table(boolean_value=[1]), "'boolean_value' is Int64, expected Boolean"),
    "a null label": (table(boolean_value=[True, None]), "1 of 2 rows have no boolean_value"),
    "a null subject": (
        table(subject_id=[None, 1], boolean_value=[True, False]).with_columns(prediction_time=day(0)),
        "1 of 2 rows have no subject_id",
    ),
    "days that are no number": (table(boolean_value=[True], float_value=[float("nan")]), "that is no number"),
    "days below zero": (table(boolean_value=[True], float_value=[-1.0]), "days .float_value. below 0"),
    "meaningless together": (table(integer_value=[1], float_value=[1.0]), "integer_value and float_value together"),
    "a contradiction": (
        table(boolean_value=[True, False]).with_columns(subject_id=pl.lit(SUBJECT), prediction_time=day(0)),
        r"1 row\(s\) contradict another",
    ),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_without_naming_a_patient(
    content: pl.DataFrame, message: str, tmp_path: Path
) -> None:
    content.write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message) as refused:
        read_labels(tmp_path)
    assert "\n" not in str(refused.value)
    assert "4000012" not in str(refused.value)


def test_files_of_two_kinds_are_refused(tmp_path: Path) -> None:
    EXAMPLES[("boolean_value",)].write_parquet(tmp_path / "0.parquet")
    EXAMPLES[("integer_value",)].write_parquet(tmp_path / "1.parquet")
    with pytest.raises(UserError, match=r"labels of several kinds \(boolean_value; integer_value\)"):
        read_labels(tmp_path)


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text(f"{SUBJECT},1\n")
    with pytest.raises(UserError, match="cannot be read as parquet") as refused:
        read_labels(tmp_path / "a.parquet")
    assert str(SUBJECT) not in str(refused.value)
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "no parquet file inside"), (tmp_path / "none", "no such file")):
        with pytest.raises(UserError, match=message):
            read_labels(path)


def test_a_failure_while_labels_are_made_leaves_no_file(tmp_path: Path) -> None:
    def tables():
        yield EXAMPLES[("boolean_value",)]
        raise UserError("no")

    with pytest.raises(UserError):
        write_labels(tmp_path / "a.parquet", tables(), ("boolean_value",))
    assert list(tmp_path.iterdir()) == []
