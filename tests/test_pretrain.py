"""Does a run, from the command line to MLflow, leave everything that it promises?"""

import json
import math
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file

from behrt.cli import main
from behrt.config import load_experiment
from behrt.console import TerminalListener
from behrt.history import EPOCH_FIGURES, read_history, read_run
from behrt.lora import adapted_layers
from behrt.model import BEHRTForMaskedLM
from behrt.parameters import count_parameters
from behrt.pretrain import build_model, masked_lm_loss
from behrt.records import open_records, select_records
from behrt.runs import load_base, load_base_again, load_run, name_base
from behrt.trainer import Evaluation

from .conftest import Workspace


@pytest.fixture(scope="module")
def run(workspace: Workspace) -> Run:
    return workspace.client().get_run(read_run(workspace.lora)["run_id"])


def evaluate(model: torch.nn.Module, workspace: Workspace) -> Evaluation:
    """Validation loss and accuracy with a loop of its own."""
    settings = load_experiment(flags={"data": str(workspace.prepared)})
    records = select_records(open_records(settings.data), settings)
    loss = hits = scored = 0.0
    with torch.inference_mode():
        for batch in records.validation.packed(9, records.row_length):
            sums = masked_lm_loss(model.eval(), batch)
            loss, hits, scored = loss + sums.loss.item(), hits + sums.correct.item(), scored + batch.num_scored
    return Evaluation(loss / scored, hits / scored)


def test_the_run_is_finished_with_every_setting_as_a_parameter(run: Run) -> None:
    assert run.info.status == "FINISHED"
    for name, value in (("adaptation.lora_rank", "4"), ("training.epochs", "3"), ("model.model_size", "small")):
        assert run.data.params[name] == value
    assert set(load_experiment().flat()) <= set(run.data.params)


def test_every_epoch_is_in_mlflow_and_equal_to_the_history(workspace: Workspace, run: Run) -> None:
    history = read_history(workspace.lora)
    client = workspace.client()
    for name in EPOCH_FIGURES:
        logged = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert logged == {point["epoch"]: point["value"] for point in history[name]}
        assert sorted(logged) == [1, 2, 3]


def test_counts_and_baselines_are_logged_once(workspace: Workspace, run: Run) -> None:
    counts = count_parameters(load_run(workspace.lora).model)
    metrics = run.data.metrics
    assert metrics["total_parameters"] == counts["total"]
    assert metrics["trainable_parameters"] == counts["trainable"]
    assert metrics["trainable_percent"] == pytest.approx(counts["trainable_percent"])
    assert metrics["lora_parameters"] == counts["lora"] > 0
    assert metrics["chance_loss"] == pytest.approx(math.log(read_run(workspace.lora)["vocab_size"]))
    assert metrics["floor_loss"] < metrics["unigram_loss"] < metrics["chance_loss"]
    history = read_history(workspace.lora)["val_loss"]
    best = min(history, key=lambda point: point["value"])
    assert (metrics["best_val_loss"], metrics["best_epoch"]) == (best["value"], best["epoch"])


def test_tags_data_set_and_artifacts_are_there(workspace: Workspace, run: Run) -> None:
    tags = run.data.tags
    assert (tags["device"], tags["size"], tags["adaptation"]) == ("cpu", "small", "lora_on_random")
    assert len(tags["mlflow.source.git.commit"]) == 40
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == tags["dataset"]
    client = workspace.client()
    found = {
        file.path
        for folder in ("", "checkpoints", "checkpoints/best", "checkpoints/last", "plots", "logs")
        for file in client.list_artifacts(run.info.run_id, folder or None)
    }
    assert {
        "experiment.yaml",
        "logs/metrics_history.json",
        "plots/loss_curve.png",
        "plots/accuracy_curve.png",
        "checkpoints/best/adapter_model.safetensors",
        "checkpoints/last/adapter_config.json",
    } <= found


def test_the_best_checkpoint_gives_the_best_validation_loss_again(workspace: Workspace) -> None:
    for folder in (workspace.lora, workspace.full):
        found = evaluate(load_run(folder).model, workspace)
        assert found.loss == pytest.approx(read_run(folder)["best_val_loss"], rel=1e-5)
        assert found.accuracy == pytest.approx(read_run(folder)["best_val_accuracy"], rel=1e-5)


def test_a_lora_checkpoint_holds_what_was_trained_and_nothing_frozen(workspace: Workspace) -> None:
    model = load_run(workspace.lora).model
    saved = load_file(workspace.lora / "checkpoints" / "best" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == count_parameters(model)["trainable"]


def test_a_run_comes_back_from_its_mlflow_id_alone(workspace: Workspace) -> None:
    run_id = read_run(workspace.lora)["run_id"]
    by_folder = load_run(workspace.lora).model.state_dict()
    away = workspace.root / "away"
    with chdir(workspace.root):
        local = load_run(run_id).model.state_dict()
        (workspace.root / "experiments").rename(away)  # the disk with the history is gone
        try:
            from_mlflow = load_run(run_id).model.state_dict()
        finally:
            away.rename(workspace.root / "experiments")
    for found in (local, from_mlflow):
        assert found.keys() == by_folder.keys()
        assert all(torch.equal(found[name], by_folder[name]) for name in found)


def test_the_effective_settings_train_the_same_run_again(workspace: Workspace, tmp_path: Path) -> None:
    run_id = read_run(workspace.lora)["run_id"]
    path = workspace.client().download_artifacts(run_id, "experiment.yaml", str(tmp_path))
    with chdir(tmp_path):
        assert main(["train", path, "--out", "again"]) == 0
    histories = [read_history(folder) for folder in (workspace.lora, tmp_path / "again")]
    for name in ("train_loss", "val_loss", "val_accuracy", "gradient_norm", "train_loss_running"):
        assert histories[0][name] == histories[1][name]


def masks_of_last_tokens(workspace: Workspace, **flags: object) -> list[list[int]]:
    """What is shown of the last 15 tokens of each validation patient, which every cut keeps."""
    settings = load_experiment(flags={"data": str(workspace.prepared), **flags})
    validation = select_records(open_records(settings.data), settings).validation
    return [validation.shown[stop - 15 : stop].tolist() for stop in validation.sequences.offsets[1:]]


def test_validation_masks_are_the_same_for_every_seed_size_and_training_sample(workspace: Workspace) -> None:
    expected = masks_of_last_tokens(workspace)
    flags = ({"seed": 9}, {"max_patients": 20}, {"max_position": 30}, {"model_size": "large"})
    assert all(masks_of_last_tokens(workspace, **other) == expected for other in flags)


def test_more_to_guess_in_training_changes_the_training_and_nothing_that_is_compared(
    workspace: Workspace, tmp_path: Path
) -> None:
    runs = {}
    with chdir(tmp_path):
        for share in ("0.15", "0.45"):
            flags = ["--epochs", "1", "--max-patients", "40", "--mlm-probability", share, "--out", share]
            assert main(["train", "--data", str(workspace.prepared), *flags]) == 0
            runs[share] = read_run(Path(share))["baselines"], read_history(Path(share))["train_loss_running"]
    assert runs["0.15"][0] == runs["0.45"][0]
    assert runs["0.15"][1] != runs["0.45"][1]


def test_the_adapters_do_not_repeat_the_draws_of_the_base(workspace: Workspace) -> None:
    settings = load_experiment(flags={"data": str(workspace.prepared), "use_lora": True})
    records = select_records(open_records(settings.data), settings)
    model, _, _ = build_model(settings, records)
    adapter = next(iter(adapted_layers(model).values())).lora.A.flatten()
    table = model.behrt.embeddings.codes.weight.flatten()[: len(adapter)]
    assert torch.corrcoef(torch.stack([adapter, table]))[0, 1].abs() < 0.1


def test_fewer_patients_are_a_part_of_the_training_patients(workspace: Workspace) -> None:
    settings = load_experiment(flags={"data": str(workspace.prepared), "max_patients": 30})
    records = select_records(open_records(settings.data), settings)
    assert len(records.training_patients) == 30
    assert len(set(records.training_patients.tolist())) == 30


def test_a_pretrained_base_gives_its_losses_before_any_training(workspace: Workspace) -> None:
    for folder in (workspace.full, workspace.lora):
        settings = load_experiment(flags={"data": str(workspace.prepared), "init_from": str(folder)})
        records = select_records(open_records(settings.data), settings)
        with chdir(workspace.root):
            model, base, given = build_model(settings, records)
        assert evaluate(model, workspace).loss == pytest.approx(read_run(folder)["best_val_loss"], rel=1e-4)
        assert base.init_from_run == read_run(folder)["run_id"]
        assert given is not None
        assert (given.shared_codes, given.new_codes) == (len(records.data.vocabulary) - 5, 0)


def test_lora_on_a_pretrained_base_trains_and_comes_back(workspace: Workspace, tmp_path: Path) -> None:
    flags = ["--use-lora", "--lora-rank", "2", "--epochs", "1", "--lr", "1e-4"]
    with chdir(workspace.root):
        command = ["train", "--data", str(workspace.prepared), "--init-from", str(workspace.full), *flags]
        assert main([*command, "--out", str(tmp_path / "adapted")]) == 0
        adapted = load_run(tmp_path / "adapted")
        assert evaluate(adapted.model, workspace).loss == pytest.approx(
            read_run(tmp_path / "adapted")["best_val_loss"], rel=1e-5
        )
    assert read_run(tmp_path / "adapted")["best_val_loss"] < read_run(workspace.full)["best_val_loss"] + 0.05


def test_a_base_that_changed_is_refused(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "base"
    common = ["--data", str(workspace.prepared), "--epochs", "1", "--max-patients", "40"]
    with chdir(tmp_path):
        assert main(["train", *common, "--out", str(source)]) == 0
        (source / "run.json").unlink()  # no run id: the base is known by its folder alone
        assert main(["train", *common, "--use-lora", "--init-from", str(source), "--out", "adapted"]) == 0
        load_run("adapted")
        assert main(["train", *common, "--seed", "3", "--out", str(source)]) == 0
        capsys.readouterr()
        assert main(["train", *common, "--init-from", "adapted", "--out", "next"]) == 2
    assert "other frozen weights" in capsys.readouterr().err


def test_a_diverging_run_fails_with_exit_code_4_and_the_remedy(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with chdir(tmp_path):
        flags = ["--epochs", "3", "--lr", "1e30", "--gradient-clip", "1e30", "--max-patients", "60"]
        assert main(["train", "--data", str(workspace.prepared), *flags, "--out", "lost"]) == 4
        run = read_run(Path("lost"))
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
        assert client.get_run(run["run_id"]).info.status == "FAILED"
    assert (run["status"], run["verdict"], run["lost_to"]) == ("FAILED", "diverged", "not_finite")
    assert capsys.readouterr().err.splitlines()[-1].endswith("(not_finite), try --lr 1e30 → 0.001")


def test_an_interrupted_run_is_marked_killed_and_keeps_its_epochs(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: TerminalListener, record: object) -> None:
        if record.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TerminalListener, "epoch", interrupt)
    with chdir(tmp_path):
        flags = ["--epochs", "9", "--max-patients", "40"]
        assert main(["train", "--data", str(workspace.prepared), *flags, "--out", "stopped"]) == 130
        run = read_run(Path("stopped"))
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
        assert client.get_run(run["run_id"]).info.status == "KILLED"
        assert len(read_history(Path("stopped"))["val_loss"]) == 2
        load_run("stopped", checkpoint="last")


def test_a_tiny_cohort_whose_floor_is_not_known_everywhere_still_trains(tmp_path: Path) -> None:
    with chdir(tmp_path):
        flags = ["--num-patients", "60", "--epochs", "1", "--force", "--out", "tiny"]
        assert main(["train", "--structure", "none", *flags]) == 0
        assert read_run(Path("tiny"))["status"] == "FINISHED"


def test_a_store_that_fails_in_mid_run_costs_neither_the_run_nor_its_history(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: MlflowClient, *arguments: object, **named: object) -> None:
        raise OSError("the server is gone")

    def break_the_store(self: TerminalListener, start: object) -> None:
        monkeypatch.setattr(MlflowClient, "log_batch", fail)

    monkeypatch.setattr(TerminalListener, "started", break_the_store)
    monkeypatch.setattr(TerminalListener, "epoch", lambda self, record: None)
    with chdir(tmp_path):
        flags = ["--epochs", "2", "--max-patients", "40", "--out", "alone"]
        assert main(["train", "--data", str(workspace.prepared), *flags]) == 0
        run = read_run(Path("alone"))
        assert len(read_history(Path("alone"))["val_loss"]) == 2
        load_run("alone")
    assert (run["status"], run["tracking_complete"]) == ("FINISHED", False)
    assert [record.message for record in caplog.records if "MLflow" in record.message] != []


def test_the_last_checkpoint_of_a_run_can_be_started_from(workspace: Workspace) -> None:
    folder = workspace.full / "checkpoints" / "last"
    base = name_base(0, str(folder))
    assert (base.init_from_run, base.init_from_checkpoint) == (read_run(workspace.full)["run_id"], "last")
    with chdir(workspace.root):
        assert load_base(base).epoch == load_base_again(base).epoch == 3


def test_bf16_trains_to_about_the_loss_of_fp32(workspace: Workspace, tmp_path: Path) -> None:
    losses = []
    with chdir(tmp_path):
        for precision in ("fp32", "bf16"):
            flags = ["--epochs", "1", "--lr", "3e-3", "--precision", precision, "--out", precision]
            assert main(["train", "--data", str(workspace.prepared), *flags]) == 0
            losses.append(read_run(Path(precision))["best_val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.005)
    assert losses[0] != losses[1]


def test_sigterm_ends_a_run_as_killed_with_exit_code_143(workspace: Workspace, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "behrt", "train", "--data", str(workspace.prepared), "--epochs", "500"]
    process = subprocess.Popen([*command, "--out", "stopped"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Epoch 1/500"):
            break
    process.terminate()
    assert process.stderr.read().splitlines()[-1] == "behrt: stopped by SIGTERM"
    assert process.wait(timeout=60) == 143
    process.stderr.close()
    run = read_run(tmp_path / "stopped")
    assert run["status"] == "KILLED"
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    assert client.get_run(run["run_id"]).info.status == "KILLED"


def test_everything_trained_is_reported_as_json_on_stdout(workspace: Workspace) -> None:
    report = json.loads(workspace.full_json)
    assert report["status"] == "FINISHED"
    assert report["best_val_loss"] == read_run(workspace.full)["best_val_loss"]
    assert report["parameters"]["trainable_percent"] == 100.0
    assert isinstance(load_run(workspace.full).model, BEHRTForMaskedLM)
