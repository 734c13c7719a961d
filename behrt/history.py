"""What does a run leave in its experiment folder?

`experiments/<name>/` holds the settings (`experiment.yaml`, committed) and, ignored by git, what the latest run left:
`run.json`, `logs/metrics_history.json`, `plots/`, `checkpoints/`, `evaluation/`. This history is the source of truth;
the tracking store is fed from it. A new run moves the former one to `earlier/<run id>/`: nothing is overwritten.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from behrt.config import UserError
from behrt.files import FolderLock, read_json, remove_half_written, replacing_folder, write_json, write_text

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

LEFT_BY_A_RUN = ("run.json", "logs", "plots", "checkpoints", "evaluation", "diagnosis.json", "diagnosis.md")


@dataclass(frozen=True)
class Baselines:
    """The lines that a loss curve is read against, in nats, and the accuracies that go with them.

    Attributes:
        chance_loss: ln(vocabulary size), the loss of a uniform guess.
        unigram_loss, unigram_accuracy: of the training frequencies, on the validation masks.
        floor_loss, floor_accuracy: of the best possible prediction on the validation masks; None on real records.
        floor_masked_loss: the floor where `[MASK]` is shown, the other fifth of the scored tokens left out.
        copying_loss: of the best predictor that knows the training frequencies and the corruption, and nothing else; a
            model that is not below it has learned nothing of what stands together.
        unigram_masked_loss: of the training frequencies where `[MASK]` is shown.
        cooccurrence_masked_loss: of counting what stands together (`cooccurrence.py`), where `[MASK]` is shown.
        cooccurrence_gain, cooccurrence_gain_low, cooccurrence_gain_high: what that counting gains on the frequencies
            at `[MASK]`, and its 95% limits; with few validation patients over training patients as well, and then not
            the difference of the two losses.
        prevalence_loss, prevalence_accuracy: of a task, whose other lines are NaN: of a prediction that is the same for
            everybody, the share (of survival: the hazards) among the training labels.
    """

    chance_loss: float
    unigram_loss: float
    unigram_accuracy: float
    floor_loss: float | None = None
    floor_accuracy: float | None = None
    floor_masked_loss: float | None = None
    copying_loss: float | None = None
    unigram_masked_loss: float | None = None
    cooccurrence_masked_loss: float | None = None
    cooccurrence_gain: float | None = None
    cooccurrence_gain_low: float | None = None
    cooccurrence_gain_high: float | None = None
    prevalence_loss: float | None = None
    prevalence_accuracy: float | None = None

    def figures(self) -> dict[str, float]:
        """The known ones by name; a mean over no tokens is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None and math.isfinite(value)}


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

    def figures(self) -> dict[str, float]:
        """The figures that are tracked, by name."""
        return {name: getattr(self, name) for name in EPOCH_FIGURES}

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.train_loss, self.val_loss, self.train_loss_running, self.gradient_norm)))


class RunFolder:
    """The folder of one experiment, while a run writes to it.

    Attributes:
        is_kept: whether what a run leaves is kept here.
    """

    is_kept = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self.history_file = path / "logs" / "metrics_history.json"
        self.run_file = path / "run.json"
        self.experiment_file = path / "experiment.yaml"
        self.settings_file = path / "logs" / "settings.yaml"
        self.diagnosis_files = (path / "diagnosis.json", path / "diagnosis.md")
        self._history: dict[str, list[dict[str, Any]]] = {}
        self._former: Path | None = None
        self._is_first = False
        self._lock: FolderLock | None = None

    def claim(self) -> None:
        """Keeps the folder for this run. Raises `UserError` if it is a file, or another process runs in it."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; an experiment needs a folder, choose another with --out")
        self._lock = FolderLock(self.path)

    def begin(self, experiment_yaml: str) -> None:
        """Makes room: the former run goes to `earlier/`.

        The settings of this one stand in `logs/settings.yaml`; where the folder had no `experiment.yaml`, they become
        it.
        """
        if any((self.path / name).exists() for name in LEFT_BY_A_RUN):
            earlier = self.path / "earlier" / self._name_of_former_run()
            earlier.mkdir(parents=True)
            self._former = earlier
            for name in LEFT_BY_A_RUN:
                if (self.path / name).exists():
                    (self.path / name).replace(earlier / name)
        write_text(self.settings_file, experiment_yaml)
        self._is_first = not self.experiment_file.exists()
        if self._is_first:
            write_text(self.experiment_file, experiment_yaml)

    def take_back(self) -> None:
        """Undoes `begin`: the folder is as it was."""
        for name in (*LEFT_BY_A_RUN, *([self.experiment_file.name] if self._is_first else [])):
            left = self.path / name
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
        if self._former is not None:
            for path in self._former.iterdir():
                path.replace(self.path / path.name)
            self._former.rmdir()
            with suppress(OSError):  # it holds other runs
                self._former.parent.rmdir()

    def release(self) -> None:
        """Lets the folder go."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def add_epoch(self, record: EpochRecord) -> None:
        """Appends one epoch and rewrites the history atomically."""
        self._append(record)
        write_json(self.history_file, self._history)

    def set_history(self, epochs: Sequence[EpochRecord]) -> None:
        """The history is that of these epochs, and no more."""
        self._history = {}
        for record in epochs:
            self._append(record)
        write_json(self.history_file, self._history)

    def take_in(self, checkpoint: Path, history: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Becomes the folder of a run that was elsewhere, as it stood at a checkpoint; a former run goes to
        `earlier/`."""
        self.begin(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
        write_json(self.history_file, history)
        with replacing_folder(self.checkpoints / "last") as beside:
            shutil.copytree(checkpoint, beside, dirs_exist_ok=True)

    def go_on(self, experiment_yaml: str) -> None:
        """The run that is here goes on, with settings of which some may have changed."""
        write_text(self.settings_file, experiment_yaml)
        remove_half_written(self.checkpoints)

    @property
    def history(self) -> Mapping[str, list[dict[str, Any]]]:
        """`{"train_loss": [{"epoch": 1, "value": 6.9}, …], …}`."""
        return self._history

    def _append(self, record: EpochRecord) -> None:
        for name, value in record.figures().items():
            # JSON has no NaN; null keeps the epoch in its place and every reader working
            point = {"epoch": record.epoch, "value": finite(value)}
            self._history.setdefault(name, []).append(point)

    def write_run(self, **fields: Any) -> None:
        """Rewrites `run.json`; numbers that are not finite become null."""
        write_json(self.run_file, finite(fields))

    def write_diagnosis(self, diagnosis: Mapping[str, Any], markdown: str) -> None:
        """Rewrites `diagnosis.json` and `diagnosis.md`."""
        write_json(self.diagnosis_files[0], diagnosis)
        write_text(self.diagnosis_files[1], markdown)

    def _name_of_former_run(self) -> str:
        """The run's id, or a number where it left none; never one that is taken."""
        taken = {path.name for path in (self.path / "earlier").glob("*")}
        try:
            run = read_run(self.path)
            run_id = run.get("run_id") or run.get("run_key")
        except UserError:  # none, or damaged: the run is kept all the same
            run_id = None
        name = run_id if isinstance(run_id, str) and run_id.isalnum() else "run"
        candidates = (name if number == 0 else f"{name}-{number}" for number in range(len(taken) + 1))
        return next(candidate for candidate in candidates if candidate not in taken)


class UnkeptFolder(RunFolder):
    """Of a rank that writes nothing: another one keeps the folder."""

    is_kept = False

    def claim(self) -> None:
        pass

    def begin(self, experiment_yaml: str) -> None:
        pass

    def take_back(self) -> None:
        pass

    def add_epoch(self, record: EpochRecord) -> None:
        pass

    def set_history(self, epochs: Sequence[EpochRecord]) -> None:
        pass

    def go_on(self, experiment_yaml: str) -> None:
        pass

    def write_run(self, **fields: Any) -> None:
        pass

    def write_diagnosis(self, diagnosis: Mapping[str, Any], markdown: str) -> None:
        pass


def finite(value: Any) -> Any:
    """The value with every number in it that is not finite replaced by None, as JSON wants it.

    >>> finite({"loss": float("nan"), "epochs": [1, float("inf")]})
    {'loss': None, 'epochs': [1, None]}
    """
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_run(folder: Path) -> dict[str, Any]:
    """The `run.json` of an experiment folder. Raises `UserError` if there is none, or it is damaged."""
    return read_json(folder / "run.json", missing=f"{folder} holds no run")


def read_history(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics history of an experiment folder. Raises `UserError` if there is none, or it is damaged."""
    return read_json(folder / "logs" / "metrics_history.json", missing=f"{folder} holds no run")
