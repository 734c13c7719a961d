"""Malformed MEDS files: one line and exit code 2, or the right handling; never anything else."""

import gzip
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .bad_input import (
    RARE,
    SUBJECT,
    Case,
    a_file,
    after,
    check,
    each_of,
    has_code,
    instead,
    largest_age,
    records,
    report,
)
from .small_records import BIRTH, DEATH, day, write_meds

MAX = 2**63 - 1
PREPARE = "prepare in --out out"


def meds(frame: pl.DataFrame | None = None) -> None:
    write_meds(Path("in"), records() if frame is None else frame)


def parquet(table: pa.Table) -> None:
    """A table as another program would write it."""
    Path("in").mkdir()
    pq.write_table(table, "in/0.parquet")


def changed(**columns: pl.Expr) -> Callable[[], None]:
    """Good events, in which these columns are other ones."""
    return lambda: meds(records().with_columns(**columns))


def arrow_with(name: str, values: Callable[[pa.Table], pa.Array]) -> Callable[[], None]:
    """Good events, in which one column has an Arrow type that only other programs write."""

    def make() -> None:
        table = records().drop("numeric_value", "visit_id").to_arrow()
        parquet(table.set_column(table.column_names.index(name), name, values(table)))

    return make


def with_rows(*rows: tuple[int, datetime | None, str]) -> Callable[[], None]:
    """Good events and a few more of subjects by their number."""

    def make() -> None:
        more = pl.DataFrame(
            [(SUBJECT + number, time, code) for number, time, code in rows],
            schema={"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String},
            orient="row",
        )
        meds(pl.concat([records(), more], how="diagonal"))

    return make


def splits_file(frame: pl.DataFrame | bytes) -> Callable[[], None]:
    def make() -> None:
        meds()
        Path("in/metadata").mkdir()
        if isinstance(frame, bytes):
            Path("in/metadata/subject_splits.parquet").write_bytes(frame)
        else:
            frame.write_parquet("in/metadata/subject_splits.parquet")

    return make


EARLIEST, LATEST = datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59, 999999)
EVERYBODY = range(20)

MEDS_CASES = [
    Case("birth in year 1", PREPARE,
         make=changed(time=pl.when(pl.col("code") == BIRTH).then(EARLIEST).otherwise("time")),
         handled=largest_age(2018, 2022)),
    Case("event in year 9999", PREPARE, make=with_rows((0, LATEST, "C0")), handled=report(events_kept=122)),
    Case("death in year 9999", PREPARE, make=with_rows((0, datetime(9999, 12, 31), DEATH)),
         handled=report(events_kept=121, death_events=1)),
    Case("timestamps at both ends of 64 bits", PREPARE,
         make=lambda: meds(pl.concat([records(), records().head(2).with_columns(
             time=pl.Series([-MAX, MAX]).cast(pl.Datetime("us")), code=pl.lit("C0"))])),
         handled=report(events_kept=121, events_outside_the_calendar=2)),
    Case("births at the lower end of 64 bits", PREPARE,
         make=lambda: meds(records().with_columns(time=pl.when(pl.col("code") == BIRTH).then(
             pl.lit(-MAX).cast(pl.Datetime("us"))).otherwise("time"))),
         refused=r"20 of 20 subjects have no MEDS_BIRTH event"),
    Case("milliseconds that 64 bits of microseconds cannot hold", PREPARE,
         make=arrow_with("time", lambda table: pa.array([MAX] * len(table), pa.timestamp("ms"))),
         refused=r"0\.parquet: cannot be read as parquet"),
    Case("seconds since 1970 as integers", PREPARE,
         make=arrow_with("time", lambda table: pa.array([1_500_000_000] * len(table))),
         refused=r"column 'time' is Int64, expected a timestamp"),
    Case("times of day", PREPARE, make=changed(time=pl.col("time").dt.time()),
         refused=r"column 'time' is Time, expected a timestamp"),
    Case("a time zone by name", PREPARE, make=changed(time=pl.col("time").dt.replace_time_zone("America/New_York")),
         handled=lambda: report(events_kept=121)()),
    Case("a time zone by offset", PREPARE,
         make=arrow_with("time", lambda table: table["time"].cast(pa.timestamp("us", "+05:30"))),
         refused=r"0\.parquet: column 'time' has the time zone '\+05:30'"),
    Case("a time zone that does not exist", PREPARE,
         make=arrow_with("time", lambda table: table["time"].cast(pa.timestamp("us", "Mars/Olympus"))),
         refused=r"0\.parquet: column 'time' has the time zone 'Mars/Olympus'"),
    Case("every event before the birth", PREPARE,
         make=changed(time=pl.when(pl.col("code") == BIRTH).then(datetime(2100, 1, 1)).otherwise("time")),
         refused=r"no training patient is left"),
    Case("births without a time", PREPARE,
         make=changed(time=pl.when(pl.col("code") != BIRTH).then("time")),
         refused=r"20 of 20 subjects have no MEDS_BIRTH"),
    Case("no time anywhere", "prepare in --out out --missing-birth keep",
         make=changed(time=pl.lit(None, pl.Datetime("us"))),
         refused=r"no training patient is left"),
    Case("unsigned subjects beyond 64 bits", PREPARE,
         make=changed(subject_id=pl.col("subject_id").cast(pl.UInt64) + 2**63),
         refused=r"0\.parquet: a value in it does not fit.*subject_id"),
    Case("negative subjects", PREPARE, make=changed(subject_id=-pl.col("subject_id")), handled=report(events_kept=121)),
    Case("subjects as numbers with a point", PREPARE, make=changed(subject_id=pl.col("subject_id").cast(pl.Float64)),
         refused=r"column 'subject_id' is Float64, expected an integer"),
    Case("subjects as decimals", PREPARE, make=changed(subject_id=pl.col("subject_id").cast(pl.Decimal(18, 0))),
         refused=r"column 'subject_id' is Decimal.*, expected an integer"),
    Case("subjects as booleans", PREPARE, make=changed(subject_id=pl.col("subject_id") > SUBJECT + 3),
         refused=r"column 'subject_id' is Boolean, expected an integer"),
    Case("subjects in lists", PREPARE, make=changed(subject_id=pl.concat_list("subject_id")),
         refused=r"column 'subject_id' is List.*, expected an integer"),
    Case("subjects all null", PREPARE, make=changed(subject_id=pl.lit(None, pl.Int64)),
         refused=r"no events in its 1 parquet file"),
    Case("codes as bytes", PREPARE, make=changed(code=pl.col("code").cast(pl.Binary)),
         refused=r"column 'code' is Binary, expected a string"),
    Case("codes all null", PREPARE, make=changed(code=pl.lit(None, pl.String)), refused=r"have no MEDS_BIRTH"),
    Case("files of different types", PREPARE,
         make=lambda: write_meds(
             Path("in"), records().filter(pl.col("subject_id") < SUBJECT + 10),
             records().filter(pl.col("subject_id") >= SUBJECT + 10).with_columns(
                 pl.col("subject_id").cast(pl.Int32), pl.col("code").cast(pl.Categorical),
                 pl.col("time").cast(pl.Datetime("ns")))),
         handled=report(events_kept=121, subjects_kept=20)),
    Case("two columns of one name", PREPARE,
         make=lambda: parquet(pa.table([pa.array([SUBJECT]), pa.array([day(0)]), pa.array(["A"]), pa.array(["B"])],
                                       names=["subject_id", "time", "code", "code"])),
         refused=r"0\.parquet"),
    Case("no columns at all", PREPARE, make=lambda: parquet(pa.table({})), refused=r"0\.parquet"),
    Case("a thousand columns and none of ours", PREPARE,
         make=lambda: parquet(pa.table({f"{RARE}{number}": [1] for number in range(1000)})),
         refused=r"0\.parquet: no column 'subject_id'.*1000"),
    Case("a code of ten million characters", PREPARE, make=with_rows((0, day(1), "Z" * 10_000_000)),
         handled=report(events_kept=122)),
    Case("a frequent code of a hundred thousand characters", PREPARE,
         make=with_rows(*((number, day(1), "Z" * 100_000) for number in EVERYBODY)), handled=has_code("Z" * 100_000)),
    Case("codes with null bytes", PREPARE, make=with_rows(*((number, day(1), "A\0B") for number in EVERYBODY)),
         handled=has_code("A\0B")),
    Case("codes that a spreadsheet would run", PREPARE,
         make=with_rows(*((number, day(1), "=HYPERLINK(A1)") for number in EVERYBODY)),
         handled=has_code("=HYPERLINK(A1)")),
    Case("codes with line breaks and quotes", PREPARE,
         make=with_rows(*((number, day(1), 'A"\r\n,\u2028B') for number in EVERYBODY)),
         handled=has_code('A"\r\n,\u2028B')),
    Case("codes named as special tokens", PREPARE,
         make=with_rows(*((number, day(1), "[MASK]") for number in EVERYBODY)),
         handled=lambda: (has_code("C0")(), report(events_kept=141)())),
    Case("codes of blanks", PREPARE, make=with_rows((0, day(1), ""), (1, day(1), " \t")),
         handled=report(events_without_code=2)),
    Case("values that are not finite", "prepare in --out out --numeric-bins 3",
         make=changed(numeric_value=pl.when(pl.int_range(pl.len()) % 3 == 0).then(float("inf")).otherwise(
             pl.when(pl.int_range(pl.len()) % 3 == 1).then(float("nan")))),
         handled=report(events_kept=121)),
    Case("values beyond 32 bits", "prepare in --out out --numeric-bins 3",
         make=changed(numeric_value=pl.lit(1e300)), handled=report(events_kept=121)),
    Case("text named parquet", PREPARE, make=a_file("in/0.parquet", f"subject_id,time,code\n{SUBJECT},,{RARE}\n" * 9),
         refused=r"0\.parquet: cannot be read as parquet"),
    Case("gzip named parquet", PREPARE, make=a_file("in/0.parquet", gzip.compress(RARE.encode() * 99)),
         refused=r"0\.parquet: cannot be read as parquet"),
    Case("parquet's first and last bytes alone", PREPARE, make=a_file("in/0.parquet", b"PAR1\xff\xff\xff\x7fPAR1"),
         refused=r"0\.parquet: cannot be read as parquet"),
    Case("a folder named parquet", PREPARE, make=lambda: Path("in/0.parquet").mkdir(parents=True),
         refused=r"in: no parquet file inside"),
    Case("a pipe among the files", PREPARE, make=lambda: instead("in/0.parquet", "pipe"),
         refused=r"in: no parquet file inside"),
    Case("a pipe as the source", "prepare in.parquet --out out", make=lambda: instead("in.parquet", "pipe"),
         refused=r"in\.parquet: .*expected a file or a folder"),
    Case("a device as the source", "prepare /dev/zero --out out", refused=r"/dev/zero: .*expected a file or a folder"),
    Case("a link to itself as the source", "prepare loop --out out", make=lambda: instead("loop", "loop"),
         refused=r"loop: no such file or folder|loop: .*symbolic links"),
    Case("a link to itself among the files", PREPARE, make=lambda: instead("in/0.parquet", "loop"),
         refused=r"in: no parquet file inside"),
    Case("a link to a folder above itself", PREPARE, make=after(meds, lambda: Path("in/data/up").symlink_to("../..")),
         handled=report(subjects_kept=20)),
    Case("a link to itself as the output", "prepare in --out loop", make=after(meds, lambda: instead("loop", "loop")),
         refused=r"--out loop: "),
    Case("an output below a file", "prepare in --out file/out", make=after(meds, a_file("file", "mine")),
         refused=r"--out file/out: "),
    Case("an output below a device", "prepare in --out /dev/null/out", make=meds, refused=r"--out /dev/null/out: "),
    Case("an output that is a pipe", "prepare in --out pipe", make=after(meds, lambda: instead("pipe", "pipe")),
         refused=r"--out pipe: is a file"),
    Case("an output named by nothing", ("prepare", "in", "--out", ""), make=meds, refused=r"--out"),
    Case("an output with a name too long", ("prepare", "in", "--out", "x" * 300), make=meds, refused=r"too long"),
    Case("a source with a name that is no text", ("prepare", os.fsdecode(b"\xff\xfe"), "--out", "out"),
         refused=r"no such file or folder"),
    Case("a file with a line break in its name", PREPARE, make=a_file("in/a\nb.parquet", "nothing"),
         refused=r"a b\.parquet: cannot be read as parquet"),
    Case("splits that are no parquet", PREPARE, make=splits_file(b"train,tuning"),
         refused=r"subject_splits\.parquet: cannot be read as parquet"),
    Case("splits without a column", PREPARE, make=splits_file(pl.DataFrame({"subject_id": [SUBJECT]})),
         refused=r"subject_splits\.parquet: no column 'split'"),
    Case("splits of no subject", PREPARE,
         make=splits_file(pl.DataFrame(schema={"subject_id": pl.Int64, "split": pl.String})),
         refused=r"no training patient is left"),
    Case("splits with a name of a million characters", PREPARE,
         make=splits_file(pl.DataFrame({"subject_id": [SUBJECT], "split": ["x" * 1_000_000]})),
         refused=r"subject_splits\.parquet: unknown split \(no word"),
    Case("splits for subjects beyond 64 bits", PREPARE,
         make=splits_file(pl.DataFrame({"subject_id": [2**63 + 5], "split": ["train"]},
         schema_overrides={"subject_id": pl.UInt64})),
         refused=r"subject_splits\.parquet: "),
    Case("a folder in the place of the splits", PREPARE,
         make=after(meds, lambda: Path("in/metadata/subject_splits.parquet").mkdir(parents=True)),
         refused=r"subject_splits\.parquet: is no file"),
    Case("a pipe in the place of the splits", PREPARE,
         make=after(meds, lambda: instead("in/metadata/subject_splits.parquet", "pipe")),
         refused=r"subject_splits\.parquet: is no file"),
]  # fmt: skip


@each_of(MEDS_CASES)
def test_malformed_events_are_refused_in_one_line_or_handled(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, tmp_path, capfd, monkeypatch)
