"""What do pruning and a good sampler save, does a study survive its workers, and what does a trial cost?

`studies` runs `sweeps/regularization.yaml` at small scale with and without pruning, and with random search, over five
seeds; `kills` kills workers of a study at random moments; `overhead` times a thousand trials that train next to
nothing; `report` writes the second half of `docs/sweeps.md` and its figure. Results are kept in `results.json` beside
this file as soon as they are there, and a second call goes on where the first stopped.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import click
import yaml

from behrt.history import read_run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
RUNS = HERE / "runs"
PAGE = ROOT / "docs" / "sweeps.md"
HEADING = "## What was measured"

SWEEP = ROOT / "sweeps" / "regularization.yaml"
SMALL_SCALE = {"num_patients": 500, "batch_size": 16}
"""Laid over the settings of the sweep: 400 patients to train on, in 25 steps an epoch."""
SEEDS = range(5)
TRIALS = 40
EPOCHS_FOR_SEARCH = 350
"""All trials of a pruned study together; about half of what 40 trials take that are not pruned."""

KILLS = 10
KILLED_TRIALS = 12
DUMMY_TRIALS = 1000


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to search; what is not named here stands in the sweep file."""

    sampler: str
    pruner: str
    budget: dict[str, int]


UNPRUNED = "tpe, nothing pruned"
ARMS = {
    "tpe": Arm(sampler="tpe", pruner="auto", budget={"trials": 1000, "total_epochs": EPOCHS_FOR_SEARCH}),
    "random": Arm(sampler="random", pruner="auto", budget={"trials": 1000, "total_epochs": EPOCHS_FOR_SEARCH}),
    UNPRUNED: Arm(sampler="tpe", pruner="none", budget={"trials": TRIALS}),
}


def load_results() -> dict[str, Any]:
    empty: dict[str, Any] = {"studies": [], "kills": None, "overhead": None}
    return {**empty, **json.loads(RESULTS.read_text())} if RESULTS.exists() else empty


def save_results(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "behrt", *words]


def environment() -> dict[str, str]:
    """One thread a worker, and this checkout, whatever is installed."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def behrt(*words: str, folder: Path = ROOT) -> Any:
    """What a command prints as JSON."""
    done = subprocess.run(
        command(*words, "--json"), cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(done.stderr)
    return json.loads(done.stdout)


def write_sweep(path: Path, settings: dict[str, Any], **changes: Any) -> Path:
    """The sweep with other settings laid over its own, and other parts in place of its own."""
    content = yaml.safe_load(SWEEP.read_text())
    base = ROOT / "experiments" / content["base"] / "experiment.yaml"
    content |= {"base": str(base), "settings": {**content["settings"], **settings}, **changes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


@click.group()
def cli() -> None:
    """Measure sweeps."""


# What is found, for how many epochs


@cli.command()
@click.option("--workers", default=2, show_default=True, help="Studies at a time, each on one core.")
def studies(workers: int) -> None:
    """Run all studies that are not among the results yet, seed by seed."""
    done = {(row["arm"], row["seed"]) for row in load_results()["studies"]}
    todo = [(arm, seed) for seed, arm in product(SEEDS, ARMS) if (arm, seed) not in done]
    with ThreadPoolExecutor(workers) as pool:
        for future in as_completed([pool.submit(run_study, arm, seed) for arm, seed in todo]):
            results = load_results()
            results["studies"] = sorted(
                [*results["studies"], future.result()], key=lambda row: (list(ARMS).index(row["arm"]), row["seed"])
            )
            save_results(results)
            click.echo(f"{len(results['studies'])} studies", err=True)


def run_study(name: str, seed: int) -> dict[str, Any]:
    """One study with one worker, so that it comes out the same each time; its trials, in the order of their ends."""
    arm = ARMS[name]
    file = write_sweep(
        RUNS / f"{arm.sampler}-{arm.pruner}-seed{seed}.yaml",
        SMALL_SCALE,
        sampler=arm.sampler,
        pruner=arm.pruner,
        budget=arm.budget,
        seed=seed,
    )
    told = behrt("sweep", "run", str(file), "--storage", f"sqlite:///{RUNS / 'studies.db'}")
    trials = [{key: trial[key] for key in ("number", "state", "epochs", "value")} for trial in told["trials"]]
    return {"arm": name, "seed": seed, "trials": trials}


# What becomes of a study whose workers are killed


@cli.command()
def kills() -> None:
    """Kill one of two workers ten times, each time in the middle of a trial, and count what is left."""
    folder = RUNS / "kills"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    short = {"num_patients": 300, "epochs": 15, "early_stopping_patience": 0}
    file = write_sweep(folder / "killed.yaml", short, sampler="tpe", pruner="none", budget={"trials": KILLED_TRIALS})
    moments = random.Random(0)
    with subprocess.Popen(command("sweep", "run", file.name, "--workers", "2"), cwd=folder, env=environment()) as run:
        killed = 0
        while killed < KILLS and run.poll() is None:
            time.sleep(moments.uniform(1, 12))
            workers, trials = children_of(run.pid), trials_of(folder, "killed")
            if len(workers) == 2 and sum(trial.state.name == "RUNNING" for trial in trials) == 2:
                os.kill(moments.choice(workers), signal.SIGKILL)
                killed += 1
                click.echo(f"{killed} killed", err=True)
        code = run.wait()
    results = load_results()
    results["kills"] = {"kills": killed, "exit_code": code, "asked": KILLED_TRIALS, **left_of(folder, "killed")}
    save_results(results)
    click.echo(json.dumps(results["kills"], indent=1), err=True)


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def trials_of(folder: Path, study: str) -> list[Any]:
    """The trials, through Optuna alone; none before the first worker starts (its tables may be half made till then)."""
    import optuna

    if not (folder / "sweeps" / study / "workers").exists():
        return []
    return list(optuna.load_study(study_name=study, storage=f"sqlite:///{folder}/sweeps/studies.db").get_trials())


def left_of(folder: Path, study: str) -> dict[str, Any]:
    """What Optuna and MLflow hold of a study that has ended, each counted by itself, and where the two differ."""
    from mlflow import MlflowClient

    trials = trials_of(folder, study)
    retried = [trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs]
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name(study)
    runs = [
        run
        for run in client.search_runs([experiment.experiment_id], max_results=10_000)
        if "trial_number" in run.data.params
    ]
    epochs = {
        int(run.data.params["trial_number"]): sorted(
            metric.step for metric in client.get_metric_history(run.info.run_id, "val_loss")
        )
        for run in runs
    }
    states = {trial.number: "FAILED" if trial.state.name == "FAIL" else trial.state.name for trial in trials}
    told = {int(run.data.params["trial_number"]): run.data.tags["trial_state"] for run in runs}
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    return {
        "optuna": dict(Counter(states.values())),
        "mlflow": dict(Counter(told.values())),
        "mlflow_status": dict(Counter(run.info.status for run in runs)),
        "lost": sum(trial.state.name == "FAIL" for trial in trials),
        "continued": len(retried),
        "continued_twice": len(retried) - len(set(retried)),
        "from_a_checkpoint": sum(bool(trial.user_attrs.get("continued_from")) for trial in trials),
        "differ": sum(states[number] != state for number, state in told.items()),
        "runs_without_trial": len(set(told) - set(states)) + len(runs) - len(told),
        "complete_without_run": sum(trial.number not in told for trial in complete),
        "epochs_missing_or_twice": sum(
            epochs.get(trial.number) != sorted(trial.intermediate_values) for trial in complete
        ),
    }


# What a trial costs beside its training


@cli.command()
def overhead() -> None:
    """Time a thousand trials of next to no training, and `behrt sweep status` after them; on an idle machine."""
    folder = RUNS / "overhead"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dummy = {"num_patients": 40, "epochs": 1, "early_stopping_patience": 0, "stop_on": "never"}
    dummy |= {"embedding_dim": 8, "hidden_dim": 32, "feedforward_dim": 32, "num_layers": 1, "num_heads": 1}
    file = write_sweep(folder / "dummy.yaml", dummy, sampler="tpe", pruner="auto", budget={"trials": DUMMY_TRIALS})
    behrt("sweep", "run", file.name, folder=folder)
    trials = trials_of(folder, "dummy")
    beyond = [
        (trial.datetime_complete - former.datetime_complete).total_seconds()
        - read_run(folder / trial.user_attrs["folder"])["last"]["epoch_seconds"]
        for former, trial in pairwise(trials)
    ]
    started = time.perf_counter()
    behrt("sweep", "status", "dummy", folder=folder)
    results = load_results()
    results["overhead"] = {
        "trials": len(trials),
        "median": round(statistics.median(beyond), 3),
        "largest_but_1_percent": round(statistics.quantiles(beyond, n=100)[-1], 3),
        "median_of_first_100": round(statistics.median(beyond[:100]), 3),
        "median_of_last_100": round(statistics.median(beyond[-100:]), 3),
        "status_seconds": round(time.perf_counter() - started, 2),
    }
    save_results(results)
    click.echo(json.dumps(results["overhead"], indent=1), err=True)


# The page


@cli.command()
def report() -> None:
    """Write the second half of docs/sweeps.md, and its figure, from the results."""
    results = load_results()
    draw_search(results["studies"], ROOT / "docs" / "sweeps_search.png")
    guide, _, _ = PAGE.read_text(encoding="utf-8").partition(HEADING)
    PAGE.write_text(guide + measured(results), encoding="utf-8")


def measured(results: dict[str, Any]) -> str:
    """The part of the page that tells what was measured."""
    patients, batch_size = SMALL_SCALE["num_patients"], SMALL_SCALE["batch_size"]
    return f"""{HEADING}

By `python experiments/sweeps/measure.py studies`, `kills`, `overhead` and `report`; the numbers are kept in
`experiments/sweeps/results.json`.

### Pruning saves half of the epochs, and TPE is ahead of random search

`regularization.yaml` at small scale: {patients} simulated patients, batches of {batch_size}, all else as shipped.
One worker a study, so that it comes out the same each time. Three ways to search, each with the seeds
{", ".join(map(str, SEEDS))}: TPE with nothing pruned, {TRIALS} trials; TPE and random search, both pruned (hyperband),
for {EPOCHS_FOR_SEARCH} epochs over all trials. The trial that runs when these are reached is finished, and counts.

The pruned study when it had used **half of the epochs** of the unpruned one of the same seed:

{pruning_table(results["studies"])}

TPE against random search after **equal epochs**, both pruned:

{sampler_table(results["studies"])}

![Best val_loss so far, by the epochs of all trials](sweeps_search.png)

### Workers may die

{after_the_kills(results["kills"])}

### What a trial costs beside its training

{beside_the_training(results["overhead"])}
"""


def after_the_kills(found: dict[str, Any]) -> str:
    optuna, mlflow = (
        ", ".join(f"{count} {state}" for state, count in sorted(found[store].items())) for store in ("optuna", "mlflow")
    )
    return f"""One of two workers was killed (`kill -9`) in the middle of a trial, {found["kills"]} times at random
moments, in a study of {found["asked"]} trials. It ended with exit code {found["exit_code"]}.

| | |
|---|---|
| Optuna | {optuna} |
| MLflow | {mlflow}; a worker that dies before its trial's run is made leaves none |
| lost trials continued by another one | {found["continued"]} of {found["lost"]}, \
{found["from_a_checkpoint"]} of them from a checkpoint |
| continued twice | {found["continued_twice"]} |
| told differently by MLflow and Optuna | {found["differ"]} |
| runs without a trial, complete trials without a run | {found["runs_without_trial"]}, {found["complete_without_run"]} |
| complete trials with an epoch missing in MLflow, or told twice | {found["epochs_missing_or_twice"]} |"""


def beside_the_training(found: dict[str, Any]) -> str:
    return f"""{found["trials"]:,} trials of one epoch on next to no data, each with everything that a trial has:
pre-flight, diagnosis, checkpoint, MLflow run. From the end of one to the end of the next, less the epoch:

| | seconds |
|---|---|
| median | {found["median"]:.2f} |
| median of the first hundred, of the last | {found["median_of_first_100"]:.2f}, {found["median_of_last_100"]:.2f} |
| 99% are below | {found["largest_but_1_percent"]:.2f} |
| `behrt sweep status` with all of them in the storage, its start included | {found["status_seconds"]:.1f} |"""


def study_of(studies: list[dict[str, Any]], arm: str, seed: int) -> list[dict[str, Any]]:
    """The trials of a study, in the order in which its one worker trained them."""
    return next(row["trials"] for row in studies if (row["arm"], row["seed"]) == (arm, seed))


def best_by_epochs(trials: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """The best complete trial so far, by the epochs of all trials up to then; from the first complete one on."""
    epochs, best, found = 0, math.inf, []
    for trial in trials:
        epochs += trial["epochs"]
        if trial["state"] == "COMPLETE":
            best = min(best, trial["value"])
        if best < math.inf:
            found.append((epochs, best))
    return found


def best_within(trials: list[dict[str, Any]], epochs: float) -> float:
    return min((best for used, best in best_by_epochs(trials) if used <= epochs), default=math.inf)


def mean_and_spread(values: list[float], digits: int = 4) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def pruning_table(studies: list[dict[str, Any]]) -> str:
    lines = [
        "| seed | unpruned: epochs | best val_loss | pruned: half of the epochs | best val_loss | higher by "
        "| within 0.5% after |",
        "|---|---|---|---|---|---|---|",
    ]
    shares = []
    for seed in SEEDS:
        unpruned, pruned = (study_of(studies, arm, seed) for arm in (UNPRUNED, "tpe"))
        epochs, best = best_by_epochs(unpruned)[-1]
        half = epochs / 2
        reached = best_within(pruned, half)
        after = next((used for used, value in best_by_epochs(pruned) if value <= best * 1.005), None)
        share = "not reached" if after is None else f"{after} epochs ({after / epochs:.0%})"
        shares.append(reached / best - 1)
        lines.append(
            f"| {seed} | {epochs} | {best:.4f} | {half:.0f} | {reached:.4f} | {reached / best - 1:+.2%} | {share} |"
        )
    lines.append(
        f"| mean ± standard deviation | | | | | {statistics.mean(shares):+.2%} ± {statistics.stdev(shares):.2%} | |"
    )
    return "\n".join(lines)


def sampler_table(studies: list[dict[str, Any]]) -> str:
    lines = ["| seed | epochs | TPE | random | TPE lower by |", "|---|---|---|---|---|"]
    found = []
    for seed in SEEDS:
        tpe, random_search = (study_of(studies, arm, seed) for arm in ("tpe", "random"))
        epochs = min(best_by_epochs(trials)[-1][0] for trials in (tpe, random_search))
        found.append((best_within(tpe, epochs), best_within(random_search, epochs)))
        lines.append(
            f"| {seed} | {epochs} | {found[-1][0]:.4f} | {found[-1][1]:.4f} | {found[-1][1] - found[-1][0]:.4f} |"
        )
    tpe_values, random_values = (list(values) for values in zip(*found, strict=True))
    lower = [other - own for own, other in found]
    lines.append(
        f"| mean ± standard deviation | | {mean_and_spread(tpe_values)} | {mean_and_spread(random_values)} "
        f"| {mean_and_spread(lower)} |"
    )
    ahead, behind = (sum(sign * difference > 0 for difference in lower) for sign in (1, -1))
    lines.append("")
    lines.append(
        f"TPE is ahead for {ahead} of {len(lower)} seeds, behind for {behind}; the first ten trials are the same."
    )
    return "\n".join(lines)


def draw_search(studies: list[dict[str, Any]], path: Path) -> None:
    import pandas as pd
    import seaborn as sns

    from behrt.plots import saved_figure

    rows = []
    for row in studies:
        values = dict(best_by_epochs(row["trials"]))
        best: float | None = None
        for epoch in range(1, max(values) + 1):
            best = values.get(epoch, best)
            rows.append({"search": row["arm"], "seed": row["seed"], "epochs": epoch, "best": best})
    names = {"tpe": "TPE, pruned", "random": "random, pruned", UNPRUNED: "TPE, nothing pruned"}
    frame = pd.DataFrame(rows).dropna().replace({"search": names})
    complete = frame.groupby(["search", "epochs"])["seed"].transform("count") == len(SEEDS)
    with saved_figure(path, width=8.4) as figure:
        axes = figure.add_subplot()
        sns.lineplot(
            frame[complete],
            x="epochs",
            y="best",
            hue="search",
            hue_order=list(names.values()),
            errorbar=("pi", 100),
            ax=axes,
        )
        axes.set(
            xlabel="epochs of all trials together",
            ylabel="best val_loss so far",
            title=f"Mean and range over {len(SEEDS)} seeds",
        )
        lowest = frame["best"].min()
        axes.set_ylim(lowest - 0.01, lowest + 0.14)
        axes.legend(title=None, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


if __name__ == "__main__":
    cli()
