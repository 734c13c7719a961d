"""What does a training print, and under which names does a record keep our figures?

`read_lines` reads the lines of the troubleshooting guide, of our own console, and of most other tools. `curves_of`
turns the points of any record, a table's as well as a log's, into curves: it finds our figures under the names of
others, and refuses what is no number.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from behrt.config import UserError, nearest
from behrt.doctor.curves import Curve
from behrt.history import EPOCH_FIGURES

log = logging.getLogger(__name__)

SYNONYMS: dict[str, tuple[str, ...]] = {
    "epoch": (
        "epoch", "epochs", "train_epoch",
        "step", "steps", "global_step", "train_global_step", "iteration", "iterations",
    ),
    "train_loss": ("train_loss", "training_loss", "loss", "train_loss_epoch"),
    "train_accuracy": (
        "train_accuracy", "training_accuracy", "train_acc", "accuracy", "acc",
        "train_accuracy_epoch", "train_acc_epoch",
    ),
    "val_loss": ("val_loss", "valid_loss", "validation_loss", "eval_loss", "dev_loss", "val_loss_epoch"),
    "val_accuracy": (
        "val_accuracy", "val_acc", "valid_accuracy", "valid_acc", "validation_accuracy", "validation_acc",
        "eval_accuracy", "eval_acc", "dev_accuracy", "dev_acc", "val_accuracy_epoch", "val_acc_epoch",
    ),
    "train_loss_running": ("train_loss_running",),
    "learning_rate": ("learning_rate", "lr", "train_learning_rate", "train_lr"),
    "gradient_norm": ("gradient_norm", "grad_norm", "train_gradient_norm", "train_grad_norm"),
    "tokens_per_second": ("tokens_per_second",),
    "epoch_seconds": ("epoch_seconds", "epoch_time", "time_per_epoch"),
}  # fmt: skip
"""Our names, and those under which other tools keep the same figure, the likeliest first; compared after `plain`."""

assert set(SYNONYMS) == {"epoch", *EPOCH_FIGURES}

ACCURACIES = ("train_accuracy", "val_accuracy")

NOT_FINITE = {"nan", "inf", "infinity", "null", "none"}
"""Words for a number that was not finite, after a sign or without one."""

MOST_EPOCHS = 1e12
"""Beyond it, and at NaN, a number counts no epochs and no steps."""

_NAME = re.compile(r"(?!.*//)[A-Za-z_][A-Za-z_./ -]{0,60}")
"""What may be shown as a name or a word: no digit, and nothing that has the `//` of a code."""

SHOWN_NAMES = 12
"""Names of a log that an error lists."""


class Point(NamedTuple):
    """One value as a log has it, nothing checked yet; `row` counts from 1 and is for errors."""

    row: int
    epoch: object
    value: object


Points = dict[str, list[Point]]
"""The points of a log by its own names, in its own order."""


# --- from our names to the log's ---


def plain(name: str) -> str:
    """A name as names are compared.

    >>> plain("Val/Loss"), plain("train-acc "), plain("Learning Rate")
    ('val_loss', 'train_acc', 'learning_rate')
    """
    return re.sub(r"[/.\-\s_]+", "_", name.strip().lower())


def names_of(ours: str, names: Iterable[str], columns: Mapping[str, str]) -> list[str]:
    """The log's names for one of ours, the likeliest first; one that was named with `--map` stands alone."""
    if ours in columns:
        return [name for name in names if name == columns[ours]]
    known = SYNONYMS[ours]
    return sorted((name for name in names if plain(name) in known), key=lambda name: known.index(plain(name)))


def figure_named(name: str, columns: Mapping[str, str]) -> bool:
    """Whether the name may stand for the epoch or a figure."""
    return any(names_of(ours, [name], columns) for ours in SYNONYMS)


def check_columns(columns: Mapping[str, str], names: Collection[str], where: str) -> None:
    """`UserError` for a `--map` of which we do not know the left side, or the log the right one."""
    for ours, theirs in columns.items():
        if ours not in SYNONYMS:
            raise UserError(f"--map {ours}={theirs}: {ours!r} is no figure of ours{nearest(ours, list(SYNONYMS))}")
        if theirs not in names:
            hint = nearest(theirs, list(names))
            did_you_mean = hint if hint.startswith("; did you mean") else ""
            raise UserError(
                f"--map {ours}={theirs}: {where} has no column {theirs!r}; it has {shown(names)}{did_you_mean}"
            )


def shown(names: Collection[str]) -> str:
    """Names of a log for an error: the first few, on one line.

    A table without a header, or JSON by patient, has ids, dates and codes where names should be: these are counted.
    """
    plain_names = [str(name)[:40] for name in names if _NAME.fullmatch(str(name))]
    first = ", ".join(map(repr, itertools.islice(plain_names, SHOWN_NAMES))) or "no names of figures"
    more = len(names) - min(len(plain_names), SHOWN_NAMES)
    return f"{first} and {more} more" if more > 0 else first


def curves_of(points: Points, where: str, columns: Mapping[str, str]) -> dict[str, Curve]:
    """The curves of a log under our names.

    Of several names for one figure the one with most epochs counts, then the likeliest: Hugging Face keeps `loss` for
    each epoch, and a single `train_loss` for the whole training.

    Raises:
        UserError: a value or an epoch that is no number; a wrong `columns`.
    """
    check_columns(columns, points, where)
    curves = {}
    for ours in EPOCH_FIGURES:
        names = [name for name in names_of(ours, points, columns) if points[name]]
        if names:
            most = max(names, key=lambda name: len({str(point.epoch) for point in points[name]}))
            curves[ours] = _curve(points[most], most, where)
    return in_shares(curves)


def _curve(points: Sequence[Point], name: str, where: str) -> Curve:
    """A null gives way to a number of the same epoch: it then stands for a blank cell."""
    values: dict[float, float | None] = {}
    for point in points:
        place = f"{where}: row {point.row}"
        epoch = number(point.epoch, f"{place}, the epoch of {name[:40]!r}")
        if epoch is None or not abs(epoch) <= MOST_EPOCHS:
            raise UserError(f"{place}, the epoch of {name[:40]!r}: expected a number, found {word(point.epoch)}")
        value = number(point.value, f"{place}, {name[:40]!r}")
        if value is not None or epoch not in values:
            values[epoch] = value
    return Curve.of(values.items())


def number(value: object, place: str) -> float | None:
    """The number, NaN and infinity included; None for null. Raises `UserError` for anything else, at `place`."""
    if value is None:
        return None
    if isinstance(value, str) and value.strip().lower().lstrip("+-") in NOT_FINITE:
        return math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    raise UserError(f"{place}: expected a number, found {word(value)}")


def word(value: object) -> str:
    """A value for an error: a plain word as it is; of anything else, which may be an id, a date or a code, its kind.

    >>> word("high"), word("10023771")
    ("'high'", 'text that is no plain word')
    """
    text = str(value)
    return repr(text[:40]) if _NAME.fullmatch(text) else "text that is no plain word"


def in_shares(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """The curves with accuracies from 0 to 1: where one of them exceeds 1, all are in percent."""
    accuracies = [curves[name] for name in ACCURACIES if name in curves]
    if not any((curve.finite.values > 1 + 1e-6).any() for curve in accuracies):
        return dict(curves)
    return {
        name: Curve(curve.epochs, curve.values / 100) if name in ACCURACIES else curve for name, curve in curves.items()
    }


# --- lines of text ---

_NUMBER = r"[-+]?(?:\d{1,30}(?:\.\d{0,30})?(?:e[-+]?\d{1,4})?|\.\d{1,30}|nan|inf(?:inity)?)"
_COUNT = r"\d{1,3}(?:,\d{3}){1,4}|\d{1,15}"
_LABEL = r"(?:^|[^\w\s])\s*"
_ALONE = r"(?![\w.,%])\s*(?:param\w*)?(?:[^\w\s].*)?$"
"""After a count: the end of the line, or a remark that does not begin with a unit."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_EPOCH = re.compile(
    r"(?<![a-z_])(?<!best )epoch['\"]?\s*(?:[:=#]\s*)?(?:[\[(]\s*)?(?P<epoch>\d{1,9}(?:\.\d{1,9})?)(?!\d)"
    r"(?:\s*(?:/|of)\s*(?P<epochs>\d{1,9})(?!\d))?",
    re.IGNORECASE,
)
_FIGURE = re.compile(rf"[:=]\s*(?P<value>{_NUMBER})(?P<percent>\s*%)?(?!\w|[.,/:]\d)", re.IGNORECASE)
_SCOPE = re.compile(
    r"(?<![a-z])(?:(?P<train>train|training)|(?P<val>val|valid|validation|eval|dev)|(?P<other>test|best|final))(?![a-z])",
    re.IGNORECASE,
)
_KIND = re.compile(
    r"(?<![a-z])(?:(?P<loss>loss)|(?P<accuracy>acc|accuracy)|(?P<learning_rate>lr|learning[ _]rate)"
    r"|(?P<gradient_norm>grad(?:ient)?[ _]norm))[\s'\"]*$",
    re.IGNORECASE,
)
_FROZEN = re.compile(rf"{_LABEL}Frozen:\s*(?P<frozen>{_COUNT}){_ALONE}")
_ADAPTED = re.compile(r"LoRA applied to:\s*(?P<layer>[\w.]+)")
_OUT_OF_MEMORY = re.compile(r"CUDA out of memory|OutOfMemoryError|MPS backend out of memory")
_STOPPED = re.compile(r"stopped early after|early stopping triggered", re.IGNORECASE)

_FACT_LINES = tuple(
    re.compile(pattern)
    for pattern in (
        # the guide's
        rf"{_LABEL}Total(?: parameters| params)?:\s*(?P<total_parameters>{_COUNT}){_ALONE}",
        rf"{_LABEL}Trainable(?: parameters| params)?:\s*(?P<trainable_parameters>{_COUNT})"
        rf"(?:\s*\((?P<trainable_percent>\d+(?:\.\d+)?)%\).*$|{_ALONE})",
        rf"{_LABEL}LoRA(?: parameters| params)?:\s*(?P<lora_parameters>{_COUNT}){_ALONE}",
        rf"{_LABEL}Train(?:ing)? batches:\s*(?P<steps_per_epoch>{_COUNT}){_ALONE}",
        # our console's
        rf"records\s+(?P<train_patients>{_COUNT}) training and (?P<val_patients>{_COUNT}) validation patients, "
        rf"vocabulary (?P<vocab_size>{_COUNT}), up to (?P<max_position>{_COUNT}) positions"
        r"(?: \((?P<truncated_percent>\d+\.\d+)% of the tokens beyond)?",
        r"model\s+(?P<model_size>small|medium|large), ",
        rf"(?P<total_parameters>{_COUNT}) parameters, (?P<trainable_parameters>{_COUNT}) trainable "
        rf"\((?P<trainable_percent>[\d.]+)%\)(?:, LoRA (?P<lora_parameters>{_COUNT}) )?",
        rf"training\s+(?P<epochs>{_COUNT}) epochs of (?P<steps_per_epoch>{_COUNT}) steps, lr (?P<lr>[\d.e+-]+), "
        r"on (?P<device>cpu|cuda|mps) ",
        r"chance (?P<chance_loss>[\d.]+), unigram (?P<unigram_loss>[\d.]+)"
        r"(?:, with copying (?P<copying_loss>[\d.]+))?"
        r"(?:, floor (?P<floor_loss>[\d.]+) \(accuracy (?P<floor_accuracy>[\d.]+)\))?",
        r"other codes tell (?P<cooccurrence_gain>-?[\d.]+) \((?P<cooccurrence_gain_low>-?[\d.]+) to "
        r"(?P<cooccurrence_gain_high>-?[\d.]+)\) nats",
        r"Patience: \d+/(?P<early_stopping_patience>\d{1,9})",
    )
)
"""Groups are named after the facts that they hold, but for a share that is printed in percent."""


def read_lines(text: str) -> tuple[Points, dict[str, Any]]:
    """The points, under our names, and the facts of a training's printed lines, in the guide's forms and our console's.

    A figure belongs to the epoch of its line; below a line that only names an epoch, to that one; and where no line
    names one, figures are numbered in their order.
    """
    points: Points = {}
    known: dict[str, Any] = {}
    layers: dict[str, None] = {}
    epoch: float | None = None
    told: set[str] = set()  # figures on the line of the current epoch itself; what is printed later is another's
    for row, line in enumerate(_COLOUR.sub("", text).splitlines(), 1):
        if "train_runtime" in line:
            continue  # Hugging Face's last line: means over the whole training, under the number of its last epoch
        found, figures = _EPOCH.search(line), _figures(line)
        if found:
            if epoch is not None and float(found["epoch"]) < epoch and float(found["epoch"]) <= 1:
                log.warning("line %d: the epochs begin anew; the last run of the log counts", row)
                points.clear()
            epoch, told = float(found["epoch"]), set(figures)
            if found["epochs"]:
                known["epochs"] = int(found["epochs"])
        for name, value in figures.items():
            rows = points.setdefault(name, [])
            if found or (epoch is not None and name not in told):
                rows.append(Point(row, epoch, value))
            elif epoch is None and name.endswith(("_loss", "_accuracy")):
                rows.append(Point(row, len(rows) + 1, value))
        known |= _facts(line)
        if layer := _ADAPTED.search(line):
            layers[layer["layer"].removesuffix(".lora")] = None
    return {name: rows for name, rows in points.items() if rows}, _completed(known, tuple(layers))


def _figures(line: str) -> dict[str, float]:
    """The figures of one line by our names; the first of each counts.

    >>> _figures("Train Loss: 6.9651 Acc: 0.0010 | Val Loss: 6.9181 Acc: 12%")
    {'train_loss': 6.9651, 'train_accuracy': 0.001, 'val_loss': 6.9181, 'val_accuracy': 0.12}
    >>> _figures("Epoch 1 | Train: 7.00 | Val: nan")
    {'train_loss': 7.0, 'val_loss': nan}
    """
    figures: dict[str, float] = {}
    scope, end = "train", 0
    has_epoch = _EPOCH.search(line) is not None
    for found in _FIGURE.finditer(line):
        label, end = line[end : found.start()], found.end()
        scopes = list(_SCOPE.finditer(label))
        if scopes:
            scope = str(scopes[-1].lastgroup)
        kind = _KIND.search(label)
        name = None
        if kind:
            name = str(kind.lastgroup)
            if name in ("loss", "accuracy"):
                name = f"{scope}_{name}"
        elif has_epoch and scopes and not label[scopes[-1].end() :].strip():
            name = f"{scope}_loss"  # `Train: 7.00`, which elsewhere may count patients
        value = float(found["value"]) / (100 if found["percent"] else 1)
        if name in EPOCH_FIGURES and not any(each.lastgroup == "other" for each in scopes):
            figures.setdefault(name, value)
    return figures


def _facts(line: str) -> dict[str, Any]:
    """The facts of one line."""
    facts: dict[str, Any] = {}
    for pattern in _FACT_LINES:
        if found := pattern.search(line):
            facts |= {name: value.replace(",", "") for name, value in found.groupdict().items() if value is not None}
    if "truncated_percent" in facts:
        facts["truncated_share"] = float(facts.pop("truncated_percent")) / 100
    if found := _FROZEN.search(line):
        facts["frozen"] = found["frozen"].replace(",", "")
    if _OUT_OF_MEMORY.search(line):
        facts["out_of_memory"] = True
    if _STOPPED.search(line):
        facts["stopped_early"] = True
    return facts


def _completed(facts: Mapping[str, Any], layers: tuple[str, ...]) -> dict[str, Any]:
    """With what follows: a total from its parts, the trained share from the counts, LoRA from its adapters."""
    counts = {name: int(facts[name]) for name in facts if name.endswith("_parameters") or name == "frozen"}
    if "frozen" in counts and "trainable_parameters" in counts:
        counts.setdefault("total_parameters", counts["frozen"] + counts["trainable_parameters"])
    completed: dict[str, Any] = {name: value for name, value in facts.items() if name != "frozen"}
    completed |= {name: count for name, count in counts.items() if name != "frozen"}
    if counts.get("total_parameters") and "trainable_parameters" in counts:
        completed["trainable_percent"] = 100 * counts["trainable_parameters"] / counts["total_parameters"]
    if layers:
        completed["adapted_layers"] = layers
    if layers or counts.get("lora_parameters"):
        completed["use_lora"] = True
    return completed
