"""Are predictors compared over the same patients, and does a group that is too small stay untold?"""

import math

import numpy as np
import polars as pl
import pytest
from scipy.sparse import csr_array
from sklearn.metrics import f1_score, roc_auc_score
from sksurv.nonparametric import kaplan_meier_estimator

from behrt.concordance import harrell_c
from behrt.tasks.assessment import (
    BEHRT,
    CEILING,
    FEWEST_PATIENTS,
    Predictor,
    age_bands,
    assess,
    sexes,
    subgroups,
    verdict,
)
from behrt.tasks.examples import Examples
from behrt.tasks.intervals import Estimate, patient_bootstrap
from behrt.tasks.metrics import choose_thresholds, time_dependent_c
from behrt.tasks.predictions import write_predictions
from behrt.tasks.task_plots import survival_of

from .small_examples import examples

ONE_EVENT = [[(0, 5)]]


def labelled(labels: np.ndarray, patients: np.ndarray | None = None, **settings) -> Examples:
    """Rows of these labels, of patients who all have one event."""
    number = len(labels) if patients is None else int(patients.max()) + 1
    return examples(ONE_EVENT * number, labels, of=patients, **settings)


def assessed(rows: Examples, *scores: np.ndarray, names=(BEHRT, "logistic_regression", CEILING), draws=200, **settings):
    predictors = [Predictor(name=name, scores=own, tuning=own) for name, own in zip(names, scores, strict=False)]
    return assess(rows, predictors, tuning=rows, train=rows, draws=draws, **settings)


@pytest.fixture(scope="module")
def two() -> tuple[Examples, np.ndarray, np.ndarray]:
    """Rows of 150 patients, and scores of two predictors that are alike."""
    generator = np.random.default_rng(0)
    patients = np.sort(generator.integers(150, size=300))
    labels = generator.random(300) < 0.3
    first = np.clip(0.3 + 0.2 * labels + generator.normal(0, 0.15, 300), 0.01, 0.99)
    second = np.clip(first + generator.normal(0, 0.05, 300), 0.01, 0.99)
    return labelled(labels, patients), first[:, None], second[:, None]


# --- differences


def test_the_interval_of_a_difference_is_that_of_differences_over_the_same_patients(two):
    rows, first, second = two
    found = assessed(rows, first, second).differences["logistic_regression"]["auroc"]

    def difference(own: np.ndarray) -> float:
        labels = rows.targets[own, 0]
        return roc_auc_score(labels, first[own, 0]) - roc_auc_score(labels, second[own, 0])

    expected = patient_bootstrap(difference, rows.patients, generator=np.random.default_rng(0), draws=200)
    for found_end, expected_end in zip(
        (found.value, found.low, found.high), (expected.value, expected.low, expected.high), strict=True
    ):
        assert found_end == pytest.approx(expected_end, abs=1e-6)
    whole = assessed(rows, first, second).metrics[BEHRT]["auroc"]
    assert found.high - found.low < 0.7 * (whole.high - whole.low)  # pairing is what this is for


def test_a_predictor_is_not_better_than_itself(two):
    rows, first, _ = two
    found = assessed(rows, first, first)
    assert found.differences["logistic_regression"]["auroc"] == Estimate(0.0, 0.0, 0.0)
    assert "does not beat logistic regression" in verdict(found, task="x", patients=150)[0]


def test_on_shuffled_labels_the_interval_holds_a_half_and_nothing_beats_chance():
    generator = np.random.default_rng(4)
    holds = beats = 0
    for _ in range(40):
        labels, scores = generator.random(150) < 0.3, generator.random((150, 1))
        found = assessed(labelled(labels), scores, np.full((150, 1), 0.3), names=(BEHRT, "prevalence"), draws=100)
        auroc = found.metrics[BEHRT]["auroc"]
        holds += auroc.low <= 0.5 <= auroc.high
        beats += verdict(found, task="x", patients=150)[0].startswith("BEHRT beats prevalence")
    assert holds >= 34  # of 95%, 40 times, with 100 draws each
    assert beats <= 4


def test_what_is_clearly_better_beats_and_what_is_clearly_worse_is_said_not_to():
    generator = np.random.default_rng(5)
    labels = generator.random(400) < 0.3
    noise, good = generator.random((400, 1)), labels[:, None] + generator.normal(0, 0.3, (400, 1))
    found = assessed(labelled(labels), good, noise)
    assert verdict(found, task="x", patients=400)[0].startswith("BEHRT beats logistic regression on x: AUROC +0.")
    found = assessed(labelled(labels), noise, good)
    assert verdict(found, task="x", patients=400)[0].startswith(
        "BEHRT does not beat logistic regression on x: AUROC -0"
    )


def test_of_hardly_any_outcome_the_verdict_says_that_it_cannot_be_told():
    labels = np.arange(60) < 1
    found = assessed(labelled(labels), np.random.default_rng(0).random((60, 1)), np.full((60, 1), 0.1))
    assert math.isnan(found.metrics[BEHRT]["auroc"].low)
    assert verdict(found, task="x", patients=60)[0].endswith("cannot be told: too few outcomes for an interval.")


def test_the_share_of_the_ceiling_is_over_the_same_draws(two):
    rows, first, second = two
    found = assessed(rows, first, second, first)
    assert found.share_of_ceiling == Estimate(1.0, 1.0, 1.0)


# --- metrics of the kinds of labels


def test_metrics_of_several_labels_are_means_over_those_that_are_known():
    generator = np.random.default_rng(6)
    targets = (generator.random((200, 2)) < [0.4, 0.2]).astype(float)
    targets[generator.random((200, 2)) < 0.3] = np.nan
    scores = np.clip(np.nan_to_num(targets) * 0.3 + generator.random((200, 2)) * 0.6, 0, 1)
    rows = labelled(targets, kind="multilabel", names=("a", "b"))
    found = assessed(rows, scores, draws=20).metrics[BEHRT]
    known = ~np.isnan(targets)
    each = [roc_auc_score(targets[known[:, n], n], scores[known[:, n], n]) for n in range(2)]
    assert found["auroc"].value == pytest.approx(np.mean(each), abs=1e-6)
    assert [found["auroc/a"].value, found["auroc/b"].value] == pytest.approx(each, abs=1e-6)
    assert found["brier"].value == pytest.approx(np.mean((targets - scores)[known] ** 2), abs=1e-6)
    predicted = scores >= choose_thresholds(rows.targets, scores)
    assert found["f1_micro"].value == pytest.approx(f1_score(targets[known], predicted[known]), abs=1e-6)


def test_no_metric_tells_of_a_label_that_too_few_have():
    generator = np.random.default_rng(8)
    targets = (generator.random((200, 3)) < [0.4, 0.2, 0]).astype(float)
    targets[:3, 2] = 1
    scores = generator.random((200, 3))
    found, of_two = (
        assessed(labelled(targets[:, :n], kind="multilabel", names=("a", "b", "c")[:n]), scores[:, :n], draws=20)
        for n in (3, 2)
    )
    assert found.metrics[BEHRT].keys() == of_two.metrics[BEHRT].keys()
    for name, of in of_two.metrics[BEHRT].items():
        assert found.metrics[BEHRT][name] == of
    alone = assessed(labelled(targets[:, 2]), scores[:, 2:], np.full((200, 1), 0.1), draws=20)
    assert {tuple(of) for of in alone.metrics.values()} == {("auroc",)}  # AUPRC of one score for all is the share


def test_metrics_of_survival_are_the_two_concordances():
    generator = np.random.default_rng(7)
    risks, events = generator.random(150), generator.random(150) < 0.6
    days = generator.exponential(100 * np.exp(-risks))
    rows = labelled(events, kind="survival", days=days)
    found = assessed(rows, risks, draws=20).metrics[BEHRT]
    assert found["harrell_c"].value == pytest.approx(harrell_c(events, rows.days, risks), abs=1e-6)
    expected = time_dependent_c(events, rows.days, events, rows.days, risks)
    assert found["time_dependent_c"].value == pytest.approx(expected, abs=1e-6)
    assert found.keys() == {"harrell_c", "time_dependent_c"}


# --- groups


def grouped(sizes: dict[str, tuple[int, int]]) -> list:
    """Subgroups of so many patients, of whom so many have the outcome."""
    labels, names = [], []
    for name, (patients, true) in sizes.items():
        labels += [number < true for number in range(patients)]
        names += [name] * patients
    rows = labelled(np.array(labels))
    scores = np.random.default_rng(0).random((len(labels), 1))
    masks = {name: np.array(names) == name for name in sizes}
    predictors = [Predictor(name=BEHRT, scores=scores, tuning=scores)]
    return subgroups(rows, predictors, {"age": masks}, tuning=rows, train=rows, draws=20)


TOO_SMALL = {
    "patients": {"a": (100, 40), "b": (50, 20), "c": (10, 5), "d": (10, 5), "e": (10, 5)},
    "the outcome": {"a": (100, 40), "b": (50, 20), "c": (80, 6), "d": (80, 8)},
    "none without it": {"a": (100, 40), "b": (50, 20), "c": (30, 24), "d": (30, 24)},
}


@pytest.mark.parametrize("sizes", TOO_SMALL.values(), ids=TOO_SMALL)
def test_a_group_in_which_too_few_are_is_named_and_nothing_told_of_it(sizes):
    found = {group.name: group for group in grouped(sizes)}
    assert [name for name, group in found.items() if group.patients is None] == [*sizes][2:]
    assert not found["c"].metrics
    assert found["a"].patients == 100
    assert found["a"].prevalence == pytest.approx(0.4)


def test_what_is_left_out_does_not_follow_from_the_total():
    for small in ((9, 4), (60, 6)):
        found = {group.name: group for group in grouped({"a": (100, 40), "b": (50, 20), "c": small})}
        assert found["a"].patients == 100
        assert found["b"].patients is None
        left_out = 50 + small[0], 20 + small[1]
        assert min(left_out) >= FEWEST_PATIENTS


def test_a_group_is_judged_on_its_own_rows():
    generator = np.random.default_rng(8)
    labels = generator.random(300) < 0.4
    women = np.arange(300) < 150
    scores = np.where(women, labels + generator.normal(0, 0.1, 300), generator.random(300))[:, None]
    rows = labelled(labels)
    predictors = [Predictor(name=BEHRT, scores=scores, tuning=scores)]
    groups = {"sex": {"F": women, "M": ~women}}
    found = {each.name: each for each in subgroups(rows, predictors, groups, tuning=rows, train=rows, draws=20)}
    assert found["F"].metrics[BEHRT].value > 0.99
    assert found["M"].metrics[BEHRT].value == pytest.approx(roc_auc_score(labels[~women], scores[~women]), abs=1e-6)


def test_every_row_is_in_one_age_band_and_in_a_sex_where_the_records_hold_one():
    ages = np.array([3.0, 17.99, 18.0, 64.9, 65.0, 80.0, 101.0, np.nan])
    assert np.sum(list(age_bands(ages).values()), axis=0).tolist() == [1] * 8
    tokens = ["[PAD]", "[UNK]", "GENDER//F", "GENDER//M", "DX//1"]
    counts = csr_array(np.array([[0, 0, 1, 0, 2], [0, 0, 0, 1, 0], [0, 1, 0, 0, 1]]))
    found = sexes(counts, tokens)
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "F": [True, False, False],
        "M": [False, True, False],
        "sex not known": [False, False, True],
    }
    assert sexes(counts[:, [0, 1, 4]], ["[PAD]", "[UNK]", "DX//1"]) == {}


# --- files


def test_predictions_are_written_as_meds_evaluation_reads_them_for_their_owner_only(tmp_path):
    targets = np.array([[1.0, np.nan], [0.0, 1.0], [1.0, 0.0]])
    rows = labelled(targets, kind="multilabel", names=("heart failure", "COPD"))
    scores = np.array([[0.9, 0.2], [0.4, 0.8], [0.3, 0.1]])
    paths = write_predictions(tmp_path / "p", rows, scores, np.array([0.5, 0.5]))
    assert [path.name for path in paths] == ["heart_failure.parquet", "COPD.parquet"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in paths)
    table = pl.read_parquet(paths[0])
    assert table.schema == {
        "subject_id": pl.Int64,
        "prediction_time": pl.Datetime("us"),
        "boolean_value": pl.Boolean,
        "predicted_boolean_value": pl.Boolean,
        "predicted_boolean_probability": pl.Float64,
    }
    assert table["subject_id"].to_list() == rows.subjects.tolist()
    assert table["boolean_value"].to_list() == [True, False, True]
    assert table["predicted_boolean_value"].to_list() == [True, False, False]
    assert pl.read_parquet(paths[1])["predicted_boolean_probability"].to_list() == [0.8, 0.1]  # where it is known


def test_a_survival_curve_ends_where_too_few_patients_are_left_however_many_rows_they_have() -> None:
    """Against a count by hand; 13 patients of five rows each, three of them left after day 90."""
    patients = np.repeat(np.arange(13), 5)
    days = np.arange(65) % 5 * 20 + 10.0
    days[patients >= 10] += 200
    events = np.arange(65) % 7 == 0
    times, alive, low, high = survival_of(events, days, patients)
    left = [len(np.unique(patients[days >= time])) for time in np.unique(days)]
    assert times.tolist() == [0.0, *[t for t, n in zip(np.unique(days), left, strict=True) if n >= FEWEST_PATIENTS]]
    assert times[-1] == 90
    expected = kaplan_meier_estimator(events, days)[1][: len(times) - 1]
    np.testing.assert_allclose(alive[1:], expected)
    assert np.all((low <= alive) & (alive <= high))
