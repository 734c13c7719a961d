"""Do the commands do what the guide and the help say, and does every mistake get one line and exit code 2?"""

import json
import shutil
from contextlib import chdir
from pathlib import Path

import pytest

from behrt.checkpoints import CHECKSUMS_FILE
from behrt.cli import main
from behrt.config import ExperimentSettings, UserError
from behrt.files import write_checksums
from behrt.train_command import place_of_run
from behrt.vocabulary import Vocabulary

from .conftest import Workspace

GUIDE_COMMANDS = {
    "small": "--model_size small --use_lora --lora_rank 8 --num_patients 200 --epochs 50 --batch_size 16 --lr 1e-4 "
    "--weight_decay 0.01 --dropout 0.1 --early_stopping_patience 10",
    "large": "--model_size large --use_lora --lora_rank 16 --num_patients 5000 --epochs 100 --batch_size 128 --lr 1e-4 "
    "--weight_decay 0.01 --dropout 0.2 --early_stopping_patience 10",
}


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line that a mistaken command prints."""
    capsys.readouterr()
    code = main(list(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert code == 2, lines
    assert len(lines) == 1, lines
    return lines[0]


def counts(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["params", "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", GUIDE_COMMANDS)
def test_the_guides_commands_are_accepted_word_for_word(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import behrt.pretrain

    seen: list[ExperimentSettings] = []

    def stop_before_training(settings: ExperimentSettings, **place: object) -> None:
        seen.append(settings)
        raise UserError("seen enough")

    monkeypatch.setattr(behrt.pretrain, "pretrain", stop_before_training)
    assert main(["train", *GUIDE_COMMANDS[name].split()]) == 2
    (settings,) = seen
    expected = {"small": (8, 200, 50, 16, 0.1), "large": (16, 5000, 100, 128, 0.2)}[name]
    assert expected == (
        settings.adaptation.lora_rank,
        settings.data.num_patients,
        settings.training.epochs,
        settings.training.batch_size,
        settings.model.dropout,
    )
    assert settings.model.model_size == name
    assert settings.adaptation.use_lora


def test_a_run_without_records_simulates_a_cohort_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [
        "train",
        "--num_patients",
        "40",
        "--epochs",
        "1",
        "--batch_size",
        "16",
        "--use_lora",
        "--lora_rank",
        "2",
    ]
    with chdir(tmp_path):
        assert main(arguments) == 0
        made = (tmp_path / "data" / "simulated-hmm-40-seed0" / "prepared" / "dataset.json").stat().st_mtime_ns
        assert main(arguments) == 0
        assert (tmp_path / "data" / "simulated-hmm-40-seed0" / "prepared" / "dataset.json").stat().st_mtime_ns == made
        assert (tmp_path / "experiments" / "behrt_small_mlm" / "run.json").exists()
        assert len(list((tmp_path / "experiments" / "behrt_small_mlm" / "earlier").iterdir())) == 1
    assert "Epoch 1/1 | Train Loss: " in capsys.readouterr().err


def test_params_prints_the_guides_counts(capsys: pytest.CaptureFixture) -> None:
    lora = ["--model-size", "large", "--use-lora", "--lora-rank", "16", "--lora-targets", "output"]
    assert counts(capsys, *lora)["total"] == 20_366_312
    assert counts(capsys, *lora, "--no-freeze-base")["trainable"] == 18_790_376
    assert counts(capsys, *lora)["trainable"] == 1_450_984
    assert counts(capsys, *lora, "--no-train-embeddings")["trainable"] == 874_984
    assert counts(capsys)["trainable_percent"] == 100.0


def test_params_has_the_keys_of_count_parameters(capsys: pytest.CaptureFixture) -> None:
    from behrt import BEHRTConfig, BEHRTForMaskedLM, count_parameters

    expected = count_parameters(BEHRTForMaskedLM(BEHRTConfig.small(vocab_size=1000)))
    assert counts(capsys) == expected


def test_an_experiment_can_be_named_by_its_folder(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "experiment.yaml").write_text("model: {model_size: medium}\n")
    with chdir(tmp_path):
        assert counts(capsys, "mine") == counts(capsys, "--model-size", "medium")
        (tmp_path / "empty").mkdir()
        assert "empty/experiment.yaml: no such experiment file" in fails(capsys, "train", "empty")


def test_params_reads_the_vocabulary_of_prepared_records(capsys: pytest.CaptureFixture, prepared: Path) -> None:
    found = counts(capsys, "--data", str(prepared))
    assert found["embeddings"] < counts(capsys)["embeddings"]


def test_params_prints_a_table_for_people_on_stderr(capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert main(["params", "--use-lora"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for word in ("embeddings", "encoder", "head", "lora", "trainable"):
        assert word in captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train --model-size huge", "'huge' is not one of 'small', 'medium', 'large'"),
        ("train --droput 0.1", "No such option '--droput'"),
        ("train --use-lora --lora-rank 0", "--lora-rank: input should be greater than or equal to 1 (found '0')"),
        ("train --use-lora --lora-rank 129 --num-patients 40", "--lora-rank"),
        (
            "train --use-lora --lora-targets query,vlaue",
            "--lora-targets: 'vlaue' names no linear layer; did you mean 'value'?",
        ),
        ("train --max-position many", "--max-position: expected a number or auto, found 'many'"),
        ("train --max-position 2", "--max-position: a sequence needs at least 3 positions"),
        ("train --data nowhere", "nowhere: no such folder"),
        ("train --init-from nowhere --num-patients 40", "nowhere: no such folder, and not an MLflow run id"),
        (f"train --init-from {'0' * 32} --num-patients 40", "has no such run"),
        ("train nowhere.yaml", "nowhere.yaml: no such experiment file"),
        ("train --preset a400", "--preset: 'a400' is unknown; did you mean 'a40'?"),
        ("train --vocab-size 10 --num-patients 40", "--vocab-size: 10 cannot hold the"),
        ("train --experiment ../up", "--experiment: '../up' is no folder name"),
        ("train --epochs 0", "--epochs: input should be greater than or equal to 1"),
        ("train --lr nan", "--lr: input should be a finite number"),
        ("train --device cuda --num-patients 40", "--device: cuda was asked for but is not available here"),
        ("train --epochs x", "'x' is not a valid integer"),
        ("train --accumulation-steps 64", "flags: accumulation_steps 64 is more than batch_size 32 patients"),
        ("train --lora-rank 8", "--lora-rank: has no effect without --use-lora"),
        ("train --no-freeze-base", "--freeze-base: has no effect without --use-lora"),
        ("train --data nowhere --structure none", "--structure: is for simulated cohorts"),
        ("train --num-patients 5", "--num-patients: input should be greater than or equal to 40"),
        ("prepare nowhere --out there", "nowhere: no such file or folder"),
        ("prepare . --out there --format fhir", "'fhir' is not one of 'meds', 'mimic4', 'omop', 'synthea'"),
        ("prepare . --out there --split 80/10/20", "--split"),
        ("simulate --out there --patients 3", "is not in the range x>=20"),
        ("simulate", "Missing option '--out'"),
        ("tarin", "No such command 'tarin'"),
        ("params --lora-rank 999 --use-lora", "--lora-rank"),
    ],
)
def test_a_mistake_gets_one_line_exit_code_2_and_leaves_nothing(
    capsys: pytest.CaptureFixture, tmp_path: Path, arguments: str, expected: str
) -> None:
    with chdir(tmp_path):
        assert expected in fails(capsys, *arguments.split())
    left = {path.name for path in tmp_path.iterdir()} - {
        "data",
        "mlruns",
    }  # the simulated cohort and an empty store stay
    assert left == set()


def test_a_file_in_the_place_of_the_folder_is_refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with chdir(tmp_path):
        assert "file: is a file" in fails(capsys, "train", "--num-patients", "40", "--out", "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_heads_that_do_not_divide_are_refused_in_a_file(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("model: {num_heads: 3}\ndata: {num_patients: 40}\n")
    with chdir(tmp_path):
        assert "num_heads 3 does not divide hidden_dim 128" in fails(capsys, "train", "e.yaml")


def test_a_checkpoint_of_another_size_or_vocabulary_is_refused(
    capsys: pytest.CaptureFixture, workspace: Workspace, tmp_path: Path
) -> None:
    common = ("train", "--data", str(workspace.prepared), "--init-from", str(workspace.full))
    with chdir(tmp_path):
        assert "another shape of model (embedding_dim 64 there, 128 here" in fails(
            capsys, *common, "--model-size", "medium"
        )
    tokens = workspace.root / "other" / "vocabulary.json"
    shutil.copytree(workspace.full / "checkpoints" / "best", tokens.parent)
    vocabulary = Vocabulary.load(tokens)
    Vocabulary.of_codes([f"OTHER//{code}" for code in vocabulary.tokens[5:]]).save(tokens)
    files = [path for path in tokens.parent.glob("*.*") if path.suffix in (".json", ".safetensors")]
    write_checksums(tokens.parent, CHECKSUMS_FILE, files)
    with chdir(tmp_path):
        message = fails(capsys, *common[:-1], str(tokens.parent))
    assert "its vocabulary does not fit: none of the" in message


def test_prepare_prints_its_report_and_json(capsys: pytest.CaptureFixture, prepared: Path, tmp_path: Path) -> None:
    capsys.readouterr()
    source, out = prepared.parent / "meds", tmp_path / "out"
    assert main(["prepare", str(source), "--format", "meds", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((out / "dataset.json").read_text())
    assert "events read" in captured.err
    assert "already holds prepared records" in fails(capsys, "prepare", str(source), "--out", str(out))


def test_behrt_alone_prints_its_help(capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("Usage: behrt [OPTIONS] COMMAND [ARGS]...\n")


@pytest.mark.parametrize("command", ["", "simulate", "prepare", "train", "params", "doctor", "compare", "ui"])
def test_every_command_explains_itself(capsys: pytest.CaptureFixture, command: str) -> None:
    capsys.readouterr()
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Usage: behrt")
    for line in text.splitlines():
        assert len(line) <= 110


def test_a_run_is_named_after_its_file_its_flag_or_its_size(tmp_path: Path) -> None:
    settings = ExperimentSettings()
    fix = Path("experiments/the_fix/experiment.yaml")
    assert place_of_run(settings, fix, None, None) == ("the_fix", Path("experiments/the_fix"))
    assert place_of_run(settings, Path("mine.yaml"), None, None) == ("mine", Path("experiments/mine"))
    assert place_of_run(settings, None, None, None) == ("behrt_small_mlm", Path("experiments/behrt_small_mlm"))
    assert place_of_run(settings, fix, "other", None) == ("other", Path("experiments/other"))
    assert place_of_run(settings, None, None, tmp_path / "here") == ("here", tmp_path / "here")
