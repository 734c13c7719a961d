"""How are the CSV tables of Synthea read, of current versions and of older ones?

`patients` and at least one table of events, others as far as they are there; names of columns in either case, times as
`START`, `DATE` or `DATETIME`, with a time of day or without. Choices, for what Synthea leaves open:

- The subject is a 63-bit hash of the patient's id (a UUID), since MEDS has integers there: the first 8 bytes of its
  BLAKE2b, less their last bit. It depends on nothing else; two patients of the same hash are refused.
- Birth is `BIRTHDATE`, death `DEATHDATE`. The gender is a static code, `GENDER//F`.
- An encounter of class inpatient gives `ADMISSION//INPATIENT` at its start and `DISCHARGE` at its end; another one
  `VISIT//<class>`, or `VISIT` where it has none.
- Codes are those of the tables: `CONDITION//44054006` and `PROCEDURE//…`, `CAREPLAN//…` (SNOMED CT), `MEDICATION//…`
  (RxNorm), `IMMUNIZATION//…` (CVX), `OBSERVATION//…` (LOINC) with its value where that is a number. Each event stands
  at its start.
- A date counts as midnight; where its encounter begins later on that day, as the encounter's beginning. Events without
  an encounter, or with one that `encounters` does not have for this patient, are grouped by date.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import partial
from pathlib import Path

import polars as pl

from behrt.config import UserError
from behrt.events import MAX_SHARD_EVENTS, EventSource, readable
from behrt.sources.placement import Converted, end_of_visit, sharded
from behrt.sources.tables import (
    DATED,
    Table,
    as_events,
    convert,
    find_tables,
    gender_code,
    name_missing,
    open_table,
    without_unparsed,
)

PREFIXES = {
    "observations": "OBSERVATION",
    "immunizations": "IMMUNIZATION",
    "medications": "MEDICATION",
    "procedures": "PROCEDURE",
    "careplans": "CAREPLAN",
    "conditions": "CONDITION",
}
"""The tables of events, in the order in which events of the same moment follow each other."""

TIMES = ("start", "date", "datetime")
ENDS = ("stop",)


def open_synthea(source: Path, scratch: Path, *, max_shard_events: int = MAX_SHARD_EVENTS) -> EventSource:
    """The events of a folder of Synthea's CSV tables.

    Args:
        scratch: an empty folder for the converted tables; needed for as long as the shards are.

    Raises:
        UserError: a table or column is missing, a file cannot be read, most times of a table are none, or two patients
            have the same hash.
    """
    names = ["patients", "encounters", *PREFIXES]
    files = find_tables(source, names, "patients", "synthea")
    if files.keys() == {"patients"}:
        raise UserError(f"{source}: no table of events beside patients; expected one of {', '.join(names[1:])}")
    counts: Counter[str] = Counter()
    counts.update(name_missing(source, "synthea", [name for name in names if name not in files]))
    tables = {name: [_open(name, path) for path in files[name]] for name in files}
    subjects = _subjects(source, [table for own in tables.values() for table in own]).lazy()

    patients = convert(tables["patients"], partial(_patients, subjects=subjects), scratch / "patients.parquet",
                       ("birthdate",))  # fmt: skip
    before = [without_unparsed(patients.drop(DATED), "patients", counts)]
    after = []
    visits = pl.LazyFrame(schema={"subject_id": pl.Int64, "visit_id": pl.String, "begins": pl.Datetime("us")})
    if "encounters" in tables:
        file = scratch / "encounters.parquet"
        encounters = convert(
            tables["encounters"], partial(_encounters, subjects=subjects), file, TIMES, moment="begins"
        )
        visits = encounters.select("subject_id", "visit_id", "begins").drop_nulls(["subject_id", "visit_id"])
        before.append(without_unparsed(_starts(encounters), "encounters", counts))
        after.append(without_unparsed(_ends(encounters), "encounter_ends", counts))
    placed = []
    for name, prefix in PREFIXES.items():
        if name not in tables:
            continue
        frame = convert(
            tables[name],
            partial(_events, prefix=prefix, subjects=subjects),
            scratch / f"{name}.parquet",
            TIMES,
        )
        placed.append(without_unparsed(frame.drop(DATED), name, counts))
    return sharded(
        source,
        [path for name in names if name in files for path in files[name]],
        Converted(before, placed, after, visits),
        counts,
        kind="synthea",
        max_shard_events=max_shard_events,
    )


def _open(name: str, path: Path) -> Table:
    """One file of a table, with the columns that are read."""
    if name == "patients":
        return open_table(name, path, ["id", "birthdate"], ["deathdate", "gender"])
    if name == "encounters":
        return open_table(name, path, ["id", "patient", TIMES], [*ENDS, "encounterclass"])
    return open_table(name, path, ["patient", "code", TIMES], ["encounter", "value"])


def subject_of(patient: str) -> int:
    """The subject id of a patient's id.

    >>> subject_of("982192b6-6843-4011-ef46-32caaf87d8a9")
    480890706670014906
    """
    return int.from_bytes(hashlib.blake2b(patient.encode(), digest_size=8).digest()) >> 1


def _patient(table: Table) -> pl.Expr:
    return table.text("id" if table.name == "patients" else "patient").str.to_lowercase()


def _subjects(source: Path, tables: list[Table]) -> pl.DataFrame:
    """`patient` and `subject_id`, each patient that a table names once.

    It is held in memory: 60 bytes a patient, and some 220 while it is made.
    """
    found = []
    for table in tables:
        with readable(table.path, table.kind):
            found.append(table.frame.select(patient=_patient(table)).unique().collect(engine="streaming"))
    patients = pl.concat(found).unique().drop_nulls()["patient"].sort()
    subjects = pl.Series("subject_id", [subject_of(patient) for patient in patients], dtype=pl.Int64)
    same = len(subjects) - subjects.n_unique()
    if same:
        raise UserError(f"{source}: {same} patient(s) have the same 63-bit hash as another one; change their Id")
    return pl.DataFrame([patients, subjects])


def _with_subject(table: Table, subjects: pl.LazyFrame, **columns: pl.Expr) -> pl.LazyFrame:
    frame = table.frame.select(patient=_patient(table), **columns)
    return frame.join(subjects, on="patient", how="left", maintain_order="left").drop("patient")


def _patients(table: Table, subjects: pl.LazyFrame) -> list[pl.LazyFrame]:
    """Genders, births and deaths."""
    gender = _with_subject(table, subjects, code=gender_code(table.text("gender")), dated=pl.lit(False))
    birth = _with_subject(
        table, subjects, time=table.time("birthdate"), code=pl.lit("MEDS_BIRTH"), dated=table.dated("birthdate")
    )
    death = _with_subject(
        table,
        subjects,
        time=table.time("deathdate"),
        code=pl.lit("MEDS_DEATH"),
        dated=table.dated("deathdate"),
        dead=table.text("deathdate").is_not_null(),
    )
    events = [gender.filter(pl.col("code").is_not_null()), birth, death.filter("dead")]
    return [as_events(frame, DATED) for frame in events]


def _encounters(table: Table, subjects: pl.LazyFrame) -> list[pl.LazyFrame]:
    rows = _with_subject(
        table,
        subjects,
        visit_id=table.text("id"),
        begins=table.time(*TIMES),
        ends=end_of_visit(table.time(*ENDS), table.time(*TIMES), is_date=table.text(*ENDS).str.len_chars() <= 10),
        has_end=table.dated(*ENDS),
        kind=table.text("encounterclass").str.to_uppercase(),
        dated=table.dated(*TIMES),
    )
    return [rows]


def _starts(encounters: pl.LazyFrame) -> pl.LazyFrame:
    prefix = pl.when(pl.col("kind") == "INPATIENT").then(pl.lit("ADMISSION")).otherwise(pl.lit("VISIT"))
    code = pl.concat_str(prefix, "kind", separator="//", ignore_nulls=True)
    return as_events(encounters.with_columns(time=pl.col("begins"), code=code))


def _ends(encounters: pl.LazyFrame) -> pl.LazyFrame:
    stays = encounters.filter((pl.col("kind") == "INPATIENT") & pl.col("has_end"))
    return as_events(stays.with_columns(time=pl.col("ends"), code=pl.lit("DISCHARGE")))


def _events(table: Table, prefix: str, subjects: pl.LazyFrame) -> list[pl.LazyFrame]:
    events = _with_subject(
        table,
        subjects,
        time=table.time(*TIMES),
        code=pl.concat_str(pl.lit(f"{prefix}//"), table.text("code")),
        numeric_value=table.number("value"),
        visit_id=table.text("encounter"),
        dated=table.dated(*TIMES),
    )
    return [as_events(events, DATED)]
