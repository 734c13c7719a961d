"""Does counting what stands together tell records with something to learn from those without?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import t as student

from behrt import cooccurrence
from behrt.batches import FlatSequences, MaskedSequences, cut, gather
from behrt.cohort import simulate
from behrt.config import load_experiment
from behrt.cooccurrence import (
    STRENGTHS,
    Cooccurrence,
    clustered_interval,
    count,
    cross_fitted,
    evidence_of,
    fit_weights,
    known,
    measure_cooccurrence,
    take,
)
from behrt.masking import mask_tokens
from behrt.metrics import WORTH_HAVING, unigram
from behrt.prepare import prepare
from behrt.prepare_options import PrepareOptions
from behrt.records import Records, open_records, select_records

PAD, UNK, CLS, SEP, MASK = range(5)


def flat(patients: list[list[list[int]]], ages: list[float] | None = None) -> FlatSequences:
    """Sequences of visits of codes, given from 0; one age a patient."""
    codes, visits, offsets, age_of_tokens = [], [], [0], []
    for number, patient in enumerate(patients):
        codes.append(CLS)
        visits.append(0)
        for visit, content in enumerate(patient, start=1):
            codes += [5 + code if code >= 0 else UNK for code in content] + [SEP]
            visits += [visit] * (len(content) + 1)
        age_of_tokens += [math.nan if ages is None else ages[number]] * (len(codes) - offsets[-1])
        offsets.append(len(codes))
    return FlatSequences(
        np.array(codes, np.int32),
        np.array(age_of_tokens, np.float32),
        np.array(visits, np.int32),
        np.array(offsets, np.int64),
    )


def masked(sequences: FlatSequences, vocab_size: int, seed: int = 0) -> MaskedSequences:
    generator = np.random.default_rng(seed)
    return MaskedSequences(sequences, *mask_tokens(sequences.codes, vocab_size=vocab_size, generator=generator))


def random_patients(generator: np.random.Generator, patients: int, codes: int, *, visits: int = 4) -> list:
    return [
        [
            generator.integers(codes, size=generator.integers(1, 9)).tolist()
            for _ in range(generator.integers(1, visits))
        ]
        for _ in range(patients)
    ]


# --- the predictor against a naive one -------------------------------------------------------------------------------


def naive_ratios(training: FlatSequences, evaluated: MaskedSequences, vocab_size: int) -> list[list[float]]:
    """The parts of the mixture by their definition, token by token; nothing is shared with the module."""

    def contexts(sequences: FlatSequences, seen: np.ndarray, patient: int, place: int) -> list[set[int]]:
        """Of one token, the contexts of each view; `seen` is negative where there is none."""
        first, stop = sequences.offsets[patient : patient + 2]
        others = [i for i in range(first, stop) if i != place and seen[i] >= 5]
        visit = sequences.visits[place]
        age = float(sequences.ages[place])
        return [
            {int(seen[i]) for i in others},
            {int(seen[i]) for i in others if sequences.visits[i] == visit},
            {int(seen[i]) for i in others if i == place - 1},
            {int(seen[i]) for i in others if i == place + 1},
            {-1 if math.isnan(age) else min(int(age // 5), 20)},
        ]

    counts: dict[tuple[int, int, int], int] = {}
    totals: dict[tuple[int, int], int] = {}
    frequency = np.ones(vocab_size - 5)
    for patient in range(len(training)):
        for place in range(*training.offsets[patient : patient + 2]):
            x = int(training.codes[place])
            if x < 5:
                continue
            frequency[x - 5] += 1
            for view, own in enumerate(contexts(training, training.codes, patient, place)):
                for c in own:
                    counts[view, c, x] = counts.get((view, c, x), 0) + 1
                    totals[view, c] = totals.get((view, c), 0) + 1
    frequency /= frequency.sum()

    seen = np.where(evaluated.scored, -1, evaluated.shown)
    rows = []
    for patient in range(len(evaluated.sequences)):
        for place in range(*evaluated.sequences.offsets[patient : patient + 2]):
            if not (evaluated.scored[place] and evaluated.shown[place] == MASK):
                continue
            x = int(evaluated.sequences.codes[place])
            p = frequency[x - 5]
            row = [1.0]
            for view, own in enumerate(contexts(evaluated.sequences, seen, patient, place)):
                for strength in STRENGTHS:
                    said = [
                        (counts.get((view, c, x), 0) + strength * p) / (totals.get((view, c), 0) + strength)
                        for c in own
                    ]
                    row.append(sum(said) / len(said) / p if said else 1.0)
            rows.append(row)
    return rows


@pytest.fixture(scope="module")
def tiny() -> tuple[FlatSequences, MaskedSequences, int]:
    generator = np.random.default_rng(3)
    training = flat(random_patients(generator, 12, 8), [4.0, 20.0, 21.0, math.nan, 97.0, 107.0] * 2)
    evaluated = flat([*random_patients(generator, 30, 9), [[-1, 3], [3, 3]]], [22.0, math.nan, 98.0] * 10 + [119.0])
    return training, masked(evaluated, 14, seed=4), 14


def test_the_parts_of_the_mixture_equal_a_naive_count(tiny):
    training, evaluated, vocab_size = tiny
    found = evidence_of(evaluated, [count(training, vocab_size)], unigram(training.codes, vocab_size))
    expected = naive_ratios(training, evaluated, vocab_size)
    assert len(expected) > 20
    np.testing.assert_allclose(found.ratios, expected, rtol=1e-6)


def test_counts_of_parts_of_the_patients_add_up(tiny):
    training, evaluated, vocab_size = tiny
    parts = [count(take(training, np.arange(12)[start::3]), vocab_size) for start in range(3)]
    whole = evidence_of(evaluated, [count(training, vocab_size)], unigram(training.codes, vocab_size))
    found = evidence_of(evaluated, parts, unigram(training.codes, vocab_size))
    np.testing.assert_allclose(found.ratios, whole.ratios, rtol=1e-6)


def test_every_part_predicts_a_distribution_that_does_not_know_the_truth(tiny):
    """Whatever the truth at one masked place, the probabilities of all codes there sum to 1, and the rest stays."""
    training, evaluated, vocab_size = tiny
    log_p = unigram(training.codes, vocab_size)
    places = np.flatnonzero(evaluated.scored & (evaluated.shown == MASK))
    for number in range(0, len(places), 5):
        summed, others = 0.0, []
        for code in range(5, vocab_size):
            codes = evaluated.sequences.codes.copy()
            codes[places[number]] = code
            changed = replace(evaluated, sequences=replace(evaluated.sequences, codes=codes))
            found = evidence_of(changed, [count(training, vocab_size)], log_p)
            summed = summed + found.unigram[number] * found.ratios[number]
            others.append(np.delete(found.ratios, number, axis=0))
        np.testing.assert_allclose(summed, 1, rtol=1e-6)
        assert all(np.array_equal(others[0], other) for other in others)


def test_a_scored_token_is_no_context_whatever_it_is_shown_as(tiny):
    training, evaluated, vocab_size = tiny
    log_p, counts = unigram(training.codes, vocab_size), [count(training, vocab_size)]
    as_code = np.flatnonzero(evaluated.scored & (evaluated.shown != MASK))
    assert len(as_code) > 3
    shown = evaluated.shown.copy()
    shown[as_code] = 5 + (shown[as_code] - 5 + 1) % (vocab_size - 5)
    changed = evidence_of(replace(evaluated, shown=shown), counts, log_p)
    assert np.array_equal(changed.ratios, evidence_of(evaluated, counts, log_p).ratios)


def test_how_many_are_computed_at_once_changes_nothing(tiny, monkeypatch: pytest.MonkeyPatch):
    training, evaluated, vocab_size = tiny
    log_p, counts = unigram(training.codes, vocab_size), [count(training, vocab_size)]
    whole = evidence_of(evaluated, counts, log_p)
    monkeypatch.setattr(cooccurrence, "TARGETS_AT_ONCE", 3)
    assert np.array_equal(evidence_of(evaluated, counts, log_p).ratios, whole.ratios)


# --- weights and interval --------------------------------------------------------------------------------------------


def test_the_weights_are_those_of_the_highest_likelihood():
    generator = np.random.default_rng(0)
    ratios = np.exp(generator.normal([0, 0.1, -0.2, -0.5], 0.7, size=(400, 4)))
    ratios[:, 0] = 1

    def loss(free: np.ndarray) -> float:
        return -float(np.log(ratios @ free).mean())

    best = minimize(
        loss, np.full(4, 0.25), bounds=[(0, 1)] * 4, constraints={"type": "eq", "fun": lambda free: free.sum() - 1}
    )
    weights = fit_weights(ratios)
    assert weights.sum() == pytest.approx(1)
    assert loss(weights) == pytest.approx(best.fun, abs=1e-4)
    np.testing.assert_allclose(weights, best.x, atol=0.05)


def test_contexts_that_mislead_get_no_weight():
    ratios = np.exp(np.random.default_rng(0).normal(-0.5, 0.5, size=(500, 3)))
    ratios[:, 0] = 1
    assert fit_weights(ratios)[0] > 0.999
    assert fit_weights(ratios[:0]).tolist() == [1, 0, 0]


def test_with_one_token_a_patient_the_interval_is_students():
    values = np.random.default_rng(0).normal(size=12)
    centre, half = clustered_interval(values, np.arange(12)[::-1] * 3)
    expected = student.interval(0.95, 11, values.mean(), values.std(ddof=1) / math.sqrt(12))
    assert (centre - half, centre + half) == pytest.approx(expected)


def test_tokens_that_repeat_their_patient_do_not_narrow_the_interval():
    values = np.random.default_rng(0).normal(size=12)
    once = clustered_interval(values, np.arange(12))
    assert clustered_interval(np.repeat(values, 9), np.repeat(np.arange(12), 9)) == pytest.approx(once)


def test_the_interval_covers_the_mean_of_patients_of_different_size_95_times_in_100():
    generator, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        patients = np.repeat(np.arange(30), generator.integers(1, 9, size=30))
        values = generator.normal(size=30)[patients] + generator.normal(size=len(patients))
        centre, half = clustered_interval(values, patients)
        covered += abs(centre) < half
    assert 0.925 < covered / 1000 < 0.965


# --- verdicts on data of known structure -----------------------------------------------------------------------------


def verdict_of(patients: list, vocab_size: int, ages: list[float] | None = None) -> Cooccurrence:
    """The last fifth of the patients validates."""
    sequences = flat(patients, ages)
    train = len(patients) * 4 // 5
    training, validation = (take(sequences, part) for part in np.split(np.arange(len(patients)), [train]))
    return measure_cooccurrence(training, masked(validation, vocab_size), vocab_size)


def one_code_by_age(generator: np.random.Generator) -> tuple[list, list[float]]:
    ages = generator.uniform(0, 100, size=1500)
    return [[[int(age // 10)]] for age in ages], ages.tolist()


def one_topic_a_visit(generator: np.random.Generator) -> tuple[list, None]:
    """Pairs of like codes in each visit; every patient has every code once, so that the patient tells nothing."""
    return [[[2 * topic, 2 * topic + 1] for topic in generator.permutation(6)] for _ in range(100)], None


def codes_in_a_circle(generator: np.random.Generator) -> tuple[list, None]:
    """All codes in every visit, in one order: only the neighbours tell which it is."""
    starts = generator.integers(12, size=100)
    return [[[int(start + step) % 12 for step in range(12)]] for start in starts], None


@pytest.mark.parametrize("structure", [one_code_by_age, one_topic_a_visit, codes_in_a_circle])
def test_what_a_single_view_tells_is_found_and_gone_when_shuffled(structure: Callable):
    generator = np.random.default_rng(1)
    patients, ages = structure(generator)
    found = verdict_of(patients, 17, ages)
    assert found.verdict == "learnable"
    assert found.low > 0.5
    codes = generator.permutation([code for patient in patients for visit in patient for code in visit]).tolist()
    supply = iter(codes)
    shuffled = [[list(itertools.islice(supply, len(visit))) for visit in patient] for patient in patients]
    control = verdict_of(shuffled, 17, ages)
    assert control.verdict != "learnable"
    assert control.gain == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("exponent", [0, 1], ids=["uniform", "Zipf"])
def test_independent_codes_are_nothing_to_learn(exponent: int):
    """However frequencies differ: smoothing is no gain."""
    shares = 1 / np.arange(1, 201) ** exponent
    found = []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        patients = [
            [generator.choice(200, size=7, p=shares / shares.sum()).tolist() for _ in range(6)] for _ in range(90)
        ]
        found.append(verdict_of(patients, 205))
    assert [one.verdict for one in found].count("nothing") >= 11
    assert not any(one.verdict == "learnable" for one in found)
    assert np.mean([one.gain for one in found]) == pytest.approx(0, abs=0.002)


def test_a_training_patient_does_not_predict_itself():
    """Codes that always stand together, but in a single patient each."""
    patients = [[[2 * number, 2 * number + 1]] * 3 for number in range(60)]
    training = flat(patients)
    folds = np.arange(60) % cooccurrence.FOLDS
    counts = [count(take(training, np.flatnonzero(folds == fold)), 125) for fold in range(cooccurrence.FOLDS)]
    alone = cross_fitted(training, folds, counts, 125)
    assert (alone.ratios <= 1 + 1e-9).all()
    twice = flat(patients * 2)  # the control: another patient, in another fold, has the same codes
    folds = np.concatenate([folds, (folds + 1) % cooccurrence.FOLDS])
    counts = [count(take(twice, np.flatnonzero(folds == fold)), 125) for fold in range(cooccurrence.FOLDS)]
    assert np.log(cross_fitted(twice, folds, counts, 125).ratios[:, 1]).mean() > 1


@pytest.fixture(scope="module", params=itertools.product(["hmm", "none"], [100, 300]), ids=lambda p: f"{p[0]}-{p[1]}")
def cohort(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Records]:
    structure, patients = request.param
    folder: Path = tmp_path_factory.mktemp("cohort")
    simulate(folder / "meds", patients=patients, structure=structure, seed=7)
    prepare(folder / "meds", folder / "prepared", PrepareOptions())
    settings = load_experiment(flags={"data": str(folder / "prepared")})
    return structure, select_records(open_records(settings.data), settings)


def test_the_verdict_on_a_simulated_cohort_is_what_the_exact_floor_says(cohort):
    structure, records = cohort
    baselines = records.baselines(len(records.data.vocabulary))
    training, _ = cut(gather(records.training, records.training_patients), records.max_position)
    found = measure_cooccurrence(training, records.validation, len(records.data.vocabulary))
    gap = baselines.unigram_masked_loss - baselines.floor_masked_loss
    if structure == "hmm":
        assert gap > 1
        assert found.verdict == "learnable"
        assert found.low > 0.5 * gap, "counting finds less than half of what there is"
        assert found.masked_loss > baselines.floor_masked_loss
    else:
        assert abs(gap) < 0.1
        assert found.verdict == "nothing"
        assert found.gain == pytest.approx(0, abs=0.005)
    assert found.low <= found.gain <= found.high


def test_the_baselines_of_a_run_hold_what_was_counted(cohort):
    _, records = cohort
    vocab_size = len(records.data.vocabulary)
    training, _ = cut(gather(records.training, records.training_patients), records.max_position)
    found = measure_cooccurrence(training, records.validation, vocab_size)
    baselines = records.baselines(vocab_size)
    assert (baselines.cooccurrence_gain, baselines.cooccurrence_gain_low, baselines.cooccurrence_gain_high) == (
        found.gain, found.low, found.high,
    )  # fmt: skip
    assert baselines.cooccurrence_masked_loss == found.masked_loss
    at_mask = records.validation.scored & (records.validation.shown == MASK)
    log_p = unigram(training.codes, vocab_size)
    expected = -log_p[records.validation.sequences.codes[at_mask]].mean()
    assert baselines.unigram_masked_loss == found.unigram_masked_loss == pytest.approx(expected)
    assert baselines.floor_loss - 0.1 < baselines.copying_loss < baselines.unigram_loss


# --- the evidence ----------------------------------------------------------------------------------------------------


def test_enough_validation_patients_are_the_evidence_alone():
    patients = random_patients(np.random.default_rng(0), 1500, 10, visits=8)
    few, many = verdict_of(patients[:300], 15), verdict_of(patients, 15)
    assert few.patients > 100  # of 60 validation patients
    assert 200 <= many.patients <= 300
    assert many.gain == pytest.approx(many.unigram_masked_loss - many.masked_loss)


def test_the_evidence_counts_each_patient_once():
    """80 training and 20 validation patients, all with a masked code."""
    patients = np.random.default_rng(0).integers(10, size=(100, 5, 20)).tolist()
    assert verdict_of(patients, 15).patients == 100


def test_beyond_the_bounds_a_part_of_the_patients_is_counted_and_predicted(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(0)
    topics = generator.integers(4, size=1500)
    patients = [[(3 * topic + generator.integers(3, size=5)).tolist() for _ in range(4)] for topic in topics]
    whole = verdict_of(patients, 17)
    monkeypatch.setattr(cooccurrence, "PAIRS_AT_MOST", 40_000)  # 400 patients have this many
    monkeypatch.setattr(cooccurrence, "VALIDATION_TOKENS", 5_300)  # of 212 patients
    part = verdict_of(patients, 17)
    training = take(flat(patients), np.arange(1200))
    assert 0 < count(training, 17).tables["patient"].totals.sum() <= 40_000 / cooccurrence.FOLDS
    assert 200 <= part.patients <= 212 < whole.patients
    assert part.verdict == whole.verdict == "learnable"
    assert part.gain == pytest.approx(whole.gain, abs=0.1)


def test_the_same_records_give_the_same_figures(tiny):
    assert measure_cooccurrence(*tiny) == measure_cooccurrence(*tiny)


@pytest.mark.parametrize(
    ("training", "validation", "vocab_size"),
    [
        ([[[0]]], [[[0]]], 6),
        ([[[0, 1]]], [[[1]]], 7),
        ([[[-1]]], [[[-1], [-1]]], 9),
        ([[[0] * 8]] * 9, [[[0] * 8]] * 9, 6),
        ([[[0]]] * 50, [[[8]]] * 50, 14),
    ],
    ids=["one token", "one patient", "unknown codes only", "one code", "no contexts, unseen code"],
)
def test_records_of_almost_nothing_get_an_answer(training, validation, vocab_size):
    found = measure_cooccurrence(flat(training), masked(flat(validation), vocab_size), vocab_size)
    figures = (found.masked_loss, found.unigram_masked_loss, found.gain, found.low, found.high)
    assert all(figure is None or math.isfinite(figure) for figure in figures)
    assert found.verdict != "learnable"


def test_without_validation_masks_there_are_no_losses_on_them():
    validation = MaskedSequences(flat([[[0, 1]]]), np.array([CLS, 5, 6, SEP], np.int32), np.zeros(4, bool))
    found = measure_cooccurrence(flat([[[0, 1]] * 9] * 40), validation, 7)
    assert (found.masked_loss, found.unigram_masked_loss) == (None, None)
    assert found.gain is not None  # of the training patients


def test_few_patients_do_not_prove_that_there_is_nothing():
    patients = random_patients(np.random.default_rng(0), 80, 30)
    few = verdict_of(patients[:45], 35)
    assert few.patients < cooccurrence.FEWEST_PATIENTS
    assert (few.high, few.verdict) == (None, "undecided")
    assert verdict_of(patients, 35).verdict == "nothing"


def test_few_tokens_do_not_prove_that_there_is_nothing(monkeypatch: pytest.MonkeyPatch):
    """Where the fit chooses the unigram its gain of zero is certain, but other mixtures may gain more."""
    monkeypatch.setattr(cooccurrence, "fit_weights", lambda ratios: np.eye(ratios.shape[1])[0])
    patients = np.random.default_rng(0).integers(30, size=(500, 1, 2)).tolist()
    few, many = verdict_of(patients[:130], 35), verdict_of(patients, 35)
    assert few.patients >= cooccurrence.FEWEST_PATIENTS
    assert (few.gain, few.low, few.verdict) == (0, 0, "undecided")
    assert few.high > WORTH_HAVING > many.high
    assert many.verdict == "nothing"


def test_rounding_is_no_gain():
    assert (known(3e-16), known(-3e-16), known(0.25), known(math.nan)) == (0, 0, 0.25, None)


def test_one_code_alone_is_nothing_to_learn():
    found = verdict_of([[[0] * 8]] * 80, 6)
    assert (found.gain, found.low, found.high, found.verdict) == (0, 0, 0, "nothing")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.5, "learnable"),
        (0.001, 0.002, "learnable"),
        (0.001, None, "learnable"),
        (0.0, 0.0, "nothing"),
        (-0.001, WORTH_HAVING / 2, "nothing"),
        (-0.3, -0.1, "nothing"),
        (-0.001, WORTH_HAVING, "undecided"),
        (-0.001, None, "undecided"),
        (None, None, "undecided"),
    ],
)
def test_the_verdict_weighs_the_interval_against_a_gain_worth_having(low, high, verdict):
    found = Cooccurrence(masked_loss=5.0, unigram_masked_loss=5.0, gain=0.0, low=low, high=high, patients=9, tokens=99)
    assert found.verdict == verdict
