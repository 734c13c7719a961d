"""How does a run go on where an earlier attempt at it was cut off?

After every epoch the weights, the optimizer's state and the history are on the disk. Everything else that an epoch
depends on (order, windows, masks, dropout, learning rate) is a function of seed, epoch and step, so that an attempt
that goes on gives what the uninterrupted one would have given. Of an epoch that was cut off nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from behrt.batches import PackedBatch
from behrt.checkpoints import OPTIMIZER_FILE, restore_checkpoint
from behrt.config import ExperimentSettings, TrainingSettings, UserError, load_experiment
from behrt.files import read_json
from behrt.history import EPOCH_FIGURES, EpochRecord, RunFolder, read_history
from behrt.model import BEHRTForMaskedLM
from behrt.runs import load_base_again
from behrt.trainer import EarlyStopping, Trainer


@dataclass(frozen=True)
class Attempt:
    """What an attempt left: its folder, and the epochs up to its last checkpoint (at least one)."""

    folder: Path
    epochs: tuple[EpochRecord, ...]


def find_attempt(folder: Path, settings: ExperimentSettings) -> Attempt | None:
    """The attempt in `folder`; None where it left nothing to go on from.

    Raises:
        UserError: it had other settings, or left damaged files.
    """
    left = RunFolder(folder)
    last = left.checkpoints / "last"
    if not (last / OPTIMIZER_FILE).exists():
        return None
    former = load_experiment(left.settings_file)
    differing = [name for name, value in former.flat().items() if settings.flat()[name] != value]
    if differing:
        raise UserError(f"{folder}: was trained with another {differing[0]}; it cannot go on with these settings")
    epochs = epoch_records(read_history(folder), settings.training)
    done = read_json(last / "checkpoint.json", missing=f"{folder} holds no checkpoint").get("epoch")
    if not isinstance(done, int) or not 1 <= done <= len(epochs):
        raise UserError(f"{folder}: is damaged; its history does not reach its last checkpoint")
    return Attempt(folder, tuple(epochs[:done]))


def epoch_records(history: Mapping[str, Sequence[Mapping[str, Any]]], training: TrainingSettings) -> list[EpochRecord]:
    """The epochs of a history of our own, with what patience made of them."""
    stopping = EarlyStopping(training.early_stopping_patience, training.early_stopping_min_delta)
    records = []
    for number in range(len(history["val_loss"])):
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


def go_on(
    attempt: Attempt,
    run_folder: RunFolder,
    model: BEHRTForMaskedLM,
    trainer: Trainer[PackedBatch],
    keep: Callable[..., None],
) -> None:
    """Puts model and trainer to where the attempt's last checkpoint was saved, and its epochs and checkpoints into
    `run_folder`; `keep` saves the model as a checkpoint."""
    run_folder.take_over(attempt.folder, attempt.epochs)
    last, best = run_folder.checkpoints / "last", run_folder.checkpoints / "best"
    best_epoch = best_of(attempt.epochs)
    if best_epoch is not None and best_epoch.epoch < attempt.epochs[-1].epoch:
        restore_checkpoint(best, model, load_base=load_base_again)
        trainer.keep_as_best()
    restore_checkpoint(last, model, trainer.optimizer, load_base=load_base_again)
    if best_epoch is attempt.epochs[-1]:  # the attempt may have ended before it could save these weights as its best
        trainer.keep_as_best()
        keep(best, epoch=best_epoch.epoch)
    trainer.go_on_after(attempt.epochs)
