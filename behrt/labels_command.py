"""How are the labels of a clinical task asked for on the command line?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click

from behrt.config import UserError
from behrt.options import PATH, json_option, prepare_option
from behrt.prepare_options import PrepareOptions, RecordFormat

TASKS = ("readmission", "disease", "next-visit", "survival", "phenotyping")


@click.command()
@click.argument("task", type=click.Choice(TASKS))
@click.argument("source", type=PATH)
@click.option("--out", type=PATH, required=True, help="Label file to write (parquet, MEDS LabelSchema).")
@click.option("--code-sets", type=PATH, help="YAML file of code sets; survival without one is to death.")
@click.option("--code-set", "names", multiple=True, metavar="NAME", help="Only this set of the file; repeatable.")
@click.option(
    "--at",
    help="When to predict: at the end of each-visit, of the first-visit, of the last-visit --by a day, of one-visit by "
    "chance, at each-discharge, or --hours after each-admission.",
)
@click.option("--hours", type=float, help="Of each-admission.  [default: 24]")
@click.option("--by", metavar="DAY", help="Of last-visit, like 2009-12-31.")
@click.option(
    "--horizon", type=float, help="Days in which the outcome counts.  [default: 365; readmission: 30; survival: no end]"
)
@click.option("--gap", type=float, help="Days from the prediction to the beginning of the horizon.  [default: 0]")
@click.option("--min-visits", type=int, help="Visits that must have begun by the prediction.  [default: 1]")
@click.option("--min-days", type=float, help="Days of history before the prediction.  [default: 0]")
@click.option(
    "--observed-until",
    metavar="WHEN",
    help="Until when outcomes are seen: last-event, always, or a day.  [default: last-event; readmission: always]",
)
@click.option(
    "--stays", type=click.Choice(["admissions", "visits"]), help="Which visits are stays.  [default: admissions]"
)
@click.option("--planned", multiple=True, metavar="CODE", help="Of admissions that are no readmission; repeatable.")
@click.option("--seed", type=int, help="Of one-visit.  [default: 0]")
@click.option("--data", type=PATH, help="Prepared records of this same SOURCE: read it as they were.")
@prepare_option("format", "Layout of SOURCE, as for prepare.", type=click.Choice(get_args(RecordFormat)))
@prepare_option("birth_code", "Code of a birth, or what it begins with before `//`.")
@prepare_option("death_code", "Code of a death, likewise.")
@prepare_option("admission_code", "Code of an admission.")
@prepare_option("discharge_code", "Code of a discharge; goes with --admission-code.")
@prepare_option("visit_gap_hours", "Without a visit id, a longer pause begins a new visit.", type=float)
@click.option("--column", multiple=True, metavar="NAME=MEDS", help="Rename a column, e.g. value=numeric_value.")
@click.option("--labs", is_flag=True, default=None, help="mimic4: read labevents too.")
@click.option("--measurements", is_flag=True, default=None, help="omop: read the table measurement too.")
@click.option("--observations", is_flag=True, default=None, help="omop: read the table observation too.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@json_option
def labels(
    task: str,
    source: Path,
    out: Path,
    code_sets: Path | None,
    names: tuple[str, ...],
    data: Path | None,
    overwrite: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Label the patients of SOURCE for a clinical task; docs/tasks.md has the rules."""
    chosen = {name: value for name, value in flags.items() if value is not None and value != ()}
    reading = {name: chosen.pop(name) for name in list(chosen) if name in PrepareOptions.model_fields}
    if data is not None and reading:
        flag = next(iter(reading)).replace("_", "-")
        raise UserError(f"--{flag}: has no effect with --data, whose records were made with their own; leave it out")
    if names and code_sets is None:
        raise UserError("--code-set: names a set of a file; give that with --code-sets")

    from behrt.console import ProgressBar, labels_table
    from behrt.sequences import read_info
    from behrt.tasks.building import OPTIONS, Task, label_source
    from behrt.tasks.codesets import read_code_sets
    from behrt.terminal import stderr_console

    sets = None if code_sets is None else read_code_sets(code_sets)
    if sets is not None and names:
        sets = sets.only(names, str(code_sets))
    info: dict[str, Any] = {} if data is None else read_info(data)
    options = PrepareOptions(**(info["options"] if info else reading))
    asked = Task(task, OPTIONS[task](**chosen), sets)
    console = stderr_console()
    bar = ProgressBar(console)
    try:
        found = label_source(
            source, out, asked, options, prepared_from=info.get("source"), overwrite=overwrite, progress=bar.show
        )
    finally:
        bar.clear()
    console.print(labels_table(found))
    console.print(f"Labels in {out}", markup=False)
    if as_json:
        click.echo(json.dumps({"out": str(out), **found}))
