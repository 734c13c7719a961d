"""How is one malformed input tried on a command, and what must become of it?"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from behrt.cli import main
from behrt.sequences import PreparedData, open_prepared
from behrt.vocabulary import UNK

from .small_records import day, plain_events

SUBJECT = 40000123
"""The first subject of every table that is made here."""
RARE = "RARE//XQ7"
"""A code that one subject has."""
IDENTIFYING = ("4000012", "RARE", "XQ7")
"""What no message may quote: subjects and rare codes."""

SECONDS = 20
"""After which a command counts as hung; each of these takes a fraction of one."""

MADE_BY_TRACKING = ("mlruns", "data", "sweeps")
"""An empty store, or a simulated cohort, is no output of the command that failed later."""


class Hung(BaseException):
    """A command did not come to an end; no handler of an `Exception` catches it."""


@dataclass(frozen=True)
class Case:
    """One malformed input.

    Attributes:
        name: what is wrong with it.
        arguments: of `behrt`, in a folder of the case's own; a text is split at blanks.
        make: writes the input into the working folder.
        refused: what the one line of the refusal matches; None where the input is handled.
        handled: what is asserted of the working folder afterwards, where the command succeeds.
        environment: variables to set.
    """

    name: str
    arguments: str | tuple[str, ...]
    refused: str | None = None
    make: Callable[[], Any] = lambda: None
    handled: Callable[[], Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.refused is None) != (self.handled is None), self.name


def each_of(cases: list[Case]) -> pytest.MarkDecorator:
    """Runs a test with each row of a table."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name.replace(" ", "-")) for case in cases])


def files_below(folder: Path) -> set[str]:
    """Everything in a folder, hidden files included, but for what a store leaves; links are not followed."""
    found = set()
    for place, folders, files in os.walk(folder):
        where = Path(place).relative_to(folder)
        found |= {str(where / name) for name in (*folders, *files) if (where / name).parts[0] not in MADE_BY_TRACKING}
    return found


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `Hung` where the block takes longer: reads from a pipe or a device are interrupted."""

    def expire(signal_number: int, frame: object) -> None:
        raise Hung(f"not over after {seconds} s")

    former = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def check(case: Case, folder: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with one line that says where and quotes no record, nothing left behind; or handled."""
    monkeypatch.chdir(folder)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    case.make()
    before = files_below(folder)
    arguments = case.arguments.split() if isinstance(case.arguments, str) else case.arguments
    capfd.readouterr()
    with time_limit(SECONDS):
        code = main(arguments)
    err = capfd.readouterr().err  # of the file descriptor: libraries of other languages write there themselves
    assert "Traceback" not in err
    assert "panicked" not in err
    if case.handled is not None:
        assert code == 0, err
        case.handled()
        return
    assert case.refused is not None
    assert code == 2, err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert re.search(case.refused, lines[0]), lines[0]
    assert len(lines[0]) < 1000, "a line is for people"
    assert not any(word in lines[0] for word in IDENTIFYING), lines[0]
    assert files_below(folder) == before


# --- what cases start from ---


def records(subjects: int = 20) -> pl.DataFrame:
    """Events of which nothing is odd, but that one subject has a rare code."""
    frame = plain_events(subjects).with_columns(pl.col("subject_id") + (SUBJECT - 1))
    rare = frame.tail(1).with_columns(pl.lit(RARE).alias("code"), pl.lit(day(400)).alias("time"))
    return pl.concat([frame, rare])


def a_file(name: str, content: bytes | str) -> Callable[[], None]:
    def make() -> None:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def instead(name: str, kind: str) -> None:
    """Something that is no file in the place of a file."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to(kind)


def after(*steps: Callable[[], Any]) -> Callable[[], None]:
    def make() -> None:
        for step in steps:
            step()

    return make


# --- what is asserted of records that were prepared into `out` ---


def out() -> PreparedData:
    return open_prepared(Path("out"))


def report(**expected: int) -> Callable[[], None]:
    """The counts of `dataset.json`."""

    def handled() -> None:
        found = out().info["report"]
        assert {name: found[name] for name in expected} == expected

    return handled


def has_code(code: str) -> Callable[[], None]:
    def handled() -> None:
        assert out().vocabulary.id_of(code) != UNK

    return handled


def largest_age(low: float, high: float) -> Callable[[], None]:
    def handled() -> None:
        split = out().split("train")
        ages = np.concatenate([split.sequence(index)[1] for index in range(len(split))])
        assert low <= ages.max() <= high
        assert (ages >= 0).all()

    return handled
