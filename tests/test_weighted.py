"""Metrics over weights of rows against scikit-learn's and scikit-survival's on rows that repeat."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sksurv.metrics import concordance_index_censored, concordance_index_ipcw
from sksurv.util import Surv

from behrt.tasks.intervals import patient_bootstrap, patient_weights
from behrt.tasks.metrics import calibration_error
from behrt.tasks.weighted import (
    mean_over_labels,
    weighted_auprc,
    weighted_auroc,
    weighted_brier,
    weighted_calibration_error,
    weighted_f1,
    weighted_harrell_c,
    weighted_time_dependent_c,
)

ROWS = 400
GENERATOR = np.random.default_rng(0)
PATIENTS = GENERATOR.integers(120, size=ROWS)
SCORES = np.round(GENERATOR.random(ROWS), 2)  # many ties
LABELS = GENERATOR.random(ROWS) < 0.2 + 0.5 * SCORES
DAYS = np.ceil(GENERATOR.exponential(40, ROWS) / (0.3 + SCORES))  # ties, too
EVENTS = GENERATOR.random(ROWS) < 0.5
TRAIN_DAYS, TRAIN_EVENTS = np.ceil(GENERATOR.exponential(50, 900)), GENERATOR.random(900) < 0.5
UNO = {"train_events": TRAIN_EVENTS, "train_days": TRAIN_DAYS, "tau": float(np.quantile(TRAIN_DAYS, 0.9))}


def brute_uno(rows: np.ndarray) -> float:
    train = Surv.from_arrays(TRAIN_EVENTS, TRAIN_DAYS)
    return concordance_index_ipcw(
        train, Surv.from_arrays(EVENTS[rows], DAYS[rows]), SCORES[rows], tau=np.quantile(TRAIN_DAYS, 0.9)
    )[0]


PAIRS = {
    "auroc": (weighted_auroc(LABELS, SCORES), lambda rows: roc_auc_score(LABELS[rows], SCORES[rows])),
    "auprc": (weighted_auprc(LABELS, SCORES), lambda rows: average_precision_score(LABELS[rows], SCORES[rows])),
    "brier": (weighted_brier(LABELS, SCORES), lambda rows: np.mean((LABELS[rows] - SCORES[rows]) ** 2)),
    "calibration_error": (
        weighted_calibration_error(LABELS, SCORES),
        lambda rows: calibration_error(LABELS[rows], SCORES[rows]),
    ),
    "f1": (
        weighted_f1(LABELS[:, None].astype(float), SCORES[:, None] >= 0.5, macro=True),
        lambda rows: f1_score(LABELS[rows], SCORES[rows] >= 0.5),
    ),
    "harrell_c": (
        weighted_harrell_c(EVENTS, DAYS, SCORES),
        lambda rows: concordance_index_censored(EVENTS[rows], DAYS[rows], SCORES[rows])[0],
    ),
    "time_dependent_c": (
        weighted_time_dependent_c(events=EVENTS, days=DAYS, risks=SCORES, **UNO),
        brute_uno,
    ),
}


def over_all_draws(metric, patients: np.ndarray, draws: int) -> np.ndarray:
    blocks = patient_weights(patients, generator=np.random.default_rng(3), draws=draws)
    return np.concatenate([metric(block) for block in blocks])


@pytest.mark.parametrize("name", PAIRS)
def test_a_metric_over_weights_is_that_of_rows_that_repeat(name):
    weighted, brute = PAIRS[name]
    expected = []
    patient_bootstrap(
        lambda rows: expected.append(brute(rows)) or expected[-1],
        PATIENTS,
        generator=np.random.default_rng(3),
        draws=20,
    )
    np.testing.assert_allclose(over_all_draws(weighted, PATIENTS, 20), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("macro", [False, True], ids=["micro", "macro"])
def test_f1_of_several_labels_is_that_of_rows_that_repeat_where_the_label_is_known(macro):
    generator = np.random.default_rng(1)
    labels = (generator.random((ROWS, 3)) < [0.5, 0.2, 0.0]).astype(float)  # the last is never true
    labels[generator.random((ROWS, 3)) < 0.3] = np.nan
    predicted = generator.random((ROWS, 3)) < 0.4
    weights = next(patient_weights(PATIENTS, generator=generator, draws=1))
    weights = np.stack([*weights, generator.integers(3, size=ROWS).astype(np.float32)])
    for draw, found in zip(weights, weighted_f1(labels, predicted, macro=macro)(weights), strict=True):
        rows = np.repeat(np.arange(ROWS), draw.astype(int))
        known = ~np.isnan(labels[rows])
        if macro:
            each = [f1_score(labels[rows][known[:, n], n], predicted[rows][known[:, n], n]) for n in range(2)]
            assert found == pytest.approx(np.mean(each), abs=1e-6)
        else:
            assert found == pytest.approx(f1_score(labels[rows][known], predicted[rows][known]), abs=1e-6)


def test_a_metric_that_is_not_defined_in_a_draw_is_nan_there_and_only_there():
    labels, scores = np.array([True, False, False]), np.array([0.9, 0.5, 0.1])
    weights = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 0]], np.float32)
    assert np.isnan(weighted_auroc(labels, scores)(weights)).tolist() == [False, True, True]
    assert np.isnan(weighted_auprc(labels, scores)(weights)).tolist() == [False, True, False]
    assert np.isnan(weighted_harrell_c(labels, np.array([1.0, 2, 3]), scores)(weights)).tolist() == [False, True, True]


def test_the_mean_over_labels_leaves_out_those_that_are_not_defined():
    known = np.array([[True, True], [True, False], [True, True]])
    first = weighted_auroc(np.array([True, False, False]), np.array([0.9, 0.5, 0.1]))
    second = weighted_auroc(np.array([True, True]), np.array([0.9, 0.1]))
    assert mean_over_labels([first, second], known)(np.ones((1, 3), np.float32)).tolist() == [1.0]
