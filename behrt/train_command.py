"""How does a person begin a training, or go on with one that was cut off?"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from behrt.config import (
    EXPERIMENT_NAME,
    FLAGS,
    ExperimentSettings,
    UserError,
    build_settings,
    lay_over,
    load_experiment,
    resolved,
)
from behrt.devices import choose_device
from behrt.exits import LostRun, RefusedRun, one_line
from behrt.files import is_locked
from behrt.imports import first_import
from behrt.options import (
    PATH,
    adaptation_options,
    data_options,
    given,
    in_folder,
    json_option,
    model_options,
    preset_option,
    training_options,
)
from behrt.ranks import ALONE, RankLost, Ranks, RanksDiffer
from behrt.stopper import Terminated

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from behrt.doctor.rule import Finding
    from behrt.records import RecordsCache
    from behrt.resume import Attempt
    from behrt.run_report import RunResult

SECONDS_TO_DIE = 30.0
"""How long a process that torchrun has killed may still seem to hold its folder."""


@click.command()
@click.argument("experiment_file", required=False, metavar="[EXPERIMENT.yaml]", type=PATH)
@preset_option
@model_options
@adaptation_options
@data_options
@training_options
@click.option("--experiment", default=None, help="Name of the folder under experiments/ and in MLflow.")
@click.option("--out", type=PATH, default=None, help="Another folder than experiments/NAME.")
@click.option("--force", is_flag=True, help="Train even if the pre-flight finds that the run cannot learn.")
@click.option(
    "--resume",
    metavar="RUN",
    default=None,
    help="Go on with a run that was cut off: its folder, or its MLflow run id.",
)
@json_option
def train(
    experiment_file: Path | None,
    preset: str | None,
    experiment: str | None,
    out: Path | None,
    force: bool,
    resume: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Pre-train one model. Flags go over the file, the file over the preset, the preset over the defaults.

    With --resume, the run goes on with the settings that it was begun with; what else is given must agree with them.
    On the N GPUs of one machine: torchrun --nproc-per-node N -m behrt train ...
    """
    experiment_file = in_folder(experiment_file)
    ranks = Ranks.of_environment()
    measures_batch = flags["batch_size"] == "auto"
    if measures_batch:
        flags["batch_size"] = None
        if resume is not None:
            raise UserError("--batch-size: a run that goes on keeps its own; leave auto out")
    if resume is None:
        settings = load_experiment(experiment_file, preset=preset, flags=given(flags))
        if measures_batch:
            refuse_beside_auto(settings)
        name, folder = place_of_run(settings, experiment_file, experiment, out)

    with first_import("torch"):
        from behrt.pretrain import pretrain
        from behrt.records import RecordsCache
        from behrt.resume import attempt_to_resume

    records_cache = RecordsCache()
    with ranks.joined():
        attempt = None
        if resume is not None:
            attempt = ranks.by_first(lambda: attempt_of(resume, out=out, preset=preset, experiment=experiment))
            with ranks.together():
                settings = settings_to_resume(attempt, experiment_file, given(flags))
            name, folder = ranks.by_first(partial(name_of, attempt)), attempt.folder
        elif former := ranks.by_first(lambda: run_before_restart(folder, ranks)):
            if has_ended(former):
                return
            attempt = ranks.by_first(lambda: attempt_to_resume(str(folder), lambda state: folder))
            settings = attempt.settings
        elif measures_batch:
            with ranks.together():
                device = ranks.take_device(choose_device(settings.training.device))
            settings = ranks.by_first(lambda: with_fastest_batch(settings, records_cache, device, ranks.size))
        name, folder = ranks.broadcast((name, folder))

        recipe = partial(pretrain, ranks=ranks, records_cache=records_cache)
        carry_out(recipe, settings, name, folder, attempt, command="train", force=force, as_json=as_json, ranks=ranks)


def refuse_beside_auto(settings: ExperimentSettings) -> None:
    """`UserError` for what makes no sense beside `--batch-size auto`."""
    if settings.training.accumulation_steps > 1:
        raise UserError("--accumulation-steps: --batch-size auto finds what fits in one piece; leave one of them out")
    if settings.training.compile:
        raise UserError("--compile: --batch-size auto times layers as they are; name the number that it finds")


def with_fastest_batch(
    settings: ExperimentSettings, records_cache: RecordsCache, device: torch.device, ranks: int
) -> ExperimentSettings:
    """The settings with the batch size that is measured to be the fastest here; a person is told of it."""
    from behrt.batch_size import choose_batch_size
    from behrt.console import TerminalListener, batch_lines
    from behrt.terminal import stderr_console

    console = stderr_console()
    listener = TerminalListener(console)
    try:
        choice = choose_batch_size(settings, records_cache, device, ranks=ranks, progress=listener.preparing)
    finally:
        listener.stop()
    console.print(batch_lines(choice), markup=False)
    return build_settings(lay_over(settings.model_dump(mode="json"), {"batch_size": choice.batch_size}), where=FLAGS)


def carry_out(
    recipe: Callable[..., RunResult],
    settings: ExperimentSettings,
    experiment: str,
    folder: Path,
    attempt: Attempt | None,
    *,
    command: str,
    force: bool,
    as_json: bool,
    ranks: Ranks = ALONE,
) -> None:
    """Runs a recipe before a person's eyes, who may stop it, and says what came of it.

    Args:
        recipe: `pretrain` or `finetune`.
        attempt: one that goes on. A new run makes room for itself; one that died in its folder is marked so first.
        command: that goes on with the run.
        ranks: that carry it out together; the first one speaks.
    """
    with first_import("torch"):
        from behrt.console import TerminalListener
        from behrt.run_report import Listener
        from behrt.stopper import Stopper
        from behrt.sync import settle_dead
        from behrt.terminal import stderr_console

    console = stderr_console()
    listener = TerminalListener(console)
    if ranks.is_first and attempt is None and settle_dead(folder):
        console.print(
            f"The run in {folder} died without a word, and is marked so; it is kept in {folder / 'earlier'}.",
            markup=False,
        )
    stopper = Stopper(insists=ranks.is_alone, is_patient=not ranks.is_alone)
    try:
        with stopper.interrupting():
            result = recipe(
                settings,
                experiment=experiment,
                folder=folder,
                listener=listener if ranks.is_first else Listener(),
                force=force,
                attempt=attempt,
                stopper=stopper,
            )
    except (KeyboardInterrupt, RankLost):
        if listener.has_started:
            listener.stop()
            console.print(f"To go on: {how_to_go_on(folder, command)}", markup=False)
        raise
    except RanksDiffer as error:
        raise LostRun(f"{error}; the checkpoint before that is whole: {how_to_go_on(folder, command)}") from error
    except OSError as error:  # a full disk, above all
        if not listener.has_started:
            raise
        message = f"{one_line(error)}; what was kept before is whole: make room, then {how_to_go_on(folder, command)}"
        raise UserError(message) from error
    finally:
        stopper.close()
        listener.stop()
    ranks.by_first(lambda: tell_end(result, console, as_json=as_json))


def run_before_restart(folder: Path, ranks: Ranks) -> dict[str, Any] | None:
    """What `run.json` says of the run in `folder`, if this very torchrun began it before it started all ranks again.

    None for any other run: it makes room for a new one.
    """
    if not ranks.restarts:
        return None
    from behrt.feeding import TrackingRecord
    from behrt.history import read_run
    from behrt.pretrain import LAUNCH

    deadline = time.monotonic() + SECONDS_TO_DIE
    while is_locked(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        record, run = TrackingRecord.load(folder), read_run(folder)
    except UserError:  # it died before it had one
        return None
    return run if record.tags.get(LAUNCH) == ranks.launch else None


def has_ended(run: dict[str, Any]) -> bool:
    """Whether a run that a restart finds is finished; False where a process of it died, and it is to go on.

    Raises:
        Terminated, RefusedRun, LostRun: as it ended before: torchrun starts again what ends with any code but 0.
    """
    if run.get("stopped"):
        raise Terminated
    if run.get("refused"):
        raise RefusedRun("refused already; to start it again changes nothing")
    if run.get("lost_to"):
        raise LostRun(f"ended already ({run['lost_to']}); to start it again changes nothing")
    return bool(run["status"] == "FINISHED")


def tell_end(result: RunResult, console: Console, *, as_json: bool) -> None:
    """What a run came to; `RefusedRun` or `LostRun` where that is an end of its own."""
    from behrt.console import result_lines

    console.print("\n".join(result_lines(result)), markup=False)
    if as_json:
        click.echo(json.dumps(result.as_dict()))
    if result.refused:
        raise RefusedRun(f"refused: {reasons(result.diagnosis.of_severity('error'))}; --force trains all the same")
    if result.status == "FAILED":
        lost_to = [result.lost_to] if result.lost_to else result.diagnosis.of_severity("error")
        raise LostRun(f"ended after epoch {result.last.epoch if result.last else 0}: {reasons(lost_to)}")


def how_to_go_on(folder: Path, command: str) -> str:
    """The command that goes on with a run."""
    return f"behrt {command} --resume {shlex.quote(str(folder))}"


def attempt_of(
    target: str, *, out: Path | None, kind: type[ExperimentSettings] = ExperimentSettings, **of_new_runs: str | None
) -> Attempt:
    """The attempt that `--resume` names; `UserError` for options that make no sense beside it."""
    for name, value in of_new_runs.items():
        if value is not None:
            raise UserError(
                f"--{name}: goes with a new run, and --resume with one that there is; leave one of them out"
            )
    if out is not None and Path(target).exists():
        raise UserError(f"--out: {target} goes on where it is; leave this out")

    from behrt.resume import attempt_to_resume

    return attempt_to_resume(target, lambda state: out or Path("experiments") / state.experiment, kind=kind)


def settings_to_resume(attempt: Attempt, experiment_file: Path | None, flags: dict[str, Any]) -> ExperimentSettings:
    """Those that the run was begun with, or those of the file that is named, and the flags over them."""
    if experiment_file is not None:
        return load_experiment(experiment_file, flags=flags)
    nested = lay_over(attempt.settings.model_dump(mode="json"), flags)
    return build_settings(nested, where=FLAGS)


def name_of(attempt: Attempt) -> str:
    """Under which MLflow has the run."""
    from behrt.feeding import TrackingRecord

    return attempt.state.experiment if attempt.state else TrackingRecord.load(attempt.folder).experiment


def reasons(findings: Sequence[Finding]) -> str:
    """Findings in one line, each with its first remedy."""
    return "; ".join(
        f"{finding.title[:1].lower()}{finding.title[1:]} ({finding.rule})"
        + "".join(f", try {remedy}" for remedy in finding.remedies[:1])
        for finding in findings
    )


def place_of_run(
    settings: ExperimentSettings, experiment_file: Path | None, experiment: str | None, out: Path | None
) -> tuple[str, Path]:
    """Name and folder of a run: as given, else those of the experiment file, else by the model's size."""
    if experiment is None:
        if out is not None:
            experiment = re.sub(r"[^A-Za-z0-9._-]", "_", resolved(out).name)
        elif experiment_file is not None:
            is_standard = experiment_file.name == "experiment.yaml"
            experiment = experiment_file.resolve().parent.name if is_standard else experiment_file.stem
            out = experiment_file.parent if is_standard else None
        else:
            experiment = f"behrt_{settings.model.model_size}_mlm"
    if not EXPERIMENT_NAME.fullmatch(experiment):
        raise UserError(f"--experiment: {experiment!r} is no folder name; use letters, digits, '.', '_' and '-'")
    return experiment, out or Path("experiments") / experiment
