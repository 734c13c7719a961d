"""How good are the predictions of a fine-tuned run, beside what counting predicts, and what could be reached at best?

The recipe of `behrt evaluate`: predictions for a split, the baselines fitted on the run's own training labels, every
metric with an interval over patients, the verdict from the intervals of the differences, subgroups, figures. What comes
of it lies in the run's folder under `evaluation/<split>/`, readable by its owner only: predictions name patients. The
report and the figures do not, and go to MLflow with the metrics.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from pydantic import ValidationError

from behrt.ceiling import ceiling_of, exact_risk, exact_states, expected_metric, has_ceiling
from behrt.config import FinetuneSettings, UserError, refuse_what_is_no_file
from behrt.devices import choose_device
from behrt.evaluation_report import Evaluation, KnownCeiling, report
from behrt.feeding import RECORD_FILE, TrackingRecord
from behrt.files import FolderLock, replacing_folder, write_json, write_text
from behrt.history import read_run
from behrt.outcomes import load_outcome_model
from behrt.runs import locate_run
from behrt.sequences import PreparedData, open_prepared
from behrt.sync import sync_folder
from behrt.tasks.assessment import (
    BEHRT,
    CEILING,
    Predictor,
    age_bands,
    assess,
    sexes,
    shown_names,
    subgroups,
    verdict,
)
from behrt.tasks.baselines import Baseline, fit_baselines, threads_for
from behrt.tasks.examples import Examples, read_examples
from behrt.tasks.finetuned import Finetuned, load_finetuned, predict
from behrt.tasks.histories import history_of
from behrt.tasks.intervals import DRAWS
from behrt.tasks.predictions import write_predictions
from behrt.tasks.task_plots import draw_evaluation
from behrt.tasks.training_labels import labels_digest

log = logging.getLogger(__name__)

EVALUATION_FOLDER = "evaluation"

Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    pass


def evaluate(
    run: str | Path,
    *,
    split: str = "held_out",
    labels: Path | None = None,
    data: Path | None = None,
    with_baselines: bool = True,
    draws: int = DRAWS,
    seed: int = 0,
    device: Any = "auto",
    progress: Progress = _silent,
) -> Evaluation:
    """Evaluates a fine-tuned run, and leaves what came of it in its folder and in MLflow.

    Args:
        run: its folder, or its MLflow run id where its folder is below `experiments/`.
        split: whose patients are predicted.
        labels, data: other ones than the run was trained with, of the same task.
        with_baselines: fit and compare the baselines.
        draws: of patients, for the intervals.
        progress: told of stages.

    Raises:
        UserError: no such run, a pre-trained one; labels or records that are missing or damaged; labels of another
            kind, of other names, or of what the file itself calls another task; no label of a patient of the split.
    """
    folder = locate_run(run)
    finetuned = load_finetuned(folder)
    settings = read_settings(folder)
    if settings.data.data is None and data is None:
        raise UserError(f"{folder}: does not say which records it was trained on; name them with --data")
    prepared = _records(data, Path(str(settings.data.data)))
    label_file = labels or Path(settings.task.labels)
    if labels is None and not label_file.exists():
        raise UserError(f"{label_file}: the labels of the training are not there any more; name them with --labels")
    task = finetuned.task
    for name in {split, "train", "tuning"}:
        prepared.split(name).check(len(prepared.vocabulary))
    records = read_examples(label_file, prepared, gap=task.gap, names=task.names, kinds=(task.kind,))
    if None not in (task.labels_of, records.task) and records.task != task.labels_of:
        raise UserError(
            f"{label_file}: holds labels of {records.task!r}, and the run predicts {task.labels_of!r}; name labels of "
            "its own task with --labels"
        )
    examples, tuning, train = records[split], records["tuning"], records["train"]
    if not len(examples):
        raise UserError(f"{label_file}: no row of a patient of the {split} split of {prepared.folder}")
    if settings.task.max_labels is not None:
        train = train.subsample(settings.task.max_labels, seed=settings.training.seed)

    predictors = [_behrt(finetuned, examples, tuning, prepared, choose_device(device), progress)]
    histories = {
        name: history_of(own, len(prepared.vocabulary))
        for name, own in (("train", train), ("tuning", tuning), ("asked", examples))
        if with_baselines or name == "asked"
    }
    baselines: list[Baseline] = []
    if with_baselines and len(train):
        with threads_for(len(train)):
            baselines = fit_baselines(train, tuning, histories, progress=progress)
            asked, tuned = histories["asked"], histories["tuning"]
            predictors += [
                Predictor(name=each.name, scores=each.predict(asked), tuning=each.predict(tuned)) for each in baselines
            ]
    best = _ceiling(prepared, label_file, examples, split, predictors[0])
    if best is not None:
        predictors.append(best[1])

    assessment = assess(examples, predictors, tuning=tuning, train=train, draws=draws, seed=seed, progress=progress)
    progress("subgroups", 0, 1)
    by_sex = sexes(histories["asked"].counts, prepared.vocabulary.tokens)
    groups = {"age": age_bands(histories["asked"].numbers[:, 0]), "sex": by_sex}
    shown = shown_names(examples)
    found = Evaluation(
        folder=folder / EVALUATION_FOLDER / split,
        task=task.name,
        kind=task.kind,
        split=split,
        rows=len(examples),
        patients=len(np.unique(examples.patients)),
        training_rows=len(train),
        prevalence={
            name: float(np.nanmean(examples.targets[:, number])) if number in shown else None
            for number, name in enumerate(examples.names)
        },
        assessment=assessment,
        notes=_differences_from_training(
            folder, settings, prepared, label_file, labels_digest(train, tuning), records.counts
        ),
        sentences=verdict(assessment, task=task.name, patients=len(np.unique(examples.patients))),
        about_baselines={each.name: each.about for each in baselines},
        ceiling=None if best is None else replace(best[0], share_reached=assessment.share_of_ceiling),
        subgroups=subgroups(examples, predictors, groups, tuning=tuning, train=train, draws=draws, seed=seed),
        without_sex=not by_sex,
        draws=draws,
        seed=seed,
    )
    progress("figures", 0, 1)
    found = _write(found, examples, predictors)
    _track(found, folder)
    return found


def read_settings(folder: Path) -> FinetuneSettings:
    """What a fine-tuned run was told. Raises `UserError` where its folder does not say so."""
    path = folder / "logs" / "settings.yaml"
    refuse_what_is_no_file(path)
    try:
        return FinetuneSettings.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the folder of a fine-tuned run, with all that is in it") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError):
        raise UserError(f"{path}: is damaged, or not of a fine-tuned run; fine-tune again") from None


def _records(named: Path | None, of_training: Path) -> PreparedData:
    """The records that are named, else those of the training, which may have moved since."""
    if named is not None:
        return open_prepared(named)
    try:
        return open_prepared(of_training)
    except UserError as error:
        raise UserError(f"{error}; where the records of the training have moved, name them with --data") from None


def _differences_from_training(
    folder: Path,
    settings: FinetuneSettings,
    data: PreparedData,
    labels: Path,
    digest: str,
    counts: Mapping[str, int],
) -> list[str]:
    """What whoever reads the figures has to know of labels and records, in sentences."""
    found = []
    run = read_run(folder)
    known = (run.get("task") or {}).get("labels_digest")
    if known != digest if known is not None else labels.resolve() != Path(settings.task.labels).resolve():
        found.append(
            f"The labels ({labels.name}) are others than those that the run was trained on; the baselines are fitted "
            "on these others."
        )
    if data.digest != run.get("dataset", {}).get("digest"):
        found.append(
            "The records are others than those that the run was trained on, and patients of its training may be among "
            "them."
        )
    for name, why in (("no_patient", "are of patients outside the records"), ("nothing_visible", "see no event")):
        if counts.get(name):
            found.append(f"{counts[name]:,} rows of the label file {why}, and are left out.")
    return found


def _behrt(
    finetuned: Finetuned,
    examples: Examples,
    tuning: Examples,
    data: PreparedData,
    device: torch.device,
    progress: Progress,
) -> Predictor:
    scores = []
    for place, own in enumerate((examples, tuning)):
        progress("predicting", place, 2)
        if not len(own):
            scores.append(np.zeros((0,) if finetuned.task.kind == "survival" else own.targets.shape))
            continue
        found = predict(finetuned, own, data, device=device)
        given = found.risk if finetuned.task.kind == "survival" else found.probabilities
        assert given is not None
        scores.append(given)
    return Predictor(name=BEHRT, scores=scores[0], tuning=scores[1])


def _ceiling(
    data: PreparedData, labels: Path, examples: Examples, split: str, behrt: Predictor
) -> tuple[KnownCeiling, Predictor] | None:
    """What could be reached, and the predictor that reaches it; None where that is not known."""
    if examples.gap or not has_ceiling(data, labels):
        return None
    outcome, model = labels.stem, load_outcome_model(labels.parent)
    rows: dict[str, Any] = {
        "subject_id": examples.subjects,
        "prediction_time": examples.times,
        "boolean_value": examples.targets[:, 0] > 0,
    }
    if examples.kind == "survival":
        rows["float_value"] = examples.days
    table, states = exact_states(data, pl.DataFrame(rows), split=split)
    if states.shape[1:] != model.disease.shape:
        raise UserError(f"{labels}: of another structure than {data.folder}; name the labels of this cohort")
    assert table["subject_id"].to_numpy().tolist() == examples.subjects.tolist()
    found = ceiling_of(outcome, model, states, table)
    risk = exact_risk(outcome, model, states)
    own = behrt.scores if examples.kind == "survival" else behrt.scores[:, 0]
    expected = expected_metric(outcome, model, states, own)
    known = KnownCeiling(
        reached=found.reached,
        expected=found.expected,
        bound=found.bound,
        behrt_expected=expected,
        share_expected=(expected - 0.5) / (found.expected - 0.5) if found.expected > 0.5 else math.nan,
        share_reached=None,
    )
    return known, Predictor(name=CEILING, scores=risk if examples.kind == "survival" else risk[:, None])


# --- what is left


def _write(found: Evaluation, examples: Examples, predictors: Sequence[Predictor]) -> Evaluation:
    """Predictions, figures, `evaluation.json` and `evaluation.md`, in the place of those of before."""
    with replacing_folder(found.folder, mode=0o700) as beside:
        title = f"{found.task}, {found.split}: {found.patients:,} patients"
        paths = draw_evaluation(beside, examples, predictors, found.assessment, title=title)
        found = replace(found, figures=[path.name for path in paths])
        for predictor in predictors:
            if predictor.tuning is not None:
                place = beside / "predictions" / predictor.name
                write_predictions(place, examples, predictor.scores, found.assessment.thresholds.get(predictor.name))
        write_json(beside / "evaluation.json", found.as_dict())
        write_text(beside / "evaluation.md", report(found))
    return found


def _track(found: Evaluation, folder: Path) -> None:
    """Lets MLflow know; a store that does not answer is told later, by `behrt sync`."""
    if not (folder / RECORD_FILE).is_file():
        return
    try:
        lock = FolderLock(folder)  # another evaluation, or a training that goes on, writes there too
        try:
            record = TrackingRecord.load(folder)
            counter = f"{found.split}/evaluation"
            number = {counter: record.figures.get(counter, 0) + 1}
            kept = {name: value for name, value in record.figures.items() if not name.startswith(f"{found.split}/")}
            replace(record, figures={**kept, **found.figures_for_tracking(), **number}).save(folder)
        finally:
            lock.release()
        sync_folder(folder)
    except UserError as error:
        log.warning("%s; `behrt sync %s` tells MLflow of the evaluation", error, folder)
