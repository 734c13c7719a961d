"""Which values may the settings of a trial take?

A parameter is a setting with a range or a list of choices. Settings that have no effect without LoRA are drawn only
for trials that have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from behrt.config import LORA_ONLY, Section

MOST = 2**53
"""Whole numbers beyond it are none as floats, in which samplers compute."""

MOST_STEPS = 1_000_000
"""Of a range with steps; more are no steps."""


class FloatParameter(Section):
    """A real number from `low` to `high`, both included; with `step`, only `low` plus multiples of it."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    step: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        _check_range(self.low, self.high, self.step, self.log)
        return self


class IntParameter(Section):
    """A whole number from `low` to `high`, both included, in steps of `step`."""

    type: Literal["int"]
    low: int = Field(ge=-MOST, le=MOST)
    high: int = Field(ge=-MOST, le=MOST)
    log: bool = False
    step: int = Field(default=1, ge=1, le=MOST)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        _check_range(self.low, self.high, None if self.step == 1 else self.step, self.log)
        return self


class CategoricalParameter(Section):
    """One of several values."""

    type: Literal["categorical"]
    choices: tuple[bool | int | float | str, ...]

    @field_validator("choices", mode="before")
    @classmethod
    def _are_single_values(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError("expected a list of values")
        for choice in value:
            if not isinstance(choice, (bool, int, float, str)):
                raise ValueError(
                    f'a choice is one value; several names go into one text, "query,value"; found {choice}'
                )
        return value

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if len(self.choices) < 2:
            raise ValueError("name at least two choices")
        if len({(type(choice), choice) for choice in self.choices}) < len(self.choices):
            raise ValueError("a choice stands there twice")
        return self


def _type_of(value: Any) -> Any:
    return value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)


Parameter = Annotated[
    Annotated[FloatParameter, Tag("float")]
    | Annotated[IntParameter, Tag("int")]
    | Annotated[CategoricalParameter, Tag("categorical")],
    Discriminator(_type_of),
]
Space = Mapping[str, FloatParameter | IntParameter | CategoricalParameter]
PARAMETER_TYPES: dict[str, type[FloatParameter | IntParameter | CategoricalParameter]] = {
    "float": FloatParameter,
    "int": IntParameter,
    "categorical": CategoricalParameter,
}


def _check_range(low: float, high: float, step: float | None, log: bool) -> None:
    if low >= high:
        raise ValueError(f"low {low:g} is not below high {high:g}")
    if log and low <= 0:
        raise ValueError(f"log needs a low above 0, found {low:g}")
    if log and step is not None:
        raise ValueError("log and step do not go together; leave one out")
    if step is not None:
        steps = (high - low) / step
        if steps > MOST_STEPS and isinstance(step, float):
            raise ValueError(f"steps of {step:g} from {low:g} to {high:g} are too many; leave step out")
        if not math.isclose(steps, round(steps), abs_tol=1e-9):
            raise ValueError(
                f"steps of {step:g} from {low:g} do not reach high {high:g}, only {low + int(steps) * step:g}"
            )


def distribution(parameter: FloatParameter | IntParameter | CategoricalParameter) -> BaseDistribution:
    """The parameter as Optuna knows it."""
    if isinstance(parameter, FloatParameter):
        return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
    if isinstance(parameter, IntParameter):
        return IntDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
    return CategoricalDistribution(parameter.choices)


def plain(value: Any, parameter: FloatParameter | IntParameter | CategoricalParameter) -> Any:
    """A value of the parameter as a person would write it: Optuna adds up steps, rounding errors and all.

    >>> plain(0.15000000000000002, FloatParameter(type="float", low=0.0, high=0.5, step=0.05))
    0.15
    """
    if isinstance(parameter, FloatParameter) and parameter.step is not None:
        return float(f"{value:.12g}")
    return value


def is_conditional(name: str, space: Space) -> bool:
    """Whether the setting is drawn only for trials with LoRA."""
    return name in LORA_ONLY and "use_lora" in space


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """The settings of a trial, by name; those that have no effect in it are left out."""
    settings: dict[str, Any] = {}
    for name in sorted(space, key=lambda name: name != "use_lora"):
        if is_conditional(name, space) and not settings["use_lora"]:
            continue
        parameter = space[name]
        if isinstance(parameter, FloatParameter):
            settings[name] = trial.suggest_float(
                name, parameter.low, parameter.high, log=parameter.log, step=parameter.step
            )
        elif isinstance(parameter, IntParameter):
            settings[name] = trial.suggest_int(
                name, parameter.low, parameter.high, log=parameter.log, step=parameter.step
            )
        else:
            settings[name] = trial.suggest_categorical(name, parameter.choices)
    return settings


def grid(space: Space) -> dict[str, list[bool | int | float | str]]:
    """All values of each parameter.

    Raises:
        ValueError: a parameter has no countable values: a float without a step, a logarithmic int.
    """
    points: dict[str, list[bool | int | float | str]] = {}
    for name, parameter in space.items():
        if isinstance(parameter, CategoricalParameter):
            points[name] = list(parameter.choices)
        elif isinstance(parameter, IntParameter) and not parameter.log:
            points[name] = list(range(parameter.low, parameter.high + 1, parameter.step))
        elif isinstance(parameter, FloatParameter) and parameter.step is not None:
            steps = round((parameter.high - parameter.low) / parameter.step)
            points[name] = [parameter.low + number * parameter.step for number in range(steps + 1)]
        else:
            raise ValueError(f"{name}: a grid needs a step, or a list of choices")
    return points
