"""What do predictions of a task look like?

ROC and precision-recall curves, calibration, and survival by predicted risk. A figure goes to others more easily than
any table: none shows groups of fewer patients than are told about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from behrt.plots import RUN_COLOURS, saved_figure
from behrt.tasks.assessment import BEHRT, CEILING, FEWEST_PATIENTS, TITLES, Assessment, Predictor, shown_names
from behrt.tasks.examples import Examples
from behrt.tasks.intervals import patient_weights
from behrt.tasks.metrics import CALIBRATION_BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = 4.2
"""Inches of a panel's sides."""
COLUMNS = 3
MOST_PANELS = 12
RISK_GROUPS = ("lowest risk", "second quarter", "third quarter", "highest risk")
DRAWS_OF_A_FIGURE = 300
COLOURS = {
    name: RUN_COLOURS[place]
    for place, name in enumerate((BEHRT, "logistic_regression", "boosted_trees", "cox_regression"))
} | {"prevalence": "0.55", CEILING: "C2"}


def draw_evaluation(
    folder: Path, examples: Examples, predictors: Sequence[Predictor], found: Assessment, *, title: str
) -> list[Path]:
    """Writes the figures of one evaluation; their paths.

    A figure that could only show too few patients is not drawn.
    """
    if examples.kind == "survival":
        path = folder / "survival_by_risk.png"
        return [path] if _draw_survival(path, examples, predictors[0], found, title=title) else []
    shown = shown_names(examples)[:MOST_PANELS]
    if not shown:
        return []
    with _panels(folder / "roc_curve.png", examples, shown, title) as panels:
        for axes, number in panels:
            _roc(axes, examples, predictors, found, number)
    with _panels(folder / "precision_recall_curve.png", examples, shown, title) as panels:
        for axes, number in panels:
            _precision_recall(axes, examples, predictors, found, number)
    with _panels(folder / "calibration_curve.png", examples, shown, title) as panels:
        for axes, number in panels:
            _calibration(axes, examples, predictors, number)
    return [folder / f"{name}_curve.png" for name in ("roc", "precision_recall", "calibration")]


@contextmanager
def _panels(path: Path, examples: Examples, shown: list[int], title: str) -> Iterator[list[tuple[Axes, int]]]:
    """A square panel for each label."""
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    with saved_figure(path, width=columns * PANEL, height=rows * PANEL + 0.3) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        yield list(zip(grid, shown, strict=False))
        for axes, number in zip(grid, shown, strict=False):
            if len(examples.names) > 1:
                axes.set_title(_plain(examples.names[number]), fontsize="medium")
        figure.suptitle(_plain(title), fontsize="medium")


def _plain(text: str) -> str:
    """Never as a formula."""
    return text.replace("$", r"\$")


def _of_label(examples: Examples, predictor: Predictor, number: int) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    known = ~np.isnan(examples.targets[:, number])
    return examples.targets[known, number] > 0, predictor.scores[known, number]


def _legend_of(found: Assessment, predictor: Predictor, examples: Examples, number: int, metric: str) -> str:
    name = f"{metric}/{examples.names[number]}" if len(examples.names) > 1 else metric
    estimate = found.metrics[predictor.name].get(name)
    return TITLES[predictor.name] if estimate is None else f"{TITLES[predictor.name]} {estimate}"


def _style(predictor: Predictor) -> dict[str, Any]:
    return {
        "color": COLOURS[predictor.name],
        "linewidth": 2.0 if predictor.name == BEHRT else 1.2,
        "linestyle": ":" if predictor.name == CEILING else "-",
        "zorder": 3 if predictor.name == BEHRT else 2,
    }


def _roc(axes: Axes, examples: Examples, predictors: Sequence[Predictor], found: Assessment, number: int) -> None:
    from sklearn.metrics import roc_curve

    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1)
    for predictor in predictors:
        if predictor.name != "prevalence":
            false, true, _ = roc_curve(*_of_label(examples, predictor, number))
            label = _legend_of(found, predictor, examples, number, "auroc")
            axes.plot(false, true, label=label, **_style(predictor))
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(title="AUROC", fontsize="x-small", title_fontsize="x-small", loc="lower right")


def _precision_recall(
    axes: Axes, examples: Examples, predictors: Sequence[Predictor], found: Assessment, number: int
) -> None:
    from sklearn.metrics import precision_recall_curve

    for predictor in predictors:
        labels, scores = _of_label(examples, predictor, number)
        label = _legend_of(found, predictor, examples, number, "auprc")
        if predictor.name == "prevalence":
            share = float(labels.mean())
            axes.axhline(share, color="0.55", linestyle="--", linewidth=1, label=f"prevalence {share:.3f}")
            continue
        precision, recall, _ = precision_recall_curve(labels, scores)
        axes.plot(recall, precision, label=label, drawstyle="steps-post", **_style(predictor))
    axes.set(xlabel="sensitivity (recall)", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(title="average precision", fontsize="x-small", title_fontsize="x-small", loc="upper right")


def _calibration(axes: Axes, examples: Examples, predictors: Sequence[Predictor], number: int) -> None:
    known = ~np.isnan(examples.targets[:, number])
    patients = examples.patients[known]
    highest = 0.0
    for predictor in predictors:
        if predictor.name in ("prevalence", CEILING):
            continue
        labels, scores = _of_label(examples, predictor, number)
        bins = calibration_bins(scores, patients)
        members = np.stack([bins == place for place in np.unique(bins)], axis=1).astype(np.float32)  # [rows, bins]
        rows = members.sum(0)
        mean = (scores @ members) / rows
        observed = np.asarray((labels @ members) / rows)
        if predictor.name == BEHRT:
            low, high = _observed_interval(labels, members, patients)
            bins_shown = f"{len(rows)} bins of about {int(np.median(rows))} rows"
            axes.errorbar(
                mean, observed, yerr=[np.maximum(observed - low, 0), np.maximum(high - observed, 0)], marker="o",
                markersize=4, capsize=2, elinewidth=1, label=f"{TITLES[BEHRT]}, {bins_shown}",
                **_style(predictor),
            )  # fmt: skip
            highest = max(highest, float(np.nanmax(high)))
        else:
            axes.plot(mean, observed, marker="o", markersize=3, label=TITLES[predictor.name], **_style(predictor))
        highest = max(highest, float(mean.max()), float(observed.max()))
    end = min(1.0, 1.05 * highest) or 1.0
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1)
    axes.set(xlabel="predicted probability", ylabel="share that is true", xlim=(0, end), ylim=(0, end), aspect="equal")
    axes.legend(fontsize="x-small", loc="upper left")


def calibration_bins(scores: NDArray[Any], patients: NDArray[Any]) -> NDArray[np.int64]:
    """The bin of each row: at most ten of equally many rows, each with enough patients to be told about."""
    for bins in range(CALIBRATION_BINS, 0, -1):
        inner = np.quantile(scores, np.linspace(0, 1, bins + 1))[1:-1]
        place = np.searchsorted(inner, scores)
        if all(len(np.unique(patients[place == own])) >= FEWEST_PATIENTS for own in np.unique(place)):
            break
    return np.asarray(place, np.int64)


def _observed_interval(
    labels: NDArray[np.bool_], members: NDArray[np.float32], patients: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the share of true labels in each bin, 95%, over draws of patients."""
    found = []
    for weights in patient_weights(patients, generator=np.random.default_rng(0), draws=DRAWS_OF_A_FIGURE):
        rows = weights @ members
        hits = (weights * labels) @ members
        found.append(np.divide(hits, rows, out=np.full(rows.shape, np.nan), where=rows > 0))
    low, high = np.nanquantile(np.concatenate(found)[1:], [0.025, 0.975], axis=0)
    return low, high


def risk_groups(risks: NDArray[Any], patients: NDArray[Any]) -> NDArray[np.int64] | None:
    """The quarter of each row by its risk; equal risks are in one. None where one has too few patients."""
    place = np.asarray(np.searchsorted(np.quantile(risks, [0.25, 0.5, 0.75]), risks), np.int64)
    if len(np.unique(place)) < 2:
        return None
    enough = all(len(np.unique(patients[place == own])) >= FEWEST_PATIENTS for own in np.unique(place))
    return place if enough else None


def survival_of(
    events: NDArray[np.bool_], days: NDArray[np.float64], patients: NDArray[Any]
) -> tuple[NDArray[np.float64], ...]:
    """The Kaplan-Meier curve over rows from day 0 on, as far as enough patients are left: days, share, its 95% limits.

    A patient with several rows is left as long as any of them.
    """
    from sksurv.nonparametric import kaplan_meier_estimator

    if events.any():
        times, alive, (low, high) = kaplan_meier_estimator(events, days, conf_type="log-log")
    else:
        times = np.unique(days)
        alive = low = high = np.ones(len(times))
    _, place = np.unique(patients, return_inverse=True)
    longest = np.zeros(place.max() + 1)
    np.maximum.at(longest, place, days)
    left = len(longest) - np.searchsorted(np.sort(longest), times)  # just before each time
    kept = left >= FEWEST_PATIENTS
    return tuple(
        np.concatenate([[first], values[kept]])
        for first, values in ((0.0, times), (1.0, alive), (1.0, low), (1.0, high))
    )


def _draw_survival(path: Path, examples: Examples, predictor: Predictor, found: Assessment, *, title: str) -> bool:
    """Kaplan-Meier curves of the quarters of predicted risk, each as long as enough patients are left."""
    import seaborn as sns

    groups = risk_groups(predictor.scores, examples.patients)
    if groups is None:
        return False
    assert examples.days is not None
    colours = sns.color_palette("viridis_r", len(RISK_GROUPS) + 1)[1:]
    with saved_figure(path, width=7.4) as figure:
        axes = figure.add_subplot()
        lowest = 1.0
        for place in np.unique(groups).tolist():
            own = groups == place
            patients, events = examples.patients[own], examples.seen_events[own]
            times, alive, low, high = survival_of(events, examples.days[own].astype(np.float64), patients)
            seen = len(np.unique(patients[events]))
            count = f"{seen:,}" if seen >= FEWEST_PATIENTS else f"fewer than {FEWEST_PATIENTS}"
            label = f"{RISK_GROUPS[place]}: {len(np.unique(patients)):,} patients, {count} with the event"
            axes.step(times, alive, where="post", color=colours[place], label=label)
            axes.fill_between(times, low, high, step="post", color=colours[place], alpha=0.2, linewidth=0)
            lowest = min(lowest, float(low.min()))
        axes.set(
            xlabel=f"days (a curve ends where fewer than {FEWEST_PATIENTS} patients are left)",
            ylabel="share without the event",
            ylim=(max(0.0, lowest - 0.03), 1.005),
        )
        axes.set_xlim(left=0)
        axes.set_title(_plain(f"{title}: Harrell's C {found.metrics[predictor.name]['harrell_c']}"), fontsize="medium")
        axes.legend(title="by BEHRT", fontsize="small", loc="lower left", title_fontsize="small")
    return True
