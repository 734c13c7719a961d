"""Is a sweep file read as it is meant, and a mistake in it refused with its line?"""

import json
from contextlib import chdir
from pathlib import Path

import optuna
import pytest

from behrt.config import UserError
from behrt.sweep.samplers import make_pruner, make_sampler, resolve_pruner
from behrt.sweep.settings import Budget, PrunerSettings, Sweep, load_sweep
from behrt.sweep.space import suggest

ROOT = Path(__file__).resolve().parents[1]
GOOD = """space:
  dropout: {type: float, low: 0.0, high: 0.5}
  lr: {type: float, low: 1e-4, high: 1e-2, log: true}
settings:
  epochs: 20
budget:
  trials: 12
"""


def load(tmp_path: Path, text: str, **arguments: object) -> Sweep:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_sweep(path, **arguments)


def test_a_sweep_is_its_file_with_the_command_line_laid_over(tmp_path: Path) -> None:
    sweep = load(tmp_path, GOOD, trials=3, flags={"epochs": 7})
    assert (sweep.name, sweep.budget.trials, sweep.base.training.epochs) == ("mine", 3, 7)
    assert sweep.trial_settings({"dropout": 0.25, "lr": 0.001}).training.lr == 0.001


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).space["lr"].low == 1e-4


@pytest.mark.parametrize("name", ["regularization", "capacity", "quick"])
def test_shipped_sweeps_are_read_and_survive_their_storage(name: str) -> None:
    with chdir(ROOT):
        sweep = load_sweep(Path("sweeps") / f"{name}.yaml")
    definition = json.loads(json.dumps(sweep.definition()))
    assert Sweep.from_definition(name, definition, sweep.budget).definition() == sweep.definition()


def test_the_shipped_regularization_searches_what_it_is_for() -> None:
    with chdir(ROOT):
        sweep = load_sweep(Path("sweeps/regularization.yaml"))
    assert set(sweep.space) == {"dropout", "weight_decay", "lora_rank", "lr"}
    assert sweep.base.adaptation.use_lora


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("high: 0.5", "high: 1.5", 2, "less than 1"),
        ("high: 0.5", "high: 0.0", 2, "not below"),
        ("high: 0.5", "high: 0.5, step: 0.2", 2, "only 0.4"),
        ("high: 0.5", "hihg: 0.5", 2, "did you mean 'high'"),
        ("high: 0.5", "high: 0.5, log: true", 2, "log needs a low above 0"),
        ("type: float, low: 0.0, high: 0.5", "type: categorical, choices: [0.1]", 2, "at least two choices"),
        ("type: float, low: 0.0, high: 0.5", "type: categorical, choices: 0.1", 2, "expected a list"),
        ("type: float, low: 0.0, high: 0.5", "type: categorical, choices: [[0.1]]", 2, "a choice is one value"),
        ("type: float, low: 0.0", "type: [1], low: 0.0", 2, "expected type"),
        ("dropout: {type: float, low: 0.0, high: 0.5}", "dropout: &a {b: *a}", 2, "refers to itself"),
        ("dropout: {type: float, low: 0.0, high: 0.5", "num_layers: {type: float, low: 1, high: 4", 2, "use type: int"),
        (
            "dropout: {type: float, low: 0.0, high: 0.5",
            "hidden_dim: {type: int, low: 64, high: 68",
            2,
            "divide hidden_dim 65",
        ),
        (
            "dropout: {type: float, low: 0.0, high: 0.5}",
            "use_lora: {type: categorical, choices: ['true', 'false']}",
            2,
            "without quotes",
        ),
        (
            "dropout: {type: float, low: 0.0, high: 0.5}\n  lr:",
            "lora_rank: {type: int, low: 2, high: 200}\n  use_lora: {type: categorical, choices: [true, false]}\n  lr:",
            2,
            "above 128",
        ),
        ("epochs: 20", "lr: 0.1", 5, "is searched under space"),
        ("epochs: 20", "training: {epochs: 20}", 5, "without their sections"),
        ("type: float, low: 0.0, high: 0.5", "type: categorical, choices: [0.1, 7]", 2, "less than 1"),
        ("type: float, low: 0.0, high: 0.5", "type: categorical, choices: [0.1, 0.1]", 2, "twice"),
        ("type: float, low: 0.0", "type: flaot, low: 0.0", 2, "expected type"),
        ("dropout:", "droput:", 2, "did you mean 'dropout'"),
        ("dropout: {type: float, low: 0.0, high: 0.5}", "epochs: {type: int, low: 1, high: 9}", 2, "under settings"),
        ("dropout: {type: float, low: 0.0, high: 0.5}", "lora_rank: {type: int, low: 1, high: 9}", 2, "without LoRA"),
        ("  lr:", "  dropout:", 3, "twice"),
        ("epochs: 20", "epochs: 0", 5, "greater than or equal to 1"),
        ("epochs: 20", "epohcs: 20", 5, "did you mean 'epochs'"),
        ("trials: 12", "epochs: 12", 7, "total_epochs counts"),
        ("trials: 12", "trials: 0", 7, "greater than or equal to 1"),
        ("budget:", "sampler: tpee\nbudget:", 6, "'tpe'"),
        ("budget:", "sampler: grid\nbudget:", 2, "needs a step"),
        ("budget:", "prunner: none\nbudget:", 6, "did you mean 'pruner'"),
        ("budget:", "base: nowhere\nbudget:", 6, "no experiment nowhere"),
    ],
)
def test_a_mistake_is_refused_with_its_line(tmp_path: Path, old: str, new: str, line: int, says: str) -> None:
    assert old in GOOD
    with pytest.raises(UserError) as refused:
        load(tmp_path, GOOD.replace(old, new, 1))
    message = str(refused.value)
    assert message.startswith(f"{tmp_path}/mine.yaml, line {line}: ")
    assert says in message
    assert "\n" not in message


def test_a_flag_that_is_searched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--dropout: is searched by .*, line 2"):
        load(tmp_path, GOOD, flags={"dropout": 0.1})


def test_sizes_that_are_searched_see_the_same_positions(tmp_path: Path) -> None:
    sweep = load(tmp_path, "space:\n  model_size: {type: categorical, choices: [small, large]}\n")
    assert {sweep.trial_settings({"model_size": size}).model.max_position for size in ("small", "large")} == {200}


def draws(sweep: Sweep, study: optuna.Study, count: int) -> list[dict[str, object]]:
    drawn = []
    for _ in range(count):
        study.sampler = make_sampler(sweep, len(study.trials))
        trial = study.ask()
        drawn.append(suggest(trial, sweep.space))
        study.tell(trial, trial.number / 10)
    return drawn


def test_a_study_that_goes_on_draws_what_it_would_have_drawn_without_a_stop(tmp_path: Path) -> None:
    sweep = load(tmp_path, GOOD)
    whole = draws(sweep, optuna.create_study(), 14)
    stopped = optuna.create_study()
    assert draws(sweep, stopped, 6) + draws(sweep, stopped, 8) == whole
    assert len({str(drawn) for drawn in whole}) == 14


def test_another_seed_draws_otherwise(tmp_path: Path) -> None:
    first, other = (draws(load(tmp_path, f"{GOOD}seed: {seed}\n"), optuna.create_study(), 3) for seed in (0, 1))
    assert first != other


def test_ranks_are_drawn_only_for_trials_with_lora(tmp_path: Path) -> None:
    text = (
        "space:\n  lora_rank: {type: int, low: 2, high: 8}\n  use_lora: {type: categorical, choices: [true, false]}\n"
    )
    drawn = draws(load(tmp_path, text), optuna.create_study(), 20)
    assert {("lora_rank" in one) is one["use_lora"] for one in drawn} == {True}
    assert {one["use_lora"] for one in drawn} == {True, False}


def test_a_grid_visits_every_point_once(tmp_path: Path) -> None:
    text = "space:\n  dropout: {type: float, low: 0.0, high: 0.2, step: 0.1}\n  use_lora: {type: categorical, choices: "
    sweep = load(tmp_path, text + "[true, false]}\nsampler: grid\nbudget: {trials: 6}\n")
    study = optuna.create_study()
    seen = set()
    for number in range(6):
        study.sampler = make_sampler(sweep, number)
        trial = study.ask()
        seen.add(str(suggest(trial, sweep.space)))
        study.sampler = optuna.samplers.RandomSampler()
        study.tell(trial, 1.0)
    assert len(seen) == 6


def test_the_pruner_follows_the_number_of_trials() -> None:
    auto = PrunerSettings()
    chosen = [resolve_pruner(auto, trials=trials, epochs=20) for trials in (39, 40)]
    assert chosen == ["median", "hyperband"]
    assert resolve_pruner(auto, trials=40, epochs=3) == "none"
    assert resolve_pruner(PrunerSettings(name="patient"), trials=40, epochs=20) == "patient"


def test_no_trial_is_pruned_before_its_third_epoch(tmp_path: Path) -> None:
    sweep = load(tmp_path, GOOD.replace("trials: 12", "trials: 40"))
    study = optuna.create_study(pruner=make_pruner(sweep), study_name="fixed")
    pruned_at = set()
    for number in range(60):
        trial = study.ask()
        for epoch in range(1, 21):
            trial.report(number + 1 / epoch, epoch)  # each worse than all before
            if trial.should_prune():
                pruned_at.add(epoch)
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, float(number))
    assert min(pruned_at) == 3


def test_a_budget_is_not_negative() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        Budget(hours=0)


def test_settings_that_only_go_together_are_taken_in_any_order(tmp_path: Path) -> None:
    text = GOOD.replace("epochs: 20", "accumulation_steps: 64\n  batch_size: 128")
    assert load(tmp_path, text).base.training.accumulation_steps == 64


def test_a_grid_that_would_repeat_trials_is_refused(tmp_path: Path) -> None:
    space = "{use_lora: {type: categorical, choices: [true, false]}, lora_rank: {type: int, low: 2, high: 3}}"
    with pytest.raises(UserError, match=r"line 1: space.lora_rank: a grid would repeat"):
        load(tmp_path, f"space: {space}\nsampler: grid\nbudget: {{trials: 2}}\n")


@pytest.mark.parametrize(("text", "says"), [("", "nothing to search"), ("[1]", "expected a sweep"), ("3", "found int")])
def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(tmp_path, text)


def test_a_missing_file_and_an_empty_name_are_refused(tmp_path: Path) -> None:
    load(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"mien.yaml: no such sweep file; did you mean 'mine.yaml'"):
        load_sweep(tmp_path / "mien.yaml")
    with pytest.raises(UserError, match="is no folder name"):
        load_sweep(tmp_path / "mine.yaml", name="")


def test_a_base_is_found_beside_the_sweep_from_any_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_sweep(ROOT / "sweeps" / "quick.yaml").base.adaptation.use_lora


def test_steps_are_settings_as_a_person_would_write_them(tmp_path: Path) -> None:
    sweep = load(tmp_path, GOOD.replace("high: 0.5", "high: 0.5, step: 0.05"))
    assert str(sweep.trial_settings({"dropout": 0.15000000000000002}).model.dropout) == "0.15"
