"""What is known of the run that somebody names: by its folder, by its MLflow run id, or by any file with its figures?

Whatever its form, a record becomes points by its own names first (`logs.Points`); `logs.curves_of` then finds our
figures among these. What a record tells beside its curves counts where it has the type of the fact, and nowhere else.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from behrt.config import SECTION_OF, UserError
from behrt.doctor.facts import RunFacts, known_facts
from behrt.doctor.logs import Point, Points, curves_of, figure_named, names_of, plain
from behrt.doctor.tables import (
    decode,
    nothing_known,
    parse_json,
    points_of_json,
    read_log,
    read_text_file,
    read_text_stream,
)
from behrt.history import read_run

log = logging.getLogger(__name__)

HISTORY = "logs/metrics_history.json"

SETTING_SYNONYMS: dict[str, tuple[str, ...]] = {
    "lr": ("lr", "learning_rate"),
    "batch_size": ("batch_size", "train_batch_size", "per_device_train_batch_size"),
    "epochs": ("epochs", "num_epochs", "max_epochs", "num_train_epochs"),
    "dropout": ("dropout", "dropout_rate", "hidden_dropout_prob"),
    "weight_decay": ("weight_decay",),
    "gradient_clip": ("gradient_clip", "gradient_clip_val", "max_grad_norm"),
    "accumulation_steps": ("accumulation_steps", "gradient_accumulation_steps", "accumulate_grad_batches"),
    "early_stopping_patience": ("early_stopping_patience", "patience"),
    "use_lora": ("use_lora",),
    "lora_rank": ("lora_rank", "lora_r"),
    "vocab_size": ("vocab_size",),
}
"""Our settings, and the names under which other tools track them; compared after `plain`."""

COUNTS = {
    "total_parameters": "total",
    "trainable_parameters": "trainable",
    "trainable_percent": "trainable_percent",
    "lora_parameters": "lora",
    "embeddings_trainable": "embeddings_trainable",
    "encoder_trainable": "encoder_trainable",
    "head_trainable": "head_trainable",
}
"""Facts, and their names in the `parameters` of `run.json`."""


def read_target(target: str, *, columns: Mapping[str, str] | None = None) -> RunFacts:
    """Everything that is known of a run.

    Args:
        target: an experiment folder, an MLflow run id, a file (history, rows in CSV or JSON, printed lines), or `-` for
            standard input.
        columns: our name of a figure, or `epoch`, to the record's own, where the usual synonyms do not find it.

    Raises:
        UserError: nothing of that name, nothing known in it, or something in it that cannot be read.
    """
    columns = columns or {}
    try:
        if target == "-":
            return read_log(read_text_stream(sys.stdin.buffer), where="stdin", columns=columns)
        path = Path(target)
        if path.is_dir():
            return read_folder(path, columns)
        if path.name == "run.json" and path.exists():
            return read_folder(path.parent, columns)
        of_a_run = path.parent.parent / "run.json"
        if path.parts[-2:] == tuple(HISTORY.split("/")) and of_a_run.exists():
            return read_folder(of_a_run.parent, columns)  # the run says more than its history alone
        if path.exists():
            return read_log(read_text_file(path), where=target, columns=columns)
    except OSError as error:
        raise UserError(f"{target[:200]}: cannot be read: {error.strerror}") from None
    from behrt.runs import find_local_run, is_run_id  # not above: they bring torch, which no file needs

    if not is_run_id(target):
        raise UserError(f"{target}: no such file or folder, and not an MLflow run id (32 hexadecimal digits)")
    folder = find_local_run(target)
    return read_folder(folder, columns) if folder else read_tracked(target, columns)


def read_folder(folder: Path, columns: Mapping[str, str]) -> RunFacts:
    """The facts of an experiment folder: `run.json`, its history, or both.

    Raises:
        UserError: neither is there; the history is damaged, or there is no history and `run.json` is damaged.
    """
    history = next((file for file in (folder / HISTORY, folder / Path(HISTORY).name) if file.exists()), None)
    run: dict[str, Any] | None = None
    if (folder / "run.json").exists():
        try:
            run = read_run(folder)
        except (UserError, RecursionError):
            if history is None:
                raise UserError(f"{folder / 'run.json'}: is damaged, and there is no {HISTORY} beside it") from None
            log.warning("%s: is damaged; what is known comes from %s alone", folder / "run.json", history)
    if history is None and run is None:
        raise UserError(f"{folder}: holds no run; expected run.json or {HISTORY} in it")
    points: Points = {}
    if history is not None:
        value = parse_json(decode(read_text_file(history), str(history)))
        if value is None:
            raise UserError(f"{history}: is damaged; expected JSON")
        points = points_of_json(value, str(history), columns)
    curves = curves_of(points, str(history), columns) if history else {}
    if run is None:
        if not curves:
            raise nothing_known(points, str(history))
        return RunFacts(curves=curves, finished=True)
    return RunFacts(curves=curves, **{**facts_of_run(run), "finished": run.get("status") != "RUNNING"})


def read_tracked(run_id: str, columns: Mapping[str, str]) -> RunFacts:
    """The facts of a run in the MLflow store, ours or another tool's.

    Of ours the history and `run.json` are artifacts; they know what the store does not, such as losses that were NaN.

    Raises:
        UserError: no such run, or nothing known in it.
    """
    from behrt.tracking import read_tracked_run

    where = f"MLflow run {run_id}"
    tracked = read_tracked_run(run_id, wanted=lambda name: figure_named(name, columns), texts=("run.json", HISTORY))
    once = {name: value for name, value in tracked.metrics.items() if name not in SECTION_OF}
    facts = {**known_facts(once), **facts_of_params(tracked.params)}
    if tracked.tags.get("device") in ("cpu", "cuda", "mps"):
        facts["device"] = tracked.tags["device"]
    run = parse_json(tracked.texts.get("run.json", ""))
    if isinstance(run, dict):
        facts |= facts_of_run(run)
    history = parse_json(tracked.texts.get(HISTORY, ""))
    if isinstance(history, dict):
        points = points_of_json(history, f"{where}: {HISTORY}", columns)
    else:
        points = points_of_metrics(tracked.histories, columns)
    curves = curves_of(points, where, columns)
    if not curves and not facts:
        raise nothing_known(tracked.metrics, where)
    facts["finished"] = tracked.status not in ("RUNNING", "SCHEDULED")
    return RunFacts(curves=curves, **facts)


def points_of_metrics(histories: Mapping[str, Sequence[tuple[int, float]]], columns: Mapping[str, str]) -> Points:
    """The points of tracked metrics.

    A step is an epoch, unless a metric `epoch` says to which epoch each belongs; values that all have the same step
    were logged without one, and are numbered from 1.
    """
    epoch_name = next(iter(names_of("epoch", histories, columns)), None)
    epochs = dict(histories[epoch_name]) if epoch_name else {}
    if any(step not in epochs for values in histories.values() for step, _ in values):
        epochs = {}
    points: Points = {}
    for name, values in histories.items():
        steps = [step for step, _ in values]
        if len(steps) > 1 and len(set(steps)) == 1:
            numbered: list[float] = list(range(1, len(steps) + 1))
        else:
            numbered = [epochs.get(step, step) for step in steps]
        points[name] = [
            Point(row, epoch, value) for row, (epoch, (_, value)) in enumerate(zip(numbered, values, strict=True), 1)
        ]
    return points


def facts_of_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in a `run.json`; those under its `facts` win, and whatever is not known to us is left out."""

    def part(name: str) -> dict[str, Any]:
        value = run.get(name)
        return value if isinstance(value, dict) else {}

    settings = {
        f"{section}.{name}": value
        for section, values in part("settings").items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
    counts = part("parameters")
    told = {
        **part("baselines"),
        **part("transplant"),
        **{fact: counts.get(name) for fact, name in COUNTS.items()},
        "train_patients": part("patients").get("train"),
        "val_patients": part("patients").get("tuning"),
        **{name: run.get(name) for name in ("vocab_size", "max_position", "device", "stopped_early")},
    }
    return {**_facts_of_flat(settings), **known_facts(told), **known_facts(part("facts"))}


def facts_of_params(params: Mapping[str, str]) -> dict[str, Any]:
    """The facts in the parameters of a tracked run: ours are `section.name`, other tools' go by their usual names."""
    foreign = {
        ours: text
        for ours, names in SETTING_SYNONYMS.items()
        for theirs, text in params.items()
        if plain(theirs) in names
    }
    resolved = {name.removeprefix("resolved."): text for name, text in params.items() if name.startswith("resolved.")}
    ours = {name: _of_text(text) for name, text in params.items()}
    return {**known_facts(foreign), **_facts_of_flat(ours), **known_facts(resolved)}


def _of_text(text: str) -> str | list[str] | None:
    """A setting from its text in MLflow: None and lists of names have no other form there.

    >>> _of_text("['query', 'key']"), _of_text("None"), _of_text("0.1")
    (['query', 'key'], None, '0.1')
    """
    if text.startswith("["):
        return re.findall(r"'([^']*)'", text)
    return None if text == "None" else text


def _facts_of_flat(flat: Mapping[str, Any]) -> dict[str, Any]:
    """As `facts_from_settings`, of a record: settings named `section.name`, as text, perhaps another version's."""
    settings: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        if SECTION_OF.get(name) == section:
            settings[name] = value
    facts = known_facts({name: value for name, value in settings.items() if name != "device"})
    if "init_from" in settings:
        facts["pretrained"] = settings["init_from"] is not None
    return facts
