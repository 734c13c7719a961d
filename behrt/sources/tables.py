"""How are the tables of a source found, read, and turned into events?

A table is a CSV file (also gzip) or parquet. Readers turn each into a parquet file of events in a scratch folder,
streaming; `placement` makes shards of these.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import polars as pl

from behrt.config import UserError, refuse_what_is_no_file
from behrt.events import (
    EVENT_SCHEMA,
    readable,
    shown_columns,
)

logger = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".csv.gz", ".csv")

DATED = "dated"
"""Column of converted rows: whether the columns of their time hold anything, be it a time or not."""


# --- files ---


def find_tables(source: Path, names: Iterable[str], key: str, kind: str) -> dict[str, tuple[Path, ...]]:
    """The files of each table that is there, whatever the case of its name.

    A table is `NAME.csv`, `NAME.csv.gz`, `NAME.parquet`, or a folder `NAME` or `NAME.parquet` of parquet files.

    Args:
        key: the table without which the folder is none of this kind; it may lie in a folder inside `source`.
        kind: what `--format` calls such a source.

    Raises:
        UserError: no such folder, no key table, or a table that is there twice.
    """
    if not source.exists():
        raise UserError(f"{source}: no such folder; expected tables of --format {kind}")
    if not source.is_dir():
        raise UserError(f"{source}: is a file; --format {kind} expects the folder that holds its tables")
    found = _tables_in(source)
    if key not in found:
        inside = [
            tables for folder in sorted(source.iterdir()) if folder.is_dir() and key in (tables := _tables_in(folder))
        ]
        if len(inside) > 1:
            raise UserError(f"{source}: {len(inside)} of its folders hold a table {key!r}; name one of them")
        if not inside:
            raise UserError(
                f"{source}: no {key}.csv, {key}.csv.gz or {key}.parquet, a table that --format {kind} needs"
                + other_format(source, kind)
            )
        found = inside[0]
    for name in names:
        places = found.get(name, [])
        if len(places) > 1:
            one, other = (files[0].name for files in places[:2])
            raise UserError(f"{places[0][0].parent}: the table {name!r} is there twice, {one} and {other}; remove one")
    return {name: found[name][0] for name in names if name in found}


def _tables_in(folder: Path) -> dict[str, list[tuple[Path, ...]]]:
    """Everything in a folder that can be a table, by its name in lower case."""
    found: dict[str, list[tuple[Path, ...]]] = {}
    for entry in sorted(folder.iterdir()):
        name = entry.name.lower()
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if suffix is not None and entry.is_file():
            found.setdefault(name.removesuffix(suffix), []).append((entry,))
        elif entry.is_dir():
            parts = tuple(sorted(part for part in entry.glob("[!._]*.parquet") if part.is_file()))
            if parts:
                found.setdefault(name.removesuffix(".parquet"), []).append(parts)
    return found


def other_format(source: Path, kind: str) -> str:
    """A hint at the format that a folder has instead, if it shows one; empty otherwise."""
    here = {name for place in (source, source / "hosp") if place.is_dir() for name in _tables_in(place)}
    marks = {
        "mimic4": {"patients", "admissions"},
        "synthea": {"patients", "encounters"},
        "omop": {"person", "visit_occurrence"},
    }
    for other, tables in marks.items():
        if other != kind and tables <= here:
            return f"; it holds {' and '.join(sorted(tables))}, use --format {other}"
    if kind != "meds" and next(source.glob("**/*.parquet"), None) and not here & set().union(*marks.values()):
        return "; the folder holds parquet files, is it --format meds?"
    return ""


def name_missing(source: Path, kind: str, missing: Sequence[str]) -> dict[str, int]:
    """Warns of tables that a source does not have; a row of each for the report."""
    if missing:
        logger.warning("%s: --format %s finds no table %s; the result is without it", source, kind, ", ".join(missing))
    return {f"missing_table_{name}": 1 for name in missing}


# --- columns ---


def scan_csv(path: Path, *, tabs: bool = False) -> tuple[pl.LazyFrame, list[str]]:
    """A CSV file with all columns as strings, empty fields null; and the names of its columns.

    Args:
        tabs: a header that is separated by tabs is read so, without quotes, as vocabularies of OMOP come.
    """
    with path.open("rb") as stream:
        magic = stream.read(2)
    if magic and path.suffix.lower() == ".gz" and magic != b"\x1f\x8b":
        raise UserError(f"{path}: not gzip data; if it is plain text, name it {path.stem}")
    if path.suffix.lower() != ".gz" and magic == b"\x1f\x8b":
        raise UserError(f"{path}: gzip data; name it {path.name}.gz")
    with readable(path, "CSV"):
        frame = pl.scan_csv(path, infer_schema=False, glob=False)
        found = frame.collect_schema().names()
        if tabs and len(found) == 1 and "\t" in found[0]:
            frame = pl.scan_csv(path, infer_schema=False, glob=False, separator="\t", quote_char=None)
            found = frame.collect_schema().names()
    return frame, found


def missing_column(path: Path, column: str, found: Sequence[str], *, all_missing: bool) -> UserError:
    """What to say of a column that a file does not have."""
    hint = f"it has {shown_columns(found)}"
    if all_missing and path.suffix.lower() != ".parquet":
        separators = {";": "semicolons", "\t": "tabs", "|": "bars"}
        other = next((name for mark, name in separators.items() if found and mark in found[0]), None)
        # without a header, the first line is a patient's
        hint = f"its columns are separated by {other}, expected commas" if other else "expected a header in line 1"
    return UserError(f"{path}: no column {column!r}; {hint}")


@dataclass(frozen=True)
class Table:
    """One file of a table; its columns are named in lower case.

    Attributes:
        name: of the table.
        frame: its known columns, as they are in the file.
    """

    name: str
    path: Path
    frame: pl.LazyFrame

    @cached_property
    def schema(self) -> Mapping[str, pl.DataType]:
        return dict(self.frame.collect_schema())

    @property
    def kind(self) -> str:
        """What an error calls the format of the file."""
        return "parquet" if self.path.suffix.lower() == ".parquet" else "CSV"

    def text(self, *columns: str) -> pl.Expr:
        """The first of these columns that is there, without blanks around it; null where it is empty, or none is."""
        column = next((column for column in columns if column in self.schema), None)
        if column is None:
            return pl.lit(None, dtype=pl.String)
        text = pl.col(column).cast(pl.String).str.strip_chars()
        return pl.when(text != "").then(text)

    def integer(self, *columns: str) -> pl.Expr:
        """Likewise as 64-bit integers, of either sign; `17.0`, as programs write ids where some are missing, is 17."""
        column = next((column for column in columns if column in self.schema), None)
        if column is not None and self.schema[column].is_numeric():
            return pl.col(column).cast(pl.Int64, strict=False)
        return self.text(*columns).str.strip_suffix(".0").cast(pl.Int64, strict=False)

    def number(self, *columns: str) -> pl.Expr:
        """Likewise as numbers."""
        return self.text(*columns).cast(pl.Float32, strict=False)

    def time(self, *columns: str) -> pl.Expr:
        """The first of these columns that holds something in a row, as a time (of a date, its midnight), else null."""
        there = [column for column in columns if column in self.schema]
        if all(self.schema[column] == pl.String for column in there):
            return _parsed(pl.coalesce([self.text(column) for column in there or columns]))
        return pl.coalesce([self._as_time(column) for column in there])

    def dated(self, *columns: str) -> pl.Expr:
        """Whether one of these columns holds something in a row."""
        return pl.any_horizontal([self.text(column).is_not_null() for column in columns])

    def _as_time(self, column: str) -> pl.Expr:
        dtype = self.schema[column]
        value = pl.col(column)
        if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
            value = value.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return value.cast(pl.Datetime("us")) if dtype.is_temporal() else _parsed(self.text(column))


def _parsed(text: pl.Expr) -> pl.Expr:
    """Texts as times: `2020-01-31`, also with `08:15` or `08:15:59`; fractions of a second are cut off."""
    start = text.str.head(19).str.replace("T", " ", literal=True)
    ends_well = text.str.slice(19).str.contains(r"^(?:\.\d*)?(?:[Zz]|\+00:?00)?$")

    def read(form: str) -> pl.Expr:
        return start.str.to_datetime(form, time_unit="us", strict=False)

    exact = pl.when(ends_well).then(read("%Y-%m-%d %H:%M:%S"))
    return pl.coalesce(exact, read("%Y-%m-%d"), read("%Y-%m-%d %H:%M"), read("%Y%m%d"))


def open_table(name: str, path: Path, needed: Iterable[str | tuple[str, ...]], optional: Iterable[str] = ()) -> Table:
    """One file of a table, its columns named in whatever case.

    Args:
        needed: columns that it must have; of several in a tuple, one is enough.

    Raises:
        UserError: the file cannot be read, a needed column is missing, or one is there twice.
    """
    refuse_what_is_no_file(path)
    if path.suffix.lower() == ".parquet":
        with readable(path):
            frame = pl.scan_parquet(path, glob=False)
            found = frame.collect_schema().names()
    else:
        frame, found = scan_csv(path, tabs=True)
    choices = [(column,) if isinstance(column, str) else column for column in needed]
    known = {column for choice in choices for column in choice} | set(optional)
    named: dict[str, str] = {}
    for column in found:
        lower = column.strip().lower()
        second = lower.removesuffix("_duplicated_0")  # so polars names it
        if lower in named or (second != lower and second in named):
            if second in known:
                raise UserError(f"{path}: two columns {second!r}; remove or rename one")
            continue
        named[lower] = column
    missing = [choice for choice in choices if not any(column in named for column in choice)]
    if missing:
        raise missing_column(path, missing[0][0], found, all_missing=len(missing) == len(choices))
    return Table(name, path, frame.select(pl.col(named[lower]).alias(lower) for lower in named if lower in known))


# --- events ---


def as_events(frame: pl.LazyFrame, *more: str) -> pl.LazyFrame:
    """Completes and casts to `EVENT_SCHEMA`, what does not parse becoming null; `more` columns stay as they are."""
    present = frame.collect_schema().names()
    return frame.select(
        *(
            pl.col(name).cast(dtype, strict=False) if name in present else pl.lit(None, dtype=dtype).alias(name)
            for name, dtype in EVENT_SCHEMA.items()
        ),
        *more,
    )


def is_whole() -> pl.Expr:
    """Whether an event has a subject, a code, and a time (gender alone needs none)."""
    has_time = pl.col("time").is_not_null() | pl.col("code").str.starts_with("GENDER//")
    return (pl.col("subject_id").is_not_null() & pl.col("code").is_not_null() & has_time).fill_null(False)


def without_unparsed(events: pl.LazyFrame, name: str, counts: Counter[str]) -> pl.LazyFrame:
    """Leaves out, and counts, rows without a readable subject, code or time."""
    dropped = events.filter(~is_whole()).select(pl.len()).collect(engine="streaming").item()
    counts[f"unparsed_rows_of_{name}"] = dropped
    return events.filter(is_whole())


def convert(
    tables: Sequence[Table],
    build: Callable[[Table], Sequence[pl.LazyFrame]],
    file: Path,
    times: Sequence[str],
    *,
    moment: str = "time",
    expected: str = "YYYY-MM-DD or YYYY-MM-DD HH:MM:SS",
) -> pl.LazyFrame:
    """Writes what `build` makes of each file of a table into one parquet file, streaming.

    Args:
        build: frames of the same columns, among them `DATED` and the time, which is called `moment`.
        times: columns that the error names if most of them are no times; and what is `expected` in them.

    Raises:
        UserError: a file cannot be read to its end, or most of its times cannot be read.
    """
    pieces = []
    for number, table in enumerate(tables):
        piece = file.with_name(f"{file.stem}-{number}.parquet")
        with readable(table.path, table.kind):
            pl.concat(build(table)).sink_parquet(piece)
        pieces.append(pl.scan_parquet(piece, glob=False))
        unread = pl.col(DATED) & pl.col(moment).is_null()
        dated, lost = pieces[-1].select(pl.col(DATED).sum(), lost=unread.sum()).collect(engine="streaming").row(0)
        if 2 * lost > dated:
            columns = " or ".join(repr(column) for column in times if column in table.schema)
            raise UserError(
                f"{table.path}: {lost} of {dated} rows have no readable time in {columns}, expected {expected}; "
                "convert it"
            )
    return pl.concat(pieces)


_GENDERS = {"f": "F", "female": "F", "m": "M", "male": "M"}


def gender_code(text: pl.Expr) -> pl.Expr:
    """`GENDER//F`, however a source spells it."""
    return pl.concat_str(pl.lit("GENDER//"), text.str.to_lowercase().replace_strict(_GENDERS, default=text))
