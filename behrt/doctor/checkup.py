"""What does the doctor know of a run of our own, before, during and after its training?"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np

from behrt.checkpoints import Transplant
from behrt.config import ExperimentSettings
from behrt.doctor.curves import curves_of_history
from behrt.doctor.diagnosis import Diagnosis, diagnose
from behrt.doctor.facts import FACT_NAMES, RunFacts, facts_from_settings
from behrt.doctor.rule import SEVERITIES, Finding, Severity
from behrt.history import Baselines
from behrt.records import Records, draw_validation

log = logging.getLogger(__name__)


def facts_of_records(records: Records) -> dict[str, Any]:
    """What the records say of themselves; patients are compared by id, and only their number is kept."""
    training = records.training.subject_ids()[records.training_patients]
    validation = records.data.split("tuning").subject_ids()
    return {
        "max_position": records.max_position,
        "train_patients": len(training),
        "val_patients": len(validation),
        "val_scored": int(records.validation.scored.sum()),
        "shared_subjects": len(np.intersect1d(training, validation)),
        "truncated_share": records.truncated_share,
        "unk_share": float(records.data.info["splits"]["train"]["unk_share"]),
        "validation_masks_fixed": records.validation.equals(draw_validation(records.data, records.max_position)),
    }


def facts_before_training(
    settings: ExperimentSettings,
    records: Records,
    baselines: Baselines,
    transplant: Transplant | None,
    *,
    vocab_size: int,
    probed: Mapping[str, Any],
) -> RunFacts:
    """Everything that is known of a run when its first epoch has not begun; `probed` is what `probe` found."""
    known = {
        **facts_from_settings(settings),
        **facts_of_records(records),
        **{name: value for name, value in baselines.figures().items() if name in FACT_NAMES},
        "finished": False,
        "vocab_size": vocab_size,
        **({} if transplant is None else {"shared_codes": transplant.shared_codes, "new_codes": transplant.new_codes}),
        **probed,
    }
    return RunFacts(**known)


@contextmanager
def tolerated(part: str) -> Iterator[None]:
    """No mistake of the doctor's own ends a training that works: it is logged, and what was known before stays."""
    try:
        yield
    except Exception:
        log.warning("%s failed; the training goes on without it", part, exc_info=True)


class Checkup:
    """The diagnosis of one run, kept up to date.

    Attributes:
        facts: all that is known by now.
        diagnosis: what follows from it.
        accepted: what had been found before the training began, by rule and severity; it does not end the training.
    """

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        self.diagnosis = Diagnosis("inconclusive", (), ())
        with tolerated("the diagnosis"):
            self.diagnosis = diagnose(self.facts)
        self.accepted = {(finding.rule, finding.severity) for finding in self.diagnosis.findings}
        self._told = set(self.accepted)

    def update(self, history: Mapping[str, Iterable[Mapping[str, Any]]], **facts: Any) -> list[Finding]:
        """Takes the history so far, and other facts by name; returns the findings that are new or have become worse."""
        assert facts.keys() <= {fact.name for fact in fields(RunFacts)}
        self.facts = replace(self.facts, curves=curves_of_history(history), **facts)
        with tolerated("the diagnosis"):
            self.diagnosis = diagnose(self.facts)
        new = [finding for finding in self.diagnosis.findings if (finding.rule, finding.severity) not in self._told]
        self._told |= {(finding.rule, finding.severity) for finding in new}
        return new

    def reason_to_stop(self, stop_on: Severity) -> Finding | None:
        """The finding, at least as severe as `stop_on`, for which a run in progress is ended."""
        worst = [
            finding
            for finding in self.diagnosis.findings
            if SEVERITIES.index(finding.severity) >= SEVERITIES.index(stop_on)
            and (finding.rule, finding.severity) not in self.accepted
        ]
        return worst[0] if worst else None
