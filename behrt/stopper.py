"""Where may a signal end a training?

While a run is set up, anywhere. Once it trains, only where weights, optimizer and position belong together, so that
what was trained can be saved first. While its end is being told, nowhere.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

SECONDS_TO_PAUSE = 5.0
"""A step that takes longer after a signal is cut off; the checkpoint before it stands."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM; it ends as on Ctrl-C, with an exit code of its own."""


class Where(Enum):
    """Where a signal is heard at the moment."""

    NOWHERE = "nowhere"
    ANYWHERE = "anywhere"
    AT_PAUSES = "at pauses"


class Stopper:
    """Turns SIGINT into a `KeyboardInterrupt` and SIGTERM into a `Terminated`, where the training can bear it.

    Attributes:
        is_asked: whether a signal has come.
    """

    def __init__(self, *, listens: bool = True, insists: bool = False, is_patient: bool = False) -> None:
        """With `listens`, signals come here until `close`; with `insists`, a second one ends everything at once.

        With `is_patient`, a step is never cut off, however long it takes: for one of several ranks, which end together.
        """
        self._asked: type[KeyboardInterrupt] | None = None
        self._insists = insists
        self._is_patient = is_patient
        self._where = Where.NOWHERE
        self._former = {}
        if listens:
            for number, handler in (
                (signal.SIGINT, self._stop),
                (signal.SIGTERM, self._stop),
                (signal.SIGALRM, self._lose_patience),
            ):
                self._former[number] = signal.signal(number, handler)

    def close(self) -> None:
        """Signals go where they went before."""
        for number, handler in self._former.items():
            if number == signal.SIGALRM:
                signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(number, handler)
        self._former = {}

    @property
    def is_asked(self) -> bool:
        return self._asked is not None

    @property
    def is_at_pauses(self) -> bool:
        """Whether a training goes on, which signals end at its pauses."""
        return self._where is Where.AT_PAUSES

    @property
    def urgency(self) -> int:
        """What was asked for as a number, by which ranks agree: 0 nothing, 1 SIGINT, 2 SIGTERM."""
        return 0 if self._asked is None else 2 if self._asked is Terminated else 1

    def ask(self, urgency: int) -> None:
        """What some rank was asked for is asked of this one, too."""
        self._asked = self._asked or (Terminated if urgency == 2 else KeyboardInterrupt)

    def _stop(self, signal_number: int, frame: object) -> None:
        is_second = self._asked is not None
        self._asked = self._asked or (Terminated if signal_number == signal.SIGTERM else KeyboardInterrupt)
        if (is_second and self._insists) or (not is_second and self._where is Where.ANYWHERE):
            raise self._asked
        if not is_second and self._where is Where.AT_PAUSES and not self._is_patient:
            signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_PAUSE)

    def _lose_patience(self, signal_number: int, frame: object) -> None:
        if self._where is Where.AT_PAUSES and self._asked is not None:
            raise self._asked

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """A signal ends what happens here: anywhere, until the training begins (`at_pauses`) and ends (`hold`)."""
        self._where = Where.ANYWHERE
        try:
            self._raise()
            yield
        finally:
            self.hold()

    def at_pauses(self) -> None:
        """The training begins: from now on a signal is heard where `pause` is called."""
        self._where = Where.AT_PAUSES

    def pause(self) -> None:
        """Ends the training here, where a signal has asked for that."""
        if self._where is Where.AT_PAUSES:
            self._raise()

    @contextmanager
    def held(self) -> Iterator[None]:
        """What happens here is brought to its end; a signal that comes meanwhile is heard after it."""
        where, self._where = self._where, Where.NOWHERE
        try:
            yield
        finally:
            self._where = where
        if where is Where.ANYWHERE:
            self._raise()

    def hold(self) -> None:
        """The training is over: what it produced is being kept, and that is brought to its end."""
        self._where = Where.NOWHERE
        if self._former:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _raise(self) -> None:
        if self._asked is not None:
            raise self._asked
