"""Do the baselines see what may be seen, and are they what scikit-learn fits to it?"""

from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sksurv.metrics import concordance_index_censored

from behrt.tasks import baselines
from behrt.tasks.baselines import PENALTIES, Baseline, fit_baselines, threads_for
from behrt.tasks.examples import Examples
from behrt.tasks.histories import History, history_of
from behrt.vocabulary import UNK

from .small_examples import by_chance, examples

VOCABULARY = 25


@pytest.fixture(autouse=True)
def _few_trees(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(baselines, "MOST_TREES", 20)
    monkeypatch.setattr(baselines, "TREES_AT_ONCE", 10)
    with threads_for(0):
        yield


def fitted(train: Examples, tuning: Examples) -> dict[str, Baseline]:
    histories = {"train": history_of(train, VOCABULARY), "tuning": history_of(tuning, VOCABULARY)}
    return {each.name: each for each in fit_baselines(train, tuning, histories)}


def has(patients: list, code: int) -> np.ndarray:
    return np.array([any(own == code for _, own in events) for events in patients])


# --- what is seen


def test_codes_are_counted_up_to_the_prediction_and_no_later_ones():
    patients = [[(0, 5), (0, 5), (10, UNK), (100, 7), (101, 8)], [(200, 9)] * 2 + [(90, 6)]]
    found = history_of(examples(patients, [0, 1]), VOCABULARY)
    counts = found.counts.toarray()
    assert {code: int(counts[0, code]) for code in np.flatnonzero(counts[0])} == {UNK: 1, 5: 2, 7: 1}


def test_age_and_length_of_a_history_are_those_of_its_visible_events():
    found = history_of(examples([[(0, 5), (0, 5), (10, 6), (73, 7), (101, 8)]], [0]), VOCABULARY)
    age, tokens, visits, years = found.numbers[0]
    assert age == pytest.approx(50 + 73 / 365.25, abs=1e-4)
    assert (tokens, visits) == (1 + 4 + 3, 3)
    assert years == pytest.approx(73 / 365.25)


@pytest.mark.parametrize(("day", "lowest", "highest"), [(101, 0.35, 0.65), (100, 0.99, 1.0)], ids=["after", "at"])
def test_a_leak_after_the_prediction_is_not_seen_and_one_at_it_is(day, lowest, highest):
    generator = np.random.default_rng(0)

    def planted(number: int) -> Examples:
        labels = generator.random(number) < 0.4
        patients = by_chance(generator, number)
        for label, events in zip(labels, patients, strict=True):
            if label:
                events.append((day, 24))
        return examples(patients, labels)

    train, tuning, asked = planted(300), planted(100), planted(200)
    for name, each in fitted(train, tuning).items():
        if name != "prevalence":
            reached = roc_auc_score(asked.targets[:, 0], each.predict(history_of(asked, VOCABULARY))[:, 0])
            assert lowest <= reached <= highest, name


# --- what is fitted


@pytest.fixture(scope="module")
def learnt() -> tuple[Examples, Examples, Examples]:
    """Labels that two codes tell something about."""
    generator = np.random.default_rng(1)
    found = []
    for number in (400, 150, 150):
        patients = by_chance(generator, number)
        risk = 0.15 + 0.35 * has(patients, 6) + 0.35 * has(patients, 7)
        found.append(examples(patients, generator.random(number) < risk))
    return found[0], found[1], found[2]


def table(history: History, train: History) -> np.ndarray:
    numbers, of_train = (np.column_stack([h.numbers[:, 0], np.log1p(h.numbers[:, 1:])]) for h in (history, train))
    scaled = (numbers - of_train.mean(0)) / of_train.std(0)
    return np.column_stack([scaled, scaled[:, 0] ** 2, np.log1p(history.counts.toarray())])


def test_the_regression_is_that_of_scikit_learn_with_the_penalty_that_is_best_on_tuning(learnt):
    train, tuning, asked = learnt
    histories = [history_of(each, VOCABULARY) for each in learnt]
    seen, tuning_seen, asked_seen = (table(each, histories[0]) for each in histories)
    models = [LogisticRegression(C=own, max_iter=5000, tol=1e-8).fit(seen, train.targets[:, 0]) for own in PENALTIES]
    best = min(models, key=lambda model: log_loss(tuning.targets[:, 0], model.predict_proba(tuning_seen)[:, 1]))
    found = fitted(train, tuning)["logistic_regression"]
    assert found.about == f"C {best.C:g}"
    np.testing.assert_allclose(found.predict(histories[2])[:, 0], best.predict_proba(asked_seen)[:, 1], atol=5e-3)
    assert roc_auc_score(asked.targets[:, 0], found.predict(histories[2])[:, 0]) > 0.65


def test_the_trees_are_those_of_scikit_learn_that_are_best_on_tuning(learnt):
    train, tuning, _ = learnt
    histories = [history_of(each, VOCABULARY) for each in learnt]
    seen, tuning_seen, asked_seen = (np.column_stack([h.numbers, h.counts.toarray()[:, 5:]]) for h in histories)

    def model(trees: int, leaves: int) -> HistGradientBoostingClassifier:
        settings = {"learning_rate": 0.1, "early_stopping": False, "random_state": 0}
        boosting = HistGradientBoostingClassifier(max_iter=trees, max_leaf_nodes=leaves, **settings)
        return boosting.fit(seen, train.targets[:, 0])

    tried = {(trees, leaves): model(trees, leaves) for leaves in (4, 16) for trees in (10, 20)}
    losses = {key: log_loss(tuning.targets[:, 0], each.predict_proba(tuning_seen)[:, 1]) for key, each in tried.items()}
    trees, leaves = min(losses, key=lambda key: losses[key])
    found = fitted(train, tuning)["boosted_trees"]
    assert found.about == f"{trees} trees of {leaves} leaves"
    expected = tried[trees, leaves].predict_proba(asked_seen)[:, 1]
    np.testing.assert_allclose(found.predict(histories[2])[:, 0], expected, atol=1e-6)


def test_each_of_several_labels_is_fitted_where_it_is_known():
    generator = np.random.default_rng(2)

    def labelled(number: int) -> Examples:
        patients = by_chance(generator, number)
        targets = np.stack([has(patients, 6), has(patients, 7), np.zeros(number)], axis=1).astype(float)
        hidden = generator.random(number) < 0.5
        targets[hidden, 1] = np.nan
        return examples(patients, targets, kind="multilabel", names=("first", "second", "never"))

    train, tuning, asked = labelled(300), labelled(100), labelled(200)
    found = fitted(train, tuning)
    for name in ("logistic_regression", "boosted_trees"):
        scores = found[name].predict(history_of(asked, VOCABULARY))
        for number in (0, 1):
            known = ~np.isnan(asked.targets[:, number])
            assert roc_auc_score(asked.targets[known, number], scores[known, number]) > 0.95
        assert not scores[:, 2].any()
    shares = np.nanmean(train.targets, axis=0)
    np.testing.assert_allclose(found["prevalence"].predict(history_of(asked, VOCABULARY)), np.tile(shares, (200, 1)))


@pytest.mark.parametrize("is_shuffled", [False, True], ids=["", "shuffled"])
def test_survival_is_predicted_from_what_raises_the_rate_and_from_nothing_where_it_is_shuffled(is_shuffled):
    generator = np.random.default_rng(3)

    def followed(number: int) -> Examples:
        patients = by_chance(generator, number)
        rate = np.exp(1.5 * has(patients, 6) - 1.5 * has(patients, 7))
        days, end = generator.exponential(400 / rate), generator.uniform(100, 800, number)
        order = generator.permutation(number) if is_shuffled else np.arange(number)
        return examples(patients, (days < end)[order], kind="survival", days=np.minimum(days, end)[order])

    train, tuning, asked = followed(400), followed(150), followed(300)
    for name, each in fitted(train, tuning).items():
        risk = each.predict(history_of(asked, VOCABULARY))
        reached = concordance_index_censored(asked.seen_events, asked.days, risk)[0]
        if name == "prevalence" or is_shuffled:
            assert reached == pytest.approx(0.5, abs=0.07), name
        else:
            assert reached > 0.65, name


def test_without_tuning_rows_something_sensible_is_fitted(learnt):
    train, tuning, asked = learnt
    for each in fitted(train, tuning.take(np.zeros(0, int))).values():
        scores = each.predict(history_of(asked, VOCABULARY))
        assert np.isfinite(scores).all()
        if each.name != "prevalence":
            assert roc_auc_score(asked.targets[:, 0], scores[:, 0]) > 0.6, each.name
