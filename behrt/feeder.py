"""How is MLflow told of a run while it trains, without the training ever waiting for it?"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from behrt.config import UserError
from behrt.feeding import FolderFeed, mirror_checkpoint, waiting_mirror
from behrt.history import finite
from behrt.tracking import StoreUnavailable, may_pass, reason_of, shown_uri

log = logging.getLogger(__name__)

FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 60.0
SECONDS_FOR_A_RUN = 10.0
"""How long a training waits, before it begins, for the store to name its run."""
SECONDS_OF_SILENCE = 10.0
"""How long an ended run waits for a store that does not answer."""
SECONDS_OF_SILENCE_WHEN_STOPPED = 3.0
MOST_SECONDS_WHEN_STOPPED = 5.0
"""Whatever the store says: who asked a run to end kills it before long."""


class Feeder:
    """Feeds the run of a folder from a thread of its own until `finish`.

    Attributes:
        is_complete: whether everything up to now has arrived.
    """

    def __init__(self, folder: Path) -> None:
        self._feed = FolderFeed(folder, progress=self._note_progress)
        self._folder = folder
        self._changed = threading.Event()
        self._has_run = threading.Event()
        self._is_ending = self._is_abandoned = False
        self._refusal: Exception | None = None
        self._warned = False
        self._last_heard = time.monotonic()
        self._allowed = 0.0
        self._version = 0
        self._fed_version = -1
        self._thread = threading.Thread(target=self._work, name="mlflow-feeder", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The store's id of the run, once it has given one."""
        return self._feed.run_id

    @property
    def is_complete(self) -> bool:
        return self._fed_version == self._version

    def update(self, **fields: Any) -> None:
        """Changes the record, and sends it."""
        self._feed.update(lambda record: replace(record, **fields))
        self.changed()

    def tag(self, tags: Mapping[str, str]) -> None:
        self._feed.update(lambda record: replace(record, tags={**record.tags, **tags}))
        self.changed()

    def add_figures(self, figures: Mapping[str, float]) -> None:
        """Figures of the whole run; those that are not finite stay out."""
        known = {name: value for name, value in figures.items() if finite(value) is not None}
        self._feed.update(lambda record: replace(record, figures={**record.figures, **known}))
        self.changed()

    def mirror(self, checkpoint: Path) -> None:
        """Has the checkpoint copied to the store, unless an earlier copy is still on its way."""
        if self.is_complete and not waiting_mirror(self._folder):
            mirror_checkpoint(checkpoint, self._folder)
            self.changed()

    def changed(self) -> None:
        """Something in the folder is new."""
        self._version += 1
        self._changed.set()

    def wait_for_run(self, seconds: float = SECONDS_FOR_A_RUN) -> str | None:
        """The store's id of the run, if it comes in time.

        Raises:
            UserError: the store will not take the run, however long one waits.
        """
        self._has_run.wait(seconds)
        if self._refusal is not None:
            raise self._refusal
        return self.run_id

    def abandon(self) -> None:
        """Feeds no more: the folder is not this run's."""
        self._is_abandoned = self._is_ending = True
        self._changed.set()

    def finish(self, *, silence: float = SECONDS_OF_SILENCE, limit: float = math.inf) -> bool:
        """Sends what is left, for `limit` seconds at most; gives up when the store is silent for `silence` seconds.

        Returns:
            Whether all has arrived.
        """
        deadline = time.monotonic() + limit
        self._is_ending = True
        self._last_heard = time.monotonic()
        self._changed.set()
        while self._thread.is_alive() and time.monotonic() < min(deadline, self._last_heard + self._allowed + silence):
            self._thread.join(0.02)
        return self.is_complete

    def _note_progress(self, seconds: float) -> None:
        self._last_heard = time.monotonic()
        self._allowed = seconds

    def _work(self) -> None:
        backoff = FIRST_BACKOFF
        while not self._is_abandoned:
            self._changed.clear()
            is_last, version = self._is_ending, self._version
            try:
                self._feed.feed()
            except Exception as error:  # MLflow's own, SQLAlchemy's, the network's, the disk's
                self._fail(error)
                if is_last:
                    return
                deadline = time.monotonic() + backoff
                while not self._is_ending and (left := deadline - time.monotonic()) > 0:
                    self._changed.wait(min(left, 0.2))
                    time.sleep(0.05)
                backoff = min(2 * backoff, LONGEST_BACKOFF)
                continue
            self._fed_version = version
            self._has_run.set()
            backoff = FIRST_BACKOFF
            if is_last:
                return
            self._changed.wait()

    def _fail(self, error: Exception) -> None:
        if not self._has_run.is_set() and not may_pass(error):
            message = str(error) if isinstance(error, UserError) else f"{shown_uri()}: {reason_of(error)}"
            self._refusal = StoreUnavailable(message, may_pass=False)
        elif not self._warned:
            log.warning(
                "MLflow at %s failed (%s); the training goes on, its history on disk is complete",
                shown_uri(),
                reason_of(error),
            )
            self._warned = True
        self._has_run.set()


class NoFeeder(Feeder):
    """Of a rank that does not track: it tells nobody of anything, and is never behind."""

    def __init__(self) -> None:
        pass

    @property
    def run_id(self) -> str | None:
        return None

    @property
    def is_complete(self) -> bool:
        return True

    def update(self, **fields: Any) -> None:
        pass

    def tag(self, tags: Mapping[str, str]) -> None:
        pass

    def add_figures(self, figures: Mapping[str, float]) -> None:
        pass

    def mirror(self, checkpoint: Path) -> None:
        pass

    def changed(self) -> None:
        pass

    def wait_for_run(self, seconds: float = 0.0) -> str | None:
        return None

    def abandon(self) -> None:
        pass

    def finish(self, *, silence: float = 0.0, limit: float = 0.0) -> bool:
        return True
