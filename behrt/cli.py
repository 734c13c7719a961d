"""How does a person run behrt? Commands are parsed, a recipe is called, and what a person reads is printed.

Nothing heavy is imported before a command needs it. What people read goes to stderr; stdout carries only the one JSON
object of `--json`. Exit codes: 0 done, 2 the user's mistake (one line), 3 refused by the pre-flight, 4 the run was
lost, 130 and 143 stopped by a signal.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from behrt import __version__
from behrt.config import MAX_SEED, UserError, load_experiment
from behrt.evaluate_command import evaluate
from behrt.exits import (
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_MISTAKE,
    EXIT_REFUSED,
    EXIT_TERMINATED,
    LostRun,
    RefusedRun,
    one_line,
)
from behrt.finetune_command import embed, finetune
from behrt.labels_command import labels
from behrt.options import (
    PATH,
    adaptation_options,
    data_options,
    given,
    in_folder,
    json_option,
    model_options,
    prepare_option,
    preset_option,
    setting,
    training_options,
)
from behrt.prepare_options import PrepareOptions
from behrt.ranks import EndedElsewhere, RankError, RankLost, Ranks
from behrt.stopper import Terminated
from behrt.sweep_commands import sweep
from behrt.train_command import train

SECONDS_TO_SPEAK = 10.0
"""How long a rank that ends without a word waits for the one that says why."""
LONGEST_LINE = 900
"""Characters of an error; a value of thousands, quoted by click or by a library, loses its middle."""


class InOrder(click.Group):
    """Lists its commands in the order of a day's work, not of the alphabet."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=InOrder,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.version_option(__version__, prog_name="behrt")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
def cli(debug: bool) -> None:
    """Pre-train BEHRT on medical records with LoRA, every run tracked in MLflow.

    \b
    A first run:     behrt train --epochs 5
    Your records:    behrt prepare SOURCE --format meds --out data/mine   (or mimic4, omop, synthea)
                     behrt train --data data/mine
    What went wrong: behrt doctor experiments/NAME
    All runs:        behrt ui
    """
    ranks, command = Ranks.of_environment(), click.get_current_context().invoked_subcommand
    level = logging.DEBUG if debug else logging.WARNING if ranks.is_first else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    if not ranks.is_alone and command != "train":
        raise UserError(f"torchrun: several processes share a behrt train, not a behrt {command}; start it by itself")


@cli.command()
@click.option("--patients", type=click.IntRange(min=20), default=5000, show_default=True, help="How many patients.")
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@click.option(
    "--structure",
    type=click.Choice(["hmm", "none"]),
    default="hmm",
    show_default=True,
    help="`hmm`: hidden profiles and stages; `none`: uniform codes, nothing to learn.",
)
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Of the draw.")
@click.option("--overwrite", is_flag=True, help="Replace a simulated cohort in OUT.")
@json_option
def simulate(patients: int, out: Path, structure: Any, seed: int, overwrite: bool, as_json: bool) -> None:
    """Simulate a cohort whose best possible loss is known, as a MEDS data set."""
    from behrt import cohort

    simulated = cohort.simulate(out, patients=patients, structure=structure, seed=seed, overwrite=overwrite)
    click.echo(f"{patients:,} patients in {out}; next: behrt prepare {out} --format meds --out DIR", err=True)
    if as_json:
        about = {"patients": patients, "structure": structure, "seed": seed, "codes": len(simulated.codes)}
        click.echo(json.dumps({"out": str(out), **about}))


@cli.command()
@click.argument("sources", type=PATH, nargs=-1, required=True, metavar="SOURCE")
@click.option("--out", type=PATH, required=True, help="Folder for the prepared records.")
@prepare_option(
    "format",
    "Layout of SOURCE: MEDS parquet, the raw MIMIC-IV tables, OMOP CDM tables, or Synthea's CSV.",
    type=click.Choice(["meds", "mimic4", "omop", "synthea"]),
)
@prepare_option("min_patients", "Codes of fewer training patients become [UNK].", type=int)
@prepare_option("min_tokens", "Leave out patients with fewer codes.", type=int)
@prepare_option("split", "train/tuning/held_out in percent, where the source has no splits.")
@prepare_option("split_seed", "Seed of that split.", type=int)
@prepare_option("birth_code", "Code of a birth, or what it begins with before `//`.")
@prepare_option("death_code", "Code of a death, likewise.")
@prepare_option("admission_code", "Code of an admission; events up to the discharge are one visit.")
@prepare_option("discharge_code", "Code of a discharge; goes with --admission-code.")
@prepare_option("visit_gap_hours", "Without a visit id, a longer pause begins a new visit.", type=float)
@click.option("--column", multiple=True, metavar="NAME=MEDS", help="Rename a column, e.g. value=numeric_value.")
@click.option("--include", multiple=True, metavar="REGEX", help="Keep only codes that match; repeatable.")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave out codes that match; repeatable.")
@prepare_option("icd_digits", "Shorten ICD codes to this many characters.", type=int)
@prepare_option("numeric_bins", "Append quantile bins of values, fitted on train: LAB//50912//Q7.", type=int)
@click.option("--labs", is_flag=True, help="mimic4: read labevents too.")
@click.option("--measurements", is_flag=True, help="omop: read the table measurement too.")
@click.option("--observations", is_flag=True, help="omop: read the table observation too.")
@prepare_option(
    "missing_birth", "What becomes of subjects without a birth.", type=click.Choice(["refuse", "drop", "keep"])
)
@prepare_option(
    "static_codes",
    "What becomes of events without a time; kept ones open the first visit.",
    type=click.Choice(["drop", "keep"]),
)
@click.option("--shard", metavar="I/N", help="Prepare one part of N, as on one of N machines; OUT is for --join.")
@click.option("--join", is_flag=True, help="SOURCE is the folders of all N parts; join them.")
@click.option("--overwrite", is_flag=True, help="Replace prepared records that are already in OUT.")
@json_option
def prepare(
    sources: tuple[Path, ...], out: Path, shard: str | None, join: bool, overwrite: bool, as_json: bool, **flags: Any
) -> None:
    """Turn records into sequences that training maps into memory; nothing is dropped without being counted."""
    chosen = {name: value for name, value in flags.items() if not (value is None or value is False or value == ())}
    if join and (chosen or shard is not None):
        name = next(iter(chosen), "shard").replace("_", "-")
        raise UserError(f"--{name}: has no effect with --join, the parts were made with their options; leave it out")
    if len(sources) > 1 and not join:
        raise UserError(f"expected one SOURCE, found {len(sources)}; several are for --join, which joins parts")
    options = PrepareOptions(**chosen)

    from behrt import prepare as preparation
    from behrt.console import ProgressBar, fates_table, prepared_tables
    from behrt.parts import PartNumber
    from behrt.terminal import stderr_console

    console = stderr_console()
    bar = ProgressBar(console)
    try:
        if join:
            info = preparation.join_parts(sources, out, overwrite=overwrite, progress=bar.show)
        elif shard is not None:
            place = PartNumber.parse(shard)
            info = preparation.prepare_part(sources[0], out, place, options, overwrite=overwrite, progress=bar.show)
        else:
            info = preparation.prepare(sources[0], out, options, overwrite=overwrite, progress=bar.show)
    finally:
        bar.clear()
    for table in [fates_table(info)] if shard else prepared_tables(info):
        console.print(table)
    if shard:
        after = f"Part {place} in {out}; when all are there: behrt prepare --join PART... --out DIR"
    else:
        after = f"Prepared in {out}; next: behrt train --data {out}"
    console.print(after, markup=False)
    if as_json:
        # not the names of the files: with one a patient, they are ids
        click.echo(json.dumps({name: value for name, value in info.items() if name != "files"}))


cli.add_command(labels)
cli.add_command(train)
cli.add_command(finetune)
cli.add_command(evaluate)
cli.add_command(embed)


@cli.command()
@click.argument("experiment_file", required=False, metavar="[EXPERIMENT.yaml]", type=PATH)
@preset_option
@model_options
@adaptation_options
@setting("data", "Prepared records, for the size of their vocabulary.")
@json_option
def params(experiment_file: Path | None, preset: str | None, as_json: bool, **flags: Any) -> None:
    """Count the parameters of a configuration, without training. The vocabulary defaults to 1000 tokens."""
    experiment_file = in_folder(experiment_file)
    settings = load_experiment(experiment_file, preset=preset, flags=given(flags))

    from behrt.pretrain import count_configured

    counts = count_configured(settings)
    if as_json:
        click.echo(json.dumps(counts))
        return
    from behrt.console import parameter_summary, parameter_table
    from behrt.terminal import stderr_console

    console = stderr_console()
    console.print(parameter_table(counts))
    console.print(parameter_summary(counts))


@cli.command()
@json_option
def devices(as_json: bool) -> None:
    """Show what is there to compute with, and which of it a run would use."""
    from behrt.hardware import absent, devices_here

    found, missing = devices_here(), absent()
    if as_json:
        click.echo(json.dumps({"devices": [device.as_dict() for device in found], "absent": missing}))
        return
    from behrt.console import device_table
    from behrt.terminal import stderr_console

    console = stderr_console()
    console.print(device_table(found))
    lines = [f"A run uses {found[0].device}, in {found[0].precision}; --device and --precision choose otherwise."]
    cards = sum(device.device.startswith("cuda") for device in found)
    if cards > 1:
        lines.append(f"All {cards} cards: torchrun --nproc-per-node {cards} -m behrt train")
    lines += [f"No {name}: {reason}." for name, reason in missing.items()]
    console.print("\n".join(lines), markup=False)


@cli.command()
@click.argument("target", required=False)
@click.option("--map", "columns", multiple=True, metavar="NAME=COLUMN", help="A figure under another name.")
@click.option("--list", "as_list", is_flag=True, help="List all rules.")
@click.option("--explain", "rule", metavar="RULE", help="Say when a rule fires, why, and what helps.")
@model_options
@adaptation_options
@data_options
@training_options
@click.option("--total-parameters", type=click.IntRange(1, 10**15), help="Parameters of the model.")
@click.option("--trainable-parameters", type=click.IntRange(0, 10**15), help="How many of them are trained.")
@click.option("--val-patients", type=click.IntRange(0, 10**15), help="Patients in the validation set.")
@json_option
def doctor(
    target: str | None, columns: tuple[str, ...], as_list: bool, rule: str | None, as_json: bool, **flags: Any
) -> None:
    """Say what went wrong in a run, and which flag helps.

    TARGET is an experiment folder, an MLflow run id, a metrics_history.json, a table of epochs (CSV or JSON, of any
    tool), a training log, or - for the standard input. Settings that the record does not hold can be given as flags.
    """
    if as_list or rule:
        from behrt.doctor.explain import explain, rule_named, rule_rows

        click.echo(explain(rule_named(rule)) if rule else "\n".join(rule_rows()))
        return
    if target is None:
        raise UserError("behrt doctor: TARGET is missing; name a run's folder, its MLflow id or a file with its epochs")

    from behrt.console import diagnosis_table
    from behrt.doctor.diagnosis import diagnose
    from behrt.doctor.facts import with_flags
    from behrt.doctor.targets import read_target
    from behrt.sync import settle_dead
    from behrt.terminal import stderr_console

    settle_dead(Path(target))

    facts = with_flags(read_target(target, columns=pairs(columns, "--map")), given(flags))
    diagnosis = diagnose(facts)
    if as_json:
        click.echo(json.dumps(diagnosis.as_dict()))
        return
    stderr_console().print(diagnosis_table(diagnosis))


@cli.command()
@click.argument("runs", nargs=-1, metavar="RUN RUN ...")
@click.option(
    "--out",
    type=PATH,
    default=Path("comparison.png"),
    show_default=True,
    help="Figure to draw (PNG); one that is there is replaced.",
)
@json_option
def compare(runs: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Say how runs differ, in settings and in results, and draw their curves together.

    RUN is whatever `behrt doctor` takes: an experiment folder, an MLflow run id, a file with the figures of each epoch.
    """
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UserError(f"--out: expected a file that ends in .png, found {str(out)!r}")

    from behrt.comparison import compare_targets
    from behrt.plots import draw_comparison
    from behrt.sync import settle_dead

    for run in runs:
        settle_dead(Path(run))
    comparison = compare_targets(runs)
    curves = {run.name: run.facts.curves for run in comparison.runs}
    title = "" if comparison.why_not is None else "losses may not compare"
    draw_comparison(curves, comparison.shared, out, title=title)
    if as_json:
        click.echo(json.dumps({**comparison.as_dict(), "figure": str(out)}))
        return
    from behrt.console import comparison_table
    from behrt.terminal import stderr_console

    console = stderr_console()
    console.print(comparison_table(comparison))
    if comparison.why_not is not None:
        console.print(comparison.why_not, markup=False, style="yellow")
    console.print(f"Curves: {out}", markup=False)


cli.add_command(sweep)


@cli.command()
@click.argument("runs", nargs=-1, metavar="[RUN ...]")
@json_option
def sync(runs: tuple[str, ...], as_json: bool) -> None:
    """Send to MLflow what it lacks of runs, as after a server that was away. Without RUN: of every run here.

    RUN is the folder of a run, or its MLflow run id. What MLflow has already is not sent again.
    """
    from behrt.sync import find_runs, sync_runs

    found = sync_runs(find_runs(runs), tell=lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps({str(folder): outcome for folder, outcome in found.items()}))
    failed = sum(outcome == "failed" for outcome in found.values())
    if failed:
        raise UserError(f"{failed} of {len(found)} runs could not be sent; run behrt sync again when MLflow answers")


@cli.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port on this machine.")
def ui(port: int) -> None:
    """Open the MLflow store in the browser: runs side by side, with their curves."""
    from behrt.sync import find_runs, settle_dead
    from behrt.tracking import serve_ui, ui_address

    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"--port: {port} is taken; choose another")
    for folder in find_runs(()):
        settle_dead(folder)
    click.echo(f"Open {ui_address(port)} (Ctrl-C ends the server)", err=True)
    serve_ui(port)


def pairs(texts: tuple[str, ...], flag: str) -> dict[str, str]:
    """`NAME=VALUE` texts as a mapping."""
    for text in texts:
        if not all(part.strip() for part in text.partition("=")[::2]):
            raise UserError(f"{flag}: expected NAME=COLUMN, found {text!r}")
    return {name.strip(): value.strip() for name, _, value in (text.partition("=") for text in texts)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code. The user's mistakes become one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    former_handler = signal.signal(signal.SIGTERM, terminate)
    try:
        code = cli.main(arguments, prog_name="behrt", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return EXIT_MISTAKE
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "behrt"
        return fail(f"{command}: {error.format_message()} (see {command} --help)", EXIT_MISTAKE)
    except (click.ClickException, UserError, OSError) as error:
        if debug:
            raise
        return fail(f"behrt: {one_line(error)}", EXIT_MISTAKE, speaks=isinstance(error, RankError))
    except EndedElsewhere as error:
        return let_others_speak(error.code)
    except RankLost as error:
        if debug:
            raise
        return fail_by_signal(f"behrt: stopped, because {error}", EXIT_TERMINATED)
    except RefusedRun as error:
        return fail(f"behrt: {error}", EXIT_REFUSED)
    except LostRun as error:
        return fail(f"behrt: {error}", EXIT_LOST)
    except (KeyboardInterrupt, click.Abort) as error:  # click wraps the first in the second
        if isinstance(error, Terminated) or isinstance(error.__cause__, Terminated):
            return fail_by_signal("behrt: stopped by SIGTERM", EXIT_TERMINATED)
        return fail_by_signal("behrt: stopped", EXIT_INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, former_handler)


def terminate(signal_number: int, frame: object) -> None:
    raise Terminated


def fail(message: str, code: int, *, speaks: bool = False) -> int:
    """Says why a command ends. Of several ranks the first says it, and another only where it `speaks` for itself."""
    if not (speaks or Ranks.of_environment().is_first):
        return let_others_speak(code)
    return say(message, code)


def fail_by_signal(message: str, code: int) -> int:
    """The same of what ends all ranks at once."""
    return say(message, code) if Ranks.of_environment().is_first else code


def let_others_speak(code: int) -> int:
    """Ends after the rank that says why: torchrun ends all others as soon as it sees that one has ended."""
    with suppress(KeyboardInterrupt):
        time.sleep(SECONDS_TO_SPEAK)
    return code


def say(message: str, code: int) -> int:
    line = " ".join(message.split())
    click.echo(line if len(line) <= LONGEST_LINE else f"{line[:600]} ... {line[-200:]}", err=True)
    return code
