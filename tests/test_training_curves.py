"""Do the simulated training curves mean what their kind says, and are they as wide as real ones?"""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "experiments" / "doctor" / "training_curves.py"
RUNS = 60

# The guide's excerpts: epoch, training and validation loss. Its vocabulary has 1,000 codes.
GUIDE_CHANCE = math.log(1000)
HEALTHY = [(1, 7.00, 6.95), (5, 6.50, 6.48), (10, 6.20, 6.22), (15, 6.00, 6.05)]
OVERFITTING = [(1, 7.00, 6.95), (5, 6.50, 6.48), (10, 6.00, 6.55), (15, 5.50, 6.80)]
RANDOM_CODES = [
    (1, 6.9651, 6.9181),
    (2, 6.9097, 6.9157),
    (10, 6.7145, 7.0427),
    (20, 6.2970, 7.1356),
    (21, 6.2555, 7.1442),
]
UNDERFITTING = [(1, 7.00, 6.95), (5, 6.90, 6.88), (10, 6.85, 6.82), (15, 6.80, 6.78)]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_curves", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_curves"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


curves = load_script()


@pytest.fixture(scope="module")
def runs() -> dict:
    return {kind: [curves.simulate_run(kind, seed) for seed in range(RUNS)] for kind in curves.KINDS}


def losses(run) -> tuple[np.ndarray, np.ndarray]:
    """Recorded training and validation losses."""
    return tuple(np.array([point["value"] for point in run.history[name]]) for name in ("train_loss", "val_loss"))


def every(runs: dict) -> list:
    return [run for kind in curves.KINDS for run in runs[kind]]


# Form


def test_the_same_arguments_give_the_same_run() -> None:
    for kind in curves.KINDS:
        first, second = curves.simulate_run(kind, 3), curves.simulate_run(kind, 3)
        assert repr(first.history) == repr(second.history)
        assert first.lr == second.lr
        assert repr(curves.simulate_run(kind, 4).history) != repr(first.history)


def test_a_history_has_every_series_for_the_same_5_to_100_ascending_epochs(runs: dict) -> None:
    names = {"train_loss", "val_loss", "train_accuracy", "val_accuracy", "learning_rate"}
    for run in every(runs):
        assert set(run.history) == names
        epochs = [point["epoch"] for point in run.history["val_loss"]]
        assert 5 <= len(epochs) <= 100
        assert epochs == list(range(epochs[0], epochs[0] + len(epochs)))
        assert epochs[0] in (1, 2)
        assert all([point["epoch"] for point in points] == epochs for points in run.history.values())
        assert list(run.truth.epochs) == epochs


def test_epochs_vocabularies_and_first_epochs_vary(runs: dict) -> None:
    for kind in curves.KINDS:
        lengths = [len(run.truth.epochs) for run in runs[kind]]
        assert min(lengths) <= 8
        assert max(lengths) >= 60
        vocabularies = [run.vocab_size for run in runs[kind]]
        assert min(vocabularies) >= 200
        assert max(vocabularies) <= 30_000
        assert max(vocabularies) > 30 * min(vocabularies)
        assert any(run.truth.epochs[0] == 2 for run in runs[kind])
        assert {run.cause for run in runs[kind]} == set(curves.CAUSES[kind])


def test_accuracies_are_shares_and_numbers_are_finite_except_where_a_run_is_lost(runs: dict) -> None:
    for run in every(runs):
        for name in ("train_accuracy", "val_accuracy"):
            assert all(0 <= point["value"] <= 1 for point in run.history[name])
        train, val = losses(run)
        assert run.kind == "diverging" or (np.isfinite(train).all() and np.isfinite(val).all())
        lost = np.isnan(val)
        assert (np.diff(lost.astype(int)) >= 0).all(), "once NaN, NaN"


# The model of training, against what is known exactly


def problem_of(patients: int, seed: int, learnable: float = 0.4):
    task = curves.Task(vocab_size=1000, learnable=learnable, reach=1.0, patients=patients, spectrum=0.8, signal=1.0)
    return curves.draw_problem(task, np.random.default_rng(seed))


@pytest.mark.parametrize("patients", [96, 256, 2000])
def test_fitted_to_the_end_the_errors_are_those_of_least_squares(patients: int) -> None:
    """Gaussian design: training error (1 - N/P) of the label noise, test error 1 + N/(P - N - 1) of it."""
    train, val = [], []
    for seed in range(400):
        problem = problem_of(patients, seed)
        reading = curves.read(problem, problem.solution)
        train.append(float(reading.train_error) * problem.target)
        val.append(float(reading.val_error))
    features, noise = curves.FEATURES, 0.6
    for values, expected in ((train, 1 - features / patients), (val, 1 + features / (patients - features - 1))):
        assert abs(np.mean(values) - noise * expected) < 4 * np.std(values) / math.sqrt(len(values))


def test_fewer_patients_than_weights_are_fitted_without_error() -> None:
    problem = problem_of(40, 0)
    assert curves.read(problem, problem.solution).train_error == pytest.approx(0, abs=1e-9)
    assert (problem.rates > 0).sum() == 40


def test_the_noise_free_path_is_the_closed_form_of_gradient_descent() -> None:
    problem = problem_of(200, 1)
    recipe = curves.Recipe(
        epochs=5, steps_per_epoch=8, rate=0.7, lr=1e-3, warmup=0.0, decay="none", init=0.0, jitter=0.01
    )
    path = curves.descend(problem, recipe, np.random.default_rng(0))[:, 0]
    done = 1 - (1 - 0.7 * problem.rates[None, :]) ** np.arange(1, 41)[:, None]
    np.testing.assert_allclose(path, done * problem.solution, atol=1e-9)


def test_gradient_noise_adds_what_jitter_says() -> None:
    problem = problem_of(100_000, 2)
    recipe = curves.Recipe(
        epochs=100, steps_per_epoch=200, rate=0.3, lr=1e-3, warmup=0.0, decay="none", init=0.0, jitter=0.02
    )
    reading = curves.read(problem, curves.descend(problem, recipe, np.random.default_rng(0))[10_000:])
    excess = np.mean(reading.train_error[:, 1] - reading.train_error[:, 0])
    assert excess == pytest.approx(0.3 * 0.02, rel=0.25)


def test_a_rate_above_two_explodes_and_below_two_does_not() -> None:
    problem = problem_of(200, 3)
    for rate, explodes in ((1.9, False), (2.1, True)):
        recipe = curves.Recipe(
            epochs=20, steps_per_epoch=20, rate=rate, lr=1e-3, warmup=0.0, decay="none", init=0.0, jitter=0.001
        )
        error = curves.read(problem, curves.descend(problem, recipe, np.random.default_rng(0))).train_error[-1, 0]
        assert (not error < 1) == explodes


def test_predicting_nothing_costs_chance_on_both_sides_and_random_weights_cost_more() -> None:
    for patients in (40, 300):
        problem = problem_of(patients, 4)
        nothing = curves.read(problem, np.zeros(curves.FEATURES))
        assert nothing.train_error == pytest.approx(1)
        assert nothing.val_error == pytest.approx(1)
        start = curves.draw_start(problem, 0.02, np.random.default_rng(0))
        assert curves.read(problem, start).val_error == pytest.approx(1.02)
        assert curves.read(problem, start).train_error > 1


def test_a_lost_run_stays_lost_even_where_its_weights_come_back() -> None:
    returns = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        draw = curves.draw_run("diverging", "rate too high", rng)
        bounded = {"epochs": 40, "steps_per_epoch": 5, "rate": 2.5, "clip": 0.5, "jitter": 0.01}
        state = rng.bit_generator.state
        draw = replace(draw, recipe=replace(draw.recipe, **bounded, overflow=math.inf))
        _, free = curves.record(draw, rng)
        limit = float(np.median(free.val_loss)) / free.chance
        rng.bit_generator.state = state
        _, truth = curves.record(replace(draw, recipe=replace(draw.recipe, overflow=limit)), rng)
        lost = np.isnan(truth.val_loss)
        assert lost.any()
        assert (np.diff(lost.astype(int)) >= 0).all()
        returns += bool((free.val_loss[: len(lost)][lost] < limit * free.chance).any())
    assert returns, "none came back: the test is empty"


def test_the_loss_of_an_error_is_smooth_at_chance_and_grows_with_the_weights_beyond() -> None:
    below, at, above = curves.nats(np.array([1 - 1e-6, 1, 1 + 1e-6]), 7.0)
    assert at == 7.0
    assert (above - at) == pytest.approx(at - below, rel=1e-3)
    assert curves.nats(np.array(1e8), 1.0) == pytest.approx(2e4, rel=1e-3)


# The kinds


def test_healthy_runs_learn_most_of_what_is_attainable_and_end_at_their_lowest(runs: dict) -> None:
    for run in runs["healthy"]:
        truth = run.truth
        assert truth.chance - truth.val_loss[-1] >= 0.6 * (truth.chance - truth.floor)
        assert truth.val_loss[-1] - truth.val_loss.min() <= 0.005 * truth.chance
        _, val = losses(run)
        assert abs(val[-1] - truth.val_loss[-1]) <= 0.03 * truth.chance
        assert run.history["val_accuracy"][-1]["value"] > 2 / run.vocab_size


def test_overfitting_runs_turn_while_training_goes_on_falling(runs: dict) -> None:
    for run in runs["overfitting"]:
        truth, lowest = run.truth, int(np.argmin(run.truth.val_loss))
        assert truth.train_loss[-1] < truth.train_loss[lowest] - 0.03 * truth.chance
        rose = truth.val_loss[-1] > truth.val_loss[lowest] + 8 * truth.noise_sd
        never_fell = truth.val_loss[0] - truth.val_loss[lowest] < max(truth.noise_sd, 0.003 * truth.chance)
        assert rose or never_fell
        assert truth.val_loss[-1] > truth.train_loss[-1] + 0.04 * truth.chance


def test_underfitting_runs_learn_little_but_visibly_and_together(runs: dict) -> None:
    for run in runs["underfitting"]:
        truth = run.truth
        learned = truth.chance - truth.val_loss[-1]
        assert 4 * truth.noise_sd <= learned <= 0.3 * (truth.chance - truth.floor)
        assert abs(truth.val_loss[-1] - truth.train_loss[-1]) <= max(0.25 * learned, 0.003 * truth.chance)
        assert truth.val_loss[-1] < truth.val_loss[0]


def test_diverging_runs_end_lost_or_at_chance_and_above_in_training_too(runs: dict) -> None:
    for run in runs["diverging"]:
        ends = np.array([run.truth.train_loss[-1], run.truth.val_loss[-1]])
        assert np.isnan(ends).all() or (ends >= run.truth.chance).all()


def test_flat_runs_stay_at_chance(runs: dict) -> None:
    for run in runs["flat"]:
        train, val = losses(run)
        assert np.abs(np.stack([train, val]) / run.truth.chance - 1).max() < 0.06
        assert run.history["val_accuracy"][-1]["value"] < 2 / run.vocab_size + 0.002


@pytest.mark.parametrize("kind", curves.KINDS)
def test_no_truth_shows_two_kinds(runs: dict, kind: str) -> None:
    for run in runs[kind]:
        assert [other for other in curves.KINDS if curves.shows(other, run.truth)] == [kind]


def test_kinds_differ_where_they_should(runs: dict) -> None:
    def median(kind: str, statistic) -> float:
        return float(np.median([statistic(run) for run in runs[kind]]))

    def learned(run) -> float:
        return (run.truth.chance - run.truth.val_loss[-1]) / run.truth.chance

    def gap(run) -> float:
        return (run.truth.val_loss[-1] - run.truth.train_loss[-1]) / run.truth.chance

    assert median("healthy", learned) > 5 * median("underfitting", learned) > 20 * abs(median("flat", learned))
    assert median("overfitting", gap) > 5 * median("healthy", gap)
    assert abs(median("underfitting", gap)) < 0.01
    lr = {kind: median(kind, lambda run: run.lr) for kind in curves.KINDS}
    assert lr["underfitting"] < lr["healthy"] < lr["diverging"]


def test_diverging_runs_are_some_lost_some_finite_some_after_learning(runs: dict) -> None:
    lost = [np.isnan(losses(run)[1][-1]) for run in runs["diverging"]]
    assert 0.25 < np.mean(lost) < 0.75
    learned_first = [
        np.nanmin(run.truth.val_loss / run.truth.chance, initial=np.inf) < 0.88 for run in runs["diverging"]
    ]
    assert 0.25 < np.mean(learned_first) < 0.9


def test_healthy_runs_have_small_and_large_gaps_and_some_spikes(runs: dict) -> None:
    gaps, spikes = [], 0
    for run in runs["healthy"]:
        train, val = losses(run)
        gaps.append((val[-1] - train[-1]) / (run.truth.chance - val[-1]))
        spikes += bool((np.diff(val) > 0.02 * run.truth.chance).any())
    assert min(gaps) < 0
    assert max(gaps) > 0.3
    assert 1 <= spikes <= RUNS // 4


def test_validation_noise_is_there_and_small(runs: dict) -> None:
    shares = [run.truth.noise_sd / run.truth.chance for run in runs["healthy"]]
    assert 1e-4 < np.median(shares) < 0.005


def test_accuracy_stays_at_chance_on_random_codes_while_training_memorises(runs: dict) -> None:
    memorised = [run for run in runs["overfitting"] if run.cause == "random codes memorised"]
    for run in memorised:
        assert run.truth.val_accuracy.max() < 1.5 / run.vocab_size
        assert run.truth.train_accuracy[-1] > run.truth.train_accuracy[0]


# The guide


def features(rows: list[tuple[float, float, float]], chance: float) -> dict[str, float]:
    """Of (epoch, training, validation loss): what a reader compares, in shares of chance."""
    table = np.array(rows, dtype=float)
    epochs, train, val = table[:, 0], table[:, 1], table[:, 2]
    lowest = int(np.argmin(val))
    return {
        "start": val[0] / chance,
        "training falls": (train[0] - train[-1]) / chance,
        "validation falls": (val[0] - val[lowest]) / chance,
        "validation rises": (val[-1] - val[lowest]) / chance,
        "turn": (epochs[lowest] - epochs[0]) / (epochs[-1] - epochs[0]),
        "gap": (val[-1] - train[-1]) / chance,
        "first gap": (val[0] - train[0]) / chance,
    }


def features_of(run) -> dict[str, float]:
    train, val = losses(run)
    return features(list(zip(run.truth.epochs, train, val, strict=True)), run.truth.chance)


@pytest.mark.parametrize(
    ("kind", "excerpt"),
    [
        ("healthy", HEALTHY),
        ("overfitting", OVERFITTING),
        ("overfitting", RANDOM_CODES),
        ("underfitting", UNDERFITTING),
    ],
)
def test_the_guides_excerpts_lie_within_what_is_simulated(runs: dict, kind: str, excerpt: list) -> None:
    guide = features(excerpt, GUIDE_CHANCE)
    simulated = [features_of(run) for run in runs[kind]]
    for name, value in guide.items():
        values = [row[name] for row in simulated]
        assert min(values) <= value <= max(values), (name, value, min(values), max(values))


@pytest.mark.parametrize(
    ("kind", "excerpt"),
    [
        ("healthy", HEALTHY),
        ("overfitting", OVERFITTING),
        ("overfitting", RANDOM_CODES),
        ("underfitting", UNDERFITTING),
    ],
)
def test_the_guides_excerpts_lie_nearest_to_their_own_kind(runs: dict, kind: str, excerpt: list) -> None:
    guide = np.array(list(features(excerpt, GUIDE_CHANCE).values()))
    distances = {}
    for other in ("healthy", "overfitting", "underfitting", "flat"):
        rows = np.array([list(features_of(run).values()) for run in runs[other]])
        distances[other] = np.abs(rows - guide).sum(axis=1).min()
    assert min(distances, key=distances.get) == kind, distances
