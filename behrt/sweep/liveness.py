"""Is the process that trains a trial still alive?

A worker holds a lock on a file of its own for as long as it lives; the lock dies with the process, however that ends.
Whoever sees the same disk, on the same host, can tell at once whether the lock is still held. Seen from another host
nothing is known, and the heartbeats of the storage have to decide.
"""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self


class WorkerToken:
    """A sign of life: the file `FOLDER/workers/TOKEN.lock`, locked until `release` or the end of the process.

    Attributes:
        worker: host, machine and path of the lock, as a trial stores them.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder.absolute() / "workers" / f"{uuid.uuid4().hex}.lock"
        self.worker = {"host": socket.gethostname(), "machine": _machine(), "lock": str(self._path)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = self._path.open("a")
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        # a forked child (a data loader, say) shares the lock until it closes the file, and may outlive this process
        os.register_at_fork(after_in_child=self._handle.close)

    def release(self) -> None:
        """From here on the worker counts as dead."""
        self._path.unlink(missing_ok=True)
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def is_alive(worker: Mapping[str, Any]) -> bool | None:
    """Whether the worker lives; None where that cannot be told from here: on another machine, or without its folder."""
    lock = Path(str(worker.get("lock")))
    is_here = (worker.get("host"), worker.get("machine")) == (socket.gethostname(), _machine())
    if not is_here or not lock.parent.is_dir():
        return None
    try:
        with lock.open() as handle:
            # shared, so that two who ask at the same time do not take each other for the worker
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _machine() -> str:
    """Tells machines of the same host name apart, and a machine from what it was before it started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return f"{uuid.getnode():x}"
