"""What is told of a training run: before its first epoch, while it goes on, and when it is over?

The same for every recipe. A `Listener` hears it as it happens; a `RunResult` is what the recipe returns and what
`run.json` keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from behrt.checkpoints import Transplant
from behrt.config import ExperimentSettings
from behrt.doctor.checkup import Checkup
from behrt.doctor.diagnosis import Diagnosis
from behrt.doctor.rule import Finding
from behrt.history import Baselines, EpochRecord, finite
from behrt.metrics import closed_gap
from behrt.model import BEHRTForMaskedLM
from behrt.parameters import ParameterCounts
from behrt.tasks.heads import BEHRTForTask
from behrt.tracking import RunStatus, shown_uri


class Listener:
    """What a person sees of a run while it goes on; here: nothing. The command line prints."""

    def preparing(self, stage: str, done: int, total: int) -> None:
        """Progress of preparing a simulated cohort."""

    def started(self, start: RunStart) -> None:
        """Everything is set up; the pre-flight comes next."""

    def examined(self, checkup: Checkup) -> None:
        """The pre-flight is done; unless it refuses, the first epoch comes next."""

    def step(self, step: int, steps: int) -> None:
        """An optimizer step of the current epoch is done."""

    def went_on(self, epochs: Sequence[EpochRecord]) -> None:
        """The run begins with the epochs of an earlier attempt."""

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is done."""

    def prunes(self) -> bool:
        """Whether the run is not worth another epoch; asked where there is another one."""
        return False

    def found(self, finding: Finding) -> None:
        """The epoch showed something new."""

    def resumed(self, changes: Sequence[str]) -> None:
        """The run goes on in its own folder, with these changes; `went_on` follows."""

    def recovered(self, lost_epoch: int, record: EpochRecord | None, rate_factor: float) -> None:
        """A loss was no number: the run went back to after `record`, with its learning rates times `rate_factor`."""

    def memory_short(self, accumulation_steps: int) -> None:
        """The device ran out of memory; steps are computed in more, smaller micro-batches from now on."""


TrialOutcome = Literal["COMPLETE", "PRUNED", "FAILED"]

STATUS_OF_OUTCOME: dict[TrialOutcome, RunStatus] = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAILED": "FAILED"}
"""What MLflow, which knows no pruned run, calls the outcome of a trial."""


@dataclass(frozen=True)
class StudyTrial:
    """Which trial of which study a run is: the MLflow run of the study, and the number of the trial in it."""

    study_run_id: str
    number: int


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """What is known of a run before its first epoch.

    Attributes:
        key: the run's own id.
        run_id: MLflow's id of it; None where MLflow did not answer in time.
        dataset: `name` and `digest` of the prepared records.
        task: of a fine-tuning, what is predicted, and how many labels there are.
        ranks: processes that train it together.
    """

    experiment: str
    folder: Path
    key: str
    run_id: str | None
    dataset: dict[str, str]
    settings: ExperimentSettings
    device: str
    precision: str
    max_position: int
    vocab_size: int
    patients: dict[str, int]
    steps_per_epoch: int
    baselines: Baselines
    counts: ParameterCounts
    transplant: Transplant | None
    truncated_share: float
    trial: StudyTrial | None = None
    task: Mapping[str, Any] | None = None
    ranks: int = 1


@dataclass(kw_only=True)
class RunResult:
    """What came of a run; `model` has the weights of the best epoch when it is finished.

    Attributes:
        checkup: what is known of the run, and its diagnosis.
        refused: whether the pre-flight kept it from training.
        lost_to: the finding that ended it, where one did.
        pruned: whether its listener ended it.
        stopped: whether a signal ended it.
        run_id: MLflow's id of the run, as soon as it is known.
        accumulation_steps: micro-batches of a step, doubled wherever memory ran out.
        recoveries: how often the run went back to a checkpoint because a loss was no number.
        tuning: of a fine-tuning, how well the best weights order the tuning patients.
    """

    start: RunStart
    model: BEHRTForMaskedLM | BEHRTForTask
    checkup: Checkup
    status: RunStatus = "FAILED"
    refused: bool = False
    lost_to: Finding | None = None
    pruned: bool = False
    stopped: bool = False
    best: EpochRecord | None = None
    last: EpochRecord | None = None
    stopped_early: bool = False
    seconds: float = 0.0
    tracking_uri: str = field(default_factory=shown_uri)
    tracking_complete: bool = False
    run_id: str | None = None
    accumulation_steps: int | None = None
    recoveries: int = 0
    tuning: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run_id = self.run_id or self.start.run_id

    @property
    def diagnosis(self) -> Diagnosis:
        return self.checkup.diagnosis

    @property
    def outcome(self) -> TrialOutcome:
        """What the run is as a trial: one that could not learn, or stopped learning, was not worth its epochs."""
        if self.status == "FINISHED":
            return "COMPLETE"
        if self.lost_to is not None and self.lost_to.rule == "out_of_memory":
            return "FAILED"
        return "PRUNED" if self.pruned or self.refused or self.lost_to is not None else "FAILED"

    @property
    def closed_gap(self) -> float | None:
        """Share of the gap between unigram and floor that the best epoch closed; None where no floor is known."""
        baselines = self.start.baselines
        if self.best is None or baselines.floor_loss is None:
            return None
        return closed_gap(self.best.val_loss, baselines.unigram_loss, baselines.floor_loss)

    def as_dict(self) -> dict[str, Any]:
        """The form of `run.json` and of `behrt train --json`; figures that are not finite are None."""
        start, best, last = self.start, self.best, self.last
        values: dict[str, Any] = finite(
            {
                "run_id": self.run_id,
                "run_key": start.key,
                "experiment": start.experiment,
                "dataset": start.dataset,
                "tracking_uri": self.tracking_uri,
                "tracking_complete": self.tracking_complete,
                "status": self.status,
                "verdict": self.diagnosis.verdict,
                "severity": self.diagnosis.severity,
                "refused": self.refused,
                "lost_to": self.lost_to.rule if self.lost_to else None,
                "pruned": self.pruned,
                "stopped": self.stopped,
                "trial": asdict(start.trial) if start.trial else None,
                "best_epoch": best.epoch if best else None,
                "best_val_loss": best.val_loss if best else None,
                "best_val_accuracy": best.val_accuracy if best else None,
                "closed_gap": self.closed_gap,
                "epochs": last.epoch if last else 0,
                "last": last.figures() if last else None,
                "stopped_early": self.stopped_early,
                "accumulation_steps": self.accumulation_steps or start.settings.training.accumulation_steps,
                "recoveries": self.recoveries,
                "seconds": round(self.seconds, 3),
                "baselines": start.baselines.figures(),
                "parameters": dict(start.counts),
                "device": start.device,
                "precision": start.precision,
                "max_position": start.max_position,
                "vocab_size": start.vocab_size,
                "patients": start.patients,
                "transplant": asdict(start.transplant) if start.transplant else None,
                "facts": self.checkup.facts.known(),
                "settings": start.settings.model_dump(mode="json", exclude={"note"}),
            }
        )
        if start.task is not None:
            values |= finite({"task": dict(start.task), "tuning": self.tuning})
        return values
