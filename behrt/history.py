"""What does a run leave in its experiment folder?

`experiments/<name>/` holds the settings (`experiment.yaml`, committed) and, ignored by git, what the latest run left:
`run.json`, `logs/metrics_history.json`, `plots/`, `checkpoints/`. This history is the source of truth; the tracking
store is fed from it. A new run moves the former one to `earlier/<run id>/`: nothing is overwritten.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from behrt.config import UserError
from behrt.files import write_json, write_text

EPOCH_FIGURES = (
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "train_loss_running",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "epoch_seconds",
)
"""Figures of each epoch, under the names that the history and the tracking store share."""

LEFT_BY_A_RUN = ("run.json", "logs", "plots", "checkpoints", "diagnosis.json", "diagnosis.md")


@dataclass(frozen=True)
class Baselines:
    """The lines that a loss curve is read against, in nats, and the accuracies that go with them.

    Attributes:
        chance_loss: ln(vocabulary size), the loss of a uniform guess.
        unigram_loss, unigram_accuracy: of the training frequencies, on the validation masks.
        floor_loss, floor_accuracy: of the best possible prediction on the validation masks; None on real records.
        floor_masked_loss: the floor where `[MASK]` is shown, the other fifth of the scored tokens left out.
    """

    chance_loss: float
    unigram_loss: float
    unigram_accuracy: float
    floor_loss: float | None = None
    floor_accuracy: float | None = None
    floor_masked_loss: float | None = None

    def figures(self) -> dict[str, float]:
        """The known ones by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch, in the figures that are tracked.

    Attributes:
        train_loss, train_accuracy: in evaluation mode, on fixed masks of a fixed sample of the training patients.
        val_loss, val_accuracy: in evaluation mode, on the fixed validation masks.
        train_loss_running: mean over the epoch's own steps, dropout on.
        learning_rate: of the last step.
        gradient_norm: mean L2 norm over the steps, before clipping.
        tokens_per_second: real tokens (no padding) over the time of the training steps.
        epoch_seconds: evaluation included.
        is_best: lowest `val_loss` so far, by at least the minimum delta.
        epochs_without_improvement: against the patience.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    train_loss_running: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    epoch_seconds: float
    is_best: bool
    epochs_without_improvement: int

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.train_loss, self.val_loss, self.train_loss_running, self.gradient_norm)))


class RunFolder:
    """The folder of one experiment, while a run writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.history_file = path / "logs" / "metrics_history.json"
        self.run_file = path / "run.json"
        self.experiment_file = path / "experiment.yaml"
        self._history: dict[str, list[dict[str, Any]]] = {}

    def begin(self, experiment_yaml: str) -> None:
        """Makes room: the former run goes to `earlier/`; `experiment.yaml` is written where there is none."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; an experiment needs a folder, choose another with --out")
        if any((self.path / name).exists() for name in LEFT_BY_A_RUN):
            earlier = self.path / "earlier" / self._name_of_former_run()
            earlier.mkdir(parents=True)
            for name in LEFT_BY_A_RUN:
                if (self.path / name).exists():
                    (self.path / name).replace(earlier / name)
        if not self.experiment_file.exists():
            write_text(self.experiment_file, experiment_yaml)

    def add_epoch(self, record: EpochRecord) -> None:
        """Appends one epoch and rewrites the history atomically."""
        for name in EPOCH_FIGURES:
            value = getattr(record, name)
            # JSON has no NaN; null keeps the epoch in its place and every reader working
            self._history.setdefault(name, []).append(
                {"epoch": record.epoch, "value": value if math.isfinite(value) else None}
            )
        write_json(self.history_file, self._history)

    @property
    def history(self) -> Mapping[str, list[dict[str, Any]]]:
        """`{"train_loss": [{"epoch": 1, "value": 6.9}, …], …}`."""
        return self._history

    def write_run(self, **fields: Any) -> None:
        """Rewrites `run.json`."""
        write_json(self.run_file, fields)

    def _name_of_former_run(self) -> str:
        """The run's id, or a number where it left none; never one that is taken."""
        taken = {path.name for path in (self.path / "earlier").glob("*")}
        run_id = read_run(self.path).get("run_id") if self.run_file.exists() else None
        name = run_id if isinstance(run_id, str) and run_id.isalnum() else "run"
        candidates = (name if number == 0 else f"{name}-{number}" for number in range(len(taken) + 1))
        return next(candidate for candidate in candidates if candidate not in taken)


def read_run(folder: Path) -> dict[str, Any]:
    """The `run.json` of an experiment folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {folder} holds no run") from None
    except (OSError, ValueError):
        raise UserError(f"{path}: is damaged; expected the JSON that a run leaves") from None
    if not isinstance(run, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(run).__name__}")
    return run


def read_history(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics history of an experiment folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = folder / "logs" / "metrics_history.json"
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {folder} holds no run") from None
    except (OSError, ValueError):
        raise UserError(f"{path}: is damaged; expected the JSON that a run leaves") from None
    assert isinstance(history, dict)
    return history
