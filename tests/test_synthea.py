"""The Synthea reader: CSV tables of current and older versions to events."""

from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from behrt.config import UserError
from behrt.events import EVENT_SCHEMA, EventSource
from behrt.prepare import prepare
from behrt.prepare_options import PrepareOptions
from behrt.sources import synthea
from behrt.sources.synthea import open_synthea, subject_of

from .test_omop import counted, rows, write_tables

ANN, BOB = "982192b6-6843-4011-ef46-32caaf87d8a9", "2de0b259-6c63-700d-9ac4-edcabff0861a"
WARD, CLINIC = "3c1c5636-2c43-bd4b-6eab-9eabf5929c55", "e2b6c7ec-cba1-1062-3ab6-01231d9928d9"

TABLES = {
    "patients": f"""Id,BIRTHDATE,DEATHDATE,SSN,FIRST,LAST,GENDER
{ANN},1950-02-03,2021-01-01T10:00:00Z,999-49-3983,Alice368,Gleason633,F
{BOB},1960-05-06,,999-17-9786,Lou594,Little434,M
""",
    "encounters": f"""Id,START,STOP,PATIENT,ENCOUNTERCLASS,CODE,DESCRIPTION
{WARD},2020-01-02T10:00:00Z,2020-01-05T15:30:00Z,{ANN},inpatient,1,Stay
{CLINIC},2020-03-01T09:00:00Z,2020-03-01T09:15:00Z,{ANN},wellness,2,Visit
""",
    "conditions": f"""START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION
2020-01-02,2020-02-01,{ANN},{WARD},44054006,Diabetes
2020-06-01,,{ANN},404,195662009,Pharyngitis
""",
    "medications": f"""START,STOP,PATIENT,PAYER,ENCOUNTER,CODE,DESCRIPTION
2020-03-01T09:00:00Z,,{ANN},x,{CLINIC},308192,Amoxicillin
2020-06-01T07:00:00Z,,{ANN},x,,308192,Amoxicillin
""",
    "procedures": f"""START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION
2020-01-03T08:00:00Z,2020-01-03T09:00:00Z,{ANN},{WARD},430193006,Reconciliation
""",
    "immunizations": f"""DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION
2020-03-01T09:05:00Z,{ANN},{CLINIC},08,Hep B
""",
    "observations": f"""DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,VALUE,UNITS,TYPE
2020-03-01T09:02:00Z,{ANN},{CLINIC},8302-2,Height,171.5,cm,numeric
2020-03-01T09:02:00Z,{ANN},{CLINIC},72166-2,Smoking,Never smoker,,text
garbled,{ANN},{CLINIC},8302-2,Height,1,cm,numeric
""",
    "careplans": f"""Id,START,STOP,PATIENT,ENCOUNTER,CODE,DESCRIPTION
9f050c88-aa94-04b3-4797-a5faa60c1647,2020-03-01,,{ANN},{CLINIC},53950000,Therapy
""",
}


def read(source: Path) -> tuple[pl.DataFrame, EventSource]:
    scratch = source.with_name(f"{source.name}-scratch")
    scratch.mkdir()
    opened = open_synthea(source, scratch, max_shard_events=8)
    return pl.concat([shard.collect() for shard in opened.shards]), opened


def test_tables_become_coded_events_in_the_order_of_time(tmp_path):
    frame, source = read(write_tables(tmp_path / "synthea", TABLES))
    assert dict(frame.schema) == EVENT_SCHEMA
    clinic = datetime(2020, 3, 1, 9)
    assert rows(frame, subject_of(ANN)) == [
        (None, "GENDER//F", None),
        (datetime(1950, 2, 3), "MEDS_BIRTH", None),
        (datetime(2020, 1, 2, 10), "ADMISSION//INPATIENT", WARD),
        (datetime(2020, 1, 2, 10), "CONDITION//44054006", WARD),  # of that date, hence not before its encounter
        (datetime(2020, 1, 3, 8), "PROCEDURE//430193006", WARD),
        (datetime(2020, 1, 5, 15, 30), "DISCHARGE", WARD),
        (clinic, "VISIT//WELLNESS", CLINIC),
        (clinic, "MEDICATION//308192", CLINIC),
        (clinic, "CAREPLAN//53950000", CLINIC),
        (datetime(2020, 3, 1, 9, 2), "OBSERVATION//8302-2", CLINIC),
        (datetime(2020, 3, 1, 9, 2), "OBSERVATION//72166-2", CLINIC),
        (datetime(2020, 3, 1, 9, 5), "IMMUNIZATION//08", CLINIC),
        (datetime(2020, 6, 1), "CONDITION//195662009", "2020-06-01"),
        (datetime(2020, 6, 1, 7), "MEDICATION//308192", "2020-06-01"),
        (datetime(2021, 1, 1, 10), "MEDS_DEATH", None),
    ]
    assert [code for _, code, _ in rows(frame, subject_of(BOB))] == ["GENDER//M", "MEDS_BIRTH"]
    values = frame.filter(pl.col("code").str.starts_with("OBSERVATION"))["numeric_value"].to_list()
    assert values == [171.5, None]
    assert counted(source) == {
        "unparsed_rows_of_observations": 1,
        "events_without_visit": 1,
        "events_with_unknown_visit": 1,
    }


def test_older_columns_are_read_like_current_ones(tmp_path):
    dates = {
        name: text.replace("T10:00:00Z", "")
        .replace("T15:30:00Z", "")
        .replace("T09:00:00Z", "")
        .replace("T09:15:00Z", "")
        for name, text in TABLES.items()
    }
    current, _ = read(write_tables(tmp_path / "current", dates))
    older = {name: text.replace("Id,", "ID,", 1) for name, text in dates.items()}
    older["procedures"] = f"""DATE,PATIENT,ENCOUNTER,CODE,DESCRIPTION,REASONCODE
2020-01-03T08:00:00Z,{ANN},{WARD},430193006,Reconciliation,
"""
    older["medications"] = "\n".join(
        ",".join(cell for place, cell in enumerate(line.split(",")) if place != 3)  # there was no payer
        for line in dates["medications"].splitlines()
    )
    found, _ = read(write_tables(tmp_path / "older", older))
    assert found.equals(current)


def test_an_encounter_of_the_oldest_versions_has_a_date_alone(tmp_path):
    encounters = f"ID,DATE,PATIENT,CODE,DESCRIPTION\n{WARD},2020-01-02,{ANN},1,Stay\n"
    frame, _ = read(write_tables(tmp_path / "oldest", TABLES, encounters=encounters))
    assert (datetime(2020, 1, 2), "VISIT", WARD) in rows(frame, subject_of(ANN))
    assert not frame["code"].str.contains("^(ADMISSION|DISCHARGE)").any()


def test_a_subject_is_the_same_whatever_else_is_there_and_however_its_id_is_written(tmp_path):
    whole, _ = read(write_tables(tmp_path / "whole", TABLES))
    bob = "\n".join([TABLES["patients"].splitlines()[0], TABLES["patients"].splitlines()[2].replace(BOB, BOB.upper())])
    alone, _ = read(write_tables(tmp_path / "alone", {"patients": bob, "encounters": TABLES["encounters"]}))
    assert rows(alone, subject_of(BOB)) == rows(whole, subject_of(BOB)) != []
    assert min(subject_of(ANN), subject_of(BOB)) >= 0
    assert ANN not in str(whole["subject_id"].to_list())


def test_two_patients_with_the_same_hash_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(synthea, "subject_of", lambda patient: 7)
    with pytest.raises(UserError, match=r"1 patient\(s\) have the same 63-bit hash") as caught:
        read(write_tables(tmp_path / "synthea", TABLES))
    assert ANN not in str(caught.value)


def test_tables_that_are_missing_are_named(tmp_path, caplog):
    kept = {name: TABLES[name] for name in ("patients", "conditions")}
    frame, source = read(write_tables(tmp_path / "synthea", kept))
    assert "finds no table encounters, observations, immunizations, medications, procedures, careplans" in caplog.text
    assert source.counts["missing_table_encounters"] == 1
    visits = frame.filter(pl.col("code").str.starts_with("CONDITION"))["visit_id"].to_list()
    assert visits == ["2020-01-02", "2020-06-01"]


def test_the_sample_of_synthea_has_the_rows_that_its_readme_counts(tmp_path, test_data):
    sample = test_data / "synthea-csv-modern-111"
    if not sample.is_dir():
        pytest.skip(f"{sample.name} is missing")
    (tmp_path / "scratch").mkdir()
    source = open_synthea(sample, tmp_path / "scratch")
    frame = pl.concat([shard.collect() for shard in source.shards])
    kinds = dict(frame.with_columns(pl.col("code").str.extract(r"^([A-Z_]+)"))["code"].value_counts().iter_rows())
    assert kinds["ADMISSION"] + kinds["VISIT"] == 7584
    assert (kinds["CONDITION"], kinds["MEDICATION"], kinds["PROCEDURE"]) == (4428, 6124, 11_742)
    assert kinds["MEDS_BIRTH"] == frame["subject_id"].n_unique() == 111
    assert source.counts["events_with_unknown_visit"] == source.counts["events_without_visit"] == 0


def test_synthea_without_splits_gets_those_of_the_options(tmp_path, test_data):
    sample = test_data / "synthea-csv-modern-111"
    if not sample.is_dir():
        pytest.skip(f"{sample.name} is missing")
    first = prepare(sample, tmp_path / "one", PrepareOptions(format="synthea", split="60/20/20"), workers=1)
    second = prepare(sample, tmp_path / "two", PrepareOptions(format="synthea", split="60/20/20"), workers=2)
    patients = [split["patients"] for split in first["splits"].values()]
    assert sum(patients) == 111
    assert patients[0] == pytest.approx(67, abs=12)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert first["source"] == second["source"]
    assert first["source"]["files"] == 7
