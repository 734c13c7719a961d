"""Workers of a study without the seconds that each takes to import libraries: forked from a process that has them.

For studies that a test runs in its own process; `behrt sweep run` as a process of its own starts workers as ever.
"""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import IO, Any

from behrt.sweep import worker

FORKS = multiprocessing.get_context("forkserver")
LIBRARIES = ["behrt.pretrain", "behrt.sweep.trial", "mlflow.store.tracking.sqlalchemy_store", "seaborn"]


def be_worker(job: Connection, log: str, environment: dict[str, str]) -> None:
    os.setsid()
    written = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream, source in ((0, job.fileno()), (1, written), (2, written)):
        os.dup2(source, stream)
    sys.stdin = os.fdopen(0)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(worker.main())


class ForkedWorker:
    """What the coordinator uses of `subprocess.Popen`."""

    def __init__(self, command: list[str], *, stdout: IO[str], env: dict[str, str], **others: Any) -> None:
        assert command == [sys.executable, "-m", "behrt.sweep.worker"]
        FORKS.set_forkserver_preload([*LIBRARIES, __name__])
        job, ours = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(target=be_worker, args=(job, stdout.name, env))
        self._process.start()
        job.close()
        self.stdin = os.fdopen(os.dup(ours.fileno()), "w")
        ours.close()

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self._process.pid or 0, number)

    def kill(self) -> None:
        self._process.kill()


processes = SimpleNamespace(Popen=ForkedWorker, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
"""In the place of the coordinator's `subprocess`."""
