"""Sweep files whose trials take a second, and what plain Optuna and MLflow say of the studies that they became."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import optuna
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from behrt.cli import main

from .empty_stores import lay_store

SPACE = {
    "dropout": {"type": "float", "low": 0.0, "high": 0.5},
    "lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
}
"""Two parameters: the figure of every pair of them is drawn at the end of every command, and four are twelve pairs."""

WIDE_SPACE = {
    "dropout": SPACE["dropout"],
    "weight_decay": {"type": "float", "low": 1e-4, "high": 0.3, "log": True},
    "lora_rank": {"type": "int", "low": 2, "high": 8},
    "lr": SPACE["lr"],
}


def write_sweep(path: Path, records: Path, *, settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Random search over the two parameters, nothing pruned, four trials of three epochs."""
    common: dict[str, Any] = {"data": str(records), "max_patients": 80, "epochs": 3, "early_stopping_patience": 0}
    common |= {"use_lora": True, "precision": "fp32"}  # so that workers compute what this process would
    content = {
        "settings": {**common, **(settings or {})},
        "space": SPACE,
        "sampler": "random",
        "pruner": "none",
        "budget": {"trials": 4},
        **changes,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def behrt(root: Path, *words: str) -> Any:
    """What a command prints as JSON, run in `root`."""
    with chdir(root), redirect_stdout(StringIO()) as stdout:
        assert main([*words, "--json"]) == 0
    return json.loads(stdout.getvalue())


def start(root: Path, *words: str) -> "subprocess.Popen[str]":
    """A command as a process of its own, in `root`, where it finds an empty MLflow store."""
    if not (root / "mlruns").exists():
        lay_store(root)
    return subprocess.Popen(
        [sys.executable, "-m", "behrt", *words],
        cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]", *, code: int = 0) -> str:
    """What a process has written, once it has ended with this exit code."""
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr
    return stdout + stderr


def children_of(process: "subprocess.Popen[str]") -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def until(holds: Callable[[], bool], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.3)


def kill(pid: int, by: signal.Signals = signal.SIGKILL) -> None:
    subprocess.run(["kill", f"-{by.value}", str(pid)], check=True)


def trials_of(root: Path, study: str) -> list[optuna.trial.FrozenTrial]:
    """The trials, through Optuna alone; none before the first worker starts (its tables may be half made till then)."""
    if not (root / "sweeps" / study / "workers").exists():
        return []
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{root}/sweeps/studies.db", skip_compatibility_check=True, skip_table_creation=True
    )
    try:
        return optuna.load_study(study_name=study, storage=storage).get_trials()
    finally:
        storage.remove_session()
        storage.engine.dispose()


def client_of(root: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlruns/mlflow.db")


def runs_of(root: Path, study: str) -> tuple[Run, dict[int, Run]]:
    """The study's run, and its trials' by their numbers; each number must be there once."""
    client = client_of(root)
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    numbers = [int(run.data.tags["trial_number"]) for run in trials]  # parameters follow, unless a worker is stopped
    assert len(runs) == len(trials) + 1
    assert len(set(numbers)) == len(numbers)
    return parent, dict(zip(numbers, trials, strict=True))


def assert_optuna_and_mlflow_agree(root: Path, study: str) -> None:
    """Every trial that began a run has one run in MLflow, of the state that Optuna gives it; none is RUNNING."""
    expected = {"COMPLETE": ("COMPLETE", "FINISHED"), "PRUNED": ("PRUNED", "KILLED"), "FAIL": ("FAILED", "FAILED")}
    trials = trials_of(root, study)
    _, runs = runs_of(root, study)
    by_number = {trial.number: trial for trial in trials}
    assert set(runs) <= set(by_number)
    assert {trial.number for trial in trials if "run_id" in trial.user_attrs} <= set(runs)
    for number, run in runs.items():
        state = expected[by_number[number].state.name]  # a KeyError is one that is RUNNING or WAITING
        assert (run.data.tags["trial_state"], run.info.status) == state, number
