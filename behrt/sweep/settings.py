"""What is a sweep, as its file says it?

`sweeps/<name>.yaml` names a base experiment, the settings laid over it, the space that is searched, and how: sampler,
pruner, budget, seed, objective. Everything is checked before a trial is trained; an error names the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from behrt.config import (
    EXPERIMENT_NAME,
    LORA_ONLY,
    MAX_SEED,
    SECTION_OF,
    SECTIONS,
    SIZES,
    ExperimentSettings,
    Section,
    UserError,
    build_settings,
    lay_over,
    nearest,
    read_experiment_file,
)
from behrt.sweep.space import (
    PARAMETER_TYPES,
    CategoricalParameter,
    IntParameter,
    Parameter,
    Space,
    grid,
    is_conditional,
    plain,
)

Objective = Literal["val_loss", "val_accuracy"]

NOT_SEARCHED = {
    **dict.fromkeys(
        ("data", "num_patients", "structure", "simulation_seed", "max_position", "vocab_size"),
        "changes what val_loss is measured on, and trials would not compare",
    ),
    **dict.fromkeys(
        ("epochs", "early_stopping_patience", "early_stopping_min_delta", "max_patients"),
        "decides how much a trial may learn, which is the pruner's to decide",
    ),
    **dict.fromkeys(("device", "precision", "compile", "stop_on", "seed", "accumulation_steps"), "is nothing to tune"),
}
"""Settings that a sweep may set and not search, and why."""


class Budget(Section):
    """When a study is over; whatever is reached first.

    Attributes:
        trials: finished ones: complete, pruned or failed for good.
        total_epochs: trained by all trials together; the trials that run then are finished.
        hours: since `behrt sweep run` was started; no trial is begun later.
    """

    trials: int = Field(default=40, ge=1)
    total_epochs: int | None = Field(default=None, ge=1)
    hours: float | None = Field(default=None, gt=0)


class SamplerSettings(Section):
    """How parameters are drawn; `startup_trials` at random before a model is fitted (tpe, gp, cmaes)."""

    name: Literal["tpe", "random", "grid", "cmaes", "gp"] = "tpe"
    startup_trials: int | None = Field(default=None, ge=0)


class PrunerSettings(Section):
    """Which trials are ended early. What is not given follows the rule of `samplers.make_pruner`.

    Attributes:
        startup_trials: median, patient: trials that are complete before any is pruned.
        warmup_epochs: median, patient: epochs that every trial is given.
        min_epochs, reduction_factor: hyperband: epochs that every trial is given; of so many trials one goes on.
        patience: patient: epochs without a better value before a trial is compared with others.
    """

    name: Literal["auto", "median", "hyperband", "patient", "none"] = "auto"
    startup_trials: int | None = Field(default=None, ge=0)
    warmup_epochs: int | None = Field(default=None, ge=0)
    min_epochs: int | None = Field(default=None, ge=1)
    reduction_factor: int = Field(default=3, ge=2)
    patience: int = Field(default=3, ge=0)


class SweepSettings(Section):
    """A sweep file, short forms written out."""

    note: str = ""
    base: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Any]
    sampler: SamplerSettings = SamplerSettings()
    pruner: PrunerSettings = PrunerSettings()
    budget: Budget = Budget()
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    objective: Objective = "val_loss"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep that has been checked.

    Attributes:
        name: of the study.
        base: what every trial has, but for the searched settings.
    """

    name: str
    base: ExperimentSettings
    space: Space
    sampler: SamplerSettings
    pruner: PrunerSettings
    budget: Budget
    seed: int
    objective: Objective
    note: str = ""

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "minimize" if self.objective == "val_loss" else "maximize"

    def trial_settings(self, params: Mapping[str, Any]) -> ExperimentSettings:
        """The settings of the trial that has these parameters."""
        values = {name: plain(value, self.space[name]) for name, value in params.items()}
        return build_settings(lay_over(self.base.model_dump(mode="json"), values))

    def definition(self) -> dict[str, Any]:
        """As JSON, everything that must not change while the study goes on: all but budget and notes."""
        return {
            "base": self.base.model_dump(mode="json", exclude={"note"}),
            "space": {name: parameter.model_dump(mode="json") for name, parameter in self.space.items()},
            "sampler": self.sampler.model_dump(mode="json"),
            "pruner": self.pruner.model_dump(mode="json"),
            "seed": self.seed,
            "objective": self.objective,
        }

    @classmethod
    def from_definition(cls, name: str, definition: Mapping[str, Any], budget: Budget) -> Self:
        """The sweep that gave `definition`."""
        return cls(
            name=name,
            base=build_settings(definition["base"]),
            space=TypeAdapter(dict[str, Parameter]).validate_python(definition["space"]),
            sampler=SamplerSettings(**definition["sampler"]),
            pruner=PrunerSettings(**definition["pruner"]),
            budget=budget,
            seed=definition["seed"],
            objective=definition["objective"],
        )


DEEPEST = 20
"""Keys within keys of a sweep file, after which an alias must refer to what it stands in."""

Model = TypeVar("Model", bound=Section)
Place = tuple[str, ...]


class _SweepFile:
    """The content of a sweep file, and where in it everything stands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise UserError(
                f"{path}: no such sweep file{nearest(path.name, [p.name for p in path.parent.glob('*.yaml')])}"
            )
        self.content = read_experiment_file(path, expected="a sweep: space, settings, budget and so on")
        self.lines: dict[Place, int] = {}
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is not None:
            self._find_lines(root, ())

    def _find_lines(self, node: yaml.Node, place: Place) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        if len(place) > DEEPEST:
            raise UserError(
                f"{self.path}, line {node.start_mark.line + 1}: {place[0]}: refers to itself, or is too deep"
            )
        for key, value in node.value:
            inner = (*place, str(key.value))
            if inner in self.lines:
                raise UserError(f"{self.path}, line {key.start_mark.line + 1}: {'.'.join(inner)}: stands there twice")
            self.lines[inner] = key.start_mark.line + 1
            self._find_lines(value, inner)

    def error(self, place: Place, problem: str) -> UserError:
        """A mistake at `place`, with the line of the innermost key that stands in the file."""
        known = next((place[:end] for end in range(len(place), 0, -1) if place[:end] in self.lines), None)
        where = f"{self.path}, line {self.lines[known]}" if known else str(self.path)
        return UserError(f"{where}: {'.'.join(place)}: {problem}")

    def read(self, cls: type[Model], values: Any, place: Place) -> Model:
        """A checked section."""
        if not isinstance(values, dict):
            raise self.error(place, f"expected keys and values, found {values!r}")
        for key in values:
            if key not in cls.model_fields:
                raise self.error((*place, str(key)), f"unknown key{_hint(cls, str(key))}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            inner = tuple(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            found = f" (found {str(problem['input'])[:60]!r})" if inner else ""
            raise self.error((*place, *inner), f"{message}{found}") from None


def _hint(cls: type[Section], key: str) -> str:
    if cls is Budget and key == "epochs":
        return "; total_epochs counts epochs over all trials, settings.epochs is each trial's most"
    return nearest(key, list(cls.model_fields))


def load_sweep(
    path: Path, *, name: str | None = None, trials: int | None = None, flags: Mapping[str, Any] | None = None
) -> Sweep:
    """Reads and checks a sweep file.

    Args:
        name: of the study; that of the file if None.
        trials: instead of the file's.
        flags: settings of the command line, laid over the file's.

    Raises:
        UserError: unknown keys, impossible ranges, settings that cannot be searched, values that a setting refuses.
    """
    flags = flags or {}
    name = path.stem if name is None else name
    if not EXPERIMENT_NAME.fullmatch(name):
        raise UserError(f"--study: {name!r} is no folder name; use letters, digits, '.', '_' and '-'")
    file = _SweepFile(path)
    content = dict(file.content)
    for key in ("sampler", "pruner"):
        if isinstance(content.get(key), str):
            content[key] = {"name": content[key]}
    for key in content:
        if key not in SweepSettings.model_fields:
            raise file.error((key,), f"unknown key{nearest(key, list(SweepSettings.model_fields))}")
    if not content.get("space"):
        raise file.error(("space",), "nothing to search; name a setting and its range")
    sections: dict[str, type[Section]] = {"sampler": SamplerSettings, "pruner": PrunerSettings, "budget": Budget}
    checked = {key: file.read(cls, content.get(key, {}), (key,)) for key, cls in sections.items()}
    settings = file.read(SweepSettings, {**content, **checked}, ())
    for key in (*settings.settings, *settings.space):
        if key not in SECTION_OF:
            place = "settings" if key in settings.settings else "space"
            if key in SECTIONS:
                raise file.error((place, key), "settings stand here without their sections: `lr: …`, not `training: …`")
            raise file.error((place, key), f"unknown setting{nearest(key, list(SECTION_OF))}")
    for key in settings.space:
        if key in flags:
            line = file.lines[("space", key)]
            raise UserError(f"--{key.replace('_', '-')}: is searched by {path}, line {line}; leave one out")
        if key in NOT_SEARCHED:
            raise file.error(("space", key), f"{NOT_SEARCHED[key]}; set it under settings")
        if key in settings.settings:
            raise file.error(("settings", key), "is searched under space; leave one out")
    space = {key: _read_parameter(file, key, values) for key, values in settings.space.items()}
    base = _read_base(file, settings, flags)
    if "model_size" in space and base.model.max_position == "auto":
        sizes = _values(space["model_size"])
        longest = max((SIZES[size]["max_position"] for size in sizes.values() if size in SIZES), default=50)
        # each size has a number of its own, and val_loss is measured on what it cuts off
        base = build_settings(lay_over(base.model_dump(mode="json"), {"max_position": longest}))
    _check_values(file, space, base)
    budget = settings.budget if trials is None else settings.budget.model_copy(update={"trials": trials})
    _check_sampler(file, settings.sampler, space, budget)
    return Sweep(
        name=name,
        base=base,
        space=space,
        sampler=settings.sampler,
        pruner=settings.pruner,
        budget=budget,
        seed=settings.seed,
        objective=settings.objective,
        note=settings.note,
    )


def _read_parameter(file: _SweepFile, name: str, values: Any) -> Any:
    kind = values.get("type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in PARAMETER_TYPES:
        found = "" if kind is None else f", found {kind!r}"
        raise file.error(("space", name), f"expected type: {', '.join(PARAMETER_TYPES)}{found}")
    return file.read(PARAMETER_TYPES[kind], values, ("space", name))


def _read_base(file: _SweepFile, settings: SweepSettings, flags: Mapping[str, Any]) -> ExperimentSettings:
    nested: dict[str, Any] = {}
    if settings.base is not None:
        beside = file.path.absolute().parent
        candidates = [
            Path("experiments") / settings.base,
            Path(settings.base),
            beside / settings.base,
            beside.parent / "experiments" / settings.base,
        ]
        found = [path / "experiment.yaml" if path.is_dir() else path for path in candidates if path.exists()]
        if not found:
            raise file.error(("base",), f"no experiment {settings.base}; looked for {candidates[0]}/experiment.yaml")
        nested = read_experiment_file(found[0])
        build_settings(nested, where=str(found[0]))
    _lay_over_checked(file, nested, settings.settings)
    nested = lay_over(nested, settings.settings)
    return build_settings(lay_over(nested, flags), where="flags" if flags else str(file.path))


def _lay_over_checked(file: _SweepFile, nested: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Names the first setting that cannot be laid over the base, if not all of them together can."""
    try:
        build_settings(lay_over(nested, values))
        return
    except UserError:
        pass
    for number, key in enumerate(values, start=1):
        try:
            build_settings(lay_over(nested, dict(list(values.items())[:number])))
        except UserError as error:
            raise file.error(("settings", key), _reason(error)) from None


def _values(parameter: Any) -> dict[str, Any]:
    """The values that a parameter must be able to take, by the key that names them; of many, some."""
    if isinstance(parameter, CategoricalParameter):
        return {f"choices[{number}]": choice for number, choice in enumerate(parameter.choices)}
    ends = {"low": parameter.low, "high": parameter.high}
    if isinstance(parameter, IntParameter):
        between = range(parameter.low, parameter.high + 1, parameter.step)
        return {**ends, **{str(value): value for value in between}} if len(between) <= MOST_VALUES_CHECKED else ends
    golden = parameter.low + 0.382 * (parameter.high - parameter.low)  # not whole where both ends are
    return {**ends, "between": golden if parameter.step is None else parameter.low + parameter.step}


MOST_VALUES_CHECKED = 200


def _check_values(file: _SweepFile, space: Space, base: ExperimentSettings) -> None:
    """Every bound and every choice must be a value that the setting takes, and that has an effect."""
    for name, parameter in space.items():
        lora: dict[str, Any] = {}
        if name in LORA_ONLY:
            if not base.adaptation.use_lora and "use_lora" not in space:
                raise file.error(("space", name), "has no effect without LoRA; add use_lora: true under settings")
            lora = {"use_lora": True}
        for key, value in _values(parameter).items():
            if name == "use_lora" and not isinstance(value, bool):
                raise file.error(("space", name, key), f"expected true and false, without quotes (found {value!r})")
            flags = {**lora, name: value}
            try:
                config = build_settings(lay_over(base.model_dump(mode="json"), flags)).model.config(vocab_size=1000)
            except UserError as error:
                hint = "; use type: int" if key == "between" and "integer" in str(error) else ""
                raise file.error(("space", name, key), _reason(error) + hint) from None
            if name == "lora_rank" and value > config.hidden_dim and "hidden_dim" not in space:
                raise file.error(("space", name, key), f"a rank above {config.hidden_dim}, the width of the layers")


def _reason(error: UserError) -> str:
    """What was wrong, without the place that the sweep file does not know."""
    return str(error).removeprefix("settings: ")


def _check_sampler(file: _SweepFile, sampler: SamplerSettings, space: Space, budget: Budget) -> None:
    categorical = [name for name, parameter in space.items() if isinstance(parameter, CategoricalParameter)]
    if sampler.name == "cmaes" and categorical:
        raise file.error(("sampler",), f"cmaes cannot search choices ({categorical[0]}); use tpe")
    if sampler.name == "grid":
        conditional = next((name for name in space if is_conditional(name, space)), None)
        if conditional is not None:
            raise file.error(
                ("space", conditional), "a grid would repeat trials without LoRA; make two sweeps, or use tpe"
            )
        try:
            points = grid(space)
        except ValueError as error:
            name, _, problem = str(error).partition(": ")
            raise file.error(("space", name), problem) from None
        size = 1
        for values in points.values():
            size *= len(values)
        if budget.trials > size:
            raise file.error(("budget", "trials"), f"{budget.trials}, but the grid has {size} points; ask for {size}")
