"""What is lost when processes die and things around a run fail?

`soak` kills trainings, a study's worker and `behrt prepare` at random moments, brings every fault of the table about,
and fails if anything is not as it should be; `tracking` times trainings while MLflow's server fails in each way;
`trainings` is the first part of `soak` alone; `report` writes the second half of `docs/reliability.md` from what these
have left in `results.json` beside this file (`soak` with `--record`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "reliability.md"
HEADING = "## What was measured"

COMMON = (
    "--num-patients",
    "400",
    "--epochs",
    "16",
    "--lr",
    "3e-3",
    "--batch-size",
    "8",
    "--checkpoint-minutes",
    "0.005",
)
KILLED_RUNS = {
    "full": COMMON,
    "lora": (*COMMON, "--use-lora", "--lora-rank", "4", "--epochs", "32"),
    "accumulated": (*COMMON, "--accumulation-steps", "4", "--dropout", "0.3"),
}
KILLS_A_RUN = 17
WORKER_KILLS, PREPARE_KILLS = 6, 20
TRACKING_FAULTS = ("down", "dies", "hangs", "answers 500", "full")
TRACKING_EPOCHS, TRACKING_REPEATS = 24, 2


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        what: is brought about.
        bring: does so, in an empty folder, and returns what was seen.
        should: what is to be seen.
        outcome: the same in words.
    """

    what: str
    bring: Callable[[Path], dict[str, Any]]
    should: Callable[[dict[str, Any]], bool]
    outcome: str


def faults() -> dict[str, Fault]:
    """The table, by the names under which results are kept."""
    import faults as ways

    nothing_lost = {"missing": [], "second_sync": "complete", "complete_before_sync": False, "warned": True}

    def sent(seen: dict[str, Any]) -> bool:
        return all(seen[name] == value for name, value in nothing_lost.items())

    def went_on(code: int) -> Callable[[dict[str, Any]], bool]:
        told = {"exit_code": code, "status": "KILLED", "differences": []}
        return lambda seen: all(seen[name] == value for name, value in told.items()) and seen["seconds"] < 10

    after = "training ends well, `behrt sync` sends what is missing, a second one finds nothing to send"
    rows = {
        f"tracking: {fault}": Fault(what, partial(ways.tracking_fault, fault=fault), sent, after)
        for fault, what in (
            ("down", "MLflow's server is down from the start"),
            ("dies", "MLflow's server is killed in mid-run"),
            ("hangs", "MLflow's server hangs (SIGSTOP)"),
            ("answers 500", "MLflow's server answers 500 to everything"),
            ("full", "the disk of MLflow's server is full"),
        )
    }
    killed = "run KILLED with a checkpoint; the printed command goes on to the uninterrupted result, bit by bit"
    return rows | {
        "sigterm": Fault(
            "SIGTERM inside an epoch",
            partial(ways.stopped, number=signal.SIGTERM),
            went_on(143),
            f"exit code 143; {killed}",
        ),
        "sigint": Fault(
            "Ctrl-C inside an epoch",
            partial(ways.stopped, number=signal.SIGINT),
            went_on(130),
            f"exit code 130; {killed}",
        ),
        "disk_gone": Fault(
            "a pod is killed and its disk is gone",
            ways.disk_is_gone,
            lambda seen: (
                seen["same_run"]
                and not seen["differences"]
                and seen["epochs_in_mlflow"] == list(range(1, 7))
                and seen["status"] == "FINISHED"
            ),
            "`--resume RUN_ID` goes on from MLflow's artifacts alone, in the same run, to the uninterrupted result",
        ),
        "memory": Fault(
            "memory runs out over a micro-batch (injected)",
            ways.out_of_memory,
            lambda seen: seen["exit_code"] == 0 and seen["accumulation_steps"] > 1 and seen["epochs"] == 4,
            "micro-batches halved until they fit, as many patients a step as before; the run finishes",
        ),
        "nan": Fault(
            "a loss is no number (injected)",
            ways.not_a_number,
            lambda seen: (
                (seen["lost"]["exit_code"], seen["lost"]["verdict"]) == (4, "diverged")
                and (seen["recovered"]["exit_code"], seen["recovered"]["recoveries"]) == (0, 1)
            ),
            "exit code 4 with the diagnosis; with `--recover` back a checkpoint, a tenth of the rate, finished",
        ),
        "full_disk": Fault(
            "the training's disk is full",
            ways.full_disk,
            lambda seen: seen["exit_code"] == 2 and seen["epochs"] == seen["epochs_before"] + 2,
            "exit code 2 and one line; the checkpoint before is whole and goes on when there is room",
        ),
        "damaged": Fault(
            "the last checkpoint is cut short; then both are",
            ways.damaged_checkpoints,
            lambda seen: (
                seen["warned"] and not seen["differences"] and "no checkpoint to go on from" in seen["refused"]
            ),
            "the one before it serves, with a warning, to the uninterrupted result; refused where both are damaged",
        ),
        "second": Fault(
            "a second training in the same folder",
            ways.second_training,
            lambda seen: "another run is writing there" in seen["line"] and seen["first_exit_code"] == 0,
            "exit code 2 and one line; the first is not disturbed",
        ),
    }


def kill_everything(folder: Path) -> dict[str, Any]:
    """Trainings, a study's worker and `behrt prepare`, killed at random moments."""
    import kills

    sweep = {
        "settings": {
            "num_patients": 400,
            "epochs": 6,
            "use_lora": True,
            "early_stopping_patience": 0,
            "batch_size": 16,
        },
        "space": {"lr": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True}},
        "sampler": "random",
        "pruner": "none",
        "budget": {"trials": 4},
    }
    file = folder / "killed.yaml"
    file.write_text(yaml.safe_dump(sweep))
    kills.run(folder, "simulate", "--patients", "3000", "--out", str(folder / "meds"))
    return {
        "trainings": kills.kill_trainings(folder / "trainings", KILLED_RUNS, kills=KILLS_A_RUN),
        "prepare": kills.kill_prepare(folder / "prepare", folder / "meds", kills=PREPARE_KILLS, longest=2.0),
        "sweep": kills.kill_sweep(folder / "sweep", file, kills=WORKER_KILLS),
    }


def bring_all_about(folder: Path) -> dict[str, Any]:
    """Every fault of the table; what was seen of each, and how long it took."""
    seen = {}
    for name, fault in faults().items():
        began = time.monotonic()
        found = fault.bring(folder / name.replace(" ", "_").replace(":", ""))
        seen[name] = {"as_it_should": fault.should(found), "took": round(time.monotonic() - began, 1), **found}
        click.echo(f"{fault.what}: {'as it should be' if seen[name]['as_it_should'] else found}", err=True)
    return seen


def fuzz(folder: Path) -> dict[str, Any]:
    """The property-based tests of readers, files and settings, with more examples than `make test` has time for."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_fuzz.py")]
    environment = {**os.environ, "BEHRT_FUZZ_EXAMPLES": "400", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return {"exit_code": ended.returncode, "summary": (ended.stdout.strip().splitlines() or [""])[-1]}


def failures(found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    killed = [*found["kills"]["trainings"].items(), *((name, found["kills"][name]) for name in ("sweep", "prepare"))]
    wrong = [f"{name}: {row['differences']}" for name, row in killed if row["differences"]]
    wrong += [f"sweep: {found['kills']['sweep']['running']} left running"] if found["kills"]["sweep"]["running"] else []
    wrong += [f"{name}: {row}" for name, row in found["faults"].items() if not row["as_it_should"]]
    return wrong + ([f"fuzz: {found['fuzz']['summary']}"] if found["fuzz"]["exit_code"] else [])


def load_results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return found


def save_results(**found: Any) -> None:
    RESULTS.write_text(json.dumps({**load_results(), **found}, indent=1) + "\n", encoding="utf-8")


@click.group()
def cli() -> None:
    """Kill, break, and look what is lost."""


@cli.command()
@click.option("--record", is_flag=True, help="Keep what was seen in results.json, for the report.")
def soak(record: bool) -> None:
    """Everything of the table once, and 50 kills of trainings; about ten minutes on two cores."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="behrt-soak-"))
    lanes: dict[str, Callable[[Path], dict[str, Any]]] = {"kills": kill_everything, "faults": bring_all_about}
    for lane in lanes:
        (folder / lane).mkdir()
    with ThreadPoolExecutor(len(lanes)) as pool:
        started = {lane: pool.submit(work, folder / lane) for lane, work in lanes.items()}
        found = {lane: future.result() for lane, future in started.items()}
    found["fuzz"] = fuzz(folder)
    found["seconds"] = round(time.monotonic() - began)
    click.echo(after_the_kills(found["kills"]), err=True)
    click.echo(f"fuzzing: {found['fuzz']['summary']}; {found['seconds']} s in all", err=True)
    if record:
        save_results(**found)
    wrong = failures(found)
    if wrong:
        raise SystemExit("\n".join(["not as it should be:", *wrong, f"all of it is in {folder}"]))
    shutil.rmtree(folder)
    click.echo("nothing was lost", err=True)


@cli.command()
@click.option("--only", type=click.Choice(list(KILLED_RUNS)), help="One of them.")
def trainings(only: str | None) -> None:
    """The trainings of `soak` alone, killed; what was seen is kept."""
    import kills

    folder = Path(tempfile.mkdtemp(prefix="behrt-kills-"))
    runs = KILLED_RUNS if only is None else {only: KILLED_RUNS[only]}
    former = load_results()["kills"]
    found = {**former["trainings"], **kills.kill_trainings(folder, runs, kills=KILLS_A_RUN)}
    save_results(kills={**former, "trainings": found})
    shutil.rmtree(folder)


@cli.command()
def tracking() -> None:
    """Time trainings while MLflow's server fails, each way in turn, and beside it trainings with one that works."""
    import faults as ways

    folder = Path(tempfile.mkdtemp(prefix="behrt-tracking-"))
    rows: list[dict[str, Any]] = []
    for repeat in range(TRACKING_REPEATS):
        for fault in ("none", *TRACKING_FAULTS):
            seen = ways.tracking_fault(
                folder / f"{repeat}-{fault}".replace(" ", "_"), fault, epochs=TRACKING_EPOCHS, look=False
            )
            rows.append({"repeat": repeat, **seen})
            click.echo(f"{repeat} {fault}: {seen['training_seconds']:.2f} s of training", err=True)
            save_results(tracking=rows)
    shutil.rmtree(folder)


@cli.command()
def report() -> None:
    """Write the measured half of docs/reliability.md."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(HEADING)] + measured(load_results()), encoding="utf-8")


def measured(results: dict[str, Any]) -> str:
    """The second half of the page."""
    parts = [
        HEADING,
        f"`make soak` ({results['seconds']} s on two cores) brings these about; here `python "
        "experiments/reliability/measure.py soak --record` did, and found them so. LoRA's row of the kills is of "
        "`trainings --only lora`, the times are of `tracking`; `report` wrote this page.",
        fault_table(results["faults"]),
        "### Killed at random moments",
        after_the_kills(results["kills"]),
        "### The time of a training while MLflow fails",
        tracking_table(results["tracking"]),
    ]
    return "\n\n".join(parts) + "\n"


def fault_table(found: dict[str, Any]) -> str:
    lines = ["| fault | outcome | seconds, all told |", "|---|---|---|"]
    for name, fault in faults().items():
        seen = found[name]
        outcome = fault.outcome if seen["as_it_should"] else f"**not as it should be**: {seen}"
        ended = f" (ended {seen['seconds']:.1f} s after the signal)" if "signal" in seen else ""
        lines.append(f"| {fault.what} | {outcome}{ended} | {seen['took']:.0f} |")
    return "\n".join(lines)


def after_the_kills(found: dict[str, Any]) -> str:
    rows = ["| run | kills | before a checkpoint | inside an epoch | between epochs | epochs | differences |"]
    rows.append("|---|---|---|---|---|---|---|")
    for name, row in found["trainings"].items():
        numbers = [row[key] for key in ("kills", "before_a_checkpoint", "inside_an_epoch", "between_epochs", "epochs")]
        rows.append(f"| {name} | {' | '.join(map(str, numbers))} | {len(row['differences']) or 'none'} |")
    total = sum(row["kills"] for row in found["trainings"].values())
    sweep, prepare = found["sweep"], found["prepare"]
    return "\n".join(
        [
            f"Trainings were killed {total} times with SIGKILL and resumed; weights, history and MLflow's metrics were "
            "compared with those of",
            "uninterrupted runs, bit by bit (times left out), each step once in MLflow:",
            "",
            *rows,
            "",
            f"The worker of a study was killed {sweep['kills']} times: {sweep['complete']} of 4 trials complete after "
            f"{sweep['attempts']} attempts, {sweep['running']} left running;",
            "each of them trained again uninterrupted gave "
            + ("the same weights and history, bit by bit." if not sweep["differences"] else f"{sweep['differences']}."),
            f"`behrt prepare` was killed {prepare['kills']} times: run to its end, its {prepare['files']} files were "
            + (
                "byte-identical, and nothing else was left."
                if not prepare["differences"]
                else f"{prepare['differences']}."
            ),
        ]
    )


def tracking_table(rows: Sequence[dict[str, Any]]) -> str:
    """Ratios to the training of the same repeat whose server works."""
    normal = {row["repeat"]: row["training_seconds"] for row in rows if row["fault"] == "none"}
    lines = [
        f"{TRACKING_EPOCHS} epochs, {len(normal)} trainings of each kind in turn; the time of the epochs over that of "
        "the training in the same",
        "round whose server worked, median and range. The rounds of a working server differ among each other by "
        f"{100 * (max(normal.values()) / min(normal.values()) - 1):.1f}%.",
        "",
        "| server | time of training |",
        "|---|---|",
    ]
    for fault in TRACKING_FAULTS:
        own = [row for row in rows if row["fault"] == fault]
        ratios = [100 * (row["training_seconds"] / normal[row["repeat"]] - 1) for row in own]
        spread = f"{statistics.median(ratios):+.1f}% ({min(ratios):+.1f}% to {max(ratios):+.1f}%)"
        lines.append(f"| {fault} | {spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli()
