"""What are pre-trained models worth on clinical tasks, beside baselines and beside the best that is possible?

`simulated` pre-trains on 10,000 simulated patients, fine-tunes for the three outcomes whose ceiling is known, and
evaluates; `budgets` fine-tunes the same run, and random encoders, on 100 to 3,000 labels; `synpuf` goes from
pre-training to evaluation on SynPUF; `report` writes `docs/results.md` and its figure. Results are kept in
`results.json` beside this file as soon as they are there, and a second call goes on where the first stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click

from behrt.files import write_json, write_text
from behrt.tasks.assessment import METRICS, TITLES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = HERE / "runs"
RESULTS = HERE / "results.json"

PATIENTS = 10_000
OUTCOMES = ("disease", "readmission", "survival")
BUDGETS = (100, 300, 1_000, 3_000)
SEEDS = (0, 1, 2)
SHARE_AIM = 0.97
"""Of the ceiling's AUROC or C-index above 0.5."""

PRETRAINING = {"preset": "quick", "epochs": 24}
"""The recipe with which small models come soonest to 90% of the gap (docs/performance.md), a little longer."""
STARTS = {"pretrained": "LoRA on the pre-trained encoder", "scratch": "everything, from scratch"}

COHORT = Path("data/tasks-cohort")
COHORT_RECORDS = Path("data/tasks-simulated")
CONDITIONS = HERE / "chronic_conditions.yaml"
ACUTE = HERE / "acute_conditions.yaml"
SYNPUF_RECORDS = Path("data/tasks-synpuf")
SYNPUF_LABELS = {
    "readmission": (),
    "disease": ("--code-sets", str(CONDITIONS.relative_to(ROOT)), "--at", "last-visit", "--by", "2009-12-31"),
    "survival": (),
    "phenotyping": ("--code-sets", str(ACUTE.relative_to(ROOT)), "--hours", "24"),
}
"""Tasks on SynPUF, and what their labels are made with."""

EXPECTED = (
    ("Survival prediction", "C-index", "0.65-0.75", "survival"),
    ("Disease prediction", "AUROC", "0.75-0.85", "disease"),
    ("Readmission", "AUROC", "0.70-0.80", "readmission"),
    ("Phenotyping", "F1", "0.60-0.75", "phenotyping"),
)
"""The guide, Downstream Tasks (After Pre-training)."""


def load_results() -> dict[str, Any]:
    empty: dict[str, Any] = {"simulated": {}, "budgets": [], "synpuf": {}}
    return {**empty, **(json.loads(RESULTS.read_text()) if RESULTS.exists() else {})}


def save_results(**found: Any) -> None:
    write_json(RESULTS, {**load_results(), **found})


def behrt(*arguments: object, reports: bool = False) -> dict[str, Any]:
    """Runs a command as a user does; what it reports, with `reports`."""
    command = [str(argument) for argument in arguments] + (["--json"] if reports else [])
    click.echo("behrt " + " ".join(command), err=True)
    done = subprocess.run(
        [sys.executable, "-m", "behrt", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True
    )
    return dict(json.loads(done.stdout)) if reports else {}


def flags(settings: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        found += [flag] if value is True else [flag, str(value)]
    return found


def is_done(folder: Path) -> bool:
    run = folder / "run.json"
    return run.exists() and json.loads(run.read_text())["status"] == "FINISHED"


def pretrained(name: str, data: Path, settings: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder of a pre-training, done where it is not yet, and what it came to."""
    folder = RUNS / name
    if not is_done(folder):
        behrt("train", "--data", data, *flags(settings), "--out", folder)
    run = json.loads((folder / "run.json").read_text())
    kept = ("closed_gap", "best_val_loss", "best_val_accuracy", "best_epoch", "epochs", "seconds")
    return folder, {"settings": dict(settings), **{name: run[name] for name in kept}, **run["baselines"]}


def summary(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of an evaluation."""
    kept = ("kind", "rows", "patients", "training_rows", "prevalence", "headline", "metrics", "outcomes", "verdict")
    return {**{name: evaluation[name] for name in kept}, "ceiling": evaluation["ceiling"]}


def judged(base: Path, name: str, task: str, labels: Path, data: Path, settings: Sequence[str]) -> dict[str, Any]:
    """A task fine-tuned, where it is not yet, and evaluated."""
    folder = RUNS / name
    if not is_done(folder):
        behrt(
            "finetune", "--from", base, "--task", task, "--labels", labels, "--data", data, *settings, "--out", folder
        )
    return summary(behrt("evaluate", folder, reports=True))


@click.group()
def cli() -> None:
    """Measure fine-tuned models on clinical tasks."""
    os.chdir(ROOT)


def simulated_cohort() -> tuple[Path, dict[str, Any]]:
    if not COHORT.exists():
        behrt("simulate", "--patients", PATIENTS, "--out", COHORT)
    if not COHORT_RECORDS.exists():
        behrt("prepare", COHORT, "--out", COHORT_RECORDS)
    return pretrained("simulated", COHORT_RECORDS, PRETRAINING)


@cli.command()
@click.option("--task", "tasks", multiple=True, type=click.Choice(OUTCOMES), default=OUTCOMES, show_default=True)
def simulated(tasks: Sequence[str]) -> None:
    """Fine-tune and evaluate the outcomes whose ceiling is known."""
    base, about = simulated_cohort()
    for task in tasks:
        found = judged(base, f"simulated-{task}", task, COHORT / "labels" / f"{task}.parquet", COHORT_RECORDS, ())
        before = load_results()["simulated"].get("tasks", {})
        save_results(simulated={"pretraining": about, "tasks": {**before, task: found}})


@cli.command()
@click.option("--task", "tasks", multiple=True, type=click.Choice(OUTCOMES), default=("disease", "readmission"))
def budgets(tasks: Sequence[str]) -> None:
    """Fine-tune on few labels: the pre-trained encoder, and one of its shape from scratch."""
    from behrt.evaluate import evaluate
    from behrt.finetune import finetune
    from behrt.finetune_settings import finetune_settings

    base, _ = simulated_cohort()
    rows = load_results()["budgets"]
    done = {(row["task"], row["labels"], row["seed"], row["start"]) for row in rows}
    for seed, task, number, start in product(SEEDS, tasks, BUDGETS, STARTS):
        if (task, number, seed, start) in done:
            continue
        settings = finetune_settings(
            task=task,
            labels=COHORT / "labels" / f"{task}.parquet",
            run=str(base),
            data=COHORT_RECORDS,
            flags={"seed": seed},
            max_labels=number,
            from_scratch=start == "scratch",
        )
        folder = RUNS / f"{task}-{number}-{start}-{seed}"
        if not is_done(folder):
            finetune(settings, experiment="tasks-budgets", folder=folder)
        found = evaluate(folder, with_baselines=False, draws=10)
        metrics = found.assessment.metrics
        row = {"task": task, "labels": number, "seed": seed, "start": start, "metric": found.assessment.headline}
        row["value"] = metrics["behrt"][found.assessment.headline].value
        row["ceiling"] = None if found.ceiling is None else found.ceiling.expected
        row["expected"] = None if found.ceiling is None else found.ceiling.behrt_expected
        rows = [*load_results()["budgets"], row]
        save_results(budgets=rows)
        click.echo(json.dumps(row), err=True)


@cli.command()
@click.option("--source", type=click.Path(exists=True, path_type=Path), required=True, help="synpuf-meds.")
@click.option("--epochs", default=6, show_default=True, help="Of pre-training.")
@click.option("--max-labels", default=20_000, show_default=True, help="Training labels of each task.")
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(SYNPUF_LABELS)), default=tuple(SYNPUF_LABELS))
def synpuf(source: Path, epochs: int, max_labels: int, tasks: Sequence[str]) -> None:
    """All four tasks on SynPUF, from pre-training to evaluation."""
    if not SYNPUF_RECORDS.exists():
        behrt("prepare", source, "--static-codes", "keep", "--out", SYNPUF_RECORDS)
    base, about = pretrained("synpuf", SYNPUF_RECORDS, {**PRETRAINING, "epochs": epochs})
    for task in tasks:
        labels = RUNS / f"synpuf-{task}.parquet"
        if not labels.exists():
            behrt("labels", task, source, "--data", SYNPUF_RECORDS, *SYNPUF_LABELS[task], "--out", labels)
        settings = ("--max-labels", str(max_labels), "--epochs", "8", "--batch-size", "64")
        found = judged(base, f"synpuf-{task}", task, labels, SYNPUF_RECORDS, settings)
        before = load_results()["synpuf"].get("tasks", {})
        save_results(synpuf={"pretraining": about, "tasks": {**before, task: found}})


# The page


@cli.command()
def report() -> None:
    """Write docs/results.md and its figure from the results."""
    results = load_results()
    if results["budgets"]:
        draw_budgets(results["budgets"], ROOT / "docs" / "results_budgets.png")
    write_text(ROOT / "docs" / "results.md", page(results))


def page(results: Mapping[str, Any]) -> str:
    parts = [
        "# Results on clinical tasks",
        "Made by `python experiments/tasks/measure.py`: `simulated`, `budgets`, `synpuf --source DIR`, then `report`;\n"
        "the numbers are in `experiments/tasks/results.json`. Intervals are 95%, over patients.\n"
        "[tasks.md](tasks.md) says what labels, baselines and metrics are.",
    ]
    if results["simulated"]:
        parts += ["## Simulated cohort: how much of what is possible", *simulated_parts(results["simulated"])]
    if results["budgets"]:
        parts += ["## Few labels", *budget_parts(results["budgets"])]
    if results["synpuf"]:
        parts += ["## SynPUF", *synpuf_parts(results["synpuf"])]
    parts += ["## What the guide expects", expectation_table(results)]
    return "\n\n".join(parts) + "\n"


def pretraining_sentence(about: Mapping[str, Any]) -> str:
    gap = (
        ""
        if about["closed_gap"] is None
        else f", {about['closed_gap']:.1%} of the gap between unigram and floor closed"
    )
    return (
        f"Pre-training: `behrt train {' '.join(flags(about['settings']))}`; best validation loss "
        f"{about['best_val_loss']:.3f} (unigram {about['unigram_loss']:.3f}){gap}, epoch {about['best_epoch']} of "
        f"{about['epochs']}, {about['seconds'] / 60:.0f} minutes."
    )


def interval(estimate: Mapping[str, Any]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def headline_table(tasks: Mapping[str, Any]) -> str:
    predictors = list(dict.fromkeys(name for task in tasks.values() for name in task["metrics"]))
    lines = [
        f"| task | held out: predictions (patients) | metric | {' | '.join(TITLES[name] for name in predictors)} |"
    ]
    lines.append("|---" * (len(predictors) + 3) + "|")
    for name, task in tasks.items():
        headline = task["headline"]
        cells = [interval(task["metrics"][each][headline]) if each in task["metrics"] else "" for each in predictors]
        lines.append(
            f"| {name} | {task['rows']:,} ({task['patients']:,}) | {METRICS[headline]} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def verdicts(tasks: Mapping[str, Any]) -> str:
    return "\n".join(f"- {sentence}" for task in tasks.values() for sentence in task["verdict"])


def simulated_parts(found: Mapping[str, Any]) -> list[str]:
    tasks = found["tasks"]
    lines = ["| task | ceiling, expected | BEHRT, expected | share above 0.5 | aim |", "|---|---|---|---|---|"]
    for name, task in tasks.items():
        known = task["ceiling"]
        reached = "reached" if known["share_expected"] >= SHARE_AIM else "not reached"
        lines.append(
            f"| {name} | {known['expected']:.3f} | {known['behrt_expected']:.3f} | **{known['share_expected']:.1%}** "
            f"| {SHARE_AIM:.0%}: {reached} |"
        )
    return [
        f"{PATIENTS:,} patients. " + pretraining_sentence(found["pretraining"]),
        "`behrt finetune --from RUN --task NAME` with its defaults, then `behrt evaluate`. Expected values are over\n"
        "repeated draws of the outcomes of the held-out patients, so that luck with the draw plays no part.",
        "\n".join(lines),
        headline_table(tasks),
        verdicts(tasks),
    ]


def budget_parts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"| task | training labels | {' | '.join(STARTS.values())} | difference |", "|---|---|---|---|---|"]
    for task, number in dict.fromkeys((row["task"], row["labels"]) for row in in_order(rows)):
        values = {
            start: [
                row["expected"] or row["value"]
                for row in rows
                if (row["task"], row["labels"], row["start"]) == (task, number, start)
            ]
            for start in STARTS
        }
        if not all(values.values()):
            continue
        cells = [f"{statistics.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})" for own in values.values()]
        gained = statistics.mean(values["pretrained"]) - statistics.mean(values["scratch"])
        lines.append(f"| {task} | {number:,} | {' | '.join(cells)} | {gained:+.3f} |")
    return [
        "Expected AUROC on the held-out patients; mean, least and most over seeds "
        f"{', '.join(str(seed) for seed in sorted({row['seed'] for row in rows}))},\n"
        "which draw the labels, the head and the order. Tuning labels, by which a training stops, are all there in\n"
        "each case.",
        "\n".join(lines),
        "![AUROC by number of labels](results_budgets.png)",
    ]


def in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: (row["task"], row["labels"], row["seed"], row["start"]))


def synpuf_parts(found: Mapping[str, Any]) -> list[str]:
    tasks = found["tasks"]
    commands = "\n".join(
        " ".join(["behrt labels", task, "synpuf-meds --data RECORDS", *SYNPUF_LABELS[task], f"--out {task}.parquet"])
        for task in tasks
    )
    return [
        pretraining_sentence(found["pretraining"]),
        f"```bash\n{commands}\n```",
        headline_table(tasks),
        verdicts(tasks),
        "SynPUF is synthetic: its codes were perturbed, so that relations between them are weaker than in claims of\n"
        "real patients (CMS, 2013, DE-SynPUF Data Users Document). Weak figures here are those of the records.",
    ]


def expectation_table(results: Mapping[str, Any]) -> str:
    """The guide's downstream expectations beside what was measured."""
    lines = ["| task | metric | guide expects | simulated (ceiling) | SynPUF |", "|---|---|---|---|---|"]
    for title, metric, expected, task in EXPECTED:
        own = results["simulated"].get("tasks", {}).get(task)
        theirs = results["synpuf"].get("tasks", {}).get(task)
        here = "" if own is None else f"{figure(own, metric)} ({own['ceiling']['expected']:.3f})"
        there = "" if theirs is None else figure(theirs, metric)
        lines.append(f"| {title} | {metric} | {expected} | {here} | {there} |")
    return "\n".join(lines)


def figure(task: Mapping[str, Any], metric: str) -> str:
    metrics = task["metrics"]["behrt"]
    if metric == "F1":
        return f"micro {metrics['f1_micro']['value']:.3f}, macro {metrics['f1_macro']['value']:.3f}"
    return f"{metrics[task['headline']]['value']:.3f}"


def draw_budgets(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pandas as pd
    import seaborn as sns

    from behrt.plots import saved_figure

    frame = pd.DataFrame(
        {**row, "AUROC": row["expected"] or row["value"], "trained": STARTS[row["start"]]} for row in in_order(rows)
    )
    tasks = list(dict.fromkeys(frame["task"]))
    with saved_figure(path, width=4.6 * len(tasks), height=4.0) as drawn:
        grid = drawn.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(grid, tasks, strict=True):
            own = frame[frame["task"] == task]
            sns.lineplot(
                own, x="labels", y="AUROC", hue="trained", hue_order=list(STARTS.values()), marker="o",
                errorbar=("pi", 100), ax=axes,
            )  # fmt: skip
            axes.axhline(own["ceiling"].iloc[0], color="0.4", linewidth=1, label="ceiling")
            axes.set(title=task, xscale="log", xlabel="training labels", ylabel="expected AUROC")
            axes.set_xticks(BUDGETS, [f"{number:,}" for number in BUDGETS])
            axes.minorticks_off()
            handles, names = axes.get_legend_handles_labels()
            axes.get_legend().remove()
        drawn.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)


if __name__ == "__main__":
    cli()
