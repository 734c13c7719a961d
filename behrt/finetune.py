"""How is a pre-trained BEHRT taught to predict one clinical task, from labels to a tracked, finished run?

The recipe of `behrt finetune`: labels joined to prepared records, the encoder of a pre-training run (or a fresh one of
its shape), adapters and a head, the generic part of the pre-flight, then the loop that pre-training has, with the loss
of the task.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from behrt.changes import changes_of
from behrt.checkpoints import Base, Transplant, make_base, read_base, save_checkpoint
from behrt.concordance import harrell_c
from behrt.config import FinetuneSettings, UserError
from behrt.devices import choose_device, choose_precision
from behrt.doctor.checkup import Checkup, tolerated
from behrt.doctor.facts import RunFacts, facts_from_settings
from behrt.doctor.preflight import (
    adapter_places,
    first_scored_step,
    gradient_pass,
    one_patient,
    untouched,
    without_gradient,
)
from behrt.history import RunFolder
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
from behrt.parameters import apply_lora_to_behrt, count_parameters, set_trainable, silent_adapters
from behrt.resume import Attempt, as_it_is_now
from behrt.run_report import Listener, RunResult, RunStart
from behrt.runs import checkpoint_folder, is_run_id, load_base, load_base_again, name_base, run_id_of
from behrt.sequences import PreparedData, open_prepared
from behrt.stopper import Stopper
from behrt.tasks.example_batches import ExampleLayout, ExampleSet, ExampleSteps
from behrt.tasks.finetuned import TaskDescription, predict_logits, vectors_of
from behrt.tasks.heads import BEHRTForTask, risk
from behrt.tasks.metrics import auroc
from behrt.tasks.probing import Probe, fit_probe
from behrt.tasks.training_labels import TaskData, first_scores, read_task_data, task_baselines
from behrt.tracking import PARENT_TAG
from behrt.trainer import Trainer


def build_task_model(
    settings: FinetuneSettings,
    data: PreparedData,
    task: TaskDescription,
    scores: list[float],
    base: Base | None = None,
) -> tuple[BEHRTForTask, Base, Transplant | None]:
    """The model that fine-tuning starts from, its adapters inserted and its trainability set.

    Args:
        base: of a run that goes on; what `--from` names may be another run by now.

    Raises:
        UserError: a run whose shape or codes do not fit, a rank or target that does not.
    """
    adaptation, seed = settings.adaptation, settings.training.seed
    config = settings.model.config(vocab_size=len(data.vocabulary))
    if base is None:
        base, load = name_base(seed, adaptation.init_from), load_base
    else:
        load = load_base_again
    masked, transplanted = make_base(config, data.vocabulary, base, load_base=load)
    model = BEHRTForTask(
        masked.behrt,
        task.outputs,
        bias=scores,
        generator=torch.Generator().manual_seed(torch_seed(seed, Stream.HEAD)),
    )
    if adaptation.use_lora:
        apply_lora_to_behrt(
            model,
            rank=adaptation.lora_rank,
            alpha=adaptation.lora_alpha,
            dropout=adaptation.lora_dropout,
            targets=adaptation.lora_targets,
            freeze_base=adaptation.freeze_base,
            train_embeddings=adaptation.train_embeddings,
            generator=torch.Generator().manual_seed(torch_seed(seed, Stream.ADAPTERS)),
        )
    else:
        set_trainable(model, freeze_base=adaptation.freeze_base, train_embeddings=adaptation.train_embeddings)
    return model, base, transplanted


def start_at_probe(
    model: BEHRTForTask, found: TaskData, layout: ExampleLayout, scores: list[float], device: torch.device
) -> Probe:
    """Sets the head to the linear probe of the encoder as it is; where that weighs nothing, the head stays.

    Weights of 0 would pass no gradient on to the encoder.
    """
    training, tuning = (
        (vectors_of(model.behrt, ExampleSet(part, layout), device), part) for part in (found.training, found.tuning)
    )
    probe = fit_probe(found.task, training, tuning, scores)
    if probe.weight.any():
        with torch.no_grad():
            model.head.linear.weight.copy_(probe.weight)
            model.head.linear.bias.copy_(probe.bias)
    return probe


def probe_task(
    model: BEHRTForTask, task: TaskDescription, steps: ExampleSteps, settings: FinetuneSettings, **computing: Any
) -> RunFacts:
    """What can be found out of a fine-tuning before its first step: that gradients arrive and adapters act."""
    missing, misplaced = adapter_places(model, settings.adaptation)
    counts = count_parameters(model)
    facts: dict[str, Any] = {
        **facts_from_settings(settings),
        "finished": False,
        "total_parameters": counts["total"],
        "trainable_parameters": counts["trainable"],
        "lora_parameters": counts["lora"],
        "missing_adapters": missing,
        "misplaced_adapters": misplaced,
    }
    device = computing["device"]
    with untouched(model, device):
        step: Any = first_scored_step(steps)  # type: ignore[arg-type]
        if step is not None:
            seen = gradient_pass(model, task.loss(), step, **computing)  # type: ignore[arg-type]
            inputs = one_patient([batch.packed for batch in step])
            facts |= {
                "first_loss": seen.loss,
                "without_gradient": without_gradient(model, seen),
                "gradient_not_finite": tuple(sorted(seen.not_finite)),
            }
            if inputs is not None:
                on_device = {name: value.to(device) for name, value in inputs.items()}
                facts["silent_adapters"] = tuple(silent_adapters(model, on_device))
    return RunFacts(**facts)


def tuning_metrics(
    task: TaskDescription, model: nn.Module, tuning: ExampleSet, device: torch.device
) -> dict[str, float]:
    """How well the model orders the tuning patients: `auroc` (mean over the names that have one), or `c_index`."""
    logits, examples = predict_logits(model, tuning, device), tuning.examples
    if task.kind == "survival":
        assert examples.days is not None
        return {"c_index": harrell_c(examples.seen_events, examples.days, risk(logits).numpy())}
    found = []
    for number in range(task.outputs):
        known = ~np.isnan(examples.targets[:, number])
        found.append(auroc(examples.targets[known, number] == 1, logits[torch.from_numpy(known), number].numpy()))
    return {"auroc": float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")}


def finetune(
    settings: FinetuneSettings,
    *,
    experiment: str,
    folder: Path,
    listener: Listener | None = None,
    force: bool = False,
    attempt: Attempt | None = None,
    stopper: Stopper | None = None,
) -> RunResult:
    """Fine-tunes one model and leaves a finished run in `folder` and in MLflow.

    Arguments, result and errors are those of `pretrain`.
    """
    listener, stopper = listener or Listener(), stopper or Stopper(listens=False)
    started = time.perf_counter()
    training = settings.training
    device = choose_device(training.device)
    precision = choose_precision(asked_precision(settings, attempt), device)
    assert settings.data.data is not None
    if attempt is None and checkpoint_folder(settings.task.from_run).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--experiment: {folder} holds the run that --from names; choose another name")
    data = open_prepared(Path(settings.data.data))
    for split in ("train", "tuning"):
        data.split(split).check(len(data.vocabulary))
    found = read_task_data(settings, data)
    task, scores = found.task, first_scores(found.task, found.training)
    about = found.about()
    changes = changes_of(attempt, settings, data, labels_digest=about["labels_digest"])
    former_base = read_base(attempt.checkpoint) if attempt is not None and attempt.checkpoint is not None else None
    model, base, transplanted = build_task_model(settings, data, task, scores, former_base)
    layout = ExampleLayout(model.config.max_position)
    steps = ExampleSteps(
        found.training,
        layout,
        batch_size=training.batch_size,
        accumulation_steps=training.accumulation_steps,
        seed=training.seed,
    )
    tuning = ExampleSet(found.tuning, layout)
    run_folder = RunFolder(folder)
    run_folder.claim()
    try:
        if attempt is not None:
            attempt = as_it_is_now(attempt, settings)
        start = RunStart(
            experiment=experiment,
            folder=folder,
            key="",
            run_id=None,
            dataset={"name": data.name, "digest": data.digest},
            settings=settings,
            device=device.type,
            precision="bf16" if precision is torch.bfloat16 else "fp32",
            max_position=model.config.max_position,
            vocab_size=model.config.vocab_size,
            patients=about["patients"],
            steps_per_epoch=steps.steps_per_epoch,
            baselines=task_baselines(task, scores, tuning),
            counts=count_parameters(model),
            transplant=transplanted,
            truncated_share=float(
                np.maximum(found.training.visible - model.config.max_position, 0).sum() / found.training.visible.sum()
            ),
            task=about,
        )
        with stopper.held():
            tags = tags_of(settings, base, is_new=attempt is None)
            key, former, feeder = begin_run(start, run_folder, attempt, changes, tags)
        start = replace(start, key=key, run_id=wait_for_run(start, run_folder, former, feeder))
        save = partial(save_checkpoint, vocabulary=data.vocabulary, base=base, task=task.as_dict())
        result = RunResult(start=start, model=model, checkup=Checkup(RunFacts(finished=False, task=task.name)))
        keeper = Keeper(run_folder, start, save=save, feeder=feeder, stopper=stopper)
        with ending(result, run_folder, feeder, started, stopper):
            write_run(result, run_folder, feeder, status="RUNNING")
            listener.started(start)
            model.to(device)
            if settings.task.head_start == "probe" and (attempt is None or attempt.checkpoint is None):
                probe = start_at_probe(model, found, layout, scores, device)
                feeder.add_figures({"probe_tuning_loss": probe.tuning_loss, "probe_penalty": probe.penalty})
            with tolerated("the pre-flight"):
                facts = probe_task(model, task, steps, settings, device=device, precision=precision)
                result.checkup = Checkup(facts)
            log_diagnosis(result, run_folder, feeder)
            listener.examined(result.checkup)
            if result.diagnosis.of_severity("error") and not force:
                result.refused = True
                return result
            trainer = Trainer(
                model,
                task.loss(),
                steps=steps,
                train_evaluation=ExampleSet(found.sample, layout),
                validation=tuning,
                settings=training,
                device=device,
                precision=precision,
                on_step=listener.step,
                pause=keeper.pause,
                on_memory=partial(tell_of_memory, result, feeder, listener),
            )
            keeper.trainer = trainer
            keeper.begin(attempt, model)
            stopper.at_pauses()
            if attempt is not None:
                tell_again(attempt, changes, result, run_folder, listener)
            train_epochs(trainer, keeper, result, run_folder, feeder, listener)
            if result.best is not None:
                trainer.restore_best()  # a run that the doctor ended stands at its last weights
                result.tuning = tuning_metrics(task, model, tuning, device)
                feeder.add_figures({f"tuning_{name}": value for name, value in result.tuning.items()})
    finally:
        run_folder.release()
    return result


def parent_run_id(run: str) -> str | None:
    """MLflow's id of the pre-training run; None where it never got one."""
    return run if is_run_id(run) else run_id_of(checkpoint_folder(run).parent.parent)


def tags_of(settings: FinetuneSettings, base: Base, *, is_new: bool) -> dict[str, str]:
    """What MLflow is told of a fine-tuning; one that goes on may have lost the run that lent it its shape."""
    parent = base.init_from_run
    if parent is None and is_new:
        parent = parent_run_id(settings.task.from_run)
    return {
        "adaptation": mode_name(settings),
        "task": settings.task.task,
        "mlflow.source.name": "behrt finetune",
        **({} if parent is None else {PARENT_TAG: parent}),
    }


def mode_name(settings: FinetuneSettings) -> str:
    """The tag `adaptation`: as of pre-training, or `head_on_pretrained`."""
    is_probe = settings.adaptation.freeze_base and not settings.adaptation.use_lora
    return "head_on_pretrained" if is_probe else adaptation_name(settings)
