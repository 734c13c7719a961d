"""The OMOP reader: tables of the Common Data Model to events."""

import gzip
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from behrt.config import UserError
from behrt.events import EVENT_SCHEMA, EventSource
from behrt.prepare import prepare
from behrt.prepare_options import PrepareOptions
from behrt.sequences import open_prepared
from behrt.sources.omop import open_omop

LARGE, NEGATIVE = 9_002_582_707_624_403_415, -4_406_053_801_395_356_975
"""Ids as the demo of MIMIC-IV has them."""

TABLES = {
    "person": f"""person_id,gender_concept_id,year_of_birth,month_of_birth,day_of_birth,birth_datetime,\
gender_source_value
{LARGE},8532,1950,,,,
{NEGATIVE},0,1960,2,31,,male
3,8507,1970,5,,1970-05-06 07:08:00,
""",
    "visit_occurrence": f"""visit_occurrence_id,person_id,visit_concept_id,visit_start_date,visit_start_datetime,\
visit_end_date,visit_end_datetime,visit_source_value,discharge_to_concept_id,discharge_to_source_value
{NEGATIVE},{LARGE},9201,2020-01-02,2020-01-02 10:00:00,2020-01-05,2020-01-05 15:30:00,SECRET|1,8536,HOME
71,{LARGE},9202,2020-03-01,,2020-03-01,,SECRET|2,0,
72,3,0,2020-04-01,,2020-04-03,,SECRET|3,0,HOSPICE
""",
    "condition_occurrence": f"""condition_occurrence_id,person_id,condition_concept_id,condition_start_date,\
condition_start_datetime,condition_source_value,visit_occurrence_id
1,{LARGE},201826,2020-01-02,,25000,{NEGATIVE}
2,{LARGE},777,2020-01-03,2020-01-03 08:00:00,x,{NEGATIVE}
3,{LARGE},0,2020-03-01,,  473.9 ,71
4,{NEGATIVE},0,2020-03-01,,,
""",
    "drug_exposure": f"""drug_exposure_id,person_id,drug_concept_id,drug_exposure_start_date,\
drug_exposure_start_datetime,drug_source_value,visit_occurrence_id
1,{LARGE},1118088,2020-06-01,2020-06-01 08:00:00,x,
2,{LARGE},1118088,2020-06-01,2020-06-01 20:00:00,x,404
3,{LARGE},1118088,2020-06-02,2020-06-02 01:00:00,x,72
""",
    "procedure_occurrence": f"""procedure_occurrence_id,person_id,procedure_concept_id,procedure_date,\
procedure_datetime,procedure_source_value,visit_occurrence_id
1,{LARGE},4107731,2020-01-02,2020-01-02 12:00:00,x,{NEGATIVE}
""",
    "measurement": f"""measurement_id,person_id,measurement_concept_id,measurement_date,measurement_datetime,\
value_as_number,measurement_source_value,visit_occurrence_id
1,{LARGE},3006322,2020-01-02,2020-01-02 11:00:00,37.5,x,{NEGATIVE}
""",
    "observation": f"""observation_id,person_id,observation_concept_id,observation_date,observation_datetime,\
value_as_number,observation_source_value,visit_occurrence_id
1,{LARGE},4323208,2020-01-02,2020-01-02 11:00:00,,x,{NEGATIVE}
""",
    "death": f"""person_id,death_date,death_datetime,death_type_concept_id
{LARGE},2020-07-01,2020-07-01 08:05:00,32817
3,2020-04-03,,32817
""",
    "concept": """concept_id,concept_name,domain_id,concept_code
201826,Type 2  diabetes mellitus,Condition,44054006
1118088,"celecoxib 200 MG Oral Capsule, oral",Drug,213469
9201,Inpatient Visit,Visit,IP
9202,Outpatient Visit,Visit,OP
8536,Home,Visit,HOME
""",
}


def write_tables(folder: Path, tables: Mapping[str, str] = TABLES, **changed: str | None) -> Path:
    """The tables as plain CSV; of a table that is None, nothing."""
    folder.mkdir(parents=True)
    for name, text in {**tables, **changed}.items():
        if text is not None:
            (folder / f"{name}.csv").write_text(text)
    return folder


def read(source: Path, **options) -> tuple[pl.DataFrame, EventSource]:
    scratch = source.with_name(f"{source.name}-scratch")
    scratch.mkdir()
    opened = open_omop(source, scratch, max_shard_events=8, **options)
    return pl.concat([shard.collect() for shard in opened.shards]), opened


def rows(frame: pl.DataFrame, subject: int) -> list[tuple]:
    own = frame.filter(pl.col("subject_id") == subject).sort("time", maintain_order=True)
    return list(own.select("time", "code", "visit_id").iter_rows())


def counted(source: EventSource) -> dict[str, int]:
    return {name: count for name, count in source.counts.items() if count}


def test_tables_become_coded_events_in_the_order_of_time(tmp_path):
    frame, source = read(write_tables(tmp_path / "omop"), measurements=True, observations=True)
    assert dict(frame.schema) == EVENT_SCHEMA
    stay, at = str(NEGATIVE), datetime(2020, 1, 2, 10)
    drug = "MEDICATION//celecoxib 200 MG Oral Capsule, oral"
    assert rows(frame, LARGE) == [
        (None, "GENDER//F", None),
        (datetime(1950, 1, 1), "MEDS_BIRTH", None),
        (at, "ADMISSION//Inpatient Visit", stay),
        (at, "CONDITION//Type 2 diabetes mellitus", stay),  # of that date, hence not before its visit
        (datetime(2020, 1, 2, 11), "MEASUREMENT//3006322", stay),
        (datetime(2020, 1, 2, 11), "OBSERVATION//4323208", stay),
        (datetime(2020, 1, 2, 12), "PROCEDURE//4107731", stay),
        (datetime(2020, 1, 3, 8), "CONDITION//777", stay),
        (datetime(2020, 1, 5, 15, 30), "DISCHARGE//Home", stay),
        (datetime(2020, 3, 1), "VISIT//Outpatient Visit", "71"),
        (datetime(2020, 3, 1), "CONDITION//SOURCE//473.9", "71"),
        (datetime(2020, 6, 1, 8), drug, "2020-06-01"),  # without a visit
        (datetime(2020, 6, 1, 20), drug, "2020-06-01"),  # with one that is nowhere
        (datetime(2020, 6, 2, 1), drug, "2020-06-02"),  # with one of another person
        (datetime(2020, 7, 1, 8, 5), "MEDS_DEATH", None),
    ]
    assert frame.filter(pl.col("code").str.starts_with("MEASUREMENT"))["numeric_value"].to_list() == [37.5]
    assert counted(source) == {
        "unparsed_rows_of_condition_occurrence": 1,  # neither concept nor source value
        "events_without_visit": 1,
        "events_with_unknown_visit": 2,
    }


def test_births_are_as_exact_as_they_are_known(tmp_path):
    frame, _ = read(write_tables(tmp_path / "omop"))
    births = frame.filter(pl.col("code") == "MEDS_BIRTH")
    assert dict(births.select("subject_id", "time").iter_rows()) == {
        LARGE: datetime(1950, 1, 1),
        NEGATIVE: datetime(1960, 2, 29),  # there is no 31st
        3: datetime(1970, 5, 6, 7, 8),
    }


def test_a_stay_of_an_unknown_kind_is_told_by_its_discharge_and_ends_with_its_last_day(tmp_path):
    frame, _ = read(write_tables(tmp_path / "omop"))
    assert rows(frame, 3)[2:] == [
        (datetime(2020, 4, 1), "ADMISSION", "72"),
        (datetime(2020, 4, 3), "MEDS_DEATH", None),
        (datetime(2020, 4, 3, 23, 59, 59, 999999), "DISCHARGE//SOURCE//HOSPICE", "72"),
    ]


def test_a_discharge_at_midnight_is_one_where_times_of_day_are_known(tmp_path):
    at_midnight = TABLES["visit_occurrence"].replace("2020-01-05 15:30:00", "2020-01-05 00:00:00")
    frame, _ = read(write_tables(tmp_path / "omop", visit_occurrence=at_midnight))
    assert (datetime(2020, 1, 5), "DISCHARGE//Home", str(NEGATIVE)) in rows(frame, LARGE)
    no_times = at_midnight.replace("2020-01-02 10:00:00", "2020-01-02 00:00:00")
    frame, _ = read(write_tables(tmp_path / "dates", visit_occurrence=no_times))
    assert (datetime(2020, 1, 5, 23, 59, 59, 999999), "DISCHARGE//Home", str(NEGATIVE)) in rows(frame, LARGE)


def test_a_visit_of_another_person_is_none_even_in_the_same_shard(tmp_path):
    (tmp_path / "scratch").mkdir()
    (shard,) = open_omop(write_tables(tmp_path / "omop"), tmp_path / "scratch").shards
    assert (datetime(2020, 6, 2, 1), "2020-06-02") in shard.collect().select("time", "visit_id").rows()


def test_a_visit_that_stands_there_twice_doubles_none_of_its_events(tmp_path):
    header, *visits = TABLES["visit_occurrence"].splitlines(keepends=True)
    frame, _ = read(write_tables(tmp_path / "omop", visit_occurrence="".join([header, *visits, *visits])))
    assert [code for _, code, _ in rows(frame, LARGE)].count("PROCEDURE//4107731") == 1


def test_identifiers_of_visits_are_no_codes(tmp_path):
    frame, _ = read(write_tables(tmp_path / "omop"))
    assert not frame["code"].str.contains("SECRET").any()


def test_measurements_and_observations_are_read_by_option_alone(tmp_path):
    folder = write_tables(tmp_path / "omop", measurement="never opened", observation="never opened")
    frame, source = read(folder)
    assert not frame["code"].str.contains("^(MEASUREMENT|OBSERVATION)").any()
    assert {file.stem for file in source.files} == {*TABLES} - {"measurement", "observation"}
    with pytest.raises(UserError, match=r"other: no table 'measurement', which --measurements asks for"):
        read(write_tables(tmp_path / "other", measurement=None), measurements=True)


def zipped_in_capitals(folder: Path) -> None:
    for file in list(folder.iterdir()):
        header, rest = file.read_text().split("\n", 1)
        text = f"{header.upper()}\n{rest}"
        (folder / f"{file.stem.upper()}.CSV.GZ").write_bytes(gzip.compress(text.encode()))
        file.unlink()


def typed_parquet(folder: Path) -> None:
    """As a database writes it: numbers, dates and times with their types."""
    for file in list(folder.iterdir()):
        frame = pl.read_csv(file, infer_schema=False)
        dates = [name for name in frame.columns if name.endswith("_date")]
        times = [name for name in frame.columns if name.endswith("_datetime")]
        ids = [name for name in frame.columns if name.endswith("_id") and name != "domain_id"]
        frame.with_columns(
            pl.col(dates).str.to_date(),
            pl.col(times).str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="ns").dt.replace_time_zone("UTC"),
            pl.col(ids).cast(pl.Int64),
            pl.col([name for name in frame.columns if name == "year_of_birth"]).cast(pl.Int16),
            pl.col([name for name in frame.columns if name == "value_as_number"]).cast(pl.Float64),
        ).write_parquet(file.with_suffix(".parquet"))
        file.unlink()


def parts_in_folders(folder: Path) -> None:
    """As Spark writes it: a folder a table."""
    for file in list(folder.iterdir()):
        frame = pl.read_csv(file, infer_schema=False)
        (folder / file.stem).mkdir()
        for number in range(0, len(frame), 2):
            frame.slice(number, 2).write_parquet(folder / file.stem / f"part-{number:03}.parquet")
        file.unlink()


def one_folder_down(folder: Path) -> None:
    (folder / "csv").mkdir()
    for file in list(folder.glob("*.csv")):
        file.rename(folder / "csv" / file.name)


def vocabulary_by_tabs(folder: Path) -> None:
    """As Athena gives it."""
    file = folder / "concept.csv"
    pl.read_csv(file, infer_schema=False).write_csv(folder / "CONCEPT.csv", separator="\t", quote_style="never")
    file.unlink()


@pytest.mark.parametrize(
    "change", [zipped_in_capitals, typed_parquet, parts_in_folders, one_folder_down, vocabulary_by_tabs]
)
def test_the_same_tables_in_another_shape_give_the_same_events(tmp_path, change):
    expected, _ = read(write_tables(tmp_path / "usual"), measurements=True, observations=True)
    other = write_tables(tmp_path / "other")
    change(other)
    found, _ = read(other, measurements=True, observations=True)
    assert found.sort(pl.all()).equals(expected.sort(pl.all()))


def test_the_columns_of_5_4_are_those_of_5_3(tmp_path):
    expected, _ = read(write_tables(tmp_path / "v53"))
    newer = TABLES["visit_occurrence"].replace("discharge_to_", "discharged_to_")
    found, _ = read(write_tables(tmp_path / "v54", visit_occurrence=newer))
    assert found.equals(expected)


def test_ids_that_a_program_wrote_as_floats_are_the_same_ids(tmp_path):
    text = TABLES["drug_exposure"] + f"4,{LARGE},1118088,2020-03-01,,x,71.0\n"
    frame, _ = read(write_tables(tmp_path / "omop", drug_exposure=text))
    assert [visit for time, code, visit in rows(frame, LARGE) if time == datetime(2020, 3, 1)] == ["71"] * 3


@pytest.mark.parametrize(
    "text", ["2020-06-01T08:00:00Z", "2020-06-01 08:00:00.000", "2020-06-01 08:00", "2020-06-01 08:00:00+00:00"]
)
def test_times_are_read_as_databases_write_them(tmp_path, text):
    changed = TABLES["drug_exposure"].replace("2020-06-01 08:00:00", text)
    frame, _ = read(write_tables(tmp_path / "omop", drug_exposure=changed))
    assert datetime(2020, 6, 1, 8) in frame["time"].to_list()


def test_tables_that_are_missing_are_named(tmp_path, caplog):
    _, source = read(write_tables(tmp_path / "omop", death=None, procedure_occurrence=None))
    assert "finds no table procedure_occurrence, death; " in caplog.text
    missing = {"missing_table_procedure_occurrence": 1, "missing_table_death": 1}
    assert missing.items() <= source.counts.items()


def test_shards_are_whole_subjects_and_bounded(tmp_path):
    persons = "".join(f"{number},8507,1950,,,,\n" for number in range(100, 140))
    visits = "".join(f"{number},{number},9202,2020-03-0{day},,,,,0,\n" for number in range(100, 140) for day in (1, 2))
    folder = write_tables(
        tmp_path / "omop",
        person=TABLES["person"].split("\n")[0] + "\n" + persons,
        visit_occurrence=TABLES["visit_occurrence"].split("\n")[0] + "\n" + visits,
    )
    (tmp_path / "scratch").mkdir()
    source = open_omop(folder, tmp_path / "scratch", max_shard_events=20)
    shards = [shard.collect() for shard in source.shards]
    assert len(shards) > 5
    assert max(map(len, shards)) <= 20 + 12
    owners = pl.concat([shard.select("subject_id").unique() for shard in shards])
    assert owners["subject_id"].is_unique().all()


def test_the_demo_of_mimic_has_the_rows_that_its_tables_have(tmp_path, test_data):
    demo = test_data / "mimic-iv-demo-omop-0.9"
    if not demo.is_dir():
        pytest.skip(f"{demo.name} is missing")
    (tmp_path / "scratch").mkdir()
    source = open_omop(demo, tmp_path / "scratch")
    frame = pl.concat([shard.collect() for shard in source.shards])
    kinds = dict(frame.with_columns(pl.col("code").str.extract(r"^([A-Z_]+)"))["code"].value_counts().iter_rows())
    assert kinds["ADMISSION"] + kinds["VISIT"] == 852
    assert (kinds["CONDITION"], kinds["MEDICATION"], kinds["PROCEDURE"]) == (16_441, 18_229, 18_447)
    assert (kinds["MEDS_BIRTH"], kinds["MEDS_DEATH"], frame["subject_id"].n_unique()) == (100, 15, 100)
    assert source.counts["events_with_unknown_visit"] == 0


def test_visits_that_no_table_has_become_those_of_a_date(tmp_path, test_data):
    demo = test_data / "gibleed-omop"
    if not demo.is_dir():
        pytest.skip(f"{demo.name} is missing")
    info = prepare(demo, tmp_path / "out", PrepareOptions(format="omop"))
    patients = sum(split["patients"] for split in info["splits"].values())
    assert patients == info["report"]["subjects_kept"] == 2694
    known = pl.read_csv(demo / "visit_occurrence.csv.gz", infer_schema=False)["visit_occurrence_id"]
    events = pl.concat(
        pl.read_csv(demo / f"{name}.csv.gz", infer_schema=False).select(
            "person_id", "visit_occurrence_id", date=f"{start}_date"
        )
        for name, start in (
            ("condition_occurrence", "condition_start"),
            ("drug_exposure", "drug_exposure_start"),
            ("procedure_occurrence", "procedure"),
        )
    )
    named = events.drop_nulls("visit_occurrence_id")
    dangling = named.filter(~pl.col("visit_occurrence_id").is_in(known.to_list()))
    assert info["report"]["events_with_unknown_visit"] == dangling.height > 0.9 * events.height
    dates = dangling.unique(["person_id", "date"]).height + known.n_unique()
    assert sum(split["visits"] for split in info["splits"].values()) == pytest.approx(dates, rel=0.01)
    assert open_prepared(tmp_path / "out").vocabulary.id_of("CONDITION//Sinusitis") > 4
