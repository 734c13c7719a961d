"""The simulated cohort: valid MEDS, the promised difficulty, and draws that follow the hidden model."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import meds
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from behrt.cohort import (
    BIRTH,
    COHORT_FILES,
    Sample,
    draw_rows,
    events_table,
    load_cohort,
    sample,
    simulate,
)
from behrt.config import UserError
from behrt.population import CODE_COUNT, CONDITIONS, PROFILES, code_book, loinc, population

SPLITS = ("train", "tuning", "held_out")
PATIENTS = 5000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cohort") / "meds"
    simulate(out, patients=PATIENTS)
    return out


@pytest.fixture(scope="module")
def events(folder: Path) -> pl.DataFrame:
    """All rows of all splits but births, with the split."""
    shards = [
        pl.read_parquet(folder / "data" / split / "0.parquet").with_columns(split=pl.lit(split)) for split in SPLITS
    ]
    return pl.concat(shards).filter(pl.col("code") != BIRTH)


@pytest.fixture(scope="module")
def drawn() -> Sample:
    """A sample with its hidden states: 5,000 patients, about 206,000 codes."""
    return sample(population("hmm"), PATIENTS, np.random.default_rng(1))


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is written


def test_all_files_are_valid_meds(folder):
    assert set(everything_in(folder)) == {
        *(f"data/{split}/0.parquet" for split in SPLITS),
        *(f"metadata/{name}" for name in ("codes.parquet", "dataset.json", "subject_splits.parquet", *COHORT_FILES)),
        *(f"labels/{name}" for name in ("disease.parquet", "readmission.parquet", "survival.parquet", "outcomes.json")),
    }
    for split in SPLITS:
        meds.DataSchema.validate(pq.read_table(folder / "data" / split / "0.parquet"))
    meds.SubjectSplitSchema.validate(pq.read_table(folder / meds.subject_splits_filepath))
    meds.CodeMetadataSchema.validate(pq.read_table(folder / meds.code_metadata_filepath))
    meds.DatasetMetadataSchema.validate(json.loads((folder / meds.dataset_metadata_filepath).read_text()))
    assert meds.birth_code == BIRTH


def test_the_meds_schema_would_catch_a_wrong_type(folder):
    table = pq.read_table(folder / "data" / "tuning" / "0.parquet").drop_columns(["code"])
    with pytest.raises(Exception, match="code"):
        meds.DataSchema.validate(table)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_sorted_by_subject_and_time_and_each_subject_has_one_birth(folder, split):
    table = pl.read_parquet(folder / "data" / split / "0.parquet")
    assert table.select("subject_id", "time").equals(table.select("subject_id", "time").sort("subject_id", "time"))
    births = table.filter(pl.col("code") == BIRTH)
    assert births["subject_id"].to_list() == table["subject_id"].unique().sort().to_list()
    assert births["visit_id"].null_count() == len(births)
    assert table.filter(pl.col("code") != BIRTH)["visit_id"].null_count() == 0


def test_splits_are_disjoint_and_of_the_stated_sizes(folder):
    splits = pl.read_parquet(folder / meds.subject_splits_filepath)
    assert dict(splits.group_by("split").len().iter_rows()) == {"train": 4000, "tuning": 500, "held_out": 500}
    for split in SPLITS:
        there = pl.read_parquet(folder / "data" / split / "0.parquet")["subject_id"].unique().sort()
        assert there.to_list() == splits.filter(pl.col("split") == split)["subject_id"].sort().to_list()


def test_no_two_events_of_a_subject_share_a_time_though_codes_repeat_in_a_visit(events):
    assert events.select("subject_id", "time").is_unique().all()
    assert events.select("visit_id", "code").is_duplicated().any()


def test_visits_of_a_subject_follow_each_other_without_overlap(events):
    visits = events.group_by("subject_id", "visit_id").agg(first=pl.col("time").min(), last=pl.col("time").max())
    visits = visits.sort("subject_id", "first").with_columns(after=pl.col("first").shift(-1).over("subject_id"))
    assert (visits["last"] < visits["after"]).fill_null(True).all()
    assert visits.select(pl.col("visit_id").diff().over("subject_id").fill_null(1) == 1).to_series().all()


def test_every_code_in_use_is_described(folder, events):
    described = set(pl.read_parquet(folder / meds.code_metadata_filepath)["code"])
    assert set(events["code"]) <= described
    assert len(described) == CODE_COUNT + 1
    assert BIRTH in described


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_patients_of_the_same_population(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        simulate(tmp_path / name, patients=60, seed=seed)
    first, again, other = (everything_in(tmp_path / name) for name in "abc")
    assert first == again
    differing = {name for name in first if first[name] != other[name]}
    assert {f"data/{split}/0.parquet" for split in SPLITS} <= differing
    assert "metadata/cohort.safetensors" not in differing


def test_five_thousand_patients_take_less_than_ten_seconds_with_the_start_of_python(tmp_path):
    """Processor time, since tests may share the machine; nothing here runs on more than one core for long."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    code = "import pathlib, sys, behrt.cohort; behrt.cohort.simulate(pathlib.Path(sys.argv[1]), patients=5000)"
    root = str(Path(__file__).parents[1])
    before = spent()
    command = [sys.executable, "-c", code, str(tmp_path / "cohort")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": root})
    assert spent() - before < 10


# --- not made easy


def test_the_cohort_is_as_hard_as_promised(events):
    train = events.filter(pl.col("split") == "train")
    assert len(PROFILES) >= 24
    assert len(population("hmm").stages) == 4
    patients_of_code = train.group_by("code").agg(pl.col("subject_id").n_unique())["subject_id"]
    assert events["code"].n_unique() >= 800
    assert (patients_of_code >= 5).sum() >= 800
    assert len(events) / PATIENTS >= 40
    assert train["code"].value_counts()["count"].max() / len(train) < 0.06


def test_profiles_share_codes_so_that_one_code_seldom_settles_the_profile():
    hidden = population("hmm")
    joint = hidden.prior[:, None] * hidden.emission.mean(1)  # [profiles, codes]
    assert joint.max(0).sum() < 0.6, "one code is enough to guess the profile"
    assert len({frozenset(pair) for pair in PROFILES}) == len(PROFILES)
    conditions = [condition for pair in PROFILES for condition in pair]
    assert set(conditions) == set(CONDITIONS)
    assert all(max(map(conditions.count, pair)) > 1 for pair in PROFILES), "a profile shares no condition"


def test_codes_are_well_formed_and_unique():
    patterns = {
        "ICD10CM": r"[A-Z]\d[\dA-Z](\.[\dA-Z]{1,4})?",
        "ATC": r"[A-Z]\d\d[A-Z]{2}\d\d",
        "LOINC": r"\d+-\d",
    }
    book, own = code_book()
    assert len(book) == CODE_COUNT > own > 300
    for code in book:
        system, _, name = code.partition("//")
        assert re.fullmatch(patterns[system], name), code
        if system == "LOINC":
            assert loinc(int(name[:-2])) == name


# --- draws follow the model


def z_scores(counts: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Deviation of multinomial counts from their expectation in standard deviations, where 20 or more are expected."""
    total = counts.sum(-1, keepdims=True)
    expected = total * probabilities
    enough = (expected >= 20) & (probabilities < 1)
    return ((counts - expected) / np.sqrt(np.maximum(1e-9, expected * (1 - probabilities))))[enough]


def code_counts(drawn: Sample) -> np.ndarray:
    """[profiles, stages, codes]"""
    hidden = population("hmm")
    counts = np.zeros(hidden.emission.shape)
    profile_of_visit = np.repeat(drawn.profiles, drawn.visits)
    np.add.at(counts, (*(np.repeat(part, drawn.lengths) for part in (profile_of_visit, drawn.stages)), drawn.codes), 1)
    return counts


def test_codes_follow_the_emission_of_the_hidden_state(drawn):
    scores = z_scores(code_counts(drawn), population("hmm").emission)
    assert len(scores) > 1000
    assert abs(scores).max() < 5.5
    assert scores.std() == pytest.approx(1, abs=0.06)


def test_codes_do_not_follow_the_emission_of_another_profile(drawn):
    assert abs(z_scores(code_counts(drawn), np.roll(population("hmm").emission, 1, axis=0))).max() > 50


def test_stages_follow_the_markov_chain_of_the_profile(drawn):
    hidden = population("hmm")
    first = np.cumsum(drawn.visits) - drawn.visits
    starts, moves = np.zeros((24, 4)), np.zeros((24, 4, 4))
    np.add.at(starts, (drawn.profiles, drawn.stages[first]), 1)
    later = np.setdiff1d(np.arange(len(drawn.stages)), first)
    profile_of_visit = np.repeat(drawn.profiles, drawn.visits)
    np.add.at(moves, (profile_of_visit[later], drawn.stages[later - 1], drawn.stages[later]), 1)
    assert abs(z_scores(starts, hidden.initial)).max() < 4.5
    assert abs(z_scores(moves, hidden.transition)).max() < 4.5
    assert abs(z_scores(np.bincount(drawn.profiles, minlength=24), hidden.prior)).max() < 4.5
    assert abs(z_scores(moves, hidden.transition.swapaxes(1, 2))).max() > 20  # the control: time reversed


def f_ratio(values: np.ndarray, groups: np.ndarray) -> float:
    """Variance between group means over what chance makes of it; about 1 where the groups say nothing."""
    means = np.array([values[groups == group].mean() for group in np.unique(groups)])
    sizes = np.array([(groups == group).sum() for group in np.unique(groups)])
    between = (sizes * (means - values.mean()) ** 2).sum() / (len(means) - 1)
    return float(between / values.var())


def test_lengths_and_times_say_nothing_about_the_hidden_state(drawn):
    first = np.cumsum(drawn.visits) - drawn.visits
    states = np.repeat(drawn.profiles, drawn.visits) * 4 + drawn.stages
    later = np.setdiff1d(np.arange(len(states)), first)
    gaps = np.log(np.diff(drawn.starts, prepend=0)[later])
    ages = drawn.starts[first] - drawn.births
    assert f_ratio(drawn.visits.astype(float), drawn.profiles) < 2.2
    assert f_ratio(ages.astype(float), drawn.profiles) < 2.2
    assert f_ratio(drawn.lengths.astype(float), states) < 1.7
    assert f_ratio(gaps, states[later]) < 1.7
    assert f_ratio(drawn.lengths + 0.5 * drawn.stages, states) > 5  # the control: later stages have more codes


def test_the_order_inside_a_visit_says_nothing_about_the_codes(drawn):
    place = np.arange(len(drawn.codes)) - np.repeat(np.cumsum(drawn.lengths) - drawn.lengths, drawn.lengths)
    assert f_ratio(drawn.codes.astype(float), np.minimum(place, 6)) < 4


def test_without_structure_the_same_patients_have_uniform_codes(drawn):
    plain = sample(population("none"), PATIENTS, np.random.default_rng(1))
    for name in ("visits", "lengths", "births", "starts"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(drawn, name))

    def chi_square(codes: np.ndarray) -> float:
        expected = len(codes) / CODE_COUNT
        return float(((np.bincount(codes, minlength=CODE_COUNT) - expected) ** 2 / expected).sum())

    five_deviations = CODE_COUNT - 1 + 5 * np.sqrt(2 * (CODE_COUNT - 1))
    assert chi_square(plain.codes) < five_deviations
    assert chi_square(drawn.codes) > five_deviations


def test_the_table_holds_the_sample_in_order(drawn):
    codes = population("hmm").codes
    table = pl.from_arrow(events_table(drawn, codes))
    assert table.filter(pl.col("code") == BIRTH)["time"].cast(pl.Int64).to_list() == drawn.births.tolist()
    events = table.filter(pl.col("code") != BIRTH)
    assert events["code"].to_list() == [codes[code] for code in drawn.codes]
    visits = events.group_by("visit_id", maintain_order=True).agg(pl.col("time").first().cast(pl.Int64), pl.len())
    assert visits["time"].to_list() == drawn.starts.tolist()
    assert visits["len"].to_list() == drawn.lengths.tolist()
    assert table["subject_id"].unique().to_list() == list(range(1, PATIENTS + 1))


def test_a_draw_on_the_very_end_belongs_to_an_outcome_that_exists():
    class Highest:
        def random(self, count: int) -> np.ndarray:
            return np.full(count, np.nextafter(1, 0))

    cumulative = np.cumsum(np.full((1, 995), 1 / 995), axis=1)
    assert draw_rows(cumulative, np.zeros(3, dtype=np.int64), Highest()).tolist() == [994] * 3  # type: ignore[arg-type]


# --- the hidden model beside the data


@pytest.mark.parametrize("structure", ["hmm", "none"])
def test_the_hidden_model_is_read_back_exactly(tmp_path, structure):
    simulate(tmp_path / "c", patients=20, structure=structure, seed=5)
    cohort, hidden = load_cohort(tmp_path / "c" / "metadata"), population(structure)
    assert (cohort.structure, cohort.seed, cohort.patients) == (structure, 5, 20)
    assert (cohort.codes, cohort.profiles, cohort.stages) == (hidden.codes, hidden.profiles, hidden.stages)
    for name in ("prior", "initial", "transition", "emission"):
        np.testing.assert_array_equal(getattr(cohort, name), getattr(hidden, name))


def test_a_damaged_or_missing_hidden_model_is_one_line_that_names_the_file(tmp_path):
    simulate(tmp_path / "c", patients=20)
    folder = tmp_path / "c" / "metadata"
    with pytest.raises(UserError, match=r"^\S*/cohort\.json: not found, expected [^\n]*; simulate one$"):
        load_cohort(tmp_path)
    weights = (folder / "cohort.safetensors").read_bytes()
    for broken in (weights[:-100], b"", weights[:20]):
        (folder / "cohort.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match=r"^\S*/cohort\.safetensors: damaged, [^\n]*$"):
            load_cohort(folder)
    (folder / "cohort.safetensors").unlink()
    with pytest.raises(UserError, match=r"^\S*/cohort\.safetensors: not found, [^\n]*$"):
        load_cohort(folder)
    text = (folder / "cohort.json").read_text()
    (folder / "cohort.json").write_text(text.replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(UserError, match=r"^\S*/cohort\.json: format version 99, expected 1; [^\n]*$"):
        load_cohort(folder)
    for broken in (text[:100], "[]", "{}", "1"):
        (folder / "cohort.json").write_text(broken)
        with pytest.raises(UserError, match=r"^\S*/cohort\.json: damaged, [^\n]*$"):
            load_cohort(folder)


# --- what is never overwritten


def test_only_a_simulated_cohort_is_replaced_and_only_when_asked(tmp_path):
    out = tmp_path / "c"
    out.mkdir()
    simulate(out, patients=20)  # an empty folder is fine
    before = everything_in(out)
    with pytest.raises(UserError, match=r"^\S*/c: a simulated cohort is there already; [^\n]*$"):
        simulate(out, patients=30)
    assert everything_in(out) == before
    simulate(out, patients=30, overwrite=True)
    assert load_cohort(out / "metadata").patients == 30

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("thesis", "file"):
        with pytest.raises(UserError, match=rf"^\S*/{name}: "):
            simulate(tmp_path / name, patients=20, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("behrt.cohort.write_metadata", disk_full)
    with pytest.raises(OSError, match="No space left"):
        simulate(tmp_path / "c", patients=20)
    assert list(tmp_path.iterdir()) == []


def test_too_few_patients_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^--patients: found 19, expected 20 or more; [^\n]*$"):
        simulate(tmp_path / "c", patients=19)
    assert list(tmp_path.iterdir()) == []
