"""Does a run's folder hold its whole history, and does a new run leave the former one alone?"""

import json
import math
from pathlib import Path

import pytest

from behrt.config import UserError
from behrt.history import EPOCH_FIGURES, Baselines, EpochRecord, RunFolder, read_history, read_run


def record(epoch: int, **figures: float) -> EpochRecord:
    values = dict.fromkeys(EPOCH_FIGURES, 1.0) | figures
    return EpochRecord(epoch=epoch, is_best=False, epochs_without_improvement=0, **values)


def test_the_history_has_the_guides_form(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.add_epoch(record(1, train_loss=6.9))
    folder.add_epoch(record(2, train_loss=6.5))
    history = json.loads((tmp_path / "logs" / "metrics_history.json").read_text())
    assert history["train_loss"] == [{"epoch": 1, "value": 6.9}, {"epoch": 2, "value": 6.5}]
    assert set(history) == set(EPOCH_FIGURES)
    assert read_history(tmp_path) == history


def test_a_figure_that_is_not_finite_is_null_so_that_the_file_stays_json(tmp_path: Path) -> None:
    RunFolder(tmp_path).add_epoch(record(1, val_loss=math.nan, train_loss=math.inf))
    text = (tmp_path / "logs" / "metrics_history.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_history(tmp_path)["val_loss"] == [{"epoch": 1, "value": None}]


def test_a_new_run_moves_the_former_one_aside_whole(tmp_path: Path) -> None:
    for run_id in ("a" * 32, "b" * 32, "c" * 32):
        folder = RunFolder(tmp_path)
        folder.begin("note: kept\n")
        folder.add_epoch(record(1, train_loss=float(ord(run_id[0]))))
        folder.write_run(run_id=run_id)
    assert read_run(tmp_path)["run_id"] == "c" * 32
    for run_id in ("a" * 32, "b" * 32):
        earlier = tmp_path / "earlier" / run_id
        assert read_run(earlier)["run_id"] == run_id
        assert read_history(earlier)["train_loss"][0]["value"] == float(ord(run_id[0]))


def test_former_runs_without_an_id_are_kept_too(tmp_path: Path) -> None:
    for _ in range(3):
        folder = RunFolder(tmp_path)
        folder.begin("")
        folder.add_epoch(record(1))
    assert sorted(path.name for path in (tmp_path / "earlier").iterdir()) == ["run", "run-1"]


def test_the_experiment_file_of_a_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text("note: mine\n")
    RunFolder(tmp_path).begin("note: another\n")
    assert (tmp_path / "experiment.yaml").read_text() == "note: mine\n"


def test_damaged_and_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        read_history(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: is damaged"):
        read_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "file").claim()


def test_a_damaged_former_run_is_kept_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    RunFolder(tmp_path).begin("")
    assert (tmp_path / "earlier" / "run" / "run.json").read_text() == "{"


def test_two_runs_cannot_write_to_one_folder_at_once(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.claim()
    with pytest.raises(UserError, match="another run is writing there"):
        RunFolder(tmp_path).claim()
    first.release()
    second = RunFolder(tmp_path)
    second.claim()
    second.release()


def test_only_known_baselines_are_figures() -> None:
    assert "floor_loss" not in Baselines(6.9, 6.1, 0.04, floor_loss=math.nan).figures()
    assert Baselines(6.9, 6.1, 0.04).figures() == {"chance_loss": 6.9, "unigram_loss": 6.1, "unigram_accuracy": 0.04}
