"""What does a fine-tuned run predict, and how does it come back from disk to predict it?

A checkpoint holds what was trained (adapters and head, the head alone, or everything), names the pre-training run that
the rest comes from, and describes the task in `checkpoint.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from behrt.adapter_files import load_adapter
from behrt.batches import PackedBatch
from behrt.checkpoints import Base, Checkpoint, holds_everything, load_checkpoint, load_trained, make_base, read_about
from behrt.config import UserError
from behrt.model import BEHRT
from behrt.runs import checkpoint_folder, load_base_again
from behrt.sequences import PreparedData
from behrt.tasks.example_batches import ExampleBatch, ExampleLayout, ExampleSet, ids_of_model
from behrt.tasks.examples import PREDICTED, Examples
from behrt.tasks.heads import (
    BEHRTForTask,
    binary_loss,
    known_labels,
    patient_vectors,
    risk,
    survival_curve,
    survival_hits,
    survival_loss,
)
from behrt.trainer import LossSums
from behrt.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class TaskDescription:
    """What a fine-tuned model predicts.

    Attributes:
        name: as it was called with `--task`.
        kind: `binary`, `multilabel` or `survival`.
        names: of the labels, in the order of the scores.
        gap: days before a prediction that it does not see.
        labels_of: what the label file said that its labels are of; None where it did not.
        edges: of survival, upper edges of the intervals, in days.
        weights: of false and of true labels in the loss, [2][names]; empty where all weigh 1.
    """

    name: str
    kind: str
    names: tuple[str, ...]
    gap: float = 0.0
    edges: tuple[float, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    labels_of: str | None = None

    @property
    def outputs(self) -> int:
        """Scores per patient."""
        return len(self.edges) if self.kind == "survival" else len(self.names)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any], where: Path) -> Self:
        """From JSON. Raises `UserError` where that is damaged."""
        try:
            task = cls(
                name=str(values["name"]),
                kind=str(values["kind"]),
                names=tuple(map(str, values["names"])),
                gap=float(values["gap"]),
                edges=tuple(map(float, values["edges"])),
                weights=tuple(tuple(map(float, row)) for row in values["weights"]),
                labels_of=None if values.get("labels_of") is None else str(values["labels_of"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            task = None
        if task is None or task.kind not in PREDICTED or not task.outputs:
            raise UserError(f"{where}: is damaged; choose another checkpoint")
        return task

    def loss(self) -> Callable[[nn.Module, ExampleBatch], LossSums]:
        """The loss of a batch, summed over the labels that are known, or over the patients of a survival task."""
        return self._sums

    def _sums(self, model: nn.Module, batch: ExampleBatch) -> LossSums:
        logits = scores_of(model, batch)
        loss = self.summed_loss(logits, batch.targets, batch.days)
        return LossSums(loss, None if model.training else self._hits(logits, batch))

    def summed_loss(self, logits: torch.Tensor, targets: torch.Tensor, days: torch.Tensor) -> torch.Tensor:
        """The loss of scores, [examples, outputs], summed as `loss` has it; the rest as of `ExampleBatch`."""
        if self.kind == "survival":
            return survival_loss(logits, days, targets[:, 0] > 0, logits.new_tensor(self.edges))
        return binary_loss(logits, targets, logits.new_tensor(self.weights) if self.weights else None)

    def _hits(self, logits: torch.Tensor, batch: ExampleBatch) -> torch.Tensor:
        if self.kind == "survival":
            return survival_hits(logits, batch.days, batch.targets[:, 0] > 0, logits.new_tensor(self.edges))
        return (((logits > self._shift(logits)) == (batch.targets > 0)) & known_labels(batch.targets)).sum()

    def _shift(self, logits: torch.Tensor) -> torch.Tensor:
        """What weights in the loss add to the logits, [names]: without it, probabilities would be too high."""
        if not self.weights:
            return logits.new_zeros(logits.shape[1])
        false, true = torch.tensor(self.weights, device=logits.device)
        return torch.log(true / false)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of the labels being true, [rows, names], whatever the weights of the loss were (Elkan, 2001)."""
        return torch.sigmoid(logits - self._shift(logits))


def scores_of(model: nn.Module, batch: ExampleBatch) -> torch.Tensor:
    """The logits of a batch, float32 [examples, outputs], in the order of its examples."""
    packed = batch.packed
    scores: torch.Tensor = model(
        packed.codes, packed.ages, packed.visits, packed.segments, positions=packed.positions, owners=packed.labels
    )
    return scores


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model, in evaluation mode on the CPU.

    Attributes:
        vocabulary: of the model.
        epoch: after which it was saved.
        base: where its weights started.
    """

    model: BEHRTForTask
    task: TaskDescription
    vocabulary: Vocabulary
    epoch: int
    base: Base


def load_finetuned(target: str | Path, *, checkpoint: str = "best") -> Finetuned:
    """The model of a fine-tuned run, and what it predicts.

    Args:
        target: an experiment folder, a checkpoint folder, or an MLflow run id.
        checkpoint: `best` (lowest `val_loss`) or `last`.

    Raises:
        UserError: no such run, a pre-trained one, a damaged checkpoint, or a base that is no longer what it was.
    """
    return load_finetuned_checkpoint(checkpoint_folder(target, checkpoint))


def load_finetuned_checkpoint(folder: Path) -> Finetuned:
    """The fine-tuned model of one checkpoint. Raises `UserError` as `load_finetuned`."""
    about = read_about(folder)
    if about.task is None:
        raise UserError(f"{folder}: is of a pre-trained run, which predicts no task; fine-tune it: behrt finetune")
    task = TaskDescription.of(about.task, folder / "checkpoint.json")
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    model = BEHRTForTask(BEHRT(about.config, generator=torch.Generator()), task.outputs, generator=torch.Generator())
    if about.is_lora or not holds_everything(folder, model):
        model.behrt = make_base(about.config, vocabulary, about.base, load_base=load_base_again)[0].behrt
    if about.is_lora:
        load_adapter(model, folder)
    else:
        load_trained(model, folder)
    return Finetuned(model.eval(), task, vocabulary, about.epoch, about.base)


def load_saved(folder: Path) -> Checkpoint | Finetuned:
    """The model of one checkpoint of any run. Raises `UserError` as `load_checkpoint` and `load_finetuned` do."""
    if read_about(folder).task is None:
        return load_checkpoint(folder, load_base=load_base_again)
    return load_finetuned_checkpoint(folder)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of examples, in their order.

    Attributes:
        probabilities: float64 [rows, names], of binary and multi-label tasks.
        risk: float64 [rows], of survival: higher where the event is expected sooner.
        survival: float64 [rows, edges], of survival: the probability to live on beyond each edge.
        edges: days, [edges].
    """

    probabilities: npt.NDArray[np.float64] | None = None
    risk: npt.NDArray[np.float64] | None = None
    survival: npt.NDArray[np.float64] | None = None
    edges: tuple[float, ...] = field(default=())


def predict(
    finetuned: Finetuned, examples: Examples, data: PreparedData, *, device: torch.device | None = None
) -> Predictions:
    """The predictions for examples of prepared records.

    A row's prediction depends on its own visible tokens alone: not on the other rows, nor on what the patient's record
    holds later.

    Args:
        examples: of `data`, with the gap of the task (`read_examples(…, gap=task.gap, names=task.names)`).
        device: where to compute; None is the CPU. The model is left there.
    """
    task = finetuned.task
    assert examples.gap == task.gap, "a model predicts from what it was trained to see"
    layout = ExampleLayout(finetuned.model.config.max_position, ids_of_model(data.vocabulary, finetuned.vocabulary))
    logits = predict_logits(finetuned.model, ExampleSet(examples, layout), device or torch.device("cpu"))
    if task.kind != "survival":
        return Predictions(probabilities=task.probabilities(logits).numpy())
    return Predictions(risk=risk(logits).numpy(), survival=survival_curve(logits).numpy(), edges=task.edges)


def predict_logits(model: nn.Module, batches: ExampleSet, device: torch.device) -> torch.Tensor:
    """The scores of all rows, float64 [rows, outputs] on the CPU; the model is put on the device and left there."""
    model.to(device)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            parts = [scores_of(model, batch.to(device)).cpu().double() for batch in batches]
    finally:
        model.train(was_training)
    return torch.cat(parts)


def embed(
    target: str | Path, examples: Examples, data: PreparedData, *, device: torch.device | None = None
) -> npt.NDArray[np.float32]:
    """The vector of each example that a head would read, float32 [rows, 2 · hidden_dim], of any run.

    Raises:
        UserError: no such run, or one that cannot be loaded.
    """
    run = load_saved(checkpoint_folder(target))
    layout = ExampleLayout(run.model.config.max_position, ids_of_model(data.vocabulary, run.vocabulary))
    return vectors_of(run.model.behrt, ExampleSet(examples, layout), device or torch.device("cpu")).numpy()


def vectors_of(encoder: BEHRT, batches: ExampleSet, device: torch.device) -> torch.Tensor:
    """What a head reads of all rows, float32 [rows, 2 · hidden_dim] on the CPU; the encoder is left on the device."""
    encoder.to(device)
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.inference_mode():
            parts = [_vectors_of_batch(encoder, batch.packed.to(device)).cpu() for batch in batches]
    finally:
        encoder.train(was_training)
    return torch.cat(parts)


def _vectors_of_batch(encoder: BEHRT, packed: PackedBatch) -> torch.Tensor:
    return patient_vectors(
        encoder, packed.codes, packed.ages, packed.visits, packed.segments,
        positions=packed.positions, owners=packed.labels,
    )  # fmt: skip
