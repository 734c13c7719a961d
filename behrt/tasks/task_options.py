"""Which choices turn histories into the labels of a task?

One field per flag of `behrt labels`. Times are days; docs/tasks.md says what each rule does.
"""

from __future__ import annotations

from datetime import date
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from behrt.config import MAX_SEED, Settings

LONGEST = 100_000.0
"""Days of the longest span: longer than any life, and short enough that sums of times do not overflow."""

Moment = Literal["each-visit", "first-visit", "last-visit", "one-visit", "each-discharge", "each-admission"]


class TaskOptions(Settings):
    """What all tasks share: when a prediction is made, for whom, and how long a patient is observed.

    Attributes:
        at: the moments. Ends of visits: each; the first, the last or one by chance that qualifies; ends of stays; or
            `hours` after the beginning of each stay.
        by: of `last-visit`, the day by whose end it must have ended.
        gap: days from the prediction to the beginning of the window in which the outcome counts.
        observed_until: how long a patient's record would show an outcome: until its last event, for ever (`always`), or
            until the end of a day; never beyond death.
        stays: which visits are stays in hospital: those with an admission code, or all.
    """

    at: Moment = "each-visit"
    hours: float = Field(default=24.0, ge=0, le=LONGEST)
    by: date | None = None
    horizon: float = Field(default=365.0, gt=0, le=LONGEST)
    gap: float = Field(default=0.0, ge=0, le=LONGEST)
    min_visits: int = Field(default=1, ge=1, le=2**31 - 1)
    min_days: float = Field(default=0.0, ge=0, le=LONGEST)
    observed_until: date | Literal["last-event", "always"] = "last-event"
    stays: Literal["admissions", "visits"] = "admissions"
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @field_validator("observed_until", mode="before")
    @classmethod
    def _day_or_word(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("last-event", "always"):
            try:
                return date.fromisoformat(value)
            except ValueError:
                raise ValueError("expected last-event, always or a day like 2010-12-31") from None
        return value

    @model_validator(mode="after")
    def _a_last_visit_has_its_day(self) -> Self:
        if (self.at == "last-visit") != (self.by is not None):
            raise ValueError("--at last-visit and --by only work together: give both or neither")
        return self

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        for name, reason in self._idle().items():
            if name in self.model_fields_set:
                raise ValueError(f"--{name.replace('_', '-')} has no effect {reason}; leave it out")
        return self

    def _idle(self) -> dict[str, str]:
        """The fields that have no effect beside the others, and because of what."""
        idle = {}
        if self.at != "each-admission":
            idle["hours"] = "without --at each-admission"
        if self.at != "one-visit":
            idle["seed"] = "without --at one-visit"
        return idle


class ReadmissionOptions(TaskOptions):
    """Of `readmission`: at the end of each stay.

    Attributes:
        planned: codes of admissions that are no readmission; each also stands for its refinements (`CODE//…`).

    >>> ReadmissionOptions().horizon
    30.0
    """

    where: ClassVar[str] = "labels readmission"

    at: Literal["each-discharge"] = "each-discharge"
    horizon: float = Field(default=30.0, ge=1, le=LONGEST)
    gap: Literal[0] = 0
    observed_until: date | Literal["last-event", "always"] = "always"
    planned: tuple[str, ...] = ()

    def _idle(self) -> dict[str, str]:
        idle = super()._idle()
        if self.stays == "visits":
            idle["planned"] = "with --stays visits, which have no code of admission"
        return idle


class DiseaseOptions(TaskOptions):
    """Of `disease`: the first occurrence of a code set within the horizon."""

    where: ClassVar[str] = "labels disease"


class NextVisitOptions(TaskOptions):
    """Of `next-visit`: the code sets of the visit that follows. The horizon is that visit, whenever it is."""

    where: ClassVar[str] = "labels next-visit"

    horizon: Literal[0] = 0
    gap: Literal[0] = 0

    @model_validator(mode="after")
    def _after_visits(self) -> Self:
        if self.at == "each-admission":
            raise ValueError("--at each-admission is inside a visit; name another moment")
        return self


class SurvivalOptions(TaskOptions):
    """Of `survival`: days to death, or to a code set. Without a horizon, time is followed to the end.

    >>> SurvivalOptions(at="last-visit")
    Traceback (most recent call last):
    ...
    behrt.config.UserError: labels survival: --at last-visit and --by only work together: give both or neither
    """

    where: ClassVar[str] = "labels survival"

    at: Moment = "one-visit"
    horizon: float = Field(default=LONGEST, gt=0, le=LONGEST)


class PhenotypingOptions(TaskOptions):
    """Of `phenotyping`: the code sets in the rest of the stay, or, at other moments, within the horizon."""

    where: ClassVar[str] = "labels phenotyping"

    at: Moment = "each-admission"

    def _idle(self) -> dict[str, str]:
        idle = super()._idle()
        if self.at == "each-admission":
            idle |= dict.fromkeys(("horizon", "observed_until"), "with --at each-admission, the rest of a stay")
        return idle
