"""Does the doctor keep a run that cannot learn from training, watch one in progress, and leave its word in MLflow?"""

import json
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from behrt.attention import PatientGroups, attend
from behrt.cli import main
from behrt.config import load_experiment
from behrt.console import TerminalListener
from behrt.doctor.checkup import facts_of_records
from behrt.doctor.targets import read_target
from behrt.history import read_history, read_run
from behrt.model import Attention
from behrt.records import Records, open_records, select_records
from behrt.trainer import Trainer

from .conftest import Workspace


def train(workspace: Workspace, *flags: str) -> int:
    small = ["--data", str(workspace.prepared), "--max-patients", "60"]
    return main(["train", *small, *flags])


def client(root: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlruns/mlflow.db")


def test_frozen_random_embeddings_and_head_are_refused_before_a_step(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "epochs", lambda self: pytest.fail("it trained"))
    with chdir(tmp_path):
        assert train(workspace, "--use-lora", "--no-train-embeddings", "--no-train-head", "--out", "frozen") == 3
        run = read_run(Path("frozen"))
    assert (run["status"], run["refused"], run["verdict"], run["severity"]) == ("FAILED", True, "unlearnable", "error")
    error = capsys.readouterr().err
    assert "Pre-flight" in error
    last = error.splitlines()[-1]
    assert "frozen_random_embeddings" in last
    assert "--train-embeddings" in last
    assert "--force" in last


def test_random_codes_are_refused_and_force_trains_them_all_the_same(tmp_path: Path) -> None:
    flags = ["--structure", "none", "--num-patients", "150", "--epochs", "1"]
    with chdir(tmp_path):
        assert main(["train", *flags, "--out", "refused"]) == 3
        assert not Path("refused/checkpoints").exists()
        assert main(["train", *flags, "--out", "forced", "--force"]) == 0
        assert read_run(Path("forced"))["verdict"] == "unlearnable"
        assert len(read_history(Path("forced"))["val_loss"]) == 1


def test_a_refused_run_leaves_its_diagnosis_in_the_folder_and_in_mlflow(workspace: Workspace, tmp_path: Path) -> None:
    with chdir(tmp_path):
        assert train(workspace, "--no-train-embeddings", "--out", "frozen") == 3
        run_id = read_run(Path("frozen"))["run_id"]
        diagnosis = json.loads(Path("frozen/diagnosis.json").read_text())
        assert main(["doctor", "frozen"]) == 0
    run = client(tmp_path).get_run(run_id)
    assert run.info.status == "FAILED"
    assert (run.data.tags["diagnosis"], run.data.tags["severity"]) == ("unlearnable", "error")
    artifacts = {file.path for file in client(tmp_path).list_artifacts(run_id)}
    assert {"diagnosis.json", "diagnosis.md", "run.json"} <= artifacts
    assert "frozen_random_embeddings" in {finding["rule"] for finding in diagnosis["findings"]}


def test_runs_are_found_by_their_diagnosis(workspace: Workspace) -> None:
    store = workspace.client()
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    for folder in (workspace.lora, workspace.full):
        run = read_run(folder)
        found = store.search_runs(experiments, filter_string=f"tags.diagnosis = '{run['verdict']}'")
        assert run["run_id"] in {match.info.run_id for match in found}
    assert store.search_runs(experiments, filter_string="tags.diagnosis = 'no such verdict'") == []


def test_adapters_that_are_passed_by_are_refused_although_the_counts_are_perfect(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_the_weight(
        self: Attention, hidden: torch.Tensor, groups: PatientGroups, asking: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As nn.MultiheadAttention does: the output projection's weight is read, the layer is never called."""
        asks = hidden if asking is None else hidden[asking]
        context = attend(self.query(asks), self.key(hidden), self.value(hidden), groups)
        return torch.nn.functional.linear(context, self.output.base.weight, self.output.base.bias)

    flags = ["--use-lora", "--lora-rank", "4", "--lora-targets", "output", "--epochs", "1"]
    with chdir(tmp_path):
        assert train(workspace, *flags, "--out", "good") == 0
        monkeypatch.setattr(Attention, "forward", read_the_weight)
        assert train(workspace, *flags, "--out", "passed_by") == 3
        good, passed_by = (read_run(Path(name)) for name in ("good", "passed_by"))
        findings = json.loads(Path("passed_by/diagnosis.json").read_text())["findings"]
    assert good["parameters"] == passed_by["parameters"]
    errors = {finding["rule"] for finding in findings if finding["severity"] == "error"}
    assert errors == {"silent_adapters", "no_gradient"}


def test_the_preflight_leaves_no_trace_in_the_training(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr("behrt.pretrain.probe", lambda *arguments, **named: {})
        with chdir(tmp_path):
            torch.manual_seed(5)
            assert train(workspace, "--use-lora", "--epochs", "2", "--dropout", "0.2", "--out", name) == 0
            histories.append(read_history(Path(name)))
    for figure in ("train_loss", "val_loss", "train_loss_running", "gradient_norm"):
        assert histories[0][figure] == histories[1][figure]


def test_a_finding_of_an_epoch_is_told_once(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(TerminalListener, "found", lambda self, finding: told.append((finding.rule, finding.severity)))
    with chdir(tmp_path):
        flags = ["--epochs", "12", "--lr", "1e-9", "--warmup-fraction", "0", "--stop-on", "never"]
        assert train(workspace, *flags, "--out", "still") == 0
    assert ("stuck_at_chance", "warning") in told
    assert ("stuck_at_chance", "error") in told
    assert len(told) == len(set(told))


def test_a_run_that_stands_still_is_ended_after_its_grace_with_exit_code_4(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--epochs", "30", "--lr", "1e-9", "--warmup-fraction", "0", "--early-stopping-patience", "0"]
    with chdir(tmp_path):
        assert train(workspace, *flags, "--out", "still") == 4
        run = read_run(Path("still"))
        assert len(read_history(Path("still"))["val_loss"]) == 10
        assert client(tmp_path).get_run(run["run_id"]).info.status == "FAILED"
        assert client(tmp_path).get_run(run["run_id"]).data.tags["diagnosis"] == "stuck_at_chance"
    assert (run["verdict"], run["lost_to"]) == ("stuck_at_chance", "stuck_at_chance")
    assert "ended after epoch 10" in capsys.readouterr().err.splitlines()[-1]


def test_patience_that_ends_a_run_at_chance_is_no_success(workspace: Workspace, tmp_path: Path) -> None:
    flags = ["--epochs", "30", "--lr", "1e-9", "--warmup-fraction", "0", "--early-stopping-patience", "5"]
    with chdir(tmp_path):
        flags += ["--early-stopping-min-delta", "0.1"]
        assert train(workspace, *flags, "--out", "still") == 4
        run = read_run(Path("still"))
    assert (run["status"], run["lost_to"], run["stopped_early"]) == ("FAILED", "stuck_at_chance", True)
    assert run["epochs"] < 10


def test_stop_on_never_lets_it_go_on_and_stop_on_warning_ends_it_sooner(workspace: Workspace, tmp_path: Path) -> None:
    flags = ["--epochs", "12", "--lr", "1e-9", "--warmup-fraction", "0", "--early-stopping-patience", "0"]
    with chdir(tmp_path):
        assert train(workspace, *flags, "--stop-on", "never", "--out", "on") == 0
        assert len(read_history(Path("on"))["val_loss"]) == 12
        assert train(workspace, *flags, "--stop-on", "warning", "--out", "sooner") == 4
        assert len(read_history(Path("sooner"))["val_loss"]) == 5


def test_a_forced_run_is_not_ended_for_what_it_was_forced_past(workspace: Workspace, tmp_path: Path) -> None:
    with chdir(tmp_path):
        flags = ["--use-lora", "--no-train-head", "--epochs", "2", "--out", "forced", "--force"]
        assert train(workspace, *flags) == 0
        assert read_run(Path("forced"))["epochs"] == 2


def test_memory_that_does_not_suffice_is_a_lost_run_with_its_remedy(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._train_step

    def run_out(self: Trainer, *arguments: object) -> object:
        if self.optimizer.state:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_train_step", run_out)
    with chdir(tmp_path):
        assert train(workspace, "--out", "big") == 4
        assert read_run(Path("big"))["lost_to"] == "out_of_memory"
    assert capsys.readouterr().err.splitlines()[-1].endswith("(out_of_memory), try --batch-size 32 → 16")


def test_a_mistake_of_the_doctors_own_costs_a_warning_and_not_the_run(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError

    for name in ("behrt.pretrain.probe", "behrt.doctor.checkup.diagnose"):
        monkeypatch.setattr(name, fail)
    with chdir(tmp_path):
        assert train(workspace, "--epochs", "2", "--out", "alone") == 0
        run = read_run(Path("alone"))
        assert (run["status"], run["verdict"], run["epochs"]) == ("FINISHED", "inconclusive", 2)
    assert {record.message.split(" failed")[0] for record in caplog.records} >= {"the pre-flight", "the diagnosis"}


def test_any_other_exception_is_not_swallowed(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer, *arguments: object) -> object:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "_train_step", fail)
    with chdir(tmp_path), pytest.raises(RuntimeError, match="a bug"):
        train(workspace, "--out", "broken")


def test_the_facts_of_a_run_come_back_from_its_folder_and_from_mlflow(workspace: Workspace) -> None:
    run = read_run(workspace.lora)
    here = read_target(str(workspace.lora))
    assert here.steps_per_epoch == run["facts"]["steps_per_epoch"]
    assert here.silent_adapters == ()
    assert here.shared_subjects == 0
    assert here.validation_masks_fixed is True
    assert here.training_masks_change is True
    with chdir(workspace.root):
        away = workspace.root / "experiments_away"
        (workspace.root / "experiments").rename(away)
        try:
            there = read_target(run["run_id"])
        finally:
            away.rename(workspace.root / "experiments")
    assert there.known() == here.known()
    assert there.curves.keys() == here.curves.keys()
    for name in here.curves:
        assert np.array_equal(there.curves[name].values, here.curves[name].values)


def test_no_patient_is_named_in_a_diagnosis(workspace: Workspace) -> None:
    subjects = json.loads((workspace.prepared / "vocabulary.json").read_text())
    assert subjects  # the vocabulary holds the codes: none of them may be in a diagnosis
    text = (workspace.lora / "diagnosis.json").read_text() + (workspace.lora / "diagnosis.md").read_text()
    codes = [code for code in json.dumps(subjects).split('"') if "//" in code]
    assert codes
    assert not [code for code in codes if code in text]


def records_of(workspace: Workspace) -> Records:
    settings = load_experiment(flags={"data": str(workspace.prepared)})
    return select_records(open_records(settings.data), settings)


def test_validation_masks_that_are_drawn_otherwise_are_found(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = records_of(workspace)
    assert facts_of_records(records)["validation_masks_fixed"] is True
    monkeypatch.setattr("behrt.records.FIXED_SEED", 1)
    assert facts_of_records(records)["validation_masks_fixed"] is False


def test_patients_who_train_and_validate_are_counted(workspace: Workspace) -> None:
    records = records_of(workspace)
    assert facts_of_records(records)["shared_subjects"] == 0
    tuning = records.data.split("tuning")
    overlapping = replace(records, training=tuning, training_patients=np.arange(7))
    assert facts_of_records(overlapping)["shared_subjects"] == 7
