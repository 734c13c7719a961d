"""What becomes of a training when something around it, or in it, fails?

Each function brings one fault about, for real where that can be done without a special machine, and returns what was
seen: the outcome in words, whether all that was asked for held, and how long it took.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kills import EXACT, differences, environment, run, start
from mlflow import MlflowClient

from behrt.history import EPOCH_FIGURES, read_history, read_run

SMALL = ("--num-patients", "300", "--batch-size", "16", "--lr", "3e-3", "--early-stopping-patience", "0")


def until(holds: Callable[[], bool], *, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def epochs_of(folder: Path) -> int:
    """Epochs that the history of a run folder has by now."""
    try:
        return len(read_history(folder)["val_loss"])
    except Exception:  # not there yet
        return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A real MLflow server over SQLite, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        words = ["server", "--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--port", str(self.port)]
        words += ["--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1", "--workers", "1"]
        with (self.folder / "server.txt").open("ab") as written:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words],
                cwd=self.folder,
                stdout=written,
                stderr=written,
                start_new_session=True,
                env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true"),
            )
        until(self.answers)

    def answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(0.5)
            if probe.connect_ex(("127.0.0.1", self.port)):
                return False
        try:
            MlflowClient(tracking_uri=self.uri).search_experiments(max_results=1)
        except Exception:  # not yet
            return False
        return True

    def send(self, number: signal.Signals) -> None:
        """A signal to all of its processes."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def limit_files(self, size: int) -> None:
        """No file of its processes grows beyond `size` bytes any more, as on a full disk."""
        assert self.process is not None
        group = subprocess.run(["pgrep", "-g", str(self.process.pid)], capture_output=True, text=True, check=True)
        for pid in map(int, group.stdout.split()):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


@contextmanager
def always_500() -> Iterator[str]:
    """A server that answers 500 to everything; its address."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = do_PUT = do_PATCH = answer

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def missing_in(uri: str, folder: Path) -> list[str]:
    """What a store lacks of the run in `folder`, or has twice."""
    client = MlflowClient(tracking_uri=uri)
    about, history = read_run(folder), read_history(folder)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    (tracked,) = [found for found in runs if found.data.tags.get("run_key") == about["run_key"]]
    missing = [] if tracked.info.status == about["status"] else [f"status {tracked.info.status}"]
    for name in EPOCH_FIGURES:
        told = sorted((point.step, point.value) for point in client.get_metric_history(tracked.info.run_id, name))
        missing += [] if told == [(point["epoch"], point["value"]) for point in history[name]] else [name]
    uploaded = {found.path for found in client.list_artifacts(tracked.info.run_id, "checkpoints/best")}
    missing += [] if "checkpoints/best/SHA256SUMS" in uploaded else ["checkpoints/best"]
    return missing + ([] if tracked.data.params["training.lr"] == "0.003" else ["parameters"])


def tracking_fault(folder: Path, fault: str, *, epochs: int = 12, look: bool = True) -> dict[str, Any]:
    """Trains while MLflow's server has a fault, repairs the server, syncs twice, and looks for what is missing.

    Args:
        fault: `none`, `down` (from the start), `dies`, `hangs`, `full` (its disk) or `answers 500`.
        look: repair and sync; else only the time of the training is of interest.
    """
    folder.mkdir(parents=True)
    server = Server(folder / "server")
    words = ("train", *SMALL, "--epochs", str(epochs), "--experiment", "run")
    run_folder = folder / "experiments" / "run"
    began = time.monotonic()
    try:
        if fault == "answers 500":
            with always_500() as uri:
                said = run(folder, *words, MLFLOW_TRACKING_URI=uri)
        elif fault == "down":
            said = run(folder, *words, MLFLOW_TRACKING_URI=server.uri)
        else:
            server.start()
            began = time.monotonic()
            process = start(folder, *words, log="train.txt", MLFLOW_TRACKING_URI=server.uri)
            until(lambda: epochs_of(run_folder) >= 2)
            if fault == "dies":
                server.send(signal.SIGKILL)
            elif fault == "hangs":
                server.send(signal.SIGSTOP)
            elif fault == "full":
                server.limit_files(4096)
            code = process.wait()
            said = (folder / "train.txt").read_text()
            assert code == 0, said
        seconds = time.monotonic() - began
        about = read_run(run_folder)
        training_seconds = sum(point["value"] for point in read_history(run_folder)["epoch_seconds"])
        if not look:
            return {"fault": fault, "training_seconds": training_seconds, "seconds": seconds}
        if fault in ("down", "answers 500", "dies", "full"):
            server.stop()
            server.start()
        elif fault == "hangs":
            server.send(signal.SIGCONT)
        first = run(folder, "sync", str(run_folder), MLFLOW_TRACKING_URI=server.uri)
        missing = missing_in(server.uri, run_folder)
        second = run(folder, "sync", MLFLOW_TRACKING_URI=server.uri)
        return {
            "fault": fault,
            "training_seconds": training_seconds,
            "seconds": seconds,
            "complete_before_sync": about["tracking_complete"],
            "warned": "behrt sync" in said,
            "sync": first.strip().rpartition(": ")[2],
            "missing": missing,
            "second_sync": second.strip().rpartition(": ")[2],
        }
    finally:
        server.stop()


def stopped(folder: Path, number: signal.Signals, *, inside: float = 0.3) -> dict[str, Any]:
    """Ends a training by a signal inside an epoch, and goes on with the command that it prints."""
    for way in ("whole", "stopped"):
        (folder / way).mkdir(parents=True)
    words = ("train", *SMALL, "--epochs", "4", "--experiment", "run")
    run(folder / "whole", *words)
    place = folder / "stopped"
    process = start(place, *words)
    until(lambda: epochs_of(place / "experiments" / "run") >= 2)
    time.sleep(inside)
    process.send_signal(number)
    began = time.monotonic()
    code = process.wait()
    seconds = time.monotonic() - began
    said = (place / "log.txt").read_text()
    (command,) = [line.removeprefix("To go on: ") for line in said.splitlines() if line.startswith("To go on: ")]
    status = read_run(place / "experiments" / "run")["status"]
    run(place, *command.split()[1:])
    return {
        "signal": number.name,
        "exit_code": code,
        "seconds": seconds,
        "status": status,
        "differences": differences(*(folder / way / "experiments" / "run" for way in ("whole", "stopped"))),
    }


DRIVER = """
import sys, torch
from behrt import pretrain
from behrt.cli import main
whole, calls = pretrain.masked_lm_loss, 0

def short_of_memory(model, batch):
    global calls
    calls += 1
    if model.training and len(batch.codes) > LARGEST:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return whole(model, batch)

def no_number(model, batch):
    global calls
    sums = whole(model, batch)
    if model.training:
        calls += 1
        if calls == LARGEST:
            return sums._replace(loss=sums.loss * float("nan"))
    return sums

pretrain.masked_lm_loss = FAULT
torch.set_num_threads(1)
sys.exit(main(sys.argv[1:]))
"""


def injected(folder: Path, fault: str, number: int, *flags: str) -> tuple[int, str, dict[str, Any]]:
    """A training with a fault inside: exit code, what it said, `run.json`.

    Args:
        fault: `short_of_memory`, for micro-batches of more than `number` rows, or `no_number`, in training's step
            `number` (counted with those of the pre-flight).
    """
    folder.mkdir(parents=True, exist_ok=True)
    driver = folder / "driver.py"
    driver.write_text(DRIVER.replace("FAULT", fault).replace("LARGEST", str(number)))
    words = ["train", *SMALL, "--epochs", "4", "--experiment", "run", *flags]
    ended = subprocess.run(
        [sys.executable, str(driver), *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr, read_run(folder / "experiments" / "run")


def out_of_memory(folder: Path) -> dict[str, Any]:
    """Memory for two rows at a time, where a step has more."""
    code, said, about = injected(folder, "short_of_memory", 2)
    return {
        "exit_code": code,
        "accumulation_steps": about["accumulation_steps"],
        "epochs": about["epochs"],
        "told": said.count("Memory ran out"),
        "finite": about["best_val_loss"] is not None,
    }


def not_a_number(folder: Path) -> dict[str, Any]:
    """A loss that is no number in one step of the third epoch, with and without `--recover`."""
    step = 0
    lost, recovered = {}, {}
    for way, flags in (("lost", ()), ("recovered", ("--recover",))):
        step = 60
        code, said, about = injected(folder / way, "no_number", step, *flags)
        found = {"exit_code": code, "verdict": about["verdict"], "epochs": about["epochs"], "status": about["status"]}
        found |= {"recoveries": about["recoveries"], "told": "a loss is no number" in said}
        lost, recovered = (found, recovered) if way == "lost" else (lost, found)
    return {"lost": lost, "recovered": recovered}


def full_disk(folder: Path) -> dict[str, Any]:
    """No file may grow beyond a size that a checkpoint's weights do not fit in, from the third epoch on."""
    folder.mkdir(parents=True)
    process = start(folder, "train", *SMALL, "--epochs", "200", "--experiment", "run")
    run_folder = folder / "experiments" / "run"
    until(lambda: epochs_of(run_folder) >= 2)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    code = process.wait()
    line = (folder / "log.txt").read_text().strip().splitlines()[-1]
    done = read_run(run_folder)["epochs"]
    run(folder, "train", "--resume", str(run_folder), "--epochs", str(done + 2))
    return {"exit_code": code, "line": line, "epochs_before": done, "epochs": read_run(run_folder)["epochs"]}


def damaged_checkpoints(folder: Path) -> dict[str, Any]:
    """The last checkpoint cut short: the one before it serves. Both: refused."""
    for way in ("whole", "cut"):
        (folder / way).mkdir(parents=True)
    words = ("train", *SMALL, "--epochs", "5", "--experiment", "run")
    run(folder / "whole", *words)
    place, run_folder = folder / "cut", folder / "cut" / "experiments" / "run"
    process = start(place, *words)
    until(lambda: epochs_of(run_folder) >= 3)
    process.kill()
    process.wait()
    shutil.copytree(place, folder / "both")
    for checkpoint in (run_folder / "checkpoints" / "last",):
        truncate(checkpoint / "optimizer.safetensors")
    said = run(place, "train", "--resume", str(run_folder))
    both = folder / "both" / "experiments" / "run"
    for name in ("last", "previous"):
        truncate(both / "checkpoints" / name / "model.safetensors")
    refused = run(folder / "both", "train", "--resume", str(both), code=2)
    return {
        "warned": "goes on from the checkpoint before it" in said,
        "differences": differences(folder / "whole" / "experiments" / "run", run_folder),
        "refused": refused.strip().splitlines()[-1].replace(f"{folder}/", "")[:120],
    }


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def second_training(folder: Path) -> dict[str, Any]:
    """A second training in the folder of one that runs, and the first one's end."""
    folder.mkdir(parents=True)
    words = ("train", *SMALL, "--epochs", "6", "--experiment", "run")
    process = start(folder, *words, log="first.txt")
    until(lambda: epochs_of(folder / "experiments" / "run") >= 1)
    began = time.monotonic()
    said = run(folder, *words, code=2)
    seconds = time.monotonic() - began
    return {"line": said.strip().splitlines()[-1], "seconds": seconds, "first_exit_code": process.wait()}


def disk_is_gone(folder: Path) -> dict[str, Any]:
    """Everything but MLflow is lost with a killed pod; the run goes on from its artifacts, in the same MLflow run."""
    for way in ("whole", "pod", "new_pod"):
        (folder / way).mkdir(parents=True)
    words = ("train", *SMALL, "--epochs", "6", "--experiment", "run", "--checkpoint-minutes", "0.005")
    run(folder / "whole", *words)
    server = Server(folder / "server")
    server.start()
    try:
        store = {"MLFLOW_TRACKING_URI": server.uri}
        process = start(folder / "pod", *words, **store)
        run_folder = folder / "pod" / "experiments" / "run"
        until(lambda: mirrored(run_folder) is not None and epochs_of(run_folder) >= 2)
        run_id = read_run(run_folder)["run_id"]
        process.kill()
        process.wait()
        shutil.rmtree(folder / "pod")
        said = run(folder / "new_pod", "train", "--resume", run_id, **store)
        client = MlflowClient(tracking_uri=server.uri)
        steps = sorted(point.step for point in client.get_metric_history(run_id, "val_loss"))
        status = client.get_run(run_id).info.status
    finally:
        server.stop()
    histories = [read_history(folder / way / "experiments" / "run") for way in ("whole", "new_pod")]
    return {
        "same_run": read_run(folder / "new_pod" / "experiments" / "run")["run_id"] == run_id,
        "differences": [name for name in EXACT if histories[0][name] != histories[1][name]],
        "epochs_in_mlflow": steps,
        "status": status,
        "went_on": "goes on" in said,
    }


def mirrored(run_folder: Path) -> str | None:
    """Which of the two places holds a checkpoint in MLflow by now."""
    try:
        place: str | None = json.loads((run_folder / "logs" / "files_sent.json").read_text())["mirror"]
    except OSError:
        return None
    return place
