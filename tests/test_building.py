"""Does `behrt labels` label whole sources, shard by shard, and refuse what it cannot label?"""

import json
import stat
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from meds.schema import LabelSchema

from behrt.cli import main
from behrt.files import FolderLock
from behrt.labels import read_labels
from behrt.labels_command import TASKS
from behrt.prepare_options import PrepareOptions
from behrt.sources.meds import open_meds
from behrt.tasks import building
from behrt.tasks.building import OPTIONS, Task, label_events
from behrt.tasks.task_options import DiseaseOptions, NextVisitOptions

from .small_records import events, write_meds
from .small_tasks import SETS, SUBJECT, hospital_records, visit

SETS_FILE = "heart: [ICD9CM//428*]\nlung: [ICD9CM//496, ICD10CM//J44*]\nnothing: [X//1]\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    table = hospital_records()
    half = pl.col("subject_id") < SUBJECT + 4
    write_meds(Path("meds"), table.filter(half), table.filter(~half))
    Path("sets.yaml").write_text(SETS_FILE)
    return Path("meds")


def of(task: str) -> list[str]:
    """Code sets where the task needs some."""
    return [] if task in ("readmission", "survival") else ["--code-sets", "sets.yaml"]


def test_the_command_and_the_builders_know_the_same_tasks() -> None:
    assert set(TASKS) == set(OPTIONS)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_writes_valid_meds_labels_that_only_their_owner_reads(
    task: str, source: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["labels", task, "meds", "--out", "labels.parquet", *of(task), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    LabelSchema.validate(pq.read_table("labels.parquet"))
    labels = read_labels(Path("labels.parquet"))
    assert labels.table.height == told["labels"] > 0
    assert labels.table["boolean_value"].sum() == told["positives"] > 0
    assert labels.table["subject_id"].n_unique() == told["subjects"]
    assert stat.S_IMODE(Path("labels.parquet").stat().st_mode) == 0o600
    assert sorted(path.name for path in Path().iterdir()) == ["labels.parquet", "meds", "sets.yaml"]


def test_the_counts_of_each_set_are_told_and_that_one_matched_nothing(
    source: Path, capsys: pytest.CaptureFixture
) -> None:
    main(["labels", "next-visit", "meds", "--out", "a.parquet", "--code-sets", "sets.yaml", "--json"])
    told = capsys.readouterr()
    sets = json.loads(told.out)["sets"]
    assert {name: figures["codes"] for name, figures in sets.items()} == {"heart": 1, "lung": 1, "nothing": 0}
    labels = read_labels(Path("a.parquet")).table
    for name, figures in sets.items():
        own = labels.filter(pl.col("categorical_value") == name)
        assert (own.height, own["boolean_value"].sum()) == (figures["labels"], figures["positives"])
    assert "no code of the records is in nothing" in " ".join(told.err.split())


def test_shards_and_workers_leave_no_trace_in_the_file(source: Path) -> None:
    task, options = Task("disease", DiseaseOptions(), SETS), PrepareOptions()
    found = []
    for most, workers in ((1_000_000, 1), (10, 1), (10, 3)):
        opened = open_meds(source, {}, max_shard_events=most)
        found.append((len(opened.shards), label_events(opened, Path("a.parquet"), task, options, workers=workers)))
        found[-1] += (read_labels(Path("a.parquet")).table,)
    assert found[0][0] < found[1][0]
    for _, told, labels in found[1:]:
        assert told == found[0][1]
        assert labels.equals(found[0][2])


def test_codes_that_a_set_matches_are_counted_over_all_shards(tmp_path: Path) -> None:
    rows = [visit(when, code, subject=subject) for subject, code in ((1, "ICD9CM//4280"), (2, "ICD9CM//42831"))
            for when in (0, 10)]  # fmt: skip
    write_meds(tmp_path / "meds", *(events(*first, *second, visit_id=True) for first, second in (rows[:2], rows[2:])))
    task = Task("next-visit", NextVisitOptions(), SETS)
    found = label_events(open_meds(tmp_path / "meds", {}), tmp_path / "a.parquet", task, PrepareOptions())
    assert found["sets"]["heart"] == {"codes": 2, "labels": 2, "subjects": 2, "positives": 2, "prevalence": 1.0}
    assert found["sets"]["lung"]["codes"] == 0


def test_many_code_sets_are_worked_on_for_few_patients_at_a_time(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, opened = Task("next-visit", NextVisitOptions(), SETS), open_meds(source, {})
    at_once = label_events(opened, Path("a.parquet"), task, PrepareOptions())
    monkeypatch.setattr(building, "SETS_AT_ONCE", 0.5)
    steps: list[int] = []
    found = label_events(
        opened, Path("b.parquet"), task, PrepareOptions(), progress=lambda *told: steps.append(told[2])
    )
    assert steps[0] == 4 * len(opened.shards)
    assert found == at_once
    assert read_labels(Path("a.parquet")).table.equals(read_labels(Path("b.parquet")).table)


def test_one_code_set_gives_the_file_of_a_binary_task(source: Path) -> None:
    main(["labels", "disease", "meds", "--out", "a.parquet", "--code-sets", "sets.yaml", "--code-set", "heart"])
    labels = read_labels(Path("a.parquet"))
    assert (labels.kind, labels.task) == ("binary", "disease, heart")


def test_prepared_records_say_how_the_source_is_read(source: Path) -> None:
    renamed = hospital_records().with_columns(
        pl.col("code").str.replace("ADMISSION", "IN").str.replace("DISCHARGE", "OUT")
    )
    write_meds(Path("other"), renamed)
    reading = ["--admission-code", "IN", "--discharge-code", "OUT"]
    assert main(["prepare", "other", "--out", "prepared", *reading]) == 0
    assert main(["labels", "readmission", "other", "--out", "b.parquet", "--data", "prepared"]) == 0
    assert main(["labels", "readmission", "meds", "--out", "a.parquet"]) == 0
    assert read_labels(Path("a.parquet")).table.equals(read_labels(Path("b.parquet")).table)


def test_labs_make_moments_as_they_make_visits(test_data: Path, tmp_path: Path) -> None:
    tables, out = str(test_data / "mimic-iv-demo-2.2"), tmp_path / "a.parquet"
    asked = ["survival", tables, "--out", str(out), "--at", "each-visit", "--observed-until", "always", "--overwrite"]
    assert main(["labels", *asked, "--format", "mimic4"]) == 0
    without = read_labels(out).table
    assert main(["labels", *asked, "--format", "mimic4", "--labs"]) == 0
    assert read_labels(out).table.height > 1.5 * without.height


@pytest.mark.parametrize("flag", ["labs", "measurements", "observations"])
def test_a_flag_of_another_format_is_refused(flag: str, source: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["labels", "readmission", "meds", "--out", "a.parquet", f"--{flag}"]) == 2
    assert f"--{flag} is for --format" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["fewer patients", "more files"])
def test_prepared_records_of_another_source_are_refused(
    other: str, source: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["prepare", "meds", "--out", "prepared"]) == 0
    table = hospital_records(7 if other == "fewer patients" else 8)
    parts = 2 if other == "fewer patients" else 4
    write_meds(Path("other"), *(table.filter(pl.col("subject_id") % parts == part) for part in range(parts)))
    capsys.readouterr()
    assert main(["labels", "readmission", "other", "--out", "a.parquet", "--data", "prepared"]) == 2
    told = capsys.readouterr().err
    assert "--data: was prepared from another source than other" in told
    assert len(told.splitlines()) == 1
    assert not Path("a.parquet").exists()


def test_a_source_that_was_moved_is_still_the_one_that_was_prepared(source: Path) -> None:
    assert main(["prepare", "meds", "--out", "prepared"]) == 0
    Path("meds").rename("moved")
    assert main(["labels", "readmission", "moved", "--out", "a.parquet", "--data", "prepared"]) == 0


def test_subjects_without_a_split_get_no_label(source: Path) -> None:
    write_meds(Path("split"), hospital_records(), splits={SUBJECT: "train", SUBJECT + 1: "held_out"})
    main(["labels", "readmission", "split", "--out", "a.parquet"])
    assert read_labels(Path("a.parquet")).table["subject_id"].unique().to_list() == [SUBJECT, SUBJECT + 1]


def test_what_a_killed_process_left_is_removed_and_a_living_one_is_not_disturbed(
    source: Path, capsys: pytest.CaptureFixture
) -> None:
    spill, partial = Path(".a.parquet.x.spill"), Path(".a.parquet.99.partial")
    spill.mkdir()
    partial.touch()
    living = FolderLock(spill)
    assert main(["labels", "readmission", "meds", "--out", "a.parquet"]) == 2
    assert "another behrt labels is writing there" in capsys.readouterr().err
    assert spill.exists()
    living.release()
    assert main(["labels", "readmission", "meds", "--out", "a.parquet"]) == 0
    assert not spill.exists()
    assert not partial.exists()


REFUSED = {
    "no source": ("readmission none --out a.parquet", "none: no such file or folder"),
    "no admission": ("readmission meds --out a.parquet --admission-code A --discharge-code B", "admission code 'A'"),
    "no sets": ("disease meds --out a.parquet", "labels disease: expected code sets"),
    "sets of nothing": ("disease meds --out a.parquet --code-sets sets.yaml --code-set nothing", "is in a code set"),
    "a set that is not there": ("disease meds --out a.parquet --code-sets sets.yaml --code-set no", "no code set 'no'"),
    "sets for a readmission": ("readmission meds --out a.parquet --code-sets sets.yaml", "have no effect"),
    "two sets for survival": ("survival meds --out a.parquet --code-sets sets.yaml", "expected one code set, found 3"),
    "a name without a file": ("survival meds --out a.parquet --code-set heart", "give that with --code-sets"),
    "no history": (
        "survival meds --out a.parquet --min-visits 99",
        "most of the 24 moments: fewer visits than min visits",
    ),
    "another ending": ("readmission meds --out a.csv", "expected a file that ends in .parquet"),
    "inside the source": ("readmission meds --out meds/a.parquet", "is the source or lies inside it"),
    "in the way": ("readmission meds --out meds.parquet", "is there already"),
    "an unknown task": ("readmision meds --out a.parquet", "readmision"),
    "an unknown moment": ("disease meds --out a.parquet --code-sets sets.yaml --at noon", "labels disease: at"),
    "an option of another task": ("survival meds --out a.parquet --planned A", "planned: unknown key"),
    "reading and prepared": ("readmission meds --out a.parquet --data p --format meds", "has no effect with --data"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_refused_in_one_line_and_leaves_nothing(
    arguments: str, message: str, source: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("meds.parquet").touch()
    before = sorted(Path().rglob("*"))
    assert main(["labels", *arguments.split()]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
    assert str(SUBJECT)[:6] not in told
    assert sorted(Path().rglob("*")) == before


def test_a_source_of_one_file_is_not_replaced_by_its_labels(source: Path, capsys: pytest.CaptureFixture) -> None:
    one = Path("one.parquet")
    hospital_records().write_parquet(one)
    before = one.read_bytes()
    Path("link.parquet").symlink_to(one)
    for out in (one, Path("meds/../one.parquet"), Path("link.parquet")):
        assert main(["labels", "readmission", str(one), "--out", str(out), "--overwrite"]) == 2
        told = capsys.readouterr().err
        assert "is the source or lies inside it" in told
        assert len(told.splitlines()) == 1
        assert one.read_bytes() == before


# Records.


def test_the_tables_of_mimic_and_their_meds_conversion_give_the_same_readmissions(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    meds = [str(test_data / "mimic-iv-demo-meds"), "--column", "value=numeric_value"]
    meds += ["--admission-code", "HOSPITAL_ADMISSION", "--discharge-code", "HOSPITAL_DISCHARGE"]
    assert main(["labels", "readmission", *meds, "--out", "meds.parquet"]) == 0
    tables = [str(test_data / "mimic-iv-demo-2.2"), "--format", "mimic4"]
    assert main(["labels", "readmission", *tables, "--out", "tables.parquet"]) == 0
    of_meds, of_tables = (read_labels(Path(f"{name}.parquet")).table for name in ("meds", "tables"))
    assert of_meds.height == 251
    assert of_meds["boolean_value"].sum() == 50
    assert of_meds.equals(of_tables)
