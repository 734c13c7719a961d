"""Runs that are cut off, and what of them has to be as if they had not been."""

from behrt.history import EpochRecord
from behrt.run_report import Listener

SAME = ("train_loss", "val_loss", "val_accuracy", "gradient_norm", "train_loss_running", "learning_rate")
"""Figures of an epoch that do not depend on the time that it took."""


class CutOff(Listener):
    """Ends a run after an epoch, or after so many steps, as an unforeseen error would."""

    def __init__(self, after: int | None, *, steps: int | None = None) -> None:
        self._after = after
        self._steps = steps

    def epoch(self, record: EpochRecord) -> None:
        if record.epoch == self._after:
            raise RuntimeError("cut off")

    def step(self, step: int, steps: int) -> None:
        if self._steps is not None:
            self._steps -= 1
            if self._steps < 0:
                raise RuntimeError("cut off")
