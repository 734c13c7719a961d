"""Are metrics those of the libraries, undefined where they must be, and their intervals as wide as they should be?"""

import math
import subprocess
import sys

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score
from sksurv.metrics import concordance_index_ipcw, cumulative_dynamic_auc
from sksurv.util import Surv

from behrt.tasks.intervals import Estimate, patient_bootstrap
from behrt.tasks.metrics import (
    auprc,
    auroc,
    binary_metrics,
    brier,
    calibration_error,
    choose_thresholds,
    default_tau,
    dynamic_auroc,
    f1_macro,
    f1_micro,
    harrell_c,
    multilabel_metrics,
    survival_metrics,
    time_dependent_c,
)


def predictions(rows: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    probabilities = 1 / (1 + np.exp(-generator.normal(size=rows)))
    return generator.random(rows) < probabilities, probabilities


def survival(rows: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Events, days and risks; about half are censored."""
    generator = np.random.default_rng(seed)
    risks = generator.normal(size=rows)
    time, censored = generator.exponential(np.exp(-risks) * 500), generator.uniform(1, 800, rows)
    return time <= censored, np.minimum(time, censored), risks


def test_the_best_and_the_worst_order_are_1_and_0() -> None:
    labels = np.array([False, False, True])
    assert auroc(labels, np.array([0.1, 0.2, 0.3])) == 1
    assert auroc(labels, np.array([0.3, 0.2, 0.1])) == 0
    assert auprc(labels, np.array([0.1, 0.2, 0.3])) == 1
    assert brier(labels, np.array([0.0, 0.0, 0.5])) == pytest.approx(0.25 / 3)


def test_a_guess_has_the_auprc_of_the_prevalence() -> None:
    labels, _ = predictions()
    assert auprc(labels, np.zeros(len(labels))) == pytest.approx(labels.mean())


@pytest.mark.parametrize("metric", [auroc, auprc, harrell_c])
def test_one_class_defines_nothing(metric) -> None:
    nobody = np.zeros(5, bool)
    arguments = (nobody, np.arange(5.0), np.arange(5.0))[: 3 if metric is harrell_c else 2]
    assert math.isnan(metric(*arguments))


def test_the_calibration_error_is_that_of_scikit_learns_curve_over_equally_full_bins() -> None:
    labels, probabilities = predictions()
    true, predicted = calibration_curve(labels, probabilities, n_bins=10, strategy="quantile")
    assert calibration_error(labels, probabilities) == pytest.approx(np.abs(true - predicted).mean(), abs=1e-12)


def test_calibrated_probabilities_have_a_small_error_and_halved_ones_a_large() -> None:
    labels, probabilities = predictions(100_000)
    assert calibration_error(labels, probabilities) < 0.01
    assert calibration_error(labels, probabilities / 2) == pytest.approx(0.25, abs=0.01)


def test_equal_probabilities_are_one_bin() -> None:
    labels = np.array([True] * 3 + [False] * 7)
    assert calibration_error(labels, np.full(10, 0.3)) == pytest.approx(0)
    assert calibration_error(labels, np.full(10, 0.5)) == pytest.approx(0.2)


# F1.


def multilabel(rows: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    probabilities = generator.random((rows, 3))
    return (generator.random((rows, 3)) < probabilities * [1, 0.5, 0.2]).astype(float), probabilities


def test_f1_is_scikit_learns() -> None:
    labels, probabilities = multilabel()
    predicted = probabilities > 0.4
    assert f1_micro(labels, predicted) == pytest.approx(f1_score(labels, predicted, average="micro"))
    assert f1_macro(labels, predicted) == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_chosen_thresholds_have_the_best_f1_of_all() -> None:
    labels, probabilities = multilabel(80)
    chosen = choose_thresholds(labels, probabilities)
    for number in range(3):
        own = labels[:, number], probabilities[:, number]
        best = max(f1_score(own[0], own[1] >= threshold) for threshold in own[1])
        assert f1_score(own[0], own[1] >= chosen[number]) == pytest.approx(best)


def test_labels_that_are_not_known_do_not_count() -> None:
    labels, probabilities = multilabel()
    half = labels.copy()
    half[::2, 1] = np.nan
    predicted = probabilities > 0.4
    expected = np.mean([f1_score(labels[:: 1 + (n == 1)] [:, n] if n != 1 else labels[1::2, 1],
                                 predicted[:, n] if n != 1 else predicted[1::2, 1]) for n in range(3)])  # fmt: skip
    assert f1_macro(half, predicted) == pytest.approx(expected)
    assert choose_thresholds(half, probabilities)[1] == choose_thresholds(labels[1::2], probabilities[1::2])[1]


def test_a_label_that_is_never_true_has_no_f1_and_the_middle_for_a_threshold() -> None:
    labels, probabilities = multilabel()
    labels[:, 2] = 0
    predicted = probabilities > 0.4
    assert f1_macro(labels, predicted) == pytest.approx(f1_score(labels[:, :2], predicted[:, :2], average="macro"))
    assert choose_thresholds(labels, probabilities)[2] == 0.5


# Survival.


def test_harrells_c_is_a_count_of_pairs() -> None:
    events, days, risks = survival(120)
    pairs = [(i, j) for i in range(120) for j in range(120) if events[i] and days[i] < days[j]]
    assert harrell_c(events, days, risks) == pytest.approx(np.mean([risks[i] > risks[j] for i, j in pairs]))


def test_the_time_dependent_c_is_scikit_survivals_up_to_a_day_that_a_tenth_outlive() -> None:
    train, test = survival(seed=1), survival(seed=2)
    tau = default_tau(train[1])
    assert (train[1] > tau).mean() == pytest.approx(0.1, abs=0.01)
    expected = concordance_index_ipcw(Surv.from_arrays(*train[:2]), Surv.from_arrays(*test[:2]), test[2], tau=tau)[0]
    assert time_dependent_c(*train[:2], *test) == pytest.approx(expected)


def test_longer_test_times_than_any_in_training_are_no_error() -> None:
    events, days, risks = survival(seed=2)
    assert 0.6 < time_dependent_c(*survival(seed=1)[:2], events, days * 3, risks) < 0.9


def test_without_an_event_before_tau_nothing_is_defined() -> None:
    events, days, risks = survival()
    assert math.isnan(time_dependent_c(events, days, events, days, risks, tau=days.min() / 2))


def test_dynamic_aurocs_are_scikit_survivals_and_nan_where_there_are_none() -> None:
    train, test = survival(seed=1), survival(seed=2)
    times = np.array([0.0, 100, 300, 5000])
    found = dynamic_auroc(*train[:2], *test, times)
    assert np.isnan(found).tolist() == [True, False, False, True]
    inside = test[1] < train[1].max()
    expected = cumulative_dynamic_auc(
        Surv.from_arrays(*train[:2]), Surv.from_arrays(test[0][inside], test[1][inside]), test[2][inside], times[1:3]
    )[0]
    assert found[1:3] == pytest.approx(expected, abs=0.02 if not inside.all() else 1e-9)


# Intervals.


def test_the_interval_of_a_mean_is_the_normal_one_where_each_patient_has_one_row() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = patient_bootstrap(
        lambda rows: float(values[rows].mean()), np.arange(400), generator=np.random.default_rng(1), draws=4000
    )
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)


def test_a_patient_is_drawn_with_all_rows_wherever_they_stand() -> None:
    patients = np.random.default_rng(0).integers(6, size=30)
    drawn: list[np.ndarray] = []

    def note(rows: np.ndarray) -> float:
        drawn.append(np.bincount(rows, minlength=30))
        return 0.0

    patient_bootstrap(note, patients, generator=np.random.default_rng(1), draws=50)
    for times in drawn:
        of_patient = [set(times[patients == patient]) for patient in range(6)]
        assert all(len(own) == 1 for own in of_patient)
        assert sum(own.pop() for own in of_patient) == 6
    assert (drawn[0] == 1).all()


def test_rows_of_the_same_patient_do_not_narrow_the_interval() -> None:
    """Ten copies of each row are as uncertain as one; taken for ten patients, they would look three times as sure."""
    values = np.random.default_rng(0).normal(size=200)
    copied = np.tile(values, 10)

    def width(patients: np.ndarray, of: np.ndarray) -> float:
        found = patient_bootstrap(
            lambda rows: float(of[rows].mean()), patients, generator=np.random.default_rng(1), draws=1000
        )
        return found.high - found.low

    single = width(np.arange(200), values)
    assert width(np.tile(np.arange(200), 10), copied) == pytest.approx(single, rel=1e-9)
    assert width(np.arange(2000), copied) == pytest.approx(single / math.sqrt(10), rel=0.15)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator, hits = np.random.default_rng(0), 0
    for _ in range(200):
        of_patient = generator.normal(size=40)
        patients = np.repeat(np.arange(40), 3)
        values = of_patient[patients] + generator.normal(size=120)
        found = patient_bootstrap(
            lambda rows, values=values: float(values[rows].mean()), patients, generator=generator, draws=200, level=0.9
        )
        hits += found.low <= 0 <= found.high
    assert 0.82 <= hits / 200 <= 0.96  # 90%, a little less of so few patients


def test_a_metric_that_most_draws_do_not_define_has_no_interval() -> None:
    labels, scores = np.array([True] + [False] * 9), np.arange(10.0)
    found = patient_bootstrap(
        lambda rows: auroc(labels[rows], scores[rows]), np.arange(10), generator=np.random.default_rng(0)
    )
    assert found.value == 0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_every_metric_comes_with_an_interval_around_it() -> None:
    labels, probabilities = predictions(400)
    many, of_each = multilabel(200)
    train, test = survival(150, seed=1), survival(150, seed=2)
    found: dict[str, Estimate] = {
        **binary_metrics(labels, probabilities, np.arange(400) // 2, draws=50),
        **multilabel_metrics(many, of_each, choose_thresholds(many, of_each), np.arange(200), draws=50),
        **survival_metrics(*train[:2], *test, np.arange(150), draws=50),
    }
    assert list(found) == ["auroc", "auprc", "brier", "calibration_error", "f1_micro", "f1_macro", "harrell_c",
                           "time_dependent_c"]  # fmt: skip
    for name, estimate in found.items():
        assert estimate.low < estimate.high, name
        if name != "calibration_error":  # which chance only raises
            assert estimate.low < estimate.value < estimate.high, name


def test_the_same_seed_gives_the_same_interval() -> None:
    labels, probabilities = predictions(100)
    once, again, other = (binary_metrics(labels, probabilities, np.arange(100), draws=20, seed=s) for s in (3, 3, 4))
    assert once == again
    assert once != other


def test_scikit_survival_is_imported_by_survival_metrics_alone() -> None:
    code = (
        "import sys; import behrt.tasks.metrics as m, numpy as np; m.auroc(np.array([True, False]), np.array([1., 0.]))"
    )
    code += "; print('sksurv' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
