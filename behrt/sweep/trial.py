"""How is one trial of a study trained?

A trial is a run like any other, with a folder and an MLflow run of its own. Each epoch it reports its objective, on
validation masks that all trials share, and asks whether it is worth another epoch. Early stopping is the run's own;
pruning is the study's; both are recorded as what they are.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from behrt.checkpoints import drop_training
from behrt.config import ExperimentSettings, UserError
from behrt.history import EpochRecord, RunFolder, read_run
from behrt.pretrain import pretrain
from behrt.records import RecordsCache
from behrt.resume import Attempt, find_attempt
from behrt.run_report import Listener, RunResult, RunStart, StudyTrial
from behrt.stopper import Stopper
from behrt.sweep.space import suggest
from behrt.sweep.storage import StorageLost
from behrt.sweep.study import Report, SweepStudy
from behrt.sweep.trials import (
    ALL_EPOCHS,
    BEST_EPOCH,
    CONTINUED_FROM,
    ERROR,
    FOLDER,
    INTERRUPTED,
    OUT_OF_MEMORY,
    PARENT_RUN_ID,
    PATIENCE,
    PRUNED,
    RUN_ID,
    SEED,
    TrialState,
    attempts,
)
from behrt.tracking import StoreUnavailable

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
        if start.run_id is not None:  # else once MLflow has answered
            self._study.set_attributes(self._trial, {RUN_ID: start.run_id})

    def went_on(self, epochs: Sequence[EpochRecord]) -> None:
        # cut off between checkpoint and report, the attempt left an epoch of which the study hears here first
        records = {record.number: record for record in self._study.records()}
        earlier = [record.epochs for record in attempts(records, self._trial.number)][1:]
        self._study.set_attributes(self._trial, {CONTINUED_FROM: min(len(epochs), max(earlier, default=0))})
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
    stopper: Stopper,
) -> None:
    """Trains the trial and tells the study what came of it.

    Args:
        folder: the study's folder; the trial's own is below it.
        stopper: raises `KeyboardInterrupt` on a signal, around the training alone.

    Raises:
        KeyboardInterrupt: passed on, after the study was told that the trial is to be continued.
        UserError: the trial is to be continued, too: storage, tracking store or disk do not serve, and would not serve
            the next trial either.
    """
    try:
        settings = study.sweep.trial_settings(suggest(trial, study.sweep.space))
        trial_folder = folder.absolute() / "trials" / f"{trial.number:04d}"
        study.set_attributes(trial, {FOLDER: str(trial_folder), SEED: settings.training.seed})
        attempt = _attempt_to_continue(study, trial, settings)
        with stopper.interrupting():
            result = pretrain(
                settings,
                experiment=study.sweep.name,
                folder=trial_folder,
                listener=TrialListener(study, trial),
                records_cache=records_cache,
                trial=StudyTrial(study_run_id=study.noted(PARENT_RUN_ID), number=trial.number),
                attempt=attempt,
                stopper=stopper,
            )
    except (KeyboardInterrupt, StorageLost, StoreUnavailable):
        study.tell(trial, TrialState.FAILED, None, ended=INTERRUPTED)
        raise
    except OSError as error:  # the disk is full, above all
        study.tell(trial, TrialState.FAILED, None, ended=INTERRUPTED)
        raise UserError(
            f"{folder}: cannot be written to: {error.strerror or error}; run the same command again then"
        ) from error
    except TakenOver:
        log.warning("trial %d: another worker continues it; what this one trained is dropped", trial.number)
    except UserError as error:
        study.tell(trial, TrialState.FAILED, None, ended=f"{ERROR}{error}")
    except Exception as error:
        log.exception("trial %d failed", trial.number)
        study.tell(trial, TrialState.FAILED, None, ended=f"{ERROR}{type(error).__name__}")
    else:
        attributes: dict[str, Any] = {} if result.best is None else {BEST_EPOCH: result.best.epoch}
        attributes |= {} if result.run_id is None else {RUN_ID: result.run_id}
        value = getattr(result.best, study.sweep.objective) if result.outcome == "COMPLETE" else None
        study.tell(trial, TrialState(result.outcome), value, ended=why_it_ended(result), **attributes)
        # not before: a worker that dies on the way leaves a trial that can go on
        checkpoints = RunFolder(trial_folder).checkpoints
        drop_training(checkpoints / "last")
        shutil.rmtree(checkpoints / "previous", ignore_errors=True)


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


def _attempt_to_continue(study: SweepStudy, trial: optuna.Trial, settings: ExperimentSettings) -> Attempt | None:
    """The latest attempt that left a state to go on from, of those that this trial continues."""
    records = {record.number: record for record in study.records()}
    for record in attempts(records, trial.number):
        if record.number == trial.number or record.folder is None:
            continue
        folder = Path(record.folder)
        try:
            attempt = find_attempt(folder, settings)
            its_trial = {"study_run_id": study.noted(PARENT_RUN_ID), "number": record.number}
            if attempt is not None and read_run(folder)["trial"] == its_trial:
                return attempt
        except (UserError, KeyError) as error:  # as of a worker that died while it wrote; one before may do
            log.warning("trial %d does not go on from trial %d: %s", trial.number, record.number, error)
    return None
