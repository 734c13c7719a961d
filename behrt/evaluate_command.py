"""How does a person ask how good the predictions of a fine-tuned run are?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from behrt.config import Device
from behrt.imports import first_import
from behrt.options import PATH, json_option

if TYPE_CHECKING:
    from rich.table import Table

    from behrt.evaluation_report import Evaluation


@click.command()
@click.argument("run")
@click.option(
    "--split",
    type=click.Choice(["train", "tuning", "held_out"]),
    default="held_out",
    show_default=True,
    help="Whose patients to predict.",
)
@click.option("--labels", type=PATH, help="Label file of the same task.  [default: that of the run]")
@click.option("--data", type=PATH, help="Prepared records of the labelled patients.  [default: those of the run]")
@click.option("--no-baselines", is_flag=True, help="Fit no baselines: faster, and no verdict.")
@click.option(
    "--draws", type=click.IntRange(10, 100_000), default=1000, show_default=True, help="Of patients, for intervals."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of these draws.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@json_option
def evaluate(
    run: str,
    split: str,
    labels: Path | None,
    data: Path | None,
    no_baselines: bool,
    draws: int,
    seed: int,
    device: Device,
    as_json: bool,
) -> None:
    """Judge the predictions of a fine-tuned RUN, with intervals, beside baselines and for subgroups of patients."""
    with first_import("torch"):
        from behrt.console import ProgressBar
        from behrt.evaluate import evaluate as recipe
        from behrt.evaluation_report import ceiling_sentence
        from behrt.terminal import stderr_console

    console = stderr_console()
    bar = ProgressBar(console)
    try:
        found = recipe(
            run, split=split, labels=labels, data=data, with_baselines=not no_baselines, draws=draws, seed=seed,
            device=device, progress=bar.show,
        )  # fmt: skip
    finally:
        bar.clear()
    for note in found.notes:
        console.print(note, markup=False)
    console.print(metrics_table(found))
    if found.subgroups:
        console.print(subgroups_table(found))
    told = [*found.sentences, *([ceiling_sentence(found)] if found.ceiling is not None else [])]
    for sentence in told:
        console.print(sentence, markup=False)
    console.print(f"Report, figures and predictions in {found.folder}", markup=False)
    if as_json:
        click.echo(json.dumps({"folder": str(found.folder), **found.as_dict()}))


def metrics_table(found: Evaluation) -> Table:
    """A row a predictor; the metrics of single labels are in the report."""
    from rich.table import Table

    from behrt.tasks.assessment import METRICS, TITLES

    metrics = found.assessment.metrics
    shown = [name for name in METRICS if any(name in own for own in metrics.values())]
    table = Table(f"{found.task}, {found.split}", *(METRICS[name] for name in shown))
    for name, own in metrics.items():
        table.add_row(TITLES[name], *(str(own[each]).replace(" (", "\n(") if each in own else "" for each in shown))
    table.caption = f"{found.rows:,} predictions of {found.patients:,} patients; 95% over {found.draws:,} draws of them"
    return table


def subgroups_table(found: Evaluation) -> Table:
    """A row a group; `-` where it has too few patients to be told about."""
    from rich.table import Table

    from behrt.tasks.assessment import FEWEST_PATIENTS, METRICS, TITLES

    predictors = list(found.assessment.metrics)
    table = Table(f"{METRICS[found.assessment.headline]} by group", "patients", *(TITLES[name] for name in predictors))
    for column in table.columns[1:]:
        column.justify = "right"
    for group in found.subgroups:
        cells = ["-"] * (1 + len(predictors))
        if group.patients is not None:
            cells = [f"{group.patients:,}", *(f"{group.metrics[name].value:.3f}" for name in predictors)]
        table.add_row(group.title, *cells)
    table.caption = f"-: fewer than {FEWEST_PATIENTS} patients, or with the outcome, or without"
    return table
