"""Bad records: one line that names the file or flag, and nothing left behind."""

import gzip
import json
import re
import shutil
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from behrt.config import UserError
from behrt.events import SPLITS
from behrt.prepare import prepare
from behrt.prepare_options import PrepareOptions
from behrt.sequences import open_prepared

from .small_records import BIRTH, day, events, plain_events, write_meds
from .test_mimic import TABLES, write_tables


def refused(source: Path, match: str, out: Path | None = None, **options) -> None:
    """Preparing fails with one line that matches, and leaves the folder beside as it was."""
    out = out or source.parent / "place" / "out"
    out.parent.mkdir(parents=True, exist_ok=True)
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError, match=match) as caught:
        prepare(source, out, PrepareOptions(**options))
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.rglob("*")) == before


def one_file(tmp_path: Path, frame: pl.DataFrame) -> Path:
    frame.write_parquet(tmp_path / "events.parquet")
    return tmp_path / "events.parquet"


def test_a_missing_path(tmp_path):
    refused(tmp_path / "nowhere", r"nowhere: no such file or folder")


def test_a_folder_without_parquet(tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    refused(tmp_path / "set", r"data: no parquet file inside")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", r"bare: no parquet file inside")


def test_a_file_that_is_no_parquet_by_name_or_content(tmp_path):
    (tmp_path / "events.csv").write_text("subject_id,time,code\n")
    refused(tmp_path / "events.csv", r"events\.csv: not a \.parquet file")
    (tmp_path / "events.parquet").write_text("subject_id,time,code\n")
    refused(tmp_path / "events.parquet", r"events\.parquet: cannot be read as parquet")


@pytest.mark.parametrize("column", ["subject_id", "time", "code"])
def test_a_missing_column(tmp_path, column):
    source = one_file(tmp_path, plain_events().drop(column))
    refused(source, rf"events\.parquet: no column '{column}'.*--column")


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("subject_id", pl.lit("7"), "String, expected an integer"),
        ("time", pl.lit("2020-01-01 00:00:00"), "String, expected a timestamp"),
        ("time", pl.lit(1.5), "Float64, expected a timestamp"),
        ("code", pl.lit(5), "Int32, expected a string"),
        ("numeric_value", pl.lit("1.5"), "String, expected a number"),
        ("visit_id", pl.lit(1.5), "Float64, expected a string or an integer"),
    ],
)
def test_a_wrong_dtype(tmp_path, column, values, expected):
    source = one_file(tmp_path, plain_events().with_columns(values.alias(column)))
    refused(source, rf"events\.parquet: column '{column}' is {expected}")


def test_an_empty_file(tmp_path):
    write_meds(tmp_path / "set", plain_events())
    (tmp_path / "set" / "data" / "1.parquet").touch()
    refused(tmp_path / "set", r"1\.parquet: is empty \(0 bytes\)")


def test_a_file_without_events(tmp_path):
    refused(one_file(tmp_path, plain_events().head(0)), r"no events in its 1 parquet file")


def test_a_truncated_file(tmp_path):
    source = one_file(tmp_path, plain_events())
    source.write_bytes(source.read_bytes()[:-100])
    refused(source, r"events\.parquet: cannot be read as parquet: truncated")


def test_a_file_damaged_in_the_middle(tmp_path):
    source = one_file(tmp_path, plain_events(2000))
    content = bytearray(source.read_bytes())  # the footer stays whole, so that only reading the pages can notice
    content[2000 : len(content) * 3 // 4] = bytes(len(content) * 3 // 4 - 2000)
    source.write_bytes(content)
    refused(source, r"events\.parquet: cannot be read as parquet")


def test_subjects_in_two_files(tmp_path):
    frame = plain_events(10)
    write_meds(tmp_path / "set", frame.filter(pl.col("subject_id") <= 6), frame.filter(pl.col("subject_id") >= 5))
    refused(tmp_path / "set", r"2 subject\(s\) have events in more than one file, first seen in 0\.parquet and 1\.parq")


def test_subjects_in_two_split_folders(tmp_path):
    frame = plain_events(10)
    for split, kept in (("train", pl.col("subject_id") <= 7), ("tuning", pl.col("subject_id") >= 5)):
        (tmp_path / "set" / split).mkdir(parents=True)
        frame.filter(kept).write_parquet(tmp_path / "set" / split / "0.parquet")
    refused(tmp_path / "set", r"3 subject\(s\) are in more than one of its split folders.*train/ and tuning/")


def test_a_split_file_that_contradicts_itself_or_names_unknown_splits(tmp_path):
    source = write_meds(tmp_path / "set", plain_events(3), splits={1: "train", 2: "valid", 3: "train"})
    refused(source, r"subject_splits\.parquet: unknown split 'valid', expected train, tuning, held_out")
    file = source / "metadata" / "subject_splits.parquet"
    pl.DataFrame({"subject_id": [1, 1, 2], "split": ["train", "tuning", "train"]}).write_parquet(file)
    refused(source, r"subject_splits\.parquet: 1 subject\(s\) are in more than one split")
    pl.DataFrame({"subject_id": ["1"], "split": ["train"]}).write_parquet(file)
    refused(source, r"subject_splits\.parquet: column 'subject_id' is String, expected an integer")


def test_births_missing_names_the_number_and_the_ways_on(tmp_path):
    frame = plain_events(20).filter((pl.col("code") != BIRTH) | (pl.col("subject_id") > 3))
    source = one_file(tmp_path, frame)
    refused(source, r"^3 of 20 subjects have no MEDS_BIRTH event.*--birth-code.*--missing-birth drop.*keep")
    refused(source, r"^20 of 20 subjects have no BORN event", birth_code="BORN")
    for choice, left in (("drop", 17), ("keep", 20)):
        info = prepare(source, tmp_path / choice, PrepareOptions(missing_birth=choice))
        assert sum(info["splits"][split]["patients"] for split in SPLITS) == left


def test_all_codes_rare(tmp_path):
    refused(one_file(tmp_path, plain_events(20)), r"--min-patients 21: none of the 4 codes", min_patients=21)


def test_nobody_left_to_train_on(tmp_path):
    source = write_meds(tmp_path / "set", plain_events(4), splits=dict.fromkeys(range(1, 5), "held_out"))
    refused(source, r"no training patient is left")
    refused(one_file(tmp_path, plain_events(20)), r"no training patient is left", exclude=("C",))
    refused(one_file(tmp_path, plain_events(20)), r"no training patient is left", min_tokens=7)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"split": "80/10/20"}, r"--split: the parts sum to 110, expected 100"),
        ({"split": "80/20"}, r"--split: expected three percentages"),
        ({"split": "a/b/c"}, r"--split: expected three percentages"),
        ({"split": "nan/50/50"}, r"--split: expected three percentages"),
        ({"split": "0/50/50"}, r"--split: the training part must be above 0"),
        ({"include": ("(",)}, r"include: '\(' is not a valid regular expression"),
        ({"exclude": ("A", "[z-a]")}, r"exclude: '\[z-a\]' is not a valid regular expression"),
        ({"column": ["value"]}, r"--column: expected SOURCE=MEDS"),
        ({"column": ["a=code", "b=code"]}, r"two source columns are renamed to the same name"),
        ({"admission_code": "IN"}, r"--admission-code and --discharge-code only work together"),
        ({"labs": True}, r"--labs is for --format mimic4"),
        ({"format": "mimic4", "column": ["a=code"]}, r"--column is for --format meds"),
        ({"format": "synthea", "measurements": True}, r"--measurements is for --format omop"),
        ({"observations": True}, r"--observations is for --format omop"),
        ({"numeric_bins": 1}, r"numeric_bins"),
        ({"visit_gap_hours": 0}, r"visit_gap_hours"),
        ({"format": "fhir"}, r"format"),
        ({"min_patient": 3}, r"unknown key; did you mean 'min_patients'"),
    ],
)
def test_options_out_of_place(options, match):
    with pytest.raises(UserError, match=match) as caught:
        PrepareOptions(**options)
    assert "\n" not in str(caught.value)


def test_renames_that_fit_nothing(tmp_path):
    source = one_file(tmp_path, plain_events())
    refused(source, r"--column value=numeric_value: .*no column 'value'", column={"value": "numeric_value"})
    refused(source, r"--column code=codes: 'codes' is no MEDS column; did you mean 'code'", column={"code": "codes"})


def test_an_output_in_the_way_is_left_alone(tmp_path):
    source = write_meds(tmp_path / "set", plain_events())
    refused(source, r"--out .*set: is the source or lies inside it", out=source)
    refused(source, r"--out .*data: is the source or lies inside it", out=source / "data")
    refused(source, r"--out .*: holds the source", out=tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    refused(source, r"--out .*mine: holds something other than prepared records", out=tmp_path / "mine")
    refused(source, r"--out .*thesis\.txt: is a file", out=tmp_path / "mine" / "thesis.txt")
    prepare(source, tmp_path / "out", PrepareOptions())
    refused(source, r"--out .*out: already holds prepared records; replace them with --overwrite", out=tmp_path / "out")


def test_a_failed_overwrite_keeps_the_old_records(tmp_path):
    source = write_meds(tmp_path / "set", plain_events())
    prepare(source, tmp_path / "out", PrepareOptions())
    with pytest.raises(UserError):
        prepare(source, tmp_path / "out", PrepareOptions(min_patients=1000), overwrite=True)
    assert len(open_prepared(tmp_path / "out").split("train")) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]


def test_an_interruption_leaves_nothing(tmp_path):
    source = write_meds(tmp_path / "set", plain_events())

    def interrupt(stage: str, done: int, steps: int) -> None:
        if stage == "writing" and done == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", PrepareOptions(), progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_source_in_the_other_format(tmp_path):
    refused(write_tables(tmp_path / "mimic"), r"no parquet file inside.*use --format mimic4")
    meds = write_meds(tmp_path / "set", plain_events())
    refused(meds, r"no patients\.csv\.gz or patients\.csv.*is it --format meds", format="mimic4")
    refused(one_file(tmp_path, plain_events()), r"is a file; --format mimic4 expects the folder", format="mimic4")


def test_a_missing_table(tmp_path):
    folder = write_tables(tmp_path / "mimic")
    (folder / "hosp" / "labevents.csv.gz").unlink()
    refused(folder, r"no labevents\.csv\.gz or labevents\.csv", format="mimic4", labs=True)
    (folder / "hosp" / "procedures_icd.csv.gz").unlink()
    refused(folder, r"hosp: no procedures_icd\.csv\.gz or procedures_icd\.csv", format="mimic4")


def test_a_missing_column_of_a_table(tmp_path):
    folder = write_tables(tmp_path / "mimic", patients=TABLES["patients"].replace("anchor_age", "age"))
    refused(folder, r"patients\.csv\.gz: no column 'anchor_age'", format="mimic4")


def test_tables_that_are_not_what_their_name_says(tmp_path):
    folder = write_tables(tmp_path / "mimic")
    file = folder / "hosp" / "diagnoses_icd.csv.gz"
    zipped = file.read_bytes()
    file.write_text(TABLES["diagnoses_icd"])
    refused(folder, r"diagnoses_icd\.csv\.gz: not gzip data; if it is plain text, name it diagnoses_icd\.csv$",
            format="mimic4")  # fmt: skip
    file.write_bytes(zipped[: len(zipped) // 2])
    refused(folder, r"diagnoses_icd\.csv\.gz: cannot be read as CSV", format="mimic4")
    file.write_bytes(b"")
    refused(folder, r"diagnoses_icd\.csv\.gz: is empty", format="mimic4")
    file.write_bytes(gzip.compress(TABLES["diagnoses_icd"].replace("E119", "caf\xe9").encode("latin-1")))
    refused(folder, r"diagnoses_icd\.csv\.gz: cannot be read as CSV", format="mimic4")
    file.rename(file.with_suffix(""))
    file.with_suffix("").write_bytes(zipped)
    refused(folder, r"diagnoses_icd\.csv: gzip data; name it diagnoses_icd\.csv\.gz", format="mimic4")


def test_no_message_quotes_a_record(tmp_path):
    folder = write_tables(tmp_path / "mimic", patients=TABLES["patients"] + "7,F,SECRET\xe9,1,2,3,4,5,6\n")
    with pytest.raises(UserError) as caught:
        prepare(folder, tmp_path / "out", PrepareOptions(format="mimic4"))
    assert "SECRET" not in str(caught.value)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    prepare(write_meds(tmp_path / "set", plain_events()), tmp_path / "out", PrepareOptions())
    return tmp_path / "out"


def not_opened(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        open_prepared(folder)
    assert "\n" not in str(caught.value)


def test_prepared_records_that_are_not_there(tmp_path):
    not_opened(tmp_path / "nowhere", r"nowhere: no such folder; make it with `behrt prepare")
    not_opened(tmp_path, r"no dataset\.json in it")


@pytest.mark.parametrize("name", ["vocabulary.json", "train.arrow", "tuning.arrow", "held_out.arrow"])
def test_prepared_records_that_lost_a_file(prepared, name):
    (prepared / name).unlink()
    not_opened(prepared, rf"{name}: no such file")


@pytest.mark.parametrize("name", ["dataset.json", "vocabulary.json", "train.arrow"])
def test_prepared_records_cut_short_or_emptied(prepared, name):
    content = (prepared / name).read_bytes()
    for left in (len(content) // 2, 0):
        (prepared / name).write_bytes(content[:left])
        not_opened(prepared, rf"{re.escape(name)}: .*damaged")


def test_prepared_records_of_another_version_or_kind(prepared):
    info = json.loads((prepared / "dataset.json").read_text())
    (prepared / "dataset.json").write_text(json.dumps({**info, "format_version": 99}))
    not_opened(prepared, r"format version 99, expected 1; prepare the records again")
    (prepared / "dataset.json").write_text(json.dumps({"license": "CC0"}))
    not_opened(prepared, r"dataset\.json: damaged, or not of prepared records")


def test_prepared_files_of_two_preparations_mixed(prepared):
    shutil.copyfile(prepared / "tuning.arrow", prepared / "train.arrow")
    not_opened(prepared, r"train\.arrow: \d+ patients, expected \d+")


def test_an_arrow_file_of_something_else(prepared):
    events((1, datetime(2020, 1, 1), "A"), (1, day(0), "B")).write_ipc(prepared / "train.arrow")
    not_opened(prepared, r"train\.arrow: its columns are not those of prepared records")
