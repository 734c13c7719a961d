"""The MEDS reader: layouts, dtypes, renames, splits, shards."""

import importlib.util
from pathlib import Path

import polars as pl
import pytest

from behrt.events import EVENT_SCHEMA
from behrt.sources.meds import open_meds

from .small_records import plain_events, random_events, write_meds


def everything(source) -> pl.DataFrame:
    return pl.concat([shard.collect() for shard in source.shards]).sort(pl.all())


def test_shards_have_the_event_schema_whatever_the_files_hold(tmp_path):
    frame = plain_events().with_columns(
        pl.col("subject_id").cast(pl.Int32),
        pl.col("time").cast(pl.Datetime("ns", "Europe/Berlin")),
        pl.col("code").cast(pl.Categorical),
        pl.lit(0.5, pl.Float64).alias("numeric_value"),
        pl.lit(7).alias("visit_id"),
        pl.lit("ignored").alias("table"),
    )
    frame.write_parquet(tmp_path / "events.parquet")
    read = everything(open_meds(tmp_path / "events.parquet", {}))
    assert dict(read.schema) == EVENT_SCHEMA
    plain = plain_events().with_columns(pl.lit(0.5, pl.Float32).alias("numeric_value"), pl.lit("7").alias("visit_id"))
    assert read.equals(plain.sort(pl.all()))


def test_optional_columns_may_be_missing_and_renamed_ones_are_found(tmp_path):
    frame = plain_events().select("subject_id", "time", concept="code", value=pl.lit(1.5))
    frame.write_parquet(tmp_path / "events.parquet")
    read = everything(open_meds(tmp_path / "events.parquet", {"concept": "code", "value": "numeric_value"}))
    assert read["numeric_value"].to_list() == [1.5] * len(read)
    assert read["visit_id"].null_count() == len(read)


def test_a_blank_visit_id_is_none(tmp_path):
    plain_events().with_columns(pl.lit("").alias("visit_id")).write_parquet(tmp_path / "events.parquet")
    read = everything(open_meds(tmp_path / "events.parquet", {}))
    assert read["visit_id"].null_count() == len(read)


def test_a_large_file_is_cut_into_bounded_shards_of_whole_subjects(tmp_path):
    frame = random_events(range(1, 80), 0)
    write_meds(tmp_path / "set", frame)
    source = open_meds(tmp_path / "set", {}, max_shard_events=100)
    shards = [shard.collect() for shard in source.shards]
    assert len(shards) > 5
    assert max(map(len, shards)) < 100 + 40
    owners = pl.concat([shard.select("subject_id").unique() for shard in shards])
    assert owners["subject_id"].is_unique().all()
    assert everything(source).equals(frame.sort(pl.all()))


def test_splits_come_from_the_file_that_meds_names(tmp_path):
    frame = plain_events(4)
    splits = {1: "train", 2: "tuning", 3: "held_out", 4: "train"}
    source = open_meds(write_meds(tmp_path / "set", frame, splits=splits), {})
    assert source.splits is not None
    assert source.splits.names() == splits


@pytest.mark.parametrize("above", ["", "data"])
def test_splits_come_from_folders_named_for_them(tmp_path, above):
    frame = plain_events(3)
    for subject, split in ((1, "train"), (2, "tuning"), (3, "held_out")):
        folder = tmp_path / "set" / above / split
        folder.mkdir(parents=True)
        frame.filter(pl.col("subject_id") == subject).write_parquet(folder / "0.parquet")
    source = open_meds(tmp_path / "set", {})
    assert source.splits is not None
    assert source.splits.names() == {1: "train", 2: "tuning", 3: "held_out"}


def test_no_splits_are_made_up_for_one_file_or_a_folder_of_files(tmp_path):
    plain_events().write_parquet(tmp_path / "events.parquet")
    assert open_meds(tmp_path / "events.parquet", {}).splits is None
    assert open_meds(tmp_path, {}).splits is None


def test_an_enlarged_set_repeats_every_history_under_ids_of_its_own(tmp_path):
    path = Path(__file__).resolve().parents[1] / "experiments" / "throughput" / "prepare.py"
    spec = importlib.util.spec_from_file_location("measure_prepare", path)
    assert spec is not None
    assert spec.loader is not None
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    frame = random_events(range(5, 25), 3)
    halves = (frame.filter(pl.col("subject_id") % 2 == half) for half in (0, 1))
    source = write_meds(tmp_path / "set", *halves, splits=dict.fromkeys(range(5, 25), "train"))
    assert measure.repeat(source, tmp_path / "large", 3) == 3 * len(frame)
    large = open_meds(tmp_path / "large", {})  # which refuses a subject in two files
    assert large.splits is not None
    assert sorted(large.splits.names()) == list(range(5, 65))
    columns = ["time", "code", "numeric_value", "visit_id"]
    histories = [own.select(columns) for _, own in everything(large).group_by("subject_id")]
    expected = [own.select(columns) for _, own in frame.sort(pl.all()).group_by("subject_id")]
    assert sorted(map(str, histories)) == sorted(3 * list(map(str, expected)))
