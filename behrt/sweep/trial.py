"""How is one trial of a study trained?

A trial is a run like any other, with a folder and an MLflow run of its own. Each epoch it reports its objective, on
validation masks that all trials share, and asks whether it is worth another epoch. Early stopping is the run's own;
pruning is the study's; both are recorded as what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import optuna

from behrt.checkpoints import OPTIMIZER_FILE
from behrt.config import UserError
from behrt.history import EpochRecord, RunFolder
from behrt.pretrain import pretrain
from behrt.records import RecordsCache
from behrt.run_report import Listener, RunResult, RunStart, StudyTrial
from behrt.sweep.space import suggest
from behrt.sweep.study import Report, SweepStudy
from behrt.sweep.trials import (
    ALL_EPOCHS,
    BEST_EPOCH,
    CONTINUED_FROM,
    FOLDER,
    INTERRUPTED,
    OUT_OF_MEMORY,
    PARENT_RUN_ID,
    PATIENCE,
    PRUNED,
    RUN_ID,
    SEED,
    TrialRecord,
    TrialState,
)

log = logging.getLogger(__name__)


class TakenOver(Exception):
    """Another worker continues the trial: this one was held to be dead, for it was silent for too long."""


class TrialListener(Listener):
    """Tells the study what becomes of the run."""

    def __init__(self, study: SweepStudy, trial: optuna.Trial) -> None:
        self._study = study
        self._trial = trial
        self._report = Report.KEEP

    def started(self, start: RunStart) -> None:
        self._study.set_attributes(self._trial, {RUN_ID: start.run_id})

    def went_on(self, epochs: Sequence[EpochRecord]) -> None:
        self._study.set_attributes(self._trial, {CONTINUED_FROM: len(epochs)})
        for record in epochs:
            self.epoch(record)

    def epoch(self, record: EpochRecord) -> None:
        value = getattr(record, self._study.sweep.objective)
        self._report = self._study.report(self._trial, epoch=record.epoch, value=value)
        if self._report is Report.TAKEN_OVER:
            raise TakenOver

    def prunes(self) -> bool:
        return self._report is Report.PRUNE


def run_trial(
    study: SweepStudy,
    trial: optuna.Trial,
    *,
    folder: Path,
    records_cache: RecordsCache,
    interrupting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Trains the trial and tells the study what came of it.

    Args:
        folder: the study's folder; the trial's own is below it.
        interrupting: where a signal may raise `KeyboardInterrupt`: around the training, not around what is told.

    Raises:
        KeyboardInterrupt: passed on, after the study was told that the trial is to be continued.
    """
    try:
        settings = study.sweep.trial_settings(suggest(trial, study.sweep.space))
        trial_folder = folder / "trials" / f"{trial.number:04d}"
        study.set_attributes(trial, {FOLDER: str(trial_folder), SEED: settings.training.seed})
        continue_from = _folder_to_continue(study, trial)
        with interrupting():
            result = pretrain(
                settings,
                experiment=study.sweep.name,
                folder=trial_folder,
                listener=TrialListener(study, trial),
                records_cache=records_cache,
                trial=StudyTrial(study_run_id=study.noted(PARENT_RUN_ID), number=trial.number),
                continue_from=continue_from,
            )
    except KeyboardInterrupt:
        study.tell(trial, TrialState.FAILED, None, ended=INTERRUPTED)
        raise
    except TakenOver:
        log.warning("trial %d: another worker continues it; what this one trained is dropped", trial.number)
    except UserError as error:
        study.tell(trial, TrialState.FAILED, None, ended=f"error: {error}")
    except Exception as error:
        log.exception("trial %d failed", trial.number)
        study.tell(trial, TrialState.FAILED, None, ended=f"error: {type(error).__name__}")
    else:
        attributes: dict[str, Any] = {} if result.best is None else {BEST_EPOCH: result.best.epoch}
        value = getattr(result.best, study.sweep.objective) if result.outcome == "COMPLETE" else None
        study.tell(trial, TrialState(result.outcome), value, ended=why_it_ended(result), **attributes)


def why_it_ended(result: RunResult) -> str:
    """The reason in the words of `trials`."""
    if result.refused:
        return f"refused: {result.diagnosis.of_severity('error')[0].rule}"
    if result.lost_to is not None:
        is_memory = result.lost_to.rule == "out_of_memory"
        return OUT_OF_MEMORY if is_memory else f"lost: {result.lost_to.rule}"
    if result.pruned:
        return PRUNED
    return PATIENCE if result.stopped_early else ALL_EPOCHS


def _folder_to_continue(study: SweepStudy, trial: optuna.Trial) -> Path | None:
    """The folder of the latest attempt that left a state to go on from, of those that this trial continues."""
    records: Mapping[int, TrialRecord] = {record.number: record for record in study.records()}
    former = records[trial.number].retry_of
    while former is not None:
        record = records[former]
        if record.folder is not None:
            left = RunFolder(Path(record.folder))
            if (left.checkpoints / "last" / OPTIMIZER_FILE).exists():
                return left.path
        former = record.retry_of
    return None
