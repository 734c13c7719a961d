"""How good are predictions of a task?

What scikit-learn and scikit-survival compute is computed by them; NaN stands where a metric is not defined, as with
labels of one class. Intervals are those of `intervals.py`. Probabilities are those of the label being true.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from behrt.concordance import harrell_c
from behrt.tasks.intervals import DRAWS, Estimate, patient_bootstrap

Flags = NDArray[np.bool_]
Numbers = NDArray[np.floating[Any]]

CALIBRATION_BINS = 10
TAU_SHARE = 0.9


def auroc(labels: Flags, scores: Numbers) -> float:
    """Area under the ROC curve."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores)) if _both(labels) else math.nan


def auprc(labels: Flags, scores: Numbers) -> float:
    """Average precision; a guess reaches the share of true labels."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, scores)) if labels.any() else math.nan


def brier(labels: Flags, probabilities: Numbers) -> float:
    """Mean squared error of the probabilities."""
    from sklearn.metrics import brier_score_loss

    return float(brier_score_loss(labels, probabilities, pos_label=True)) if labels.size else math.nan


def calibration_error(labels: Flags, probabilities: Numbers, *, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error: |mean probability - share of true labels| in bins, weighted by their rows.

    Bins hold equally many rows: their edges are quantiles of the probabilities, as those of scikit-learn's
    `calibration_curve` with `strategy="quantile"`. With rare outcomes most bins of equal width would be empty. Equal
    probabilities fall into one bin, so that there may be fewer bins.

    >>> labels, sure = np.array([True, True, False, False]), np.array([0.9, 0.9, 0.1, 0.1])
    >>> round(calibration_error(labels, sure, bins=2), 6)
    0.1
    """
    if not labels.size:
        return math.nan
    inner = np.quantile(probabilities, np.linspace(0, 1, bins + 1))[1:-1]
    place = np.searchsorted(inner, probabilities)
    rows = np.bincount(place, minlength=bins)
    difference = np.bincount(place, weights=probabilities - labels, minlength=bins)
    assert rows.sum() == labels.size
    return float(np.abs(difference).sum() / labels.size)


def choose_thresholds(labels: Numbers, probabilities: Numbers) -> NDArray[np.float64]:
    """For each label, the threshold of highest F1: to be chosen on tuning, and used on held_out.

    Args:
        labels: 0, 1 or NaN (not known), [rows, labels].
        probabilities: [rows, labels]; a label is predicted where they are at least the threshold.

    Returns:
        [labels]; 0.5 for a label that is never true.
    """
    from sklearn.metrics import precision_recall_curve

    thresholds = np.full(labels.shape[1], 0.5)
    for number in range(labels.shape[1]):
        known = ~np.isnan(labels[:, number])
        own = labels[known, number] > 0
        if not own.any():
            continue
        precision, recall, candidates = precision_recall_curve(own, probabilities[known, number])
        total = precision + recall
        scores = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
        thresholds[number] = candidates[scores[:-1].argmax()]  # the last point has no threshold: nothing is predicted
    return thresholds


def f1_micro(labels: Numbers, predicted: Flags) -> float:
    """F1 over all labels that are known, 0, 1 or NaN [rows, labels]; predictions are [rows, labels]."""
    known = ~np.isnan(labels)
    return _f1(labels[known] > 0, predicted[known])


def f1_macro(labels: Numbers, predicted: Flags) -> float:
    """Mean F1 of the labels that are true anywhere: recall, and so F1, is not defined for the others."""
    found = []
    for number in range(labels.shape[1]):
        known = ~np.isnan(labels[:, number])
        own = labels[known, number] > 0
        if own.any():
            found.append(_f1(own, predicted[known, number]))
    return float(np.mean(found)) if found else math.nan


def _f1(labels: Flags, predicted: Flags) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0.0)) if labels.any() else math.nan


def default_tau(train_days: Numbers) -> float:
    """Days up to which the metrics below count: a tenth of the training patients are observed for longer.

    Later, so few are left that the weights of those who are would decide everything.
    """
    return float(np.quantile(train_days, TAU_SHARE))


def time_dependent_c(
    train_events: Flags, train_days: Numbers, events: Flags, days: Numbers, risks: Numbers, *, tau: float | None = None
) -> float:
    """Uno's concordance up to `tau` days, weighted against censoring, which is estimated on the training patients.

    Harrell's depends on how long patients happen to be observed; this does not.

    Args:
        tau: `default_tau` of the training days if None.
    """
    from sksurv.exceptions import NoComparablePairException
    from sksurv.metrics import concordance_index_ipcw

    tau = default_tau(train_days) if tau is None else tau
    if not (events & (days < tau)).any():
        return math.nan
    try:
        found = concordance_index_ipcw(_outcomes(train_events, train_days), _outcomes(events, days), risks, tau=tau)
    except NoComparablePairException:
        return math.nan
    return float(found[0])


def dynamic_auroc(
    train_events: Flags,
    train_days: Numbers,
    events: Flags,
    days: Numbers,
    risks: Numbers,
    times: Numbers,
) -> NDArray[np.float64]:
    """AUROC of who had the event by each of the times against who had not, weighted against censoring.

    Args:
        risks: [rows], or [rows, times] of a model whose order of patients changes with time.
        times: days, rising.

    Returns:
        [times]; NaN where nobody had the event yet, or nobody is left.
    """
    from sksurv.metrics import cumulative_dynamic_auc

    found = np.full(len(times), math.nan)
    first_event = days[events].min(initial=math.inf)
    defined = (times >= first_event) & (times < min(days.max(initial=0), train_days.max(initial=0)))
    if defined.any():
        # weights are those of events up to the last of the times; later rows are "not yet", whenever they end
        shown = np.minimum(days, times[defined][-1] + 1e-3)
        seen = events & (days <= times[defined][-1])
        own = risks[:, defined] if risks.ndim == 2 else risks
        train, test = _outcomes(train_events, train_days), _outcomes(seen, shown)
        found[defined] = cumulative_dynamic_auc(train, test, own, times[defined])[0]
    return found


def _outcomes(events: Flags, days: Numbers) -> NDArray[Any]:
    """As scikit-survival takes them."""
    outcomes = np.empty(len(events), dtype=[("event", bool), ("days", np.float64)])
    outcomes["event"], outcomes["days"] = events, days
    return outcomes


def _both(labels: Flags) -> bool:
    return bool(labels.any() and not labels.all())


BINARY: dict[str, Callable[[Flags, Numbers], float]] = {
    "auroc": auroc,
    "auprc": auprc,
    "brier": brier,
    "calibration_error": calibration_error,
}
"""The metrics of a binary task, by name."""


def binary_metrics(
    labels: Flags, probabilities: Numbers, patients: NDArray[Any], *, seed: int = 0, draws: int = DRAWS
) -> dict[str, Estimate]:
    """Each of `BINARY` with its interval; the same patients are drawn for each."""
    return {
        name: patient_bootstrap(
            lambda rows, metric=metric: metric(labels[rows], probabilities[rows]),  # type: ignore[misc]
            patients,
            generator=np.random.default_rng(seed),
            draws=draws,
        )
        for name, metric in BINARY.items()
    }


def multilabel_metrics(
    labels: Numbers,
    probabilities: Numbers,
    thresholds: NDArray[np.float64],
    patients: NDArray[Any],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> dict[str, Estimate]:
    """`f1_micro` and `f1_macro` at thresholds chosen on tuning (`choose_thresholds`), with their intervals.

    Args:
        labels: 0, 1 or NaN (not known), [rows, labels], as probabilities are.
    """
    predicted = probabilities >= thresholds
    return {
        name: patient_bootstrap(
            lambda rows, metric=metric: metric(labels[rows], predicted[rows]),  # type: ignore[misc]
            patients,
            generator=np.random.default_rng(seed),
            draws=draws,
        )
        for name, metric in (("f1_micro", f1_micro), ("f1_macro", f1_macro))
    }


def survival_metrics(
    train_events: Flags,
    train_days: Numbers,
    events: Flags,
    days: Numbers,
    risks: Numbers,
    patients: NDArray[Any],
    *,
    seed: int = 0,
    draws: int = DRAWS,
    tau: float | None = None,
) -> dict[str, Estimate]:
    """`harrell_c` and `time_dependent_c` with their intervals; the censoring of training is taken as known."""

    def uno(rows: NDArray[np.int64]) -> float:
        return time_dependent_c(train_events, train_days, events[rows], days[rows], risks[rows], tau=tau)

    def harrell(rows: NDArray[np.int64]) -> float:
        return harrell_c(events[rows], days[rows], risks[rows])

    return {
        name: patient_bootstrap(metric, patients, generator=np.random.default_rng(seed), draws=draws)
        for name, metric in (("harrell_c", harrell), ("time_dependent_c", uno))
    }
