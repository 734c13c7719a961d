"""Can a file that somebody else made run code, or lead out of the folder that it belongs to?"""

import ast
import io
import json
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import optuna
import pytest
import torch
from safetensors.torch import load_file, save_file

from behrt.adapter_files import load_adapter, refuse_pickles
from behrt.checkpoints import CHECKSUMS_FILE, TRAINED_FILE, Base, save_checkpoint
from behrt.cli import main
from behrt.config import UserError
from behrt.files import replacing_folder, write_checksums, write_text
from behrt.history import RunFolder
from behrt.model import BEHRTForMaskedLM
from behrt.runs import load_run, locate_run, run_id_of
from behrt.sweep.settings import load_sweep
from behrt.sweep.study import BUDGET, DEFINITION
from behrt.tasks.finetuned import TaskDescription, load_finetuned
from behrt.tasks.heads import BEHRTForTask
from behrt.tracking import TrackedRun, download_checkpoints

from .conftest import Workspace

PACKAGE = Path(__file__).resolve().parents[1] / "behrt"

PICKLING_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pickletools"}
UNPICKLING_NAMES = {"read_pickle", "to_pickle", "allow_pickle", "get_data", "legacy_load"}


# Nothing is pickled or unpickled.


def pickling(source: str) -> list[str]:
    """What in a module pickles or unpickles, or could."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in PICKLING_MODULES]
        elif isinstance(node, ast.ImportFrom):
            root = (node.module or "").split(".")[0]
            found += [root] if root in PICKLING_MODULES else []
            found += [name.name for name in node.names if name.name in {*PICKLING_MODULES, *UNPICKLING_NAMES}]
            if root == "torch":
                found += [f"torch.{name.name}" for name in node.names if name.name in ("load", "save")]
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if (owner == "torch" and node.attr in ("load", "save")) or node.attr in UNPICKLING_NAMES:
                found.append(f"{owner}.{node.attr}")
            if node.attr in ("__reduce__", "__reduce_ex__"):
                found.append(node.attr)
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not is_off:
                    found.append("allow_pickle")
            # what pickles behind an innocent name
            name = ast.unparse(node.func)
            if name in ("multiprocessing.Queue", "multiprocessing.Pool", "yaml.load", "yaml.unsafe_load"):
                found.append(name)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_pickles(path: Path) -> None:
    assert pickling(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, joblib",
        "import multiprocessing.pool, dill.source",
        "from pickle import loads",
        "def f():\n    from cloudpickle import dumps",
        "import shelve as s",
        "import torch\nx = torch.load('a', weights_only=True)",
        "import torch\ntorch.save({}, 'a')",
        "from torch import load",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
        "import numpy as np\nnp.load('a', allow_pickle=allowed)",
        "import pandas as pd\npd.read_pickle('a')",
        "frame.to_pickle('a')",
        "import yaml\nyaml.unsafe_load('a')",
    ],
)
def test_a_module_that_pickles_is_seen(source: str) -> None:
    assert pickling(source) != []


def test_arrays_are_read_without_pickle() -> None:
    assert pickling("import numpy as np\nnp.load('a', allow_pickle=False)\nnp.load('b')\nimport torch.nn as nn") == []


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def trap(marker: Path, how: str) -> bytes:
    if how == "torch":
        buffer = io.BytesIO()
        torch.save(Trap(marker), buffer)
        return buffer.getvalue()
    if how == "torch, legacy":
        buffer = io.BytesIO()
        torch.save(Trap(marker), buffer, _use_new_zipfile_serialization=False)
        return buffer.getvalue()
    return pickle.dumps(Trap(marker), protocol=int(how))


NAMES = (
    "pytorch_model.bin",
    "adapter_model.bin",
    "optimizer.pt",
    "rng_state.PTH",
    "a.pkl",
    "last.ckpt",
    "inner/a.pickle",
)
FORMATS = ("2", "3", "4", "5", "torch", "torch, legacy")
CARRIED = [(name, "4") for name in NAMES] + [("notes", how) for how in FORMATS] + [("vocabulary.txt", "torch")]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "unpickled"


@pytest.mark.parametrize("how", ["0", *FORMATS])
def test_the_trap_springs_when_it_is_unpickled(how: str, marker: Path) -> None:
    content = trap(marker, how)
    if how.startswith("torch"):
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)  # noqa: S301
    assert marker.exists()


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "how"), CARRIED)
def test_a_checkpoint_that_carries_a_pickle_is_refused_and_left_alone(
    name: str, how: str, workspace: Workspace, tmp_path: Path, marker: Path
) -> None:
    for run in (workspace.full, workspace.lora):
        folder = tmp_path / run.name
        shutil.copytree(run / "checkpoints" / "best", folder)
        load_run(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(trap(marker, how))
        assert f"{folder / name}: a pickle, or named like one" in refusal(lambda folder=folder: load_run(folder))
    assert not marker.exists()


@pytest.mark.parametrize("how", ["0", *FORMATS])
@pytest.mark.parametrize("run", ["full", "lora"])
def test_a_pickle_in_the_place_of_the_weights_is_refused(
    how: str, run: str, workspace: Workspace, tmp_path: Path, marker: Path
) -> None:
    shutil.copytree(getattr(workspace, run) / "checkpoints" / "best", tmp_path / "run")
    (weights,) = (tmp_path / "run").glob("*model.safetensors")
    weights.write_bytes(trap(marker, how))
    assert str(weights) in refusal(lambda: load_run(tmp_path / "run"))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", TRAINED_FILE])
def test_a_fine_tuned_checkpoint_with_a_pickle_beside_or_instead_of_its_weights_is_refused(
    name: str, workspace: Workspace, tmp_path: Path, marker: Path
) -> None:
    donor = load_run(workspace.full)
    model = BEHRTForTask(donor.model.behrt, 1)
    task = TaskDescription(name="task", kind="binary", names=("outcome",)).as_dict()
    save_checkpoint(tmp_path / "run", model, vocabulary=donor.vocabulary, epoch=1, base=Base(seed=0), task=task)
    load_finetuned(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(trap(marker, "torch"))
    assert name in refusal(lambda: load_finetuned(tmp_path / "run"))
    assert not marker.exists()


@pytest.mark.parametrize(("name", "how"), CARRIED)
def test_an_adapter_that_carries_a_pickle_is_refused_and_the_model_left_as_it_was(
    name: str, how: str, workspace: Workspace, tmp_path: Path, marker: Path
) -> None:
    shutil.copytree(workspace.lora / "checkpoints" / "best", tmp_path / "adapter")
    (tmp_path / "adapter" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "adapter" / name).write_bytes(trap(marker, how))
    model = BEHRTForMaskedLM(load_run(workspace.lora).model.config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert name in refusal(lambda: load_adapter(model, tmp_path / "adapter"))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not marker.exists()


def test_starting_from_a_run_that_carries_a_pickle_is_one_line(
    workspace: Workspace, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(workspace.full, tmp_path / "foreign")
    (tmp_path / "foreign" / "checkpoints" / "best" / "pytorch_model.bin").write_bytes(trap(marker, "torch"))
    with chdir(tmp_path):
        words = ["train", "--data", str(workspace.prepared), "--epochs", "1", "--init-from", "foreign"]
        assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pytorch_model.bin: a pickle" in line
    assert not marker.exists()
    assert not (tmp_path / "experiments").exists() or not list((tmp_path / "experiments").glob("*/checkpoints"))


@pytest.mark.parametrize("length", [0x80, 0x280, 0x380, 0x480, 0x580])
def test_safetensors_are_not_taken_for_a_pickle_by_the_length_of_their_header(length: int, tmp_path: Path) -> None:
    """Which is the first thing in the file, and begins like a pickle for these lengths."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, file, metadata={"pad": ""})
    shortest = int.from_bytes(file.read_bytes()[:8], "little")
    save_file({"a": torch.ones(2)}, file, metadata={"pad": "x" * (length - shortest)})
    assert int.from_bytes(file.read_bytes()[:8], "little") == length
    refuse_pickles(tmp_path)
    assert torch.equal(load_file(file)["a"], torch.ones(2))


# Nothing leads out of its folder.

OUTSIDE = [
    "../outside",
    "../../outside",
    "/OUTSIDE",
    "a/../../outside",
    ".",
    "..",
    "",
    "a/b",
    "~",
    "a\\b",
    "a\0b",
    ".a",
]


def everything_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@contextmanager
def nothing_changes_beside(inner: Path) -> Iterator[None]:
    """Makes `inner` the working folder; whatever happens must not be seen beside it."""
    inner.mkdir(exist_ok=True)
    before = [path for path in everything_below(inner.parent) if not path.is_relative_to(inner)]
    with chdir(inner):
        yield
    assert [path for path in everything_below(inner.parent) if not path.is_relative_to(inner)] == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_of_an_experiment_or_a_study_is_a_way_out(
    name: str, workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name = name.replace("OUTSIDE", str(tmp_path / "outside")[1:])
    common = ["--data", str(workspace.prepared), "--epochs", "1"]
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "s.yaml").write_text("space: {lr: {type: float, low: 0.001, high: 0.01}}\n")
    with nothing_changes_beside(tmp_path / "inner"):
        for words in (
            ["train", *common, "--experiment", name],
            ["sweep", "run", "s.yaml", "--trials", "1", *common, "--study", name],
            ["sweep", "status", name],
            ["sweep", "plot", name],
            ["sweep", "export", name, "--to", "experiments/x"],
        ):
            assert main(words) == 2, words
            assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "target", ["../outside", "0" * 31 + "/", "../" + "a" * 29, "0" * 33, "0" * 32 + "/..", "%2e%2e"]
)
def test_what_is_no_run_id_is_never_looked_up(target: str, tmp_path: Path) -> None:
    with nothing_changes_beside(tmp_path / "inner"):
        assert "no such folder, and not an MLflow run id" in refusal(lambda: locate_run(target))
        assert everything_below(Path.cwd()) == []


def with_base(folder: Path, **base: object) -> Path:
    about = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**about, "base": {**about["base"], **base}}))
    files = [path for path in folder.iterdir() if path.name != CHECKSUMS_FILE]
    write_checksums(folder, CHECKSUMS_FILE, files)  # whoever forges the one can forge the other
    return folder


@pytest.mark.parametrize("run_id", ["../../../outside", "/OUTSIDE", "..", 7, ["../../../outside"]])
def test_a_checkpoint_cannot_name_a_base_that_is_fetched_to_elsewhere(
    run_id: object, workspace: Workspace, tmp_path: Path
) -> None:
    if isinstance(run_id, str):
        run_id = run_id.replace("OUTSIDE", str(tmp_path / "outside" / "deep")[1:])
    shutil.copytree(workspace.lora / "checkpoints" / "best", tmp_path / "inner" / "adapter")
    with_base(tmp_path / "inner" / "adapter", init_from="nowhere", init_from_run=run_id)
    with nothing_changes_beside(tmp_path / "inner"):
        expected = "nowhere: no such folder" if isinstance(run_id, str) else "is damaged"
        assert expected in refusal(lambda: load_run("adapter"))


def test_a_checkpoint_of_another_name_than_best_and_last_is_none(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.full, tmp_path / "run")
    shutil.copytree(workspace.full / "checkpoints" / "best", tmp_path / "outside")
    for name in ("../../outside", str(tmp_path / "outside")):
        assert "best and last" in refusal(lambda name=name: load_run(tmp_path / "run", checkpoint=name))
    assert load_run(tmp_path / "run", checkpoint="last").epoch == 3


@pytest.mark.parametrize("run_id", ["../../outside", "/outside", "a" * 31, 7, None])
def test_a_run_id_that_is_none_is_not_believed(run_id: object, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"run_id": run_id}))
    assert run_id_of(tmp_path) is None
    (tmp_path / "run.json").write_text(json.dumps({"run_id": "a" * 32}))
    assert run_id_of(tmp_path) == "a" * 32


@pytest.mark.parametrize("run_id", ["../../../outside", "/OUTSIDE", ".."])
def test_a_former_run_is_kept_in_its_own_experiment_whatever_it_calls_itself(
    run_id: str, workspace: Workspace, tmp_path: Path
) -> None:
    run_id = run_id.replace("OUTSIDE", str(tmp_path / "outside")[1:])
    with nothing_changes_beside(tmp_path / "inner"):
        shutil.copytree(workspace.full, "experiments/foreign")
        path = Path("experiments/foreign/run.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "run_id": run_id}))
        RunFolder(Path("experiments/foreign")).begin("")
        (earlier,) = Path("experiments/foreign/earlier").iterdir()
        assert (earlier / "checkpoints" / "best" / "checkpoint.json").exists()


def study_with_a_result(name: str) -> None:
    """A study in `s.db` that looks like one of ours, whoever named it."""
    Path("s.yaml").write_text("space: {lr: {type: float, low: 0.001, high: 0.01}}\n")
    sweep = load_sweep(Path("s.yaml"))
    study = optuna.create_study(study_name=name, storage="sqlite:///s.db")
    study.set_user_attr(DEFINITION, sweep.definition())
    study.set_user_attr(BUDGET, sweep.budget.model_dump(mode="json"))
    ranges = {"lr": optuna.distributions.FloatDistribution(0.001, 0.01)}
    for value in (3.0, 2.0):
        trial = optuna.trial.create_trial(
            params={"lr": value / 1000}, distributions=ranges, value=value, intermediate_values={1: value}
        )
        study.add_trial(trial)


def test_a_study_of_somebody_elses_with_a_path_for_a_name_is_not_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with nothing_changes_beside(tmp_path / "inner"):
        for name, code in (("inside", 0), ("../../outside", 2)):
            study_with_a_result(name)
            for command in ("status", "plot"):
                assert main(["sweep", command, name, "--storage", "sqlite:///s.db"]) == code, capsys.readouterr().err
        assert list(Path("sweeps").glob("*/plots/*.png")) == list(Path("sweeps/inside/plots").glob("*.png")) != []


# Links.


def test_what_is_written_in_the_place_of_a_link_leaves_what_it_pointed_to_as_it_was(
    workspace: Workspace, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (tmp_path / "link").symlink_to(outside)
    with replacing_folder(tmp_path / "link") as beside:
        (beside / "file").write_text("new")
    (tmp_path / "name").symlink_to(outside / "file")
    write_text(tmp_path / "name", "new")
    assert (outside / "file").read_text() == "mine"
    assert (tmp_path / "link" / "file").read_text() == (tmp_path / "name").read_text() == "new"
    assert not (tmp_path / "link").is_symlink()


def test_the_modes_of_files_that_links_point_to_stay(tmp_path: Path) -> None:
    (tmp_path / "outside").touch(mode=0o644)
    with replacing_folder(tmp_path / "folder", mode=0o700) as beside:
        (beside / "link").symlink_to(tmp_path / "outside")
    assert (tmp_path / "outside").stat().st_mode & 0o777 == 0o644


def test_downloading_in_the_place_of_a_link_leaves_what_it_pointed_to_as_it_was(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    with nothing_changes_beside(tmp_path / "inner"):
        run = TrackedRun(experiment="a", params={}, tags={})
        Path("best").mkdir()
        Path("best/file").write_text("weights")
        run.log_artifacts(Path("best"), under="checkpoints")
        place = Path("mlruns/downloads") / run.run_id
        place.parent.mkdir()
        place.symlink_to(outside)
        assert [path.name for path in download_checkpoints(run.run_id).rglob("*") if path.is_file()] == ["file"]
        assert not place.is_symlink()


# What an artifact store says.


class DeceitfulStore(BaseHTTPRequestHandler):
    """An MLflow server whose list of a run's artifacts leads out of the folder that they are fetched into."""

    listed: str = ""
    fetched: list[str]

    def do_GET(self) -> None:
        url = urlparse(self.path)
        query = parse_qs(url.query)
        if url.path.endswith("experiments/search"):
            answer: dict = {"experiments": []}
        elif url.path.endswith("runs/get"):
            run_id = query["run_id"][0]
            info = {
                "run_id": run_id, "run_uuid": run_id, "experiment_id": "1", "status": "FINISHED",
                "lifecycle_stage": "active", "artifact_uri": f"mlflow-artifacts:/1/{run_id}/artifacts",
            }  # fmt: skip
            answer = {"run": {"info": info, "data": {}}}
        elif "mlflow-artifacts/artifacts" in url.path and "path" in query:
            is_top = query["path"][0].endswith("artifacts")
            inside = "checkpoints" if is_top else self.listed
            answer = {"files": [{"path": inside, "is_dir": is_top, "file_size": 3}]}
        else:
            type(self).fetched.append(url.path)
            self._send(b"bad", "application/octet-stream")
            return
        self._send(json.dumps(answer).encode(), "application/json")

    do_POST = do_GET

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def store_that_lists(path: str) -> Iterator[tuple[str, list[str]]]:
    fetched: list[str] = []
    handler = type("Store", (DeceitfulStore,), {"listed": path, "fetched": fetched})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", fetched
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("listed", ["../../../../outside", "/OUTSIDE", "a/../../../../../outside", "%2e%2e/%2e%2e/x"])
def test_a_store_that_lists_paths_out_of_the_folder_writes_nothing_there(
    listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        store_that_lists(listed.replace("OUTSIDE", str(tmp_path / "outside")[1:])) as (url, _),
        nothing_changes_beside(tmp_path / "inner"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        refusal(lambda: download_checkpoints("a" * 32))
        assert [path for path in everything_below(Path.cwd()) if path.is_file()] == []


def test_the_same_store_can_give_what_belongs_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the paths were refused for something else."""
    with store_that_lists("weights") as (url, fetched), chdir(tmp_path):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        folder = download_checkpoints("a" * 32)
        assert [path.name for path in folder.rglob("*") if path.is_file()] == ["weights"]
        assert [path for path in fetched if "mlflow-artifacts" in path and path.endswith("checkpoints/weights")]
