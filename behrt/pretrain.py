"""How is one BEHRT pre-trained, from settings to a tracked, finished run?

The recipe of `behrt train`: records (prepared, or a simulated cohort), the lines that its losses are read against, the
model and what of it is trained, then the loop of the trainer, each epoch handed to the local history and to MLflow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from behrt.batches import EvaluationSet, PackedBatch, TrainingBatches
from behrt.checkpoints import Base, Transplant, make_base, save_checkpoint
from behrt.config import ExperimentSettings, UserError, experiment_yaml
from behrt.devices import choose_device, choose_precision
from behrt.history import EPOCH_FIGURES, Baselines, EpochRecord, RunFolder
from behrt.metrics import closed_gap
from behrt.model import BEHRTForMaskedLM
from behrt.parameters import ParameterCounts, apply_lora_to_behrt, count_parameters, set_trainable
from behrt.plots import draw_curves
from behrt.records import Records, open_records, select_records
from behrt.runs import load_pretrained, name_base
from behrt.sequences import open_prepared
from behrt.tracking import RunStatus, TrackedRun, tracking_uri
from behrt.trainer import LossSums, Trainer

EVALUATED_AT_ONCE = 128
"""Patients per batch of an evaluation."""

SECONDS_BETWEEN_PLOTS = 30.0


class Listener:
    """What a person sees of a run while it goes on; here: nothing. The command line prints."""

    def note(self, message: str) -> None:
        """A stage that takes a while has begun."""

    def preparing(self, stage: str, done: int, total: int) -> None:
        """Progress of preparing a simulated cohort."""

    def started(self, start: RunStart) -> None:
        """Everything is set up; the first epoch comes next."""

    def step(self, step: int, steps: int) -> None:
        """An optimizer step of the current epoch is done."""

    def epoch(self, record: EpochRecord) -> None:
        """An epoch is done."""


@dataclass(frozen=True, kw_only=True)
class RunStart:
    """What is known of a run before its first epoch."""

    experiment: str
    folder: Path
    run_id: str
    mlflow_experiment_id: str
    settings: ExperimentSettings
    device: str
    precision: str
    max_position: int
    vocab_size: int
    patients: dict[str, int]
    steps_per_epoch: int
    baselines: Baselines
    counts: ParameterCounts
    transplant: Transplant | None
    truncated_share: float


@dataclass(kw_only=True)
class RunResult:
    """What came of a run."""

    start: RunStart
    status: RunStatus = "FAILED"
    best: EpochRecord | None = None
    last: EpochRecord | None = None
    stopped_early: bool = False
    seconds: float = 0.0
    tracking_uri: str = field(default_factory=tracking_uri)

    @property
    def closed_gap(self) -> float | None:
        """Share of the gap between unigram and floor that the best epoch closed; None where no floor is known."""
        baselines = self.start.baselines
        if self.best is None or baselines.floor_loss is None:
            return None
        return closed_gap(self.best.val_loss, baselines.unigram_loss, baselines.floor_loss)

    def as_dict(self) -> dict[str, Any]:
        """The form of `run.json` and of `behrt train --json`; figures that are not finite are null."""

        def figures(record: EpochRecord | None) -> dict[str, float | None] | None:
            if record is None:
                return None
            values = {name: getattr(record, name) for name in EPOCH_FIGURES}
            return {name: value if math.isfinite(value) else None for name, value in values.items()}

        start = self.start
        return {
            "run_id": start.run_id,
            "experiment": start.experiment,
            "tracking_uri": self.tracking_uri,
            "status": self.status,
            "verdict": None,
            "best_epoch": self.best.epoch if self.best else None,
            "best_val_loss": self.best.val_loss if self.best else None,
            "best_val_accuracy": self.best.val_accuracy if self.best else None,
            "closed_gap": self.closed_gap,
            "epochs": self.last.epoch if self.last else 0,
            "last": figures(self.last),
            "stopped_early": self.stopped_early,
            "seconds": round(self.seconds, 3),
            "baselines": start.baselines.figures(),
            "parameters": dict(start.counts),
            "device": start.device,
            "precision": start.precision,
            "max_position": start.max_position,
            "vocab_size": start.vocab_size,
            "patients": start.patients,
            "settings": start.settings.model_dump(mode="json", exclude={"note"}),
        }


def masked_lm_loss(model: nn.Module, batch: PackedBatch) -> LossSums:
    """Summed cross-entropy and hits over the scored tokens; the head is computed at these alone."""
    logits = model(
        batch.codes,
        batch.ages,
        batch.visits,
        segments=batch.segments,
        positions=batch.positions,
        scored=batch.scored,
    )  # [scored, vocab]
    labels = batch.labels[batch.scored]
    return LossSums(
        loss=F.cross_entropy(logits.float(), labels, reduction="sum"), correct=(logits.argmax(dim=-1) == labels).sum()
    )


def build_model(settings: ExperimentSettings, records: Records) -> tuple[BEHRTForMaskedLM, Base, Transplant | None]:
    """The model that training starts from, its adapters inserted and its trainability set.

    Raises:
        UserError: a vocabulary size below the data's, a rank or target that does not fit, an unusable `--init-from`.
    """
    vocabulary, adaptation = records.data.vocabulary, settings.adaptation
    vocab_size = settings.model.vocab_size or len(vocabulary)
    if vocab_size < len(vocabulary):
        raise UserError(
            f"--vocab-size: {vocab_size} cannot hold the {len(vocabulary)} tokens of {records.data.folder}; "
            "leave it out, or raise it"
        )
    config = settings.model.config(vocab_size=vocab_size, max_position=records.max_position)
    base = name_base(settings.training.seed, adaptation.init_from)
    model, transplanted = make_base(config, vocabulary, base, load_base=load_pretrained)
    choose_trained(model, settings)
    return model, base, transplanted


def choose_trained(model: BEHRTForMaskedLM, settings: ExperimentSettings) -> None:
    """Inserts adapters where they are asked for, and decides what is trained."""
    adaptation = settings.adaptation
    if not adaptation.use_lora:
        set_trainable(model, train_embeddings=adaptation.train_embeddings, train_head=adaptation.train_head)
        return
    apply_lora_to_behrt(
        model,
        rank=adaptation.lora_rank,
        alpha=adaptation.lora_alpha,
        dropout=adaptation.lora_dropout,
        targets=adaptation.lora_targets,
        freeze_base=adaptation.freeze_base,
        train_embeddings=adaptation.train_embeddings,
        train_head=adaptation.train_head,
        generator=torch.Generator().manual_seed(settings.training.seed),
    )


def adaptation_name(settings: ExperimentSettings) -> str:
    """The tag `adaptation`: what is trained, and on what."""
    start = "pretrained" if settings.adaptation.init_from else "random"
    return f"{'lora' if settings.adaptation.use_lora else 'full'}_on_{start}"


def pretrain(
    settings: ExperimentSettings, *, experiment: str, folder: Path, listener: Listener | None = None
) -> RunResult:
    """Trains one model and leaves a finished run in `folder` and in MLflow.

    Args:
        experiment: name under which MLflow groups the runs.
        folder: the experiment folder.

    Returns:
        The result; `status` is FAILED where the loss stopped being finite.

    Raises:
        UserError: settings and records that do not go together; nothing was written then.
        KeyboardInterrupt: passed on after the run was marked KILLED.
    """
    listener = listener or Listener()
    started = time.perf_counter()
    device = choose_device(settings.training.device)
    precision = choose_precision(settings.training.precision, device)
    records = select_records(open_records(settings.data, progress=listener.preparing), settings)
    model, base, transplanted = build_model(settings, records)
    counts = count_parameters(model)
    if not counts["trainable"]:
        raise UserError("--train-embeddings, --train-head: nothing is left to train; unfreeze a part or use --use-lora")
    baselines = records.baselines(model.config.vocab_size)
    steps = TrainingBatches(
        records.training,
        records.training_patients,
        batch_size=settings.training.batch_size,
        accumulation_steps=settings.training.accumulation_steps,
        max_position=records.max_position,
        row_length=records.row_length,
        vocab_size=len(records.data.vocabulary),
        seed=settings.training.seed,
    )
    precision_name = str(precision).removeprefix("torch.").replace("bfloat16", "bf16").replace("float32", "fp32")
    run_folder = RunFolder(folder)
    tracked = TrackedRun(
        experiment=experiment,
        params={
            **settings.flat(),
            "resolved.max_position": records.max_position,
            "resolved.vocab_size": model.config.vocab_size,
            "resolved.precision": precision_name,
        },
        tags={
            "device": device.type,
            "dataset": records.data.name,
            "size": settings.model.model_size,
            "adaptation": adaptation_name(settings),
        },
    )
    start = RunStart(
        experiment=experiment,
        folder=folder,
        run_id=tracked.run_id,
        mlflow_experiment_id=tracked.experiment_id,
        settings=settings,
        device=device.type,
        precision=precision_name,
        max_position=records.max_position,
        vocab_size=model.config.vocab_size,
        patients={
            "train": len(records.training_patients),
            "tuning": len(records.validation.sequences),
        },
        steps_per_epoch=steps.steps_per_epoch,
        baselines=baselines,
        counts=counts,
        transplant=transplanted,
        truncated_share=records.truncated_share,
    )
    result = RunResult(start=start)
    with _ending(result, run_folder, tracked, started):
        run_folder.begin(experiment_yaml(settings))
        run_folder.write_run(**{**result.as_dict(), "status": "RUNNING"})
        tracked.log_dataset(name=records.data.name, digest=records.data.digest[:36], context="training")
        tracked.log_figures(
            {
                "total_parameters": counts["total"],
                "trainable_parameters": counts["trainable"],
                "trainable_percent": counts["trainable_percent"],
                "lora_parameters": counts["lora"],
                "lora_percent": counts["lora_percent"],
                **baselines.figures(),
            }
        )
        listener.started(start)
        # dropout draws from torch's own generator; everything else has generators of its own
        torch.manual_seed(settings.training.seed)
        trainer = Trainer(
            model.to(device),
            masked_lm_loss,
            steps=steps,
            train_evaluation=lambda: _evaluation_batches(records.train_evaluation, records.row_length),
            validation=lambda: _evaluation_batches(records.validation, records.row_length),
            settings=settings.training,
            device=device,
            precision=precision,
            on_step=listener.step,
        )
        last_plot = time.perf_counter()
        for record in trainer.epochs():
            result.last = record
            run_folder.add_epoch(record)
            tracked.log_figures({name: getattr(record, name) for name in EPOCH_FIGURES}, step=record.epoch)
            kept = ["last"]
            if record.is_best:
                result.best = record
                kept.append("best")
            for name in kept:
                save_checkpoint(
                    run_folder.checkpoints / name,
                    model,
                    vocabulary=records.data.vocabulary,
                    epoch=record.epoch,
                    base=base,
                )
            if time.perf_counter() - last_plot > SECONDS_BETWEEN_PLOTS:
                draw_curves(run_folder.history, baselines, run_folder.plots, title=experiment)
                last_plot = time.perf_counter()
            listener.epoch(record)
        trainer.restore_best()
        result.stopped_early = trainer.stopping.should_stop
        result.status = "FINISHED" if result.last is not None and result.last.is_finite else "FAILED"
    return result


@contextmanager
def _ending(result: RunResult, run_folder: RunFolder, tracked: TrackedRun, started: float) -> Iterator[None]:
    """However a run ends, its folder and its MLflow run say how, with everything it has produced."""
    try:
        yield
    except KeyboardInterrupt:
        result.status = "KILLED"
        raise
    finally:
        result.seconds = time.perf_counter() - started
        run_folder.write_run(**result.as_dict())
        draw_curves(run_folder.history, result.start.baselines, run_folder.plots, title=result.start.experiment)
        if result.best is not None:
            tracked.log_figures({"best_val_loss": result.best.val_loss, "best_epoch": result.best.epoch})
        for path, under in (
            (run_folder.checkpoints, "checkpoints"),
            (run_folder.plots, "plots"),
            (run_folder.history_file, "logs"),
        ):
            if path.exists():
                tracked.log_artifacts(path, under=under)
        tracked.log_text(experiment_yaml(result.start.settings), "experiment.yaml")
        tracked.finish(result.status)


def _evaluation_batches(evaluation: EvaluationSet, row_length: int) -> Iterator[PackedBatch]:
    return evaluation.batches(patients_per_batch=EVALUATED_AT_ONCE, row_length=row_length)


def count_configured(settings: ExperimentSettings) -> ParameterCounts:
    """The accounting of a configuration: `count_parameters` of the model it would train.

    The vocabulary is that of `--vocab-size`, else of the prepared records, else 1000 tokens; positions on `auto` are
    the size's own number.
    """
    vocab_size = settings.model.vocab_size
    if vocab_size is None:
        vocab_size = 1000 if settings.data.data is None else len(open_prepared(Path(settings.data.data)).vocabulary)
    model = BEHRTForMaskedLM(settings.model.config(vocab_size=vocab_size))
    choose_trained(model, settings)
    return count_parameters(model)
