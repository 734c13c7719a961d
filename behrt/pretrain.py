"""How is one BEHRT pre-trained, from settings to a tracked, finished run?

The recipe of `behrt train`: records (prepared, or a simulated cohort), the lines that its losses are read against, the
model and what of it is trained, the pre-flight, then the loop of the trainer, each epoch handed to the local history,
to MLflow and to the doctor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from behrt.batches import PackedBatch, TrainingBatches
from behrt.checkpoints import OPTIMIZER_FILE, Base, Transplant, make_base, save_checkpoint
from behrt.config import ExperimentSettings, UserError, experiment_yaml
from behrt.devices import choose_device, choose_precision
from behrt.doctor.checkup import Checkup, facts_before_training, tolerated
from behrt.doctor.diagnosis import markdown
from behrt.doctor.facts import RunFacts
from behrt.doctor.memory import is_out_of_memory
from behrt.doctor.preflight import probe
from behrt.history import EpochRecord, RunFolder
from behrt.masking import Stream, torch_seed
from behrt.model import BEHRTForMaskedLM
from behrt.parameters import ParameterCounts, apply_lora_to_behrt, count_parameters, set_trainable
from behrt.plots import draw_curves
from behrt.records import Records, RecordsCache
from behrt.resume import Attempt, best_of, find_attempt, go_on
from behrt.run_report import STATUS_OF_OUTCOME, Listener, RunResult, RunStart, StudyTrial
from behrt.runs import load_base, name_base
from behrt.sequences import open_prepared
from behrt.tracking import TrackedRun
from behrt.trainer import LossSums, Trainer

EVALUATED_AT_ONCE = 128
"""Patients per batch of an evaluation."""

SECONDS_BETWEEN_PLOTS = 30.0


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
    model, transplanted = make_base(config, vocabulary, base, load_base=load_base)
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


def adaptation_name(settings: ExperimentSettings) -> str:
    """The tag `adaptation`: what is trained, and on what."""
    start = "pretrained" if settings.adaptation.init_from else "random"
    return f"{'lora' if settings.adaptation.use_lora else 'full'}_on_{start}"


def pretrain(
    settings: ExperimentSettings,
    *,
    experiment: str,
    folder: Path,
    listener: Listener | None = None,
    force: bool = False,
    records_cache: RecordsCache | None = None,
    trial: StudyTrial | None = None,
    continue_from: Path | None = None,
) -> RunResult:
    """Trains one model and leaves a finished run in `folder` and in MLflow.

    Args:
        experiment: name under which MLflow groups the runs.
        folder: the experiment folder.
        force: train even where the pre-flight finds that the run cannot learn.
        records_cache: shares opened records with other runs of this process.
        trial: the trial of a study that the run is; its status in MLflow is then that of the trial.
        continue_from: folder of an attempt at the same run that was cut off; what it trained is not trained again.

    Returns:
        The result; `status` is FAILED where the pre-flight refused the run and where the doctor ended it, KILLED where
        the listener pruned it.

    Raises:
        UserError: settings and records that do not go together, a folder that is in use, a store that cannot be
            opened; the folder is then as it was.
        KeyboardInterrupt: passed on after the run was marked KILLED.
    """
    listener = listener or Listener()
    started = time.perf_counter()
    device = choose_device(settings.training.device)
    precision = choose_precision(settings.training.precision, device)
    records = (records_cache or RecordsCache()).select(settings, progress=listener.preparing)
    attempt = find_attempt(continue_from, settings) if continue_from is not None else None
    model, base, transplanted = build_model(settings, records)
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
    baselines = records.baselines(model.config.vocab_size)
    run_folder = RunFolder(folder)
    run_folder.claim()
    try:
        tracked = TrackedRun(
            experiment=experiment,
            params=settings.flat(),
            tags={
                "device": device.type,
                "dataset": records.data.name,
                "size": settings.model.model_size,
                "adaptation": adaptation_name(settings),
            },
            study_run_id=trial.study_run_id if trial else None,
            trial_number=trial.number if trial else None,
        )
        try:
            run_folder.begin(experiment_yaml(settings))
        except BaseException:
            tracked.finish("FAILED")
            raise
        start = RunStart(
            experiment=experiment,
            folder=folder,
            run_id=tracked.run_id,
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
        )
        batches: dict[str, Any] = {
            "steps": steps,
            "train_evaluation": records.train_evaluation.packed(EVALUATED_AT_ONCE, records.row_length),
            "validation": records.validation.packed(EVALUATED_AT_ONCE, records.row_length),
            "device": device,
            "precision": precision,
        }
        keep = partial(save_checkpoint, model=model, vocabulary=records.data.vocabulary, base=base)
        result = RunResult(start=start, model=model, checkup=Checkup(RunFacts(finished=False)))
        with _ending(result, run_folder, tracked, started, listener):
            _log_start(start, tracked, records)
            listener.started(start)
            model.to(device)
            trainer = Trainer(model, masked_lm_loss, **batches, settings=settings.training, on_step=listener.step)
            with tolerated("the pre-flight"):
                probed = probe(model, masked_lm_loss, **batches, adaptation=settings.adaptation)
                facts = facts_before_training(
                    settings, records, baselines, transplanted, vocab_size=model.config.vocab_size, probed=probed
                )
                result.checkup = Checkup(facts)
            _log_diagnosis(result, run_folder, tracked)
            listener.examined(result.checkup)
            if result.diagnosis.of_severity("error") and not force:
                result.refused = True
                return result
            if attempt is not None:
                go_on(attempt, run_folder, model, trainer, keep)
                _tell_again(attempt, result, run_folder, tracked, listener)
            try:
                _train(trainer, result, run_folder, tracked, keep, listener)
            except KeyboardInterrupt:
                if result.last is None:  # else the last epoch's checkpoint stands, from which the run can go on
                    keep(run_folder.checkpoints / "last", epoch=0)
                raise
    finally:
        run_folder.release()
    return result


def _log_start(start: RunStart, tracked: TrackedRun, records: Records) -> None:
    """What MLflow is told once per run."""
    tracked.log_params(
        {
            "resolved.max_position": start.max_position,
            "resolved.vocab_size": start.vocab_size,
            "resolved.precision": start.precision,
        }
    )
    tracked.log_dataset(name=records.data.name, digest=records.data.digest[:36], context="training")
    counts = start.counts
    tracked.log_figures(
        {
            "total_parameters": counts["total"],
            "trainable_parameters": counts["trainable"],
            "trainable_percent": counts["trainable_percent"],
            "lora_parameters": counts["lora"],
            "lora_percent": counts["lora_percent"],
            **start.baselines.figures(),
        }
    )
    if start.transplant is not None:
        tracked.log_figures(asdict(start.transplant))


def _tell_again(
    attempt: Attempt, result: RunResult, run_folder: RunFolder, tracked: TrackedRun, listener: Listener
) -> None:
    """The epochs of the earlier attempt, to everybody who is told of epochs."""
    result.last, result.best = attempt.epochs[-1], best_of(attempt.epochs)
    for record in attempt.epochs:
        tracked.log_figures(record.figures(), step=record.epoch)
    result.checkup.update(run_folder.history)
    listener.went_on(attempt.epochs)


def _train(
    trainer: Trainer[PackedBatch],
    result: RunResult,
    run_folder: RunFolder,
    tracked: TrackedRun,
    keep: Callable[..., None],
    listener: Listener,
) -> None:
    """The epochs: each is kept on disk first, then sent to MLflow, then shown."""
    start, checkup = result.start, result.checkup
    last_plot = time.perf_counter()
    run_folder.write_run(**{**result.as_dict(), "status": "RUNNING"})
    if result.last is not None and _ends(result.last, trainer, result, listener):  # of an attempt that it goes on with
        return
    for record in trainer.epochs():
        result.last = record
        run_folder.add_epoch(record)
        keep(run_folder.checkpoints / "last", epoch=record.epoch, optimizer=trainer.optimizer)
        if record.is_best:
            result.best = record
            keep(run_folder.checkpoints / "best", epoch=record.epoch)
        before = checkup.diagnosis
        new = checkup.update(run_folder.history)
        run_folder.write_run(**{**result.as_dict(), "status": "RUNNING"})
        tracked.log_figures(record.figures(), step=record.epoch)
        listener.epoch(record)
        for finding in new:
            listener.found(finding)
        if new or checkup.diagnosis.verdict != before.verdict:
            _log_diagnosis(result, run_folder, tracked)
        if _ends(record, trainer, result, listener):
            return
        if time.perf_counter() - last_plot > SECONDS_BETWEEN_PLOTS:
            draw_curves(run_folder.history, start.baselines, run_folder.plots, title=start.experiment)
            last_plot = time.perf_counter()
    trainer.restore_best()
    result.stopped_early = trainer.stopping.should_stop
    if result.stopped_early and start.settings.training.stop_on != "never":
        # Patience may end a run that never learned before its grace is over: that is no success.
        checkup.update(run_folder.history, finished=True, stopped_early=True)
        result.lost_to = checkup.reason_to_stop("error")
    is_finite = result.last is not None and result.last.is_finite
    result.status = "FINISHED" if is_finite and result.lost_to is None else "FAILED"


def _ends(record: EpochRecord, trainer: Trainer[PackedBatch], result: RunResult, listener: Listener) -> bool:
    """Whether the doctor or the listener ends the run after this epoch."""
    stop_on = result.start.settings.training.stop_on
    if stop_on != "never":
        result.lost_to = result.checkup.reason_to_stop(stop_on)
    if result.lost_to is None and record.is_finite and not trainer.is_over and listener.prunes():
        result.pruned, result.status = True, "KILLED"
    return result.lost_to is not None or result.pruned


def _log_diagnosis(result: RunResult, run_folder: RunFolder, tracked: TrackedRun) -> None:
    """The diagnosis so far, on disk and as the tags by which runs are filtered."""
    with tolerated("writing the diagnosis"):
        run_folder.write_diagnosis(result.diagnosis.as_dict(), markdown(result.diagnosis))
    tracked.tag({"diagnosis": result.diagnosis.verdict, "severity": result.diagnosis.severity})


@contextmanager
def _ending(
    result: RunResult, run_folder: RunFolder, tracked: TrackedRun, started: float, listener: Listener
) -> Iterator[None]:
    """However a run ends, its folder and its MLflow run say how, with everything it has produced."""
    try:
        yield
    except KeyboardInterrupt:
        result.status = "KILLED"
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        result.checkup.update(run_folder.history, out_of_memory=True)
        result.lost_to = result.checkup.reason_to_stop("error")
    finally:
        listener.ending()
        result.seconds = time.perf_counter() - started
        goes_on = result.outcome == "FAILED"  # perhaps: the state of the optimizer is kept
        if not (result.refused or result.pruned):
            result.checkup.update(run_folder.history, finished=True, stopped_early=result.stopped_early)
        try:
            _log_diagnosis(result, run_folder, tracked)
            if run_folder.history and result.start.trial is None:  # a trial's curves are the coordinator's to draw
                draw_curves(run_folder.history, result.start.baselines, run_folder.plots, title=result.start.experiment)
            if result.best is not None:
                tracked.log_figures({"best_val_loss": result.best.val_loss, "best_epoch": result.best.epoch})
            for path in (run_folder.checkpoints, run_folder.plots):
                tracked.log_artifacts(path, under=path.name, leave_out=None if goes_on else OPTIMIZER_FILE)
            if run_folder.history_file.exists():
                tracked.log_artifacts(run_folder.history_file, under="logs")
            for path in run_folder.diagnosis_files:
                tracked.log_artifacts(path)
            tracked.log_text(experiment_yaml(result.start.settings), "experiment.yaml")
            tracked.log_text(json.dumps(result.as_dict(), indent=1), "run.json")
        finally:
            if result.start.trial is not None:
                result.status = STATUS_OF_OUTCOME[result.outcome]
                tracked.tag({"trial_state": result.outcome})
            tracked.finish(result.status)
            result.tracking_complete = tracked.is_complete
            run_folder.write_run(**result.as_dict())
            if not goes_on and result.start.trial is None:  # of a trial, once its study knows the end
                (run_folder.checkpoints / "last" / OPTIMIZER_FILE).unlink(missing_ok=True)


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
