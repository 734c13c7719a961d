"""Does a run that goes on after a cut give what the uninterrupted one would have given?"""

import math
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from behrt.checkpoints import drop_training, read_best_weights
from behrt.cli import main
from behrt.config import ExperimentSettings, UserError, load_experiment
from behrt.console import TerminalListener
from behrt.files import read_json
from behrt.history import read_history, read_run
from behrt.pretrain import pretrain
from behrt.resume import attempt_to_resume, find_attempt
from behrt.run_report import Listener
from behrt.runs import load_run
from behrt.stopper import Stopper, Terminated
from behrt.terminal import stderr_console
from behrt.trainer import LossSums, Position, Trainer

from .conftest import Workspace
from .cut_off import SAME, CutOff
from .empty_stores import copy_workspace


def settings_of(workspace: Workspace, **flags: object) -> ExperimentSettings:
    return load_experiment(
        flags={"data": str(workspace.prepared), "epochs": 4, "lr": 3e-3, "max_patients": 80, "dropout": 0.1, **flags}
    )


def cut_off(settings: ExperimentSettings, folder: Path, after: int | None = 2, *, steps: int | None = None) -> None:
    with pytest.raises(RuntimeError, match="cut off"):
        pretrain(settings, experiment="cut", folder=folder, listener=CutOff(after, steps=steps))


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_drawn() -> Iterator[None]:
    """The curves take a quarter of the time of so short a run, and are no matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr("behrt.lifecycle.draw_curves", lambda *arguments, **named: [])
        yield


@pytest.mark.parametrize("flags", [{}, {"use_lora": True, "lora_rank": 4}], ids=["full", "lora"])
def test_a_run_that_goes_on_equals_the_uninterrupted_one(
    workspace: Workspace, tmp_path: Path, flags: dict[str, object]
) -> None:
    settings = settings_of(workspace, **flags)
    with chdir(tmp_path):
        pretrain(settings, experiment="whole", folder=Path("whole"))
        cut_off(settings, Path("cut"))
        pretrain(settings, experiment="cut", folder=Path("rest"), attempt=find_attempt(Path("cut"), settings))
        whole, rest = read_history(Path("whole")), read_history(Path("rest"))
        for name in SAME:
            assert rest[name] == whole[name]
        for checkpoint in ("best", "last"):
            states = [load_run(name, checkpoint=checkpoint).model.state_dict() for name in ("whole", "rest")]
            assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert read_run(Path("rest"))["best_epoch"] == read_run(Path("whole"))["best_epoch"]


def test_without_the_optimizers_state_it_would_not_be_equal(workspace: Workspace, tmp_path: Path) -> None:
    settings = settings_of(workspace)
    with chdir(tmp_path):
        pretrain(settings, experiment="whole", folder=Path("whole"))
        cut_off(settings, Path("cut"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("behrt.checkpoints._load_optimizer", lambda *arguments: None)
            pretrain(settings, experiment="cut", folder=Path("rest"), attempt=find_attempt(Path("cut"), settings))
        assert read_history(Path("rest"))["val_loss"][:2] == read_history(Path("whole"))["val_loss"][:2]
        assert read_history(Path("rest"))["val_loss"][2:] != read_history(Path("whole"))["val_loss"][2:]


def test_epochs_that_were_taken_over_are_in_mlflow_once(workspace: Workspace, tmp_path: Path) -> None:
    settings = settings_of(workspace)
    with chdir(tmp_path):
        cut_off(settings, Path("cut"))
        result = pretrain(settings, experiment="cut", folder=Path("rest"), attempt=find_attempt(Path("cut"), settings))
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
        steps = [metric.step for metric in client.get_metric_history(result.start.run_id, "val_loss")]
    assert sorted(steps) == [1, 2, 3, 4]


def test_an_attempt_with_other_settings_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    with chdir(tmp_path):
        cut_off(settings_of(workspace), Path("cut"), after=1)
        with pytest.raises(UserError, match=r"another training\.lr"):
            find_attempt(Path("cut"), settings_of(workspace, lr=1e-3))


def test_a_folder_without_a_state_leaves_nothing_to_go_on_with(workspace: Workspace, tmp_path: Path) -> None:
    settings = load_experiment(workspace.full / "logs" / "settings.yaml")
    shutil.copytree(workspace.full, tmp_path / "copy")
    drop_training(tmp_path / "copy" / "checkpoints" / "last")
    assert find_attempt(tmp_path / "copy", settings) is None


class Prunes(Listener):
    """Finds that no epoch is worth another one."""

    def prunes(self) -> bool:
        return True


def test_a_run_whose_last_epoch_was_not_worth_another_one_does_not_get_it_by_going_on(
    workspace: Workspace, tmp_path: Path
) -> None:
    settings = settings_of(workspace)
    with chdir(tmp_path):
        cut_off(settings, Path("cut"))
        result = pretrain(
            settings,
            experiment="cut",
            folder=Path("rest"),
            attempt=find_attempt(Path("cut"), settings),
            listener=Prunes(),
        )
    assert result.pruned
    assert result.last is not None
    assert result.last.epoch == 2


# One run, in its own folder


def resume(folder: str = "cut", *flags: str, code: int = 0) -> None:
    assert main(["train", "--resume", folder, *flags]) == code


def assert_same(whole: Path, resumed: Path) -> None:
    """Bit by bit, times left out; and each epoch once in MLflow."""
    histories = [read_history(folder) for folder in (whole, resumed)]
    for name in SAME:
        assert histories[0][name] == histories[1][name]
    for checkpoint in ("best", "last"):
        states = [load_run(folder, checkpoint=checkpoint).model.state_dict() for folder in (whole, resumed)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    run_id = read_run(resumed)["run_id"]
    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/mlruns/mlflow.db")
    told = sorted((point.step, point.value) for point in client.get_metric_history(run_id, "val_loss"))
    assert told == [(point["epoch"], point["value"]) for point in histories[0]["val_loss"]]
    assert client.get_run(run_id).info.status == "FINISHED"


def settings_of_whole(workspace: Workspace) -> ExperimentSettings:
    """Of a run that keeps a checkpoint after every step."""
    return settings_of(workspace, epochs=3, batch_size=20, checkpoint_minutes=1e-9)


@pytest.fixture(scope="module")
def whole_folder(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with an uninterrupted run in `whole`."""
    root = tmp_path_factory.mktemp("whole")
    with chdir(root):
        pretrain(settings_of_whole(workspace), experiment="whole", folder=Path("whole"))
    return root


@pytest.fixture(scope="module")
def cut_folder(workspace: Workspace, whole_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, and in `cut` the run once more, cut off after six steps: half of its second epoch."""
    root = tmp_path_factory.mktemp("cut")
    copy_workspace(whole_folder, root)
    with chdir(root):
        cut_off(settings_of_whole(workspace), Path("cut"), after=None, steps=6)
    return root


@pytest.fixture
def whole(
    workspace: Workspace, whole_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ExperimentSettings:
    """The settings of the run in `whole`, below the working folder."""
    monkeypatch.chdir(tmp_path)
    copy_workspace(whole_folder, tmp_path)
    return settings_of_whole(workspace)


@pytest.fixture
def cut(workspace: Workspace, cut_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in `whole` and in `cut`, below the working folder."""
    monkeypatch.chdir(tmp_path)
    copy_workspace(cut_folder, tmp_path)


@pytest.mark.parametrize("steps", [0, 4, 11])
def test_a_run_goes_on_from_any_step_in_the_same_mlflow_run(whole: ExperimentSettings, steps: int) -> None:
    cut_off(whole, Path("cut"), after=None, steps=steps)
    before = read_run(Path("cut"))
    resume()
    assert_same(Path("whole"), Path("cut"))
    assert read_run(Path("cut"))["run_id"] == before["run_id"]
    assert read_run(Path("cut"))["best_epoch"] == read_run(Path("whole"))["best_epoch"]


@pytest.mark.usefixtures("cut")
def test_a_run_keeps_its_precision_on_a_cpu_that_would_choose_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    resume()
    assert_same(Path("whole"), Path("cut"))


def test_a_run_goes_on_from_a_pause_inside_its_evaluation(
    whole: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a signal comes while the second epoch is evaluated, its steps are not trained again."""
    stopper, evaluate = Stopper(listens=False), Trainer.evaluate

    def asked(trainer: Trainer[Any], batches: Any) -> Any:
        if trainer.position().epoch == 2:
            stopper._stop(15, None)
        return evaluate(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", asked)
        with pytest.raises(Terminated), stopper.interrupting():
            pretrain(whole, experiment="cut", folder=Path("cut"), stopper=stopper)
    assert read_run(Path("cut"))["status"] == "KILLED"
    state = read_json(Path("cut/checkpoints/last/training_state.json"), missing="")
    assert (state["position"]["epoch"], state["position"]["step"]) == (2, 4)
    resume()
    assert_same(Path("whole"), Path("cut"))


@pytest.mark.usefixtures("cut")
def test_the_last_two_checkpoints_are_kept_and_one_that_is_damaged_is_passed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (Path("cut") / "checkpoints" / "last" / "optimizer.safetensors").write_bytes(b"cut short")
    resume()
    assert "goes on from the checkpoint before it" in caplog.text
    assert_same(Path("whole"), Path("cut"))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(
    "file", ["model.safetensors", "best.safetensors", "training_state.json", "SHA256SUMS.training"]
)
def test_where_both_checkpoints_are_damaged_the_run_is_refused_and_left_as_it_is(
    capsys: pytest.CaptureFixture, file: str
) -> None:
    for damaged in Path("cut/checkpoints").glob(f"[lp]*/{file}"):
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    before = {path: path.read_bytes() for path in Path("cut").rglob("*") if path.is_file()}
    resume(code=2)
    assert "has no checkpoint to go on from" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("cut").rglob("*") if path.is_file()} == before


def test_a_run_whose_folder_is_gone_goes_on_from_mlflow_alone(
    whole: ExperimentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(whole, Path("experiments/cut"), after=None, steps=6)
    run_id = read_run(Path("experiments/cut"))["run_id"]
    shutil.rmtree("experiments")
    resume(run_id)
    assert_same(Path("whole"), Path("experiments/cut"))
    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/mlruns/mlflow.db")
    assert "resume" not in {found.path for found in client.list_artifacts(run_id)}  # finished, it needs none any more
    shutil.rmtree("experiments")
    resume(run_id, code=2)


@pytest.mark.usefixtures("cut")
def test_other_settings_are_refused_with_what_differs(capsys: pytest.CaptureFixture) -> None:
    resume("cut", "--lr", "1e-4", "--batch-size", "8", code=2)
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "training.batch_size 20 -> 8, training.lr 0.003 -> 0.0001" in line
    assert "--epochs, --early-stopping-patience, --device" in line
    resume("cut", "--preset", "m1", code=2)
    resume("cut", "--out", "elsewhere", code=2)
    assert "goes on where it is" in capsys.readouterr().err
    resume("cut", "--experiment", "another", code=2)


def test_more_epochs_go_on_with_a_finished_run_and_say_what_becomes_of_the_schedule(
    whole: ExperimentSettings, capsys: pytest.CaptureFixture
) -> None:
    resume("whole", code=2)
    assert "all 3 epochs are trained; for more of them say --epochs 6" in capsys.readouterr().err
    resume("whole", "--epochs", "5")
    said = capsys.readouterr().err
    assert "training.epochs 3 -> 5" in said
    assert "the learning rate after epoch 3 is" in said
    history = read_history(Path("whole"))
    assert [point["epoch"] for point in history["val_loss"]] == [1, 2, 3, 4, 5]
    assert history["learning_rate"][3]["value"] < history["learning_rate"][0]["value"]
    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/mlruns/mlflow.db")
    tracked = client.get_run(read_run(Path("whole"))["run_id"])
    assert tracked.data.params["training.epochs"] == "3"  # MLflow's parameters cannot change
    assert tracked.data.tags["resumed_with"].startswith("training.epochs 3 -> 5")


@pytest.mark.usefixtures("cut")
def test_other_records_of_the_same_name_are_refused(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(workspace.prepared, tmp_path / "moved")
    resume("cut", "--data", "moved", "--epochs", "2")
    assert main(["simulate", "--patients", "300", "--seed", "5", "--out", "meds"]) == 0
    assert main(["prepare", "meds", "--format", "meds", "--out", "others"]) == 0
    resume("cut", "--data", "others", "--epochs", "3", code=2)
    assert "holds other records" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["nowhere", "0" * 32, "."])
def test_what_is_no_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    resume(target, code=2)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not Path("experiments").exists()


# Faults of the computation


def spoil_a_step(monkeypatch: pytest.MonkeyPatch, *epochs: int) -> None:
    """Makes the loss of a step of these epochs no number, each once."""
    from behrt import pretrain as recipe

    whole_loss, left = recipe.masked_lm_loss, list(epochs)
    positions: list[Position] = []
    step = Trainer._train_step

    def train_step(trainer: Trainer[Any], micro_batches: list[Any]) -> bool:
        positions.append(trainer.position())
        try:
            return step(trainer, micro_batches)
        finally:
            positions.clear()

    def loss(model: torch.nn.Module, batch: Any) -> LossSums:
        sums = whole_loss(model, batch)
        if positions and positions[0].step == 1 and left and positions[0].epoch == left[0]:
            left.pop(0)
            return sums._replace(loss=sums.loss * math.nan)
        return sums

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    monkeypatch.setattr(recipe, "masked_lm_loss", loss)


def test_a_loss_that_is_no_number_is_recovered_from_with_a_tenth_of_the_rate(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_of(workspace, recover=True, schedule="constant", warmup_fraction=0)
    spoil_a_step(monkeypatch, 1, 3)
    result = pretrain(settings, experiment="run", folder=Path("run"), listener=TerminalListener(stderr_console()))
    assert (result.status, result.recoveries) == ("FINISHED", 2)
    rates = [point["value"] for point in read_history(Path("run"))["learning_rate"]]
    assert rates == pytest.approx([3e-4, 3e-4, 3e-5, 3e-5])
    said = capsys.readouterr().err
    assert "Epoch 1: a loss is no number; back to the start" in said
    assert "Epoch 3: a loss is no number; back to the checkpoint after epoch 2" in said
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    assert result.run_id is not None
    assert sorted(point.step for point in client.get_metric_history(result.run_id, "learning_rate")) == [1, 2, 3, 4]


def test_it_is_recovered_from_twice_and_no_more(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil_a_step(monkeypatch, 2, 2, 3)
    result = pretrain(settings_of(workspace, recover=True), experiment="run", folder=Path("run"))
    assert (result.status, result.recoveries) == ("FAILED", 2)
    assert result.diagnosis.verdict == "diverged"
    assert find_attempt(Path("run"), settings_of(workspace, recover=True)) is not None  # the last good one stands


def test_without_being_asked_for_nothing_is_recovered(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil_a_step(monkeypatch, 2)
    result = pretrain(settings_of(workspace), experiment="run", folder=Path("run"))
    assert (result.status, result.recoveries, result.diagnosis.verdict) == ("FAILED", 0, "diverged")


# What a reader of the code found


def test_a_run_that_was_killed_after_its_last_epoch_is_brought_to_its_end(whole: ExperimentSettings) -> None:
    cut_off(whole, Path("cut"), after=3)
    assert read_run(Path("cut"))["status"] == "FAILED"
    resume()
    assert_same(Path("whole"), Path("cut"))
    assert read_run(Path("cut"))["status"] == "FINISHED"


def test_a_lora_run_goes_on_over_the_base_that_it_was_begun_on(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that `--init-from` named holds another run by then: the very one that goes on."""
    monkeypatch.chdir(tmp_path)
    pretrain(settings_of(workspace, epochs=1), experiment="m", folder=Path("experiments/m"))
    lora = settings_of(workspace, epochs=3, use_lora=True, lora_rank=4, init_from="experiments/m")
    cut_off(lora, Path("experiments/m"), after=1)
    resume("experiments/m")
    for checkpoint in ("best", "last"):
        assert load_run("experiments/m", checkpoint=checkpoint).base.init_from_run is not None


def test_best_weights_of_another_checkpoint_in_the_same_place_are_not_taken(whole: ExperimentSettings) -> None:
    """As in a place of MLflow's artifacts, where an upload replaces files and removes none."""
    cut_off(whole, Path("cut"), after=1)
    last = Path("cut/checkpoints/last")
    assert not (last / "best.safetensors").exists()  # it is the best itself
    save_file({"head.decoder.bias": torch.zeros(3)}, last / "best.safetensors")
    assert read_best_weights(last) == {}
    resume()
    assert_same(Path("whole"), Path("cut"))


@pytest.mark.usefixtures("cut")
def test_the_only_whole_checkpoint_is_never_the_one_that_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    (Path("cut") / "checkpoints" / "last" / "optimizer.safetensors").write_bytes(b"cut short")
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if Path(target).name == "last":  # as by kill -9 between the renames: nothing that follows is done
            raise SystemExit
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(SystemExit):
            main(["train", "--resume", "cut"])
    resume()
    assert_same(Path("whole"), Path("cut"))


def test_a_history_without_a_checkpoint_is_not_begun_anew(
    whole: ExperimentSettings, capsys: pytest.CaptureFixture
) -> None:
    shutil.rmtree("whole/checkpoints")
    before = read_history(Path("whole"))
    resume("whole", "--epochs", "9", code=2)
    assert "no checkpoint to go on from" in capsys.readouterr().err
    assert read_history(Path("whole")) == before


def test_a_run_that_was_lost_recovers_when_it_goes_on_with_recover(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        spoil_a_step(patch, 2)
        assert pretrain(settings_of(workspace), experiment="run", folder=Path("run")).status == "FAILED"
    spoil_a_step(monkeypatch, 2)
    resume("run", "--recover")
    about = read_run(Path("run"))
    assert (about["status"], about["recoveries"], about["epochs"]) == ("FINISHED", 1, 4)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    told = {point.step: point.value for point in client.get_metric_history(about["run_id"], "learning_rate")}
    assert told == {point["epoch"]: point["value"] for point in read_history(Path("run"))["learning_rate"]}


@pytest.mark.usefixtures("cut")
def test_mlflow_knows_the_best_epoch_of_a_run_that_went_on() -> None:
    resume()
    client = MlflowClient(tracking_uri=f"sqlite:///{Path.cwd()}/mlruns/mlflow.db")
    about = read_run(Path("cut"))
    metrics = client.get_run(about["run_id"]).data.metrics
    assert (metrics["best_epoch"], metrics["best_val_loss"]) == (about["best_epoch"], about["best_val_loss"])
    assert about["best_epoch"] > 1


def test_a_folder_that_another_process_went_on_with_is_read_again(whole: ExperimentSettings) -> None:
    """The state is looked at before the folder is held: by then there may be another one."""
    cut_off(whole, Path("cut"), after=None, steps=5)
    stale = attempt_to_resume("cut", lambda state: Path("cut"))
    fresh = attempt_to_resume("cut", lambda state: Path("cut"))
    with pytest.raises(RuntimeError, match="cut off"):
        pretrain(whole, experiment="cut", folder=Path("cut"), attempt=fresh, listener=CutOff(None, steps=2))
    pretrain(whole, experiment="cut", folder=Path("cut"), attempt=stale)
    assert_same(Path("whole"), Path("cut"))
