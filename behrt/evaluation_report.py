"""What is told of an evaluation, of many patients and of no single one?

In `evaluation.json` for programs, in `evaluation.md` for people, and as metrics for MLflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from behrt.history import finite
from behrt.tasks.assessment import (
    BEHRT,
    CEILING,
    FEWEST_PATIENTS,
    METRICS,
    TITLES,
    Assessment,
    Subgroup,
    outcome_of,
    shown_difference,
)
from behrt.tasks.intervals import Estimate
from behrt.tasks.predictions import file_names

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class KnownCeiling:
    """What could be reached on a simulated outcome; `behrt.ceiling` has the terms.

    Attributes:
        share_expected: of it above 0.5, what BEHRT's scores reach over repeated draws of the outcomes.
        share_reached: the same on the outcomes as they were drawn, with its interval.
    """

    reached: float
    expected: float
    bound: float
    behrt_expected: float
    share_expected: float
    share_reached: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that is told of one run on one split; of no patient.

    Attributes:
        folder: where it was written.
        notes: how labels and records differ from those of the training.
        sentences: the verdict.
        prevalence: share of known labels that are true, by name of the label; None where too few patients have it.
        about_baselines: by name, what was chosen on tuning.
        ceiling: of simulated outcomes.
    """

    folder: Path
    task: str
    kind: str
    split: str
    rows: int
    patients: int
    training_rows: int
    prevalence: Mapping[str, float | None]
    assessment: Assessment
    notes: Sequence[str]
    sentences: Sequence[str]
    about_baselines: Mapping[str, str]
    ceiling: KnownCeiling | None
    subgroups: Sequence[Subgroup]
    without_sex: bool
    draws: int
    seed: int
    figures: Sequence[str] = field(default_factory=tuple)

    def as_dict(self) -> dict[str, Any]:
        """The form of `evaluation.json`, and of `--json` with the folder; numbers that are not defined are None."""
        assessment = self.assessment
        headline = assessment.headline
        return dict(
            finite(
                {
                    "format_version": FORMAT_VERSION,
                    "task": self.task,
                    "kind": self.kind,
                    "split": self.split,
                    "rows": self.rows,
                    "patients": self.patients,
                    "training_rows": self.training_rows,
                    "prevalence": dict(self.prevalence),
                    "headline": headline,
                    "metrics": {
                        name: {metric: asdict(own) for metric, own in of.items()}
                        for name, of in assessment.metrics.items()
                    },
                    "differences": {
                        name: {metric: asdict(own) for metric, own in of.items()}
                        for name, of in assessment.differences.items()
                    },
                    "outcomes": {
                        name: outcome_of(of[headline]) for name, of in assessment.differences.items() if name != CEILING
                    },
                    "verdict": [*self.notes, *self.sentences],
                    "thresholds": {name: own.tolist() for name, own in assessment.thresholds.items()},
                    "baselines": dict(self.about_baselines),
                    "ceiling": None if self.ceiling is None else asdict(self.ceiling),
                    "subgroups": [asdict(group) for group in self.subgroups],
                    "draws": self.draws,
                    "seed": self.seed,
                    "figures": list(self.figures),
                }
            )
        )

    def figures_for_tracking(self) -> dict[str, float]:
        """Metrics under the names that MLflow gets: `held_out/auroc`, with `_low` and `_high`; finite ones only."""
        named: dict[str, Estimate] = {}
        short = dict(zip(self.prevalence, file_names(list(self.prevalence)), strict=True))
        for name, of in self.assessment.metrics.items():
            for each, own in of.items():
                kind, _, label = each.partition("/")
                metric = f"{kind}/{short[label]}" if label else kind
                named[metric if name == BEHRT else f"{name}/{metric}"] = own
        for name, of in self.assessment.differences.items():
            named[f"{self.assessment.headline}_over_{name}"] = of[self.assessment.headline]
        found = {
            f"{self.split}/{name}{end}": value
            for name, own in named.items()
            for end, value in (("", own.value), ("_low", own.low), ("_high", own.high))
        }
        if self.ceiling is not None:
            found[f"{self.split}/ceiling/expected"] = self.ceiling.expected
            found[f"{self.split}/share_of_ceiling"] = self.ceiling.share_expected
        return {name: value for name, value in found.items() if math.isfinite(value)}


def report(found: Evaluation) -> str:
    """`evaluation.md`."""
    assessment = found.assessment
    shown = [name for name in METRICS if any(name in of for of in assessment.metrics.values())]
    lines = [
        f"# {found.task} on {found.split}",
        "",
        f"{found.rows:,} predictions of {found.patients:,} patients; trained on {found.training_rows:,}. 95% intervals "
        f"over {found.draws:,} draws of patients (seed {found.seed}).",
        "",
        *[f"- {sentence}" for sentence in (*found.notes, *found.sentences)],
        *([f"- {ceiling_sentence(found)}"] if found.ceiling is not None else []),
        "",
        "| | " + " | ".join(METRICS[name] for name in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for name, of in assessment.metrics.items():
        lines.append(f"| {TITLES[name]} | " + " | ".join(str(of[each]) if each in of else "" for each in shown) + " |")
    if found.kind != "survival":
        shares = [
            f"{name}: {'fewer than ' + str(FEWEST_PATIENTS) + ' patients' if share is None else f'{share:.1%}'}"
            for name, share in found.prevalence.items()
        ]
        lines += ["", f"True labels: {', '.join(shares)}."]
    by_label = [name for name in assessment.metrics[BEHRT] if "/" in name]
    if by_label:
        predictors = [name for name in assessment.metrics if name != CEILING]
        lines += ["", f"## Labels, {METRICS[assessment.headline]}", ""]
        lines += ["| | " + " | ".join(TITLES[name] for name in predictors) + " | over the best baseline |"]
        lines += ["|---" * (len(predictors) + 2) + "|"]
        for metric in by_label:
            own = [str(assessment.metrics[name][metric]) for name in predictors]
            lines.append(
                f"| {metric.split('/', 1)[1]} | " + " | ".join([*own, best_difference(assessment, metric)]) + " |"
            )
    if found.about_baselines:
        lines += ["", "## Baselines", ""]
        lines += [f"- {TITLES[name]}: {about}" for name, about in found.about_baselines.items()]
    lines += ["", "## Subgroups", "", *subgroup_lines(found)]
    if found.figures:
        lines += ["", "## Figures", "", *[f"![{name}]({name})" for name in found.figures]]
    return "\n".join(lines) + "\n"


def best_difference(assessment: Assessment, metric: str) -> str:
    """BEHRT minus the baseline that is best at a metric."""
    others = [name for name in assessment.differences if metric in assessment.differences[name] and name != CEILING]
    if not others:
        return ""
    best = max(others, key=lambda name: np.nan_to_num(assessment.metrics[name][metric].value))
    difference = assessment.differences[best][metric]
    return f"{shown_difference(difference)}: {outcome_of(difference)}"


def ceiling_sentence(found: Evaluation) -> str:
    """What was reached of what can be."""
    assert found.ceiling is not None
    metric, own = METRICS[found.assessment.headline], found.ceiling
    reached = (
        "" if own.share_reached is None else f" ({_percent(own.share_reached)} on the outcomes as they were drawn)"
    )
    return (
        f"Ceiling: {metric} {own.expected:.3f} is the best that can be expected of any model; BEHRT's is "
        f"{own.behrt_expected:.3f}, {own.share_expected:.1%} of what is above 0.5{reached}."
    )


def _percent(share: Estimate) -> str:
    return f"{share.value:.1%}, {share.low:.1%} to {share.high:.1%}"


def subgroup_lines(found: Evaluation) -> list[str]:
    """A table in Markdown; groups of too few patients are named, and no more."""
    if not found.subgroups:
        return ["None."]
    predictors = list(found.assessment.metrics)
    lines = [
        f"{METRICS[found.assessment.headline]}; the age is that of the last visible event. Groups are left out (-) in "
        f"which fewer than {FEWEST_PATIENTS} patients are, have the outcome, or have it not.",
        "",
        "| | patients | true | " + " | ".join(TITLES[name] for name in predictors) + " | calibration error |",
        "|---" * (len(predictors) + 4) + "|",
    ]
    for group in found.subgroups:
        if group.patients is None or group.prevalence is None:
            lines.append(f"| {group.title} |" + " - |" * (len(predictors) + 3))
            continue
        cells = [str(group.metrics[name]) for name in predictors]
        error = "" if group.calibration_error is None else str(group.calibration_error)
        lines.append(
            f"| {group.title} | {group.patients:,} | {group.prevalence:.1%} | " + " | ".join([*cells, error]) + " |"
        )
    if found.without_sex:
        lines += ["", "The records hold no sex: keep its codes with `behrt prepare --static-codes keep`."]
    return lines
