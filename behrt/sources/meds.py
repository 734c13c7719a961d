"""How are MEDS files, and files that are almost MEDS, read?

Three layouts: a folder with `data/**/*.parquet` (and `metadata/subject_splits.parquet`), a folder with
`train/ tuning/ held_out/`, or parquet files alone (one file, or a folder of them).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import numpy.typing as npt
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
    SubjectSplits,
    readable,
    shown_columns,
    subject_counts,
    subject_ranges,
)
from behrt.fingerprint import name_in_source
from behrt.sources.tables import other_format

logger = logging.getLogger(__name__)

SPLIT_ROWS = 250_000
"""Rows of the table of splits that are read at a time: as text, a split takes four times the memory of its subject."""


def open_meds(
    source: Path,
    columns: Mapping[str, str],
    *,
    part: tuple[int, int] | None = None,
    max_shard_events: int = MAX_SHARD_EVENTS,
) -> EventSource:
    """The events under `source`, with splits where it has some.

    Of each subject, 8 bytes are held to see whether it lies in two files, and 9 for its split.

    Args:
        columns: renames of near-MEDS columns, name in the files to name in MEDS.
        part: number from 1, and number of all parts: only the files whose turn it is in the order of their names.
            Whether a subject lies in the files of two parts is then for the caller to see (`refuse_shared_subjects`).

    Raises:
        UserError: no such path, no parquet in it, fewer files than parts, a missing column or a wrong dtype, an
            unreadable file, a subject in two files or two splits, an unknown split.
    """
    files = find_parquet(source)
    index, parts = (0, 1) if part is None else (part[0] - 1, part[1])
    if parts > len(files):
        raise UserError(
            f"--shard {index + 1}/{parts}: {source} has {len(files)} file(s); name no more parts than files"
        )
    shards: list[Shard] = []
    subjects: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64) for _ in files]
    for number in range(index, len(files), parts):
        file = files[number]
        events = scan_events(file, columns)
        with readable(file):
            counts = subject_counts(events)
        subjects[number] = counts["subject_id"].to_numpy()
        if counts["events"].sum() <= max_shard_events:
            shards.append(Shard(events, file, (number, 0)))
        else:
            shards += [
                Shard(events.filter(pl.col("subject_id").is_between(low, high)), file, (number, cut))
                for cut, (low, high) in enumerate(subject_ranges(counts, max_shard_events))
            ]
    if part is None and not any(map(len, subjects)):
        raise UserError(f"{source}: no events in its {len(files)} parquet file(s); expected at least one")
    root = source if source.is_dir() else source.parent
    names = [name_in_source(file, root) for file in files]
    refuse_shared_subjects(subjects, names, str(source))

    splits_file = root / "metadata" / "subject_splits.parquet"
    used, read = list(files), files[index::parts]
    splits: SubjectSplits | None
    if source.is_dir() and splits_file.exists():
        refuse_what_is_no_file(splits_file)
        splits = read_splits(splits_file)
        used.append(splits_file)
        read.append(splits_file)
    else:
        splits = _splits_from_folders(subjects, names)
    return EventSource(
        name=source.resolve().stem,
        files=tuple(used),
        read=tuple(read),
        shards=tuple(shards),
        splits=splits,
        subjects=() if part is None else tuple(subjects),
    )


def find_parquet(source: Path) -> list[Path]:
    """The event files of a MEDS data set, sorted by path."""
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; expected MEDS parquet")
    if source.is_file():
        if source.suffix != ".parquet":
            raise UserError(
                f"{source}: not a .parquet file; for tables name their folder and --format mimic4, omop or synthea"
            )
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
        raise UserError(
            f"{where}: no parquet file inside, expected MEDS events (*.parquet){other_format(source, 'meds')}"
        )
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


def read_splits(file: Path) -> SubjectSplits:
    """What a MEDS `subject_splits.parquet` says."""
    with readable(file):
        frame = pl.scan_parquet(file, glob=False)
        schema = dict(frame.collect_schema())
    for name, expected in (("subject_id", "an integer"), ("split", "a string")):
        if name not in schema:
            raise UserError(f"{file}: no column {name!r}; it has {shown_columns(list(schema))}")
        dtype = schema[name]
        if not (dtype.is_integer() if name == "subject_id" else isinstance(dtype, pl.String)):
            raise UserError(f"{file}: column {name!r} is {dtype}, expected {expected}; convert it")
    frame = frame.select(pl.col("subject_id").cast(pl.Int64), "split")
    index = pl.col("split").replace_strict(dict(zip(SPLITS, range(len(SPLITS)), strict=True)), return_dtype=pl.Int8)
    pieces: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]] = [(np.zeros(0, np.int64), np.zeros(0, np.int8))]
    with readable(file):
        rows = frame.select(pl.len()).collect().item()
    for start in range(0, rows, SPLIT_ROWS):
        with readable(file):  # the text of a failed cast quotes ids
            piece = frame.slice(start, SPLIT_ROWS).collect().drop_nulls()
        unknown = sorted(set(piece["split"].unique().to_list()) - set(SPLITS))
        if unknown:
            found = repr(unknown[0]) if re.fullmatch("[A-Za-z_-]{1,20}", unknown[0]) else "(no word; another column's?)"
            raise UserError(f"{file}: unknown split {found}, expected {', '.join(SPLITS)}")
        pieces.append((piece["subject_id"].to_numpy().copy(), piece.select(index)["split"].to_numpy().copy()))
    subjects, splits = np.concatenate([ids for ids, _ in pieces]), np.concatenate([own for _, own in pieces])
    del pieces
    table = SubjectSplits(subjects, splits)
    torn = table.in_two_splits()
    if torn:
        raise UserError(f"{file}: {torn} subject(s) are in more than one split; each belongs into one")
    return table


def _split_of_file(name: str) -> str | None:
    """The split that the folder of a file in a source names, if any: `train/…` or `data/train/…`."""
    parts = PurePosixPath(name).parts[:-1]
    parts = parts[1:] if parts[:1] == ("data",) else parts
    return parts[0] if parts and parts[0] in SPLITS else None


def _splits_from_folders(subjects: Sequence[npt.NDArray[np.int64]], names: Sequence[str]) -> SubjectSplits | None:
    """Splits by folder, if every file lies in a folder named for one."""
    found = [split for name in names if (split := _split_of_file(name)) is not None]
    if len(found) < len(names):
        return None
    indices = np.array([SPLITS.index(split) for split in found], np.int8)
    return SubjectSplits(np.concatenate(subjects), np.repeat(indices, [len(own) for own in subjects]))


def refuse_shared_subjects(subjects: Sequence[npt.NDArray[np.int64]], names: Sequence[str], where: str) -> None:
    """A subject in two files would become two patients, or leak from one split into another.

    Args:
        subjects: the ids in each file, int64, distinct.
        names: of the files, relative to their source.
        where: the source, for the error.
    """
    every = np.concatenate([np.zeros(0, np.int64), *subjects])
    every.sort()
    shared = np.unique(every[1:][every[1:] == every[:-1]])
    if not len(shared):
        return
    first, last = np.full(len(shared), len(names)), np.full(len(shared), -1)
    for number, own in enumerate(subjects):
        here = np.isin(shared, own)
        first[here] = np.minimum(first[here], number)
        last[here] = number
    pair = np.lexsort((last, first))[0]
    one, other = names[first[pair]], names[last[pair]]
    if _split_of_file(one) != _split_of_file(other):
        raise UserError(
            f"{where}: {len(shared)} subject(s) are in more than one of its split folders, first seen in "
            f"{_split_of_file(one)}/ and {_split_of_file(other)}/; each belongs into one split"
        )
    raise UserError(
        f"{where}: {len(shared)} subject(s) have events in more than one file, first seen in {Path(one).name} and "
        f"{Path(other).name}; MEDS keeps a subject in one file: join these files into one"
    )
