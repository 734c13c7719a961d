"""Parts of a preparation: made apart, they join to the bytes that are written at once; anything else is refused."""

import json
import shutil
import stat
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from behrt import parts as parts_module
from behrt import prepare as preparation
from behrt.cli import main
from behrt.config import UserError
from behrt.events import SPLITS
from behrt.files import write_checksums
from behrt.parts import PartNumber
from behrt.prepare import join_parts, prepare, prepare_part
from behrt.prepare_options import PrepareOptions
from behrt.sources.meds import open_meds

from .small_records import plain_events, random_events, write_meds

SUBJECTS = range(1, 101)


def shards_of(frame: pl.DataFrame, files: int = 5) -> list[pl.DataFrame]:
    return [frame.filter(pl.col("subject_id") % files == number) for number in range(files)]


def make_source(root: Path, layout: str, seed: int = 0) -> Path:
    """A MEDS set in five files whose splits are told in one of three ways."""
    shards = shards_of(random_events(SUBJECTS, seed))
    if layout == "hash":
        return write_meds(root, *shards)
    if layout == "file":
        return write_meds(root, *shards, splits={subject: SPLITS[subject % 7 % 3] for subject in SUBJECTS})
    for number, shard in enumerate(shards):
        folder = root / "data" / ("train", "train", "tuning", "train", "held_out")[number]
        folder.mkdir(parents=True, exist_ok=True)
        shard.sort("subject_id", "time", maintain_order=True).write_parquet(folder / f"{number}.parquet")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_parts(source: Path, root: Path, parts: int, options: PrepareOptions) -> list[Path]:
    folders = [root / f"part{number}" for number in range(1, parts + 1)]
    for number, folder in enumerate(folders, 1):
        prepare_part(source, folder, PartNumber(number, parts), options)
    return folders


@pytest.mark.parametrize("layout", ["hash", "file", "folders"])
@pytest.mark.parametrize(("parts", "bins"), [(1, None), (3, None), (3, 4)])
def test_joined_parts_have_the_bytes_of_a_preparation_at_once(tmp_path, monkeypatch, layout, parts, bins):
    monkeypatch.setattr(preparation, "open_meds", partial(open_meds, max_shard_events=150))  # several shards a file
    options = PrepareOptions(min_patients=3, numeric_bins=bins, static_codes="keep")
    source = make_source(tmp_path / "source", layout)
    whole = prepare(source, tmp_path / "whole", options)
    folders = make_parts(source, tmp_path, parts, options)
    info = join_parts(folders[::-1], tmp_path / "joined", workers=1)
    assert info == whole
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")


def test_bins_of_joined_parts_are_those_of_a_bounded_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("behrt.coding.MAX_SAMPLE", 20)  # each part has more values of a code than are kept
    options = PrepareOptions(min_patients=1, numeric_bins=3)
    frame = plain_events(100).with_columns(pl.Series("numeric_value", np.arange(700) % 97, dtype=pl.Float32))
    source = write_meds(tmp_path / "source", *shards_of(frame))
    prepare(source, tmp_path / "whole", options)
    join_parts(make_parts(source, tmp_path, 2, options), tmp_path / "joined")
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")


def test_a_simulated_cohorts_description_goes_through_the_parts(tmp_path):
    source = make_source(tmp_path / "source", "file")
    (source / "metadata" / "cohort.json").write_text("{}")
    (source / "metadata" / "cohort.safetensors").write_bytes(b"tensors")
    join_parts(make_parts(source, tmp_path, 2, PrepareOptions()), tmp_path / "joined")
    assert (tmp_path / "joined" / "cohort.safetensors").read_bytes() == b"tensors"


def test_a_part_reads_its_own_files_only(tmp_path):
    source = make_source(tmp_path / "source", "hash")
    (source / "data" / "1.parquet").write_bytes(b"damaged")
    prepare_part(source, tmp_path / "part1", PartNumber(1, 2), PrepareOptions())
    with pytest.raises(UserError, match=r"1\.parquet: cannot be read"):
        prepare_part(source, tmp_path / "part2", PartNumber(2, 2), PrepareOptions())


def test_a_part_is_private_and_its_description_names_no_subject_and_no_place(tmp_path):
    frame = plain_events().with_columns(pl.col("subject_id") + 918_273_000)
    source = write_meds(tmp_path / "source", *shards_of(frame))
    (folder,) = make_parts(source, tmp_path / "place", 1, PrepareOptions())
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["part1"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    text = (folder / "part.json").read_text() + (folder / "SHA256SUMS").read_text()
    assert "918273" not in text
    assert str(tmp_path) not in text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    make_parts(write_meds(root / "source", *shards_of(plain_events(30))), root, 2, PrepareOptions())
    return root


@pytest.fixture
def two(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, also the working one, with a source and its parts `part1` and `part2`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture, command: str, message: str) -> None:
    capsys.readouterr()
    assert main(command.split()) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert message in told[0]
    assert not Path("out").exists()


def test_what_is_no_whole_is_refused(two, capsys):
    prepare_part(two / "source", two / "other-options", PartNumber(2, 2), PrepareOptions(min_tokens=3))
    prepare_part(two / "source", two / "of-three", PartNumber(2, 3), PrepareOptions())
    write_meds(two / "elsewhere" / "source", *shards_of(plain_events(31)))
    prepare_part(two / "elsewhere" / "source", two / "other-source", PartNumber(2, 2), PrepareOptions())
    prepare(two / "source", two / "whole", PrepareOptions())
    for folders, message in (
        ("part1", "part 2/2 is missing"),
        ("part1 part1", "are both part 1/2"),
        ("part1 other-options", "other-options: was made with another --min-tokens than part1"),
        ("part1 of-three", "of-three: is part 2/3, and part1 part 1/2"),
        ("part1 other-source", "other-source: was made of another source than part1"),
        ("part1 whole", "whole: holds prepared records, no part of them"),
        ("part1 source", "source: holds no part.json"),
        ("part1 nowhere", "nowhere: no such folder"),
    ):
        refused(capsys, f"prepare --join {folders} --out out", message)


def test_a_source_that_changes_between_the_parts_is_refused(two, capsys):
    source = two / "changing"
    splits = dict.fromkeys(range(1, 31), "train")
    write_meds(source, *shards_of(plain_events(30)), splits=splits)
    prepare_part(source, two / "first", PartNumber(1, 2), PrepareOptions())
    file = source / "metadata" / "subject_splits.parquet"
    pl.read_parquet(file).reverse().write_parquet(file)
    prepare_part(source, two / "second", PartNumber(2, 2), PrepareOptions())
    info = json.loads((two / "first" / "part.json").read_text())
    info["files"][-1][1] = file.stat().st_size  # as if the file had not changed in length
    rewrite(two / "first", info)
    refused(capsys, "prepare --join first second --out out", "subject_splits.parquet of its source has changed")


def rewrite(folder: Path, info: dict) -> None:
    """Changes the description of a part, its sums with it."""
    (folder / "part.json").write_text(json.dumps(info))
    files = [path for path in folder.iterdir() if path.name != "SHA256SUMS"]
    write_checksums(folder, "SHA256SUMS", files)


def test_a_subject_in_the_files_of_two_parts_is_refused(two, capsys):
    frame = plain_events(10)
    write_meds(two / "shared" / "source", frame, frame.tail(14))
    make_parts(two / "shared" / "source", two / "shared", 2, PrepareOptions())
    refused(
        capsys,
        "prepare --join shared/part1 shared/part2 --out out",
        "2 subject(s) have events in more than one file, first seen in 0.parquet and 1.parquet",
    )


def test_parts_of_another_version_are_refused(two, capsys, monkeypatch):
    monkeypatch.setattr(parts_module, "__version__", "99.0")
    refused(capsys, "prepare --join part1 part2 --out out", "part1: was made by behrt 0")


@pytest.mark.parametrize("file", ["events-000001-000000.arrow", "subjects.arrow", "patients.arrow", "part.json"])
@pytest.mark.parametrize("damage", ["a bit", "cut", "gone", "without a sum"])
def test_damage_to_any_file_of_a_part_is_found(two, capsys, file, damage):
    path = two / "part2" / file
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-9])
    elif damage == "gone":
        path.unlink()
    else:
        sums = two / "part2" / "SHA256SUMS"
        sums.write_text("".join(line for line in sums.read_text().splitlines(True) if file not in line))
    refused(capsys, "prepare --join part1 part2 --out out", "part2")


def test_a_damaged_part_says_how_it_is_made_again(two, capsys):
    (two / "part2" / "subjects.arrow").unlink()
    refused(capsys, "prepare --join part1 part2 --out out", "make this part again: `behrt prepare SOURCE --shard")


def test_a_part_is_no_prepared_data_and_stands_in_the_way(two, capsys):
    refused(capsys, "train --data part1", "part1: is one part of a preparation; join its parts first")
    refused(capsys, "prepare source --out part1", "already holds a part of prepared records")
    refused(capsys, "prepare --join part1 part2 --out part1", "is the source or lies inside it")
    (two / "mine").mkdir()
    (two / "mine" / "file").write_text("mine")
    refused(capsys, "prepare --join part1 part2 --out mine", "holds something other than prepared records")
    assert main(["prepare", "source", "--shard", "1/2", "--out", "part1", "--overwrite"]) == 0
    assert main(["prepare", "--join", "part1", "part2", "--out", "whole"]) == 0
    refused(capsys, "prepare --join part1 part2 --out whole", "already holds prepared records")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("source --shard 3/2", "--shard: expected i/n with i from 1 to n, as in 2/3, found '3/2'"),
        ("source --shard 0/2", "found '0/2'"),
        ("source --shard two", "found 'two'"),
        ("source --shard 1/0", "found '1/0'"),
        ("source --shard 6/6", "--shard 6/6: source has 5 file(s)"),
        ("source --shard 1/2 --format mimic4", "--shard: is for --format meds"),
        ("--join part1 part2 --min-patients 3", "--min-patients: has no effect with --join"),
        ("--join part1 part2 --labs", "--labs: has no effect with --join"),
        ("--join part1 part2 --shard 1/2", "--shard: has no effect with --join"),
        ("part1 part2", "expected one SOURCE, found 2"),
        ("--join", "Missing argument 'SOURCE'"),
    ],
)
def test_flags_that_say_nothing_sensible_are_refused(two, capsys, command, message):
    refused(capsys, f"prepare {command} --out out", message)


def test_a_preparation_leaves_alone_what_another_has_beside_a_longer_name(two):
    (two / ".whole.1.abcdefgh.partial").mkdir()
    (two / ".whole.ijklmnop.partial").mkdir()
    join_parts([two / "part1", two / "part2"], two / "whole")
    assert [path.name for path in two.iterdir() if path.name.startswith(".")] == [".whole.1.abcdefgh.partial"]


def test_a_flag_of_zero_is_a_flag(two, capsys):
    refused(capsys, "prepare source --min-tokens 0 --out out", "min_tokens")
    refused(capsys, "prepare --join part1 part2 --split-seed 0 --out out", "--split-seed: has no effect with --join")


def test_a_part_prints_its_report_and_what_comes_next(two, capsys):
    assert main(["prepare", "source", "--shard", "2/2", "--out", "again", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["report"]["subjects_kept"] == 12  # of two files in five
    assert "behrt prepare --join" in told.err
    assert ".parquet" not in told.out  # where a file is a patient, its name is an id
