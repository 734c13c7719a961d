"""What does a worker of a study do, from its start to its end?

A worker is a process that trains one trial after another, until the study has no more for it. It imports and opens
everything once; the prepared records are mapped into memory, so that workers of one machine share them. It ends when
its standard input does: with the process that started it, however that one ended.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from behrt.config import UserError
from behrt.imports import first_import
from behrt.stopper import Stopper
from behrt.sweep.liveness import WorkerToken, is_alive
from behrt.sweep.storage import open_storage
from behrt.sweep.study import Done, SweepStudy, Wait
from behrt.sweep.trials import RECORDS_DIGEST

log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_UNUSABLE = 2
EXIT_STOPPED = 130

SECONDS_BETWEEN_CLAIMS = 0.5
"""While every trial that is left is another worker's."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told when it starts.

    Attributes:
        url: of the storage, password and all; it never stands on a command line.
        folder: of the study.
        index: of the worker on its machine, counted from 0; workers take its GPUs in turn.
        threads: that it computes with.
        deadline: seconds since 1970 after which it begins no trial; None for never.
    """

    url: str
    study: str
    folder: str
    index: int
    threads: int
    deadline: float | None


def work(job: Job, stopper: Stopper) -> int:
    """Trains trials until there are no more; the exit code of the process."""
    with first_import("torch"):
        import torch

        from behrt.records import RecordsCache
        from behrt.sweep.trial import run_trial

    torch.set_num_threads(job.threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(job.index % torch.cuda.device_count())
    folder = Path(job.folder)
    study = SweepStudy.open(job.study, open_storage(job.url, create=False))
    records_cache = RecordsCache()
    # before the first trial is claimed: records that cannot be used cost none
    records = records_cache.select(study.sweep.base)
    if study.note_once(RECORDS_DIGEST, lambda: records.data.digest) != records.data.digest:
        raise UserError(
            f"{records.data.folder}: holds other records than those that the study {job.study} was begun with, and "
            "losses would not compare; name a new study with --study"
        )
    with WorkerToken(folder) as token:
        while not stopper.is_asked:
            if job.deadline is not None and time.time() > job.deadline:
                return EXIT_DONE
            claim = study.claim(token.worker, is_alive=is_alive)
            if isinstance(claim, Done):
                return EXIT_DONE
            if isinstance(claim, Wait):
                time.sleep(SECONDS_BETWEEN_CLAIMS)
                continue
            with study.heartbeat(claim):
                run_trial(study, claim, folder=folder, records_cache=records_cache, stopper=stopper)
    return EXIT_STOPPED


def stop_with_parent() -> None:
    """Waits for the end of the standard input, then asks this process to stop."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)


def main() -> int:
    """Reads a `Job` as the first line of the standard input and does it."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stopper = Stopper()
    job = Job(**json.loads(sys.stdin.readline()))
    threading.Thread(target=stop_with_parent, daemon=True).start()
    try:
        return work(job, stopper)
    except KeyboardInterrupt:
        return EXIT_STOPPED
    except UserError as error:
        sys.stderr.write(f"{error}\n")  # the last line of the log, which the coordinator passes on
        return EXIT_UNUSABLE


def job_line(job: Job) -> str:
    """A job as the line that `main` reads."""
    return json.dumps(asdict(job)) + "\n"


if __name__ == "__main__":
    sys.exit(main())
