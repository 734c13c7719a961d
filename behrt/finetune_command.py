"""How does a person fine-tune a run for a task, and get a vector of each patient?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from behrt.config import EXPERIMENT_NAME, FinetuneSettings, UserError
from behrt.imports import first_import
from behrt.options import PATH, given, json_option, options, setting, training_options
from behrt.train_command import attempt_of, carry_out, name_of

mode_options = options(
    setting("dropout", "Dropout of encoder and head.  [default: the run's]", type=float),
    click.option(
        "--use-lora/--no-use-lora",
        "use_lora",
        default=None,
        help="Train adapters and head; without, everything.  [default: yes; --from-scratch: no]",
    ),
    setting("lora_rank", "Rank of the adapters.", type=int),
    setting("lora_alpha", "Adapters are scaled by alpha / rank.  [default: twice the rank]", type=float),
    setting("lora_dropout", "Dropout on the adapters' inputs.", type=float),
    setting("lora_targets", "Wrapped layers, comma-separated; also `feedforward`."),
    click.option(
        "--freeze-base/--no-freeze-base",
        "freeze_base",
        default=None,
        help="Freeze the encoder's own weights; with --no-use-lora, train the head alone.  [default: with LoRA, yes]",
    ),
    click.option(
        "--train-embeddings/--no-train-embeddings",
        "train_embeddings",
        default=None,
        help="Train the embeddings.  [default: only with everything]",
    ),
)


@click.command()
@click.option("--from", "run", metavar="RUN", help="Pre-trained run: its folder or its MLflow run id.")
@click.option("--task", metavar="NAME", help="What to call the task; the labels say what it is.")
@click.option("--labels", type=PATH, help="Label file (`behrt labels`, or any in MEDS LabelSchema).")
@click.option("--data", type=PATH, help="Prepared records of the labelled patients.")
@click.option("--gap", type=float, default=None, help="Hide the last days before each prediction.  [default: 0]")
@click.option(
    "--class-weights",
    type=click.Choice(["none", "balanced"]),
    default=None,
    help="Weigh true and false labels so that both count alike; probabilities are put right.  [default: none]",
)
@click.option("--max-labels", type=int, default=None, help="Use only so many training labels, by --seed.")
@click.option(
    "--head-start",
    type=click.Choice(["probe", "prevalence"]),
    default=None,
    help="Begin at the best linear probe of the encoder, or at the share of true labels.  "
    "[default: probe; --from-scratch: prevalence]",
)
@click.option("--from-scratch", is_flag=True, help="A random encoder of the run's shape instead of its weights.")
@mode_options
@training_options
@click.option("--experiment", default=None, help="Name of the folder under experiments/ and in MLflow.")
@click.option("--out", type=PATH, default=None, help="Another folder than experiments/NAME.")
@click.option("--force", is_flag=True, help="Train even if the pre-flight finds that the run cannot learn.")
@click.option(
    "--resume",
    metavar="RUN",
    default=None,
    help="Go on with a fine-tuning that was cut off: its folder, or its MLflow run id.",
)
@json_option
def finetune(
    run: str | None,
    task: str | None,
    labels: Path | None,
    data: Path | None,
    gap: float | None,
    class_weights: str | None,
    max_labels: int | None,
    head_start: str | None,
    from_scratch: bool,
    experiment: str | None,
    out: Path | None,
    force: bool,
    resume: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Teach a pre-trained run to predict a task: adapters and a head, on labels of prepared records.

    A new one needs --from, --task, --labels and --data. With --resume, the run goes on with the settings that it was
    begun with; what else is given must agree with them.
    """
    of_task = given({"gap": gap, "class_weights": class_weights, "max_labels": max_labels, "head_start": head_start})
    if from_scratch:
        of_task["from_scratch"] = True
    needed = {"--from": run, "--task": task, "--labels": labels, "--data": data}
    if resume is None and (missing := [flag for flag, value in needed.items() if value is None]):
        raise UserError(f"{missing[0]}: is missing; a fine-tuning needs {', '.join(needed)}, or --resume")
    attempt = None
    with first_import("torch"):
        from behrt.finetune import finetune as recipe
        from behrt.finetune_settings import finetune_settings, settings_to_go_on

    if resume is None:
        assert run is not None and task is not None and labels is not None and data is not None  # noqa: PT018
        settings = finetune_settings(task=task, labels=labels, run=run, data=data, flags=given(flags), **of_task)
        name = experiment or (out.name if out is not None else f"behrt_{settings.model.model_size}_{task}")
        folder = out or Path("experiments") / name
    else:
        attempt = attempt_of(resume, out=out, kind=FinetuneSettings, experiment=experiment)
        of_task |= given({"from_run": run, "task": task, "labels": None if labels is None else str(labels)})
        on_top = given({**flags, "data": None if data is None else str(data)})
        settings = settings_to_go_on(attempt.settings, on_top, **of_task)
        name, folder = name_of(attempt), attempt.folder
    if settings.training.recover:
        raise UserError("--recover: is for pre-training; a fine-tuning is short: leave it out")
    if flags.get("mlm_probability") is not None:
        raise UserError("--mlm-probability: is for pre-training, where codes are guessed; leave it out")
    if settings.training.compile:
        raise UserError("--compile: is for long pre-trainings; leave it out")
    if not EXPERIMENT_NAME.fullmatch(name):
        raise UserError(f"--experiment: {name!r} is no folder name; use letters, digits, '.', '_' and '-'")

    carry_out(recipe, settings, name, folder, attempt, command="finetune", force=force, as_json=as_json)


@click.command()
@click.argument("run")
@click.option("--data", type=PATH, required=True, help="Prepared records of the patients.")
@click.option("--out", type=PATH, required=True, help="Parquet file to write.")
@click.option("--labels", type=PATH, help="Label file whose prediction times count.  [default: the end of each record]")
@click.option(
    "--gap", type=float, help="Hide the last days before each prediction.  [default: that of a fine-tuned run, else 0]"
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    type=click.Choice(["train", "tuning", "held_out"]),
    help="Only these patients; repeatable.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@json_option
def embed(
    run: str,
    data: Path,
    out: Path,
    labels: Path | None,
    gap: float | None,
    splits: tuple[str, ...],
    device: Any,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a vector of each patient at each prediction time, from any run, as a table."""
    if out.exists() and not overwrite:
        raise UserError(f"--out: {out}: is there already; name another file, or add --overwrite")
    if gap and labels is None:
        raise UserError("--gap: hides days before a prediction time; give these with --labels")
    with first_import("torch"):
        from behrt.devices import choose_device
        from behrt.embed import write_embeddings

    if labels is None:
        click.echo(
            "Without --labels each vector sees its whole record, with the outcomes in it: not for predicting these",
            err=True,
        )
    about = write_embeddings(run, data, out, labels=labels, gap=gap, splits=splits, device=choose_device(device))
    click.echo(f"{about['rows']:,} vectors of {about['width']} numbers in {out}", err=True)
    if as_json:
        click.echo(json.dumps({"out": str(out), **about}))
