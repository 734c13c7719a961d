"""Does a killed process leave what goes on to the uninterrupted result? The quick version of `make soak`."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from behrt.cli import main
from behrt.config import TrainingSettings
from behrt.files import read_json, write_json
from behrt.history import EpochRecord, read_history, read_run
from behrt.keeping import Keeper
from behrt.pretrain import pretrain
from behrt.run_report import Listener
from behrt.trainer import Trainer

from .conftest import Workspace
from .empty_stores import lay_store
from .test_resume import settings_of
from .test_trainer import Steps, points, regression, squared_error

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kills() -> Iterator[ModuleType]:
    """The harness of `experiments/reliability`, by the name under which its own processes import it.

    The path stays for as long: processes take it over, also from a fork server that another test began without it.
    """
    folder = str(ROOT / "experiments" / "reliability")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import kills

        yield kills


def test_a_training_that_is_killed_again_and_again_ends_as_the_uninterrupted_one(
    kills: ModuleType, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "experiments" / "reliability"))
    flags = ["--data", str(prepared), "--epochs", "5", "--lr", "3e-3", "--batch-size", "8", "--max-patients", "120"]
    flags += ["--use-lora", "--lora-rank", "4", "--checkpoint-minutes", "0.01"]
    for way in ("whole", "killed"):
        lay_store(tmp_path / "lora" / way)
    found = kills.kill_trainings(tmp_path, {"lora": flags}, kills=2, longest=4.0)["lora"]
    assert found["differences"] == []
    assert found["kills"] >= 1  # a fast machine is done before it was killed three times
    assert found["epochs"] == 5


def test_a_difference_of_one_bit_one_figure_or_one_step_is_found(
    kills: ModuleType, workspace: Workspace, tmp_path: Path
) -> None:
    def spoiled(name: str) -> Path:
        folder = tmp_path / name / "experiments" / "lora"
        shutil.copytree(workspace.lora, folder)
        shutil.copytree(workspace.root / "mlruns", tmp_path / name / "mlruns")
        return folder

    assert kills.differences(workspace.lora, spoiled("same")) == []
    history = spoiled("figure") / "logs" / "metrics_history.json"
    values = read_json(history, missing="")
    values["val_loss"][1]["value"] *= 1 + 1e-15
    write_json(history, values)
    assert kills.differences(workspace.lora, history.parents[1]) == ["history of val_loss"]
    weights = spoiled("bit") / "checkpoints" / "last" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (difference,) = kills.differences(workspace.lora, weights.parents[2])
    assert difference.startswith("last adapter_model.safetensors")
    twice = spoiled("step")
    with chdir(twice.parents[1]):
        from behrt.tracking import connect

        connect().log_metric(read_run(twice)["run_id"], "val_loss", read_history(twice)["val_loss"][0]["value"], step=1)
    assert "steps of val_loss in MLflow" in kills.differences(workspace.lora, twice)


def test_preparing_that_is_killed_starts_anew_and_gives_the_same_bytes(kills: ModuleType, tmp_path: Path) -> None:
    assert main(["simulate", "--patients", "1000", "--out", str(tmp_path / "meds")]) == 0
    found = kills.kill_prepare(tmp_path / "prepare", tmp_path / "meds", kills=2, longest=0.1)
    assert found["differences"] == []
    assert found["kills"] == 2


@pytest.mark.parametrize("remains", [".records.1.spill", ".records.2.partial", ".records.3.former"])
def test_what_a_killed_preparation_has_left_is_removed_by_the_next(
    prepared: Path, tmp_path: Path, remains: str
) -> None:
    (tmp_path / remains / "deep").mkdir(parents=True)
    (tmp_path / remains / "deep" / "file").write_text("somebody's records")
    assert main(["prepare", str(prepared.parent / "meds"), "--format", "meds", "--out", str(tmp_path / "records")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


def test_records_that_were_being_replaced_come_back(prepared: Path, tmp_path: Path) -> None:
    """Killed between the two renames, a preparation leaves the former records aside, and none in their place."""
    shutil.copytree(prepared, tmp_path / ".records.1.former" / "records")
    source = str(prepared.parent / "meds")
    assert main(["prepare", source, "--format", "meds", "--out", str(tmp_path / "records")]) == 2  # they are there
    assert (tmp_path / "records" / "dataset.json").read_bytes() == (prepared / "dataset.json").read_bytes()


def test_a_disk_that_is_full_costs_one_line_and_not_the_checkpoint_before(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """No file may grow beyond a size that the weights do not fit in, once the first checkpoint is there."""
    monkeypatch.chdir(tmp_path)
    add_epoch = Keeper.add_epoch

    def fills(keeper: Keeper, record: EpochRecord) -> None:
        if record.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
        add_epoch(keeper, record)

    flags = ["--data", str(workspace.prepared), "--max-patients", "60", "--epochs", "3", "--experiment", "a"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Keeper, "add_epoch", fills)
            assert main(["train", *flags]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err.strip()
    line = said.splitlines()[-1]
    assert "Traceback" not in said
    assert "cannot be written" in line
    assert "make room, then behrt train --resume experiments/a" in line
    assert read_json(Path("experiments/a/checkpoints/last/training_state.json"), missing="")["position"]["epoch"] == 2
    assert main(["train", "--resume", "experiments/a"]) == 0
    assert read_run(Path("experiments/a"))["epochs"] == 3


class Told(Listener):
    """Notes what is said of memory."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def memory_short(self, accumulation_steps: int) -> None:
        self.steps.append(accumulation_steps)


def test_where_memory_runs_out_batches_are_halved_and_the_run_goes_on(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for two rows at a time, in training and in evaluation; without dropout the losses are the same."""
    from behrt import pretrain as recipe

    monkeypatch.chdir(tmp_path)
    settings = settings_of(workspace, epochs=2, dropout=0.0)
    roomy = pretrain(settings, experiment="roomy", folder=Path("roomy"))
    whole_loss, told = recipe.masked_lm_loss, Told()

    def short(model: torch.nn.Module, batch: Any) -> Any:
        if len(batch.codes) > 2 and not torch.is_inference_mode_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(batch.codes) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return whole_loss(model, batch)

    monkeypatch.setattr(recipe, "masked_lm_loss", short)
    result = pretrain(settings, experiment="short", folder=Path("short"), listener=told, force=True)
    assert result.status == "FINISHED"
    assert told.steps == [2, 4, 8, 16, 32][: len(told.steps)]
    assert told.steps[-1] == result.accumulation_steps == read_run(Path("short"))["accumulation_steps"]
    assert result.best is not None
    assert roomy.best is not None
    assert result.best.val_loss == pytest.approx(roomy.best.val_loss, rel=1e-4)


def test_memory_that_does_not_suffice_for_one_patient_is_the_end() -> None:
    def never(model: torch.nn.Module, batch: Any) -> Any:
        raise torch.OutOfMemoryError

    settings = TrainingSettings(epochs=1, batch_size=1, early_stopping_patience=0)
    one = points(1, 0)
    trainer = Trainer(
        regression(), never, steps=Steps([[one]]), train_evaluation=[one], validation=[one], settings=settings,
        device=torch.device("cpu"),
    )  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError):
        next(trainer.epochs())


def test_a_step_that_memory_ran_out_over_is_taken_once() -> None:
    """The gradients of the parts that fitted before it ran out do not count twice."""
    settings = TrainingSettings(epochs=1, batch_size=2, accumulation_steps=1, early_stopping_patience=0)
    halves = [points(4, 1), points(4, 2)]
    calls = 0

    def fails_once(model: torch.nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += model.training
        if model.training and calls == 1:
            (1000 * model.weight.sum()).backward()  # of another direction: Adam's first step knows no size
            raise torch.OutOfMemoryError
        return squared_error(model, batch)

    models = [regression(), regression()]
    for model, loss in zip(models, (squared_error, fails_once), strict=True):
        steps = Steps([[halves[0]]])
        trainer = Trainer(
            model, loss, steps=steps, train_evaluation=halves, validation=halves, settings=settings,
            device=torch.device("cpu"),
        )  # fmt: skip
        list(trainer.epochs())
    assert torch.equal(models[0].weight, models[1].weight)
