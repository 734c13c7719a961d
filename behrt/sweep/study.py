"""Which trial does a worker train next, and what becomes of a trial whose worker has died?

Many processes, on many machines, work on one study through its storage. Whatever has to be counted first is done under
the storage's lock, so that together they begin exactly the trials that were asked for. A trial that was lost through no
fault of its own is put back in line with the same parameters; whether that is still to be done is read off the storage
each time, so that nothing is lost with the process that was about to do it.
"""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Self

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError

from behrt.config import EXPERIMENT_NAME, UserError, nearest
from behrt.sweep.definitions import first_difference
from behrt.sweep.samplers import make_pruner, make_sampler, resolve_pruner
from behrt.sweep.settings import Budget, Sweep
from behrt.sweep.space import suggest
from behrt.sweep.storage import Storage, shown_url
from behrt.sweep.trials import (
    DIED,
    ENDED,
    IDLE_ATTEMPTS,
    PARENT_RUN_ID,
    REFUSED,
    RETRY_OF,
    WORKER,
    Tally,
    TrialRecord,
    TrialState,
    in_order_of_their_ends,
    params_of,
    tally,
    trial_record,
)

log = logging.getLogger(__name__)

DEFINITION = "definition"
BUDGET = "budget"
PRUNER = "pruner"
"""What `auto` became when the study was begun; asked for more trials, it prunes no other way."""

TRIALS_WITHOUT_HOPE = 5
"""A study whose first trials, this many, ended alike without a result is not worth another one."""

IsAlive = Callable[[dict[str, Any]], bool | None]


class Report(Enum):
    """What a trial is to do after an epoch."""

    KEEP = auto()
    PRUNE = auto()
    TAKEN_OVER = auto()


@dataclass(frozen=True)
class Wait:
    """Nothing to begin now; a trial of another worker may have to be tried again."""


@dataclass(frozen=True)
class Done:
    """Nothing to begin any more."""

    reason: str


class SweepStudy:
    """A sweep and the study that it became."""

    def __init__(self, sweep: Sweep, study: optuna.Study, storage: Storage) -> None:
        self.sweep = sweep
        self.study = study
        self.study.sampler = optuna.samplers.RandomSampler(seed=0)  # that of the sweep draws in `claim` alone
        self.storage = storage
        self._ended: dict[int, TrialRecord] = {}
        self._trial_ids: dict[int, int] = {}

    @classmethod
    def begin(cls, sweep: Sweep, storage: Storage, *, must_exist: bool = False) -> Self:
        """Creates the study, or continues it with the budget of `sweep`.

        Raises:
            UserError: a study of this name has another definition, or (`must_exist`) there is none.
        """
        return storage.patiently(lambda: cls._begin(sweep, storage, must_exist))

    @classmethod
    def _begin(cls, sweep: Sweep, storage: Storage, must_exist: bool) -> Self:
        with storage.locked():
            names = optuna.get_all_study_names(storage=storage.rdb)
            if must_exist and sweep.name not in names:
                raise _unknown(sweep.name, names, storage)
            study = optuna.create_study(
                storage=storage.rdb,
                study_name=sweep.name,
                direction=sweep.direction,
                load_if_exists=True,
            )
            attributes, has_trials = study.user_attrs, bool(study.get_trials(deepcopy=False))
            here = sweep.definition()
            difference = first_difference(_as_today(sweep, attributes.get(DEFINITION, {})), here)
            if has_trials and DEFINITION not in attributes:
                raise _foreign(sweep.name, storage)
            if has_trials and difference is not None:
                raise UserError(
                    f"--study {sweep.name}: was begun with another definition: {difference}; "
                    "name a new study with --study, or restore file and flags"
                )
            if difference is not None:  # a new study, or one that has come to nothing yet
                study.set_user_attr(DEFINITION, here)
                study.set_user_attr(PARENT_RUN_ID, None)
            sweep = _with_one_pruner(sweep, None if difference is not None else attributes.get(PRUNER))
            study.set_user_attr(PRUNER, sweep.pruner.name)
            study.set_user_attr(BUDGET, sweep.budget.model_dump(mode="json"))
            study.pruner = make_pruner(sweep)
            return cls(sweep, study, storage)

    @classmethod
    def open(cls, name: str, storage: Storage) -> Self:
        """An existing study.

        Raises:
            UserError: there is none of this name, or it was not begun by a sweep.
        """
        return storage.patiently(lambda: cls._open(name, storage))

    @classmethod
    def _open(cls, name: str, storage: Storage) -> Self:
        if not EXPERIMENT_NAME.fullmatch(name):  # it becomes a folder, and a storage may hold anybody's studies
            raise UserError(f"{name!r} is no name of a study; they are of letters, digits, '.', '_' and '-'")
        names = optuna.get_all_study_names(storage=storage.rdb)
        if name not in names:
            raise _unknown(name, names, storage)
        study = optuna.load_study(study_name=name, storage=storage.rdb)
        attributes = study.user_attrs
        if DEFINITION not in attributes or BUDGET not in attributes:
            raise _foreign(name, storage)
        sweep = Sweep.from_definition(name, attributes[DEFINITION], Budget(**attributes[BUDGET]))
        sweep = _with_one_pruner(sweep, attributes.get(PRUNER))
        study.pruner = make_pruner(sweep)
        return cls(sweep, study, storage)

    def note(self, key: str, value: Any) -> None:
        """Keeps a JSON value with the study."""
        self.storage.patiently(lambda: self.study.set_user_attr(key, value))

    def noted(self, key: str) -> Any:
        """What `note` has kept; None if nothing."""
        return self.storage.patiently(lambda: self.study.user_attrs).get(key)

    def note_once(self, key: str, make: Callable[[], Any]) -> Any:
        """What is noted under `key`; made and noted first if nothing is. Only one process makes it."""
        with self.storage.locked():
            value = self.noted(key)
            if value is None:
                value = make()
                self.note(key, value)
            return value

    def records(self) -> list[TrialRecord]:
        """All trials, in the order of their numbers."""
        return self.storage.patiently(self._records)

    def _records(self) -> list[TrialRecord]:
        records = []
        with nullcontext() if self._ended else _uncollected():
            trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            record = self._ended.get(trial.number)
            if record is None:
                record = trial_record(trial, self.sweep.direction)
                if trial.state.is_finished():  # and cannot change any more
                    self._ended[trial.number] = record
            records.append(record)
        return records

    def claim(self, worker: dict[str, Any], *, is_alive: IsAlive) -> optuna.Trial | Wait | Done:
        """Begins a trial for a worker, if there is one to begin; its parameters are drawn.

        Args:
            worker: host and token.
            is_alive: whether a worker lives; None where that cannot be told.
        """
        return self.storage.patiently(lambda: self._claim(worker, is_alive))

    def _claim(self, worker: dict[str, Any], is_alive: IsAlive) -> optuna.Trial | Wait | Done:
        with self.storage.locked():
            self._reap(is_alive)
            records = self._records()
            counts = tally(records)
            budget = self.sweep.budget
            if counts.finished >= budget.trials:
                return Done(f"all {budget.trials} trials")
            is_trained_enough = budget.total_epochs is not None and counts.trained_epochs >= budget.total_epochs
            if is_trained_enough and not counts.waiting:  # one that was lost in the middle is still finished
                return Done(f"all {budget.total_epochs} epochs")
            if counts.finished + counts.running >= budget.trials:
                return Wait()
            waiting = [record.number for record in records if record.state is TrialState.WAITING]
            with self._sampler(waiting[0] if waiting else len(records), is_retry=bool(waiting)):
                with warnings.catch_warnings():  # under the lock: the filters are the whole process's
                    warnings.filterwarnings("ignore", "Heartbeat of storage is supposed", UserWarning)
                    trial = self.study.ask()
                try:
                    # In this order: whoever holds the lock and sees a running trial without a worker knows that the one
                    # who began it has died, and a trial with a worker has a heartbeat to judge it by.
                    self.storage.rdb.record_heartbeat(self._trial_id(trial.number))
                    suggest(trial, self.sweep.space)  # here, so that the next one's sampler sees these
                    trial.set_user_attr(WORKER, worker)
                except UpdateFinishedTrialError:  # the lock was lost on the way, and another held this one to be dead
                    return Wait()
            return trial

    @contextmanager
    def _sampler(self, number: int, *, is_retry: bool) -> Iterator[None]:
        """Draws with the sweep's sampler, made from its seed and the trial's number.

        So a study that goes on after a stop does not repeat its draws. Outside, the study has a sampler that does
        nothing when a trial ends: Optuna's `GridSampler` would want to stop a `study.optimize` that is not running. It
        also refuses to complete the parameters of a retry; what the lost trial had not drawn is then drawn at random.
        """
        idle = optuna.samplers.RandomSampler(seed=number)
        self.study.sampler = (
            idle if is_retry and self.sweep.sampler.name == "grid" else make_sampler(self.sweep, number)
        )
        try:
            yield
        finally:
            self.study.sampler = idle

    def reap(self, is_alive: IsAlive) -> None:
        """Fails the trials of dead workers and puts those back in line that are to be tried again."""

        def reap() -> None:
            with self.storage.locked():
                self._reap(is_alive)

        self.storage.patiently(reap)

    def _reap(self, is_alive: IsAlive) -> None:
        running = [record for record in self._records() if record.state is TrialState.RUNNING]
        alive: dict[bool | None, list[int]] = {True: [], False: [], None: []}
        for record in running:
            alive[False if record.worker is None else is_alive(record.worker)].append(record.number)
        for number in alive[False]:
            self.storage.rdb.set_trial_user_attr(self._trial_id(number), ENDED, DIED)
            self.study.tell(number, state=TrialState.FAILED.in_optuna)
        if alive[None]:
            for number in alive[True]:  # a machine that slept has sent no heartbeats, and lives
                self.storage.rdb.record_heartbeat(self._trial_id(number))
            with warnings.catch_warnings():  # under the lock: the filters are the whole process's
                warnings.filterwarnings("ignore", ".*fail_stale_trials is experimental", ExperimentalWarning)
                optuna.storages.fail_stale_trials(self.study)
        self._requeue()

    def _requeue(self) -> None:
        records = {record.number: record for record in self._records()}
        counts = tally(records.values())
        room = self.sweep.budget.trials - counts.finished - counts.running - counts.waiting
        for lost in counts.to_retry[: max(0, room)]:
            attributes = {RETRY_OF: lost.number, IDLE_ATTEMPTS: lost.idle_attempts_after}
            self.study.enqueue_trial(params_of(records, lost.number), user_attrs=attributes)
            log.info("trial %d was lost after %d epochs and is tried again", lost.number, lost.epochs)

    @contextmanager
    def heartbeat(self, trial: optuna.Trial) -> Iterator[None]:
        """Gives signs of life of the trial, from a thread of its own."""
        trial_id = self._trial_id(trial.number)
        interval = self.storage.rdb.get_heartbeat_interval()
        stopping = threading.Event()

        def beat() -> None:
            while not stopping.wait(interval):
                try:
                    self.storage.rdb.record_heartbeat(trial_id)
                except Exception as error:  # the next one may get through; the training does not end for it
                    log.warning("trial %d: a heartbeat was not recorded: %s", trial.number, type(error).__name__)
            self.storage.rdb.remove_session()

        thread = threading.Thread(target=beat, name=f"heartbeat of trial {trial.number}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()

    def report(self, trial: optuna.Trial, *, epoch: int, value: float) -> Report:
        """Tells the objective of an epoch and asks whether the trial is worth another one."""

        try:
            self.storage.patiently(lambda: trial.report(value, epoch))
        except UpdateFinishedTrialError:
            return Report.TAKEN_OVER
        return Report.PRUNE if self.storage.patiently(trial.should_prune) else Report.KEEP

    def set_attributes(self, trial: optuna.Trial, attributes: Mapping[str, Any]) -> bool:
        """Sets user attributes of a running trial; False where it was taken over meanwhile."""

        def set_all() -> bool:
            try:
                for key, value in attributes.items():
                    trial.set_user_attr(key, value)
            except UpdateFinishedTrialError:
                return False
            return True

        return self.storage.patiently(set_all)

    def tell(self, trial: optuna.Trial, state: TrialState, value: float | None, **attributes: Any) -> bool:
        """Ends a trial.

        Args:
            value: the objective, of a COMPLETE trial only.
            attributes: user attributes, `ended` above all.

        Returns:
            False where the trial was taken over meanwhile: what came of it is another one's to tell.
        """
        assert (value is not None) == (state is TrialState.COMPLETE)

        def tell() -> bool:
            with self.storage.locked():  # a reaper finds the trial with its attributes and its state, or with neither
                stored = self.storage.rdb.get_trial(self._trial_id(trial.number))
                if stored.state.is_finished():
                    # by this very call, if the storage went away before it could say so
                    return stored.state is state.in_optuna and stored.user_attrs.get(ENDED) == attributes.get(ENDED)
                for key, content in attributes.items():
                    trial.set_user_attr(key, content)
                self.study.tell(trial, value, state.in_optuna)
                return True

        return self.storage.patiently(tell)

    def tally(self) -> Tally:
        """How far the study has come."""
        return tally(self.records())

    def hopeless(self, *, but: Collection[int] = ()) -> str | None:
        """Why no further trial is worth beginning, if the first ones all ended alike without a result; else None.

        Args:
            but: numbers of trials that do not count, as of those before somebody mended what was wrong.
        """
        finished = in_order_of_their_ends(
            record for record in tally(self.records()).finished_records if record.number not in but
        )
        first = finished[:TRIALS_WITHOUT_HOPE]
        ended = {record.ended or DIED for record in first}
        if len(first) < TRIALS_WITHOUT_HOPE:
            return None
        if all(text.startswith(REFUSED) for text in ended):
            return f"the first {len(first)} trials were all refused ({', '.join(sorted(ended))})"
        if len(ended) == 1 and all(record.state is TrialState.FAILED for record in first):
            return f"the first {len(first)} trials all failed ({ended.pop()})"
        return None

    def _trial_id(self, number: int) -> int:
        """Optuna's own key of a trial."""
        if number not in self._trial_ids:
            rdb = self.storage.rdb
            study_id = rdb.get_study_id_from_name(self.sweep.name)
            self._trial_ids[number] = rdb.get_trial_id_from_study_id_trial_number(study_id, number)
        return self._trial_ids[number]


def _as_today(sweep: Sweep, stored: dict[str, Any]) -> dict[str, Any]:
    """The definition that a study was begun with, and the defaults of settings that there were not then."""
    try:
        return Sweep.from_definition(sweep.name, stored, sweep.budget).definition()
    except (KeyError, TypeError, ValueError, UserError):  # none, or of a setting that is no more
        return stored


def _with_one_pruner(sweep: Sweep, name: str | None) -> Sweep:
    """The sweep with the pruner that `auto` stands for, or that it stood for when the study was begun."""
    if name is None:
        name = resolve_pruner(sweep.pruner, trials=sweep.budget.trials, epochs=sweep.base.training.epochs)
    return replace(sweep, pruner=sweep.pruner.model_copy(update={"name": name}))


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: it doubles the time that a large study takes to load, all of it objects that stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _unknown(name: str, names: list[str], storage: Storage) -> UserError:
    known = nearest(name, names) if names else "; it holds none yet, start one with `behrt sweep run`"
    return UserError(f"{name}: no such study in {shown_url(storage.url)}{known}")


def _foreign(name: str, storage: Storage) -> UserError:
    return UserError(
        f"{name}: the study of this name in {shown_url(storage.url)} was not begun by `behrt sweep run`; "
        "choose another --study"
    )
