"""The exact floor against brute-force enumeration, closed forms, and statistics of simulated patients."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from behrt.cohort import sample
from behrt.config import SELECTED_SHARE, SHOWN_AS_MASK, SHOWN_AS_RANDOM, UserError
from behrt.floor import best_predictions, exact_floor
from behrt.masking import mask_tokens
from behrt.metrics import unigram, unigram_loss_and_accuracy
from behrt.population import Population, population

PAD, UNK, CLS, SEP, MASK, A, B, C, D = range(9)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny(seed: int = 0, *, zeros: bool = False) -> Population:
    """Two profiles, two stages, four codes; `zeros` forbids some stages, transitions and codes."""
    generator = np.random.default_rng(seed)
    prior, initial = generator.dirichlet(np.ones(2)), generator.dirichlet(np.ones(2), size=2)
    transition, emission = generator.dirichlet(np.ones(2), size=(2, 2)), generator.dirichlet(np.ones(4), size=(2, 2))
    if zeros:
        initial[0] = [1, 0]
        transition[0] = [[0.3, 0.7], [0, 1]]  # left to right
        emission[0, 1] = [0, 0, 0, 1]  # this state emits nothing but the last code
        emission[1, 0] = [0.5, 0.5, 0, 0]
    return Population(
        codes=("a", "b", "c", "d"),
        profiles=("p", "q"),
        stages=("s", "t"),
        prior=prior,
        initial=initial,
        transition=transition,
        emission=emission,
    )


def enumerated(hidden: Population, tokens: list[str], shown: list[int], visits: list[int], place: int) -> np.ndarray:
    """P(code at `place` | everything shown, `place` is selected), [vocab_size], by summing the joint probability over
    every hidden path, every original code and every pattern of selections."""
    ids = [tokens.index(code) if code in tokens else UNK for code in hidden.codes]
    places = [i for i, token in enumerate(shown) if token not in (CLS, SEP)]
    ordinary = len(tokens) - len(SPECIAL)
    stages, length = range(len(hidden.stages)), max(visits)

    def corruption(original: int, selected: bool, seen: int) -> float:
        if original == UNK:
            return float(seen == UNK and not selected)
        if not selected:
            return (1 - SELECTED_SHARE) * (seen == original)
        if seen == MASK:
            return SELECTED_SHARE * SHOWN_AS_MASK
        if seen == UNK:
            return 0.0
        kept = (1 - SHOWN_AS_MASK - SHOWN_AS_RANDOM) * (seen == original)
        return SELECTED_SHARE * (kept + SHOWN_AS_RANDOM / ordinary)

    joint = np.zeros(len(tokens))
    for originals in itertools.product(range(len(hidden.codes)), repeat=len(places)):
        shown_given_originals = 0.0
        for selected in itertools.product([False, True], repeat=len(places)):
            if selected[places.index(place)]:
                shown_given_originals += math.prod(
                    corruption(ids[code], chosen, shown[i])
                    for code, chosen, i in zip(originals, selected, places, strict=True)
                )
        if shown_given_originals == 0:
            continue
        for profile in range(len(hidden.profiles)):
            for path in itertools.product(stages, repeat=length):  # of all visits from the first, seen or not
                probability = hidden.prior[profile] * hidden.initial[profile, path[0]]
                for now, then in itertools.pairwise(path):
                    probability *= hidden.transition[profile, now, then]
                for code, i in zip(originals, places, strict=True):
                    probability *= hidden.emission[profile, path[visits[i] - 1], code]
                joint[ids[originals[places.index(place)]]] += shown_given_originals * probability
    return joint / joint.sum()


def flat(patients: list[tuple[list[int], list[int], list[int], list[int]]]) -> dict[str, np.ndarray]:
    codes, shown, scored, visits = (list(itertools.chain(*column)) for column in zip(*patients, strict=True))
    return {
        "codes": np.array(codes, np.int32),
        "shown": np.array(shown, np.int32),
        "scored": np.array(scored, bool),
        "visits": np.array(visits, np.int32),
        "offsets": np.cumsum([0, *(len(patient[0]) for patient in patients)], dtype=np.int64),
    }


# codes, shown, scored, visits; the vocabulary is a b c d where all are known, else it is given below
CASES = {
    "masked": (
        [CLS, A, B, SEP, C, SEP, D, SEP], [CLS, MASK, B, SEP, C, SEP, D, SEP],
        [0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 2, 2, 3, 3],
    ),
    "masked, replaced and kept, two in one visit": (
        [CLS, A, B, SEP, A, SEP, D, SEP], [CLS, MASK, D, SEP, A, SEP, D, SEP],
        [0, 1, 1, 0, 1, 0, 0, 0], [0, 1, 1, 1, 2, 2, 3, 3],
    ),
    "later visits of a longer history": (
        [CLS, A, B, SEP, D, SEP], [CLS, A, MASK, SEP, MASK, SEP],
        [0, 0, 1, 0, 1, 0], [0, 2, 2, 2, 3, 3],
    ),
    "a visit in the middle that is not seen": (
        [CLS, A, SEP, D, SEP], [CLS, MASK, SEP, B, SEP],
        [0, 1, 0, 1, 0], [0, 1, 1, 3, 3],
    ),
}  # fmt: skip
WITH_UNKNOWN = (
    [CLS, A, UNK, SEP, B, SEP, A, SEP], [CLS, MASK, UNK, SEP, B, SEP, 7, SEP],
    [0, 1, 0, 0, 1, 0, 1, 0], [0, 1, 1, 1, 2, 2, 3, 3],
)  # fmt: skip


@pytest.mark.parametrize("zeros", [False, True], ids=["", "with zeros"])
@pytest.mark.parametrize(
    ("case", "ordinary"),
    [(case, "abcd") for case in CASES.values()] + [(WITH_UNKNOWN, "abz"), (WITH_UNKNOWN, "dcx")],
    ids=[*CASES, "two codes unknown, one foreign", "two others unknown, one foreign"],
)
def test_the_prediction_equals_enumeration_of_all_paths_originals_and_selections(case, ordinary, zeros):
    tokens, hidden = [*SPECIAL, *ordinary], tiny(1, zeros=zeros)
    _, shown, scored, visits = case
    (found,) = best_predictions(hidden, tokens, **flat([case]))
    where, predicted = found
    assert where.tolist() == np.flatnonzero(scored).tolist()
    for place, row in zip(where, predicted, strict=True):
        np.testing.assert_allclose(row, enumerated(hidden, tokens, shown, visits, place), rtol=0, atol=1e-12)
    if "z" in ordinary or "x" in ordinary:
        assert (predicted[:, tokens.index(ordinary[-1])] == 0).all(), "a foreign code is predicted"


def test_loss_and_accuracy_are_those_of_the_enumerated_prediction():
    tokens, hidden = [*SPECIAL, *"abcd"], tiny(2)
    log_probabilities, hits = [], []
    for codes, shown, scored, visits in CASES.values():
        for place in np.flatnonzero(scored):
            best = enumerated(hidden, tokens, shown, visits, place)
            log_probabilities.append(np.log(best[codes[place]]))
            hits.append(best.argmax() == codes[place])
    is_masked = [case[1][place] == MASK for case in CASES.values() for place in np.flatnonzero(case[2])]
    floor = exact_floor(hidden, tokens, **flat(list(CASES.values())))
    assert (floor.scored, floor.masked) == (len(hits), sum(is_masked))
    assert floor.loss == pytest.approx(-np.mean(log_probabilities), abs=1e-12)
    assert floor.accuracy == np.mean(hits)
    assert floor.masked_loss == pytest.approx(-np.mean(np.array(log_probabilities)[is_masked]), abs=1e-12)
    assert floor.masked_accuracy == np.mean(np.array(hits)[is_masked])


def tokenised(drawn, *, known: np.ndarray | None = None) -> SimpleNamespace:
    """`[CLS] visit [SEP] visit [SEP] …` of a sample, as flat arrays."""
    ids = np.arange(5, 5 + 995) if known is None else np.where(known, 4 + np.cumsum(known), UNK)
    codes, visits, offsets, next_visit, next_code = [], [], [0], 0, 0
    for count in drawn.visits:
        codes.append(CLS)
        visits.append(0)
        for number in range(1, count + 1):
            length = drawn.lengths[next_visit]
            codes += [*ids[drawn.codes[next_code : next_code + length]], SEP]
            visits += [number] * (length + 1)
            next_visit, next_code = next_visit + 1, next_code + length
        offsets.append(len(codes))
    return SimpleNamespace(
        codes=np.array(codes, np.int32), visits=np.array(visits, np.int32), offsets=np.array(offsets, np.int64)
    )


def corrupted(records: SimpleNamespace, vocab_size: int, seed: int = 3) -> dict[str, np.ndarray]:
    shown, scored = mask_tokens(records.codes, vocab_size=vocab_size, generator=np.random.default_rng(seed))
    return {**vars(records), "shown": shown, "scored": scored}


@pytest.fixture(scope="module")
def hmm() -> SimpleNamespace:
    """400 patients of the population, corrupted; the 30 rarest codes are unknown."""
    hidden = population("hmm")
    drawn = sample(hidden, 400, np.random.default_rng(0))
    known = np.ones(995, bool)
    known[np.argsort(np.bincount(drawn.codes, minlength=995), kind="stable")[:30]] = False
    tokens = [*SPECIAL, *np.array(hidden.codes)[known]]
    arrays = corrupted(tokenised(drawn, known=known), len(tokens))
    return SimpleNamespace(hidden=hidden, tokens=tokens, arrays=arrays, floor=exact_floor(hidden, tokens, **arrays))


def test_the_simulated_cohort_is_neither_easy_nor_hopeless(hmm):
    assert 0.15 < hmm.floor.accuracy < 0.45
    assert 0.1 < hmm.floor.masked_accuracy < 0.45
    codes = hmm.arrays["codes"]
    loss, accuracy = unigram_loss_and_accuracy(unigram(codes, len(hmm.tokens)), codes[hmm.arrays["scored"]])
    assert accuracy < 0.06
    assert loss - hmm.floor.loss > 1


@pytest.mark.parametrize(
    "mistake",
    ["emission of the stages averaged", "transitions forgotten", "profiles forgotten", "too much background"],
)
def test_no_other_predictor_tried_beats_the_floor(hmm, mistake):
    hidden = hmm.hidden
    wrong = {
        "emission of the stages averaged": lambda: replace(
            hidden, emission=np.repeat(hidden.emission.mean(1, keepdims=True), 4, axis=1)
        ),
        "transitions forgotten": lambda: replace(hidden, transition=np.full((24, 4, 4), 0.25)),
        "profiles forgotten": lambda: replace(
            hidden, emission=np.repeat(hidden.emission.mean(0, keepdims=True), 24, axis=0)
        ),
        "too much background": lambda: replace(hidden, emission=0.8 * hidden.emission + 0.2 / 995),
    }[mistake]()
    assert exact_floor(wrong, hmm.tokens, **hmm.arrays).loss > hmm.floor.loss + 0.005


def surprise(hidden: Population, tokens: list[str], arrays: dict[str, np.ndarray]) -> tuple[float, float]:
    """How far accuracy and loss are from what the predictions themselves promise, in standard deviations."""
    promised, variance, hits, entropy, spread, loss = 0.0, 0.0, 0, 0.0, 0.0, 0.0
    for where, best in best_predictions(hidden, tokens, **arrays):
        highest, truth = best.max(1), arrays["codes"][where]
        promised, variance = promised + highest.sum(), variance + (highest * (1 - highest)).sum()
        hits += (best.argmax(1) == truth).sum()
        losses = -np.log(np.where(best > 0, best, 1))  # [m, vocab_size]
        mean = (best * losses).sum(1)
        entropy, spread = entropy + mean.sum(), spread + ((best * losses**2).sum(1) - mean**2).sum()
        loss += -np.log(best[np.arange(len(where)), truth]).sum()
    return float((hits - promised) / variance**0.5), float((loss - entropy) / spread**0.5)


def test_the_best_prediction_is_calibrated(hmm):
    assert max(map(abs, surprise(hmm.hidden, hmm.tokens, hmm.arrays))) < 4


def test_a_wrong_model_is_found_to_be_uncalibrated(hmm):
    sharper = hmm.hidden.emission**1.3
    wrong = replace(hmm.hidden, emission=sharper / sharper.sum(-1, keepdims=True))
    assert max(map(abs, surprise(wrong, hmm.tokens, hmm.arrays))) > 4


def test_patients_do_not_depend_on_each_other(hmm):
    """Each patient alone, against all in blocks; more patients than one block holds."""
    blocks = list(best_predictions(hmm.hidden, hmm.tokens, **hmm.arrays))
    where, together = np.concatenate([block[0] for block in blocks]), np.concatenate([block[1] for block in blocks])
    assert len(blocks) > 1
    offsets = hmm.arrays["offsets"]
    for patient in [0, 127, 128, 399]:
        span = slice(offsets[patient], offsets[patient + 1])
        alone = {name: array[span] for name, array in hmm.arrays.items() if name != "offsets"}
        for there, best in best_predictions(
            hmm.hidden, hmm.tokens, **alone, offsets=np.array([0, len(alone["codes"])])
        ):
            np.testing.assert_allclose(best, together[np.isin(where, there + span.start)], rtol=1e-9, atol=1e-15)


def test_without_structure_the_floor_has_its_closed_form():
    hidden = population("none")
    arrays = corrupted(tokenised(sample(hidden, 300, np.random.default_rng(0))), 1000)
    floor = exact_floor(hidden, [*SPECIAL, *hidden.codes], **arrays)
    assert floor.masked_loss == pytest.approx(math.log(995), abs=1e-12)
    scored = arrays["scored"]
    visible = scored & (arrays["shown"] != MASK)
    kept = int((arrays["shown"] == arrays["codes"])[visible].sum())
    loss = (
        floor.masked * math.log(995)
        - kept * math.log(0.5 + 0.5 / 995)  # shown as a code: as likely the truth as a random replacement
        + (visible.sum() - kept) * math.log(2 * 995)
    ) / scored.sum()
    assert floor.loss == pytest.approx(loss, abs=1e-12)
    assert floor.loss < math.log(995)
    assert floor.masked_accuracy < 0.02


def test_a_long_history_neither_overflows_nor_underflows():
    hidden, tokens = tiny(3), [*SPECIAL, *"abcd"]
    codes = np.random.default_rng(0).integers(A, D + 1, size=20_000).astype(np.int32)
    shown, scored = mask_tokens(codes, vocab_size=9, generator=np.random.default_rng(1))
    floor = exact_floor(
        hidden,
        tokens,
        codes=codes,
        shown=shown,
        scored=scored,
        visits=np.arange(20_000, dtype=np.int32) // 50 + 1,
        offsets=np.array([0, 20_000]),
    )
    assert math.isfinite(floor.loss)


def test_codes_that_the_cohort_never_has_are_refused():
    arrays = flat([([CLS, A, SEP], [CLS, MASK, SEP], [0, 1, 0], [0, 1, 1])])
    with pytest.raises(UserError, match=r"^floor: 1 scored tokens are codes that .* never has; [^\n]*$"):
        exact_floor(tiny(), [*SPECIAL, "foreign", "a", "b", "c", "d"], **arrays)


def test_nothing_scored_has_no_floor():
    floor = exact_floor(tiny(), [*SPECIAL, *"abcd"], **flat([([CLS, A, SEP], [CLS, A, SEP], [0, 0, 0], [0, 1, 1])]))
    assert floor.scored == floor.masked == 0
    assert math.isnan(floor.loss)
    assert math.isnan(floor.masked_accuracy)


def test_a_block_without_any_scored_token_is_passed_over():
    silent = ([CLS, SEP], [CLS, SEP], [0, 0], [0, 1])
    spoken = ([CLS, A, SEP], [CLS, MASK, SEP], [0, 1, 0], [0, 1, 1])
    hidden, tokens = tiny(), [*SPECIAL, *"abcd"]
    alone = exact_floor(hidden, tokens, **flat([spoken]))
    assert exact_floor(hidden, tokens, **flat([silent] * 200 + [spoken, silent])) == alone
