"""Preparation: records in, sequences out."""

import json
import stat
from collections import Counter, defaultdict
from datetime import datetime, time, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from behrt.events import SPLITS
from behrt.prepare import lengths_described, prepare, report_rows
from behrt.prepare_options import PrepareOptions
from behrt.sequences import open_prepared
from behrt.vocabulary import CLS, SEP, UNK

from .small_records import BIRTH, DEATH, plain_events, random_events, write_meds

SUBJECTS = range(1, 121)
SPLIT_OF = {subject: ("train", "train", "tuning", "held_out")[subject % 4] for subject in SUBJECTS}


def reference(frame: pl.DataFrame, *, gap: timedelta, min_tokens: int) -> dict[int, list[list[tuple]]]:
    """The visits of each subject, told again event by event: `[[(time, code, age), …], …]`."""
    by_subject = defaultdict(list)
    for row in frame.iter_rows():
        by_subject[row[0]].append(row[1:])
    histories = {}
    for subject, rows in by_subject.items():
        birth = min(when for when, code, *_ in rows if code == BIRTH)
        deaths = [when for when, code, *_ in rows if code == DEATH]
        end = min(deaths, default=datetime.max)
        if end.time() == time(0):
            end += timedelta(days=1) - timedelta(microseconds=1)
        kept = [row for row in rows if row[1] not in (None, BIRTH, DEATH) and row[0] is not None]
        kept = sorted((row for row in kept if birth <= row[0] <= end), key=lambda row: row[0])
        visits: dict[object, list] = {}
        last, number = None, 0
        for when, code, _, visit in kept:
            if visit is None:
                number += last is None or when - last > gap
                last = when
                visit = ("gap", number)
            event = (when, code, (when - birth).total_seconds() / 86400 / 365.25)
            if event not in visits.setdefault(visit, []):
                visits[visit].append(event)
        if sum(map(len, visits.values())) >= min_tokens:
            histories[subject] = list(visits.values())
    return histories


def prepared(tmp_path: Path, *shards: pl.DataFrame, name: str = "out", splits=None, **options):
    source = tmp_path / f"{name}-source"
    write_meds(source, *shards, splits=splits)
    prepare(source, tmp_path / name, PrepareOptions(**options))
    return open_prepared(tmp_path / name)


@pytest.mark.parametrize("seed", range(4))
def test_sequences_equal_those_of_a_plain_loop_over_the_events(tmp_path, seed):
    frame = random_events(SUBJECTS, seed)
    halves = [frame.filter(pl.col("subject_id") <= 60), frame.filter(pl.col("subject_id") > 60)]
    data = prepared(tmp_path, *halves, splits=SPLIT_OF, min_tokens=3, visit_gap_hours=30, min_patients=5)
    # Ties in time keep the order of the file, which `write_meds` sorts stably.
    ordered = pl.concat([half.sort("subject_id", "time", maintain_order=True) for half in halves])
    histories = reference(ordered, gap=timedelta(hours=30), min_tokens=3)

    patients = Counter()
    for subject, visits in histories.items():
        if SPLIT_OF[subject] == "train":
            patients.update({code for visit in visits for _, code, _ in visit})
    expected_vocabulary = sorted((c for c in patients if patients[c] >= 5), key=lambda c: (-patients[c], c))
    assert list(data.vocabulary.tokens[5:]) == expected_vocabulary
    id_of = {code: number for number, code in enumerate(expected_vocabulary, 5)}

    for split in SPLITS:
        own = data.split(split)
        subjects = own.subject_ids().tolist()
        assert subjects == [subject for subject in sorted(histories) if SPLIT_OF[subject] == split]
        for index, subject in enumerate(subjects):
            codes, ages, numbers, times = [CLS], [None], [0], [None]
            for number, visit in enumerate(histories[subject], 1):
                for when, code, age in visit:
                    codes.append(id_of.get(code, UNK))
                    ages.append(age)
                    times.append(when)
                    numbers.append(number)
                codes.append(SEP)
                ages.append(ages[-1])
                times.append(times[-1])
                numbers.append(number)
            ages[0], times[0] = ages[1], times[1]
            found_codes, found_ages, found_visits = own.sequence(index)
            assert found_codes.tolist() == codes
            assert found_visits.tolist() == numbers
            assert found_ages == pytest.approx(np.array(ages), rel=1e-6)
            assert own.times(index).tolist() == times
            assert own.lengths[index] == len(codes)


def test_the_same_input_and_options_give_the_same_bytes(tmp_path):
    frame = random_events(SUBJECTS, 5)
    for name in ("one", "two"):
        prepared(tmp_path / name, frame, name="out", numeric_bins=4, static_codes="keep", min_patients=3)
    names = sorted(path.name for path in (tmp_path / "one" / "out").iterdir())
    assert names == ["dataset.json", "held_out.arrow", "train.arrow", "tuning.arrow", "vocabulary.json"]
    for name in names:
        one, two = ((tmp_path / run / "out" / name).read_bytes() for run in ("one", "two"))
        if name == "dataset.json":
            assert json.loads(one) == json.loads(two)
        assert one == two


def test_the_number_of_workers_leaves_no_trace(tmp_path):
    frame = random_events(SUBJECTS, 9)
    source = write_meds(tmp_path / "source", *(frame.filter(pl.col("subject_id") % 9 == rest) for rest in range(9)))
    options = PrepareOptions(numeric_bins=4, min_patients=3)
    for workers in (1, 2, 5):
        prepare(source, tmp_path / str(workers), options, workers=workers)
    for name in ("dataset.json", "held_out.arrow", "train.arrow", "tuning.arrow", "vocabulary.json"):
        assert len({(tmp_path / workers / name).read_bytes() for workers in ("1", "2", "5")}) == 1


@pytest.mark.parametrize("seed", range(5))
def test_lengths_are_described_as_numpy_describes_them(seed):
    lengths = np.random.default_rng(seed).integers(3, 3 + 10**seed, int(7 * 4**seed))
    expected = {f"p{share}": np.quantile(lengths, share / 100, method="higher") for share in (50, 90, 99)}
    expected |= {"mean": round(lengths.mean(), 3), "max": lengths.max()}
    assert lengths_described(np.bincount(lengths)) == expected


def test_shards_do_not_change_the_sequences(tmp_path):
    frame = random_events(SUBJECTS, 6)
    whole = prepared(tmp_path, frame, name="whole")
    parts = [frame.filter(pl.col("subject_id") // 25 == number) for number in range(5)]
    cut = prepared(tmp_path, *parts, name="cut")
    assert cut.vocabulary == whole.vocabulary
    for split in SPLITS:
        assert (cut.split(split).subject_ids() == whole.split(split).subject_ids()).all()
        for index in range(len(whole.split(split))):
            for one, other in zip(whole.split(split).sequence(index), cut.split(split).sequence(index), strict=True):
                np.testing.assert_array_equal(one, other)


def test_the_vocabulary_and_the_bins_see_training_patients_only(tmp_path):
    frame = plain_events(40)
    tuning = frame["subject_id"] > 20
    frame = frame.with_columns(
        pl.when(tuning & (frame["code"] == "C1")).then(pl.lit("ONLY_TUNING")).otherwise("code").alias("code"),
        pl.when(tuning).then(1000.0).otherwise(pl.col("subject_id")).cast(pl.Float32).alias("numeric_value"),
    )
    splits = {subject: "tuning" if subject > 20 else "train" for subject in range(1, 41)}
    data = prepared(tmp_path, frame, splits=splits, numeric_bins=2, min_patients=1)
    assert not any("ONLY_TUNING" in token for token in data.vocabulary.tokens)
    assert max(edge for edges in data.vocabulary.bin_edges.values() for edge in edges) <= 20
    assert data.info["splits"]["tuning"]["unk_share"] > 0
    assert data.info["splits"]["train"]["unk_share"] == 0


def test_values_become_bins_after_their_code(tmp_path):
    frame = plain_events(40).with_columns(pl.col("subject_id").cast(pl.Float32).alias("numeric_value"))
    splits = dict.fromkeys(range(1, 41), "train")
    data = prepared(tmp_path, frame, splits=splits, numeric_bins=4, min_patients=1)
    assert set(data.vocabulary.tokens[5:]) == {f"C{code}//Q{number}" for code in range(4) for number in range(1, 5)}


def test_subjects_outside_the_split_file_are_counted(tmp_path):
    splits = dict.fromkeys(range(1, 16), "train")
    data = prepared(tmp_path, plain_events(20), splits=splits)
    assert data.info["report"]["subjects_without_split"] == 5
    assert data.info["report"]["events_of_subjects_without_split"] == 5 * 7
    assert len(data.split("train")) == 15


def test_counts_of_the_splits_equal_the_files(tmp_path):
    data = prepared(tmp_path, random_events(SUBJECTS, 7), splits=SPLIT_OF)
    for split in SPLITS:
        own, counts = data.split(split), data.info["splits"][split]
        sequences = [own.sequence(index) for index in range(len(own))]
        codes = np.concatenate([codes for codes, _, _ in sequences])
        assert counts["patients"] == len(own)
        assert counts["tokens"] == len(codes) == own.lengths.sum()
        assert counts["visits"] == sum(visits[-1] for *_, visits in sequences) == (codes == SEP).sum()
        assert counts["codes"] == (codes != SEP).sum() - (codes == CLS).sum()
        assert counts["unk_share"] == pytest.approx((codes == UNK).sum() / counts["codes"], abs=1e-6)
        assert counts["sequence_length"]["mean"] == pytest.approx(own.lengths.mean(), abs=1e-3)
        assert counts["sequence_length"]["p50"] == np.quantile(own.lengths, 0.5, method="higher")
        assert counts["sequence_length"]["max"] == own.lengths.max()


def test_unsorted_shards_are_sorted_and_counted(tmp_path):
    frame = plain_events(20)
    write_meds(tmp_path / "mixed", frame.sample(fraction=1.0, shuffle=True, seed=0), ordered=False)
    mixed = prepare(tmp_path / "mixed", tmp_path / "out1", PrepareOptions())
    write_meds(tmp_path / "sorted", frame)
    in_order = prepare(tmp_path / "sorted", tmp_path / "out2", PrepareOptions())
    assert (mixed["report"]["unsorted_shards"], in_order["report"]["unsorted_shards"]) == (1, 0)
    assert (tmp_path / "out1" / "train.arrow").read_bytes() == (tmp_path / "out2" / "train.arrow").read_bytes()


def test_sequences_are_read_only_views_of_the_mapped_file(tmp_path):
    split = prepared(tmp_path, plain_events(20)).split("train")
    first, again = split.sequence(3), split.sequence(3)
    for one, other, dtype in zip(first, again, (np.int32, np.float32, np.int32), strict=True):
        assert one.dtype == dtype
        assert one.__array_interface__["data"] == other.__array_interface__["data"]
        assert not one.flags.writeable


def test_the_folder_is_private_and_nothing_stays_beside_it(tmp_path):
    (tmp_path / "place").mkdir()
    write_meds(tmp_path / "source", plain_events())
    prepare(tmp_path / "source", tmp_path / "place" / "out", PrepareOptions())
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]
    assert stat.S_IMODE((tmp_path / "place" / "out").stat().st_mode) == 0o700


def test_prepared_records_are_replaced_with_overwrite(tmp_path):
    write_meds(tmp_path / "source", plain_events())
    prepare(tmp_path / "source", tmp_path / "out", PrepareOptions())
    prepare(tmp_path / "source", tmp_path / "out", PrepareOptions(min_tokens=6), overwrite=True)
    assert open_prepared(tmp_path / "out").info["options"]["min_tokens"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_simulated_cohorts_description_comes_along(tmp_path):
    source = write_meds(tmp_path / "source", plain_events(), splits=dict.fromkeys(range(1, 21), "train"))
    (source / "metadata" / "cohort.json").write_text("{}")
    prepare(source, tmp_path / "without", PrepareOptions())
    assert not (tmp_path / "without" / "cohort.json").exists()  # one of the two alone is of no use
    (source / "metadata" / "cohort.safetensors").write_bytes(b"tensors")
    prepare(source, tmp_path / "with", PrepareOptions())
    assert (tmp_path / "with" / "cohort.safetensors").read_bytes() == b"tensors"


def test_progress_goes_through_every_stage_to_its_end(tmp_path):
    write_meds(tmp_path / "source", plain_events())
    calls = []
    prepare(tmp_path / "source", tmp_path / "out", PrepareOptions(), progress=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["indexing", "cleaning", "counting codes", "writing"]
    for stage in stages:
        steps = [(done, total) for name, done, total in calls if name == stage]
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]


def test_the_report_shows_every_loss_that_occurred(tmp_path):
    info = prepared(tmp_path, random_events(SUBJECTS, 8)).info
    rows = dict(report_rows(info["report"]))
    assert rows["events read"] == info["report"]["events_read"]
    assert {"duplicate events", "events after death", "events before birth", "events without code"} <= set(rows)
    assert not any(rows[name] == 0 for name in rows if not name.endswith(("read", "kept")))


def test_nothing_in_the_description_names_a_subject_or_a_date(tmp_path):
    frame = plain_events().with_columns(pl.col("subject_id") + 918_273_000)
    data = prepared(tmp_path, frame)
    text = (data.folder / "dataset.json").read_text() + (data.folder / "vocabulary.json").read_text()
    assert "918273" not in text
    assert "1950" not in text
    assert str(tmp_path) not in text


def test_one_batch_per_shard_is_found_again_by_patient_number(tmp_path):
    frame = plain_events(30)
    shards = [frame.filter(pl.col("subject_id") == subject) for subject in range(1, 31)]
    split = prepared(tmp_path, *shards, splits=dict.fromkeys(range(1, 31), "train")).split("train")
    assert split.subject_ids().tolist() == [number + 1 for number in sorted(range(30), key=str)]  # order of file names
    for index in range(30):
        assert len(split.sequence(index)[0]) == split.lengths[index] == 1 + 2 * 6
        assert split.times(index)[0] == np.datetime64("2020-01-01T12:00")


@pytest.mark.parametrize(
    ("folder", "options", "patients"),
    [
        ("synpuf-meds", {"include": ("CCW", "DRG")}, None),
        ("mimic-iv-demo-2.2", {"format": "mimic4", "labs": True, "numeric_bins": 10, "icd_digits": 3}, 100),
        ("mimic-iv-demo-meds", {"column": ["value=numeric_value"], "admission_code": "HOSPITAL_ADMISSION",
                                "discharge_code": "HOSPITAL_DISCHARGE"}, 100),
        ("mimic-iv-demo-omop-0.9", {"format": "omop"}, 100),
        ("gibleed-omop", {"format": "omop", "measurements": True, "observations": True, "numeric_bins": 5}, 2694),
        ("synthea-csv-modern-111", {"format": "synthea", "static_codes": "keep"}, 111),
    ],
)  # fmt: skip
def test_real_records_are_prepared(tmp_path, test_data, folder, options, patients):
    if not (test_data / folder).is_dir():
        pytest.skip(f"{folder} is missing")
    info = prepare(test_data / folder, tmp_path / "out", PrepareOptions(**options))
    data = open_prepared(tmp_path / "out")
    found = sum(len(data.split(split)) for split in SPLITS)
    assert found == info["report"]["subjects_kept"]
    assert patients is None or found == patients
    codes, ages, visits = data.split("train").sequence(0)
    assert codes[0] == CLS
    assert codes[-1] == SEP
    assert (np.diff(visits) >= 0).all()
    assert 0 <= ages.min() <= ages.max() < 120


@pytest.mark.parametrize("record_format", ["meds", "mimic4", "omop"])
def test_an_option_of_one_format_is_not_recorded_of_another(record_format: str) -> None:
    recorded = PrepareOptions(format=record_format).recorded()
    assert ("measurements" in recorded) is ("observations" in recorded) is (record_format == "omop")
    assert PrepareOptions(**recorded) == PrepareOptions(format=record_format)
