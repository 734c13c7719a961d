"""Which flag helps, from which value to which?

A remedy is data: a setting and how its new value follows from the current one. Where the current value already is
what the remedy asks for, it goes one step further or is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from behrt.doctor.facts import RunFacts

Change = Callable[[Any], Any]
"""From the current value of a setting (None: not known) to the new one; None: this remedy has nothing to change."""


@dataclass(frozen=True)
class Remedy:
    """One flag and its new value.

    Attributes:
        setting: name of a setting in `config`, and of the flag.
        change: from the current value to the new one.
        why: what it does, in a few words.
        applies: whether the flag has an effect on this run at all.
    """

    setting: str
    change: Change
    why: str
    applies: Callable[[RunFacts], bool] = lambda facts: True

    def text(self, facts: RunFacts) -> str | None:
        """`--dropout 0.1 → 0.3`, without the current value where it is not known; None where nothing is to change."""
        current = facts.get(self.setting)
        new = self.change(current) if self.applies(facts) else None
        if new is None or new == current:
            return None
        flag = "--" + self.setting.replace("_", "-")
        if isinstance(new, bool):
            return flag if new else flag.replace("--", "--no-", 1)
        return f"{flag} {shown(new)}" if current is None else f"{flag} {shown(current)} → {shown(new)}"


@dataclass(frozen=True)
class Advice:
    """A remedy that is no flag of `behrt train`."""

    words: str
    applies: Callable[[RunFacts], bool] = lambda facts: True

    def text(self, facts: RunFacts) -> str | None:
        return self.words if self.applies(facts) else None


def shown(value: Any) -> str:
    """A value as a person types it.

    >>> shown(0.00001), shown(0.00015), shown(0.3), shown(("query", "key"))
    ('1e-5', '1.5e-4', '0.3', 'query,key')
    """
    if isinstance(value, float):
        digits = f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"
        mantissa, e, exponent = digits.partition("e")
        return f"{float(mantissa):g}e{int(exponent)}" if e else mantissa
    return ",".join(value) if isinstance(value, (tuple, list)) else str(value)


def raise_to(new: Any, *, then: Any = None) -> Change:
    """At least `new`; where that is reached already, `then`."""
    return lambda current: new if current is None or current < new else then if then and current < then else None


def lower_to(new: Any, *, then: Any = None) -> Change:
    """At most `new`; where that is reached already, `then`."""
    return lambda current: new if current is None or current > new else then if then and current > then else None


def times(factor: float, *, unknown: float, at_most: float = math.inf) -> Change:
    """The current value times `factor`, but not beyond `at_most`; `unknown` where there is none."""
    return lambda current: (
        unknown if current is None else None if current >= at_most else _rounded(min(current * factor, at_most))
    )


def slow_down(current: float | None) -> float:
    """A tenth, as the guide says; a rate that fails all the same is answered with one that is measured to work."""
    tenth = 1e-5 if current is None else _rounded(current / 10)
    return tenth if tenth < 1e-2 else 1e-3


def set_to(new: Any) -> Change:
    """Exactly `new`."""
    return lambda current: new


SIZES_IN_ORDER = ("small", "medium", "large")


def larger_model(current: str | None) -> str | None:
    """The guide goes to `large`; from `large` there is no larger one."""
    return "large" if current != "large" else None


def smaller_model(current: str | None) -> str | None:
    """One size down; the guide goes from `large` to `medium`."""
    if current is None:
        return "medium"
    place = SIZES_IN_ORDER.index(current)
    return SIZES_IN_ORDER[place - 1] if place else None


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def with_lora(facts: RunFacts) -> bool:
    """Whether flags of LoRA have an effect, as far as is known."""
    return facts.use_lora is not False


def simulated(facts: RunFacts) -> bool:
    """Whether the number of patients is a flag."""
    return facts.data is None


def from_random(facts: RunFacts) -> bool:
    """Whether the model's shape is free: a pre-trained run brings its own."""
    return not facts.pretrained
