"""How does a study come to its end with several workers, whatever becomes of each?

The coordinator starts the workers, puts the trials of dead ones back in line, starts new ones in their place, and
keeps the study's run in MLflow up to date. It trains nothing itself; several coordinators may work on one study.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from behrt.config import UserError
from behrt.sweep.figures import draw_study, draw_trial
from behrt.sweep.liveness import is_alive
from behrt.sweep.settings import Sweep
from behrt.sweep.storage import open_storage
from behrt.sweep.study import SweepStudy
from behrt.sweep.summary import StudySummary
from behrt.sweep.tracked import begin_study_run, settle_trials, tell_improvements
from behrt.sweep.trials import PARENT_RUN_ID, TrialRecord, TrialState
from behrt.sweep.worker import EXIT_DONE, EXIT_STOPPED, EXIT_UNUSABLE, Job, job_line
from behrt.tracking import RunStatus, TrackedRun

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_STOP = 30.0
CRASHES_WITHOUT_PROGRESS = 5
"""Workers that died in a row without a further epoch in the study, after which no more are started."""


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
        self._processes: dict[int, subprocess.Popen[str]] = {}
        for index in range(count):
            self.start(index)

    def log_file(self, index: int) -> Path:
        """What the worker has written."""
        return self._folder / "workers" / f"{os.getpid()}-{index}.log"

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
        UserError: the storage, the tracking store or the records cannot be used; workers die as soon as they start.
        KeyboardInterrupt: passed on when the workers have ended and their trials are marked.
    """
    storage = open_storage(storage_url)
    study = SweepStudy.begin(sweep, storage, must_exist=must_exist)
    tracked = TrackedRun.existing(study.note_once(PARENT_RUN_ID, lambda: begin_study_run(sweep)))
    tracked.reopen()
    status: RunStatus = "KILLED"
    given_up = None
    try:
        given_up = _attend(study, tracked, workers, show)
        status = "FINISHED" if given_up is None else "FAILED"
    finally:
        # under the lock, for another coordinator may end at the same time
        with storage.locked():
            records = study.records()
            settle_trials(tracked, records)
            tell_improvements(tracked, sweep, records)
        draw_ended(records, sweep.name)
        figures = study_folder(sweep.name) / "plots"
        if draw_study(records, sweep, figures):
            tracked.log_artifacts(figures, under="plots")
        summary = StudySummary.of(study)
        if summary.best is not None:
            tracked.tag({"best_trial": str(summary.best.number), "best_run_id": str(summary.best.run_id)})
        tracked.finish(status)
        show(summary)
    return summary, given_up


def draw_ended(records: list[TrialRecord], study: str) -> set[int]:
    """Draws the curves of the trials that have ended, and gives them to MLflow; the numbers of these trials."""
    ended = [record for record in records if record.state not in (TrialState.WAITING, TrialState.RUNNING)]
    for record in ended:
        try:
            plots = draw_trial(record, study)
            if plots is not None and record.run_id is not None:
                TrackedRun.existing(record.run_id).log_artifacts(plots, under=plots.name)
        except UserError as error:  # a folder or a run that somebody has taken away; the study goes on
            log.warning("trial %d: its curves are not drawn: %s", record.number, error)
    return {record.number for record in ended}


def _attend(study: SweepStudy, tracked: TrackedRun, count: int, show: Callable[[StudySummary], None]) -> str | None:
    """Watches the workers until all have ended; why the study was given up, if it was."""
    sweep, folder = study.sweep, study_folder(study.sweep.name)
    hours = sweep.budget.hours
    summary = StudySummary.of(study)
    missing = sweep.budget.trials - summary.tally.finished
    if missing <= 0:
        return None
    deadline = None if hours is None else time.time() + 3600 * hours
    workers = Workers(url=study.storage.url, study=sweep.name, count=min(count, missing), deadline=deadline)
    crashes, epochs_at_crash, finished = 0, -1, -1
    drawn: set[int] = set()
    try:
        while workers.running:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for index, code in workers.ended().items():
                if code == EXIT_UNUSABLE:
                    raise UserError(workers.log_file(index).read_text().splitlines()[-1])
                if code in (EXIT_DONE, EXIT_STOPPED):
                    continue
                study.reap(partial(is_alive, folder=folder))
                trained = study.tally().trained_epochs
                crashes = crashes + 1 if trained == epochs_at_crash else 1
                epochs_at_crash = trained
                if crashes >= CRASHES_WITHOUT_PROGRESS:
                    raise UserError(
                        f"{sweep.name}: its workers die as soon as they start; see {workers.log_file(index)}"
                    )
                workers.start(index)
            summary = StudySummary.of(study)
            show(summary)
            drawn |= draw_ended([record for record in summary.records if record.number not in drawn], sweep.name)
            if summary.tally.finished != finished:
                finished = summary.tally.finished
                with study.storage.locked():
                    tell_improvements(tracked, sweep, summary.records)
                given_up = study.hopeless()
                if given_up is not None:
                    return given_up
    finally:
        workers.stop()
        study.reap(partial(is_alive, folder=folder))
    return None
