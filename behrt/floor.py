"""What is the lowest validation loss that any model can reach on a simulated cohort?

A model that is asked for the code x_i at a scored position i sees the corrupted tokens y of the whole patient, and
knows that position i was selected; whether another position was selected it can only guess. No prediction beats

    q_i(x)  =  P(x_i = x | y, i selected)  ∝  c(y_i | x) · Σ_z  P(z | y without y_i) · e_z(x)

with z = (profile, stage of the visit), e_z its emission, and c the corruption of a selected token: 0.8 where y_i is
`[MASK]` (a constant, it cancels), else 0.1 · 1[y_i = x] + 0.1 / R for R ordinary codes. Its mean -ln q_i(x_i) is the
floor of the loss; the share of positions at which its largest entry is the truth is the floor's accuracy.

P(z | y without y_i) follows from a forward-backward pass over the visits, jointly with the profile. With u_z the
probability that the state emits a code which became `[UNK]` (never selected), another position contributes, given z,

    y_j = [MASK]   0.15 · 0.8 · (1 - u_z)
    y_j = [UNK]    u_z
    y_j = code y   (0.85 + 0.15 · 0.1) · e_z(y)  +  0.15 · 0.1 / R · (1 - u_z)

Positions of a visit are independent given z, so that leaving one out is a subtraction of logarithms. `[CLS]`, `[SEP]`,
ages and visit numbers do not depend on the hidden state (see `cohort.py`).

Even with `--structure none` the floor is below ln(number of codes): a fifth of the scored tokens are shown as a code,
which is more likely the truth than any other code is. At `[MASK]` it is ln(number of codes) exactly; `Floor` has both.

The floor holds for tokens that are the cohort's own codes or `[UNK]`, not where preparation dropped or merged codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from behrt.cohort import COHORT_FILES
from behrt.config import SELECTED_SHARE, SHOWN_AS_MASK, SHOWN_AS_RANDOM, UserError
from behrt.population import Population
from behrt.vocabulary import FIRST_CODE, MASK, UNK

SHOWN_AS_ITSELF = 1 - SHOWN_AS_MASK - SHOWN_AS_RANDOM
PATIENTS_AT_ONCE = 128
"""Bounds the memory: the widest array is [scored tokens of these patients, vocabulary]."""


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The best possible masked-code prediction on fixed masks.

    Attributes:
        loss: nats per scored token
        accuracy: share of scored tokens, 0 to 1
        masked_loss: the same over the scored tokens that are shown as `[MASK]`
        masked_accuracy: likewise
        scored: number of scored tokens
        masked: number of them that are shown as `[MASK]`

    A mean over no tokens is NaN.
    """

    loss: float
    accuracy: float
    masked_loss: float
    masked_accuracy: float
    scored: int
    masked: int


def exact_floor(
    population: Population,
    tokens: Sequence[str],
    *,
    codes: NDArray[np.int32],
    shown: NDArray[np.int32],
    scored: NDArray[np.bool_],
    visits: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> Floor:
    """Loss and accuracy of the best possible prediction of the scored tokens.

    Args:
        population: the hidden model that the records were drawn from (`load_cohort`).
        tokens: [vocab_size] name of each token id, the special ones first; codes that are missing are `[UNK]`.
        codes: int32 [n] original ids of several patients, end to end.
        shown: int32 [n] ids after the corruption.
        scored: bool [n] selected positions; ordinary codes only.
        visits: int32 [n] number of the visit in the whole history, from 1, ascending in a patient (0 for `[CLS]`).
            A patient whose first visits were cut off begins at a higher one.
        offsets: int64 [patients + 1] where each patient begins, and n.

    Raises:
        UserError: the records cannot be this cohort's.
    """
    log_probability = np.zeros(len(codes))  # only scored entries are filled and used
    hit = np.zeros(len(codes), dtype=np.bool_)
    for where, best in best_predictions(
        population, tokens, codes=codes, shown=shown, scored=scored, visits=visits, offsets=offsets
    ):
        truth = codes[where]
        with np.errstate(divide="ignore"):
            log_probability[where] = np.log(best[np.arange(len(where)), truth])
        hit[where] = best.argmax(axis=1) == truth
    if impossible := int(np.isneginf(log_probability).sum()):
        raise UserError(
            f"floor: {impossible} scored tokens are codes that the simulated cohort never has; "
            "prepare the cohort without merging, renaming or adding codes, or leave its cohort.json out"
        )
    masked = scored & (shown == MASK)

    def mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> float:
        return float(values.mean()) if len(values) else float("nan")

    return Floor(
        loss=-mean(log_probability[scored]),
        accuracy=mean(hit[scored]),
        masked_loss=-mean(log_probability[masked]),
        masked_accuracy=mean(hit[masked]),
        scored=int(scored.sum()),
        masked=int(masked.sum()),
    )


def best_predictions(
    population: Population,
    tokens: Sequence[str],
    *,
    codes: NDArray[np.int32],
    shown: NDArray[np.int32],
    scored: NDArray[np.bool_],
    visits: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """The best possible prediction of every scored token; arguments as of `exact_floor`.

    Yields:
        For some patients at a time: the places of their scored tokens in the flat arrays, int64 [m], and the
        predicted distributions, float64 [m, vocab_size], 0 at special tokens.

    Raises:
        UserError: what is shown is impossible under the population.
    """
    assert codes.shape == shown.shape == scored.shape == visits.shape == (offsets[-1],), "not one entry per token"
    assert (codes[scored] >= FIRST_CODE).all(), "a special token is scored"
    assert np.isin(shown[scored], [MASK, *range(FIRST_CODE, len(tokens))]).all(), "a scored token is shown as a special"
    emission, unknown = emission_of_tokens(population, tokens)
    evidence = log_evidence(emission, unknown)
    for first in range(0, len(offsets) - 1, PATIENTS_AT_ONCE):
        block = offsets[first : first + PATIENTS_AT_ONCE + 1]
        span = slice(int(block[0]), int(block[-1]))
        where = np.flatnonzero(scored[span])
        if not len(where):
            continue
        weights = states_of_scored_tokens(
            population, evidence, shown[span], scored[span], visits[span], block - block[0]
        )  # [m, states]
        best = weights @ emission  # [m, vocab_size]
        corrupt(best, shown[span][where], ordinary=len(tokens) - FIRST_CODE)
        total = best.sum(axis=1, keepdims=True)
        if not (total > 0).all():
            raise UserError(
                f"floor: {int((total <= 0).sum())} scored tokens stand where the simulated cohort has none; "
                "prepare the cohort without merging, renaming or adding codes, or leave its cohort.json out"
            )
        yield where + span.start, best / total


def codes_are_unchanged(options: Mapping[str, Any]) -> bool:
    """Whether preparation with these options leaves the codes of a simulated cohort as they are, `[UNK]` apart."""
    return not any(options.get(name) for name in ("icd_digits", "numeric_bins", "include", "exclude"))


def is_known(prepared: Path, options: Mapping[str, Any]) -> bool:
    """Whether what could be reached on prepared records is known: a simulated cohort's, with unchanged codes.

    Args:
        options: that they were prepared with.
    """
    return (prepared / COHORT_FILES[0]).is_file() and codes_are_unchanged(options)


def emission_of_tokens(
    population: Population, tokens: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Emission over token ids, [states, vocab_size], 0 at special tokens; and each state's share of `[UNK]`, [states].

    States are profiles times stages, the stage fastest.
    """
    by_code = population.emission.reshape(-1, len(population.codes))
    ids = {token: place for place, token in enumerate(tokens) if place >= FIRST_CODE}
    assert len(ids) == len(tokens) - FIRST_CODE, "a token is listed twice"
    id_of_code = np.array([ids.get(code, UNK) for code in population.codes])
    emission = np.zeros((len(by_code), len(tokens)))
    emission[:, id_of_code[id_of_code != UNK]] = by_code[:, id_of_code != UNK]
    return emission, by_code[:, id_of_code == UNK].sum(axis=1)


def log_evidence(emission: NDArray[np.float64], unknown: NDArray[np.float64]) -> NDArray[np.float64]:
    """[vocab_size, states] ln P(token shown | state) where it is not known whether the token was selected.

    `[CLS]`, `[SEP]` and `[PAD]` say nothing about the state: 0.
    """
    ordinary = emission.shape[1] - FIRST_CODE
    known = np.maximum(0, 1 - unknown)  # the share that can be selected; rounding must not make it negative
    shown = np.ones((emission.shape[1], len(emission)))
    shown[MASK] = SELECTED_SHARE * SHOWN_AS_MASK * known
    shown[UNK] = unknown
    as_itself = 1 - SELECTED_SHARE + SELECTED_SHARE * SHOWN_AS_ITSELF
    at_random = SELECTED_SHARE * SHOWN_AS_RANDOM / ordinary
    shown[FIRST_CODE:] = as_itself * emission.T[FIRST_CODE:] + at_random * known
    with np.errstate(divide="ignore"):
        return np.log(shown)


def corrupt(best: NDArray[np.float64], shown: NDArray[np.int32], *, ordinary: int) -> None:
    """Multiplies `best`, [m, vocab_size], in place by P(token shown | code, selected), up to a constant per row."""
    rows = np.flatnonzero(shown != MASK)
    kept = best[rows, shown[rows]] * (SHOWN_AS_ITSELF + SHOWN_AS_RANDOM / ordinary)
    best[rows] *= SHOWN_AS_RANDOM / ordinary
    best[rows, shown[rows]] = kept


def states_of_scored_tokens(
    population: Population,
    evidence: NDArray[np.float64],
    shown: NDArray[np.int32],
    scored: NDArray[np.bool_],
    visits: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Forward-backward over visits: P(state of the visit | everything shown but the token itself), up to a factor.

    Returns:
        [scored tokens, states], the largest entry of a row is 1 (or all are 0: impossible).
    """
    inside = visits > 0  # not [CLS]
    own = evidence[shown]  # [n, states]
    laid = lay_out(population, own, visits, offsets)
    by_visit = laid.by_visit
    ahead = look_ahead(population, laid)
    behind = np.zeros_like(by_visit)  # ln P(shown after this visit | state)
    with np.errstate(divide="ignore"):
        transition = np.log(population.transition)  # [profiles, stages, stages]
    length = by_visit.shape[1]
    for visit in range(length - 2, -1, -1):
        to_come = (behind + by_visit)[:, visit + 1]
        behind[:, visit] = log_sum_exp(transition + to_come[..., None, :], axis=-1)

    chosen = laid.cell[scored[inside]]  # [m]
    everything = (ahead + by_visit + behind).reshape(len(by_visit) * length, -1)[chosen]
    itself = own[scored]
    with np.errstate(invalid="ignore"):
        # A state that cannot have emitted the token at all emits no ordinary code: it has no part in the prediction.
        others = np.where(np.isneginf(itself), -np.inf, everything - itself)
    highest = others.max(axis=1, keepdims=True)
    posterior: NDArray[np.float64] = np.exp(others - np.where(np.isneginf(highest), 0, highest))
    return posterior


@dataclass(frozen=True, kw_only=True, eq=False)
class Visits:
    """What the visits of several patients say about their states, side by side.

    Attributes:
        by_visit: [patients, visits of the longest, profiles, stages] ln P(tokens of the visit | state); 0 where a
            patient has no such visit.
        cell: [tokens of visits] place of each token's visit in patients times visits.
        first: [patients] number of each patient's first visit; the largest int64 for one without any.
    """

    by_visit: NDArray[np.float64]
    cell: NDArray[np.int64]
    first: NDArray[np.int64]


def lay_out(
    population: Population, own: NDArray[np.float64], visits: NDArray[np.int32], offsets: NDArray[np.int64]
) -> Visits:
    """Adds up what the tokens of a visit say; `own` is [n, states] ln P(token | state)."""
    profiles, stages = population.initial.shape
    patients = len(offsets) - 1
    patient = np.repeat(np.arange(patients), np.diff(offsets))  # [n]
    inside = visits > 0  # not [CLS]
    first = np.full(patients, np.iinfo(np.int64).max)
    np.minimum.at(first, patient[inside], visits[inside])
    length = int((visits[inside] - first[patient[inside]]).max()) + 1  # visits of the longest patient
    cell = (patient * length + visits - first[patient])[inside]  # [tokens of visits] place in patients x visits
    assert (np.diff(cell) >= 0).all(), "the visits of a patient do not ascend"
    begins = np.flatnonzero(np.diff(cell, prepend=-1))
    emitted = np.zeros((patients * length, profiles * stages))
    emitted[cell[begins]] = np.add.reduceat(own[inside], begins, axis=0)
    return Visits(by_visit=emitted.reshape(patients, length, profiles, stages), cell=cell, first=first)


def look_ahead(population: Population, laid: Visits) -> NDArray[np.float64]:
    """The forward pass: ln P(tokens before the visit, state of the visit), shaped as `laid.by_visit`."""
    begun = laid.first < np.iinfo(np.int64).max  # a patient without any token in a visit has nothing to predict
    with np.errstate(divide="ignore"):
        prior = np.log(population.prior)[:, None]  # [profiles, 1]
        transition = np.log(population.transition)  # [profiles, stages, stages]
        start = np.log(stage_at_visit(population, int(laid.first[begun].max())))  # [visits, profiles, stages]
    ahead = np.zeros_like(laid.by_visit)
    ahead[begun, 0] = prior + start[laid.first[begun] - 1]
    for visit in range(1, laid.by_visit.shape[1]):
        reached = (ahead + laid.by_visit)[:, visit - 1]  # [patients, profiles, stages]
        ahead[:, visit] = log_sum_exp(reached[..., :, None] + transition, axis=-2)
    return ahead


def states_at_the_end(
    population: Population,
    evidence: NDArray[np.float64],
    codes: NDArray[np.int32],
    visits: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> NDArray[np.float64]:
    """P(profile, stage of the last visit | all codes of the patient), [patients, profiles, stages]; the forward filter.

    Args:
        evidence: [vocab_size, states] ln P(token | state).
        codes, visits, offsets: as of `exact_floor`; every patient has a visit.

    Returns:
        The distributions; all zeros where the codes are impossible under the population.
    """
    laid = lay_out(population, evidence[codes], visits, offsets)
    joint = look_ahead(population, laid) + laid.by_visit
    patients, length = joint.shape[:2]
    last = np.zeros(patients, np.int64)
    np.maximum.at(last, laid.cell // length, laid.cell % length)
    at_end = joint[np.arange(patients), last].reshape(patients, -1)
    highest = at_end.max(axis=1, keepdims=True)
    states = np.exp(at_end - np.where(np.isneginf(highest), 0, highest))
    total = states.sum(axis=1, keepdims=True)
    return (states / np.where(total > 0, total, 1)).reshape(patients, *population.initial.shape)


def stage_at_visit(population: Population, visits: int) -> NDArray[np.float64]:
    """[visits, profiles, stages] the stage of the first, second, … visit where nothing has been seen."""
    marginals = [population.initial]
    while len(marginals) < visits:
        marginals.append(np.einsum("ps,pst->pt", marginals[-1], population.transition))
    return np.stack(marginals)


def log_sum_exp(values: NDArray[np.float64], *, axis: int) -> NDArray[np.float64]:
    """ln Σ exp along an axis, without overflow; -inf where all terms are.

    >>> log_sum_exp(np.log([[0.25, 0.5]]) - 1e4, axis=-1) - np.log(0.75) + 1e4
    array([0.])
    """
    highest = values.max(axis=axis, keepdims=True)
    highest = np.where(np.isneginf(highest), 0, highest)
    with np.errstate(divide="ignore"):
        total: NDArray[np.float64] = np.log(np.exp(values - highest).sum(axis=axis)) + highest.squeeze(axis)
    return total
