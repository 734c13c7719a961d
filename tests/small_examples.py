"""Labelled patients for the tests of baselines and assessments, without a file."""

from __future__ import annotations

from typing import Any

import numpy as np

from behrt.tasks.examples import Examples
from behrt.vocabulary import CLS, SEP

DAY = np.timedelta64(1, "D")
START = np.datetime64("2020-01-01", "us")


class Sequences:
    """What `Examples` asks of a split, of patients written as lists of (day, code); a visit a day."""

    def __init__(self, patients: list[list[tuple[int, int]]], age: float = 50.0) -> None:
        self._patients = []
        for events in patients:
            codes, days, visits = [CLS], [events[0][0]], [0]
            for number, day in enumerate(sorted({day for day, _ in events}), 1):
                own = [code for at, code in events if at == day]
                codes += [*own, SEP]
                days += [day] * (len(own) + 1)
                visits += [number] * (len(own) + 1)
            ages = np.float32(age) + np.array(days, np.float32) / np.float32(365.25)
            self._patients.append(
                (np.array(codes, np.int32), ages, np.array(visits, np.int32), START + np.array(days) * DAY)
            )

    def sequence(self, index: int) -> tuple[np.ndarray, ...]:
        return self._patients[index][:3]

    def times(self, index: int) -> np.ndarray:
        return self._patients[index][3]

    def __len__(self) -> int:
        return len(self._patients)


def examples(
    patients: list[list[tuple[int, int]]],
    targets: Any,
    *,
    at: int = 100,
    kind: str = "binary",
    days: Any = None,
    names: tuple[str, ...] = ("outcome",),
    of: Any = None,
) -> Examples:
    """A row each patient, predicted on day `at`; or a row each of the patients `of`."""
    split = Sequences(patients)
    rows = np.arange(len(patients)) if of is None else np.asarray(of)
    found = np.asarray(targets, np.float32).reshape(len(rows), -1)
    return Examples(
        split=split,  # type: ignore[arg-type]
        kind=kind,
        names=names,
        subjects=rows + 40000000,
        times=np.full(len(rows), START + at * DAY),
        patients=rows,
        visible=np.full(len(rows), 3),
        targets=found,
        days=None if days is None else np.asarray(days, np.float32),
    )


def by_chance(generator: np.random.Generator, number: int, codes: int = 20) -> list[list[tuple[int, int]]]:
    """Patients with some of the codes 5 to 5 + `codes` on some of 90 days."""
    patients = []
    for _ in range(number):
        size = int(generator.integers(2, 12))
        events = zip(generator.integers(90, size=size), generator.integers(5, 5 + codes, size=size), strict=True)
        patients.append(sorted((int(day), int(code)) for day, code in events))
    return patients
