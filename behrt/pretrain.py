"""How is one BEHRT pre-trained, from settings to a tracked, finished run?

The recipe of `behrt train`: records (prepared, or a simulated cohort), the lines that its losses are read against, the
model and what of it is trained, the pre-flight, then the loop of the trainer, each epoch handed to the local history,
to MLflow and to the doctor.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from behrt.batches import PackedBatch, TrainingBatches
from behrt.changes import changes_of
from behrt.checkpoints import Base, Transplant, make_base, read_base, save_checkpoint
from behrt.config import ExperimentSettings, TrainingSettings, UserError
from behrt.devices import choose_device, choose_precision, to_device
from behrt.doctor.checkup import Checkup, facts_before_training, tolerated
from behrt.doctor.facts import RunFacts
from behrt.doctor.preflight import probe
from behrt.feeder import Feeder, NoFeeder
from behrt.history import RunFolder, UnkeptFolder
from behrt.keeping import Keeper
from behrt.lifecycle import (
    adaptation_name,
    asked_precision,
    begin_run,
    ending,
    log_diagnosis,
    tell_again,
    tell_of_memory,
    train_epochs,
    wait_for_run,
    write_run,
)
from behrt.masking import Stream, torch_seed
from behrt.model import BEHRTForMaskedLM, compile_layers
from behrt.parameters import ParameterCounts, apply_lora_to_behrt, count_parameters, set_trainable
from behrt.ranks import ALONE, Ranks
from behrt.records import Records, RecordsCache
from behrt.resume import Attempt, as_it_is_now
from behrt.run_report import Listener, RunResult, RunStart, StudyTrial
from behrt.runs import load_base, load_base_again, name_base
from behrt.sequences import open_prepared
from behrt.stopper import Stopper
from behrt.trainer import LossSums, Trainer

log = logging.getLogger(__name__)

LAUNCH = "launch"
"""The tag that says which torchrun began a run, or went on with it (`Ranks.launch`)."""
EVALUATED_AT_ONCE = 128
"""Patients per batch of an evaluation."""


def masked_lm_loss(model: nn.Module, batch: PackedBatch) -> LossSums:
    """Summed cross-entropy over the scored tokens, and in evaluation hits; the head is computed at these alone."""
    logits = model(
        batch.codes,
        batch.ages,
        batch.visits,
        segments=batch.segments,
        positions=batch.positions,
        scored=batch.scored,
    ).float()  # [scored, vocab]
    labels = to_device(batch.labels[batch.scored], logits.device)
    return LossSums(
        loss=F.cross_entropy(logits, labels, reduction="sum"),
        correct=None if model.training else (logits.argmax(dim=-1) == labels).sum(),
    )


def training_batches(records: Records, training: TrainingSettings, ranks: Ranks = ALONE) -> TrainingBatches:
    """What a rank computes in each step of an epoch."""
    return TrainingBatches(
        records.training,
        records.training_patients,
        batch_size=training.batch_size,
        accumulation_steps=training.accumulation_steps,
        max_position=records.max_position,
        row_length=records.row_length,
        vocab_size=len(records.data.vocabulary),
        seed=training.seed,
        mlm_probability=training.mlm_probability,
        rank=ranks.rank,
        ranks=ranks.size,
    )


def build_model(
    settings: ExperimentSettings, records: Records, base: Base | None = None
) -> tuple[BEHRTForMaskedLM, Base, Transplant | None]:
    """The model that training starts from, its adapters inserted and its trainability set.

    Args:
        base: of a run that goes on; what `--init-from` names may be another run by now.

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
    if base is None:
        base, load = name_base(settings.training.seed, adaptation.init_from), load_base
    else:
        load = load_base_again
    model, transplanted = make_base(config, vocabulary, base, load_base=load)
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
        # not the seed itself: that is the base's, and the adapters would repeat its draws
        generator=torch.Generator().manual_seed(torch_seed(settings.training.seed, Stream.ADAPTERS)),
    )


def pretrain(
    settings: ExperimentSettings,
    *,
    experiment: str,
    folder: Path,
    listener: Listener | None = None,
    force: bool = False,
    records_cache: RecordsCache | None = None,
    trial: StudyTrial | None = None,
    attempt: Attempt | None = None,
    stopper: Stopper | None = None,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Trains one model and leaves a finished run in `folder` and in MLflow.

    Args:
        experiment: name under which MLflow groups the runs.
        folder: the experiment folder.
        force: train even where the pre-flight finds that the run cannot learn.
        records_cache: shares opened records with other runs of this process.
        trial: the trial of a study that the run is; its status in MLflow is then that of the trial.
        attempt: one that was cut off; what it trained is not trained again. In place, the run is the same one.
        stopper: where signals come; by default they end the run anywhere.
        ranks: processes that train the model together, `joined`; all call this alike, but the first alone keeps, tracks
            and tells anything.

    Returns:
        The result; `status` is FAILED where the pre-flight refused the run and where the doctor ended it, KILLED where
        the listener pruned it. Ranks other than the first know less of it.

    Raises:
        UserError: settings and records that do not go together, a folder that is in use, a store that will not take
            the run; the folder is then as it was.
        KeyboardInterrupt: passed on after the run was marked KILLED.
    """
    listener, stopper = listener or Listener(), stopper or Stopper(listens=False)
    started = time.perf_counter()
    with ranks.together():
        device = ranks.take_device(choose_device(settings.training.device))
        precision = choose_precision(asked_precision(settings, attempt), device)
        if settings.training.compile and device.type != "cuda":
            raise UserError(f"--compile: is for CUDA, and this run computes on {device.type}; leave it out")
        records = (records_cache or RecordsCache()).select(settings, progress=listener.preparing)
        changes = changes_of(attempt, settings, records.data)
        former_base = read_base(attempt.checkpoint) if attempt is not None and attempt.checkpoint is not None else None
        model, base, transplanted = build_model(settings, records, former_base)
    steps = training_batches(records, settings.training, ranks)
    baselines = ranks.by_first(lambda: records.baselines(model.config.vocab_size))
    run_folder = RunFolder(folder) if ranks.is_first else UnkeptFolder(folder)
    with ranks.together():
        run_folder.claim()
    try:
        if attempt is not None:
            attempt = ranks.by_first(partial(as_it_is_now, attempt, settings))
        start = RunStart(
            experiment=experiment,
            folder=folder,
            key="",
            run_id=None,
            dataset={"name": records.data.name, "digest": records.data.digest},
            settings=settings,
            device=device.type,
            precision="bf16" if precision is torch.bfloat16 else "fp32",
            max_position=records.max_position,
            vocab_size=model.config.vocab_size,
            patients={"train": len(records.training_patients), "tuning": len(records.validation.sequences)},
            steps_per_epoch=steps.steps_per_epoch,
            baselines=baselines,
            counts=count_parameters(model),
            transplant=transplanted,
            truncated_share=records.truncated_share,
            trial=trial,
            ranks=ranks.size,
        )
        tags = {"adaptation": adaptation_name(settings), "mlflow.source.name": "behrt train", "ranks": str(ranks.size)}
        if ranks.launch:
            tags[LAUNCH] = ranks.launch
        with ranks.together():
            feeder: Feeder = NoFeeder()
            if ranks.is_first:
                with stopper.held():
                    key, former, feeder = begin_run(start, run_folder, attempt, changes, tags)
                start = replace(start, key=key, run_id=wait_for_run(start, run_folder, former, feeder))
        batches: dict[str, Any] = {
            "steps": steps,
            "train_evaluation": records.train_evaluation.packed(EVALUATED_AT_ONCE, records.row_length),
            "validation": records.validation.packed(EVALUATED_AT_ONCE, records.row_length),
            "device": device,
            "precision": precision,
        }
        save = partial(save_checkpoint, vocabulary=records.data.vocabulary, base=base)
        result = RunResult(start=start, model=model, checkup=Checkup(RunFacts(finished=False)))
        keeper = Keeper(run_folder, start, save=save, feeder=feeder, stopper=stopper, ranks=ranks)
        with ending(result, run_folder, feeder, started, stopper):
            write_run(result, run_folder, feeder, status="RUNNING")
            listener.started(start)
            with ranks.together():
                model.to(device)
            if ranks.is_first:
                with tolerated("the pre-flight"):
                    probed = probe(model, masked_lm_loss, **batches, adaptation=settings.adaptation, ranks=ranks.size)
                    facts = facts_before_training(
                        settings, records, baselines, transplanted, vocab_size=model.config.vocab_size, probed=probed
                    )
                    result.checkup = Checkup(facts)
                log_diagnosis(result, run_folder, feeder)
                listener.examined(result.checkup)
            result.refused = ranks.broadcast(bool(result.diagnosis.of_severity("error")) and not force)
            if result.refused:
                return result
            ranks.connect(device)
            if settings.training.compile:
                compile_layers(model)
            trainer = Trainer(
                model,
                masked_lm_loss,
                **batches,
                settings=settings.training,
                on_step=listener.step,
                pause=keeper.pause,
                on_memory=partial(tell_of_memory, result, feeder, listener),
                ranks=ranks,
            )
            keeper.trainer = trainer
            keeper.begin(attempt, model)
            stopper.at_pauses()
            if attempt is not None:
                tell_again(attempt, changes, result, run_folder, listener)
            train_epochs(trainer, keeper, result, run_folder, feeder, listener)
    finally:
        run_folder.release()
    return result


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
