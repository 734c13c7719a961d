"""The services of `compose.yaml` as processes on loopback, without Docker; `python -m tests.stack` checks them.

Commands, environments and health checks are those of the file; addresses and folders of the containers become those of
this machine. PostgreSQL is the one of `postgres_server`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import yaml
from mlflow import MlflowClient

from behrt.history import EPOCH_FIGURES, read_history, read_run
from behrt.sweep.storage import open_storage
from behrt.sweep.study import SweepStudy
from tests.forked_ranks import free_port
from tests.postgres_server import PASSWORD, PostgresServer, postgres_server, programs_folder, why_not
from tests.small_sweeps import until, write_sweep

ROOT = Path(__file__).parents[1]
MLFLOW_PASSWORD = "correct & horse/battery"

VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """The file, with variables put in as Compose does it. Raises `KeyError` with the message of a missing one."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if variables.get(name):
            return variables[name]
        if kind == "?":
            raise KeyError(f"{name} {rest}")
        return rest or ""

    def put_in(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: put_in(item) for key, item in node.items()}
        if isinstance(node, list):
            return [put_in(item) for item in node]
        return VARIABLE.sub(value, node) if isinstance(node, str) else node

    file: dict[str, Any] = put_in(yaml.safe_load((ROOT / "compose.yaml").read_text()))
    return file


def program_of_postgres(name: str) -> str:
    """Of the server's folder, or of the client's."""
    folder = programs_folder()
    return shutil.which(name, path=f"{folder}:{os.environ['PATH']}:/usr/bin") or name


class Stack:
    """The services over `root`, the `/workspace` of all containers.

    Args:
        variables: beside the secrets, as a person exports them before `docker compose up`.
    """

    def __init__(self, root: Path, database: PostgresServer, **variables: str) -> None:
        self.root, self.database, self.port = root, database, free_port()
        secrets = {"POSTGRES_PASSWORD": PASSWORD, "MLFLOW_PASSWORD": MLFLOW_PASSWORD}
        self.file = compose({**secrets, "MLFLOW_FLASK_SERVER_SECRET_KEY": "any", **variables})
        self.processes: list[subprocess.Popen[bytes]] = []
        self._databases: dict[str, str] = {}
        for folder in ("data", "experiments", "sweeps", "mlruns"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, database: str = "sweeps") -> str:
        """Of PostgreSQL, with the password."""
        return self.database.url(database=self._databases[database])

    def make_databases(self, prefix: str) -> None:
        """As the service's own environment and its first SQL file do; the server may be shared, hence the prefix."""
        about = self.file["services"]["db"]["environment"]
        assert (about["POSTGRES_USER"], about["POSTGRES_PASSWORD"]) == ("behrt", PASSWORD)
        statements = [f"CREATE DATABASE {about['POSTGRES_DB']};", self.file["configs"]["databases"]["content"]]
        with psycopg.connect(self.database.url(), autocommit=True) as connection:
            for name in re.findall(r"CREATE DATABASE (\w+);", " ".join(statements)):
                self._databases[name] = f"{prefix}_{name}"
                connection.execute(f"CREATE DATABASE {prefix}_{name}".encode())

    def here(self, text: str) -> str:
        """What a container says, said on this machine."""
        for name, database in self._databases.items():
            text = text.replace(f"@db/{name}", f"@127.0.0.1:{self.database.port}/{database}")
            text = re.sub(rf"^{name}$", database, text)
        text = text.replace("mlflow:5000", f"127.0.0.1:{self.port}").replace(":5000/", f":{self.port}/")
        text = text.replace("--port=5000", f"--port={self.port}").replace("0.0.0.0", "127.0.0.1")
        text = text.replace("/workspace", str(self.root))
        for config in self.file["services"]["mlflow"]["configs"]:
            text = text.replace(config["target"], str(self.root / config["source"]))
        return text

    def environment(self, service: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PG"))}
        about = self.file["services"][service]["environment"]
        named = {name: self.here(value) for name, value in about.items()}
        return {**kept, **named, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(self, service: str) -> subprocess.Popen[bytes]:
        """One container of the service, in a process group of its own; what it says goes to `SERVICE.txt`."""
        about = self.file["services"][service]
        for config in about.get("configs", []):
            (self.root / config["source"]).write_text(self.here(self.file["configs"][config["source"]]["content"]))
        command = about["command"]
        words = shlex.split(command) if isinstance(command, str) else command
        entry = about.get("entrypoint", ["python", "-m", "behrt"])
        assert entry[0] == "python"
        with (self.root / f"{service}.txt").open("ab") as written:
            process = subprocess.Popen(
                [sys.executable, *entry[1:], *map(self.here, words)],
                cwd=self.here(about.get("working_dir", "/workspace")),
                env=self.environment(service),
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def said(self, service: str) -> str:
        return (self.root / f"{service}.txt").read_text(errors="replace")

    def is_healthy(self, service: str) -> bool:
        """By the service's own health check."""
        word, program, *rest = self.file["services"][service]["healthcheck"]["test"]
        assert word == "CMD"
        programs = {"python": sys.executable, "pg_isready": program_of_postgres("pg_isready")}
        words = [programs[program], *map(self.here, rest)]
        words += ["--port", str(self.database.port)] if program == "pg_isready" else []
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    def until_healthy(self, server: subprocess.Popen[bytes]) -> None:
        """Waits for the MLflow server."""

        def is_healthy() -> bool:
            assert server.poll() is None, self.said("mlflow")
            return self.is_healthy("mlflow")

        until(is_healthy)

    def client(self) -> MlflowClient:
        """With the trainer's user and password, which MLflow reads from the environment."""
        about = self.environment("trainer")
        os.environ |= {name: about[name] for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
        return MlflowClient(tracking_uri=self.uri)

    def run(self, *words: str) -> tuple[int, str]:
        """A command in another container of the trainer: exit code, and what it said."""
        done = subprocess.run(
            [sys.executable, "-m", "behrt", *words],
            cwd=self.root, env=self.environment("trainer"), capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr


def kill(process: subprocess.Popen[bytes]) -> None:
    """A process and its children, as a pod that vanishes."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def running(root: Path, database: PostgresServer, *, prefix: str, **variables: str) -> Iterator[Stack]:
    """The stack with its databases made; whatever was started is ended."""
    former = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")}
    stack = Stack(root, database, **variables)
    stack.make_databases(prefix)
    try:
        yield stack
    finally:
        for process in stack.processes:
            kill(process)
        for name, value in former.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def missing_in_mlflow(client: MlflowClient, folder: Path) -> list[str]:
    """What MLflow lacks of the run in `folder`, has twice, or says differently."""
    about, history = read_run(folder), read_history(folder)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.run_key = '{about['run_key']}'")
    if len(found) != 1:
        return [f"{folder.name}: {len(found)} runs"]
    missing = [] if found[0].info.status == about["status"] else [f"{folder.name}: status {found[0].info.status}"]
    for name in EPOCH_FIGURES:
        told = sorted((point.step, point.value) for point in client.get_metric_history(found[0].info.run_id, name))
        if told != [(point["epoch"], point["value"]) for point in history[name]]:
            missing.append(f"{folder.name}: {name}")
    return missing


def check(
    root: Path,
    database: PostgresServer,
    records: Path,
    *,
    prefix: str,
    workers: int,
    trials: int,
    epochs: int,
    tell: Callable[[str], None],
    look: Callable[[Stack], None] = lambda stack: None,
) -> None:
    """Workers and a trainer; PostgreSQL restarted once and MLflow's server killed once in the middle.

    At the end each database holds all of it: Optuna's the finished trials, MLflow's every figure of every epoch.

    Args:
        look: is given the stack when its MLflow server is healthy.
    """
    train = (
        f"train --data {records} --max-patients 80 --epochs {epochs} --early-stopping-patience 0 --experiment trained"
    )
    variables = {"BEHRT_SWEEP": "sweeps/s.yaml", "BEHRT_TRAIN": train, "MLFLOW_WORKERS": "1"}
    with running(root, database, prefix=prefix, **variables) as stack:
        write_sweep(root / "sweeps" / "s.yaml", records, settings={"epochs": epochs}, budget={"trials": trials})
        assert stack.is_healthy("db")
        began = time.monotonic()
        server = stack.start("mlflow")
        stack.until_healthy(server)
        tell(f"MLflow's server is healthy after {time.monotonic() - began:.0f} s")
        look(stack)
        clients = [stack.start(service) for service in ("trainer", *["worker"] * workers)]

        def has_come_to(epoch: int) -> bool:
            assert all(process.poll() is None for process in clients[1:]), stack.said("worker")
            paths = root.glob("sweeps/s/trials/*/logs/metrics_history.json")
            return any(len(read_history(path.parents[1])["val_loss"]) >= epoch for path in paths)

        until(lambda: has_come_to(1))
        kill(server)
        tell("MLflow's server is killed")
        until(lambda: has_come_to(2))
        database.restart()
        tell("PostgreSQL is restarted")
        server = stack.start("mlflow")
        ended = [process.wait(600) for process in clients]
        assert set(ended) == {0}, (ended, stack.said("worker"), stack.said("trainer"))
        tell(f"trainer and workers have ended, after {time.monotonic() - began:.0f} s")
        stack.until_healthy(server)
        code, said = stack.run("sync")
        assert code == 0, said
        tell("what MLflow lacked is sent")

        study = SweepStudy.open("s", open_storage(stack.url(), create=False))
        found = study.tally()
        assert (found.finished, found.complete, found.running, found.waiting) == (trials, trials, 0, 0)
        client = stack.client()
        folders = [root / "experiments" / "trained", *sorted(root.glob("sweeps/s/trials/*"))]
        missing = [line for folder in folders for line in missing_in_mlflow(client, folder)]
        assert missing == []
        assert len(folders) >= trials + 1
        assert read_run(folders[0])["status"] == "FINISHED"
        assert [point["epoch"] for point in read_history(folders[0])["val_loss"]] == list(range(1, epochs + 1))
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        told = str([run.to_dictionary() for run in client.search_runs(experiments)]) + said
        # what MLflow holds of the runs, and all that runs and servers wrote: logs, checkpoints, artifacts, users
        written = told.encode() + b"".join(file.read_bytes() for file in root.rglob("*") if file.is_file())
        for password in (PASSWORD, MLFLOW_PASSWORD):
            assert password.encode() not in written
            assert quote(password, safe="").encode() not in written
        tell(f"{trials} trials in PostgreSQL, {len(folders)} runs in MLflow: nothing is missing")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    reason = why_not()
    if reason is not None:
        return print(f"stack-check: {reason}") or 2  # noqa: T201
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="behrt-stack-") as folder, postgres_server() as database:
        root = Path(folder)
        for words in ("simulate --patients 300 --out meds", "prepare meds --format meds --out prepared"):
            subprocess.run([sys.executable, "-m", "behrt", *words.split()], cwd=root, check=True, capture_output=True)

        def tell(line: str) -> None:
            print(f"{time.monotonic() - began:5.0f} s  {line}", flush=True)  # noqa: T201

        check(
            root / "workspace", database, root / "prepared", prefix="check", workers=2, trials=12, epochs=6, tell=tell
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
