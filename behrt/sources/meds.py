"""How are MEDS files, and files that are almost MEDS, read?

Three layouts: a folder with `data/**/*.parquet` (and `metadata/subject_splits.parquet`), a folder with
`train/ tuning/ held_out/`, or parquet files alone (one file, or a folder of them).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from behrt.config import UserError, nearest, refuse_what_is_no_file
from behrt.events import (
    EVENT_SCHEMA,
    MAX_SHARD_EVENTS,
    SPLITS,
    EventSource,
    Shard,
    readable,
    shown_columns,
    subject_counts,
    subject_ranges,
)

logger = logging.getLogger(__name__)


def open_meds(source: Path, columns: Mapping[str, str], *, max_shard_events: int = MAX_SHARD_EVENTS) -> EventSource:
    """The events under `source`, with splits where it has some.

    Args:
        columns: renames of near-MEDS columns, name in the files to name in MEDS.

    Raises:
        UserError: no such path, no parquet in it, a missing column or a wrong dtype, an unreadable file, a subject in
            two files or two splits, an unknown split.
    """
    files = find_parquet(source)
    shards: list[Shard] = []
    counted: list[pl.DataFrame] = []
    for number, file in enumerate(files):
        events = scan_events(file, columns)
        with readable(file):
            counts = subject_counts(events)
        counted.append(counts.with_columns(pl.lit(number).alias("file")))
        if counts["events"].sum() <= max_shard_events:
            shards.append(Shard(events, file))
        else:
            shards += [
                Shard(events.filter(pl.col("subject_id").is_between(low, high)), file)
                for low, high in subject_ranges(counts, max_shard_events)
            ]
    subjects = pl.concat(counted)
    if subjects.is_empty():
        raise UserError(f"{source}: no events in its {len(files)} parquet file(s); expected at least one")
    _refuse_shared_subjects(subjects, files, source)

    root = source if source.is_dir() else source.parent
    splits_file = root / "metadata" / "subject_splits.parquet"
    used = list(files)
    if source.is_dir() and splits_file.exists():
        refuse_what_is_no_file(splits_file)
        splits: pl.DataFrame | None = read_splits(splits_file)
        used.append(splits_file)
    else:
        splits = _splits_from_folders(subjects, files, source)
    return EventSource(name=source.resolve().stem, files=tuple(used), shards=tuple(shards), splits=splits)


def find_parquet(source: Path) -> list[Path]:
    """The event files of a MEDS data set, sorted by path."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected MEDS parquet")
    if source.is_file():
        if source.suffix != ".parquet":
            raise UserError(f"{source}: not a .parquet file; for MIMIC-IV tables name their folder and --format mimic4")
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: is a pipe or a device, expected a file or a folder; save its content first")
    split_folders = [source / split for split in SPLITS if (source / split).is_dir()]
    if (source / "data").is_dir():
        folders, pattern = [source / "data"], "**/*.parquet"
    elif split_folders:
        folders, pattern = split_folders, "**/*.parquet"
    else:
        folders, pattern = [source], "*.parquet"
    files = sorted(file for folder in folders for file in folder.glob(pattern) if file.is_file())
    if not files:
        where = " or ".join(str(folder) for folder in folders)
        mimic = any((source / place).is_file() for name in ("patients.csv", "patients.csv.gz")
                    for place in (name, f"hosp/{name}"))  # fmt: skip
        hint = "; it holds MIMIC-IV tables, use --format mimic4" if mimic else ""
        raise UserError(f"{where}: no parquet file inside, expected MEDS events (*.parquet){hint}")
    return files


def scan_events(file: Path, columns: Mapping[str, str]) -> pl.LazyFrame:
    """Lazy events of one file with `EVENT_SCHEMA`; `numeric_value` and `visit_id` are optional, others ignored."""
    _refuse_unknown_time_zones(file)
    with readable(file):
        frame = pl.scan_parquet(file, glob=False)
        schema = dict(frame.collect_schema())
    for old, new in columns.items():
        if new not in EVENT_SCHEMA:
            raise UserError(f"--column {old}={new}: {new!r} is no MEDS column{nearest(new, list(EVENT_SCHEMA))}")
        if old not in schema:
            raise UserError(f"--column {old}={new}: {file} has no column {old!r}; it has {shown_columns(list(schema))}")
    names = {name: name for name in EVENT_SCHEMA if name in schema} | {new: old for old, new in columns.items()}
    for required in ("subject_id", "time", "code"):
        if required not in names:
            raise UserError(
                f"{file}: no column {required!r}; it has {shown_columns(list(schema))}; rename one with "
                f"--column NAME={required}"
            )
    selected = []
    for name, dtype in EVENT_SCHEMA.items():
        if name in names:
            selected.append(_converted(names[name], schema[names[name]], name, file).alias(name))
        else:
            selected.append(pl.lit(None, dtype=dtype).alias(name))
    return frame.select(selected)


def _refuse_unknown_time_zones(file: Path) -> None:
    """Offsets such as +05:30, which other programs write as time zones, are none of polars'."""
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return  # polars says what is wrong
    for column in schema:
        zone = getattr(column.type, "tz", None) or "UTC"
        try:
            ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise UserError(
                f"{file}: column {column.name!r} has the time zone {zone[:40]!r}, expected a name of the tz database; "
                "convert it to UTC"
            ) from None


def _converted(column: str, found: pl.DataType, name: str, file: Path) -> pl.Expr:
    """The column in the dtype of `EVENT_SCHEMA[name]`, or a `UserError` that says which dtypes can be."""
    value = pl.col(column)
    if name == "subject_id" and found.is_integer():
        return value.cast(pl.Int64)
    if name == "time" and isinstance(found, pl.Datetime):
        if found.time_zone is not None:
            value = value.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return value.cast(pl.Datetime("us"))
    if name == "time" and found == pl.Date:
        return value.cast(pl.Datetime("us"))
    if name in ("code", "visit_id") and isinstance(found, (pl.String, pl.Categorical, pl.Enum)):
        text = value.cast(pl.String)
        return pl.when(text != "").then(text) if name == "visit_id" else text
    if name == "visit_id" and found.is_integer():
        return value.cast(pl.String)
    if name == "numeric_value" and (found.is_numeric() or found == pl.Null):
        return value.cast(pl.Float32)
    expected = {
        "subject_id": "an integer",
        "time": "a timestamp (us or ns)",
        "code": "a string",
        "numeric_value": "a number",
        "visit_id": "a string or an integer",
    }[name]
    raise UserError(
        f"{file}: column {column!r} is {found}, expected {expected}; convert it, or name another (--column)"
    )


def read_splits(file: Path) -> pl.DataFrame:
    """`subject_id` and `split` of a MEDS `subject_splits.parquet`."""
    with readable(file):
        frame = pl.read_parquet(file)
    for name, expected in (("subject_id", "an integer"), ("split", "a string")):
        if name not in frame.columns:
            raise UserError(f"{file}: no column {name!r}; it has {shown_columns(frame.columns)}")
        dtype = frame.schema[name]
        if not (dtype.is_integer() if name == "subject_id" else isinstance(dtype, pl.String)):
            raise UserError(f"{file}: column {name!r} is {dtype}, expected {expected}; convert it")
    with readable(file):  # the text of a failed cast quotes ids
        frame = frame.select(pl.col("subject_id").cast(pl.Int64), "split").drop_nulls().unique(maintain_order=True)
    unknown = sorted(set(frame["split"].unique().to_list()) - set(SPLITS))
    if unknown:
        found = repr(unknown[0]) if re.fullmatch("[A-Za-z_-]{1,20}", unknown[0]) else "(no word; another column's?)"
        raise UserError(f"{file}: unknown split {found}, expected {', '.join(SPLITS)}")
    twice = int(frame["subject_id"].is_duplicated().sum())
    if twice:
        count = frame.filter(frame["subject_id"].is_duplicated())["subject_id"].n_unique()
        raise UserError(f"{file}: {count} subject(s) are in more than one split; each belongs into one")
    return frame


def _split_of_file(file: Path, source: Path) -> str | None:
    """The split that a file's folder names, if any: `train/…` or `data/train/…` under the source."""
    if not source.is_dir():
        return None
    parts = file.relative_to(source).parts[:-1]
    parts = parts[1:] if parts[:1] == ("data",) else parts
    return parts[0] if parts and parts[0] in SPLITS else None


def _splits_from_folders(subjects: pl.DataFrame, files: list[Path], source: Path) -> pl.DataFrame | None:
    """Splits by folder, if every file lies in a folder named for one."""
    names = [_split_of_file(file, source) for file in files]
    if any(name is None for name in names):
        return None
    by_file = pl.DataFrame({"file": range(len(files)), "split": names}, schema={"file": pl.Int32, "split": pl.String})
    return subjects.join(by_file, on="file", how="left", maintain_order="left").select("subject_id", "split")


def _refuse_shared_subjects(subjects: pl.DataFrame, files: list[Path], source: Path) -> None:
    """A subject in two files would become two patients, or leak from one split into another."""
    shared = subjects.filter(pl.col("subject_id").is_duplicated())
    if shared.is_empty():
        return
    pairs = (
        shared.group_by("subject_id")
        .agg(pl.col("file").min().alias("first"), pl.col("file").max().alias("last"))
        .sort("first", "last", "subject_id")
    )
    first, last = files[pairs["first"][0]], files[pairs["last"][0]]
    one, other = _split_of_file(first, source), _split_of_file(last, source)
    if one != other:
        raise UserError(
            f"{source}: {pairs.height} subject(s) are in more than one of its split folders, first seen in {one}/ and "
            f"{other}/; each belongs into one split"
        )
    raise UserError(
        f"{source}: {pairs.height} subject(s) have events in more than one file, first seen in {first.name} and "
        f"{last.name}; MEDS keeps a subject in one file: join these files into one"
    )
