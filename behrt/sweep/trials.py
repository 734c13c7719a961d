"""What does the storage of a study say of one trial, and of all of them together?

Optuna keeps a trial's state, its parameters and the objective of each epoch. Whatever else matters of it, why it ended
above all, stands in its user attributes, whose names and values are listed here. A trial that was lost through no fault
of its own (a signal, a dead worker) is tried again by a trial of another number, which names it as `retry_of`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

import optuna

# user attributes of a trial; Optuna refuses them once the trial has ended
ENDED = "ended"
RUN_ID = "run_id"
FOLDER = "folder"
WORKER = "worker"
SEED = "seed"
BEST_EPOCH = "best_epoch"
RETRY_OF = "retry_of"
IDLE_ATTEMPTS = "idle_attempts"
CONTINUED_FROM = "continued_from"

# user attributes of a study
PARENT_RUN_ID = "parent_run_id"
STUDY_ID = "study_id"
RECORDS_DIGEST = "records_digest"

# why a trial ended; beside these "refused: RULE", "lost: RULE" and "error: NAME"
ALL_EPOCHS = "all epochs"
PATIENCE = "patience"
PRUNED = "pruned"
OUT_OF_MEMORY = "out of memory"
INTERRUPTED = "interrupted"
DIED = "worker died"
REFUSED = "refused: "
LOST = "lost: "
ERROR = "error: "

MAX_IDLE_ATTEMPTS = 5
"""Attempts in a row that add no epoch, after which a trial that is lost again is given up."""


class TrialState(StrEnum):
    """Optuna's states; its FAIL is called FAILED, as MLflow calls it."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAILED = "FAILED"

    @property
    def has_ended(self) -> bool:
        return self not in (TrialState.WAITING, TrialState.RUNNING)

    @property
    def in_optuna(self) -> optuna.trial.TrialState:
        return optuna.trial.TrialState["FAIL" if self is TrialState.FAILED else self.value]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial as the storage has it.

    Attributes:
        values: the objective by epoch, counted from 1; NaN and infinities included.
        best: the value that a complete trial was told to have; else the best finite one of `values`.
        epochs: the largest epoch reported, those taken over from another trial included; 0 if none.
        ended: why it ended; None while it runs, and where its worker was too dead to say.
        worker: host and token of the process that trains it.
        retry_of: number of the lost trial that this one continues.
        continued_from: epochs taken over that earlier attempts had reported.
        idle_attempts: attempts in a row, right before this one, that added no epoch.
    """

    number: int
    state: TrialState
    params: dict[str, Any]
    values: dict[int, float]
    best: float | None
    epochs: int
    ended: str | None
    run_id: str | None
    folder: str | None
    worker: dict[str, Any] | None
    retry_of: int | None
    continued_from: int
    idle_attempts: int
    started: datetime | None
    finished: datetime | None

    @property
    def is_lost(self) -> bool:
        """It failed through no fault of its own.

        A worker that dies between naming a good end and telling the state leaves a failed trial with that good end.
        """
        return self.state is TrialState.FAILED and self.ended in (
            None, INTERRUPTED, DIED, ALL_EPOCHS, PATIENCE, PRUNED
        )  # fmt: skip

    @property
    def trained_epochs(self) -> int:
        """Epochs that this attempt trained itself."""
        return max(0, self.epochs - self.continued_from)

    @property
    def idle_attempts_after(self) -> int:
        """`idle_attempts` of the trial that would continue this one; to be stopped is not to fail."""
        if self.trained_epochs:
            return 0
        return self.idle_attempts + (self.ended != INTERRUPTED)

    @property
    def is_given_up(self) -> bool:
        """It was lost once too often without having got any further."""
        return self.is_lost and self.ended != INTERRUPTED and self.idle_attempts_after >= MAX_IDLE_ATTEMPTS


def trial_record(trial: optuna.trial.FrozenTrial, direction: str) -> TrialRecord:
    """What Optuna has stored of a trial.

    Args:
        direction: "minimize" or "maximize".
    """
    state = TrialState.FAILED if trial.state is optuna.trial.TrialState.FAIL else TrialState(trial.state.name)
    values = dict(sorted(trial.intermediate_values.items()))
    attributes: Mapping[str, Any] = trial.user_attrs
    if state is TrialState.COMPLETE:
        best = trial.value
    else:
        finite = [value for value in values.values() if math.isfinite(value)]
        best = (max if direction == "maximize" else min)(finite, default=None)
    return TrialRecord(
        number=trial.number,
        state=state,
        params=dict(trial.params),
        values=values,
        best=best,
        epochs=max(values, default=0),
        ended=attributes.get(ENDED),
        run_id=attributes.get(RUN_ID),
        folder=attributes.get(FOLDER),
        worker=attributes.get(WORKER),
        retry_of=attributes.get(RETRY_OF),
        continued_from=attributes.get(CONTINUED_FROM, 0),
        idle_attempts=attributes.get(IDLE_ATTEMPTS, 0),
        started=trial.datetime_start,
        finished=trial.datetime_complete,
    )


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How far a study has come.

    Attributes:
        replaced: lost trials that another one continues; they count nowhere else.
        to_retry: lost trials that no other one continues yet, in the order of their numbers.
        finished: those that count towards the trials asked for, in the order of their numbers.
        trained_epochs: of all trials, lost ones included; an epoch that was taken over counts once.
    """

    waiting: int
    running: int
    complete: int
    pruned: int
    failed: int
    replaced: int
    trained_epochs: int
    to_retry: list[TrialRecord] = field(default_factory=list)
    finished_records: list[TrialRecord] = field(default_factory=list)

    @property
    def finished(self) -> int:
        """Trials that count towards those asked for: complete, pruned, and failed for good."""
        return self.complete + self.pruned + self.failed


def tally(records: Iterable[TrialRecord]) -> Tally:
    """Counts the trials of a study, each lost one together with the one that continues it."""
    ordered = sorted(records, key=lambda record: record.number)
    continued = {record.retry_of for record in ordered}
    replaced = [record for record in ordered if record.is_lost and record.number in continued]
    to_retry = [
        record for record in ordered if record.is_lost and record.number not in continued and not record.is_given_up
    ]
    open_numbers = {record.number for record in (*replaced, *to_retry)}
    counted = [record for record in ordered if record.number not in open_numbers]

    def count(state: TrialState) -> int:
        return sum(record.state is state for record in counted)

    return Tally(
        waiting=count(TrialState.WAITING),
        running=count(TrialState.RUNNING),
        complete=count(TrialState.COMPLETE),
        pruned=count(TrialState.PRUNED),
        failed=count(TrialState.FAILED),
        replaced=len(replaced),
        trained_epochs=sum(record.trained_epochs for record in ordered),
        to_retry=to_retry,
        finished_records=[record for record in counted if record.state.has_ended],
    )


def attempts(records: Mapping[int, TrialRecord], number: int) -> Iterator[TrialRecord]:
    """The trial of that number, the one that it continues, and so on to the first attempt."""
    at: int | None = number
    while at is not None:
        yield records[at]
        at = records[at].retry_of


def params_of(records: Mapping[int, TrialRecord], number: int) -> dict[str, Any]:
    """The parameters of a trial; what an attempt had not drawn before it was lost, an earlier one had."""
    params: dict[str, Any] = {}
    for record in attempts(records, number):
        params = {**record.params, **params}
    return params


def best_trial(records: Iterable[TrialRecord], direction: str) -> TrialRecord | None:
    """The best complete trial; what a pruned one had reached is no result."""
    complete = [record for record in records if record.state is TrialState.COMPLETE and record.best is not None]
    sign = 1 if direction == "minimize" else -1
    return min(complete, key=lambda record: sign * (record.best or 0.0), default=None)


def in_order_of_their_ends(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    return sorted(records, key=lambda record: (record.finished or datetime.min, record.number))
