"""Does a run that goes on after a cut give what the uninterrupted one would have given?"""

import shutil
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from behrt.checkpoints import drop_training
from behrt.config import ExperimentSettings, UserError, load_experiment
from behrt.history import EpochRecord, read_history, read_run
from behrt.pretrain import pretrain
from behrt.resume import find_attempt
from behrt.run_report import Listener
from behrt.runs import load_run

from .conftest import Workspace

SAME = ("train_loss", "val_loss", "val_accuracy", "gradient_norm", "train_loss_running", "learning_rate")


class CutOff(Listener):
    """Ends a run after an epoch, as a dead process would: nothing is tidied up."""

    def __init__(self, after: int) -> None:
        self._after = after

    def epoch(self, record: EpochRecord) -> None:
        if record.epoch == self._after:
            raise RuntimeError("cut off")


def settings_of(workspace: Workspace, **flags: object) -> ExperimentSettings:
    return load_experiment(
        flags={"data": str(workspace.prepared), "epochs": 4, "lr": 3e-3, "max_patients": 80, "dropout": 0.1, **flags}
    )


def cut_off(settings: ExperimentSettings, folder: Path, after: int = 2) -> None:
    with pytest.raises(RuntimeError, match="cut off"):
        pretrain(settings, experiment="cut", folder=folder, listener=CutOff(after))


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
    from mlflow import MlflowClient

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
