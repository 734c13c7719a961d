"""Does a signal end a training, and wait where something is being told?"""

import os
import signal
import time
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


def trained(stopper: Stopper, number: int, *, step: float = 0.0, keeping: float = 0.0) -> Iterator[str]:
    """A training that gets a signal in the middle of a step; what of it comes to pass."""
    with stopper.interrupting():
        stopper.at_pauses()
        os.kill(os.getpid(), number)
        time.sleep(step)
        yield "step"
        with stopper.held():
            time.sleep(keeping)
            yield "kept"
        stopper.pause()
        yield "next step"


def until_it_ends(training: Iterator[str]) -> list[str]:
    """What came to pass before it was ended, and how."""
    passed = []
    try:
        for what in training:
            passed.append(what)
    except KeyboardInterrupt as error:
        passed.append(type(error).__name__)
    return passed


def test_a_training_ends_at_its_next_pause(stopper: Stopper) -> None:
    assert until_it_ends(trained(stopper, signal.SIGTERM)) == ["step", "kept", "Terminated"]


def test_a_step_that_takes_too_long_is_cut_off(stopper: Stopper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("behrt.stopper.SECONDS_TO_PAUSE", 0.05)
    assert until_it_ends(trained(stopper, signal.SIGINT, step=10.0)) == ["KeyboardInterrupt"]


def test_a_checkpoint_that_takes_long_is_not(stopper: Stopper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("behrt.stopper.SECONDS_TO_PAUSE", 0.05)
    assert until_it_ends(trained(stopper, signal.SIGINT, keeping=0.2)) == ["step", "kept", "KeyboardInterrupt"]


def test_someone_who_insists_is_obeyed_at_once() -> None:
    stopper = Stopper(insists=True)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stopper.close()
