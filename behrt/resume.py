"""How does a training go on where it was cut off?

A checkpoint from which it can go on holds the weights, the optimizer's state, the weights of the best epoch, and a
`TrainingState`. Order, windows, masks, dropout and learning rate of a step are functions of (seed, epoch, step), so
that no state of a random generator is among them, and a training that goes on is bit for bit the uninterrupted one.
The last two checkpoints are kept: one that was cut short or changed is passed over for the one before it.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from behrt.checkpoints import (
    STATE_FILE,
    Training,
    read_best_weights,
    read_training_state,
    restore_checkpoint,
)
from behrt.config import (
    ExperimentSettings,
    FinetuneSettings,
    TrainingSettings,
    UserError,
    read_experiment_file,
    settings_of_run,
)
from behrt.feeding import MIRRORS, RESUME_ARTIFACTS, TrackingRecord, new_record
from behrt.history import EPOCH_FIGURES, EpochRecord, RunFolder, finite
from behrt.runs import find_local_run, is_run_id
from behrt.tasks.finetuned import load_saved
from behrt.tracking import download_artifacts, shown_uri
from behrt.trainer import EarlyStopping, Position, Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a training that goes on has to know beside weights and optimizer.

    Attributes:
        key, run_id, experiment: of the run, its own id and MLflow's.
        settings: nested, as in `experiment.yaml`.
        dataset_digest: of the prepared records.
        history: of the epochs that are done.
        position: inside the epoch that comes after them.
        accumulation_steps: in use; doubled wherever memory ran out.
        rate_factor: by which the schedule's rates are multiplied; `recoveries`, how often it was lowered.
        labels_digest: of a fine-tuning, of the labels that it trains and stops on.
        precision: "bf16" or "fp32", that `auto` came to; None in checkpoints that do not say.
    """

    key: str
    run_id: str | None
    experiment: str
    settings: Mapping[str, Any]
    dataset_digest: str
    history: Mapping[str, Sequence[Mapping[str, Any]]]
    position: Mapping[str, Any]
    accumulation_steps: int
    rate_factor: float
    recoveries: int
    precision: str | None = None
    labels_digest: str | None = None

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = finite(asdict(self))
        return values


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What an attempt left: its folder, and the checkpoint to go on from; None where it was cut off before the first.

    Attributes:
        settings: it ran with.
        epochs: that are done at the checkpoint.
        in_place: whether the run goes on in `folder` itself, under its own id.
    """

    folder: Path
    settings: ExperimentSettings
    checkpoint: Path | None = None
    state: TrainingState | None = None
    epochs: tuple[EpochRecord, ...] = ()
    in_place: bool = False

    def progress(self) -> tuple[int, int, int]:
        """What grows as a run goes on: one that recovers goes back to an earlier position."""
        recoveries = 0 if self.state is None else self.state.recoveries
        return recoveries, self.position.epoch, self.position.step

    @property
    def position(self) -> Position:
        return Position() if self.state is None else Position(**self.state.position)


def find_attempt(folder: Path, settings: ExperimentSettings) -> Attempt | None:
    """The attempt in `folder`; None where it left nothing to go on from.

    Raises:
        UserError: it had other settings, or left damaged files.
    """
    attempt = _attempt_in(folder, settings)
    if attempt is None:
        return None
    differing = [name for name, value in attempt.settings.flat().items() if settings.flat()[name] != value]
    if differing:
        raise UserError(f"{folder}: was trained with another {differing[0]}; it cannot go on with these settings")
    return attempt


def _attempt_in(folder: Path, settings: ExperimentSettings | None) -> Attempt | None:
    """The attempt at the latest checkpoint that is whole, with the patience that `settings` (its own, if None) have.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """
    checkpoints = RunFolder(folder).checkpoints
    places = [checkpoints / name for name in ("last", "previous") if (checkpoints / name).is_dir()]
    if not any((place / STATE_FILE).exists() for place in places):
        return None
    why_not: list[str] = []
    for place in places:
        try:
            attempt = read_attempt(folder, place, settings)
        except UserError as error:
            why_not.append(str(error))
            continue
        if why_not:
            log.warning("%s; the run goes on from the checkpoint before it", why_not[0])
        return attempt
    raise UserError(f"{folder}: has no checkpoint to go on from: {'; '.join(why_not)}")


def read_attempt(folder: Path, checkpoint: Path, settings: ExperimentSettings | None = None) -> Attempt:
    """The attempt at one checkpoint.

    Raises:
        UserError: it is not whole.
    """
    values = read_training_state(checkpoint)
    load_saved(checkpoint)
    try:
        state = TrainingState(**values)
        own = settings_of_run(state.settings, where=str(checkpoint / STATE_FILE))
        epochs = tuple(epoch_records(state.history, (settings or own).training))
        attempt = Attempt(folder=folder, settings=own, checkpoint=checkpoint, state=state, epochs=epochs)
        if attempt.position.epoch != len(epochs) + 1:
            raise ValueError
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{checkpoint / STATE_FILE}: is damaged; choose another checkpoint") from None
    return attempt


def as_it_is_now(attempt: Attempt, settings: ExperimentSettings) -> Attempt:
    """The attempt, read again by whoever holds its folder: another process may have gone on with it meanwhile.

    Raises:
        UserError: it was another process's, and is not what it was.
    """
    if attempt.in_place:
        found = _attempt_in(attempt.folder, settings)
        return attempt if found is None else replace(found, in_place=True)
    assert attempt.checkpoint is not None
    if attempt.state != TrainingState(**read_training_state(attempt.checkpoint)):
        raise UserError(f"{attempt.folder}: another process goes on with it")
    return attempt


def attempt_to_resume(
    target: str, download_to: Callable[[TrainingState], Path], *, kind: type[ExperimentSettings] = ExperimentSettings
) -> Attempt:
    """The attempt that `--resume TARGET` goes on with, in its own folder.

    Args:
        target: the folder of a run, or an MLflow run id; of one whose folder is gone, the checkpoint comes from MLflow.
        download_to: the folder in which such a run goes on.
        kind: of its settings: those of a pre-training, or of a fine-tuning.

    Raises:
        UserError: there is no such run of this kind, or nothing to go on from.
    """
    folder: Path | None = Path(target)
    if not Path(target).is_dir():
        if not is_run_id(target):
            raise UserError(f"--resume: {target}: no such folder, and not an MLflow run id (32 hexadecimal digits)")
        folder = find_local_run(target)
    if folder is None:
        return _attempt_from_mlflow(target, download_to, kind)
    try:
        attempt = _attempt_in(folder, None)
    except UserError as error:
        raise UserError(f"--resume: {error}") from None
    record = TrackingRecord.load(folder)  # refuses a folder that holds no run at all
    if "trial_state" in record.tags:
        raise UserError(f"--resume: {folder}: is a trial of a study; behrt sweep run goes on with the study")
    if attempt is None and record.status != "RUNNING" and RunFolder(folder).history_file.exists():
        raise UserError(
            f"--resume: {folder}: has epochs in its history and no checkpoint to go on from; MLflow may have one: move "
            f"the folder away, and name the run by its id, {record.run_id or 'which it never got'}"
        )
    if attempt is None:
        file = RunFolder(folder).settings_file
        attempt = Attempt(folder=folder, settings=settings_of_run(read_experiment_file(file), where=str(file)))
    _check_kind(attempt, kind, target)
    return replace(attempt, in_place=True)


def _check_kind(attempt: Attempt, kind: type[ExperimentSettings], target: str) -> None:
    """`UserError` for a run of the other recipe."""
    if type(attempt.settings) is not kind:
        what, command = ("pre-training", "train") if kind is FinetuneSettings else ("fine-tuning", "finetune")
        raise UserError(f"--resume: {target}: is a {what}; behrt {command} --resume goes on with it")


def _attempt_from_mlflow(
    run_id: str, download_to: Callable[[TrainingState], Path], kind: type[ExperimentSettings]
) -> Attempt:
    """Brings the latest whole checkpoint of a run from MLflow into a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="behrt-resume-") as scratch:
        if not download_artifacts(run_id, RESUME_ARTIFACTS, Path(scratch)):
            raise UserError(
                f"--resume: {run_id}: no folder here holds it, and MLflow has no checkpoint of it to go on from "
                "(of a run that finished, none is kept there)"
            )
        found: list[Attempt] = []
        why_not: list[str] = []
        for mirror in MIRRORS:
            try:
                found.append(read_attempt(Path(scratch), Path(scratch, RESUME_ARTIFACTS, mirror)))
            except UserError as error:
                why_not.append(str(error))
        if not found:
            raise UserError(f"--resume: {run_id}: no checkpoint in MLflow is whole: {'; '.join(why_not)}")
        latest = max(found, key=Attempt.progress)
        assert latest.state is not None
        assert latest.checkpoint is not None
        _check_kind(latest, kind, run_id)
        folder = download_to(latest.state)
        run_folder = RunFolder(folder)
        run_folder.claim()
        try:
            run_folder.take_in(latest.checkpoint, latest.state.history, latest.state.settings)
            new_record(
                experiment=latest.state.experiment,
                params=latest.settings.flat(),
                key=latest.state.key,
                run_id=run_id,
                store=shown_uri(),
                status="KILLED",
            ).save(folder)
        finally:
            run_folder.release()
    return replace(read_attempt(folder, run_folder.checkpoints / "last"), in_place=True)


def epoch_records(history: Mapping[str, Sequence[Mapping[str, Any]]], training: TrainingSettings) -> list[EpochRecord]:
    """The epochs of a history of our own, with what patience made of them."""
    stopping = EarlyStopping(training.early_stopping_patience, training.early_stopping_min_delta)
    records = []
    for number in range(len(history.get("val_loss", ()))):
        values = {name: history[name][number]["value"] for name in EPOCH_FIGURES}
        figures = {name: math.nan if value is None else value for name, value in values.items()}
        is_best = stopping.update(figures["val_loss"])
        records.append(
            EpochRecord(
                epoch=history["val_loss"][number]["epoch"],
                **figures,
                is_best=is_best,
                epochs_without_improvement=stopping.epochs_without_improvement,
            )
        )
    return records


def best_of(epochs: Sequence[EpochRecord]) -> EpochRecord | None:
    """The best epoch so far; None where no loss was finite."""
    return next((record for record in reversed(epochs) if record.is_best), None)


def state_to_keep(trainer: Trainer[Any], best: EpochRecord | None, state: TrainingState) -> Training:
    """What a checkpoint holds beside the weights, as the trainer stands now."""
    position = Position(**state.position)
    is_best_itself = best is not None and best.epoch == position.epoch - 1 and position.step == 0
    best_weights = {} if best is None or is_best_itself else trainer.best_weights
    return Training(optimizer=trainer.optimizer, best_weights=best_weights, state=state.as_dict())


def go_on(attempt: Attempt, model: nn.Module, trainer: Trainer[Any]) -> None:
    """Puts model and trainer to where the attempt's checkpoint was saved."""
    assert attempt.checkpoint is not None
    assert attempt.state is not None
    restore_checkpoint(attempt.checkpoint, load_saved(attempt.checkpoint).model, model, trainer.optimizer)
    trainer.accumulation_steps = attempt.state.accumulation_steps
    trainer.rate_factor = attempt.state.rate_factor
    trainer.best_weights = read_best_weights(attempt.checkpoint)
    if not trainer.best_weights and best_of(attempt.epochs) is not None:
        trainer.keep_as_best()
    trainer.go_on(attempt.epochs, attempt.position)


def history_of(epochs: Sequence[EpochRecord]) -> dict[str, list[dict[str, Any]]]:
    """The epochs in the form of `metrics_history.json`; what `epoch_records` reads back."""
    return {
        name: [{"epoch": record.epoch, "value": finite(record.figures()[name])} for record in epochs]
        for name in EPOCH_FIGURES
    }
