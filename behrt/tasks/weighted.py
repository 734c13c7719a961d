"""How good are predictions where each row counts so many times, for many draws of rows at once?

The metrics of `metrics.py` again, in the form that a bootstrap needs: what does not change from draw to draw, as the
order of the scores, is found once, and a block of draws costs a few passes over an array. With weights of 1 they are
those of scikit-learn and scikit-survival, with whole numbers those of rows that repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from behrt.tasks.metrics import Flags, Numbers, calibration_error, default_tau

Weights = NDArray[np.float32]
"""How often each row counts, whole numbers, [draws, rows]."""

OverDraws = Callable[[Weights], NDArray[np.float64]]
"""[draws, rows] to the metric of each draw, [draws]; NaN where it is not defined."""

TIED = 1e-8
"""Risks that differ by no more are equal, as for scikit-survival."""
CELLS_AT_ONCE = 16_000_000
"""Pairs of rows whose order is held in memory at once."""


def weighted_auroc(labels: Flags, scores: Numbers) -> OverDraws:
    """Area under the ROC curve; ties count half."""
    order, starts = _ranked(scores)
    positive = labels[order].astype(np.float32)

    def over(weights: Weights) -> NDArray[np.float64]:
        own = weights[:, order]
        positives = _summed(own * positive, starts)
        negatives = _summed(own * (1 - positive), starts)
        below = np.cumsum(negatives, axis=1) - negatives
        return _ratio((positives * (below + negatives / 2)).sum(1), positives.sum(1) * negatives.sum(1))

    return over


def weighted_auprc(labels: Flags, scores: Numbers) -> OverDraws:
    """Average precision."""
    order, starts = _ranked(-scores)
    positive = labels[order].astype(np.float32)

    def over(weights: Weights) -> NDArray[np.float64]:
        own = weights[:, order]
        hits = _summed(own * positive, starts)
        found = np.cumsum(hits, axis=1)
        called = np.cumsum(_summed(own, starts), axis=1)
        precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
        return _ratio((hits * precision).sum(1), hits.sum(1))

    return over


def weighted_brier(labels: Flags, probabilities: Numbers) -> OverDraws:
    """Mean squared error of the probabilities."""
    errors = (probabilities.astype(np.float64) - labels) ** 2
    return lambda weights: _ratio(weights @ errors, weights.sum(1))


def weighted_calibration_error(labels: Flags, probabilities: Numbers) -> OverDraws:
    """Expected calibration error; its bins are drawn anew for each draw."""

    def over(weights: Weights) -> NDArray[np.float64]:
        times = weights.astype(np.int64)
        return np.array([calibration_error(np.repeat(labels, own), np.repeat(probabilities, own)) for own in times])

    return over


def weighted_f1(labels: Numbers, predicted: Flags, *, macro: bool) -> OverDraws:
    """F1 of labels 0, 1 or NaN (not known) [rows, labels]: over all, or the mean over labels that are true anywhere."""
    known = ~np.isnan(labels)
    positive = known & (np.nan_to_num(labels) > 0)
    hits = (positive & predicted).astype(np.float32)
    total = positive.astype(np.float32) + (known & predicted)  # F1 = 2 hits / (positives + predicted)
    true = positive.astype(np.float32)

    def over(weights: Weights) -> NDArray[np.float64]:
        found, called, ever = (2 * (weights @ hits), weights @ total, weights @ true)  # each [draws, labels]
        if not macro:
            found, called, ever = (array.sum(1, keepdims=True) for array in (found, called, ever))
        scores = np.divide(found, called, out=np.full(found.shape, np.nan), where=ever > 0)
        return _mean_of_defined(scores)

    return over


def weighted_harrell_c(events: Flags, days: Numbers, risks: Numbers) -> OverDraws:
    """Harrell's concordance."""
    return _concordance(events, days, risks, np.ones(len(days)))


def weighted_time_dependent_c(
    train_events: Flags, train_days: Numbers, events: Flags, days: Numbers, risks: Numbers, *, tau: float | None = None
) -> OverDraws:
    """Uno's concordance up to `tau` days; the censoring of training is taken as known."""
    from sksurv.nonparametric import CensoringDistributionEstimator

    tau = default_tau(train_days) if tau is None else tau
    outcomes = np.empty(len(train_days), dtype=[("event", bool), ("days", np.float64)])
    outcomes["event"], outcomes["days"] = train_events, train_days
    censoring = CensoringDistributionEstimator().fit(outcomes)
    counted = events & (days < tau)
    importance = np.zeros(len(days))
    if counted.any():
        importance[counted] = censoring.predict_proba(days[counted].astype(np.float64)) ** -2.0
    return _concordance(counted, days, risks, importance, censored=~events)


def _concordance(
    events: Flags, days: Numbers, risks: Numbers, importance: Numbers, *, censored: Flags | None = None
) -> OverDraws:
    """Concordance over pairs of an event and a row that is known to be without one for longer.

    Args:
        events: rows that begin a pair.
        importance: of each pair, by the row that begins it.
        censored: rows that an event on the same day precedes; those that are no event if None.
    """
    places = np.flatnonzero(events)
    later_on_the_day = ~events if censored is None else censored

    def over(weights: Weights) -> NDArray[np.float64]:
        concordant, comparable = np.zeros(len(weights)), np.zeros(len(weights))
        at_once = max(1, CELLS_AT_ONCE // max(1, len(days)))
        for first in range(0, len(places), at_once):
            some = places[first : first + at_once]
            pair = (days > days[some, None]) | ((days == days[some, None]) & later_on_the_day)  # [some, rows]
            gap = risks[some, None] - risks
            won = (pair & (gap > TIED)) + np.float32(0.5) * (pair & (np.abs(gap) <= TIED))
            own = weights[:, some] * importance[some]  # [draws, some]
            concordant += (own * (weights @ won.T)).sum(1)
            comparable += (own * (weights @ pair.T.astype(np.float32))).sum(1)
        return _ratio(concordant, comparable)

    return over


def mean_over_labels(metrics: list[OverDraws], known: Flags) -> OverDraws:
    """The mean over labels of a metric, of those for which it is defined in the draw.

    Args:
        metrics: of each label, over the rows at which it is known.
        known: [rows, labels].
    """
    rows = [np.flatnonzero(known[:, number]) for number in range(known.shape[1])]

    def over(weights: Weights) -> NDArray[np.float64]:
        found = [metric(weights[:, own]) for metric, own in zip(metrics, rows, strict=True)]
        return _mean_of_defined(np.stack(found, axis=1))

    return over


def _ranked(scores: Numbers) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows from the lowest score to the highest, and where each distinct score begins among them."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1])) if len(ranked) else np.zeros(0, np.int64)
    return order, starts


def _summed(values: Weights, starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums over the rows of each distinct score, [draws, scores]."""
    if not len(starts):
        return np.zeros((len(values), 0))
    return np.asarray(np.add.reduceat(values, starts, axis=1, dtype=np.float64))


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> NDArray[np.float64]:
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    found: NDArray[np.float64] = np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)
    return found


def _mean_of_defined(scores: NDArray[Any]) -> NDArray[np.float64]:
    """[draws] from [draws, labels], NaN left out."""
    defined = ~np.isnan(scores)
    return _ratio(np.where(defined, scores, 0).sum(1), defined.sum(1))
