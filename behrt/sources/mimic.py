"""How are the raw MIMIC-IV tables read?

From `hosp/` (or the folder itself), CSV or CSV.gz, and only the tables that are needed. Each is turned once into a
parquet file of events in a scratch folder, streaming; shards are then ranges of subjects over these files.

Choices, for the codes and times that MIMIC leaves open:

- Birth is 1 January of `anchor_year - anchor_age` (MIMIC top-codes ages above 89 as 91). Death is `dod`, a date: the
  history ends with that day. The gender is a static code.
- An admission gives `ADMISSION//<type>` at admittime and `DISCHARGE//<location>` at dischtime; `hadm_id` is the visit.
- Diagnoses and procedures become known with the discharge letter, so they are timed at dischtime: `ICD10CM//E119`,
  `ICD9CM//4139`, `ICD10PCS//…`, `ICD9Proc//…`.
- Prescriptions are named by drug, not by NDC (often empty, and a new number per package): upper case, remarks in
  brackets removed, `MEDICATION//METOPROLOL TARTRATE`, at starttime. Carrier fluids (`drug_type` BASE) are left out and
  counted.
- Laboratory results, by option: `LAB//<itemid>` at charttime with `valuenum`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl

from behrt.config import UserError
from behrt.events import MAX_SHARD_EVENTS, EventSource, Shard, readable, subject_counts, subject_ranges
from behrt.sources.tables import as_events, missing_column, other_format, scan_csv, without_unparsed

COLUMNS: dict[str, tuple[str, ...]] = {
    "patients": ("subject_id", "gender", "anchor_age", "anchor_year", "dod"),
    "admissions": ("subject_id", "hadm_id", "admittime", "dischtime", "admission_type", "discharge_location"),
    "labevents": ("subject_id", "hadm_id", "itemid", "charttime", "valuenum"),
    "prescriptions": ("subject_id", "hadm_id", "starttime", "drug_type", "drug"),
    "procedures_icd": ("subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"),
    "diagnoses_icd": ("subject_id", "hadm_id", "seq_num", "icd_code", "icd_version"),
}
"""The needed columns of each table, in the order in which events of the same moment follow each other."""


def open_mimic(source: Path, scratch: Path, *, labs: bool, max_shard_events: int = MAX_SHARD_EVENTS) -> EventSource:
    """The events of a MIMIC-IV folder.

    Args:
        scratch: an empty folder for the converted tables; needed for as long as the shards are.
        labs: read `labevents` too.

    Raises:
        UserError: a table or column is missing, a file cannot be read.
    """
    names = [name for name in COLUMNS if labs or name != "labevents"]
    paths = {name: find_table(source, name) for name in names}
    tables = {name: scan_table(paths[name], COLUMNS[name]) for name in names}
    discharges = tables["admissions"].select("hadm_id", time=_time("dischtime")).unique("hadm_id", keep="first")

    converted: dict[str, pl.LazyFrame] = {}
    counts: Counter[str] = Counter()
    for name, frames in (
        ("patients", [_gender, _birth, _death]),
        ("admissions", [_admission]),
        ("labevents", [_labs]),
        ("prescriptions", [_prescriptions]),
        ("procedures_icd", [_icd({"9": "ICD9Proc", "10": "ICD10PCS"}, discharges)]),
        ("diagnoses_icd", [_icd({"9": "ICD9CM", "10": "ICD10CM"}, discharges)]),
        ("discharges", [_discharge]),
    ):
        table = "admissions" if name == "discharges" else name
        if table not in tables:
            continue
        file = scratch / f"{name}.parquet"
        with readable(paths[table], "CSV"):
            pl.concat([as_events(build(tables[table])) for build in frames]).sink_parquet(file)
        converted[name] = without_unparsed(pl.scan_parquet(file), name, counts)
    if "prescriptions" in tables:
        with readable(paths["prescriptions"], "CSV"):
            carrier = tables["prescriptions"].filter(_is_carrier()).select(pl.len()).collect(engine="streaming").item()
        counts["prescriptions_of_carrier_fluids"] = carrier

    per_subject = subject_counts(pl.concat(list(converted.values())))
    if per_subject.is_empty():
        raise UserError(f"{source}: the MIMIC-IV tables hold no events; expected rows in patients and admissions")
    shards = tuple(
        Shard(
            pl.concat([frame.filter(pl.col("subject_id").is_between(low, high)) for frame in converted.values()]),
            source,
            (0, number),
        )
        for number, (low, high) in enumerate(subject_ranges(per_subject, max_shard_events))
    )
    files = tuple(paths.values())
    return EventSource(
        name=source.resolve().name, files=files, read=files, shards=shards, counts=dict(counts), in_order=False
    )


def find_table(source: Path, name: str) -> Path:
    """The file of a table, `.csv.gz` or `.csv`, under `hosp/` or in the folder itself."""
    if not source.exists():
        raise UserError(f"{source}: no such folder; expected the MIMIC-IV tables")
    if not source.is_dir():
        raise UserError(f"{source}: is a file; --format mimic4 expects the folder that holds hosp/")
    folder = source / "hosp" if (source / "hosp").is_dir() else source
    for suffix in (".csv.gz", ".csv"):
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    hint = other_format(source, "mimic4")
    raise UserError(f"{folder}: no {name}.csv.gz or {name}.csv, a table that --format mimic4 needs{hint}")


def scan_table(path: Path, columns: tuple[str, ...]) -> pl.LazyFrame:
    """The named columns of a CSV table as strings; empty fields are null."""
    frame, found = scan_csv(path)
    missing = [column for column in columns if column not in found]
    if missing:
        raise missing_column(path, missing[0], found, all_missing=len(missing) == len(columns))
    for column in columns:
        if f"{column}_duplicated_0" in found:  # so polars names the second one
            raise UserError(f"{path}: two columns {column!r}; remove or rename one")
    return frame.select(columns)


def _time(column: str) -> pl.Expr:
    """MIMIC's `YYYY-MM-DD HH:MM:SS` as a timestamp; null where it is anything else."""
    return pl.col(column).str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="us", strict=False)


def _gender(patients: pl.LazyFrame) -> pl.LazyFrame:
    return patients.filter(pl.col("gender").is_not_null()).select(
        "subject_id", code=pl.concat_str(pl.lit("GENDER//"), "gender")
    )


def _birth(patients: pl.LazyFrame) -> pl.LazyFrame:
    year = pl.col("anchor_year").cast(pl.Int32, strict=False) - pl.col("anchor_age").cast(pl.Int32, strict=False)
    known = pl.when(year.is_between(1, 9999)).then(year)  # of another year polars makes an error
    return patients.select("subject_id", time=pl.datetime(known, 1, 1), code=pl.lit("MEDS_BIRTH"))


def _death(patients: pl.LazyFrame) -> pl.LazyFrame:
    day = pl.col("dod").str.head(10).str.to_datetime("%Y-%m-%d", time_unit="us", strict=False)
    last_moment = day + pl.duration(days=1, microseconds=-1)
    return patients.filter(pl.col("dod").is_not_null()).select(
        "subject_id", time=last_moment, code=pl.lit("MEDS_DEATH")
    )


def _admission(admissions: pl.LazyFrame) -> pl.LazyFrame:
    return admissions.select(
        "subject_id",
        time=_time("admittime"),
        code=pl.concat_str(pl.lit("ADMISSION"), "admission_type", separator="//", ignore_nulls=True),
        visit_id="hadm_id",
    )


def _discharge(admissions: pl.LazyFrame) -> pl.LazyFrame:
    return admissions.select(
        "subject_id",
        time=_time("dischtime"),
        code=pl.concat_str(pl.lit("DISCHARGE"), "discharge_location", separator="//", ignore_nulls=True),
        visit_id="hadm_id",
    )


def _icd(systems: dict[str, str], discharges: pl.LazyFrame) -> Callable[[pl.LazyFrame], pl.LazyFrame]:
    """Builds coded events at discharge, the principal one (`seq_num` 1) first."""

    def build(table: pl.LazyFrame) -> pl.LazyFrame:
        system = pl.col("icd_version").str.strip_chars().replace_strict(systems, default=None, return_dtype=pl.String)
        return (
            table.join(discharges, on="hadm_id", how="left", maintain_order="left")
            .sort("hadm_id", pl.col("seq_num").cast(pl.Int32, strict=False), maintain_order=True)
            .select(
                "subject_id",
                "time",
                code=pl.concat_str(system, pl.col("icd_code").str.strip_chars(), separator="//"),
                visit_id="hadm_id",
            )
        )

    return build


def _is_carrier() -> pl.Expr:
    return (pl.col("drug_type") == "BASE").fill_null(False)


def _prescriptions(prescriptions: pl.LazyFrame) -> pl.LazyFrame:
    drug = pl.col("drug").str.replace_all(r"\([^)]*\)", " ").str.replace_all(r"\s+", " ").str.strip_chars()
    named = pl.when(drug != "").then(drug.str.to_uppercase())
    return prescriptions.filter(~_is_carrier()).select(
        "subject_id",
        time=_time("starttime"),
        code=pl.concat_str(pl.lit("MEDICATION//"), named),
        visit_id="hadm_id",
    )


def _labs(labevents: pl.LazyFrame) -> pl.LazyFrame:
    return labevents.select(
        "subject_id",
        time=_time("charttime"),
        code=pl.concat_str(pl.lit("LAB//"), "itemid"),
        numeric_value="valuenum",
        visit_id="hadm_id",
    )
