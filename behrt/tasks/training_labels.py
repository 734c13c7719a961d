"""What does a fine-tuning train and stop on?

The labels of training and tuning patients, what they say is to be predicted, and the scores that fit them best where
they are the same for everybody: those a head begins with, and the line that its losses are read against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from behrt.config import FinetuneSettings, UserError
from behrt.history import Baselines
from behrt.masking import FIXED_SEED, Stream, stream
from behrt.sequences import PreparedData
from behrt.tasks.assessment import may_be_told
from behrt.tasks.example_batches import ExampleSet
from behrt.tasks.examples import Examples, LabelledRecords, read_examples
from behrt.tasks.finetuned import TaskDescription
from behrt.tasks.heads import balanced_weights, hazard_log_odds, interval_edges, label_shares, log_odds


@dataclass(frozen=True)
class TaskData:
    """What a fine-tuning trains and stops on.

    Attributes:
        training: the training labels that are used.
        sample: of them, as many as there are tuning labels at most: what `train_loss` is computed on.
        counts: of the label file.
    """

    task: TaskDescription
    training: Examples
    sample: Examples
    tuning: Examples
    counts: Mapping[str, int]

    def about(self) -> dict[str, Any]:
        """Of the task, for people and for `run.json`."""
        parts = {"train": self.training, "tuning": self.tuning}
        return {
            **self.task.as_dict(),
            "labels": {name: len(part) for name, part in parts.items()},
            "patients": {name: len(np.unique(part.patients)) for name, part in parts.items()},
            "true_share": {name: _true_share(part) for name, part in parts.items()},
            "dropped": {name: count for name, count in self.counts.items() if name != "rows"},
            "labels_digest": labels_digest(self.training, self.tuning),
        }


def labels_digest(training: Examples, tuning: Examples) -> str:
    """What tells labels from others: SHA-256 of whose they are, of when, and of what they say.

    All of a run's together, those that are trained on and those of tuning: it goes on with no others.
    """
    digest = sha256()
    for part in (training, tuning):
        digest.update(repr((part.kind, part.names)).encode())
        for values in (part.subjects, part.times.astype(np.int64), part.targets, part.days):
            if values is not None:
                digest.update(str(values.shape).encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _true_share(examples: Examples) -> float | None:
    """None where it would count fewer patients than may be told about."""
    return float(np.nanmean(examples.targets)) if may_be_told(examples) else None


def read_task_data(settings: FinetuneSettings, data: PreparedData) -> TaskData:
    """The labels of training and tuning patients, and what is to be predicted.

    Raises:
        UserError: see `read_examples`; no labels of either split; labels that are all the same.
    """
    asked = settings.task
    labels = Path(asked.labels)
    found: LabelledRecords = read_examples(labels, data, gap=asked.gap)
    for split in ("train", "tuning"):
        if not len(found[split]):
            raise UserError(f"--labels: {labels}: no row of a patient of the {split} split of {data.folder}")
    training, tuning = found["train"], found["tuning"]
    if asked.max_labels is not None:
        training = training.subsample(asked.max_labels, seed=settings.training.seed)
    known = training.targets[~np.isnan(training.targets)]
    if training.kind != "survival" and len(np.unique(known)) < 2:
        raise UserError(
            f"--labels: {labels}: all {len(known)} training labels are the same; there is nothing to tell apart"
        )
    if training.kind == "survival" and not training.seen_events.any():
        raise UserError(f"--labels: {labels}: no training patient has the event; there is nothing to learn from")
    if training.kind == "survival" and asked.class_weights != "none":
        raise UserError("--class-weights: survival has no classes; leave this out")
    edges: list[float] = []
    if training.kind == "survival":
        assert training.days is not None
        edges = interval_edges(training.days, training.seen_events)
    weights = balanced_weights(training.targets).tolist() if asked.class_weights == "balanced" else []
    task = TaskDescription(
        name=asked.task,
        kind=training.kind,
        names=training.names,
        gap=asked.gap,
        edges=tuple(edges),
        weights=tuple(map(tuple, weights)),
        labels_of=found.task,
    )
    sample = training
    if len(tuning) < len(training):
        rows = stream(FIXED_SEED, Stream.TRAINING_SAMPLE).permutation(len(training))[: len(tuning)]
        sample = training.take(np.sort(rows))
    return TaskData(task, training, sample, tuning, found.counts)


def first_scores(task: TaskDescription, training: Examples) -> list[float]:
    """The scores that are the same for everybody and fit the training labels best: where the head begins."""
    if task.kind == "survival":
        assert training.days is not None
        return hazard_log_odds(training.days, training.seen_events, task.edges)
    if task.weights:
        return [0.0] * task.outputs
    return [float(value) for value in log_odds(label_shares(training.targets))]


class SameForAll(nn.Module):
    """Predicts the same of everybody: what a model is compared with."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, codes: torch.Tensor, *inputs: Any, owners: torch.Tensor, **others: Any) -> torch.Tensor:
        return self.scores.expand(int(owners.max()) + 1, -1)


def task_baselines(task: TaskDescription, scores: list[float], tuning: ExampleSet) -> Baselines:
    """The loss and accuracy on tuning of the scores that are the same for everybody."""
    loss = correct = scored = 0.0
    same = SameForAll(scores).eval()
    with torch.inference_mode():
        for batch in tuning:
            sums = task.loss()(same, batch)
            loss, scored = loss + float(sums.loss), scored + batch.num_scored
            correct += float(sums.correct if sums.correct is not None else 0)
    unknown = float("nan")
    return Baselines(
        chance_loss=unknown,
        unigram_loss=unknown,
        unigram_accuracy=unknown,
        prevalence_loss=loss / scored,
        prevalence_accuracy=correct / scored if may_be_told(tuning.examples) else None,
    )
