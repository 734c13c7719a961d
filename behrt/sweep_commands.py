"""How does a person run, watch and use a study?"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from behrt.config import UserError
from behrt.exits import LostRun, RefusedRun
from behrt.options import PATH, data_options, given, json_option, options, setting

storage_option = click.option(
    "--storage",
    metavar="URL",
    default=None,
    help="Where studies are kept: sqlite:///FILE or postgresql://USER@HOST/DB.  [default: sweeps/studies.db]",
)
trial_options = options(
    setting("epochs", "Most epochs of a trial.", type=int),
    setting("batch_size", "Patients a step.", type=int),
    setting("device", "Where to compute.", type=click.Choice(["auto", "cpu", "cuda", "mps"])),
    setting("precision", "Of matrix products.", type=click.Choice(["auto", "fp32", "bf16"])),
)


@click.group()
def sweep() -> None:
    """Search for the settings that learn best: Optuna studies, every trial a tracked run.

    \b
    A first study:  behrt sweep run sweeps/quick.yaml --workers 2
    Go on with it:  the same command again
    How it stands:  behrt sweep status quick
    Use the best:   behrt sweep export quick --to experiments/best_of_quick
    """


@sweep.command()
@click.argument("sweep_file", metavar="SWEEP.yaml", type=PATH)
@click.option("--trials", type=click.IntRange(min=1), help="Finished trials to come to, instead of the file's.")
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that train trials."
)
@storage_option
@click.option("--study", "name", default=None, help="Name of the study.  [default: that of the file]")
@click.option("--resume", is_flag=True, help="Only go on with a study that is there; never begin one.")
@data_options
@trial_options
@json_option
def run(
    sweep_file: Path,
    trials: int | None,
    workers: int,
    storage: str | None,
    name: str | None,
    resume: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Begin a study, or go on with it, until it has the trials that were asked for.

    Several of these may work on one study, on one machine or on many (--storage). Ctrl-C ends the running trials within
    a step; the same command goes on, each from its last whole epoch. Flags of settings are laid over the file's.
    """
    from behrt.sweep.settings import load_sweep

    loaded = load_sweep(sweep_file, name=name, trials=trials, flags=given(flags))

    from behrt.sweep.coordinator import run_sweep
    from behrt.sweep_console import StudyView, context, heading
    from behrt.terminal import stderr_console

    console = stderr_console()
    view = StudyView(console)
    try:
        summary, given_up = run_sweep(loaded, storage_url=storage, workers=workers, must_exist=resume, show=view.show)
    except KeyboardInterrupt:
        view.close()
        console.print(f"Study {loaded.name} is stopped; to go on, run the same command again", markup=False)
        raise
    finally:
        view.close()
    told = [heading(summary)] if view.times_shown > 1 else ["  nothing was left to train; ask for more with --trials"]
    if context(summary) is not None:
        told.append(f"  {context(summary)}")
    told.append(f"  trials and figures: sweeps/{summary.name}; MLflow run {summary.parent_run_id}")
    console.print("\n".join(told), markup=False, soft_wrap=True)
    if as_json:
        click.echo(json.dumps(summary.as_dict()))
    if given_up is not None:
        is_refused = all(
            record.ended and record.ended.startswith("refused") for record in summary.tally.finished_records
        )
        raise (RefusedRun if is_refused else LostRun)(f"{summary.name}: given up: {given_up}")
    if summary.best is None:
        raise LostRun(f"{summary.name}: no trial is complete; {_command('status', summary.name, storage)} says why")
    console.print(
        f"  the best one as an experiment: {_command('export', summary.name, storage)} --to experiments/NAME",
        markup=False,
        soft_wrap=True,
    )


def _command(what: str, study: str, storage: str | None) -> str:
    """A command to type next, with the storage that this one was given."""
    from behrt.sweep.storage import shown_url

    given_storage = "" if storage is None else f" --storage {shlex.quote(shown_url(storage))}"
    return f"behrt sweep {what} {study}{given_storage}"


@sweep.command()
@click.argument("study")
@storage_option
@json_option
def status(study: str, storage: str | None, as_json: bool) -> None:
    """Show all trials of STUDY: state, epochs, best value, parameters, and why each ended."""
    summary = _summary(study, storage)
    if as_json:
        click.echo(json.dumps(summary.as_dict()))
        return
    from behrt.sweep_console import context, trials_table
    from behrt.terminal import best_mark, stderr_console

    console = stderr_console()
    console.print(trials_table(summary, width=console.width, mark=best_mark(console.encoding)))
    if context(summary) is not None:
        console.print(context(summary), markup=False, soft_wrap=True)


@sweep.command()
@click.argument("study")
@storage_option
@json_option
def best(study: str, storage: str | None, as_json: bool) -> None:
    """Show the best complete trial of STUDY."""
    from behrt.sweep.summary import trial_dict
    from behrt.sweep_console import context
    from behrt.terminal import stderr_console

    summary = _summary(study, storage)
    record = summary.best
    if record is None:
        raise UserError(f"{study}: no trial is complete yet; look at it with behrt sweep status {study}")
    if as_json:
        click.echo(json.dumps(trial_dict(record)))
        return
    lines = [f"Trial {record.number}: {summary.objective} {record.best:.4f}, {record.epochs} epochs trained"]
    lines += [
        f"  {name}: {value:.12g}" if isinstance(value, float) else f"  {name}: {value}"
        for name, value in sorted(record.params.items())
    ]
    if context(summary) is not None:
        lines.append(f"  {context(summary)}")
    lines += [f"  folder {record.folder}", f"  MLflow run {record.run_id}"]
    lines.append(f"  as an experiment: {_command('export', study, storage)} --to experiments/NAME")
    stderr_console().print("\n".join(lines), markup=False, soft_wrap=True)


@sweep.command()
@click.argument("study")
@storage_option
@click.option("--out", type=PATH, default=None, help="Folder.  [default: sweeps/STUDY/plots]")
def plot(study: str, storage: str | None, out: Path | None) -> None:
    """Draw the figures of STUDY as PNG files."""
    from behrt.sweep.figures import draw_study

    opened = _open(study, storage)
    drawn = draw_study(opened.records(), opened.sweep, out or Path("sweeps") / study / "plots")
    if not drawn:
        raise UserError(f"{study}: no trial has a value yet; there is nothing to draw")
    click.echo("\n".join(map(str, drawn)), err=True)


@sweep.command()
@click.argument("study")
@click.option("--to", type=PATH, required=True, help="Experiment folder to write.")
@click.option("--trial", type=click.IntRange(min=0), default=None, help="Another complete trial than the best one.")
@storage_option
def export(study: str, to: Path, trial: int | None, storage: str | None) -> None:
    """Write the best trial of STUDY as an experiment that `behrt train` runs."""
    from behrt.sweep.summary import export_trial

    record = export_trial(_open(study, storage), to, trial)
    click.echo(f"Trial {record.number} in {to}; next: behrt train {to / 'experiment.yaml'}", err=True)


def _open(study: str, storage: str | None) -> Any:
    from behrt.sweep.storage import open_storage
    from behrt.sweep.study import SweepStudy

    return SweepStudy.open(study, open_storage(storage, create=False))


def _summary(study: str, storage: str | None) -> Any:
    from behrt.sweep.summary import StudySummary

    return StudySummary.of(_open(study, storage))
