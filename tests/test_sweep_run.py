"""Does a finished study leave in Optuna, in MLflow and on the disk what it promises, and can it be used?"""

import json
import math
from contextlib import chdir
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from mlflow.entities import Run
from rich.console import Console

from behrt.cli import main
from behrt.config import load_experiment
from behrt.history import read_history, read_run
from behrt.sweep.storage import open_storage
from behrt.sweep.study import SweepStudy
from behrt.sweep.summary import StudySummary
from behrt.sweep.trials import TrialState
from behrt.sweep_console import LINES_AROUND, trials_table

from .small_sweeps import (
    WIDE_SPACE,
    assert_optuna_and_mlflow_agree,
    behrt,
    client_of,
    runs_of,
    trials_of,
    write_sweep,
)

FIGURES = {"history", "intermediate_values", "importances", "slice", "parallel_coordinates", "pair"}


@dataclass(frozen=True)
class Finished:
    """A study that has ended, with complete and pruned trials."""

    root: Path
    file: Path
    printed: dict[str, Any]
    trials: list[optuna.trial.FrozenTrial]
    parent: Run
    runs: dict[int, Run]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Finished:
    """One worker, so that its trials are the same each time."""
    root = tmp_path_factory.mktemp("study")
    pruner = {"name": "median", "startup_trials": 2, "warmup_epochs": 1}
    file = write_sweep(root / "s.yaml", prepared, space=WIDE_SPACE, pruner=pruner, budget={"trials": 8}, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        printed = behrt(root, "sweep", "run", "s.yaml")
    return Finished(root, file, printed, trials_of(root, "s"), *runs_of(root, "s"))


def trials_in(study: Finished, state: str) -> list[optuna.trial.FrozenTrial]:
    found = [trial for trial in study.trials if trial.state.name == state]
    assert found
    return found


def test_the_study_has_the_trials_that_were_asked_for(study: Finished) -> None:
    assert [trial.number for trial in study.trials] == list(range(8))
    assert {trial.state.name for trial in study.trials} == {"COMPLETE", "PRUNED"}
    assert study.printed["finished"] == 8


def test_every_trial_is_in_mlflow_as_what_it_is(study: Finished) -> None:
    assert set(study.runs) == {trial.number for trial in study.trials}
    assert_optuna_and_mlflow_agree(study.root, "s")


def test_a_trials_run_has_its_parameters_and_its_curve(study: Finished) -> None:
    client = client_of(study.root)
    for trial in study.trials:
        run = study.runs[trial.number]
        names = {"dropout": "model", "lora_rank": "adaptation", "weight_decay": "training", "lr": "training"}
        for name, section in names.items():
            assert float(run.data.params[f"{section}.{name}"]) == trial.params[name]
        logged = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "val_loss")}
        assert logged == trial.intermediate_values
        assert trial.user_attrs["run_id"] == run.info.run_id


def test_the_objective_is_the_best_val_loss(study: Finished) -> None:
    for trial in trials_in(study, "COMPLETE"):
        assert trial.value == min(trial.intermediate_values.values())
        assert study.runs[trial.number].data.metrics["best_val_loss"] == trial.value


def test_a_pruned_trial_ended_early_and_says_so(study: Finished) -> None:
    for trial in trials_in(study, "PRUNED"):
        assert len(trial.intermediate_values) < 3
        assert trial.user_attrs["ended"] == "pruned"
    for trial in trials_in(study, "COMPLETE"):
        assert len(trial.intermediate_values) == 3
        assert trial.user_attrs["ended"] == "all epochs"


def test_a_trial_leaves_what_a_training_run_leaves(study: Finished) -> None:
    client = client_of(study.root)
    for trial in study.trials:
        folder = study.root / trial.user_attrs["folder"]
        assert read_run(folder)["trial"]["number"] == trial.number
        losses = {point["epoch"]: point["value"] for point in read_history(folder)["val_loss"]}
        assert losses == trial.intermediate_values
        assert (folder / "checkpoints" / "best" / "checkpoint.json").exists()
        assert not list(folder.rglob("optimizer.safetensors"))
        curves = {"plots/loss_curve.png", "plots/accuracy_curve.png"}
        assert all((folder / curve).exists() for curve in curves)
        assert {file.path for file in client.list_artifacts(trial.user_attrs["run_id"], "plots")} == curves


def test_the_studys_run_has_space_sampler_pruner_and_the_best_value_as_it_improved(study: Finished) -> None:
    params = study.parent.data.params
    assert study.parent.info.status == "FINISHED"
    assert (params["sampler"], params["pruner"]) == ("random", "median")
    assert "0.0001" in params["space.lr"]
    best = study.printed["best"]
    assert study.parent.data.tags["best_trial"] == str(best["number"])
    assert study.parent.data.tags["best_run_id"] == best["run_id"]
    metrics = client_of(study.root).get_metric_history(study.parent.info.run_id, "best_val_loss")
    expected, best = {}, math.inf
    for step, trial in enumerate(study.trials, start=1):
        if trial.state.name == "COMPLETE" and trial.value is not None and trial.value < best:
            expected[step] = best = trial.value
    assert {metric.step: metric.value for metric in metrics} == expected


def test_the_figures_are_artifacts_of_the_studys_run(study: Finished) -> None:
    artifacts = client_of(study.root).list_artifacts(study.parent.info.run_id, "plots")
    assert {Path(artifact.path).stem for artifact in artifacts} <= FIGURES
    assert {Path(artifact.path).stem for artifact in artifacts} >= FIGURES - {"importances"}


def test_status_and_best_say_what_optuna_says(study: Finished) -> None:
    told = behrt(study.root, "sweep", "status", "s")
    assert [trial["number"] for trial in told["trials"]] == [trial.number for trial in study.trials]
    best = min(trials_in(study, "COMPLETE"), key=lambda trial: trial.value or math.inf)
    assert told["best"] == behrt(study.root, "sweep", "best", "s")
    assert (told["best"]["number"], told["best"]["value"]) == (best.number, best.value)
    assert told["best"]["params"] == best.params


def test_the_exported_experiment_trained_again_gives_the_trials_value(study: Finished) -> None:
    best = behrt(study.root, "sweep", "best", "s")
    with chdir(study.root):
        assert main(["sweep", "export", "s", "--to", "experiments/best_of_s"]) == 0
    again = behrt(study.root, "train", "experiments/best_of_s/experiment.yaml")
    assert again["best_val_loss"] == pytest.approx(best["value"], rel=1e-6)
    assert read_history(study.root / "experiments" / "best_of_s")["val_loss"] == [
        {"epoch": epoch, "value": pytest.approx(value, rel=1e-6)}
        for epoch, value in study.trials[best["number"]].intermediate_values.items()
    ]
    exported = load_experiment(study.root / "experiments" / "best_of_s" / "experiment.yaml")
    assert (exported.training.lr, exported.adaptation.lora_rank) == (best["params"]["lr"], best["params"]["lora_rank"])


def test_plot_draws_the_figures_anew(study: Finished, tmp_path: Path) -> None:
    with chdir(study.root):
        assert main(["sweep", "plot", "s", "--out", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {
        path.stem for path in (study.root / "sweeps" / "s" / "plots").iterdir()
    }


def test_the_same_command_again_adds_nothing_and_more_trials_add_just_those(
    study: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last of what looks at the study: it changes it. Drawing it thrice would take longer than the rest."""
    monkeypatch.setattr("behrt.sweep.coordinator.draw_study", lambda *arguments: [])
    again = behrt(study.root, "sweep", "run", "s.yaml")
    assert again["trials"] == study.printed["trials"]
    assert len(runs_of(study.root, "s")[1]) == 8
    more = behrt(study.root, "sweep", "run", "s.yaml", "--trials", "9", "--resume")
    assert more["trials"][:8] == study.printed["trials"]
    assert (len(more["trials"]), more["finished"]) == (9, 9)
    fewer = behrt(study.root, "sweep", "run", "s.yaml", "--trials", "2")
    assert len(fewer["trials"]) == 9
    assert_optuna_and_mlflow_agree(study.root, "s")


def test_a_trial_that_the_doctor_refuses_is_pruned_with_its_reason(tmp_path: Path, prepared: Path) -> None:
    """Frozen random embeddings cannot learn; the other half of the grid can."""
    space = {"train_embeddings": {"type": "categorical", "choices": [True, False]}}
    write_sweep(
        tmp_path / "s.yaml", prepared, space=space, sampler="grid", budget={"trials": 2}, settings={"epochs": 1}
    )
    told = behrt(tmp_path, "sweep", "run", "s.yaml")
    ended = {trial["params"]["train_embeddings"]: (trial["state"], trial["ended"]) for trial in told["trials"]}
    assert ended[True] == ("COMPLETE", "all epochs")
    assert ended[False][0] == "PRUNED"
    assert ended[False][1].startswith("refused: ")
    assert_optuna_and_mlflow_agree(tmp_path, "s")
    refused = next(trial for trial in told["trials"] if not trial["params"]["train_embeddings"])
    assert runs_of(tmp_path, "s")[1][refused["number"]].data.tags["severity"] == "error"


def test_a_study_whose_trials_are_all_refused_is_given_up(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture
) -> None:
    write_sweep(tmp_path / "s.yaml", prepared, settings={"train_embeddings": False}, budget={"trials": 20})
    with chdir(tmp_path):
        assert main(["sweep", "run", "s.yaml"]) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert "given up: the first 5 trials were all refused" in error
    assert 5 <= len(trials_of(tmp_path, "s")) < 10
    assert runs_of(tmp_path, "s")[0].info.status == "FAILED"


def test_a_plain_optuna_study_is_what_the_storage_holds(study: Finished) -> None:
    """What dashboards and other tools rely on."""
    storage = f"sqlite:///{study.root}/sweeps/studies.db"
    plain = optuna.load_study(study_name="s", storage=storage)
    assert plain.direction == optuna.study.StudyDirection.MINIMIZE
    assert plain.best_value == study.printed["best"]["value"]
    json.dumps(plain.user_attrs)
    plain._storage.remove_session()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "none.yaml"], "none.yaml"),
        (["run", "s.yaml", "--resume", "--study", "other"], "other: no such study"),
        (["run", "s.yaml", "--storage", "mysql://host/a"], "--storage"),
        (["run", "s.yaml", "--lr", "1"], "--lr"),
        (["run", "s.yaml", "--data", "nowhere"], "nowhere"),
        (["status", "t"], "t: no such study"),
        (["best", "t"], "t: no such study"),
        (["plot", "t"], "t: no such study"),
        (["export", "t", "--to", "a"], "t: no such study"),
        (["export", "s", "--to", "a", "--trial", "99"], "--trial: 99"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(
    study: Finished, capsys: pytest.CaptureFixture, words: list[str], said: str
) -> None:
    before = trials_of(study.root, "s")
    with chdir(study.root):
        assert main(["sweep", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1]
    assert sum(line.startswith("behrt") for line in lines) == 1
    assert trials_of(study.root, "s") == before


def test_a_study_without_a_complete_trial_is_drawn_and_refused_as_lost(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture
) -> None:
    """All trials diverge: the doctor ends them after an epoch."""
    space = {"lr": {"type": "float", "low": 1e5, "high": 1e6, "log": True}}
    write_sweep(tmp_path / "s.yaml", prepared, space=space, budget={"trials": 2}, settings={"gradient_clip": 1e9})
    with chdir(tmp_path):
        assert main(["sweep", "run", "s.yaml"]) == 4
    assert "no trial is complete" in capsys.readouterr().err.splitlines()[-1]
    told = behrt(tmp_path, "sweep", "status", "s")
    assert {trial["state"] for trial in told["trials"]} == {"PRUNED"}
    assert all(trial["ended"].startswith("lost: ") for trial in told["trials"])
    assert_optuna_and_mlflow_agree(tmp_path, "s")
    assert runs_of(tmp_path, "s")[0].info.status == "FINISHED"


@pytest.mark.parametrize("flags", [["--device", "cuda"], ["--data", "nowhere"]])
def test_what_no_trial_could_be_trained_with_is_refused_before_there_is_a_study(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture, flags: list[str]
) -> None:
    if flags[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    write_sweep(tmp_path / "s.yaml", prepared)
    with chdir(tmp_path):
        assert main(["sweep", "run", "s.yaml", *flags]) == 2
    assert flags[1] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_its_terminal_and_shows_what_runs(study: Finished, width: int) -> None:
    with chdir(study.root):
        opened = SweepStudy.open("s", open_storage(None))
    summary = StudySummary.of(opened)
    running = replace(summary.records[0], number=8, state=TrialState.RUNNING)
    summary = replace(summary, records=[*summary.records, running])
    console = Console(width=width, file=StringIO())
    console.print(trials_table(summary, width=width, rows=3))
    lines = console.file.getvalue().splitlines()
    assert len(lines) <= 3 + LINES_AROUND + 2
    shown = [line for line in lines if any(state in line for state in TrialState)]
    assert len(shown) == 3
    assert any("RUNNING" in line for line in shown)
    assert any(f"{summary.best.best:.4f} *" in line for line in shown)
