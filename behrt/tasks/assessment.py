"""Is one predictor better than others on the same rows, and for whom does it predict how well?

Every metric of every predictor is taken over the same draws of patients (`intervals.py`), so that the interval of a
difference is of that difference: two intervals that overlap say nothing. Intervals are about who happened to be among
the patients of the split; that another training would have given another model is not in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from behrt.tasks.examples import Examples
from behrt.tasks.intervals import DRAWS, Estimate, estimate, patient_weights
from behrt.tasks.metrics import choose_thresholds
from behrt.tasks.weighted import (
    OverDraws,
    mean_over_labels,
    weighted_auprc,
    weighted_auroc,
    weighted_brier,
    weighted_calibration_error,
    weighted_f1,
    weighted_harrell_c,
    weighted_time_dependent_c,
)

BEHRT = "behrt"
CEILING = "ceiling"
TITLES = {
    BEHRT: "BEHRT",
    "prevalence": "prevalence",
    "logistic_regression": "logistic regression",
    "cox_regression": "Cox regression",
    "boosted_trees": "boosted trees",
    CEILING: "ceiling",
}
"""Predictors by name, in words."""

METRICS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "harrell_c": "Harrell's C",
    "time_dependent_c": "time-dependent C",
    "f1": "F1",
    "f1_micro": "F1, micro",
    "f1_macro": "F1, macro",
    "brier": "Brier",
    "calibration_error": "calibration error",
}
"""Metrics by name, in words."""

HEADLINE = {"binary": "auroc", "multilabel": "auroc", "survival": "harrell_c"}
"""What the verdict is about."""

LEAST_GAIN = 0.01
"""Of AUROC or C: a predictor whose advantage is surely smaller does not beat the other."""

FEWEST_PATIENTS = 11
"""Groups of fewer patients are not told about, nor those in which fewer have the outcome, or fewer have it not."""

AGE_BANDS = (0, 18, 40, 65, 80)
"""Where they begin, in years at the last visible event."""
SEX_CODES = ("GENDER//", "SEX//")
"""What codes of the sex begin with, where the records kept them (`behrt prepare --static-codes keep`)."""

Outcome = Literal["beats", "does not beat", "cannot be told"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """What one predictor says of the rows of a split.

    Attributes:
        scores: probabilities [rows, names]; of survival, risks [rows].
        tuning: of the tuning rows, likewise; None for one that is asked for its order of patients alone.
    """

    name: str
    scores: NDArray[Any]
    tuning: NDArray[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """Predictors on the rows of a split.

    Attributes:
        metrics: by predictor and name of the metric; `auroc/NAME` is of one of several labels.
        differences: BEHRT minus each other one, by predictor and metric, of what the verdict is about.
        thresholds: at which F1 is taken, by predictor, [names].
        share_of_ceiling: how much of the ceiling above 0.5 BEHRT reaches, on the outcomes as they were drawn.
    """

    kind: str
    metrics: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    thresholds: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    share_of_ceiling: Estimate | None = None

    @property
    def headline(self) -> str:
        return HEADLINE[self.kind]


def assess(
    examples: Examples,
    predictors: Sequence[Predictor],
    *,
    tuning: Examples,
    train: Examples,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Assessment:
    """Every metric of every predictor with its interval; the first predictor is compared with the others.

    Args:
        tuning: the rows on which thresholds are chosen.
        train: whose censoring the time-dependent C takes.
    """
    thresholds = {
        predictor.name: choose_thresholds(tuning.targets, predictor.tuning)
        for predictor in predictors
        if predictor.tuning is not None and examples.kind != "survival"
    }
    metrics = {
        predictor.name: _metrics(examples, predictor, thresholds.get(predictor.name), train) for predictor in predictors
    }
    found: dict[str, dict[str, list[NDArray[np.float64]]]] = {
        name: {metric: [] for metric in own} for name, own in metrics.items()
    }
    done = 0
    for weights in patient_weights(examples.patients, generator=np.random.default_rng(seed), draws=draws):
        progress("bootstrap", done, draws)
        done += len(weights)
        for name, own in metrics.items():
            for metric, over in own.items():
                found[name][metric].append(over(weights))
    drawn = {name: {metric: np.concatenate(parts) for metric, parts in own.items()} for name, own in found.items()}

    headline = HEADLINE[examples.kind]
    first, *others = [predictor.name for predictor in predictors]
    compared = [metric for metric in drawn[first] if metric.split("/")[0] == headline]
    share = None
    if CEILING in drawn:
        above, best = (drawn[name][headline] - 0.5 for name in (first, CEILING))
        share = _estimated(np.divide(above, best, out=np.full(best.shape, np.nan), where=best > 0))
    return Assessment(
        kind=examples.kind,
        metrics={name: {metric: _estimated(own) for metric, own in of.items()} for name, of in drawn.items()},
        differences={
            name: {metric: _estimated(drawn[first][metric] - drawn[name][metric]) for metric in compared}
            for name in others
        },
        thresholds=thresholds,
        share_of_ceiling=share,
    )


def _estimated(values: NDArray[np.float64]) -> Estimate:
    """The first is of all rows, the others are of draws."""
    return estimate(float(values[0]), values[1:]) if len(values) > 1 else Estimate(float(values[0]), math.nan, math.nan)


def _metrics(
    examples: Examples, predictor: Predictor, thresholds: NDArray[np.float64] | None, train: Examples
) -> dict[str, OverDraws]:
    """The metrics that one predictor is asked for; of one that has no tuning, what the verdict is about."""
    scores = predictor.scores
    if examples.kind == "survival":
        assert examples.days is not None
        assert train.days is not None
        events, days = examples.seen_events, examples.days
        found = {"harrell_c": weighted_harrell_c(events, days, scores)}
        if predictor.tuning is not None and len(train):
            found["time_dependent_c"] = weighted_time_dependent_c(train.seen_events, train.days, events, days, scores)
        return found
    assert scores.shape == examples.targets.shape
    shown = shown_names(examples)  # a mean over all would tell of the others, by what is missing
    known = ~np.isnan(examples.targets)
    known[:, [number for number in range(len(examples.names)) if shown and number not in shown]] = False
    targets = np.where(known, examples.targets, np.nan)
    labels = [examples.targets[known[:, number], number] > 0 for number in range(len(examples.names))]
    own = [scores[known[:, number], number] for number in range(len(examples.names))]
    areas = [weighted_auroc(*pair) for pair in zip(labels, own, strict=True)]
    found = {"auroc": mean_over_labels(areas, known)}
    if thresholds is None or not shown:  # the AUPRC of one prediction for all is the share of true labels
        return found
    found["auprc"] = mean_over_labels([weighted_auprc(*pair) for pair in zip(labels, own, strict=True)], known)
    predicted = scores >= thresholds
    if examples.kind == "binary":
        found["f1"] = weighted_f1(targets, predicted, macro=False)
    else:
        found |= {f"f1_{way}": weighted_f1(targets, predicted, macro=way == "macro") for way in ("micro", "macro")}
    rows = np.nonzero(known)[0]  # of each known label
    for name, metric in (("brier", weighted_brier), ("calibration_error", weighted_calibration_error)):
        found[name] = _of_rows(metric(examples.targets[known] > 0, scores[known]), rows)
    if examples.kind == "multilabel":
        for number in shown:
            rows = np.flatnonzero(known[:, number])
            found[f"auroc/{examples.names[number]}"] = _of_rows(areas[number], rows)
    return found


def _of_rows(metric: OverDraws, rows: NDArray[np.int64]) -> OverDraws:
    return lambda weights: metric(weights[:, rows])


# --- in words


def outcome_of(difference: Estimate) -> Outcome:
    """What the interval of a difference says.

    >>> outcome_of(Estimate(0.03, 0.01, 0.05)), outcome_of(Estimate(-0.03, -0.05, -0.01))
    ('beats', 'does not beat')
    >>> outcome_of(Estimate(0.03, -0.01, 0.07)), outcome_of(Estimate(0.002, 0.001, 0.003))
    ('cannot be told', 'does not beat')
    """
    if difference.high < LEAST_GAIN:
        return "does not beat"
    return "beats" if difference.low > 0 else "cannot be told"


def verdict(found: Assessment, *, task: str, patients: int) -> list[str]:
    """A sentence for each baseline."""
    sentences = []
    metric = METRICS[found.headline]
    for name, differences in found.differences.items():
        if name == CEILING:
            continue
        difference = differences[found.headline]
        outcome = outcome_of(difference)
        if not math.isfinite(difference.low):
            told = f"Whether BEHRT beats {TITLES[name]} on {task} cannot be told: too few outcomes for an interval."
        elif outcome == "cannot be told":
            told = (
                f"Whether BEHRT beats {TITLES[name]} on {task} cannot be told from {patients:,} patients: "
                f"{metric} {shown_difference(difference)}."
            )
        else:
            told = f"BEHRT {outcome} {TITLES[name]} on {task}: {metric} {shown_difference(difference)}."
        sentences.append(told)
    return sentences


def shown_difference(difference: Estimate) -> str:
    """>>> shown_difference(Estimate(0.03, -0.01, 0.07))
    '+0.030 (-0.010 to +0.070)'
    """
    return f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


# --- groups of patients


def may_be_told(examples: Examples, rows: NDArray[np.bool_] | None = None, names: Sequence[int] | None = None) -> bool:
    """Whether a group is large enough: patients, those who have an outcome in it, and those who have not."""
    return min(_sizes(examples, rows, names)) >= FEWEST_PATIENTS


def _sizes(examples: Examples, rows: NDArray[np.bool_] | None, names: Sequence[int] | None = None) -> tuple[int, ...]:
    """Patients of a group, those with an outcome in it, and those without one."""
    rows = np.ones(len(examples), bool) if rows is None else rows
    targets = examples.targets[rows] if names is None else examples.targets[rows][:, list(names)]
    patients = examples.patients[rows]
    parts = (np.ones(len(patients), bool), (targets > 0).any(1), (targets == 0).any(1))
    return tuple(len(np.unique(patients[part])) for part in parts)


def shown_names(examples: Examples) -> list[int]:
    """Places of the labels that enough patients have, and have not."""
    return [number for number in range(len(examples.names)) if may_be_told(examples, names=[number])]


@dataclass(frozen=True, kw_only=True)
class Subgroup:
    """How well BEHRT and the others predict for some patients.

    Attributes:
        group: as `age` and `name`: as `40 to 64`.
        rows, patients: None where the group is not told about.
        prevalence: share of the known labels that are true.
        metrics: what the verdict is about, by predictor; and BEHRT's calibration error.
    """

    group: str
    name: str
    rows: int | None = None
    patients: int | None = None
    prevalence: float | None = None
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    calibration_error: Estimate | None = None

    @property
    def title(self) -> str:
        return self.name if self.name.endswith("not known") else f"{self.group} {self.name}"


def subgroups(
    examples: Examples,
    predictors: Sequence[Predictor],
    groups: Mapping[str, Mapping[str, NDArray[np.bool_]]],
    *,
    tuning: Examples,
    train: Examples,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Subgroup]:
    """Every group that is large enough, and the names of the others.

    Where too few patients are in all groups together that are left out, they would follow from the total: then the
    smallest of the others is left out, too.

    Args:
        groups: which rows are in it, by group and name.
    """
    found = []
    for group, masks in groups.items():
        told = _told(examples, masks)
        for name, rows in masks.items():
            if name not in told:
                found.append(Subgroup(group=group, name=name))
                continue
            own = examples.take(rows)
            assessed = assess(
                own,
                [Predictor(name=each.name, scores=each.scores[rows], tuning=each.tuning) for each in predictors],
                tuning=tuning,
                train=train,
                draws=draws,
                seed=seed,
            )
            found.append(
                Subgroup(
                    group=group,
                    name=name,
                    rows=len(own),
                    patients=len(np.unique(own.patients)),
                    prevalence=float(np.nanmean(own.targets)),
                    metrics={each: of[assessed.headline] for each, of in assessed.metrics.items()},
                    calibration_error=assessed.metrics[predictors[0].name].get("calibration_error"),
                )
            )
    return found


def _told(examples: Examples, masks: Mapping[str, NDArray[np.bool_]]) -> list[str]:
    """Names of the groups that may be told about, all of them together with the total."""
    told = [name for name, rows in masks.items() if may_be_told(examples, rows)]
    told.sort(key=lambda name: _sizes(examples, masks[name]))
    while told:
        others = [masks[name] for name in masks if name not in told]
        left_out = _sizes(examples, np.any(others, axis=0)) if others else (0,)
        if not any(0 < size < FEWEST_PATIENTS for size in left_out):
            break
        told.pop(0)
    return told


def age_bands(ages: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """Which rows are in each band that has any.

    >>> {name: rows.tolist() for name, rows in age_bands(np.array([39.9, 40.0, np.nan, 91.0])).items()}
    {'18 to 39': [True, False, False, False], '40 to 64': [False, True, False, False],
     '80 and older': [False, False, False, True], 'age not known': [False, False, True, False]}
    """
    found = {}
    for begin, end in zip(AGE_BANDS, (*AGE_BANDS[1:], math.inf), strict=True):
        name = f"{begin} to {end - 1}" if end < math.inf else f"{begin} and older"
        found[name] = (ages >= begin) & (ages < end)
    found["age not known"] = np.isnan(ages)
    return {name: rows for name, rows in found.items() if rows.any()}


def sexes(counts: Any, tokens: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Which rows have each code of the sex; empty where the records hold none.

    Args:
        counts: [rows, vocab_size], sparse, how often each code is visible.
    """
    columns = {code: place for place, code in enumerate(tokens) if code.startswith(SEX_CODES)}
    if not columns:
        return {}
    found = {code.split("//", 1)[1]: counts[:, [place]].toarray().ravel() > 0 for code, place in columns.items()}
    found["sex not known"] = ~np.any(list(found.values()), axis=0)
    return {name: rows for name, rows in found.items() if rows.any()}
