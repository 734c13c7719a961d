"""How are labels read and written?

In the MEDS `LabelSchema`: `subject_id`, `prediction_time`, and value columns. What a file means follows from those of
its value columns that are not empty (`KINDS`):

- `binary`: `boolean_value`;
- `multilabel`: `boolean_value` and `categorical_value`, a row for each name of each moment. A name that has no row at a
  moment is not known there, which is not the same as false;
- `survival`: `float_value`, the days from the prediction to the event or to the end of observation, and
  `boolean_value`, whether it is the event;
- `multiclass`: `integer_value`, or `categorical_value`; `regression`: `float_value`; `moments`: none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from meds.schema import LabelSchema

from behrt.config import UserError, refuse_what_is_no_file
from behrt.events import readable, shown_columns
from behrt.files import replacing_file

LABEL_SCHEMA: dict[str, pl.DataType] = {
    "subject_id": pl.Int64(),
    "prediction_time": pl.Datetime("us"),
    "boolean_value": pl.Boolean(),
    "integer_value": pl.Int64(),
    "float_value": pl.Float32(),
    "categorical_value": pl.String(),
}
"""The columns of `LabelSchema`."""

VALUES = tuple(LABEL_SCHEMA)[2:]

TASK_KEY = b"behrt.task"
"""Of the parquet file's own metadata: which task its labels are of; files of others lack it."""
LONGEST_TASK = 300

KINDS = {
    (): "moments",
    ("boolean_value",): "binary",
    ("boolean_value", "categorical_value"): "multilabel",
    ("boolean_value", "float_value"): "survival",
    ("integer_value",): "multiclass",
    ("categorical_value",): "multiclass",
    ("float_value",): "regression",
}
"""What labels with these value columns are."""


@dataclass(frozen=True)
class Labels:
    """Labels of one task.

    Attributes:
        kind: one of `KINDS`.
        task: what they are of, where the files say so (`write_labels`).
        table: `subject_id`, `prediction_time` and the value columns that are not empty, none with a null; distinct,
            sorted by subject, time and name.
    """

    kind: str
    table: pl.DataFrame
    task: str | None = None

    @property
    def names(self) -> list[str]:
        """Of the labels of a moment, sorted; empty where there is one."""
        return sorted(self.table["categorical_value"].unique().to_list()) if self.kind == "multilabel" else []


def read_labels(path: Path) -> Labels:
    """The labels in a parquet file, or in all of them in a folder and its folders.

    Columns that `LabelSchema` does not have are ignored, times with a zone become UTC, and rows that say the same are
    one.

    Raises:
        UserError: no such file, none with labels, a column is missing or of a wrong type, a value is null or no number,
            value columns that mean nothing together, rows that contradict each other. It names no patient.
    """
    files = _find(path)
    tables = [table for file in files if (table := _read(file)).height]
    filled = [_filled(table) for table in tables]
    if not filled:
        raise UserError(f"{path}: holds no labels, expected rows of subject_id, prediction_time and a value")
    for number, columns in enumerate(filled):
        if columns != filled[0]:
            raise UserError(
                f"{path}: its files hold labels of several kinds ({_listed(filled[0])}; {_listed(filled[number])}); "
                "name those of one task"
            )
    values = filled[0]
    if values not in KINDS:
        raise UserError(f"{path}: {_listed(values)} together mean nothing here; docs/tasks.md says what does")
    table = pl.concat([table.select("subject_id", "prediction_time", *values) for table in tables])
    tasks = {_task_of(file) for file in files}
    return Labels(KINDS[values], _checked(table, values, str(path)), tasks.pop() if len(tasks) == 1 else None)


def _task_of(file: Path) -> str | None:
    try:
        told = (pq.read_schema(file).metadata or {}).get(TASK_KEY)
    except (OSError, pa.ArrowException):  # polars reads some that Arrow does not
        return None
    return None if told is None else told.decode(errors="replace")[:LONGEST_TASK]


def _find(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected labels in parquet")
    if not path.is_dir():
        refuse_what_is_no_file(path)
        return [path]
    files = sorted(file for file in path.glob("**/*.parquet") if file.is_file())
    if not files:
        raise UserError(f"{path}: no parquet file inside, expected labels (*.parquet)")
    return files


def _read(file: Path) -> pl.DataFrame:
    """The columns of `LabelSchema` that the file has."""
    with readable(file):
        frame = pl.scan_parquet(file, glob=False)
        schema = dict(frame.collect_schema())
    for required in ("subject_id", "prediction_time"):
        if required not in schema:
            raise UserError(f"{file}: no column {required!r}; it has {shown_columns(list(schema))}")
    columns = [_converted(name, schema[name], file).alias(name) for name in LABEL_SCHEMA if name in schema]
    try:
        with readable(file):
            return frame.select(columns).collect()
    except UserError:
        raise UserError(f"{file}: cannot be read: damaged, or a subject_id beyond 64 bits") from None


def _converted(name: str, found: pl.DataType, file: Path) -> pl.Expr:
    value, wanted = pl.col(name), LABEL_SCHEMA[name]
    if found == pl.Null and name in VALUES:
        return value.cast(wanted)
    if name == "subject_id" and found.is_integer():
        return value.cast(wanted)
    if name == "prediction_time" and (isinstance(found, pl.Datetime) or found == pl.Date):
        if isinstance(found, pl.Datetime) and found.time_zone is not None:
            value = value.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return value.cast(wanted)
    if name == "boolean_value" and found == pl.Boolean:
        return value
    if name == "integer_value" and found.is_integer():
        return value.cast(wanted)
    if name == "float_value" and found.is_numeric():
        return value.cast(wanted)
    if name == "categorical_value" and isinstance(found, (pl.String, pl.Categorical, pl.Enum)):
        return value.cast(wanted)
    raise UserError(f"{file}: column {name!r} is {found}, expected {wanted}; convert it")


def _filled(table: pl.DataFrame) -> tuple[str, ...]:
    """Value columns that hold something: who writes all of them leaves null what is not meant."""
    return tuple(name for name in VALUES if name in table.columns and table[name].null_count() < table.height)


def _listed(columns: tuple[str, ...]) -> str:
    return " and ".join(columns) or "no value"


def _checked(table: pl.DataFrame, values: tuple[str, ...], where: str) -> pl.DataFrame:
    """The table, distinct and sorted."""
    for name in table.columns:
        nulls = table[name].null_count()
        if nulls:
            raise UserError(f"{where}: {nulls} of {table.height} rows have no {name}; give it, or leave them out")
    if "float_value" in values:
        odd = table.filter(~pl.col("float_value").is_finite()).height
        if odd:
            raise UserError(f"{where}: {odd} of {table.height} rows have a float_value that is no number")
        negative = table.filter(pl.col("float_value") < 0).height
        if negative and KINDS[values] == "survival":
            raise UserError(f"{where}: {negative} of {table.height} rows have days (float_value) below 0")
    key = ["subject_id", "prediction_time", *(["categorical_value"] if KINDS[values] == "multilabel" else [])]
    table = table.unique(maintain_order=True)
    contradicting = table.height - table.unique(key).height
    if contradicting:
        raise UserError(f"{where}: {contradicting} row(s) contradict another one of the same subject and time")
    return table.sort(key)


def told_task(task: str) -> dict[bytes, bytes]:
    """The metadata of a file of labels of this task."""
    return {TASK_KEY: task.encode()}


def write_labels(
    path: Path, tables: Iterable[pl.DataFrame], values: tuple[str, ...], *, task: str | None = None
) -> int:
    """Writes labels as a parquet file that only its owner can read, table by table; the number of rows.

    Args:
        tables: with `subject_id`, `prediction_time` and the columns `values`, none with a null.
        task: which the labels are of; `read_labels` tells it.
    """
    columns = ["subject_id", "prediction_time", *values]
    schema = pa.schema(
        [LabelSchema.schema().field(name) for name in columns], metadata=None if task is None else told_task(task)
    )
    rows = 0
    with replacing_file(path) as beside:
        beside.touch(mode=0o600)
        with pq.ParquetWriter(beside, schema) as writer:
            for table in tables:
                if table.height:
                    arrow = table.select(pl.col(name).cast(LABEL_SCHEMA[name]) for name in columns).to_arrow()
                    writer.write_table(arrow.cast(schema))
                rows += table.height
    return rows
