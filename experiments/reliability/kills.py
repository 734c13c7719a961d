"""Is what a killed process leaves exactly what goes on to the uninterrupted result?

Processes of the real command line are killed with SIGKILL at random moments and started again, until they finish; what
they leave is compared, bit by bit, with what an uninterrupted one left. Times are left out of the comparison: an epoch
that was cut in two took another time. Lives that only ever import libraries would show nothing, so that trainings are
forked from a process that has imported them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from safetensors import safe_open

from behrt.history import EPOCH_FIGURES, read_history, read_run

TIMES = ("tokens_per_second", "epoch_seconds")
EXACT = tuple(name for name in EPOCH_FIGURES if name not in TIMES)


def environment(**changes: str) -> dict[str, str]:
    """One thread, so that sums round alike, and no store but the one that is named."""
    kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


def start(folder: Path, *words: str, log: str = "log.txt", **changes: str) -> subprocess.Popen[bytes]:
    """A behrt command in `folder`, with what it says in a file there."""
    with (folder / log).open("ab") as written:
        return subprocess.Popen(
            [sys.executable, "-m", "behrt", *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
            env=environment(**changes),
        )


def run(folder: Path, *words: str, code: int = 0, **changes: str) -> str:
    """The same to its end; what it said."""
    log = f"{words[0]}-{time.monotonic_ns()}.txt"
    ended = start(folder, *words, log=log, **changes).wait()
    said = (folder / log).read_text()
    assert ended == code, f"{' '.join(words)} ended with {ended}: {said[-2000:]}"
    return said


def command_line(folder: str, log: str, words: tuple[str, ...]) -> None:
    """A command in a forked process, which is then all its own."""
    os.chdir(folder)
    written = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.environ.update(environment())
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    import torch

    from behrt.cli import main

    torch.set_num_threads(1)
    os._exit(main(list(words)))


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["behrt.cli", "behrt.pretrain", "behrt.prepare", "mlflow.store.tracking.sqlalchemy_store", "seaborn", "kills"]
)


def fork(folder: Path, *words: str, log: str = "log.txt") -> BaseProcess:
    """As `start`, with libraries that are imported already."""
    process = FORKS.Process(target=command_line, args=(str(folder), log, words))
    process.start()
    return process


def forked(folder: Path, *words: str) -> None:
    """As `run`, likewise."""
    process = fork(folder, *words)
    process.join()
    assert process.exitcode == 0, f"{' '.join(words)} ended: {(folder / 'log.txt').read_text()[-2000:]}"


@dataclass
class Lives:
    """The lives of one process that was killed again and again."""

    kills: int = 0
    before_a_checkpoint: int = 0
    inside_an_epoch: int = 0
    between_epochs: int = 0


def where_it_was(folder: Path) -> str:
    """What a killed training left to go on from."""
    try:
        state = json.loads((folder / "checkpoints" / "last" / "training_state.json").read_text())
    except OSError:
        return "before_a_checkpoint"
    return "inside_an_epoch" if state["position"]["step"] else "between_epochs"


def killed_training(
    folder: Path, name: str, flags: Sequence[str], *, kills: int, moments: random.Random, longest: float
) -> Lives:
    """Trains in `folder`, killed at random moments, until it has finished or was killed so often; then to its end."""
    lives, run_folder = Lives(), folder / "experiments" / name
    words: list[str] = ["train", *flags, "--experiment", name]
    while True:
        if (run_folder / "logs" / "tracking.json").exists():
            words = ["train", "--resume", str(run_folder), "--checkpoint-minutes", "0.005"]
        process = fork(folder, *words)
        process.join(moments.uniform(0.3, longest) if lives.kills < kills else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            lives.kills += 1
            where = where_it_was(run_folder)
            setattr(lives, where, getattr(lives, where) + 1)
            continue
        code = process.exitcode
        if code != 0:
            # killed after its end was told and before it was gone: there is nothing left to train
            said = (folder / "log.txt").read_text()
            assert "epochs are trained" in said[-400:], f"{' '.join(words)} ended with {code}: {said[-2000:]}"
            run(folder, "sync", str(run_folder))
        return lives


def weights(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint as its bytes."""
    found: dict[str, bytes] = {}
    for file in sorted(checkpoint.glob("*model.safetensors")):
        with safe_open(file, framework="np") as handle:
            found |= {f"{file.name} {name}": handle.get_tensor(name).tobytes() for name in handle.keys()}  # noqa: SIM118
    assert found, f"{checkpoint} holds no weights"
    return found


def figures_in_mlflow(folder: Path, experiment: str) -> tuple[str, dict[str, list[tuple[int, float]]]]:
    """Status and metrics of the one run of an experiment."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns/mlflow.db")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (tracked,) = client.search_runs([found.experiment_id])
    histories = {
        name: sorted((metric.step, metric.value) for metric in client.get_metric_history(tracked.info.run_id, name))
        for name in EPOCH_FIGURES
    }
    return tracked.info.status, histories


def differences(whole: Path, killed: Path) -> list[str]:
    """In what two finished runs differ; their experiments are folders below `experiments/` of their working folder."""
    found = []
    histories = [read_history(folder) for folder in (whole, killed)]
    found += [f"history of {name}" for name in EXACT if histories[0][name] != histories[1][name]]
    for checkpoint in ("best", "last"):
        states = [weights(folder / "checkpoints" / checkpoint) for folder in (whole, killed)]
        found += [f"{checkpoint} {name}" for name in states[0] if states[0][name] != states[1].get(name)]
    runs = [read_run(folder) for folder in (whole, killed)]
    found += [
        f"run.json {name}"
        for name in ("status", "verdict", "best_epoch", "best_val_loss", "epochs", "tracking_complete")
        if runs[0][name] != runs[1][name]
    ]
    tracked = [figures_in_mlflow(folder.parents[1], folder.name) for folder in (whole, killed)]
    found += ["status in MLflow"] if tracked[0][0] != tracked[1][0] else []
    for name in EPOCH_FIGURES:
        steps = [[step for step, _ in histories[name]] for _, histories in tracked]
        found += [f"steps of {name} in MLflow"] if steps[0] != steps[1] else []
        same = name in TIMES or tracked[0][1][name] == tracked[1][1][name]
        found += [] if same else [f"{name} in MLflow"]
    return found


def kill_trainings(
    folder: Path, runs: Mapping[str, Sequence[str]], *, kills: int, longest: float = 6.0, seed: int = 0
) -> dict[str, Any]:
    """Every named run once whole and once killed so often, in `folder/NAME/whole` and `killed`; what was found."""
    moments, rows = random.Random(seed), {}
    for name, flags in runs.items():
        for way in ("whole", "killed"):
            (folder / name / way).mkdir(parents=True, exist_ok=True)
        forked(folder / name / "whole", "train", *flags, "--experiment", name)
        lives = killed_training(folder / name / "killed", name, flags, kills=kills, moments=moments, longest=longest)
        paths = [folder / name / way / "experiments" / name for way in ("whole", "killed")]
        rows[name] = {
            "kills": lives.kills,
            "before_a_checkpoint": lives.before_a_checkpoint,
            "inside_an_epoch": lives.inside_an_epoch,
            "between_epochs": lives.between_epochs,
            "epochs": read_run(paths[0])["epochs"],
            "tensors": len(weights(paths[0] / "checkpoints" / "last")),
            "differences": differences(*paths),
        }
    return rows


def kill_sweep(folder: Path, sweep_file: Path, *, kills: int, longest: float = 13.0, seed: int = 0) -> dict[str, Any]:
    """A study whose only worker is killed so often; every trial it ends with is trained again, uninterrupted."""
    folder.mkdir(parents=True)
    shutil.copyfile(sweep_file, folder / "killed.yaml")
    moments, killed = random.Random(seed), 0
    process = start(folder, "sweep", "run", "killed.yaml")
    while killed < kills and process.poll() is None:
        time.sleep(moments.uniform(5.0, longest))
        for worker in children_of(process.pid):
            os.kill(worker, signal.SIGKILL)
            killed += 1
    assert process.wait() == 0, (folder / "log.txt").read_text()[-2000:]
    trials = [path.parent for path in sorted(folder.glob("sweeps/killed/trials/*/run.json"))]
    complete = [trial for trial in trials if read_run(trial)["status"] == "FINISHED"]
    different = []
    for trial in complete:
        name = f"again{trial.name}"
        settings = folder / f"{name}.yaml"
        shutil.copyfile(trial / "logs" / "settings.yaml", settings)
        run(folder, "train", str(settings), "--experiment", name)
        again = folder / "experiments" / name
        histories = [read_history(place) for place in (trial, again)]
        states = [weights(place / "checkpoints" / "best") for place in (trial, again)]
        if any(histories[0][figure] != histories[1][figure] for figure in EXACT) or states[0] != states[1]:
            different.append(trial.name)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns/mlflow.db")
    doubled = [
        trial.name
        for trial in complete
        for steps in [[point.step for point in client.get_metric_history(read_run(trial)["run_id"], "val_loss")]]
        if sorted(steps) != list(range(1, read_run(trial)["epochs"] + 1))
    ]
    status = json.loads(run(folder, "sweep", "status", "killed", "--json").splitlines()[-1])
    return {
        "kills": killed,
        "complete": len(complete),
        "attempts": len(trials),
        "running": status["running"],
        "differences": different + doubled,
    }


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def kill_prepare(folder: Path, source: Path, *, kills: int, longest: float, seed: int = 0) -> dict[str, Any]:
    """Prepares records, killed so often at random moments; then to its end, and compares every byte."""
    folder.mkdir(parents=True)
    words = ("prepare", str(source), "--format", "meds", "--out")
    began = time.monotonic()
    forked(folder, *words, "whole/prepared")
    seconds = time.monotonic() - began
    moments, killed = random.Random(seed), 0
    while killed < kills:
        process = fork(folder, *words, "killed/prepared", "--overwrite")
        process.join(moments.uniform(0.1, max(longest, 1.1 * seconds)))
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
    forked(folder, *words, "killed/prepared", "--overwrite")
    contents = [
        {file.relative_to(place).as_posix(): file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}
        for place in (folder / "whole", folder / "killed")
    ]
    different = [name for name in contents[0] if contents[0][name] != contents[1].get(name)]
    left_over = [name for name in contents[1] if name not in contents[0]]
    return {"kills": killed, "files": len(contents[0]), "differences": different + left_over}
