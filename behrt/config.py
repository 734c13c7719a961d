"""Which settings does a run have, and which values may they take?

Every setting is keyword-only, frozen, validated on construction, and named exactly like its command-line flag
(`lora_rank` is `--lora-rank`). An experiment file groups them into the sections `model`, `adaptation`, `data` and
`training`; `load_experiment` reads one and lays flags over it.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

ModelSize = Literal["small", "medium", "large"]
LoRATarget = Literal["query", "key", "value", "output", "feedforward"]
Structure = Literal["hmm", "none"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
StopOn = Literal["error", "warning", "never"]

FLAGS = "flags"
"""Where settings come from that no file holds; errors then name the flag."""

MAX_SEED = 2**63 - 1
"""What every generator takes."""

MAX_AUTO_POSITION = 512
"""Positions that `--max-position auto` never exceeds."""

MAX_POSITION = 100_000
"""Positions that attention, which is quadratic in them, can be asked for at all."""

SELECTED_SHARE = 0.15
"""Share of the ordinary (not special) tokens that are selected to be guessed (Devlin et al., 2019)."""
SHOWN_AS_MASK = 0.8
"""Of the selected tokens, the share shown as `[MASK]`."""
SHOWN_AS_RANDOM = 0.1
"""Of the selected tokens, the share shown as a code drawn uniformly from all ordinary ones; the rest shows itself."""


class UserError(ValueError):
    """A mistake of the user's: one line that names the file or flag, what was found, what was expected, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # names of files and keys may hold line breaks


def nearest(name: str, candidates: list[str]) -> str:
    """The known name that a misspelt one most resembles, as a hint to append to an error.

    >>> nearest("droput", ["dropout", "epochs"])
    "; did you mean 'dropout'?"
    >>> nearest("zzz", ["dropout", "epochs"])
    '; known: dropout, epochs'
    """
    close = difflib.get_close_matches(name, candidates, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(candidates))}"


def refuse_what_is_no_file(path: Path) -> None:
    """`UserError` where a folder, a pipe or a device stands in the place of a file: the latter two may never end.

    What is not there, or cannot be looked at, is for the one who opens it to say.
    """
    try:
        mode = path.stat().st_mode
    except ValueError:  # a null byte
        raise UserError(f"{str(path)[:200]!r}: is no name of a file; correct it") from None
    except OSError:
        return
    if not stat.S_ISREG(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UserError(f"{path}: is no file, but {found}; expected a file, name another or put it there")


def resolved(path: Path) -> Path:
    """The absolute path without links; `UserError` where these lead back to themselves."""
    try:
        return path.resolve()
    except (RuntimeError, OSError) as error:  # the former until Python 3.12
        reason = error.strerror if isinstance(error, OSError) else "symbolic links that lead back to themselves"
        raise UserError(f"{path}: is no place for files: {reason}; name another") from None


def describe_validation_error(error: ValidationError, cls: type[BaseModel], where: str) -> str:
    """The first problem of a pydantic error as one line: place, finding, expectation, nearest known name."""
    problem = error.errors(include_url=False)[0]
    path = [str(part) for part in problem["loc"]]
    owner: type[BaseModel] = cls
    place, is_section = [], True
    for part in path:
        place.append(part)
        annotation = owner.model_fields[part].annotation if part in owner.model_fields else None
        is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if not is_section:
            break  # what may follow names the alternative of a union, or the place in a list
        owner = annotation  # type: ignore[assignment]
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if problem["type"] == "value_error" and is_section:
        return f"{where}: {message}"  # about several keys together, which the message names
    named = "--" + place[-1].replace("_", "-") if where == FLAGS else f"{where}: {'.'.join(place)}"
    if problem["type"] == "extra_forbidden":
        return f"{named}: unknown key{nearest(path[-1], list(owner.model_fields))}"
    if is_section:
        message = "expected keys and values"
    return f"{named}: {message} (found {shown_value(problem['input'])!r})"


def shown_value(value: Any) -> str:
    """A value for an error, in 60 characters.

    >>> shown_value({"lr": 0.1}), shown_value(1 << 99_999)
    ("{'lr': 0.1}", 'a number of thousands of digits')
    """
    try:
        return str(value)[:60]
    except ValueError:  # Python refuses to write out, as it refuses to read
        return "a number of thousands of digits"


class Section(BaseModel):
    """Base of the sections of an experiment: keyword-only, frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("expected a number")  # pydantic takes true for 1
        return value


class Settings(Section):
    """Base of settings that stand on their own: construction raises `UserError`, with the nearest known name."""

    where: ClassVar[str] = "settings"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(describe_validation_error(error, type(self), type(self).where)) from None


SIZES: dict[str, dict[str, int]] = {
    "small": {
        "embedding_dim": 64,
        "hidden_dim": 128,
        "num_layers": 2,
        "num_heads": 4,
        "feedforward_dim": 512,
        "max_position": 50,
    },
    "medium": {
        "embedding_dim": 128,
        "hidden_dim": 256,
        "num_layers": 4,
        "num_heads": 8,
        "feedforward_dim": 1024,
        "max_position": 100,
    },
    "large": {
        "embedding_dim": 256,
        "hidden_dim": 512,
        "num_layers": 6,
        "num_heads": 8,
        "feedforward_dim": 2048,
        "max_position": 200,
    },
}
"""The three sizes: small for a laptop, medium for a small GPU, large for an A40."""


class BEHRTConfig(Settings):
    """Shape of one BEHRT model.

    >>> BEHRTConfig.small(vocab_size=1000).hidden_dim
    128
    >>> BEHRTConfig(vocab_size=1000, hidden_dim=128, num_heads=3)
    Traceback (most recent call last):
    ...
    behrt.config.UserError: model: num_heads 3 does not divide hidden_dim 128
    """

    where: ClassVar[str] = "model"

    vocab_size: int = Field(gt=5, description="number of tokens, the five special ones included")
    embedding_dim: int = Field(default=64, gt=0)
    hidden_dim: int = Field(default=128, gt=0)
    num_layers: int = Field(default=2, gt=0)
    num_heads: int = Field(default=4, gt=0)
    feedforward_dim: int = Field(default=512, gt=0)
    max_position: int = Field(default=50, ge=3, description="longest sequence, special tokens included")
    dropout: float = Field(default=0.1, ge=0, lt=1)
    age_bins: int = Field(default=22, ge=2, description="bin 0 is an unknown age; five years each, the last is 100+")
    max_visits: int = Field(default=512, ge=2, description="visit numbers are clipped below this")

    @model_validator(mode="after")
    def _heads_divide_the_hidden_size(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_dim {self.hidden_dim}")
        return self

    def to_dict(self) -> dict[str, int | float]:
        """The fields by name: what model libraries (PEFT is one) ask a model's `config` for."""
        return self.model_dump()

    @classmethod
    def of_size(cls, size: str, **overrides: Any) -> Self:
        """The named size with some fields replaced; `vocab_size` is required."""
        if size not in SIZES:
            raise UserError(f"model_size: {size!r} is not one of {', '.join(SIZES)}")
        return cls(**{**SIZES[size], **overrides})

    @classmethod
    def small(cls, **overrides: Any) -> Self:
        return cls.of_size("small", **overrides)

    @classmethod
    def medium(cls, **overrides: Any) -> Self:
        return cls.of_size("medium", **overrides)

    @classmethod
    def large(cls, **overrides: Any) -> Self:
        return cls.of_size("large", **overrides)


class ModelSettings(Section):
    """Section `model`: the size, and what departs from it."""

    model_size: ModelSize = "small"
    vocab_size: int | None = Field(default=None, gt=5, le=10_000_000, description="default: the data's own vocabulary")
    max_position: int | Literal["auto"] = "auto"
    dropout: float = Field(default=0.1, ge=0, lt=1)
    embedding_dim: int | None = Field(default=None, gt=0, le=65_536)
    hidden_dim: int | None = Field(default=None, gt=0, le=65_536)
    num_layers: int | None = Field(default=None, gt=0, le=1000)
    num_heads: int | None = Field(default=None, gt=0, le=1024)
    feedforward_dim: int | None = Field(default=None, gt=0, le=262_144)

    @field_validator("max_position")
    @classmethod
    def _room_for_a_sequence(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 3:
            raise ValueError("a sequence needs at least 3 positions ([CLS] code [SEP]), or 'auto'")
        if isinstance(value, int) and value > MAX_POSITION:
            raise ValueError(f"expected at most {MAX_POSITION:,} positions, or 'auto'")
        return value

    def config(self, *, vocab_size: int, max_position: int | None = None) -> BEHRTConfig:
        """The model's shape for a vocabulary; `max_position` replaces the size's own where it was left on `auto`."""
        shape = {
            name: value
            for name in ("embedding_dim", "hidden_dim", "num_layers", "num_heads", "feedforward_dim")
            if (value := getattr(self, name)) is not None
        }
        if isinstance(self.max_position, int):
            shape["max_position"] = self.max_position
        elif max_position is not None:
            shape["max_position"] = max_position
        return BEHRTConfig.of_size(self.model_size, vocab_size=vocab_size, dropout=self.dropout, **shape)


class AdaptationSettings(Section):
    """Section `adaptation`: what is trained, and where the weights start."""

    use_lora: bool = False
    lora_rank: int = Field(default=16, ge=1, le=65_536)
    lora_alpha: float | None = Field(default=None, gt=0, description="default: twice the rank")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: tuple[LoRATarget, ...] = Field(default=("query", "key", "value", "output"), min_length=1)
    freeze_base: bool = True
    train_embeddings: bool = True
    train_head: bool = True
    init_from: str | None = Field(default=None, description="a run, an experiment folder or a checkpoint folder")

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, (list, tuple)):
            known = list(LoRATarget.__args__)  # type: ignore[attr-defined]
            for target in value:
                if target not in known:
                    raise ValueError(f"{target!r} names no linear layer{nearest(str(target), known)}")
            value = tuple(dict.fromkeys(value))
        return value


class DataSettings(Section):
    """Section `data`: prepared records, or a simulated cohort."""

    data: str | None = Field(default=None, description="prepared records; without it a cohort is simulated")
    num_patients: int = Field(default=5000, ge=40, le=10_000_000, description="patients of the simulated cohort")
    max_patients: int | None = Field(
        default=None, ge=1, le=MAX_SEED, description="use only this many training patients"
    )
    structure: Structure = "hmm"
    simulation_seed: int = Field(default=0, ge=0, le=MAX_SEED)


class TrainingSettings(Section):
    """Section `training`: optimisation, stopping, and the machine."""

    epochs: int = Field(default=50, ge=1, le=1_000_000)
    batch_size: int = Field(default=32, ge=1, le=10_000_000, description="patients per optimizer step")
    accumulation_steps: int = Field(
        default=1, ge=1, le=10_000_000, description="micro-batches that a step is computed in"
    )
    lr: float = Field(default=1e-3, gt=0)
    table_rate: float = Field(
        default=1.0, gt=0, le=1000, description="rate of tables, decoder, biases and norms, as a multiple of lr"
    )
    mlm_probability: float = Field(
        default=SELECTED_SHARE, gt=0, le=0.5, description="share of the codes to guess in training"
    )
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1, description="share of all steps")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    gradient_clip: float = Field(default=1.0, gt=0, description="largest L2 norm of the gradient")
    early_stopping_patience: int = Field(
        default=10, ge=0, le=1_000_000, description="epochs without a better val_loss; 0 is never"
    )
    early_stopping_min_delta: float = Field(default=0.0, ge=0, description="how much lower counts as better")
    stop_on: StopOn = Field(default="error", description="findings of the doctor that end a run in progress")
    recover: bool = Field(default=False, description="go back to the last checkpoint when a loss is no number")
    checkpoint_minutes: float = Field(default=10.0, gt=0, le=100_000, description="between checkpoints in an epoch")
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    device: Device = "auto"
    precision: Precision = "auto"
    compile: bool = Field(default=False, description="whether the layers are compiled, on CUDA")

    @field_validator("batch_size", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any) -> Any:
        if value == "auto":
            raise ValueError("auto is for behrt train on the command line, which tells the number that it finds")
        return value

    @model_validator(mode="after")
    def _micro_batches_hold_patients(self) -> Self:
        if self.accumulation_steps > self.batch_size:
            raise ValueError(
                f"accumulation_steps {self.accumulation_steps} is more than batch_size {self.batch_size} patients"
            )
        return self


EXPERIMENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ExperimentSettings(Section):
    """All settings of one training run."""

    note: str = ""
    model: ModelSettings = ModelSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()

    def flat(self) -> dict[str, Any]:
        """Every setting as `section.name`, the form in which MLflow stores them."""
        sections = self.model_dump(mode="json", exclude={"note"})
        return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}


class TaskSettings(Section):
    """Section `task` of a fine-tuning: what is predicted, and from which run.

    Attributes:
        task: its name; what is predicted follows from the labels.
        labels: a MEDS label file, or a folder of them.
        from_run: the pre-trained run: its folder, a checkpoint folder, or its MLflow run id.
        from_scratch: train an encoder of that run's shape from random weights instead.
        gap: days before a prediction that are hidden.
        max_labels: use only so many training labels, by the seed of the training.
        head_start: where the head begins: at the best linear probe of the encoder as it is (`tasks/probing.py`), or at
            scores that are the same for everybody.
    """

    task: str
    labels: str
    from_run: str
    from_scratch: bool = False
    gap: float = Field(default=0.0, ge=0, le=100_000)
    class_weights: Literal["none", "balanced"] = "none"
    max_labels: int | None = Field(default=None, ge=1, le=MAX_SEED)
    head_start: Literal["probe", "prevalence"] = "probe"

    @field_validator("task")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not EXPERIMENT_NAME.fullmatch(value):
            raise ValueError("expected letters, digits, '.', '_' and '-'")
        return value


class FinetuneSettings(ExperimentSettings):
    """All settings of one fine-tuning."""

    task: TaskSettings


AnySettings = TypeVar("AnySettings", bound=ExperimentSettings)

SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "adaptation": AdaptationSettings,
    "data": DataSettings,
    "training": TrainingSettings,
}
SECTION_OF: dict[str, str] = {name: section for section, cls in SECTIONS.items() for name in cls.model_fields}
"""The section of each setting; names are unique over sections, so that a flag needs no prefix."""


LORA_ONLY = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "freeze_base")
"""Settings that have no effect without LoRA."""


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "use_lora": True,
        "lr": 3e-3,
        "table_rate": 3.0,
        "mlm_probability": 0.4,
        "epochs": 16,
    },
    "m1": {
        "model_size": "small",
        "use_lora": True,
        "lora_rank": 8,
        "num_patients": 200,
        "epochs": 50,
        "batch_size": 16,
        "lr": 1e-4,
        "weight_decay": 0.01,
        "dropout": 0.1,
        "early_stopping_patience": 10,
    },
    "a40": {
        "model_size": "large",
        "use_lora": True,
        "lora_rank": 16,
        "num_patients": 5000,
        "epochs": 100,
        "batch_size": 128,
        "lr": 1e-4,
        "weight_decay": 0.01,
        "dropout": 0.2,
        "early_stopping_patience": 10,
    },
}
"""`m1` and `a40`: the starting points of the troubleshooting guide, section "Starting Points (Recommended Defaults)".
`quick`: what comes soonest to 90% of what can be learned of 5,000 simulated patients (docs/performance.md)."""


def lay_over(base: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A nested experiment mapping with flat flags laid over it, each into its section.

    >>> lay_over({"model": {"dropout": 0.2}}, {"dropout": 0.3, "lr": 0.001})
    {'model': {'dropout': 0.3}, 'training': {'lr': 0.001}}
    """
    merged: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in base.items()}
    for name, value in flags.items():
        section = merged.setdefault(SECTION_OF[name], {})
        if isinstance(section, dict):  # anything else is refused, by name, when the settings are built
            section[name] = value
    return merged


MOST_BYTES, MOST_VALUES, DEEPEST = 1_000_000, 10_000, 20
"""Of a settings file. Beyond these it is another file, or one whose aliases multiply until no memory holds them."""


class _SettingsLoader(yaml.SafeLoader):
    """Reads YAML without objects of Python, and says where a value is not what it looks like."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):  # 2024-13-45, or !!bool maybe
            raise yaml.constructor.ConstructorError(
                None, None, "a value that looks like a date or a number, and is none", node.start_mark
            ) from None


def _load_yaml(text: str, path: Path) -> Any:
    """The content of a settings file; `UserError` for keys that stand there twice, aliases that multiply, depth."""
    loader = _SettingsLoader(text)
    count = 0

    def check(node: yaml.Node, place: tuple[str, ...], depth: int) -> None:
        nonlocal count
        count += 1
        line = f"{path}, line {node.start_mark.line + 1}"
        if depth > DEEPEST:
            raise UserError(f"{line}: {place[0][:60] if place else 'a list'}: refers to itself, or is too deep")
        if count > MOST_VALUES:
            raise UserError(f"{line}: too many values for a settings file; expected at most {MOST_VALUES:,}")
        if isinstance(node, yaml.SequenceNode):
            for value in node.value:
                check(value, place, depth + 1)
        elif isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else "a key that is no name"
                inner = (*place, name)
                if name in keys:
                    where = f"{path}, line {key.start_mark.line + 1}"
                    raise UserError(f"{where}: {'.'.join(inner)[:200]}: stands there twice")
                keys.add(name)
                check(key, inner, depth + 1)
                check(value, inner, depth + 1)

    try:
        root = loader.get_single_node()
        if root is None:
            return None
        check(root, (), 0)
        return loader.construct_document(root)
    except RecursionError:
        raise UserError(f"{path}: is nested too deep for a settings file; expected sections and their keys") from None
    finally:
        loader.dispose()


def read_experiment_file(
    path: Path, *, expected: str = "sections model, adaptation, data and training"
) -> dict[str, Any]:
    """The nested mapping of an `experiment.yaml`; `UserError` where it is missing, unreadable or no mapping."""
    refuse_what_is_no_file(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise UserError(f"{path}: is too large for a settings file; expected at most {MOST_BYTES:,} bytes")
        loaded = _load_yaml(raw.decode("utf-8-sig"), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such experiment file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}{line}: not valid YAML: {problem[:200]}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError(f"{path}: expected {expected}, found {type(loaded).__name__}")
    return {section: {} if fields is None else fields for section, fields in loaded.items()}


def build_settings(nested: Mapping[str, Any], *, where: str = "settings") -> ExperimentSettings:
    """Validated settings from a nested mapping; errors name `where` (a file, or the flags)."""
    return _built(ExperimentSettings, nested, where)


def build_finetune_settings(nested: Mapping[str, Any], *, where: str) -> FinetuneSettings:
    """The same of a fine-tuning."""
    return _built(FinetuneSettings, nested, where)


def settings_of_run(nested: Mapping[str, Any], *, where: str) -> ExperimentSettings:
    """Those that a run was begun with: of a fine-tuning, which has a task, `FinetuneSettings`."""
    return _built(FinetuneSettings if "task" in nested else ExperimentSettings, nested, where)


def _built(kind: type[AnySettings], nested: Mapping[str, Any], where: str) -> AnySettings:
    try:
        return kind.model_validate(dict(nested))
    except ValidationError as error:
        raise UserError(describe_validation_error(error, kind, where)) from None


def load_experiment(
    path: Path | None = None, *, preset: str | None = None, flags: Mapping[str, Any] | None = None
) -> ExperimentSettings:
    """Flags over file over preset over defaults.

    Raises:
        UserError: unknown preset or key (with the nearest match), a value out of range, an unreadable file, a flag that
            would have no effect.
    """
    nested: dict[str, Any] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"--preset: {preset!r} is unknown{nearest(preset, list(PRESETS))}")
        nested = lay_over(nested, PRESETS[preset])
    if path is not None:
        from_file = read_experiment_file(path)
        build_settings(from_file, where=str(path))
        for key, value in from_file.items():
            nested[key] = {**nested.get(key, {}), **value} if isinstance(value, dict) else value
    settings = build_settings(lay_over(nested, dict(flags or {})), where=FLAGS if flags else str(path or preset))
    refuse_idle_flags(settings, flags or {})
    return settings


def refuse_idle_flags(settings: ExperimentSettings, flags: Mapping[str, Any]) -> None:
    """`UserError` for a flag that would change nothing: most likely another one was forgotten."""
    idle: dict[str, str] = {}
    if not settings.adaptation.use_lora:
        idle |= dict.fromkeys(LORA_ONLY, "has no effect without --use-lora; add it, or leave this out")
    if settings.data.data is not None:
        simulated = ("num_patients", "structure", "simulation_seed")
        idle |= dict.fromkeys(simulated, "is for simulated cohorts, and --data names prepared records; leave one out")
    for name in flags:
        if name in idle:
            raise UserError(f"--{name.replace('_', '-')}: {idle[name]}")


def experiment_yaml(settings: ExperimentSettings) -> str:
    """The settings as the text of an `experiment.yaml` that `load_experiment` reads back unchanged."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
