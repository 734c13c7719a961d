"""Does a signal end a training, and wait where something is being told?"""

import os
import signal
from collections.abc import Iterator

import pytest

from behrt.stopper import Stopper


@pytest.fixture
def stopper() -> Iterator[Stopper]:
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Stopper()
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_is_interrupted(stopper: Stopper, number: int) -> None:
    with pytest.raises(KeyboardInterrupt), stopper.interrupting():
        os.kill(os.getpid(), number)
    assert stopper.is_asked


def test_elsewhere_a_signal_is_noted_and_the_next_training_is_not_begun(stopper: Stopper) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    assert stopper.is_asked
    with pytest.raises(KeyboardInterrupt), stopper.interrupting():
        pytest.fail("began to train")


def test_what_a_training_produced_is_kept_whole(stopper: Stopper) -> None:
    with stopper.interrupting():
        stopper.hold()
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopper.is_asked


def test_a_second_signal_does_not_cut_off_what_the_first_one_began(stopper: Stopper) -> None:
    with pytest.raises(KeyboardInterrupt), stopper.interrupting():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stopper.interrupting():
        pytest.fail("began to train")
    os.kill(os.getpid(), signal.SIGINT)
