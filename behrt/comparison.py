"""How do runs differ, in what they were told and in what came of it?

Losses compare where they were taken on the same scored tokens. The unigram loss and the floor are computed on exactly
these, so that different records, masks or lengths of sequence show in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from behrt.config import SECTION_OF, UserError
from behrt.doctor.diagnosis import Diagnosis, diagnose
from behrt.doctor.facts import FACT_NAMES, RunFacts, completed
from behrt.doctor.tables import parse_json
from behrt.doctor.targets import read_target
from behrt.history import finite, read_run
from behrt.metrics import closed_gap

Results = Mapping[str, float | None]

GIVEN = (
    "pretrained",
    "shared_codes",
    "new_codes",
    "total_parameters",
    "trainable_parameters",
    "lora_parameters",
    "missing_adapters",
    "train_patients",
    "val_patients",
    "val_scored",
    "unigram_loss",
    "floor_loss",
    "truncated_share",
    "unk_share",
    "steps_per_epoch",
)
"""Facts beside the settings that a run begins with; what is measured on the machine, or follows from these, is none."""

LORA_SETTINGS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "freeze_base")
COHORT_SETTINGS = ("num_patients", "structure", "simulation_seed")

EVIDENCE = ("vocab_size", "val_patients", "val_scored", "unk_share", "floor_loss", "unigram_loss")
"""What is the same in runs on the same records, vocabulary and validation masks."""

SHARED_LINES = ("unigram_loss", "floor_loss", "unigram_accuracy", "floor_accuracy")


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run, judged.

    Attributes:
        name: short, and no other run of the comparison has it.
        parameters: settings and what they came to, by name, those that are known; None is "not set".
        results: `best_val_loss`, `best_epoch`, `best_val_accuracy`, `closed_gap` (of that epoch), `epochs`,
            `trainable_percent`, `seconds` (of all epochs, evaluation included); None is not known.
    """

    name: str
    run_id: str | None
    facts: RunFacts
    diagnosis: Diagnosis
    parameters: Mapping[str, Any]
    results: Results


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        different: parameters whose known values differ, with the value of each run; None is not set, or not known.
        why_not: why their losses do not compare; None where they do.
    """

    runs: tuple[ComparedRun, ...]
    different: Mapping[str, list[Any]]
    why_not: str | None

    @property
    def shared(self) -> dict[str, float]:
        """The reference lines that all runs share, by the names of their facts."""
        found = {name: [run.facts.get(name) for run in self.runs] for name in SHARED_LINES}
        return {name: values[0] for name, values in found.items() if values[0] is not None and all_same(values)}

    def as_dict(self) -> dict[str, Any]:
        """The form of `behrt compare --json`, the figure left out."""
        return {
            "runs": [
                {
                    "name": run.name,
                    "run_id": run.run_id,
                    "verdict": run.diagnosis.verdict,
                    "severity": run.diagnosis.severity,
                    "results": dict(run.results),
                }
                for run in self.runs
            ],
            "different": dict(self.different),
            "comparable": self.why_not is None,
            "why_not": self.why_not,
        }


def compare_targets(targets: Sequence[str]) -> Comparison:
    """The comparison of the runs that somebody names, each as for `read_target`.

    Raises:
        UserError: fewer than two, one of them twice, or one that cannot be read.
    """
    if len(targets) < 2:
        raise UserError(f"RUN: expected two or more, found {len(targets)}; name folders, run ids or files")
    refuse_same(targets, targets)
    facts = [read_target(target) for target in targets]
    found = [find_record(target) for target in targets]
    refuse_same(targets, [run_id or str(place) for _, place, run_id in found])
    names = unique_names([name_choices(record, place, run_id) for record, place, run_id in found])
    return compare(
        [
            judged(name, one, record=record, run_id=run_id)
            for name, one, (record, _, run_id) in zip(names, facts, found, strict=True)
        ]
    )


def compare(runs: Sequence[ComparedRun]) -> Comparison:
    """What differs between runs that were read and judged."""
    return Comparison(tuple(runs), different_parameters([run.parameters for run in runs]), why_not_comparable(runs))


def judged(
    name: str, facts: RunFacts, *, record: Mapping[str, Any] | None = None, run_id: str | None = None
) -> ComparedRun:
    """A run with its diagnosis, parameters and results; `record` is its `run.json`, as far as there is one."""
    facts, record = completed(facts), record or {}
    return ComparedRun(
        name=name,
        run_id=run_id,
        facts=facts,
        diagnosis=diagnose(facts),
        parameters=parameters(facts, record),
        results=results(facts, record),
    )


# --- where a run is, and what it is called ---


def find_record(target: str) -> tuple[dict[str, Any], Path | None, str | None]:
    """The `run.json` of a run that `read_target` could read, where it is, and its MLflow run id.

    {} where there is none, or a damaged one; None for what is not known.
    """
    if target == "-":
        return {}, None, None
    place = Path(target).resolve()
    if place.name == "run.json":
        place = place.parent
    if not place.exists():
        from behrt.runs import find_local_run  # not above: it brings torch, which no file needs

        folder = find_local_run(target)
        if folder is None:
            return tracked_record(target), None, target
        place = folder.resolve()
    try:
        record = read_run(place) if place.is_dir() else {}
    except (UserError, RecursionError):
        record = {}
    run_id = record.get("run_id")
    return record, place, run_id if isinstance(run_id, str) and run_id else None


def tracked_record(run_id: str) -> dict[str, Any]:
    """The `run.json` that a run of ours left in the store."""
    from behrt.tracking import read_tracked_run

    tracked = read_tracked_run(run_id, wanted=lambda name: False, texts=("run.json",))
    record = parse_json(tracked.texts.get("run.json", ""))
    return record if isinstance(record, dict) else {}


def refuse_same(targets: Sequence[str], identities: Sequence[str]) -> None:
    """`UserError` where two targets are one run."""
    for place, identity in enumerate(identities):
        first = identities.index(identity)
        if first < place:
            twice = targets[place] if targets[first] == targets[place] else f"{targets[first]} and {targets[place]}"
            raise UserError(f"{twice}: the same run twice; name each run once")


def name_choices(record: Mapping[str, Any], place: Path | None, run_id: str | None) -> list[str]:
    """What a run may be called, from short to unmistakable: by experiment and run id, else by its place."""
    parts = place.parts if place else ("stdin",)
    places = ["/".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
    experiment = record.get("experiment")
    named = [experiment] if isinstance(experiment, str) and experiment else places[:1] if place else []
    if run_id is None:
        return [*named, *places]
    return [*named, " ".join([*named, run_id[:8]]), " ".join([*named, run_id])]


def unique_names(choices: Sequence[Sequence[str]]) -> list[str]:
    """Of each run's choices the first that no other run goes by.

    >>> unique_names([["lora", "lora a3db"], ["lora", "lora 77c0"], ["full"]])
    ['lora a3db', 'lora 77c0', 'full']
    """
    taken = [0] * len(choices)
    while True:
        names = [offered[number] for offered, number in zip(choices, taken, strict=True)]
        tied = [
            place
            for place, name in enumerate(names)
            if names.count(name) > 1 and taken[place] + 1 < len(choices[place])
        ]
        if not tied:
            return names
        for place in tied:
            taken[place] += 1


# --- what came of it ---


def results(facts: RunFacts, record: Mapping[str, Any]) -> Results:
    """The results of a run by name; see `ComparedRun`.

    The best epoch is the one whose weights the run kept, where its record says so; else that of the lowest `val_loss`.
    """
    best_epoch = _best_epoch(facts, record.get("best_epoch"))
    loss = _value_at(facts, "val_loss", best_epoch)
    gap = None
    if loss is not None and facts.unigram_loss is not None and facts.floor_loss is not None:
        gap = closed_gap(loss, facts.unigram_loss, facts.floor_loss)
    seconds = facts.get("epoch_seconds")
    values: dict[str, float | None] = finite(
        {
            "best_val_loss": loss,
            "best_epoch": _whole(best_epoch),
            "best_val_accuracy": _value_at(facts, "val_accuracy", best_epoch),
            "closed_gap": gap,
            "epochs": _epochs(facts, record.get("epochs")),
            "trainable_percent": facts.trainable_percent,
            "seconds": float(seconds.finite.values.sum()) if seconds else None,
        }
    )
    return values


def _best_epoch(facts: RunFacts, recorded: Any) -> float | None:
    curve = facts.get("val_loss")
    if curve is None or not len(curve.finite):
        return None
    if isinstance(recorded, int) and recorded in curve.finite.epochs:
        return float(recorded)
    return float(curve.finite.epochs[curve.finite.values.argmin()])


def _value_at(facts: RunFacts, name: str, epoch: float | None) -> float | None:
    """The value that a curve has at exactly this epoch."""
    curve = facts.get(name)
    if curve is None or epoch is None or epoch not in curve.epochs:
        return None
    return float(curve.values[curve.epochs == epoch][0])


def _epochs(facts: RunFacts, recorded: Any) -> float | None:
    """How many epochs were trained: as recorded, else up to the last one of the curves, counted from 1."""
    if isinstance(recorded, int) and not isinstance(recorded, bool):
        return recorded
    curves = [curve for name in ("train_loss", "val_loss") if (curve := facts.get(name))]
    if not curves:
        return None
    from_zero = min(curve.epochs[0] for curve in curves) == 0
    return _whole(float(max(curve.epochs[-1] for curve in curves)) + from_zero)


def _whole(epoch: float | None) -> float | None:
    """An epoch as an integer where it is one; some tools count in fractions."""
    return int(epoch) if epoch is not None and epoch.is_integer() else epoch


# --- what it was told ---


def parameters(facts: RunFacts, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was told, and what that came to, by name.

    Settings as its record has them, `auto` replaced by what it became; those that had no effect are None: of adapters
    without LoRA, of a cohort beside prepared records.
    """
    sections = record.get("settings")
    told = {
        name: value
        for section, values in (sections.items() if isinstance(sections, dict) else ())
        if isinstance(values, dict)
        for name, value in values.items()
        if SECTION_OF.get(name) == section
    }
    names = [name for name in SECTION_OF if name in FACT_NAMES] + list(GIVEN)
    known = {name: value for name in names if (value := facts.get(name)) is not None}
    precision = {"precision": record["precision"]} if isinstance(record.get("precision"), str) else {}
    found = {name: list(value) if isinstance(value, tuple) else value
             for name, value in {**told, **known, **precision}.items()}  # fmt: skip
    idle = (LORA_SETTINGS if found.get("use_lora") is False else ()) + (COHORT_SETTINGS if found.get("data") else ())
    found |= dict.fromkeys(idle)
    return {name: found[name] for name in [*SECTION_OF, *GIVEN] if name in found}


def different_parameters(told: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The parameters of which two runs are known to have different values, in the order of settings and facts.

    >>> different_parameters([{"lr": 0.001, "seed": 0}, {"lr": 0.003, "seed": 0}, {"lr": 0.003, "dropout": 0.1}])
    {'lr': [0.001, 0.003, 0.003]}
    """
    return {
        name: [one.get(name) for one in told]
        for name in [*SECTION_OF, *GIVEN]
        if not all_same([one[name] for one in told if name in one])
    }


def all_same(values: Sequence[Any]) -> bool:
    """Whether all are equal; numbers that another machine summed in another order are.

    >>> all_same([5.60781744888, 5.60781744888 + 1e-14]), all_same([5, None]), all_same([0, False])
    (True, False, False)
    """
    return all(_same(values[0], value) for value in values)


def _same(one: Any, other: Any) -> bool:
    numbers = [value for value in (one, other) if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) == 2:
        return math.isclose(one, other, rel_tol=1e-9)
    return type(one) is type(other) and bool(one == other)


# --- whether losses compare ---


def why_not_comparable(runs: Sequence[ComparedRun]) -> str | None:
    """Why the losses of the runs do not compare, or why that is not known, in one line; None where they do.

    Runs of different `max_patients` count other training codes on the same validation tokens: there the unigram loss
    is no evidence.
    """
    limited_alike = all_same([run.parameters.get("max_patients") for run in runs])
    evidence = EVIDENCE if limited_alike else EVIDENCE[:-1]
    splits = {name: _split([(run.parameters[name], run.name) for run in runs if name in run.parameters])
              for name in evidence}  # fmt: skip
    finest = max(evidence, key=lambda name: len(splits[name]))
    if len(splits[finest]) > 1:
        told = "; ".join(
            f"{text} in {', '.join(names)}"
            for text, (_, names) in zip(shown([value for value, _ in splits[finest]]), splits[finest], strict=True)
        )
        return f"The losses do not compare: other records, vocabularies or validation masks ({finest} is {told})."
    unknown = [run.name for run in runs if not {"unigram_loss", "val_scored"} & run.parameters.keys()]
    if unknown:
        return f"Whether the losses compare is not known: nothing tells which records {', '.join(unknown)} saw."
    return None


def _split(told: Sequence[tuple[Any, str]]) -> list[tuple[Any, list[str]]]:
    """The values that there are, each with the runs that have it."""
    groups: list[tuple[Any, list[str]]] = []
    for value, run in told:
        names = next((names for known, names in groups if _same(known, value)), None)
        if names is None:
            groups.append((value, [run]))
        else:
            names.append(run)
    return groups


# --- in words ---


def shown(values: Sequence[Any]) -> list[str]:
    """Values of one parameter for people: as short as tells them apart.

    >>> shown([True, None, ["query", "key"], 20366312, 1e-4, 0.25]), shown([5.60781, 5.60782])
    (['yes', '-', 'query, key', '20,366,312', '0.0001', '0.25'], ['5.60781', '5.60782'])
    """
    different = _split([(value, "") for value in values])
    for digits, length in ((4, 40), (8, 80)):
        texts = [_shown(value, digits, length) for value in values]
        if len(set(texts)) == len(different):
            return texts
    return [_shown(value, 17, 10_000) for value in values]


def _shown(value: Any, digits: int, length: int) -> str:
    """A path that is too long loses its beginning."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= length else f"...{text[3 - length :]}"
