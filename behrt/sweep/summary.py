"""How does a study stand, and how does its best trial become an experiment?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from behrt.config import EXPERIMENT_NAME, UserError, experiment_yaml
from behrt.files import write_text
from behrt.history import finite
from behrt.sweep.study import SweepStudy
from behrt.sweep.trials import PARENT_RUN_ID, Tally, TrialRecord, TrialState, best_trial, tally


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """A study at one moment.

    Attributes:
        best: the best complete trial.
        replaced_by: number of the trial that continues a lost one.
    """

    name: str
    objective: str
    asked: int
    epochs_each: int
    records: list[TrialRecord]
    tally: Tally
    best: TrialRecord | None
    replaced_by: dict[int, int]
    parent_run_id: str | None

    @classmethod
    def of(cls, study: SweepStudy) -> StudySummary:
        """The study as its storage has it now."""
        records, sweep = study.records(), study.sweep
        return cls(
            name=sweep.name,
            objective=sweep.objective,
            asked=sweep.budget.trials,
            epochs_each=sweep.base.training.epochs,
            records=records,
            tally=tally(records),
            best=best_trial(records, sweep.direction),
            replaced_by={record.retry_of: record.number for record in records if record.retry_of is not None},
            parent_run_id=study.noted(PARENT_RUN_ID),
        )

    def as_dict(self) -> dict[str, Any]:
        """The form of `--json`."""
        counts, best = self.tally, self.best
        values: dict[str, Any] = finite(
            {
                "study": self.name,
                "objective": self.objective,
                "asked": self.asked,
                "finished": counts.finished,
                "complete": counts.complete,
                "pruned": counts.pruned,
                "failed": counts.failed,
                "running": counts.running,
                "waiting": counts.waiting + len(counts.to_retry),
                "replaced": counts.replaced,
                "trained_epochs": counts.trained_epochs,
                "parent_run_id": self.parent_run_id,
                "best": None if best is None else trial_dict(best),
                "trials": [trial_dict(record) for record in self.records],
            }
        )
        return values


def trial_dict(record: TrialRecord) -> dict[str, Any]:
    """One trial as JSON."""
    return {
        "number": record.number,
        "state": record.state.value,
        "value": record.best,
        "epochs": record.epochs,
        "ended": record.ended,
        "retry_of": record.retry_of,
        "params": record.params,
        "run_id": record.run_id,
        "folder": record.folder,
    }


def export_trial(study: SweepStudy, to: Path, number: int | None = None) -> TrialRecord:
    """Writes `experiment.yaml` of a trial, by default the best one, into the folder `to`.

    Raises:
        UserError: there is no such trial, it did not complete, or an experiment stands there.
    """
    summary = StudySummary.of(study)
    record = summary.best
    if number is not None:
        record = next((record for record in summary.records if record.number == number), None)
        if record is None:
            raise UserError(f"--trial: {number}: {summary.name} has trials 0 to {len(summary.records) - 1}")
        if record.state is not TrialState.COMPLETE:
            raise UserError(f"--trial: {number} is {record.state}, and its value no result; choose a complete one")
    if record is None:
        raise UserError(f"{summary.name}: no trial is complete yet; look at it with behrt sweep status {summary.name}")
    if not EXPERIMENT_NAME.fullmatch(to.name):
        raise UserError(f"--to: {to.name!r} is no folder name; use letters, digits, '.', '_' and '-'")
    path = to / "experiment.yaml"
    if path.exists():
        raise UserError(f"--to: {path} is there already; choose another folder")
    note = f"Trial {record.number} of the study {summary.name}: {summary.objective} {record.best:.6f}."
    write_text(path, experiment_yaml(study.sweep.trial_settings(record.params).model_copy(update={"note": note})))
    return record
