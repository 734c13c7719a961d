"""The ceiling of simulated outcomes against enumeration of hidden paths, of outcomes, and against other predictors."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from scipy.integrate import quad
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sksurv.metrics import concordance_index_censored

from behrt.ceiling import (
    auroc,
    bound_of_c_index,
    ceiling,
    ceiling_of,
    exact_risk,
    exact_states,
    expected_c_index,
    expected_metric,
    first_seen,
    has_ceiling,
    log_emission,
    outcome_labels,
)
from behrt.cohort import sample, simulate
from behrt.concordance import harrell_c
from behrt.config import UserError
from behrt.floor import states_at_the_end
from behrt.outcomes import OUTCOMES, OutcomeModel, draw_outcomes, load_outcome_model, outcome_generator, outcome_model
from behrt.population import Population, population
from behrt.prepare import prepare
from behrt.prepare_options import PrepareOptions
from behrt.sequences import open_prepared

from .test_floor import CLS, SEP, SPECIAL, UNK, A, B, C, D, tiny, tokenised

# --- P(state | record)


def enumerated(hidden: Population, tokens: list[str], codes: list[int], visits: list[int]) -> np.ndarray:
    """P(profile, stage of the last visit | codes), [profiles, stages], summing the joint over every hidden path."""
    ids = [tokens.index(code) if code in tokens else UNK for code in hidden.codes]
    joint = np.zeros(hidden.initial.shape)
    for profile in range(len(hidden.profiles)):
        for path in itertools.product(range(len(hidden.stages)), repeat=max(visits)):  # seen or not, from the first
            probability = hidden.prior[profile] * hidden.initial[profile, path[0]]
            for now, then in itertools.pairwise(path):
                probability *= hidden.transition[profile, now, then]
            for token, visit in zip(codes, visits, strict=True):
                if token not in (CLS, SEP):
                    emission = hidden.emission[profile, path[visit - 1]]
                    probability *= sum(share for share, own in zip(emission, ids, strict=True) if own == token)
            joint[profile, path[-1]] += probability
    return joint / joint.sum()


HISTORIES = {
    "one visit": ([CLS, A, B, SEP], [0, 1, 1, 1]),
    "three visits": ([CLS, A, B, SEP, C, SEP, D, D, SEP], [0, 1, 1, 1, 2, 2, 3, 3, 3]),
    "the first visits cut off": ([CLS, B, SEP, D, SEP], [0, 2, 2, 3, 3]),
    "a visit that is not seen": ([CLS, A, SEP, D, SEP], [0, 1, 1, 3, 3]),
}


@pytest.mark.parametrize("zeros", [False, True], ids=["", "with zeros"])
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_the_state_at_the_end_equals_enumeration_of_all_paths(history, zeros):
    tokens, hidden = [*SPECIAL, *"abcd"], tiny(1, zeros=zeros)
    codes, visits = history
    expected = enumerated(hidden, tokens, codes, visits)
    longer = ([CLS, *[A, SEP] * 5], [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])  # beside it in the block
    found = states_at_the_end(
        hidden,
        log_emission(hidden, tokens),
        np.array([*codes, *longer[0]], np.int32),
        np.array([*visits, *longer[1]], np.int32),
        np.array([0, len(codes), len(codes) + 11]),
    )
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ordinary", ["ab", "dcx"], ids=["c and d unknown", "a and b unknown, one foreign"])
def test_an_unknown_code_counts_as_one_of_those_that_are_unknown(ordinary):
    tokens, hidden = [*SPECIAL, *ordinary], tiny(1)
    codes, visits = [CLS, 5, UNK, SEP, UNK, 6, SEP], [0, 1, 1, 1, 2, 2, 2]
    found = states_at_the_end(
        hidden, log_emission(hidden, tokens), np.array(codes, np.int32), np.array(visits, np.int32), np.array([0, 7])
    )
    np.testing.assert_allclose(found[0], enumerated(hidden, tokens, codes, visits), rtol=0, atol=1e-12)


# --- metrics


def test_auroc_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    label, score = generator.random(500) < 0.3, np.round(generator.random(500), 1)  # many ties
    assert auroc(label * 1.0, 1.0 - label, score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert np.isnan(auroc(np.ones(3), np.zeros(3), score[:3]))


def test_the_c_index_is_that_of_all_pairs():
    generator = np.random.default_rng(0)
    event, days = generator.random(80) < 0.4, np.ceil(generator.exponential(20, 80))  # many ties
    risk = np.round(generator.random(80), 1)
    pairs = [
        (risk[first] > risk[other]) + (risk[first] == risk[other]) / 2
        for first in np.flatnonzero(event)
        for other in range(80)
        if days[other] > days[first] or (days[other] == days[first] and not event[other])
    ]
    assert harrell_c(event, days, risk) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert np.isnan(harrell_c(np.zeros(3, bool), days[:3], risk[:3]))
    assert np.isnan(harrell_c(np.ones(1, bool), days[:1], risk[:1]))


def test_the_expected_auroc_equals_enumeration_of_all_outcomes():
    generator = np.random.default_rng(1)
    risk = np.array([0.1, 0.2, 0.2, 0.5, 0.7, 0.9])
    for score in (risk, generator.random(6), np.array([1.0, 1, 2, 2, 3, 3])):
        concordant = comparable = 0.0
        for label in itertools.product([0.0, 1.0], repeat=6):
            probability = np.prod(np.where(label, risk, 1 - risk))
            pairs = sum(label) * (6 - sum(label))
            comparable += probability * pairs
            if pairs:
                concordant += probability * pairs * roc_auc_score(label, score)
        assert auroc(risk, 1 - risk, score) == pytest.approx(concordant / comparable, abs=1e-12)


SMALL = OutcomeModel(
    disease=np.array([[0.1, 0.9], [0.3, 0.4]]),
    readmission=np.array([[0.1, 0.9], [0.9, 0.1]]),
    hazard=np.array([[0.05, 2.0], [0.4, 0.8]]),
    follow_up=(0.5, 2.0),
)


def test_who_is_seen_to_die_first_equals_integration():
    states = np.random.default_rng(0).dirichlet(np.ones(4), size=3).reshape(3, 2, 2)
    hazard = SMALL.hazard.ravel()

    def density(time: float, row: int, other: int) -> float:
        followed = min(1.0, (2.0 - time) / 1.5)
        dies = states[row].ravel() @ (hazard * np.exp(-hazard * time))
        lives = states[other].ravel() @ np.exp(-hazard * time)
        return float(dies * lives * followed**2)

    found = first_seen(SMALL, states)
    for row, other in itertools.product(range(3), repeat=2):
        expected = quad(density, 0, 2, args=(row, other), points=[0.5], epsabs=1e-13)[0]
        assert found[row, other] == pytest.approx(expected, abs=1e-11)


def test_the_expected_c_index_is_what_repeated_draws_give():
    generator = np.random.default_rng(2)
    states = generator.dirichlet(np.full(4, 0.3), size=40).reshape(40, 2, 2)
    risk = exact_risk("survival", SMALL, states)
    in_order = (np.sign(risk[:, None] - risk) + 1) / 2
    concordant = comparable = 0.0
    for _ in range(2000):
        drawn = np.array([generator.choice(4, p=state.ravel()) for state in states])
        outcomes = draw_outcomes(SMALL, drawn // 2, drawn % 2, generator)
        pairs = outcomes.death[:, None] & (outcomes.days[:, None] < outcomes.days)
        comparable += pairs.sum()
        concordant += (pairs * in_order).sum()
    first = first_seen(SMALL, states)
    assert expected_c_index(first, risk) == pytest.approx(concordant / comparable, abs=0.004)
    assert expected_c_index(first, risk) <= bound_of_c_index(first) < expected_c_index(first, risk) + 0.001
    assert expected_c_index(first, np.zeros(40)) == pytest.approx(0.5, abs=1e-12)


# --- 6,000 patients of the population


@pytest.fixture(scope="module")
def people() -> SimpleNamespace:
    """Outcomes of 6,000 patients, and what their codes tell; the 100 rarest codes are unknown."""
    hidden, model = population("hmm"), outcome_model("hmm")
    drawn = sample(hidden, 6000, np.random.default_rng(0))
    known = np.ones(995, bool)
    known[np.argsort(np.bincount(drawn.codes, minlength=995), kind="stable")[:100]] = False
    tokens = [*SPECIAL, *np.array(hidden.codes)[known]]
    records = tokenised(drawn, known=known)
    last = drawn.stages[np.cumsum(drawn.visits) - 1]
    outcomes = draw_outcomes(model, drawn.profiles, last, outcome_generator(0))
    happened = {"disease": outcomes.disease, "readmission": outcomes.readmission, "survival": outcomes.death}
    found = SimpleNamespace(
        hidden=hidden,
        model=model,
        tokens=tokens,
        records=records,
        profiles=drawn.profiles,
        last=last,
        happened=happened,
    )
    found.labels = {
        name: pl.DataFrame({"boolean_value": label, "float_value": outcomes.days}) for name, label in happened.items()
    }
    found.states = states_of(found, hidden)
    return found


def states_of(people: SimpleNamespace, hidden: Population, *, only_last: bool = False) -> np.ndarray:
    """What a model of the population tells of the states, seeing whole records or their last visits."""
    codes, visits, offsets = people.records.codes, people.records.visits, people.records.offsets
    evidence = log_emission(hidden, people.tokens)
    if only_last:
        ends = np.repeat(visits[offsets[1:] - 1], np.diff(offsets))
        codes = np.where((visits == ends) | (visits == 0), codes, SEP)  # [SEP] says nothing
    blocks = []
    for first in range(0, len(offsets) - 1, 200):
        block = offsets[first : first + 201]
        span = slice(block[0], block[-1])
        blocks.append(states_at_the_end(hidden, evidence, codes[span], visits[span], block - block[0]))
    return np.concatenate(blocks)


def surprise(risk: np.ndarray, happened: np.ndarray) -> np.ndarray:
    """How far each tenth of the patients, by risk, is from the risk that it was given, in standard deviations."""
    tenths = np.array_split(np.argsort(risk), 10)
    return np.array(
        [
            (happened[tenth].sum() - risk[tenth].sum()) / np.sqrt((risk[tenth] * (1 - risk[tenth])).sum())
            for tenth in tenths
        ]
    )


@pytest.mark.parametrize("outcome", ["disease", "readmission"])
def test_the_exact_risk_is_calibrated(people, outcome):
    risk = exact_risk(outcome, people.model, people.states)
    assert abs(surprise(risk, people.happened[outcome])).max() < 4
    assert abs(surprise(risk**1.5, people.happened[outcome])).max() > 4  # the control


def test_the_state_is_known_as_well_as_it_claims(people):
    claimed = people.states.max(axis=(1, 2))
    guess = people.states.reshape(6000, -1).argmax(axis=1)
    hits = guess == people.profiles * 4 + people.last
    assert abs(hits.sum() - claimed.sum()) / np.sqrt((claimed * (1 - claimed)).sum()) < 4
    assert 0.5 < hits.mean() < 0.95


def code_counts(people: SimpleNamespace) -> np.ndarray:
    """[patients, vocab_size + 1] ln(1 + count) of each code, and the length of the history."""
    patient = np.repeat(np.arange(6000), np.diff(people.records.offsets))
    counts = np.zeros((6000, len(people.tokens) + 1))
    np.add.at(counts, (patient, people.records.codes), 1)
    counts[:, CLS] = 0
    counts[:, -1] = np.diff(people.records.offsets) / 10
    return np.log1p(counts)


@pytest.fixture(scope="module")
def rivals(people: SimpleNamespace) -> dict[str, dict[str, np.ndarray]]:
    """Scores of all patients by outcome and predictor; the last 2,000 were not learned from."""
    hidden, counts = people.hidden, code_counts(people)
    views = {
        "last visit only": states_of(people, hidden, only_last=True),
        "transitions forgotten": states_of(people, replace(hidden, transition=np.full((24, 4, 4), 0.25))),
        "profiles forgotten": np.broadcast_to(people.states.mean(axis=0), (6000, 24, 4))
        * people.states.sum(axis=1, keepdims=True),
        "too much background": states_of(people, replace(hidden, emission=0.5 * hidden.emission + 0.5 / 995)),
        "stage forgotten": people.states.sum(axis=2, keepdims=True) * people.states.mean(axis=(0, 1)),
    }
    scores = {}
    for outcome in OUTCOMES:
        own = {name: exact_risk(outcome, people.model, states) for name, states in views.items()}
        regression = LogisticRegression(C=0.03, max_iter=1000)
        regression.fit(counts[:4000], people.happened[outcome][:4000])
        own["codes counted"] = regression.decision_function(counts)
        own["a number drawn"] = np.random.default_rng(0).random(6000)
        scores[outcome] = own
    return scores


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_no_other_predictor_tried_beats_the_ceiling_in_expectation(people, rivals, outcome):
    states = people.states[4000:]
    bound = ceiling_of(outcome, people.model, states, people.labels[outcome][4000:]).bound
    for name, score in rivals[outcome].items():
        assert expected_metric(outcome, people.model, states, score[4000:]) < bound, name


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_no_other_predictor_tried_beats_the_ceiling_on_drawn_outcomes_beyond_sampling_error(people, rivals, outcome):
    def reached(score: np.ndarray, rows: np.ndarray) -> float:
        happened = people.happened[outcome][rows]
        if outcome == "survival":
            return harrell_c(happened, people.labels[outcome]["float_value"].to_numpy()[rows], score[rows])
        return auroc(happened * 1.0, 1.0 - happened, score[rows])

    generator, best = np.random.default_rng(0), exact_risk(outcome, people.model, people.states)
    held_out = np.arange(5000, 6000)
    samples = [held_out, *(generator.choice(held_out, len(held_out)) for _ in range(25))]
    of_best = np.array([reached(best, rows) for rows in samples])
    for name, score in rivals[outcome].items():
        gain, *gains = np.array([reached(score, rows) for rows in samples]) - of_best
        assert gain < 2 * np.std(gains), name


def test_who_knows_the_hidden_state_beats_the_ceiling(people):
    """The control of the two above: the ceiling is one for predictions from the record only."""
    known = people.model.readmission[people.profiles, people.last]
    found = ceiling_of("readmission", people.model, people.states, people.labels["readmission"])
    happened = people.happened["readmission"]
    assert auroc(happened * 1.0, 1.0 - happened, known) > found.reached + 0.005


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_exact_risk_reaches_its_expectation_on_drawn_outcomes(people, outcome):
    found = ceiling_of(outcome, people.model, people.states, people.labels[outcome])
    assert found.reached == pytest.approx(found.expected, abs=0.03)
    assert 0.75 < found.expected < 0.85
    assert found.expected <= found.bound < found.expected + 1e-4


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_on_shuffled_labels_nothing_is_reached(people, outcome):
    shuffled = people.labels[outcome].sample(fraction=1.0, shuffle=True, seed=1)
    assert ceiling_of(outcome, people.model, people.states, shuffled).reached == pytest.approx(0.5, abs=0.035)


def test_order_matters_for_readmission_and_hardly_for_disease(people, rivals):
    def share(outcome: str) -> float:
        """Of the ceiling above 0.5, what counting codes reaches."""
        states = people.states[4000:]
        best = expected_metric(outcome, people.model, states, exact_risk(outcome, people.model, states))
        counted = expected_metric(outcome, people.model, states, rivals[outcome]["codes counted"][4000:])
        return (counted - 0.5) / (best - 0.5)

    assert share("readmission") < 0.6
    assert share("disease") > 0.85


# --- prepared records and label files


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`meds` and `prepared`, of 400 patients."""
    folder = tmp_path_factory.mktemp("cohort")
    simulate(folder / "meds", patients=400)
    prepare(folder / "meds", folder / "prepared", PrepareOptions())
    return folder


def filtered(hidden: Population, tokens: tuple[str, ...], visits: list[list[int]]) -> np.ndarray:
    """P(profile, stage of the last visit), [profiles, stages], a visit and a code at a time."""
    ids = [tokens.index(code) if code in tokens else UNK for code in hidden.codes]
    belief = hidden.prior[:, None] * hidden.initial
    for number, codes in enumerate(visits):
        if number:
            belief = (belief[..., None] * hidden.transition).sum(axis=1)
        for token in codes:
            belief = belief * hidden.emission[..., [own == token for own in ids]].sum(axis=-1)
            belief /= belief.sum()
    return belief


@pytest.mark.parametrize("visit", [1, 2, None], ids=["after the first visit", "after the second", "at the end"])
def test_codes_up_to_the_prediction_time_are_used_and_no_later_ones(cohort, visit):
    data = open_prepared(cohort / "prepared")
    split = data.split("held_out")
    subjects, times, expected = [], [], []
    for place in range(12):
        codes, _, visits = split.sequence(place)
        end = int(visits.max()) if visit is None else visit
        subjects.append(split.subject_ids()[place])
        times.append(split.times(place)[visits == end][-1])
        seen = [codes[(visits == number) & (codes != SEP)].tolist() for number in range(1, end + 1)]
        expected.append(filtered(population("hmm"), data.vocabulary.tokens, seen))
    rows = pl.DataFrame({"subject_id": subjects, "prediction_time": np.array(times)}).reverse()
    found, states = exact_states(data, rows, split="held_out")
    assert found.equals(rows)
    np.testing.assert_allclose(states, expected[::-1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_the_ceiling_is_over_the_labels_of_the_split(cohort, outcome):
    labels = cohort / "meds" / "labels" / f"{outcome}.parquet"
    data, model = open_prepared(cohort / "prepared"), load_outcome_model(labels.parent)
    assert has_ceiling(data, labels)
    found = ceiling(cohort / "prepared", labels, split="train")
    table = outcome_labels(labels).filter(pl.col("subject_id").is_in(data.split("train").subject_ids().tolist()))
    _, states = exact_states(data, table, split="train")
    risk, happened = exact_risk(outcome, model, states), table["boolean_value"].to_numpy()
    assert (found.outcome, found.patients, found.prevalence) == (outcome, 320, happened.mean())
    if outcome == "survival":
        assert found.metric == "c_index"
        expected = concordance_index_censored(happened, table["float_value"].to_numpy(), risk)[0]
    else:
        assert found.metric == "auroc"
        expected = roc_auc_score(happened, risk)
    assert found.reached == pytest.approx(expected, abs=1e-12)


def test_without_structure_the_ceiling_is_a_half(tmp_path):
    simulate(tmp_path / "meds", patients=400, structure="none")
    prepare(tmp_path / "meds", tmp_path / "prepared", PrepareOptions())
    for outcome in OUTCOMES:
        found = ceiling(tmp_path / "prepared", tmp_path / "meds" / "labels" / f"{outcome}.parquet", split="train")
        assert found.expected == pytest.approx(0.5, abs=1e-9)
        assert found.bound == pytest.approx(0.5, abs=1e-9)


# --- what is refused


def test_labels_of_another_cohort_are_refused(cohort, tmp_path):
    simulate(tmp_path / "other", patients=400, seed=1)
    with pytest.raises(UserError, match=r"^\S*/prepared: a label is not at the end of a visit; [^\n]*$"):
        ceiling(cohort / "prepared", tmp_path / "other" / "labels" / "disease.parquet")
    simulate(tmp_path / "none", patients=400, structure="none")  # the same patients at the same times
    with pytest.raises(UserError, match=r"^\S*/disease\.parquet: of another structure than [^\n]*$"):
        ceiling(cohort / "prepared", tmp_path / "none" / "labels" / "disease.parquet")


def test_a_label_inside_a_visit_is_refused(cohort):
    data = open_prepared(cohort / "prepared")
    split = data.split("held_out")
    long = next(place for place in range(len(split)) if (split.sequence(place)[2] == 1).sum() > 4)
    inside = pl.DataFrame({"subject_id": [split.subject_ids()[long]], "prediction_time": split.times(long)[2:3]})
    with pytest.raises(UserError, match=r"a label is not at the end of a visit"):
        exact_states(data, inside, split="held_out")


def test_codes_that_preparation_changed_are_refused(cohort, tmp_path):
    labels = cohort / "meds" / "labels" / "disease.parquet"
    prepare(cohort / "meds", tmp_path / "coarse", PrepareOptions(icd_digits=3))
    assert not has_ceiling(open_prepared(tmp_path / "coarse"), labels)
    with pytest.raises(UserError, match=r"^\S*/coarse: prepared with other codes than were simulated; [^\n]*$"):
        ceiling(tmp_path / "coarse", labels)


def test_a_missing_damaged_or_foreign_label_file_is_one_line_that_names_it(cohort, tmp_path):
    labels = cohort / "meds" / "labels"
    with pytest.raises(UserError, match=r"^\S*/mortality\.parquet: no outcome of a simulated cohort; [^\n]*$"):
        outcome_labels(labels / "mortality.parquet")
    with pytest.raises(UserError, match=r"^\S*/disease\.parquet: no such file or folder; [^\n]*$"):
        outcome_labels(tmp_path / "disease.parquet")
    (tmp_path / "survival.parquet").write_bytes((labels / "survival.parquet").read_bytes()[:-50])
    with pytest.raises(UserError, match=r"^\S*/survival\.parquet: [^\n]*$"):
        outcome_labels(tmp_path / "survival.parquet")
    (tmp_path / "survival.parquet").write_bytes((labels / "disease.parquet").read_bytes())
    with pytest.raises(UserError, match=r"^\S*/survival\.parquet: holds binary labels, [^\n]*$"):
        outcome_labels(tmp_path / "survival.parquet")
