"""What may change of a run that goes on where it was cut off?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from behrt.config import ExperimentSettings, UserError
from behrt.feeding import TrackingRecord
from behrt.resume import Attempt
from behrt.sequences import PreparedData
from behrt.trainer import learning_rate_at

MAY_CHANGE = (
    "training.epochs",
    "training.early_stopping_patience",
    "training.device",
    "training.compile",
    "training.checkpoint_minutes",
    "training.recover",
    "training.stop_on",
    "data.data",
    "task.labels",
)
"""Settings that a run may go on with another value of; records and labels from another place must be the same ones."""


def changes_of(
    attempt: Attempt | None, settings: ExperimentSettings, data: PreparedData, *, labels_digest: str | None = None
) -> list[str]:
    """What changes for a run that goes on in its own folder, in sentences; `UserError` for what must not."""
    if attempt is None or not attempt.in_place:
        return []
    changes = check_changes(attempt, settings)
    if attempt.state is not None and attempt.state.dataset_digest != data.digest:
        raise UserError(f"--resume {attempt.folder}: {data.folder} holds other records than the run was begun with")
    begun_on = None if attempt.state is None else attempt.state.labels_digest
    if begun_on is not None and begun_on != labels_digest:
        raise UserError(f"--resume {attempt.folder}: --labels holds other labels than the run was begun with")
    return changes


def check_changes(attempt: Attempt, settings: ExperimentSettings) -> list[str]:
    """What changes for a run that goes on with these settings, in sentences.

    Raises:
        UserError: something changes that must not; or nothing is left to train.
    """
    before, after = attempt.settings.flat(), settings.flat()
    changed = [name for name in before if before[name] != after[name]]
    forbidden = [name for name in changed if name not in MAY_CHANGE]
    if forbidden:
        differences = ", ".join(f"{name} {_shown(before[name])} -> {_shown(after[name])}" for name in forbidden)
        allowed = ", ".join(flag_of(name) for name in MAY_CHANGE if name in before)
        raise UserError(
            f"--resume {attempt.folder}: the run was begun with other settings: {differences}; leave these out, or "
            f"train a new run with them (a run may go on with another {allowed})"
        )
    if attempt.state is not None and has_finished(attempt.folder):
        patience = settings.training.early_stopping_patience
        waited = attempt.epochs[-1].epochs_without_improvement if attempt.epochs else 0
        if len(attempt.epochs) >= settings.training.epochs:
            raise UserError(
                f"--resume {attempt.folder}: all {len(attempt.epochs)} epochs are trained; for more of them say "
                f"--epochs {2 * len(attempt.epochs)}"
            )
        if 0 < patience <= waited:
            raise UserError(
                f"--resume {attempt.folder}: patience is spent ({waited} epochs without a "
                "better val_loss); to train on, raise --early-stopping-patience"
            )
    sentences = [f"{name} {_shown(before[name])} -> {_shown(after[name])}" for name in changed]
    if "training.epochs" in changed:
        sentences.append(schedule_change(attempt, settings))
    return sentences


def has_finished(folder: Path) -> bool:
    """Whether the run came to its end; one that was killed after its last epoch still has to."""
    try:
        return TrackingRecord.load(folder).status == "FINISHED"
    except UserError:
        return False


def flag_of(name: str) -> str:
    return "--" + name.partition(".")[2].replace("_", "-")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def schedule_change(attempt: Attempt, settings: ExperimentSettings) -> str:
    """What another number of epochs does to the learning rate of the next epoch."""
    before, after = attempt.settings.training, settings.training
    done = len(attempt.epochs)
    # the schedule depends on the share of all steps alone: epochs of 1000 steps say the same as those of the run
    rates = [
        learning_rate_at(min(done, training.epochs) * 1000, training.epochs * 1000, training)
        for training in (before, after)
    ]
    if rates[0] == rates[1]:
        return f"the {after.schedule} schedule gives epoch {done + 1} the learning rate that it would have had"
    return (
        f"the {after.schedule} schedule is that of {after.epochs} epochs from here on: the learning rate after epoch "
        f"{done} is {rates[1]:.3g} instead of {rates[0]:.3g}, so that the run is not the one that "
        f"{after.epochs} epochs from the start would have been"
    )
