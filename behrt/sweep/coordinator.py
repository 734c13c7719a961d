"""How does a study come to its end with several workers, whatever becomes of each?

The coordinator starts the workers, puts the trials of dead ones back in line, starts new ones in their place, and
keeps the study's run in MLflow up to date. It trains nothing itself; several coordinators may work on one study.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from behrt.config import UserError
from behrt.devices import choose_device, choose_precision
from behrt.doctor.checkup import tolerated
from behrt.feeding import RECORD_FILE
from behrt.files import write_text
from behrt.history import read_run
from behrt.sequences import open_prepared
from behrt.sweep.figures import draw_study, draw_trial
from behrt.sweep.liveness import is_alive
from behrt.sweep.settings import Sweep
from behrt.sweep.storage import open_storage
from behrt.sweep.study import SweepStudy
from behrt.sweep.summary import StudySummary
from behrt.sweep.tracked import begin_study_run, settle_trials, tell_improvements
from behrt.sweep.trials import MAX_IDLE_ATTEMPTS, PARENT_RUN_ID, STUDY_ID, Tally, TrialRecord
from behrt.sweep.worker import EXIT_DONE, EXIT_UNUSABLE, Job, job_line
from behrt.sync import sync_folder
from behrt.tracking import RunStatus, TrackedRun

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_STOP = 30.0


def study_folder(name: str) -> Path:
    """Where the trials of a study and its figures are."""
    return Path("sweeps") / name


class Workers:
    """The worker processes of this coordinator."""

    def __init__(self, *, url: str, study: str, count: int, deadline: float | None) -> None:
        self._url, self._study, self._deadline = url, study, deadline
        self._folder = study_folder(study)
        share = max(1, (os.cpu_count() or 1) // count)
        self._threads = min(share, int(os.environ.get("OMP_NUM_THREADS") or share))
        self._name = f"{socket.gethostname()}-{os.getpid()}"  # in each of many containers, the process id is 1
        self._processes: dict[int, subprocess.Popen[str]] = {}
        for index in range(count):
            self.start(index)

    def log_file(self, index: int) -> Path:
        """What the worker has written."""
        return self._folder / "workers" / f"{self._name}-{index}.log"

    def last_line(self, index: int) -> str:
        """The last line that the worker has written."""
        return (self.log_file(index).read_text().splitlines() or [f"its worker {index} said nothing"])[-1]

    def start(self, index: int) -> None:
        """Starts the worker of this index, in a session of its own: Ctrl-C reaches it through its coordinator."""
        job = Job(
            url=self._url,
            study=self._study,
            folder=str(self._folder),
            index=index,
            threads=self._threads,
            deadline=self._deadline,
        )
        log = self.log_file(index)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as written:
            process = subprocess.Popen(
                [sys.executable, "-m", "behrt.sweep.worker"],
                stdin=subprocess.PIPE,
                stdout=written,
                stderr=written,
                text=True,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
            )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once; `ended` will say so
            process.stdin.write(job_line(job))
            process.stdin.flush()
        self._processes[index] = process

    def ended(self) -> dict[int, int]:
        """Exit codes of the workers that have ended since the last call."""
        codes = {index: process.returncode for index, process in self._processes.items() if process.poll() is not None}
        for index in codes:
            self._forget(index)
        return codes

    @property
    def running(self) -> int:
        return len(self._processes)

    def stop(self) -> None:
        """Ends all workers: within a training step, by force where one does not end in time."""
        for process in self._processes.values():
            process.send_signal(signal.SIGINT)
        try:
            deadline = time.monotonic() + SECONDS_TO_STOP
            for process in self._processes.values():
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
        except BaseException:  # a second Ctrl-C
            for process in self._processes.values():
                process.kill()
            raise
        finally:
            for index in list(self._processes):
                self._processes[index].wait()
                self._forget(index)

    def _forget(self, index: int) -> None:
        process = self._processes.pop(index)
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()


def run_sweep(
    sweep: Sweep,
    *,
    storage_url: str | None = None,
    workers: int = 1,
    must_exist: bool = False,
    show: Callable[[StudySummary], None] = lambda summary: None,
) -> tuple[StudySummary, str | None]:
    """Begins the study, or continues it, until it is over.

    Args:
        must_exist: refuse to begin a new study.
        show: is given the study's state twice a second.

    Returns:
        The study, and why it was given up, if it was.

    Raises:
        UserError: the storage, the tracking store, the device or the records cannot be used; workers die as soon as
            they start.
        KeyboardInterrupt: passed on when the workers have ended and their trials are marked.
    """
    _check_machine(sweep)
    study = SweepStudy.begin(sweep, open_storage(storage_url), must_exist=must_exist)
    sweep = study.sweep
    keep_folder(study_folder(sweep.name), study.note_once(STUDY_ID, lambda: uuid.uuid4().hex))
    tracked = TrackedRun.existing(study.note_once(PARENT_RUN_ID, lambda: begin_study_run(sweep)))
    tracked.reopen()
    status: RunStatus = "FAILED"
    given_up = None
    try:
        given_up = _attend(study, tracked, workers, show)
        status = "FINISHED" if given_up is None else "FAILED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        try:
            _settle(study, tracked)
        finally:
            tracked.finish(status)
    summary = StudySummary.of(study)
    show(summary)
    return summary, given_up


def _check_machine(sweep: Sweep) -> None:
    """Refuses, before there is a study, what no trial could be trained with on this machine.

    Raises:
        UserError: the device or the precision is not to be had, or `data` names no prepared records.
    """
    choose_precision(sweep.base.training.precision, choose_device(sweep.base.training.device))
    if sweep.base.data.data is not None:
        open_prepared(Path(sweep.base.data.data))


def keep_folder(folder: Path, study_id: str) -> None:
    """Makes the folder of a study.

    Raises:
        UserError: it belongs to a study of the same name in another storage.
    """
    owner = folder / ".study"
    if owner.exists() and owner.read_text().strip() != study_id:
        raise UserError(
            f"{folder}: belongs to another study of this name, in another storage or deleted there; "
            "choose another --study, or move the folder away"
        )
    write_text(owner, study_id)


def _settle(study: SweepStudy, tracked: TrackedRun) -> None:
    """Tells and draws what came of the study so far."""
    sweep = study.sweep
    feed_trials(study.records())
    with study.storage.locked():  # for another coordinator may end at the same time
        summary = StudySummary.of(study)
        settle_trials(tracked, summary.records)
        tell_improvements(tracked, sweep, summary.records)
    if summary.best is not None:
        tracked.tag({"best_trial": str(summary.best.number), "best_run_id": str(summary.best.run_id)})
    draw_ended(summary.records, sweep.name)
    with tolerated("drawing the study"):
        draw_what_is_new(summary.records, sweep, tracked)


def draw_what_is_new(records: list[TrialRecord], sweep: Sweep, tracked: TrackedRun) -> None:
    """Draws the study, and gives the figures to MLflow, unless both was done of these very trials: it takes seconds."""
    figures = study_folder(sweep.name) / "plots"
    stamp = figures.with_name(".drawn")
    shown = sha256(repr((tracked.run_id, sweep.definition(), records)).encode()).hexdigest()
    if figures.is_dir() and stamp.is_file() and stamp.read_text() == shown:
        return
    if draw_study(records, sweep, figures):
        tracked.log_artifacts(figures, under="plots")
    write_text(stamp, shown)


def feed_trials(records: list[TrialRecord]) -> None:
    """Sends to MLflow what trials that have ended could not send themselves."""
    for record in records:
        if not record.state.has_ended or record.folder is None or not (Path(record.folder) / RECORD_FILE).exists():
            continue
        try:
            if not _is_told(Path(record.folder)):
                sync_folder(Path(record.folder))
        except UserError as error:  # taken away, or MLflow does not answer: `behrt sync` can do it later
            log.warning("trial %d: not all of it is in MLflow: %s", record.number, error)


def _is_told(folder: Path) -> bool:
    """Whether MLflow has all of a trial; not of one that was stopped before it could write so much as `run.json`."""
    try:
        return bool(read_run(folder).get("tracking_complete"))
    except UserError:
        return False


def draw_ended(records: list[TrialRecord], study: str) -> set[int]:
    """Draws the curves of the trials that have ended, and gives them to MLflow; the numbers of these trials."""
    ended = [record for record in records if record.state.has_ended]
    for record in ended:
        with tolerated(f"drawing trial {record.number}"):
            try:
                plots = draw_trial(record, study)
                if plots is not None and record.run_id is not None:
                    TrackedRun.existing(record.run_id).log_artifacts(plots, under=plots.name)
            except UserError as error:  # a folder or a run that somebody has taken away
                log.warning("trial %d: its curves are not drawn: %s", record.number, error)
    return {record.number for record in ended}


def _attend(study: SweepStudy, tracked: TrackedRun, count: int, show: Callable[[StudySummary], None]) -> str | None:
    """Watches the workers until all have ended; why the study was given up, if it was."""
    sweep = study.sweep
    study.reap(is_alive)
    summary = StudySummary.of(study)
    missing = sweep.budget.trials - summary.tally.finished
    if missing <= 0:
        return None
    deadline = None if sweep.budget.hours is None else time.time() + 3600 * sweep.budget.hours
    count = min(count, missing)
    workers = Workers(url=study.storage.url, study=sweep.name, count=count, deadline=deadline)
    before = {record.number for record in summary.records}
    crashes = Crashes(limit=count * (MAX_IDLE_ATTEMPTS + 1))
    drawn: set[int] = set()
    finished = -1
    try:
        while workers.running:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            # one that was stopped by a signal of its own is replaced like one that died
            dead = {index: code for index, code in workers.ended().items() if code != EXIT_DONE}
            for index, code in dead.items():
                if code == EXIT_UNUSABLE:
                    raise UserError(workers.last_line(index))
            if dead:
                study.reap(is_alive)
                if crashes.are_too_many(study.tally()):
                    log_file = workers.log_file(min(dead))
                    raise UserError(f"{sweep.name}: its workers die again and again without an epoch; see {log_file}")
                for index in dead:
                    workers.start(index)
            summary = StudySummary.of(study)
            show(summary)
            drawn |= draw_ended([record for record in summary.records if record.number not in drawn], sweep.name)
            if summary.tally.finished != finished:
                finished = summary.tally.finished
                with study.storage.locked():
                    tell_improvements(tracked, sweep, summary.records)
                given_up = study.hopeless(but=before)
                if given_up is not None:
                    return given_up
    finally:
        workers.stop()
        study.reap(is_alive)
    return None


class Crashes:
    """Counts looks in a row at which workers had died, and the study had come no further since the last time."""

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._in_a_row = 0
        self._stood_at: tuple[int, int] | None = None

    def are_too_many(self, counts: Tally) -> bool:
        """Counts one look more."""
        stands_at = (counts.trained_epochs, counts.finished)
        self._in_a_row = self._in_a_row + 1 if stands_at == self._stood_at else 1
        self._stood_at = stands_at
        return self._in_a_row >= self._limit
