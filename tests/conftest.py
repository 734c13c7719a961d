"""Fixtures that several test files share: records and runs, made once through the real command line."""

import os
import uuid
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from behrt import tracking
from behrt.cli import main
from behrt.sweep import coordinator
from tests.empty_stores import copy_store
from tests.forked_workers import processes
from tests.postgres_server import PostgresServer, postgres_server, why_not


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of real records to test on: `BEHRT_TEST_DATA`, else `../shared/data` beside the repository."""
    named = os.environ.get("BEHRT_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no records to test on: BEHRT_TEST_DATA names no folder, and ../shared/data is missing")
    return folder


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches a tracking server that the environment names."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session", autouse=True)
def _stores_are_copied() -> Iterator[None]:
    """A new store is a copy of an empty one; `make_store` makes it, where that is what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "_create_store", copy_store)
        yield


@pytest.fixture(scope="session", autouse=True)
def _workers_are_forked() -> Iterator[None]:
    """Those of studies that run in this process, which is most of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator, "subprocess", processes)
        yield


@pytest.fixture(scope="session", autouse=True)
def _float32_by_itself() -> Iterator[None]:
    """Figures are compared in float32, whatever the CPU multiplies fastest; bf16 is tested where it is named."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            patch.setattr(torch.cpu, name, lambda: False)
        yield


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared records of 300 simulated patients."""
    folder = tmp_path_factory.mktemp("records")
    assert main(["simulate", "--patients", "300", "--out", str(folder / "meds")]) == 0
    assert main(["prepare", str(folder / "meds"), "--format", "meds", "--out", str(folder / "prepared")]) == 0
    return folder / "prepared"


@dataclass(frozen=True)
class Workspace:
    """A working folder with one MLflow store and two finished runs."""

    root: Path
    prepared: Path
    lora: Path
    full: Path
    full_json: str

    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=f"sqlite:///{self.root}/mlruns/mlflow.db")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Workspace:
    """Two small runs in `experiments/`: LoRA on a random base, and full training."""
    root = tmp_path_factory.mktemp("workspace")
    common = ["--data", str(prepared), "--epochs", "3", "--lr", "3e-3", "--experiment"]
    with chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert main(["train", *common, "lora", "--use-lora", "--lora-rank", "4"]) == 0
        with redirect_stdout(StringIO()) as stdout:
            assert main(["train", *common, "full", "--json"]) == 0
    return Workspace(root, prepared, root / "experiments" / "lora", root / "experiments" / "full", stdout.getvalue())


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL server; a test that stops it starts it again."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with postgres_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty storage of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/a.db"
    running: PostgresServer = request.getfixturevalue("server")
    return running.create_database(f"behrt_{uuid.uuid4().hex}")
