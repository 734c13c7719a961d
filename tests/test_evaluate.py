"""Does `behrt evaluate` tell of a fine-tuned run what its own predictions say, and of its patients nothing?"""

import json
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from matplotlib.image import imread
from sklearn.metrics import average_precision_score, roc_auc_score
from sksurv.metrics import concordance_index_censored

from behrt.ceiling import ceiling
from behrt.cli import main
from behrt.history import read_run
from behrt.labels import write_labels
from behrt.tasks import baselines

from .conftest import Workspace


def labels_of(workspace: Workspace, outcome: str) -> Path:
    return workspace.prepared.parent / "meds" / "labels" / f"{outcome}.parquet"


@pytest.fixture(scope="module")
def runs(workspace: Workspace) -> Path:
    """`experiments/` with runs that predict `disease`, `survival` and `both`, two labels."""
    both = pl.concat(
        pl.read_parquet(labels_of(workspace, name)).with_columns(categorical_value=pl.lit(name))
        for name in ("disease", "readmission")
    )
    write_labels(workspace.root / "two.parquet", [both], ("boolean_value", "categorical_value"))
    with chdir(workspace.root):
        for task in ("disease", "survival", "two"):
            labels = labels_of(workspace, task) if task != "two" else workspace.root / "two.parquet"
            words = ["finetune", "--from", "experiments/full", "--task", task, "--labels", str(labels)]
            words += ["--data", str(workspace.prepared), "--epochs", "1", "--experiment", f"judged_{task}"]
            assert main(words) == 0
    return workspace.root / "experiments"


@pytest.fixture(scope="module")
def evaluated(runs: Path) -> Callable[..., dict[str, Any]]:
    """What `--json` says of the training patients, of whom there are more."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def ask(*words: str) -> dict[str, Any]:
        if words not in known:
            with chdir(runs.parent), redirect_stdout(StringIO()) as stdout, pytest.MonkeyPatch.context() as patch:
                patch.setattr(baselines, "MOST_TREES", 20)
                patch.setattr(baselines, "TREES_AT_ONCE", 10)
                command = ["evaluate", f"experiments/{words[0]}", "--json", "--draws", "40", *words[1:]]
                assert main(command) == 0
            known[words] = json.loads(stdout.getvalue())
        return known[words]

    return ask


DISEASE = ("judged_disease", "--split", "train")


def test_metrics_are_those_of_the_predictions_that_are_written(evaluated, runs):
    found = evaluated(*DISEASE)
    for name in ("behrt", "logistic_regression", "boosted_trees", "prevalence"):
        table = pl.read_parquet(runs.parent / found["folder"] / "predictions" / name / "predictions.parquet")
        labels, scores = table["boolean_value"].to_numpy(), table["predicted_boolean_probability"].to_numpy()
        own = found["metrics"][name]
        assert own["auroc"]["value"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
        assert own["auprc"]["value"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
        assert own["auroc"]["low"] <= own["auroc"]["value"] <= own["auroc"]["high"]
    difference = found["metrics"]["behrt"]["auroc"]["value"] - found["metrics"]["boosted_trees"]["auroc"]["value"]
    assert found["differences"]["boosted_trees"]["auroc"]["value"] == pytest.approx(difference)
    assert len(found["verdict"]) == len(found["outcomes"]) == 3


@pytest.mark.parametrize("outcome", ["disease", "survival"])
def test_beside_a_simulated_outcome_stands_its_ceiling(evaluated, workspace, outcome):
    found = evaluated(f"judged_{outcome}", "--split", "train")
    known = ceiling(workspace.prepared, labels_of(workspace, outcome), split="train")
    own = found["ceiling"]
    assert (own["reached"], own["expected"], own["bound"]) == pytest.approx(
        (known.reached, known.expected, known.bound)
    )
    assert found["metrics"]["ceiling"][found["headline"]]["value"] == pytest.approx(known.reached, abs=1e-6)
    assert own["share_expected"] == pytest.approx((own["behrt_expected"] - 0.5) / (known.expected - 0.5))


def test_survival_is_judged_by_its_concordance(evaluated, runs):
    found = evaluated("judged_survival", "--split", "train")
    table = pl.read_parquet(runs.parent / found["folder"] / "predictions" / "behrt" / "predictions.parquet")
    event, days, risk = (table[name].to_numpy() for name in ("boolean_value", "float_value", "predicted_float_value"))
    expected = concordance_index_censored(event, days, risk)[0]
    assert found["metrics"]["behrt"]["harrell_c"]["value"] == pytest.approx(expected, abs=1e-6)
    assert {"cox_regression", "boosted_trees"} < found["metrics"].keys()
    assert found["figures"] == ["survival_by_risk.png"]


def test_each_of_several_labels_is_judged(evaluated, runs):
    found = evaluated("judged_two", "--split", "train")
    own = found["metrics"]["behrt"]
    assert own["auroc"]["value"] == pytest.approx(
        (own["auroc/disease"]["value"] + own["auroc/readmission"]["value"]) / 2
    )
    assert {"f1_micro", "f1_macro"} < own.keys()
    assert found["ceiling"] is None
    written = runs.parent / found["folder"] / "predictions" / "behrt"
    assert {path.name for path in written.iterdir()} == {"disease.parquet", "readmission.parquet"}


def test_figures_are_drawn(evaluated, runs):
    found = evaluated(*DISEASE)
    assert found["figures"] == ["roc_curve.png", "precision_recall_curve.png", "calibration_curve.png"]
    for name in found["figures"]:
        assert imread(runs.parent / found["folder"] / name).std() > 0.01


def longest_list(value: Any) -> int:
    parts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return max([len(value) if isinstance(value, list) else 0, *map(longest_list, parts)])


def test_only_the_owner_reads_it_and_no_report_names_a_patient(evaluated, runs):
    found = evaluated(*DISEASE)
    folder = runs.parent / found["folder"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.rglob("*") if path.is_file())
    told = (folder / "evaluation.json").read_text() + (folder / "evaluation.md").read_text()
    assert not re.search(r"subject|prediction_time|\d{4}-\d\d-\d\d", told)
    assert longest_list(found) <= found["draws"] / 4  # nothing is listed by row
    assert json.loads((folder / "evaluation.json").read_text()) == {k: v for k, v in found.items() if k != "folder"}


def test_mlflow_gets_the_metrics_and_the_report_but_no_prediction(evaluated, runs, workspace):
    found = evaluated(*DISEASE)
    client = workspace.client()
    run_id = read_run(runs / "judged_disease")["run_id"]
    metrics = client.get_run(run_id).data.metrics
    own = found["metrics"]["behrt"]["auroc"]
    assert metrics["train/auroc"] == pytest.approx(own["value"])
    assert (metrics["train/auroc_low"], metrics["train/auroc_high"]) == pytest.approx((own["low"], own["high"]))
    assert metrics["train/auroc_over_logistic_regression"] == pytest.approx(
        found["differences"]["logistic_regression"]["auroc"]["value"]
    )
    names = {file.path for file in client.list_artifacts(run_id, "evaluation/train")}
    assert "evaluation/train/evaluation.md" in names
    assert not [name for name in names if "predictions" in name]


def test_another_evaluation_takes_the_place_of_the_former_and_is_the_latest_in_mlflow(evaluated, runs, workspace):
    former = evaluated(*DISEASE)
    run_id = read_run(runs / "judged_disease")["run_id"]
    before = workspace.client().get_run(run_id).data.metrics
    found = evaluated(*DISEASE, "--no-baselines", "--seed", "1")
    assert set(found["metrics"]) == {"behrt", "ceiling"}
    assert found["verdict"] == []
    assert found["metrics"]["behrt"]["auroc"]["low"] != former["metrics"]["behrt"]["auroc"]["low"]
    after = workspace.client().get_run(run_id).data.metrics
    assert after["train/auroc_low"] == pytest.approx(found["metrics"]["behrt"]["auroc"]["low"])
    assert after["train/evaluation"] == before["train/evaluation"] + 1
    folder = runs.parent / found["folder"]
    assert {path.name for path in (folder / "predictions").iterdir()} == {"behrt"}


def test_on_shuffled_labels_the_interval_holds_a_half(evaluated, workspace, runs):
    """The negative control of all of it: a model judged on the outcomes of other patients."""
    table = pl.read_parquet(labels_of(workspace, "disease"))
    mixed = table.with_columns(pl.col("boolean_value").shuffle(seed=3))
    write_labels(runs.parent / "mixed.parquet", [mixed], ("boolean_value",))
    found = evaluated(*DISEASE, "--labels", str(runs.parent / "mixed.parquet"), "--draws", "200", "--no-baselines")
    own = found["metrics"]["behrt"]["auroc"]
    assert own["low"] < 0.5 < own["high"]
    assert found["ceiling"] is None
    assert found["verdict"][0].startswith("The labels (mixed.parquet) are others than those that the run was")


def test_the_same_labels_in_another_place_are_no_others(evaluated, workspace, runs):
    table = pl.read_parquet(labels_of(workspace, "disease")).sample(fraction=1.0, shuffle=True, seed=1)
    write_labels(runs.parent / "moved.parquet", [table], ("boolean_value",))
    found = evaluated(*DISEASE, "--labels", str(runs.parent / "moved.parquet"), "--no-baselines")
    assert found["verdict"] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["experiments/full"],
            r"^behrt: experiments/full\S*: is of a pre-trained run, which predicts no task; [^\n]*$",
        ),
        (["experiments/nowhere"], r"^behrt: experiments/nowhere: no such folder, [^\n]*$"),
        (["experiments/judged_disease", "--labels", "two.parquet"], r"^behrt: two\.parquet: holds multilabel [^\n]*$"),
        (
            ["experiments/judged_disease", "--labels", "readmission.parquet"],
            r"^behrt: readmission\.parquet: holds labels of 'simulated readmission', and the run predicts "
            r"'simulated disease'; [^\n]*$",
        ),
    ],
)
def test_a_mistake_is_one_line(runs, workspace, capfd, words, told):
    with chdir(runs.parent):
        shutil.copy(labels_of(workspace, "readmission"), "readmission.parquet")
        assert main(["evaluate", *words]) == 2
    assert re.search(told, capfd.readouterr().err.strip())


def test_a_small_split_is_told_of_with_care(evaluated):
    """Thirty patients: groups are left out, and what has no interval is null."""
    found = evaluated("judged_disease", "--split", "held_out", "--no-baselines")
    assert found["patients"] == 30
    assert all(group["patients"] is None for group in found["subgroups"])
    assert found["figures"] == [] or np.isfinite(found["metrics"]["behrt"]["auroc"]["value"])


@pytest.mark.parametrize(("what", "flag"), [("data", "--data"), ("labels", "--labels")])
def test_records_and_labels_that_have_moved_are_asked_for(runs, capfd, what, flag):
    """As the settings of a run name them, which was trained elsewhere."""
    settings = runs / "judged_disease" / "logs" / "settings.yaml"
    whole = settings.read_text()
    settings.write_text(re.sub(rf"(?m)^  {what}: .*$", f"  {what}: gone", whole))
    try:
        with chdir(runs.parent):
            assert main(["evaluate", "experiments/judged_disease"]) == 2
    finally:
        settings.write_text(whole)
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("behrt: gone: ")
    assert flag in line
