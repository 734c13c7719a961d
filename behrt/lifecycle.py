"""What happens to every run between its beginning and its end, whatever it learns?

Each epoch of the trainer's loop is handed to the local history, to MLflow and to the doctor; and however the run ends,
its folder and its MLflow run say how. Recipes (`pretrain`, `finetune`) say what is trained, and call this.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from behrt.config import ExperimentSettings, Precision, UserError, experiment_yaml
from behrt.devices import is_out_of_memory
from behrt.doctor.checkup import tolerated
from behrt.doctor.diagnosis import markdown
from behrt.feeder import MOST_SECONDS_WHEN_STOPPED, SECONDS_OF_SILENCE, SECONDS_OF_SILENCE_WHEN_STOPPED, Feeder
from behrt.feeding import TrackingRecord, new_record, now
from behrt.history import EpochRecord, RunFolder
from behrt.keeping import Keeper
from behrt.plots import draw_curves
from behrt.ranks import RankLost
from behrt.resume import Attempt, best_of
from behrt.run_report import STATUS_OF_OUTCOME, Listener, RunResult, RunStart
from behrt.stopper import Stopper
from behrt.tracking import PARENT_TAG, TRIAL_NUMBER, TRIAL_STATE, RunStatus
from behrt.trainer import AllOutOfMemory, Trainer

log = logging.getLogger(__name__)

SECONDS_BEFORE_PLOTS = 240.0
"""A run that ends sooner has its curves drawn at its end. The first drawing imports seaborn and takes over a second."""
SECONDS_BETWEEN_PLOTS = 30.0
PLOTS_SHARE = 0.005
"""Of a training's time, that drawing its curves may take while it runs."""


def adaptation_name(settings: ExperimentSettings) -> str:
    """The tag `adaptation`: what is trained, and on what."""
    start = "pretrained" if settings.adaptation.init_from else "random"
    return f"{'lora' if settings.adaptation.use_lora else 'full'}_on_{start}"


def figures_of_start(start: RunStart) -> dict[str, float]:
    """What MLflow is told once per run."""
    counts = start.counts
    return {
        "total_parameters": counts["total"],
        "trainable_parameters": counts["trainable"],
        "trainable_percent": counts["trainable_percent"],
        "lora_parameters": counts["lora"],
        "lora_percent": counts["lora_percent"],
        **start.baselines.figures(),
        **({} if start.transplant is None else asdict(start.transplant)),
    }


def asked_precision(settings: ExperimentSettings, attempt: Attempt | None) -> Precision:
    """That of the settings; a run that goes on keeps what `auto` came to, also where another CPU would choose anew."""
    asked = settings.training.precision
    if asked == "auto" and attempt is not None and attempt.in_place and attempt.state is not None:
        former = attempt.state.precision
        return "bf16" if former == "bf16" else "fp32" if former == "fp32" else asked
    return asked


def begin_run(
    start: RunStart, run_folder: RunFolder, attempt: Attempt | None, changes: list[str], tags: dict[str, str]
) -> tuple[str, TrackingRecord | None, Feeder]:
    """Makes the folder the run's own, and begins to tell MLflow of it.

    Args:
        tags: of the recipe.

    Returns:
        The run's key, what MLflow held of it before (None for a new run), and what feeds it.
    """
    settings, trial = start.settings, start.trial
    tags = {
        "device": start.device,
        "dataset": start.dataset["name"],
        "size": settings.model.model_size,
        **tags,
    }
    if trial is not None:
        # the number as a tag too, which is there as soon as the run is
        tags |= {PARENT_TAG: trial.study_run_id, TRIAL_NUMBER: str(trial.number), TRIAL_STATE: "RUNNING"}
    former = _former_record(run_folder, attempt)
    if former is not None:
        tags |= {"resumed_with": "; ".join(changes)} if changes else {}
        tags |= {"ended": "resumed"} if "ended" in former.tags else {}
        record = replace(former, tags={**former.tags, **tags}, status="RUNNING", ended=None)
        run_folder.go_on(experiment_yaml(settings))
    else:
        record = new_record(
            experiment=start.experiment,
            name=None if trial is None else f"trial {trial.number}",
            params={
                **({} if trial is None else {TRIAL_NUMBER: trial.number}),
                **settings.flat(),
                "resolved.max_position": start.max_position,
                "resolved.vocab_size": start.vocab_size,
                "resolved.precision": start.precision,
            },
            tags=tags,
            figures=figures_of_start(start),
            dataset=start.dataset,
        )
        run_folder.begin(experiment_yaml(settings))
    record.save(run_folder.path)
    feeder = Feeder(run_folder.path)
    return record.key, former, feeder


def _former_record(run_folder: RunFolder, attempt: Attempt | None) -> TrackingRecord | None:
    """What MLflow holds of the run that goes on; None for a new run."""
    if attempt is None or not attempt.in_place:
        return None
    try:
        return TrackingRecord.load(run_folder.path)
    except UserError:
        if attempt.state is None:
            raise
    return new_record(experiment=attempt.state.experiment, params=attempt.settings.flat(), key=attempt.state.key)


def tell_of_memory(result: RunResult, feeder: Feeder, listener: Listener, accumulation_steps: int) -> None:
    """Memory ran out, and the training goes on in smaller micro-batches."""
    result.accumulation_steps = accumulation_steps
    feeder.tag({"accumulation_steps": f"{accumulation_steps} (memory ran out)"})
    listener.memory_short(accumulation_steps)


def wait_for_run(start: RunStart, run_folder: RunFolder, former: TrackingRecord | None, feeder: Feeder) -> str | None:
    """MLflow's id of the run, if it comes in time.

    Raises:
        UserError: MLflow will not take the run; the folder is then as it was.
    """
    try:
        return feeder.wait_for_run()
    except KeyboardInterrupt:
        feeder.update(status="KILLED", ended=now())
        feeder.finish(silence=SECONDS_OF_SILENCE_WHEN_STOPPED, limit=MOST_SECONDS_WHEN_STOPPED)
        raise
    except UserError:
        feeder.abandon()
        if former is None:
            run_folder.take_back()
        else:
            former.save(run_folder.path)
        raise


def tell_again(
    attempt: Attempt, changes: list[str], result: RunResult, run_folder: RunFolder, listener: Listener
) -> None:
    """The epochs of the earlier attempt, to everybody who is told of epochs."""
    if attempt.state is not None:
        result.accumulation_steps, result.recoveries = attempt.state.accumulation_steps, attempt.state.recoveries
    if attempt.epochs:
        result.last, result.best = attempt.epochs[-1], best_of(attempt.epochs)
        result.checkup.update(run_folder.history)
    if attempt.in_place:
        listener.resumed(changes)
    if attempt.epochs:
        listener.went_on(attempt.epochs)


def train_epochs(
    trainer: Trainer[Any],
    keeper: Keeper,
    result: RunResult,
    run_folder: RunFolder,
    feeder: Feeder,
    listener: Listener,
) -> None:
    """The epochs: each is kept on disk first, then sent to MLflow, then shown."""
    start, checkup, ranks = result.start, result.checkup, trainer.ranks
    next_plot = time.perf_counter() + SECONDS_BEFORE_PLOTS
    if result.last is not None and ranks.broadcast(_ends(result.last, trainer, result, listener)):
        return  # an attempt that it goes on with had come to its end
    epochs = trainer.epochs()
    while (record := next(epochs, None)) is not None:
        if ranks.broadcast(keeper.can_recover(record)):
            result.last = keeper.recover(result.model)
            result.best, result.recoveries = best_of(keeper.epochs), keeper.recoveries
            feeder.tag({"recoveries": str(keeper.recoveries)})
            listener.recovered(record.epoch, result.last, trainer.rate_factor)
            epochs = trainer.epochs()
            continue
        result.last = record
        keeper.add_epoch(record)
        if record.is_best:
            result.best = record
        before = checkup.diagnosis
        new = checkup.update(run_folder.history)
        write_run(result, run_folder, feeder, status="RUNNING")
        feeder.changed()
        listener.epoch(record)
        for finding in new:
            listener.found(finding)
        if new or checkup.diagnosis.verdict != before.verdict:
            log_diagnosis(result, run_folder, feeder)
        if ranks.broadcast(_ends(record, trainer, result, listener)):
            return
        if start.trial is None and run_folder.is_kept and (begun := time.perf_counter()) > next_plot:
            draw_curves(run_folder.history, start.baselines, run_folder.plots, title=start.experiment)
            next_plot = _time_of_next_plot(begun, time.perf_counter())
    trainer.restore_best()
    result.stopped_early = trainer.stopping.should_stop
    if result.stopped_early and start.settings.training.stop_on != "never":
        # Patience may end a run that never learned before its grace is over: that is no success.
        checkup.update(run_folder.history, finished=True, stopped_early=True)
        result.lost_to = checkup.reason_to_stop("error")
    is_finite = result.last is not None and result.last.is_finite
    result.status = "FINISHED" if is_finite and result.lost_to is None else "FAILED"


def _time_of_next_plot(begun: float, done: float) -> float:
    """When the curves may be drawn again, whose last drawing took from `begun` to `done`; the first imports much.

    >>> _time_of_next_plot(100.0, 100.1), _time_of_next_plot(100.0, 101.0)
    (130.1, 301.0)
    """
    return done + max(SECONDS_BETWEEN_PLOTS, (done - begun) / PLOTS_SHARE)


def _ends(record: EpochRecord, trainer: Trainer[Any], result: RunResult, listener: Listener) -> bool:
    """Whether the doctor or the listener ends the run after this epoch."""
    stop_on = result.start.settings.training.stop_on
    if stop_on != "never":
        result.lost_to = result.checkup.reason_to_stop(stop_on)
    if result.lost_to is None and record.is_finite and not trainer.is_over and listener.prunes():
        result.pruned, result.status = True, "KILLED"
    return result.lost_to is not None or result.pruned


def log_diagnosis(result: RunResult, run_folder: RunFolder, feeder: Feeder) -> None:
    """The diagnosis so far, on disk and as the tags by which runs are filtered."""
    with tolerated("writing the diagnosis"):
        run_folder.write_diagnosis(result.diagnosis.as_dict(), markdown(result.diagnosis))
        feeder.tag({"diagnosis": result.diagnosis.verdict, "severity": result.diagnosis.severity})


def write_run(result: RunResult, run_folder: RunFolder, feeder: Feeder, *, status: str | None = None) -> None:
    """`run.json` as things stand."""
    result.run_id = feeder.run_id or result.run_id
    result.tracking_complete = feeder.is_complete
    run_folder.write_run(**{**result.as_dict(), "status": status or result.status})


@contextmanager
def ending(
    result: RunResult, run_folder: RunFolder, feeder: Feeder, started: float, stopper: Stopper
) -> Iterator[None]:
    """However a run ends, its folder and its MLflow run say how, with everything it has produced."""
    try:
        yield
    except (KeyboardInterrupt, RankLost) as error:
        # where a rank dies, torchrun sends the others a SIGTERM; one that all have agreed on is a person's
        is_agreed = result.start.ranks == 1 or stopper.is_at_pauses
        result.status, result.stopped = "KILLED", isinstance(error, KeyboardInterrupt) and is_agreed
        raise
    except Exception as error:
        # of several ranks one may not say by itself that the run is over: the others would wait for it
        if not (is_out_of_memory(error) and result.start.ranks == 1) and not isinstance(error, AllOutOfMemory):
            raise
        result.checkup.update(run_folder.history, out_of_memory=True)
        result.lost_to = result.checkup.reason_to_stop("error")
    finally:
        stopper.hold()
        result.seconds = time.perf_counter() - started
        try:
            _keep_end(result, run_folder, feeder)
        except (OSError, UserError) as error:  # a full disk, above all; what ended the run is said after this
            log.warning("%s: what the run came to cannot be written: %s", run_folder.path, error)
        if stopper.is_asked:
            feeder.finish(silence=SECONDS_OF_SILENCE_WHEN_STOPPED, limit=MOST_SECONDS_WHEN_STOPPED)
        else:
            feeder.finish(silence=SECONDS_OF_SILENCE)
        with tolerated("writing run.json"):
            write_run(result, run_folder, feeder)


def _keep_end(result: RunResult, run_folder: RunFolder, feeder: Feeder) -> None:
    """Leaves in the folder what the run came to, and tells MLflow."""
    start = result.start
    if not run_folder.is_kept:
        return
    if not (result.refused or result.pruned):
        result.checkup.update(run_folder.history, finished=True, stopped_early=result.stopped_early)
    log_diagnosis(result, run_folder, feeder)
    if run_folder.history and start.trial is None:  # a trial's curves are the coordinator's to draw
        with tolerated("drawing the curves"):
            draw_curves(run_folder.history, start.baselines, run_folder.plots, title=start.experiment)
    if result.best is not None:
        feeder.add_figures({"best_val_loss": result.best.val_loss, "best_epoch": result.best.epoch})
    status: RunStatus = result.status
    if start.trial is not None:
        status = STATUS_OF_OUTCOME[result.outcome]
        feeder.tag({TRIAL_STATE: result.outcome})
    result.status = status
    if status == "FINISHED":
        shutil.rmtree(run_folder.checkpoints / "previous", ignore_errors=True)
    write_run(result, run_folder, feeder)
    feeder.update(status=status, ended=now())
