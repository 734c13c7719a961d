"""When is what of a training run kept on disk, so that it can go on from there?

After every epoch, every so many minutes inside one, and when somebody asks the run to end. The checkpoint comes first
and holds the history; `logs/metrics_history.json` follows it, and MLflow follows that: whatever is told of a run
can be gone on from.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from behrt.config import UserError
from behrt.feeder import Feeder
from behrt.history import EpochRecord, RunFolder
from behrt.ranks import ALONE, Ranks
from behrt.resume import Attempt, TrainingState, best_of, find_attempt, go_on, history_of, state_to_keep
from behrt.run_report import RunStart
from behrt.stopper import Stopper
from behrt.tasks.finetuned import load_saved
from behrt.trainer import Position, Trainer

MOST_RECOVERIES = 2
RATE_AFTER_RECOVERY = 0.1


class Keeper:
    """Keeps the checkpoints of one run, and goes back to them.

    Args:
        save: `save_checkpoint` of this run; called with a folder and what differs from one checkpoint to the next.
        ranks: that train together; the first one keeps what they train, and all go on from there.

    Attributes:
        epochs: that are done.
        recoveries: how often the run went back to a checkpoint because a loss was no number.
    """

    def __init__(
        self,
        run_folder: RunFolder,
        start: RunStart,
        *,
        save: Callable[..., None],
        feeder: Feeder,
        stopper: Stopper,
        ranks: Ranks = ALONE,
    ) -> None:
        self.epochs: list[EpochRecord] = []
        self.recoveries = 0
        self.trainer: Trainer[Any] | None = None
        self._folder = run_folder
        self._start = start
        self._save = save
        self._feeder = feeder
        self._stopper = stopper
        self._ranks = ranks
        if not ranks.is_alone:
            ranks.notice = lambda: stopper.urgency
        self._seconds_between = 60 * start.settings.training.checkpoint_minutes
        self._kept_at = self._mirrored_at = time.monotonic()

    @property
    def last(self) -> Path:
        return self._folder.checkpoints / "last"

    @property
    def best(self) -> Path:
        return self._folder.checkpoints / "best"

    def begin(self, attempt: Attempt | None, model: nn.Module) -> None:
        """Stands where the attempt was cut off; without one, keeps the untrained model."""
        with self._ranks.together():
            if self._ranks.is_first:
                self._begin(attempt, model)
        self._stand_as_first()

    def _stand_as_first(self) -> None:
        """All ranks stand where the first one has gone."""
        assert self.trainer is not None
        self.epochs = self.trainer.stand_as_first(self.epochs)
        self.recoveries = self._ranks.broadcast(self.recoveries)

    def _begin(self, attempt: Attempt | None, model: nn.Module) -> None:
        assert self.trainer is not None
        if attempt is None or attempt.checkpoint is None:
            self.keep()
            return
        assert attempt.state is not None
        self.epochs = list(attempt.epochs)
        self.recoveries = attempt.state.recoveries
        go_on(attempt, model, self.trainer)
        self._drop_damaged(attempt)
        if not attempt.in_place or attempt.settings != self._start.settings:
            self.keep()
        self._keep_best_again(model)
        self._folder.set_history(self.epochs)

    def _keep_best_again(self, model: nn.Module) -> None:
        """Writes the best checkpoint anew where the one that is there is another epoch's, or damaged."""
        best = best_of(self.epochs)
        if best is None:
            return
        with suppress(UserError):
            if load_saved(self.best).epoch == best.epoch:
                return
        assert self.trainer is not None
        trained = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        self.trainer.restore_best()
        self._save(self.best, model=model, epoch=best.epoch)
        model.load_state_dict(trained, strict=False)

    def _drop_damaged(self, attempt: Attempt) -> None:
        """Where the last checkpoint did not serve, the one before it must not make room for it."""
        assert attempt.checkpoint is not None
        if attempt.checkpoint == self.last.with_name("previous"):
            shutil.rmtree(self.last, ignore_errors=True)

    def pause(self) -> None:
        """Keeps the training where it is, when it is time for that or it is to end; and lets it end.

        Ranks end at the same pause, whichever of them was asked to.
        """
        urgency = self._stopper.urgency if self._ranks.is_alone else self._ranks.noticed
        if urgency:
            self._stopper.ask(urgency)
            self.keep()
            self._stopper.pause()
        elif time.monotonic() > self._kept_at + self._seconds_between:
            self.keep()

    def keep(self) -> None:
        """The checkpoint of this moment; the one before it stays. Weights that are no numbers are left out."""
        assert self.trainer is not None
        if not self._ranks.is_first:
            return
        position = self.trainer.position()
        if position.is_finite:
            with self._stopper.held():
                self._write(position)
            self._mirror()
        self._kept_at = time.monotonic()

    def _write(self, position: Position) -> None:
        assert self.trainer is not None
        state = self._state(position)
        self._save(
            self.last,
            model=self.trainer.model,
            epoch=len(self.epochs),
            training=state_to_keep(self.trainer, best_of(self.epochs), state),
            former_to=self.last.with_name("previous"),
        )

    def _state(self, position: Position) -> TrainingState:
        assert self.trainer is not None
        start = self._start
        return TrainingState(
            key=start.key,
            run_id=self._feeder.run_id,
            experiment=start.experiment,
            settings=start.settings.model_dump(mode="json"),
            dataset_digest=start.dataset["digest"],
            history=history_of(self.epochs),
            position=vars(position),
            accumulation_steps=self.trainer.accumulation_steps,
            rate_factor=self.trainer.rate_factor,
            recoveries=self.recoveries,
            precision=start.precision,
            labels_digest=None if start.task is None else start.task["labels_digest"],
        )

    def _mirror(self) -> None:
        """Has MLflow take a copy, as often as checkpoints are kept inside an epoch; but not of a trial."""
        if self._start.trial is None and time.monotonic() > self._mirrored_at + self._seconds_between:
            self._feeder.mirror(self.last)
            self._mirrored_at = time.monotonic()

    def add_epoch(self, record: EpochRecord) -> None:
        """Keeps an epoch: its checkpoints, then its place in the history. Of one that is no number, only the latter."""
        assert self.trainer is not None
        with self._stopper.held():
            if record.is_finite:
                self.epochs.append(record)
                self.keep()
                if record.is_best and self._ranks.is_first:
                    self._save(self.best, model=self.trainer.model, epoch=record.epoch)
            self._folder.add_epoch(record)

    def can_recover(self, record: EpochRecord) -> bool:
        """Whether an epoch is lost, and the run may go back and try again."""
        allowed = self._start.settings.training.recover and self.recoveries < MOST_RECOVERIES
        return allowed and not record.is_finite

    def recover(self, model: nn.Module) -> EpochRecord | None:
        """Goes back to the last checkpoint, with a tenth of the learning rate; the last epoch that is done there."""
        with self._ranks.together():
            if self._ranks.is_first:
                self._recover(model)
        self._stand_as_first()
        return self.epochs[-1] if self.epochs else None

    def _recover(self, model: nn.Module) -> None:
        assert self.trainer is not None
        attempt = find_attempt(self._folder.path, self._start.settings)
        assert attempt is not None, "a run that trains has a checkpoint"
        self.recoveries += 1
        self.epochs = list(attempt.epochs)
        rate_factor = self.trainer.rate_factor * RATE_AFTER_RECOVERY
        self.trainer.optimizer.state.clear()  # a checkpoint of before the first step brings no state to replace it
        go_on(attempt, model, self.trainer)
        self._drop_damaged(attempt)
        self.trainer.rate_factor = rate_factor
        self._folder.set_history(self.epochs)
        self.keep()
