"""Simulated outcomes: valid MEDS labels, drawn from the hidden state alone, beside events that they do not touch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import meds
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from behrt.cohort import BIRTH, SPLITS, Sample, draw_splits, events_table, sample, simulate
from behrt.config import UserError
from behrt.outcomes import (
    CARDIOVASCULAR,
    DAYS_PER_YEAR,
    FRAILTY,
    OUTCOMES,
    Outcomes,
    draw_outcomes,
    load_outcome_model,
    outcome_generator,
    outcome_model,
)
from behrt.population import CONDITIONS, population

PATIENTS = 2000
SEED = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cohort") / "meds"
    simulate(out, patients=PATIENTS, seed=SEED)
    return out


@pytest.fixture(scope="module")
def labels(folder: Path) -> dict[str, pl.DataFrame]:
    return {name: pl.read_parquet(folder / "labels" / f"{name}.parquet") for name in OUTCOMES}


def drawn_again() -> tuple[Sample, np.ndarray]:
    """The patients of the folder, with their hidden states, and their splits."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    splits = draw_splits(PATIENTS, generator)
    return sample(population("hmm"), PATIENTS, generator), splits


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_label_file_is_valid_meds(folder, outcome):
    meds.LabelSchema.validate(pq.read_table(folder / "labels" / f"{outcome}.parquet"))


def test_the_meds_schema_would_catch_a_column_too_many(folder):
    table = pq.read_table(folder / "labels" / "disease.parquet")
    with pytest.raises(Exception, match="stage"):
        meds.LabelSchema.validate(table.append_column("stage", pa.array([0] * len(table))))


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_each_patient_has_one_label_at_the_time_of_the_last_code(folder, labels, outcome):
    events = pl.concat([pl.read_parquet(folder / "data" / split / "0.parquet") for split in SPLITS])
    ends = events.group_by("subject_id").agg(prediction_time=pl.col("time").max()).sort("subject_id")
    assert labels[outcome].select("subject_id", "prediction_time").equals(ends)


def test_outcomes_are_as_frequent_as_in_clinics(labels):
    for name, table in labels.items():
        assert 0.1 < table["boolean_value"].mean() < 0.3, name


def test_events_are_those_that_were_drawn_before_there_were_outcomes(folder):
    drawn, splits = drawn_again()
    expected = pl.DataFrame(events_table(drawn, population("hmm").codes))
    for split in SPLITS:
        subjects = np.flatnonzero(splits == split) + 1
        found = pl.read_parquet(folder / "data" / split / "0.parquet")
        assert found.equals(expected.filter(pl.col("subject_id").is_in(subjects.tolist())))
    assert BIRTH in found["code"]


def test_a_cohort_of_another_seed_has_other_outcomes(folder, labels, tmp_path):
    simulate(tmp_path / "c", patients=PATIENTS, seed=SEED + 1)
    for name, table in labels.items():
        other = pl.read_parquet(tmp_path / "c" / "labels" / f"{name}.parquet")
        assert abs((table["boolean_value"] == other["boolean_value"]).mean() - 0.65) < 0.12, name


def test_the_outcomes_share_no_draw_with_the_events():
    events = np.random.Generator(np.random.PCG64(SEED)).random(100_000)
    assert not np.isin(outcome_generator(SEED).random(10_000), events).any()
    assert np.isin(np.random.Generator(np.random.PCG64([SEED, 0])).random(10_000), events).all()  # the trap


def test_labels_depend_on_the_stage_of_the_last_visit(labels):
    drawn, _ = drawn_again()
    last = np.cumsum(drawn.visits) - 1

    def surprise(visits: np.ndarray) -> float:
        """Of the labels under the risk of these visits' stages, in standard deviations of the log-likelihood."""
        risk = outcome_model("hmm").readmission[drawn.profiles, drawn.stages[visits]]
        happened = labels["readmission"]["boolean_value"].to_numpy()
        log_odds = np.log(risk / (1 - risk))
        return float(((happened - risk) * log_odds).sum() / np.sqrt((risk * (1 - risk) * log_odds**2).sum()))

    assert abs(surprise(last)) < 4
    assert abs(surprise(last - 1)) > 8


# --- draws follow the model


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray, Outcomes]:
    """Profiles, stages and outcomes of 400 patients of each profile and stage, shuffled."""
    states = np.random.default_rng(0).permutation(np.repeat(np.arange(96), 400))
    profiles, stages = states // 4, states % 4
    return profiles, stages, draw_outcomes(outcome_model("hmm"), profiles, stages, outcome_generator(9))


def z_scores(happened: np.ndarray, profiles: np.ndarray, stages: np.ndarray, table: np.ndarray) -> np.ndarray:
    counts, totals = np.zeros((24, 4)), np.zeros((24, 4))
    np.add.at(counts, (profiles, stages), happened)
    np.add.at(totals, (profiles, stages), 1)
    return (counts - totals * table) / np.sqrt(totals * table * (1 - table))


@pytest.mark.parametrize("outcome", ["disease", "readmission"])
def test_an_outcome_follows_the_probability_of_the_hidden_state(drawn, outcome):
    profiles, stages, outcomes = drawn
    table = getattr(outcome_model("hmm"), outcome)
    scores = z_scores(getattr(outcomes, outcome), profiles, stages, table)
    assert abs(scores).max() < 4.5
    assert scores.std() == pytest.approx(1, abs=0.25)
    assert abs(z_scores(getattr(outcomes, outcome), profiles, stages, np.roll(table, 1, axis=1))).max() > 6


def test_deaths_over_time_at_risk_are_the_hazard_of_the_hidden_state(drawn):
    profiles, stages, outcomes = drawn
    deaths, years = np.zeros((24, 4)), np.zeros((24, 4))
    np.add.at(deaths, (profiles, stages), outcomes.death)
    np.add.at(years, (profiles, stages), outcomes.days / DAYS_PER_YEAR)
    expected = years * outcome_model("hmm").hazard
    scores = (deaths - expected) / np.sqrt(expected)
    assert abs(scores[expected > 10]).max() < 4.5
    assert abs((deaths - np.roll(expected, 1, axis=1)) / np.sqrt(expected)).max() > 10  # the control


def test_follow_up_ends_regardless_of_the_patient(drawn):
    """Of the patients of the lowest hazards hardly any die, and their days are the follow-up itself."""
    profiles, stages, outcomes = drawn
    hazard = outcome_model("hmm").hazard
    shortest, longest = outcome_model("hmm").follow_up
    ended = outcomes.days[~outcomes.death] / DAYS_PER_YEAR
    assert shortest <= ended.min() < shortest + 0.01
    assert longest - 0.01 < ended.max() <= longest
    safe = hazard[profiles, stages] < 0.03
    assert (outcomes.days[safe] / DAYS_PER_YEAR).mean() == pytest.approx((shortest + longest) / 2, abs=0.05)


def test_a_death_is_seen_where_it_comes_before_the_end_of_follow_up():
    model = replace(outcome_model("hmm"), follow_up=(1.0, 1.0 + 1e-9))
    states = np.repeat(np.arange(96), 50)
    outcomes = draw_outcomes(model, states // 4, states % 4, outcome_generator(0))
    np.testing.assert_array_equal(outcomes.death, outcomes.days < DAYS_PER_YEAR)
    assert outcomes.days.max() == pytest.approx(DAYS_PER_YEAR)


def test_every_condition_has_its_weights():
    assert set(CARDIOVASCULAR) == set(FRAILTY) == set(CONDITIONS)


def test_without_structure_outcomes_are_the_same_for_everyone():
    model = outcome_model("none")
    assert model.disease.shape == model.readmission.shape == model.hazard.shape == (1, 1)


# --- the model beside the labels


@pytest.mark.parametrize("structure", ["hmm", "none"])
def test_the_probabilities_are_read_back_exactly(tmp_path, structure):
    simulate(tmp_path / "c", patients=20, structure=structure)
    found, expected = load_outcome_model(tmp_path / "c" / "labels"), outcome_model(structure)
    assert found.follow_up == expected.follow_up
    for name in ("disease", "readmission", "hazard"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_damaged_or_missing_probabilities_are_one_line_that_names_the_file(tmp_path):
    simulate(tmp_path / "c", patients=20)
    path = tmp_path / "c" / "labels" / "outcomes.json"
    found = json.loads(path.read_text())
    assert found["disease"][0][0] < 1
    for damage in ({"disease": [[2.0]]}, {"deaths_per_year": [[float("nan")] * 4] * 24}, {"follow_up_years": [3]}):
        path.write_text(json.dumps({**found, **damage}))
        with pytest.raises(UserError, match=r"^\S*/outcomes\.json: damaged, [^\n]*$"):
            load_outcome_model(path.parent)
    path.write_text(json.dumps({**found, "format_version": 9}))
    with pytest.raises(UserError, match=r"^\S*/outcomes\.json: format version 9, expected 1; [^\n]*$"):
        load_outcome_model(path.parent)
    path.unlink()
    with pytest.raises(UserError, match=r"^\S*/outcomes\.json: no such file; [^\n]*$"):
        load_outcome_model(path.parent)
