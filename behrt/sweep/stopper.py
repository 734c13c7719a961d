"""How does a signal end a training within a step, and nothing else in the middle?"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Stopper:
    """Turns the first SIGINT or SIGTERM into a `KeyboardInterrupt` where a trial is trained; elsewhere only notes it.

    So no sentence to the study or to MLflow is cut off.

    Attributes:
        is_asked: whether a signal has come.
    """

    def __init__(self, *, listens: bool = True) -> None:
        """With `listens`, signals come here from now on."""
        self.is_asked = False
        self._interrupts = False
        if listens:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._stop)

    def _stop(self, signal_number: int, frame: object) -> None:
        was_asked, self.is_asked = self.is_asked, True
        if self._interrupts and not was_asked:
            raise KeyboardInterrupt

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Where a `KeyboardInterrupt` may be raised, until `hold`."""
        self._interrupts = True
        try:
            if self.is_asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._interrupts = False

    def hold(self) -> None:
        """The training is over: what it produced is being kept, and that is brought to its end."""
        self._interrupts = False
