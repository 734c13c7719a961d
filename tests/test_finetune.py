"""Does a fine-tuning, from the command line to its predictions, do what it promises, and see only what it may?"""

import json
import math
import shutil
import stat
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from behrt.cli import main
from behrt.config import FinetuneSettings, UserError
from behrt.feeding import TrackingRecord
from behrt.finetune import finetune as recipe
from behrt.finetune_settings import finetune_settings
from behrt.history import read_history, read_run
from behrt.labels import write_labels
from behrt.lifecycle import train_epochs
from behrt.model import BEHRT
from behrt.runs import load_run
from behrt.sequences import PreparedData, PreparedSplit, open_prepared
from behrt.tasks.example_batches import ExampleLayout, ExampleSet
from behrt.tasks.examples import Examples, read_examples
from behrt.tasks.finetuned import embed, load_finetuned, predict
from behrt.tasks.metrics import auroc

from .conftest import Workspace
from .cut_off import SAME, CutOff
from .small_records import BIRTH, day, events, write_meds


def labels_of(workspace: Workspace, outcome: str) -> Path:
    return workspace.prepared.parent / "meds" / "labels" / f"{outcome}.parquet"


def finetune(workspace: Workspace, *options: str, outcome: str = "disease", run: str = "experiments/full") -> int:
    with chdir(workspace.root):
        return main([
            "finetune", "--from", run, "--task", outcome, "--labels", str(labels_of(workspace, outcome)),
            "--data", str(workspace.prepared), "--epochs", "1", "--batch-size", "64", *options,
        ])  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """Fine-tuned runs of the workspace."""

    workspace: Workspace

    def __getitem__(self, name: str) -> Path:
        return self.workspace.root / "experiments" / name


@pytest.fixture(scope="module")
def runs(workspace: Workspace) -> Runs:
    two_names = pl.concat(
        pl.read_parquet(labels_of(workspace, name)).with_columns(categorical_value=pl.lit(name))
        for name in ("disease", "readmission")
    )
    two_names = two_names.filter(~((pl.col("categorical_value") == "disease") & (pl.col("subject_id") % 3 == 0)))
    write_labels(workspace.root / "both.parquet", [two_names], ("boolean_value", "categorical_value"))
    assert finetune(workspace, "--experiment", "adapted", "--lr", "3e-3", "--epochs", "2") == 0
    assert finetune(workspace, "--experiment", "whole", "--no-use-lora", "--class-weights", "balanced") == 0
    assert finetune(workspace, "--experiment", "probe", "--no-use-lora", "--freeze-base") == 0
    assert finetune(workspace, "--experiment", "scratch", "--from-scratch", "--max-labels", "50", "--seed", "3") == 0
    assert finetune(workspace, "--experiment", "on_lora", run="experiments/lora", outcome="survival") == 0
    both = ["--experiment", "both", "--labels", "both.parquet"]
    assert finetune(workspace, *both) == 0
    return Runs(workspace)


@pytest.fixture
def here(workspace: Workspace) -> Iterator[None]:
    with chdir(workspace.root):
        yield


def encoder_of(folder: Path) -> BEHRT:
    return load_run(folder).model.behrt


# What is trained and kept


def test_adapters_and_head_are_kept_and_nothing_of_the_base(runs: Runs, here: None) -> None:
    best = runs["adapted"] / "checkpoints" / "best"
    saved = load_file(best / "adapter_model.safetensors")
    parts = {name.removeprefix("base_model.model.").split(".lora_")[0].rpartition(".")[2] for name in saved}
    assert parts == {"query", "key", "value", "output", "weight", "bias"}
    assert {name for name in saved if "lora_" not in name} == {
        f"base_model.model.head.linear.{name}" for name in ("weight", "bias")
    }
    assert sum(file.stat().st_size for file in best.iterdir()) < 300_000
    assert json.loads((best / "adapter_config.json").read_text())["modules_to_save"] == ["head"]


def test_the_frozen_encoder_is_that_of_the_pretraining_run(runs: Runs, here: None) -> None:
    expected = encoder_of(runs["full"]).state_dict()
    for name in ("adapted", "probe"):
        found = load_finetuned(runs[name]).model.behrt.state_dict()
        for key, value in found.items():
            if ".lora." not in key:
                torch.testing.assert_close(value, expected[key.replace(".base.", ".")], rtol=0, atol=0)


def test_each_mode_trains_its_own_part(runs: Runs, here: None) -> None:
    counts = {name: read_run(runs[name])["parameters"] for name in ("adapted", "whole", "probe", "scratch")}
    assert counts["adapted"]["trainable"] == counts["adapted"]["lora"] + counts["adapted"]["head"]
    assert counts["probe"]["trainable"] == counts["probe"]["head"] == 257
    assert counts["whole"]["trainable"] == counts["whole"]["total"] == counts["scratch"]["trainable"]
    assert {name: read_run(runs[name])["settings"]["adaptation"]["init_from"] for name in ("adapted", "scratch")} == {
        "adapted": "experiments/full",
        "scratch": None,
    }


def test_from_scratch_has_the_shape_of_the_run_and_none_of_its_weights(runs: Runs, here: None) -> None:
    base, fresh = encoder_of(runs["full"]), load_finetuned(runs["scratch"]).model.behrt
    assert fresh.config == base.config
    table, other = base.embeddings.codes.weight.flatten(), fresh.embeddings.codes.weight.flatten()
    assert abs(np.corrcoef(table.detach(), other.detach())[0, 1]) < 0.05
    assert read_run(runs["scratch"])["task"]["labels"]["train"] == 50


def test_training_begins_at_the_linear_probe_of_the_encoder(workspace: Workspace, here: None) -> None:
    data, table = open_prepared(workspace.prepared), pl.read_parquet(labels_of(workspace, "disease"))
    codes = {
        int(subject): len(split.sequence(place)[0])
        for split in map(data.split, ("train", "tuning", "held_out"))
        for place, subject in enumerate(split.subject_ids())
    }
    counts = pl.col("subject_id").replace_strict(codes)
    has_many = table.select("subject_id", "prediction_time", boolean_value=counts > counts.median())
    write_labels(Path("many.parquet"), [has_many], ("boolean_value",))
    losses, figures = {}, {}
    for start in ("probe", "prevalence"):
        still = ["--no-use-lora", "--freeze-base", "--lr", "1e-9", "--head-start", start, "--labels", "many.parquet"]
        assert finetune(workspace, "--experiment", f"from_{start}", *still) == 0
        folder = workspace.root / "experiments" / f"from_{start}"
        losses[start] = read_run(folder)["best_val_loss"]
        figures[start] = TrackingRecord.load(folder).figures
    assert losses["probe"] == pytest.approx(figures["probe"]["probe_tuning_loss"], abs=1e-4)
    assert losses["prevalence"] == pytest.approx(figures["prevalence"]["prevalence_loss"], abs=0.05)
    assert losses["probe"] < losses["prevalence"] - 0.2
    assert "probe_tuning_loss" not in figures["prevalence"]


def test_the_best_checkpoint_gives_the_best_loss_again(runs: Runs, here: None) -> None:
    data = open_prepared(runs.workspace.prepared)
    for name, outcome in (("adapted", "disease"), ("whole", "disease"), ("probe", "disease"), ("on_lora", "survival")):
        found = load_finetuned(runs[name])
        examples = read_examples(labels_of(runs.workspace, outcome), data)["tuning"]
        loss = scored = 0.0
        with torch.inference_mode():
            for batch in ExampleSet(examples, ExampleLayout(found.model.config.max_position), 7):
                sums = found.task.loss()(found.model, batch)
                loss, scored = loss + float(sums.loss), scored + batch.num_scored
        assert loss / scored == pytest.approx(read_run(runs[name])["best_val_loss"], rel=1e-5)


def test_a_whole_model_needs_its_base_no_more_and_an_adapter_refuses_another(runs: Runs, tmp_path: Path) -> None:
    for name in ("whole", "adapted", "probe"):
        shutil.copytree(runs[name] / "checkpoints" / "best", tmp_path / name)
    with chdir(tmp_path):
        assert load_finetuned(tmp_path / "whole").task.name == "disease"
        with pytest.raises(UserError):
            load_finetuned(tmp_path / "adapted")
        shutil.copytree(runs["whole"].parent / "lora", tmp_path / "experiments" / "full")  # another one of that name
        (tmp_path / "experiments" / "full" / "run.json").unlink()
        for name in ("adapted", "probe"):
            with pytest.raises(UserError, match=r"other frozen weights|trained over"):
                load_finetuned(tmp_path / name)


# What is told of it


def test_the_run_is_tracked_under_its_pretraining_run(runs: Runs) -> None:
    client = runs.workspace.client()
    run = client.get_run(read_run(runs["adapted"])["run_id"])
    parent = read_run(runs["full"])["run_id"]
    assert run.info.status == "FINISHED"
    assert (run.data.tags["mlflow.parentRunId"], run.data.tags["task"]) == (parent, "disease")
    assert run.data.tags["adaptation"] == "lora_on_pretrained"
    assert run.data.params["task.labels"].endswith("disease.parquet")
    tuning = read_run(runs["adapted"])["tuning"]["auroc"]
    assert run.data.metrics["tuning_auroc"] == pytest.approx(tuning)
    history = read_history(runs["adapted"])
    steps = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "val_loss")}
    assert steps == {point["epoch"]: point["value"] for point in history["val_loss"]}
    assert (runs["adapted"] / "plots" / "loss_curve.png").exists()


def test_nothing_of_a_patient_is_among_what_is_told(runs: Runs) -> None:
    subjects = pl.read_parquet(labels_of(runs.workspace, "disease"))["subject_id"].to_list()
    for file in ("run.json", "logs/tracking.json", "checkpoints/best/checkpoint.json"):
        text = (runs["adapted"] / file).read_text()
        assert not [subject for subject in subjects if subject > 100_000 and str(subject) in text]


def test_the_metric_of_tuning_is_that_of_the_predictions(runs: Runs, here: None) -> None:
    data = open_prepared(runs.workspace.prepared)
    examples = read_examples(labels_of(runs.workspace, "disease"), data)["tuning"]
    found = predict(load_finetuned(runs["adapted"]), examples, data).probabilities
    assert found is not None
    expected = auroc(examples.targets[:, 0] == 1, found[:, 0])
    assert read_run(runs["adapted"])["tuning"]["auroc"] == pytest.approx(expected)


def test_the_doctor_asks_only_what_holds_of_tasks(runs: Runs, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "experiments/probe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "stuck_at_chance" not in {finding["rule"] for finding in found["findings"]}
    assert "stuck_at_chance" not in {skipped["rule"] for skipped in found["not_checked"]}


# What is predicted


def scores(runs: Runs, name: str, examples: Examples, data: PreparedData) -> np.ndarray:
    found = predict(load_finetuned(runs[name]), examples, data)
    result = found.risk if found.probabilities is None else found.probabilities
    assert result is not None
    return result


@pytest.mark.parametrize(("name", "outcome"), [("adapted", "disease"), ("on_lora", "survival")])
def test_who_shares_a_batch_changes_no_score(runs: Runs, here: None, name: str, outcome: str) -> None:
    data = open_prepared(runs.workspace.prepared)
    examples = read_examples(labels_of(runs.workspace, outcome), data)["train"]
    together = scores(runs, name, examples, data)
    order = np.random.default_rng(0).permutation(len(examples))
    np.testing.assert_allclose(scores(runs, name, examples.take(order), data), together[order], atol=1e-6)
    for row in (0, 5, 11):
        np.testing.assert_allclose(
            scores(runs, name, examples.take(np.array([row])), data)[0], together[row], atol=1e-6
        )


def test_a_name_that_is_not_known_is_predicted_all_the_same(runs: Runs, here: None) -> None:
    data = open_prepared(runs.workspace.prepared)
    task = load_finetuned(runs["both"]).task
    assert (task.kind, task.names) == ("multilabel", ("disease", "readmission"))
    examples = read_examples(Path("both.parquet"), data, names=task.names)["tuning"]
    assert np.isnan(examples.targets).any()
    assert np.isfinite(scores(runs, "both", examples, data)).all()


def test_records_of_another_vocabulary_are_read_by_code(runs: Runs, here: None, tmp_path: Path) -> None:
    """The same codes under other ids give the same scores."""
    data = open_prepared(runs.workspace.prepared)
    examples = read_examples(labels_of(runs.workspace, "disease"), data)["tuning"]
    expected = scores(runs, "adapted", examples, data)
    shuffled = shutil.copytree(runs.workspace.prepared, tmp_path / "prepared")
    size = len(data.vocabulary)
    ids = np.concatenate([np.arange(5), 5 + np.random.default_rng(0).permutation(size - 5)])  # new id of each token
    vocabulary = json.loads((shuffled / "vocabulary.json").read_text())
    for key, values in vocabulary.items():
        if isinstance(values, list) and len(values) == size:
            vocabulary[key] = [values[old] for old in np.argsort(ids)]
        elif isinstance(values, list) and len(values) == size - 5:
            vocabulary[key] = [values[old - 5] for old in np.argsort(ids)[5:]]
    (shuffled / "vocabulary.json").write_text(json.dumps(vocabulary))
    other = open_prepared(shuffled)
    assert other.vocabulary.tokens != data.vocabulary.tokens
    split = examples.split
    sequence = split.sequence

    class Renamed(PreparedSplit):
        def __init__(self) -> None:
            self.__dict__ = split.__dict__

        def sequence(self, index: int) -> tuple:
            codes, ages, visits = sequence(index)
            return ids[codes].astype(np.int32), ages, visits

    renamed = Examples(**{**vars(examples), "split": Renamed()})
    np.testing.assert_allclose(scores(runs, "adapted", renamed, other), expected, atol=1e-6)


# A leak: a code that stands with the label, on day 50


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with a leak and, for the same patients, labels of before and of after it; and a run trained on them."""
    folder = tmp_path_factory.mktemp("leaky")
    generator = np.random.default_rng(0)
    rows: list[tuple] = []
    truth = generator.random(240) < 0.5
    for subject in range(240):
        rows.append((subject, datetime(1950, 1, 1), BIRTH))
        rows += [(subject, day(number), f"C{generator.integers(6)}") for number in range(0, 40, 10)]
        rows.append((subject, day(50), "LEAK" if truth[subject] else "NOTHING"))
    names = ("train", "train", "tuning", "held_out")
    source = write_meds(folder / "meds", events(*rows), splits={subject: names[subject % 4] for subject in range(240)})
    for name, when in (("before", 49), ("after", 50)):
        table = pl.DataFrame({"subject_id": range(240), "prediction_time": [day(when)] * 240, "boolean_value": truth})
        write_labels(folder / f"{name}.parquet", [table], ("boolean_value",))
    with chdir(folder):
        assert main(["prepare", str(source), "--format", "meds", "--out", "prepared"]) == 0
        assert main(["train", "--data", "prepared", "--epochs", "1", "--experiment", "base", "--stop-on", "never"]) == 0
    return folder


@pytest.mark.parametrize(("labels", "low", "high"), [("before", 0.25, 0.75), ("after", 0.99, 1.0)])
def test_a_code_after_the_prediction_time_is_not_seen(leaky: Path, labels: str, low: float, high: float) -> None:
    with chdir(leaky):
        assert main([
            "finetune", "--from", "experiments/base", "--task", labels, "--labels", f"{labels}.parquet",
            "--data", "prepared", "--no-use-lora", "--lr", "3e-3", "--epochs", "4", "--experiment", labels,
        ]) == 0  # fmt: skip
        assert low <= read_run(leaky / "experiments" / labels)["tuning"]["auroc"] <= high


def test_what_comes_after_the_prediction_time_changes_no_score(runs: Runs, here: None) -> None:
    """Every code after it is made another one; a code before it is, too, to see that this would be seen."""
    data = open_prepared(runs.workspace.prepared)
    examples = read_examples(labels_of(runs.workspace, "disease"), data)["tuning"]
    middle = np.array([np.sort(examples.split.times(int(p)))[len(examples.split.times(int(p))) // 2]
                       for p in examples.patients])  # fmt: skip
    examples = Examples(**{**vars(examples), "times": middle})
    split = examples.split

    class Changed(PreparedSplit):
        def __init__(self, *, future: bool) -> None:
            self.__dict__ = split.__dict__
            self.future = future

        def sequence(self, index: int) -> tuple:
            codes, ages, visits = split.sequence(index)
            time = middle[examples.patients.tolist().index(index)]
            hidden = split.times(index) > time
            changed = hidden if self.future else ~hidden
            return np.where(changed & (codes > 4), 5, codes).astype(np.int32), ages, visits

    expected = scores(runs, "adapted", examples, data)
    for future, same in ((True, True), (False, False)):
        other = Examples(**{**vars(examples), "split": Changed(future=future)})
        assert np.array_equal(scores(runs, "adapted", other, data), expected) == same


# Vectors


def test_each_patient_has_a_vector_at_the_end_of_the_record(
    runs: Runs, here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "patients.parquet"
    assert main(["embed", "experiments/full", "--data", str(runs.workspace.prepared), "--out", str(out)]) == 0
    assert "Without --labels each vector sees its whole record, with the outcomes in it" in capsys.readouterr().err
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    table = pl.read_parquet(out)
    assert table.schema == {
        "subject_id": pl.Int64, "prediction_time": pl.Datetime("us"), "embedding": pl.List(pl.Float32),
    }  # fmt: skip
    data = open_prepared(runs.workspace.prepared)
    assert table.height == sum(len(data.split(name)) for name in ("train", "tuning", "held_out"))
    split, encoder = data.split("tuning"), encoder_of(runs["full"])
    row = table.filter(pl.col("subject_id") == split.subject_ids()[3]).row(0, named=True)
    codes, ages, visits = (torch.from_numpy(np.array(part))[None] for part in split.sequence(3))
    assert row["prediction_time"] == split.times(3).max().item()
    with torch.inference_mode():
        hidden = encoder(codes.long(), ages, visits.long())[0]
    expected = torch.cat([hidden.mean(dim=0), hidden[visits[0] == visits.max()].mean(dim=0)])
    np.testing.assert_allclose(row["embedding"], expected, atol=1e-5)


def test_a_fine_tuned_run_has_vectors_of_its_own_at_the_times_of_labels(runs: Runs, here: None, tmp_path: Path) -> None:
    tables = {}
    for run in ("full", "adapted"):
        out = tmp_path / f"{run}.parquet"
        labels = ["--labels", str(labels_of(runs.workspace, "disease")), "--split", "tuning"]
        command = ["embed", f"experiments/{run}", "--data", str(runs.workspace.prepared), "--out", str(out), *labels]
        assert main(command) == 0
        tables[run] = pl.read_parquet(out)
    assert tables["full"].drop("embedding").equals(tables["adapted"].drop("embedding"))
    assert not tables["full"]["embedding"].equals(tables["adapted"]["embedding"])
    data = open_prepared(runs.workspace.prepared)
    found = load_finetuned(runs["adapted"])
    examples = read_examples(labels_of(runs.workspace, "disease"), data)["tuning"]
    vectors = embed(runs["adapted"], examples, data)
    np.testing.assert_allclose(np.stack(tables["adapted"]["embedding"].to_list()), vectors, atol=1e-6)
    by_head = torch.sigmoid(found.model.head(torch.from_numpy(vectors))).detach().numpy()
    np.testing.assert_allclose(by_head, scores(runs, "adapted", examples, data), atol=1e-5)


def test_the_example_of_the_page_runs(runs: Runs, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
    (code,) = [block.split("```")[0] for block in page.split("```python\n")[1:] if "embedding" in block]
    assert len(code.strip().splitlines()) <= 12
    shutil.copy(labels_of(runs.workspace, "disease"), "disease.parquet")
    command = ["embed", "experiments/full", "--data", str(runs.workspace.prepared), "--labels", "disease.parquet"]
    assert main([*command, "--out", "patients.parquet", "--overwrite"]) == 0
    capsys.readouterr()
    exec(compile(code, "docs/tasks.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_vectors_of_a_fine_tuned_run_see_no_more_than_its_head(runs: Runs, here: None, tmp_path: Path) -> None:
    assert finetune(runs.workspace, "--experiment", "gapped", "--no-use-lora", "--freeze-base", "--gap", "300") == 0
    data, labels = open_prepared(runs.workspace.prepared), labels_of(runs.workspace, "disease")
    out = tmp_path / "patients.parquet"
    command = ["embed", "experiments/gapped", "--data", str(runs.workspace.prepared), "--labels", str(labels)]
    assert main([*command, "--split", "tuning", "--out", str(out)]) == 0
    found = np.stack(pl.read_parquet(out)["embedding"].to_list())
    gapped, whole = (embed(runs["gapped"], read_examples(labels, data, gap=gap)["tuning"], data) for gap in (300, 0))
    np.testing.assert_allclose(found, gapped, atol=1e-6)
    assert len(gapped) != len(whole) or not np.allclose(gapped, whole)


def test_a_run_that_was_lost_is_judged_by_its_best_weights(
    runs: Runs, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_and_lose(trainer: Any, *others: Any) -> None:
        train_epochs(trainer, *others)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(math.nan)

    monkeypatch.setattr("behrt.finetune.train_epochs", train_and_lose)
    assert finetune(runs.workspace, "--experiment", "lost", "--no-use-lora", "--freeze-base") == 0
    monkeypatch.undo()
    assert read_run(runs["lost"])["tuning"] == read_run(runs["probe"])["tuning"]


# Going on


CUT = {"epochs": 2, "batch_size": 32, "lr": 3e-3, "checkpoint_minutes": 1e-9}


def settings_of(runs: Runs, outcome: str, **options: Any) -> FinetuneSettings:
    """Of a run of four steps an epoch that keeps a checkpoint after each."""
    flags = {name: value for name, value in options.items() if name != "from_scratch"}
    return finetune_settings(
        task=outcome, labels=labels_of(runs.workspace, outcome), run="experiments/full", data=runs.workspace.prepared,
        flags={**CUT, **flags}, max_labels=120, from_scratch=options.get("from_scratch", False),
    )  # fmt: skip


def cut_off(settings: FinetuneSettings, name: str, *, steps: int) -> None:
    """Ends a fine-tuning after so many steps, as an unforeseen error would."""
    with pytest.raises(RuntimeError, match="cut off"):
        recipe(settings, experiment=name, folder=Path("experiments", name), listener=CutOff(None, steps=steps))


@pytest.fixture(scope="module")
def cut_runs(runs: Runs) -> tuple[str, ...]:
    """Names of three copies of a run cut off inside its second epoch; the same, uninterrupted, is `whole_one`."""
    with chdir(runs.workspace.root), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr("behrt.lifecycle.draw_curves", lambda *arguments, **named: [])
        settings = settings_of(runs, "disease")
        recipe(settings, experiment="whole_one", folder=runs["whole_one"])
        cut_off(settings, "cut", steps=6)
        copies = ("cut", "cut_again", "cut_once_more")
        for name in copies[1:]:
            shutil.copytree(runs["cut"], runs[name])
    return copies


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves take a quarter of the time of so short a run, and are no matter here."""
    monkeypatch.setattr("behrt.lifecycle.draw_curves", lambda *arguments, **named: [])


def assert_same(runs: Runs, whole: str, cut: str) -> None:
    """Bit by bit, times left out; and each epoch once in the run's own MLflow run, below the pre-training run."""
    before, after = (read_history(runs[name]) for name in (whole, cut))
    assert {name: after[name] for name in SAME} == {name: before[name] for name in SAME}
    for checkpoint in ("best", "last"):
        expected, found = (
            load_finetuned(runs[name], checkpoint=checkpoint).model.state_dict() for name in (whole, cut)
        )
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    about = read_run(runs[cut])
    assert about["tuning"] == read_run(runs[whole])["tuning"]
    client = runs.workspace.client()
    assert sorted(point.step for point in client.get_metric_history(about["run_id"], "val_loss")) == [1, 2]
    told = client.get_run(about["run_id"])
    assert told.info.status == about["status"] == "FINISHED"
    assert told.data.tags["mlflow.parentRunId"] == read_run(runs["full"])["run_id"]


@pytest.mark.usefixtures("here", "undrawn")
def test_a_fine_tuning_that_goes_on_equals_the_uninterrupted_one(runs: Runs, cut_runs: tuple[str, ...]) -> None:
    run_id = read_run(runs[cut_runs[0]])["run_id"]
    assert main(["finetune", "--resume", f"experiments/{cut_runs[0]}"]) == 0
    assert_same(runs, "whole_one", cut_runs[0])
    assert read_run(runs[cut_runs[0]])["run_id"] == run_id


@pytest.mark.usefixtures("here", "undrawn")
def test_one_from_scratch_goes_on_without_the_run_that_lent_it_its_shape(runs: Runs) -> None:
    settings = settings_of(runs, "survival", from_scratch=True)
    recipe(settings, experiment="whole_two", folder=runs["whole_two"])
    cut_off(settings, "cut_two", steps=3)
    hidden = runs["full"].rename(runs["full"].with_name("hidden"))
    try:
        assert main(["finetune", "--resume", "experiments/cut_two"]) == 0
    finally:
        hidden.rename(runs["full"])
    assert_same(runs, "whole_two", "cut_two")


@pytest.mark.usefixtures("here", "undrawn")
def test_a_fine_tuning_without_its_optimizers_state_would_not_be_equal(
    runs: Runs, cut_runs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("behrt.checkpoints._load_optimizer", lambda *arguments: None)
    assert main(["finetune", "--resume", f"experiments/{cut_runs[1]}"]) == 0
    expected, found = (read_history(runs[name])["val_loss"] for name in ("whole_one", cut_runs[1]))
    assert found[0] == expected[0]
    assert found[1] != expected[1]


@pytest.mark.usefixtures("here", "undrawn")
def test_a_fine_tuning_goes_on_with_what_it_was_begun_with_and_nothing_else(
    runs: Runs, cut_runs: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    cut = f"experiments/{cut_runs[2]}"
    labels = pl.read_parquet(labels_of(runs.workspace, "disease"))
    write_labels(Path("same.parquet"), [labels.sample(fraction=1.0, shuffle=True, seed=0)], ("boolean_value",))
    write_labels(Path("less.parquet"), [labels.head(200)], ("boolean_value",))
    for command, told in (
        (["finetune", "--resume", cut, "--lr", "1e-4"], "training.lr 0.003 -> 0.0001"),
        (["finetune", "--resume", cut, "--gap", "3"], "task.gap 0.0 -> 3.0"),
        (["finetune", "--resume", cut, "--labels", "less.parquet"], "--labels holds other labels"),
        (["finetune", "--resume", cut, "--experiment", "new"], "--experiment: goes with a new run"),
        (["finetune", "--resume", "experiments/full"], "is a pre-training; behrt train --resume goes on with it"),
        (["train", "--resume", cut], "is a fine-tuning; behrt finetune --resume goes on with it"),
        (["finetune", "--task", "disease"], "--from: is missing"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert told in error
        assert len(error.strip().splitlines()) == 1
    assert main(["finetune", "--resume", cut, "--labels", "same.parquet"]) == 0
    run = runs.workspace.client().get_run(read_run(runs[cut_runs[2]])["run_id"])
    assert "task.labels" in run.data.tags["resumed_with"]


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "experiments/none"], "--from: experiments/none"),
        (["--from", "experiments/adapted"], "is a fine-tuned run"),
        (["--task", "a/b"], "--task: expected letters"),
        (["--gap", "-1"], "--gap"),
        (["--max-labels", "0"], "--max-labels"),
        (["--max-labels", "1"], "all 1 training labels are the same"),
        (["--lora-rank", "4", "--no-use-lora"], "--lora-rank: has no effect"),
        (["--lora-rank", "4000"], "--lora-rank 4000"),
        (["--from-scratch", "--head-start", "probe"], "--head-start probe: a random encoder"),
        (["--from-scratch", "--freeze-base"], "--freeze-base: leaves a random encoder random"),
        (["--labels", "none.parquet"], "none.parquet: no such file"),
        (["--labels", "odd.parquet"], "expected binary or multilabel or survival"),
        (["--labels", "event.parquet", "--class-weights", "balanced"], "--class-weights: survival has no classes"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--experiment", "../x"], "--experiment"),
        (["--gap", "100000"], "none of its"),
        (["--experiment", "full"], "holds the run that --from names"),
        (["--mlm-probability", "0.3"], "--mlm-probability: is for pre-training"),
    ],
)
def test_a_mistake_gets_one_line(
    runs: Runs, here: None, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pl.read_parquet(labels_of(runs.workspace, "survival"))
    write_labels(Path("odd.parquet"), [table.select("subject_id", "prediction_time", "float_value")], ("float_value",))
    shutil.copy(labels_of(runs.workspace, "survival"), "event.parquet")
    before = sorted(Path("experiments").iterdir())
    assert finetune(runs.workspace, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(Path("experiments").iterdir()) == before


def test_a_fine_tuned_run_is_no_pretrained_one_and_the_other_way_round(runs: Runs, here: None) -> None:
    with pytest.raises(UserError, match="is of a fine-tuned run"):
        load_run(runs["adapted"])
    with pytest.raises(UserError, match="is of a pre-trained run"):
        load_finetuned(runs["full"])
