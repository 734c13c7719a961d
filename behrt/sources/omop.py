"""How are the tables of the OMOP Common Data Model (5.3, 5.4) read?

CSV, CSV.gz or parquet, names of tables and columns in either case; `person` and at least one table of events, others as
far as they are there. Choices, for what the model leaves open:

- Birth is `birth_datetime`, else `year_of_birth` with month and day where known: a year alone is its 1 January. Death
  is the earliest row of `death`. The gender is a static code, `GENDER//F`.
- A code is named for its concept as `concept` has it (`CONDITION//Sinusitis`), else by the concept's id
  (`CONDITION//40481087`), and where that is 0 by its source value (`CONDITION//SOURCE//473.9`). Prefixes are
  `CONDITION`, `MEDICATION`, `PROCEDURE`, and by option `MEASUREMENT` and `OBSERVATION`, with their numbers.
- An inpatient visit, or one with a place of discharge, gives `ADMISSION//<visit concept>` at its start and
  `DISCHARGE//<place>` at its end; another one `VISIT//<visit concept>`. Its source value is an identifier: not read.
- Times are the datetime where there is one, else the date. A date counts as midnight; where its visit begins later on
  that day, as the visit's beginning; the end of a visit, as the end of that day.
- Events without a visit, or with one that `visit_occurrence` does not have for this person, are grouped by date.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
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

VISIT_ID = "visit_occurrence_id"


@dataclass(frozen=True)
class Kind:
    """How the rows of one table become events.

    Attributes:
        prefix: of the code.
        stem: of `<stem>_concept_id` and `<stem>_source_value`.
        moment: of `<moment>_datetime` and `<moment>_date`.
    """

    prefix: str
    stem: str
    moment: str

    @property
    def times(self) -> tuple[str, str]:
        return f"{self.moment}_datetime", f"{self.moment}_date"


KINDS = {
    "measurement": Kind("MEASUREMENT", "measurement", "measurement"),
    "observation": Kind("OBSERVATION", "observation", "observation"),
    "drug_exposure": Kind("MEDICATION", "drug", "drug_exposure_start"),
    "procedure_occurrence": Kind("PROCEDURE", "procedure", "procedure"),
    "condition_occurrence": Kind("CONDITION", "condition", "condition_start"),
}
"""The tables of events, in the order in which events of the same moment follow each other."""

STARTS, ENDS = ("visit_start_datetime", "visit_start_date"), ("visit_end_datetime", "visit_end_date")
TO_CONCEPT = ("discharged_to_concept_id", "discharge_to_concept_id")  # of 5.4, of 5.3
TO_SOURCE = ("discharged_to_source_value", "discharge_to_source_value")

INPATIENT = (9201, 262, 8717, 8971, 8920, 32037, 581379, 581382, 581383, 581384)
"""Visit concepts: inpatient, emergency and inpatient, inpatient hospital, psychiatric and rehabilitation facility,
intensive care, and the inpatient facilities for critical, intensive, cardiac care and newborns."""

GENDERS = {8532: "F", 8507: "M"}


def open_omop(
    source: Path,
    scratch: Path,
    *,
    measurements: bool = False,
    observations: bool = False,
    max_shard_events: int = MAX_SHARD_EVENTS,
) -> EventSource:
    """The events of a folder of OMOP tables.

    Args:
        scratch: an empty folder for the converted tables; needed for as long as the shards are.
        measurements: read `measurement` too.
        observations: read `observation` too.

    Raises:
        UserError: a table or column is missing, a file cannot be read, or most times of a table are none.
    """
    asked = {"measurement": measurements, "observation": observations}
    kinds = {name: kind for name, kind in KINDS.items() if asked.get(name, True)}
    names = ["person", "visit_occurrence", *kinds, "death", "concept", "2b_concept"]
    files = find_tables(source, names, "person", "omop")
    for name in asked:
        if name in kinds and name not in files:
            raise UserError(f"{source}: no table {name!r}, which --{name}s asks for; leave the flag out")
    if not files.keys() & {"visit_occurrence", *kinds}:
        raise UserError(
            f"{source}: no table of events beside person; expected one of visit_occurrence, {', '.join(kinds)}"
        )
    counts: Counter[str] = Counter()
    without_names = not files.keys() & {"concept", "2b_concept"}
    missing = [name for name in names if name not in files and not name.endswith("concept")]
    counts.update(name_missing(source, "omop", [*missing, "concept"] if without_names else missing))
    tables = {name: [_open(name, path) for path in files[name]] for name in files}

    raw = {
        name: convert(tables[name], partial(_raw_events, kind=kind), scratch / f"{name}.parquet", kind.times)
        for name, kind in kinds.items()
        if name in tables
    }  # fmt: skip
    visits = None
    if "visit_occurrence" in tables:
        file = scratch / "visit_occurrence.parquet"
        visits = convert(tables["visit_occurrence"], _raw_visits, file, STARTS, moment="begins")
    person = convert(
        tables["person"],
        _persons,
        scratch / "person.parquet",
        ("year_of_birth", "birth_datetime"),
        expected="a year, or a time as YYYY-MM-DD HH:MM:SS",
    )
    before = [without_unparsed(person.drop(DATED), "person", counts)]
    after = []
    if "death" in tables:
        death = convert(tables["death"], _deaths, scratch / "death.parquet",
                        ("death_datetime", "death_date"))  # fmt: skip
        after.append(without_unparsed(death.drop(DATED), "death", counts))

    used = [frame.select("concept") for frame in raw.values()]
    if visits is not None:
        used += [visits.select("concept"), visits.select(concept="to_concept")]
    concepts = _concept_names([*tables.get("concept", []), *tables.get("2b_concept", [])], used)

    placed = []
    if visits is not None:
        starts, ends = _starts(visits, concepts), _ends(visits, concepts)
        before.append(without_unparsed(starts, "visit_occurrence", counts))
        after.insert(0, without_unparsed(ends, "visit_ends", counts))
    for name, frame in raw.items():
        placed.append(without_unparsed(_coded(frame, kinds[name], concepts), name, counts))
    return sharded(
        source,
        [path for name in names if name in files for path in files[name]],
        Converted(before, placed, after, _known_visits(visits)),
        counts,
        kind="omop",
        max_shard_events=max_shard_events,
    )


def _open(name: str, path: Path) -> Table:
    """One file of a table, with the columns that are read."""
    if name == "person":
        optional = ("month_of_birth", "day_of_birth", "birth_datetime", "gender_concept_id", "gender_source_value")
        return open_table(name, path, ["person_id", ("year_of_birth", "birth_datetime")], [*optional, "year_of_birth"])
    if name == "visit_occurrence":
        columns: list[str | tuple[str, ...]] = [VISIT_ID, "person_id", "visit_concept_id", (STARTS[1], STARTS[0])]
        return open_table(name, path, columns, [*STARTS, *ENDS, *TO_CONCEPT, *TO_SOURCE])
    if name == "death":
        return open_table(name, path, ["person_id", ("death_date", "death_datetime")])
    if name in ("concept", "2b_concept"):
        return open_table(name, path, ["concept_id", "concept_name"])
    kind = KINDS[name]
    needed: list[str | tuple[str, ...]] = ["person_id", f"{kind.stem}_concept_id", (kind.times[1], kind.times[0])]
    return open_table(name, path, needed, [f"{kind.stem}_source_value", VISIT_ID, "value_as_number"])


def _persons(person: Table) -> list[pl.LazyFrame]:
    """Genders and births."""
    gender = person.integer("gender_concept_id").replace_strict(GENDERS, default=None, return_dtype=pl.String)
    named = pl.coalesce(gender, person.text("gender_source_value"))
    genders = person.frame.select(subject_id=person.integer("person_id"), code=gender_code(named), gender=named)
    year = person.integer("year_of_birth")
    known = pl.when(year.is_between(1, 9999)).then(year)  # of another year polars makes an error
    month, day = person.integer("month_of_birth"), person.integer("day_of_birth")
    month = pl.when(month.is_between(1, 12)).then(month).otherwise(1)
    first = pl.datetime(known, month, 1)
    last = first.dt.month_end().dt.day()
    # a 31st of a month that has none is its last day
    put = first + pl.duration(days=pl.min_horizontal(pl.when(day.is_between(1, 31)).then(day).otherwise(1), last) - 1)
    birth = pl.coalesce(person.time("birth_datetime"), put.cast(pl.Datetime("us")))
    births = person.frame.select(
        subject_id=person.integer("person_id"),
        time=birth,
        code=pl.lit("MEDS_BIRTH"),
        dated=person.dated("year_of_birth", "birth_datetime"),
    )
    static = genders.filter(pl.col("gender").is_not_null()).drop("gender").with_columns(pl.lit(False).alias(DATED))
    return [as_events(static, DATED), as_events(births, DATED)]


def _deaths(death: Table) -> list[pl.LazyFrame]:
    times = ("death_datetime", "death_date")
    events = death.frame.select(
        subject_id=death.integer("person_id"),
        time=death.time(*times),
        code=pl.lit("MEDS_DEATH"),
        dated=death.dated(*times),
    )
    return [as_events(events, DATED)]


def _raw_events(table: Table, kind: Kind) -> list[pl.LazyFrame]:
    """Rows whose concepts have no names yet."""
    rows = table.frame.select(
        subject_id=table.integer("person_id"),
        time=table.time(*kind.times),
        concept=table.integer(f"{kind.stem}_concept_id"),
        source=table.text(f"{kind.stem}_source_value"),
        numeric_value=table.number("value_as_number"),
        visit_id=table.integer(VISIT_ID).cast(pl.String),
        dated=table.dated(*kind.times),
    )
    return [rows]


def _raw_visits(table: Table) -> list[pl.LazyFrame]:
    rows = table.frame.select(
        subject_id=table.integer("person_id"),
        visit_id=table.integer(VISIT_ID).cast(pl.String),
        begins=table.time(*STARTS),
        ends=end_of_visit(table.time(*ENDS), table.time(*STARTS), is_date=table.text(ENDS[0]).is_null()),
        has_end=table.dated(*ENDS),
        concept=table.integer("visit_concept_id"),
        to_concept=table.integer(*TO_CONCEPT),
        to_source=table.text(*TO_SOURCE),
        dated=table.dated(*STARTS),
    )
    return [rows]


def _known_visits(visits: pl.LazyFrame | None) -> pl.LazyFrame:
    """The visits of each person, with their beginnings."""
    if visits is None:
        return pl.LazyFrame(schema={"subject_id": pl.Int64, "visit_id": pl.String, "begins": pl.Datetime("us")})
    return visits.select("subject_id", "visit_id", "begins").drop_nulls(["subject_id", "visit_id"])


def _concept_names(tables: list[Table], used: list[pl.LazyFrame]) -> pl.LazyFrame:
    """The names of those concepts that occur: `concept`, `name`. The whole table can have millions of rows."""
    names = pl.DataFrame(schema={"concept": pl.Int64, "name": pl.String})
    wanted = pl.concat(used).unique().collect(engine="streaming") if used else names.select("concept")
    for table in tables:
        own = table.frame.select(
            concept=table.integer("concept_id"), name=table.text("concept_name").str.replace_all(r"\s+", " ")
        )
        with readable(table.path, table.kind):
            found = own.drop_nulls().join(wanted.lazy(), on="concept", how="semi").collect(engine="streaming")
        names = pl.concat([names, found])
    return names.sort("concept", "name").unique("concept", keep="first").lazy()


def _named(frame: pl.LazyFrame, concepts: pl.LazyFrame, concept: str, source: str | None) -> pl.LazyFrame:
    """Adds `label`: the name of a concept, else its id, else (where it is 0) its source value; null without any."""
    identifier = pl.when(pl.col(concept) != 0).then(pl.col(concept))
    label = [pl.when(identifier.is_not_null()).then(pl.col("name")), identifier.cast(pl.String)]
    if source is not None:
        label.append(pl.concat_str(pl.lit("SOURCE//"), pl.col(source)))
    joined = frame.join(concepts, left_on=concept, right_on="concept", how="left", maintain_order="left")
    return joined.with_columns(pl.coalesce(label).alias("label")).drop("name")


def _coded(frame: pl.LazyFrame, kind: Kind, concepts: pl.LazyFrame) -> pl.LazyFrame:
    named = _named(frame, concepts, "concept", "source")
    return as_events(named.with_columns(code=pl.concat_str(pl.lit(f"{kind.prefix}//"), "label")))


def _is_stay(name: pl.Expr) -> pl.Expr:
    """Whether a visit is one that begins with an admission and ends with a discharge."""
    inpatient = pl.col("concept").is_in(INPATIENT) | name.str.to_lowercase().str.contains("inpatient", literal=True)
    discharged = (pl.col("to_concept") != 0).fill_null(False) | pl.col("to_source").is_not_null()
    return inpatient.fill_null(False) | discharged


def _starts(visits: pl.LazyFrame, concepts: pl.LazyFrame) -> pl.LazyFrame:
    named = _named(visits, concepts, "concept", None)
    prefix = pl.when(_is_stay(pl.col("label"))).then(pl.lit("ADMISSION")).otherwise(pl.lit("VISIT"))
    code = pl.concat_str(prefix, "label", separator="//", ignore_nulls=True)
    return as_events(named.with_columns(code=code, time=pl.col("begins")))


def _ends(visits: pl.LazyFrame, concepts: pl.LazyFrame) -> pl.LazyFrame:
    named = _named(visits, concepts, "concept", None)
    stays = named.filter(_is_stay(pl.col("label")) & pl.col("has_end")).drop("label")
    places = _named(stays, concepts, "to_concept", "to_source")
    code = pl.concat_str(pl.lit("DISCHARGE"), "label", separator="//", ignore_nulls=True)
    return as_events(places.with_columns(code=code, time=pl.col("ends")))
