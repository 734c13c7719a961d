"""Are settings what was written, laid over each other in the right order, and refused by name?"""

from pathlib import Path

import pytest

from behrt.config import (
    BEHRTConfig,
    ExperimentSettings,
    UserError,
    experiment_yaml,
    load_experiment,
)

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_go_over_the_file_the_file_over_the_preset_and_the_preset_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path / "e.yaml", "model: {dropout: 0.3}\ntraining: {lr: 0.01, epochs: 7}\n")
    settings = load_experiment(file, preset="a40", flags={"lr": 0.5})
    assert settings.training.lr == 0.5  # flag over file
    assert settings.training.epochs == 7  # file over preset (100)
    assert settings.model.dropout == 0.3  # file over preset (0.2)
    assert settings.training.batch_size == 128  # preset over default (32)
    assert settings.training.gradient_clip == 1.0  # default


def test_an_experiment_written_out_reads_back_unchanged(tmp_path: Path) -> None:
    settings = load_experiment(preset="a40", flags={"lora_targets": "query,feedforward", "max_position": 80})
    assert load_experiment(write(tmp_path / "e.yaml", experiment_yaml(settings))) == settings


@pytest.mark.parametrize("name", ["m1", "a40"])
def test_presets_are_the_guides_starting_points(name: str) -> None:
    settings = load_experiment(preset=name)
    guide = {"m1": (8, 200, 50, 16, 0.1), "a40": (16, 5000, 100, 128, 0.2)}[name]
    training = settings.training
    assert guide == (
        settings.adaptation.lora_rank,
        settings.data.num_patients,
        training.epochs,
        training.batch_size,
        settings.model.dropout,
    )
    assert (training.lr, training.weight_decay, training.early_stopping_patience) == (1e-4, 0.01, 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {droput: 0.1}", "e.yaml: model.droput: unknown key; did you mean 'dropout'?"),
        ("modle: {dropout: 0.1}", "e.yaml: modle: unknown key; did you mean 'model'?"),
        ("training: {epochs: 0}", "e.yaml: training.epochs: input should be greater than or equal to 1 (found '0')"),
        ("training: {lr: fast}", "e.yaml: training.lr: input should be a valid number"),
        ("training: {lr: .nan}", "e.yaml: training.lr: input should be a finite number"),
        ("training: 3", "e.yaml: training: expected keys and values (found '3')"),
        ("model: {max_position: ten}", "e.yaml: model.max_position: input should"),
        ("adaptation: {lora_targets: [3]}", "e.yaml: adaptation.lora_targets: 3 names no linear layer"),
        ("adaptation: {lora_targets: [querry]}", "'querry' names no linear layer; did you mean 'query'?"),
        ("adaptation: {lora_rank: 0}", "adaptation.lora_rank: input should be greater than or equal to 1"),
        ("training: {batch_size: 4, accumulation_steps: 5}", "accumulation_steps 5 is more than batch_size 4"),
        ("- a\n- b", "expected sections model, adaptation, data and training, found list"),
        ("model: {dropout: 0.1", "line 1: not valid YAML"),
        ("model: {max_position: 2}", "a sequence needs at least 3 positions"),
    ],
)
def test_a_mistake_in_a_file_gets_one_line_that_names_file_and_key(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_experiment(write(tmp_path / "e.yaml", text))
    message = str(caught.value)
    assert "e.yaml" in message
    assert expected in message
    assert "\n" not in message


def test_a_missing_file_and_one_that_is_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such experiment file"):
        load_experiment(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_experiment(tmp_path / "binary.yaml")


def test_a_mistake_in_a_flag_names_the_flag() -> None:
    with pytest.raises(UserError, match=r"^--lora-rank: input should be greater than or equal to 1 \(found '0'\)$"):
        load_experiment(flags={"use_lora": True, "lora_rank": 0})


def test_an_empty_section_is_the_default(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path / "e.yaml", "model:\ntraining:\n")) == ExperimentSettings()


@pytest.mark.parametrize("flags", [{"lora_rank": 4}, {"freeze_base": True}, {"data": "d", "num_patients": 50}])
def test_a_flag_that_would_change_nothing_is_refused(flags: dict) -> None:
    with pytest.raises(UserError, match=r"has no effect|is for simulated cohorts"):
        load_experiment(flags=flags)
    assert load_experiment(preset="m1", flags={"lora_rank": 4}).adaptation.lora_rank == 4  # LoRA comes from the preset


def test_heads_that_do_not_divide_the_hidden_size_are_refused() -> None:
    with pytest.raises(UserError, match="num_heads 3 does not divide hidden_dim 128"):
        BEHRTConfig.small(vocab_size=100, num_heads=3)


def test_settings_cannot_be_changed() -> None:
    settings = ExperimentSettings()
    with pytest.raises(ValueError, match="frozen"):
        settings.training.lr = 1.0  # type: ignore[misc]


SHIPPED = (
    "a40_large",
    "frozen_at_random",
    "full_training",
    "m1_small",
    "overfit_92_percent",
    "quickstart",
    "random_codes",
    "the_fix",
)
"""The story of the guide, and what `make train` runs; a user's own experiments may stand beside them."""


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_experiment_loads_and_has_a_note_of_two_lines(name: str) -> None:
    settings = load_experiment(EXPERIMENTS / name / "experiment.yaml")
    assert len(settings.note.strip().splitlines()) == 2
