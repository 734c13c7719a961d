"""What is an event, in which shards do events come, and to which split does a subject belong?

Events follow the MEDS 0.4 `DataSchema` plus an optional `visit_id`. A reader returns an `EventSource`: lazy shards of
whole subjects, each of bounded size, so that no data set ever needs to fit into memory.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from behrt.config import UserError

EVENT_SCHEMA: dict[str, pl.DataType] = {
    "subject_id": pl.Int64(),
    "time": pl.Datetime("us"),
    "code": pl.String(),
    "numeric_value": pl.Float32(),
    "visit_id": pl.String(),
}
"""Columns of every shard. A null `time` is a static event; a null `visit_id` leaves the visit to the other rules."""

SPLITS = ("train", "tuning", "held_out")
"""The patient splits, by their MEDS names."""

MAX_SHARD_EVENTS = 1_000_000
"""A shard is cut at this many events (a subject with more stays whole): some hundred megabytes while it is cleaned."""


@dataclass(frozen=True)
class Shard:
    """All events of some subjects.

    Attributes:
        events: lazy frame with `EVENT_SCHEMA`, in the order of the source.
        file: what an error about this shard names.
        place: number of the file in its source, and of the shard in the file; shards follow each other in this order.
    """

    events: pl.LazyFrame
    file: Path
    place: tuple[int, int]

    def collect(self) -> pl.DataFrame:
        """The shard in memory. Raises `UserError` if the file cannot be read to its end."""
        with readable(self.file):
            return self.events.collect()


class SubjectSplits:
    """The split of each subject, in 9 bytes a subject."""

    def __init__(self, subjects: npt.NDArray[np.int64], splits: npt.NDArray[np.int8]) -> None:
        """Subjects, int64 [rows], in any order; and the index into `SPLITS` of each, int8 [rows]."""
        if (subjects[1:] < subjects[:-1]).any():
            order = np.argsort(subjects)
            subjects, splits = subjects[order], splits[order]
        self._subjects, self._splits = subjects, splits

    def in_two_splits(self) -> int:
        """Subjects that are in more than one split, where there should be none."""
        torn = (self._subjects[1:] == self._subjects[:-1]) & (self._splits[1:] != self._splits[:-1])
        return len(np.unique(self._subjects[1:][torn]))

    def among(self, subject_ids: pl.Series) -> pl.DataFrame:
        """`subject_id` and `split` (Int8, an index into `SPLITS`) of those of the subjects that have a split."""
        wanted = subject_ids.drop_nulls().unique().sort().to_numpy()
        places = np.searchsorted(self._subjects, wanted)
        found = places < len(self._subjects)
        found[found] = self._subjects[places[found]] == wanted[found]
        split = pl.Series("split", self._splits[places[found]], dtype=pl.Int8)
        return pl.DataFrame([pl.Series("subject_id", wanted[found], dtype=pl.Int64), split])

    def names(self) -> dict[int, str]:
        """The name of each subject's split: for few of them."""
        return {subject: SPLITS[index] for subject, index in zip(self._subjects.tolist(), self._splits, strict=True)}


@dataclass(frozen=True)
class EventSource:
    """What a reader found.

    Attributes:
        name: of the data set.
        files: every file that belongs to it, for the fingerprint.
        read: those of them that were read; all, unless only a part was asked for.
        shards: the events; no subject is in two of them.
        splits: of the subjects, or None where the source has no splits.
        subjects: of a part, the ids in each file of events, int64, each sorted and distinct; empty for those not read.
        counts: rows that the reader itself had to leave out, by reason.
        in_order: whether the source's rows should already be sorted by subject and time.
    """

    name: str
    files: tuple[Path, ...]
    read: tuple[Path, ...]
    shards: tuple[Shard, ...]
    splits: SubjectSplits | None = None
    subjects: tuple[npt.NDArray[np.int64], ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    in_order: bool = True


@contextmanager
def readable(file: Path, kind: str = "parquet") -> Iterator[None]:
    """Turns a library's error on reading `file` into a `UserError`; its text may quote records, so it is left out."""
    try:
        with _without_panic_report():
            yield
    except pl.exceptions.InvalidOperationError as error:  # a conversion; its text goes on to quote values
        column = re.search(r"in column '(\w+)'", str(error))
        where = f" of {column[1]!r}" if column and column[1] in EVENT_SCHEMA else ""
        raise UserError(
            f"{file}: a value in it does not fit the type{where}: subject_id is an integer of 64 bits, time a "
            "timestamp in years 1 to 9999; correct it"
        ) from None
    except pl.exceptions.NoDataError:
        raise UserError(f"{file}: is empty, expected {kind} with a header; fetch the file again") from None
    except (pl.exceptions.PolarsError, OSError, EOFError, pl.exceptions.PanicException) as error:
        if isinstance(error, PermissionError):
            raise UserError(f"{file}: no permission to read it") from None
        if file.is_file() and file.stat().st_size == 0:
            raise UserError(f"{file}: is empty (0 bytes), expected {kind}; fetch the file again") from None
        if "utf-8" in str(error).lower():
            raise UserError(
                f"{file}: cannot be read as {kind}: is not UTF-8 text; convert it, as with `iconv -t UTF-8`"
            ) from None
        raise UserError(f"{file}: cannot be read as {kind}: truncated, damaged or another format") from None


_DETOUR = threading.RLock()
"""There is one standard error: two threads that lead it elsewhere would lose it."""


@contextmanager
def _without_panic_report() -> Iterator[None]:
    """Keeps back what polars writes to the standard error as it panics: a page of addresses, and values of records.

    The report does not pass through Python, hence the detour of the file descriptor itself. One thread at a time.
    """
    with _DETOUR, _standard_error_kept():
        yield


@contextmanager
def _standard_error_kept() -> Iterator[None]:
    try:
        terminal = os.dup(2)
    except OSError:  # it is closed, and nothing can be written there
        yield
        return
    panicked = False
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except pl.exceptions.PanicException:
            panicked = True
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            kept.seek(0)
            while not panicked and (block := kept.read(1 << 16)):
                os.write(2, block)


def shown_columns(names: Sequence[str]) -> str:
    """Names of columns for an error: the first few that are plain words.

    Of a table without a header, or with a column a patient, the names are ids, dates and codes: these are counted.

    >>> shown_columns(["subject_id", "time", "40000123", "ICD10CM//E119"])
    'subject_id, time and 2 more'
    """
    plain = [name for name in names if re.fullmatch(r"[A-Za-z][A-Za-z_]{1,39}", name)][:12]
    more = len(names) - len(plain)
    return f"{', '.join(plain) or 'no names that are plain words'}{f' and {more} more' if more else ''}"


def subject_counts(events: pl.LazyFrame) -> pl.DataFrame:
    """Events per subject, sorted by subject: columns `subject_id`, `events`. Reads the one column, streaming."""
    return (
        events.select("subject_id")
        .drop_nulls()
        .group_by("subject_id")
        .agg(pl.len().alias("events"))
        .collect(engine="streaming")
        .sort("subject_id")
    )


def subject_ranges(counts: pl.DataFrame, max_events: int = MAX_SHARD_EVENTS) -> list[tuple[int, int]]:
    """Ranges of subject ids (both ends included) that hold about `max_events` events each, whole subjects always.

    Ranges rather than hash buckets: files are mostly sorted by subject, and then the filter skips row groups.

    >>> subject_ranges(pl.DataFrame({"subject_id": [1, 5, 9], "events": [3, 3, 3]}), max_events=6)
    [(1, 5), (9, 9)]
    """
    shard = (pl.col("events").cum_sum() - 1) // max_events
    bounds = (
        counts.sort("subject_id")
        .group_by(shard.alias("shard"), maintain_order=True)
        .agg(pl.col("subject_id").min().alias("low"), pl.col("subject_id").max().alias("high"))
    )
    return list(zip(bounds["low"].to_list(), bounds["high"].to_list(), strict=True))


def is_in_order(events: pl.DataFrame) -> bool:
    """Whether rows are sorted by subject, then time (static events, whose time is null, first)."""
    subject, time = pl.col("subject_id"), pl.col("time")
    same = subject == subject.shift(1)
    back = (subject < subject.shift(1)) | (same & (time < time.shift(1)))
    static_late = same & time.is_null() & time.shift(1).is_not_null()
    return not events.select((back | static_late).any()).item()


def matches_code(code: str) -> pl.Expr:
    """Whether the column `code` is this code or one of its refinements (`MEDS_DEATH`, `MEDS_DEATH//IN_HOSPITAL`)."""
    return (pl.col("code") == code) | pl.col("code").str.starts_with(f"{code}//")


def mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea & Flood, 2014): a bijection of 64-bit integers that scatters its input."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def split_by_hash(
    subject_ids: npt.NDArray[np.int64], shares: tuple[float, float, float], seed: int
) -> npt.NDArray[np.int8]:
    """Index into `SPLITS` for each subject, from nothing but its id and the seed.

    A subject keeps its split when others join or leave the data set, on any machine.

    Args:
        subject_ids: int64 [subjects].
        shares: of train, tuning and held_out, summing to 1.

    >>> split_by_hash(np.arange(10), (0.5, 0.3, 0.2), seed=0).tolist()
    [1, 0, 2, 1, 0, 0, 0, 0, 2, 1]
    """
    seeded = subject_ids.astype(np.int64).view(np.uint64) ^ mix64(np.array([seed], np.uint64))
    uniform = (mix64(seeded) >> np.uint64(11)).astype(np.float64) / 2.0**53  # [0, 1)
    return np.searchsorted(np.cumsum(shares)[:2], uniform, side="right").astype(np.int8)
