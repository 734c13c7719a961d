"""The MIMIC-IV reader: tables to events."""

import gzip
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from behrt.events import EVENT_SCHEMA, EventSource
from behrt.sources.mimic import open_mimic

TABLES = {
    "patients": """subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod
1,F,52,2180,2014 - 2016,2180-05-07
2,M,30,2150,2014 - 2016,
""",
    "admissions": """subject_id,hadm_id,admittime,dischtime,admission_type,discharge_location
1,100,2180-05-01 08:00:00,2180-05-07 20:00:00,URGENT,DIED
2,200,2150-01-01 08:00:00,2150-01-02 09:30:00,ELECTIVE,
2,201,2150-03-01 08:00:00,garbled,ELECTIVE,HOME
""",
    "diagnoses_icd": """subject_id,hadm_id,seq_num,icd_code,icd_version
1,100,2,E119,10
1,100,1,4139 ,9
2,200,1,I10,11
2,999,1,I10,10
""",
    "procedures_icd": """subject_id,hadm_id,seq_num,chartdate,icd_code,icd_version
1,100,1,2180-05-02,3961,9
2,200,1,2150-01-01,0DJ08ZZ,10
""",
    "prescriptions": """subject_id,hadm_id,starttime,drug_type,drug,ndc
1,100,2180-05-01 10:00:00,MAIN,Metoprolol  Tartrate (Immediate Release) ,0
1,100,2180-05-01 10:00:00,BASE,0.9% Sodium Chloride,0
2,200,,MAIN,Aspirin,0
""",
    "labevents": """labevent_id,subject_id,hadm_id,itemid,charttime,valuenum
1,1,100,50912,2180-05-01 09:00:00,1.25
2,1,,50912,2180-04-01 09:00:00,
""",
}


def write_tables(folder: Path, hosp: bool = True, zipped: bool = True, **changed: str) -> Path:
    inner = folder / "hosp" if hosp else folder
    inner.mkdir(parents=True)
    for name, text in {**TABLES, **changed}.items():
        if zipped:
            (inner / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (inner / f"{name}.csv").write_text(text)
    return folder


def read(source: Path, scratch: Path, labs: bool = False) -> tuple[pl.DataFrame, EventSource]:
    scratch.mkdir()
    opened = open_mimic(source, scratch, labs=labs, max_shard_events=8)
    return pl.concat([shard.collect() for shard in opened.shards]), opened


def rows(frame: pl.DataFrame, subject: int) -> list[tuple]:
    own = frame.filter(pl.col("subject_id") == subject).sort("time", maintain_order=True)
    return list(own.select("time", "code", "visit_id").iter_rows())


def test_tables_become_coded_events_in_the_order_of_time(tmp_path):
    frame, _ = read(write_tables(tmp_path / "mimic"), tmp_path / "scratch")
    assert dict(frame.schema) == EVENT_SCHEMA
    out = datetime(2180, 5, 7, 20)
    assert rows(frame, 1) == [
        (None, "GENDER//F", None),
        (datetime(2128, 1, 1), "MEDS_BIRTH", None),
        (datetime(2180, 5, 1, 8), "ADMISSION//URGENT", "100"),
        (datetime(2180, 5, 1, 10), "MEDICATION//METOPROLOL TARTRATE", "100"),
        (out, "ICD9Proc//3961", "100"),
        (out, "ICD9CM//4139", "100"),
        (out, "ICD10CM//E119", "100"),
        (out, "DISCHARGE//DIED", "100"),
        (datetime(2180, 5, 7, 23, 59, 59, 999999), "MEDS_DEATH", None),
    ]


def test_what_cannot_be_read_is_counted_by_table(tmp_path):
    frame, source = read(write_tables(tmp_path / "mimic"), tmp_path / "scratch")
    assert [code for _, code, _ in rows(frame, 2)] == [
        "GENDER//M", "MEDS_BIRTH", "ADMISSION//ELECTIVE", "ICD10PCS//0DJ08ZZ", "DISCHARGE", "ADMISSION//ELECTIVE",
    ]  # fmt: skip
    assert {name: count for name, count in source.counts.items() if count} == {
        "unparsed_rows_of_diagnoses_icd": 2,  # version 11, an unknown admission
        "unparsed_rows_of_prescriptions": 1,
        "unparsed_rows_of_discharges": 1,
        "prescriptions_of_carrier_fluids": 1,
    }


def test_laboratory_results_come_by_option_with_their_values(tmp_path):
    frame, source = read(write_tables(tmp_path / "mimic"), tmp_path / "scratch", labs=True)
    labs = frame.filter(pl.col("code") == "LAB//50912").sort("time")
    assert labs["numeric_value"].to_list() == [None, 1.25]
    assert labs["visit_id"].to_list() == [None, "100"]
    assert any("labevents" in file.name for file in source.files)


def test_tables_that_are_not_needed_are_not_read(tmp_path):
    folder = write_tables(tmp_path / "mimic")
    (folder / "hosp" / "labevents.csv.gz").write_bytes(b"never opened")
    _, source = read(folder, tmp_path / "scratch")
    assert not any("labevents" in file.name for file in source.files)


@pytest.mark.parametrize(("hosp", "zipped"), [(False, True), (True, False), (False, False)])
def test_plain_csv_and_a_bare_folder_read_alike(tmp_path, hosp, zipped):
    expected, _ = read(write_tables(tmp_path / "usual"), tmp_path / "scratch1")
    found, _ = read(write_tables(tmp_path / "other", hosp=hosp, zipped=zipped), tmp_path / "scratch2")
    assert found.equals(expected)


def test_the_demo_has_the_diagnoses_and_procedures_that_its_readme_counts(tmp_path, test_data):
    demo = test_data / "mimic-iv-demo-2.2"
    if not demo.is_dir():
        pytest.skip(f"{demo.name} is missing")
    (tmp_path / "scratch").mkdir()
    source = open_mimic(demo, tmp_path / "scratch", labs=True)
    frame = pl.concat([shard.collect() for shard in source.shards])
    kinds = frame.with_columns(pl.col("code").str.extract(r"^([A-Z_]+?)(?:9|10|//|$)"))["code"].value_counts()
    counted = dict(kinds.iter_rows())
    diagnoses = frame.filter(pl.col("code").str.contains("^ICD(9|10)CM//")).height
    procedures = frame.filter(pl.col("code").str.contains("^ICD(9Proc|10PCS)//")).height
    assert (diagnoses, procedures, counted["LAB"]) == (4506, 722, 107_727)
    assert counted["ADMISSION"] == counted["DISCHARGE"] == 275
    assert counted["MEDICATION"] + source.counts["prescriptions_of_carrier_fluids"] == 18_087
    assert frame["subject_id"].n_unique() == counted["MEDS_BIRTH"] == 100
