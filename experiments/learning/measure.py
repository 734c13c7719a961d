"""How much of what can be learned is learned: by full training, on random codes, and by LoRA on a random base?

`runs` trains the experiments `full_training` and `random_codes`, one after the other on all cores; `grid` trains LoRA
and everything over three learning rates and three seeds, a core each; `report` writes `docs/learning.md` and its
figures. Results are kept in `results.json` beside this file as soon as they are there, and a second call goes on where
the first stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click

from behrt.config import ExperimentSettings, load_experiment
from behrt.history import read_run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"

SINGLE_RUNS = ("full_training", "random_codes")
ADAPTATIONS = {"full": {"use_lora": False}, "lora": {"use_lora": True, "lora_rank": 16}}
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
COMMON = {"model_size": "small", "dropout": 0.0, "batch_size": 32, "epochs": 10, "early_stopping_patience": 0}


def load_results() -> dict[str, Any]:
    empty: dict[str, Any] = {"runs": {}, "grid": []}
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else empty


def save_results(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def row_of(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself, as a row of the results."""
    run = read_run(folder)
    return {
        "closed_gap": run["closed_gap"],
        "val_loss": run["best_val_loss"],
        "val_accuracy": run["best_val_accuracy"],
        "val_loss_at_mask": loss_at_mask(settings_of(run), folder),
        "best_epoch": run["best_epoch"],
        "epochs": run["epochs"],
        "seconds": run["seconds"],
        "trainable_percent": round(run["parameters"]["trainable_percent"], 1),
        **run["baselines"],
    }


def settings_of(run: dict[str, Any]) -> ExperimentSettings:
    return ExperimentSettings.model_validate(run["settings"])


def is_finished(folder: Path, settings: ExperimentSettings) -> bool:
    """Whether the folder holds a finished run of exactly these settings."""
    if not (folder / "run.json").exists():
        return False
    run = read_run(folder)
    return run["status"] == "FINISHED" and settings_of(run) == settings.model_copy(update={"note": ""})


def loss_at_mask(settings: ExperimentSettings, folder: Path) -> float:
    """Validation loss of the best checkpoint over the scored tokens that are shown as `[MASK]`."""
    import torch

    from behrt.pretrain import masked_lm_loss
    from behrt.records import open_records, select_records
    from behrt.runs import load_run
    from behrt.vocabulary import MASK

    records = select_records(open_records(settings.data), settings)
    whole = records.validation
    masked = replace(whole, scored=whole.scored & (whole.shown == MASK))
    model, loss = load_run(folder).model, 0.0
    with torch.inference_mode():
        for batch in masked.packed(100, records.row_length):
            loss += masked_lm_loss(model, batch).loss.item()
    return loss / int(masked.scored.sum())


def train_in_grid(adaptation: str, lr: float, seed: int) -> dict[str, Any]:
    import torch

    from behrt.pretrain import pretrain

    torch.set_num_threads(1)
    os.chdir(ROOT)
    folder = HERE / "runs" / f"{adaptation}-lr{lr:g}-seed{seed}"
    settings = load_experiment(flags={**COMMON, **ADAPTATIONS[adaptation], "lr": lr, "seed": seed, "stop_on": "never"})
    started = time.process_time()
    pretrain(settings, experiment="learning", folder=folder)
    cpu_seconds = round(time.process_time() - started, 1)
    return {"adaptation": adaptation, "lr": lr, "seed": seed, "cpu_seconds": cpu_seconds, **row_of(folder)}


@click.group()
def cli() -> None:
    """Measure what is learned on the simulated cohort."""


@cli.command()
def runs() -> None:
    """Train `full_training` and `random_codes`, all cores each, unless their folders hold finished runs."""
    from behrt.pretrain import pretrain

    os.chdir(ROOT)
    for name in SINGLE_RUNS:
        folder = ROOT / "experiments" / name
        settings = load_experiment(folder / "experiment.yaml")
        if not is_finished(folder, settings):
            pretrain(settings, experiment=name, folder=folder, force=True)  # random codes too
        results = load_results()
        results["runs"][name] = row_of(folder)
        save_results(results)
        shutil.copy(folder / "plots" / "loss_curve.png", ROOT / "docs" / f"{name}_loss.png")


@cli.command()
@click.option("--workers", default=2, show_default=True, help="Runs at a time, each on one core.")
def grid(workers: int) -> None:
    """Train LoRA and everything over learning rates and seeds."""
    done = {(row["adaptation"], row["lr"], row["seed"]) for row in load_results()["grid"]}
    todo = [key for key in product(ADAPTATIONS, LEARNING_RATES, SEEDS) if key not in done]
    # seed by seed, the middle learning rate first: a measurement that is stopped leaves the most telling part
    todo.sort(key=lambda key: (key[2], key[1] != LEARNING_RATES[1]))
    with ProcessPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(train_in_grid, *key) for key in todo]):
            results = load_results()
            results["grid"] = sorted(
                [*results["grid"], future.result()], key=lambda row: (row["adaptation"], row["lr"], row["seed"])
            )
            save_results(results)
            click.echo(f"{len(results['grid'])} runs", err=True)


@cli.command()
def report() -> None:
    """Write docs/learning.md and its figure from the results."""
    results = load_results()
    draw_grid(results["grid"], ROOT / "docs" / "lora_or_full.png")
    (ROOT / "docs" / "learning.md").write_text(page(results), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    full, random = (results["runs"][name] for name in SINGLE_RUNS)
    return f"""# What is learned

Every figure on this page comes from `python experiments/learning/measure.py runs`, then `grid`, then `report`; the
numbers are kept in `experiments/learning/results.json`. The cohort has 5,000 simulated patients, 4,000 to train on and
500 to validate; its floor is exact on the validation masks. Times depend on the machine: read their ratios.

## Full training closes most of the gap

`behrt train experiments/full_training/experiment.yaml`: the small model, everything trained.

| | loss | accuracy |
|---|---|---|
| chance | {full["chance_loss"]:.3f} | |
| unigram | {full["unigram_loss"]:.3f} | {full["unigram_accuracy"]:.3f} |
| trained, best epoch {full["best_epoch"]} of {full["epochs"]} | {full["val_loss"]:.3f} | {full["val_accuracy"]:.3f} |
| floor | {full["floor_loss"]:.3f} | {full["floor_accuracy"]:.3f} |

**{full["closed_gap"]:.1%} of the gap** between unigram and floor is closed, in {full["seconds"] / 60:.1f} minutes on
two cores.

![Loss of full training](full_training_loss.png)

## Random codes teach nothing but the corruption

`behrt train experiments/random_codes/experiment.yaml`: the same patients with codes drawn uniformly.

| | where `[MASK]` is shown | all scored tokens |
|---|---|---|
| floor | {random["floor_masked_loss"]:.4f} = ln(number of codes) | {random["floor_loss"]:.4f} |
| trained, best epoch {random["best_epoch"]} of {random["epochs"]} | {random["val_loss_at_mask"]:.4f} \
| {random["val_loss"]:.4f} |
| unigram | | {random["unigram_loss"]:.4f} |

Where `[MASK]` is shown, the best epoch is {random["val_loss_at_mask"] - random["floor_masked_loss"]:+.3f} nats from
ln(number of codes); over all scored tokens {random["val_loss"] - random["floor_masked_loss"]:+.3f}. The floor over all
scored tokens lies below ln(number of codes): a fifth of them show a code, which is the truth half of the time, and a
model that learns to copy is rewarded for it. Nothing else can be learned from these records.

![Loss on random codes](random_codes_loss.png)

## LoRA on a random base, or everything?

Small model, rank 16 on query, key, value and output, embeddings and head trained; {COMMON["epochs"]} epochs of batches
of {COMMON["batch_size"]} patients, no dropout. Closed gap: mean over seeds {", ".join(map(str, SEEDS))}, lowest and
highest in brackets. CPU time: mean of a run on one core, relative to full training at the same learning rate.

{grid_table(results["grid"])}

![Closed gap by learning rate](lora_or_full.png)

{finding(results["grid"])}
"""


def by_cell(
    rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]
) -> dict[tuple[str, float], list[float]]:
    cells: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        cells.setdefault((row["adaptation"], row["lr"]), []).append(value(row))
    return cells


def grid_table(rows: list[dict[str, Any]]) -> str:
    gaps = by_cell(rows, lambda row: row["closed_gap"])
    seconds = by_cell(rows, lambda row: row["cpu_seconds"])
    trainable = by_cell(rows, lambda row: row["trainable_percent"])
    lines = ["| trained | learning rate | runs | closed gap | CPU time | trainable |", "|---|---|---|---|---|---|"]
    for (adaptation, lr), values in gaps.items():
        relative = statistics.mean(seconds[adaptation, lr]) / statistics.mean(seconds["full", lr])
        lines.append(
            f"| {'LoRA on a random base' if adaptation == 'lora' else 'everything'} | {lr:g} | {len(values)} "
            f"| {statistics.mean(values):.1%} ({min(values):.1%} to {max(values):.1%}) | {relative:.2f} "
            f"| {trainable[adaptation, lr][0]:.1f}% |"
        )
    return "\n".join(lines)


def finding(rows: list[dict[str, Any]]) -> str:
    gaps = {cell: statistics.mean(values) for cell, values in by_cell(rows, lambda row: row["closed_gap"]).items()}
    best = {
        adaptation: max((lr for name, lr in gaps if name == adaptation), key=lambda lr: gaps[adaptation, lr])
        for adaptation in ADAPTATIONS
    }
    full, lora = (gaps[name, best[name]] for name in ("full", "lora"))
    winner = "full training" if full > lora else "LoRA"
    return (
        f"At its best learning rate of these ({best['full']:g}), training everything closes {full:.1%} of the gap;\n"
        f"LoRA on a random base ({best['lora']:g}) closes {lora:.1%}. That is {abs(full - lora) * 100:.1f} percentage\n"
        f"points in favour of {winner} within this budget."
    )


def draw_grid(rows: list[dict[str, Any]], path: Path) -> None:
    import pandas as pd
    import seaborn as sns
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = {"lora": "LoRA on a random base", "full": "everything trained"}
    frame = pd.DataFrame(rows).assign(trained=lambda frame: frame["adaptation"].map(names))
    with sns.axes_style("whitegrid"):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        sns.pointplot(
            frame, x="lr", y="closed_gap", hue="trained", errorbar=("pi", 100), dodge=0.2, capsize=0.1, ax=axes
        )
        axes.set(xlabel="learning rate", ylabel="closed share of the gap", title="Mean and range over three seeds")
        axes.legend(title=None, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        figure.savefig(path)


if __name__ == "__main__":
    cli()
