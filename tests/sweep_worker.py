"""A sweep whose trials cost nothing, and a process that works on it: `python -m tests.sweep_worker URL WHAT`."""

import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from behrt.config import ExperimentSettings
from behrt.sweep.settings import Budget, PrunerSettings, SamplerSettings, Sweep
from behrt.sweep.space import CategoricalParameter, FloatParameter
from behrt.sweep.storage import Storage, open_storage
from behrt.sweep.study import Done, Report, SweepStudy, Wait
from behrt.sweep.trials import ALL_EPOCHS, TrialState

REPOSITORY = Path(__file__).parents[1]


def small_sweep(**changes: Any) -> Sweep:
    """Two parameters, drawn at random, nothing pruned."""
    given: dict[str, Any] = {
        "name": "small",
        "base": ExperimentSettings(),
        "space": {
            "lr": FloatParameter(type="float", low=1e-4, high=1e-2, log=True),
            "dropout": FloatParameter(type="float", low=0.0, high=0.5),
        },
        "sampler": SamplerSettings(name="random"),
        "pruner": PrunerSettings(name="none"),
        "budget": Budget(trials=20),
        "seed": 7,
        "objective": "val_loss",
        "note": "",
    }
    return Sweep(**{**given, **changes})


def grid_sweep(**changes: Any) -> Sweep:
    """Four points."""
    space = {
        "lora_rank": CategoricalParameter(type="categorical", choices=(4, 8)),
        "num_layers": CategoricalParameter(type="categorical", choices=(1, 2)),
    }
    return small_sweep(space=space, sampler=SamplerSettings(name="grid"), budget=Budget(trials=4), **changes)


def new_worker() -> dict[str, str]:
    return {"host": socket.gethostname(), "token": uuid.uuid4().hex}


def everybody_lives(worker: dict[str, Any]) -> bool | None:
    return True


def nobody_lives(worker: dict[str, Any]) -> bool | None:
    return False


def nobody_can_tell(worker: dict[str, Any]) -> bool | None:
    return None


def train_all(study: SweepStudy, is_alive: Callable[[dict[str, Any]], bool | None] = everybody_lives) -> list[int]:
    """Claims, reports and tells until the study is done; the numbers of the trials that were its own."""
    numbers = []
    worker = new_worker()
    while not isinstance(claim := study.claim(worker, is_alive=is_alive), Done):
        if isinstance(claim, Wait):
            time.sleep(0.05)
            continue
        for epoch in (1, 2):
            assert study.report(claim, epoch=epoch, value=1 / (claim.number + epoch)) is Report.KEEP
        assert study.tell(claim, TrialState.COMPLETE, 1 / (claim.number + 2), ended=ALL_EPOCHS)
        numbers.append(claim.number)
    return numbers


def start(url: str, what: str) -> "subprocess.Popen[str]":
    """A process that does `main`; a warning ends it."""
    command = [sys.executable, "-W", "error", "-m", "tests.sweep_worker", url, what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, cwd=REPOSITORY)


def answer(process: "subprocess.Popen[str]") -> Any:
    """What it prints as its last word."""
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(printed)


def open_briskly(url: str) -> Storage:
    """With heartbeats so short that a test can wait for their end."""
    return open_storage(url, heartbeat_seconds=1, grace_seconds=2)


def main(url: str, what: str) -> None:
    study = SweepStudy.begin(small_sweep(), open_briskly(url))
    if what == "work":
        sys.stdout.write(json.dumps(train_all(study)))
    else:
        trial = study.claim(new_worker(), is_alive=everybody_lives)
        assert not isinstance(trial, Wait | Done)
        with study.heartbeat(trial):
            for epoch in (1, 2):
                study.report(trial, epoch=epoch, value=1 / epoch)
            sys.stdout.write(json.dumps({"number": trial.number, "params": trial.params}) + "\n")
            sys.stdout.flush()
            time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
