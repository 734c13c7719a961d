"""How well can an outcome of a simulated cohort be predicted at best?

An outcome depends on the hidden state z = (profile, stage) of the last visit before the prediction time, and on nothing
else that the record tells. So the best prediction from everything in the record up to then, x, is

    P(outcome | x)  =  Σ_z  P(z | x) · P(outcome | z)

P(z | x) is the forward filter of the hidden Markov model over the codes of x, joint with the profile; a code that
preparation made `[UNK]` counts as what the model sees, one of the codes that are unknown. Ages, gaps and lengths do not
depend on z (`cohort.py`).

*Disease, readmission.* With p_i = P(outcome of i | x_i), a pair of patients counts for AUROC in the order i before j
with probability p_i (1 - p_j). Whatever the score, a pair is concordant with no higher probability than by p, and p
orders all pairs so at once. Over repeated draws of these patients' outcomes no score of the records has a higher

    expected AUROC  =  Σ_i≠j  p_i (1 - p_j) ([p_i > p_j] + ½ [p_i = p_j])  /  Σ_i≠j  p_i (1 - p_j)

which is the ratio of the expected numbers of concordant and of comparable pairs.

*Survival.* A pair counts for Harrell's C in the order i before j where i's death is seen, and comes before j's death
and before the end of j's follow-up; h_z being the death rate and G(t) the probability of being followed longer, with
probability

    A_ij  =  Σ_zz'  P(z | x_i) P(z' | x_j)  ∫ h_z exp(-(h_z + h_z') t) G(t)² dt

No score has a higher ratio of expected numbers than Σ_i<j max(A_ij, A_ji) / Σ_i<j (A_ij + A_ji), the bound. One score
cannot in general decide every pair as A does, since a mixture of constant rates has no constant rate. The risk used
here, the probability of death within a year, comes within 0.0001 of the bound; `Ceiling` has both.

All this is about expectations. On the outcomes that were drawn, a score may be better than the exact one by chance, as
far as the sampling error of the difference goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from behrt.cohort import load_cohort
from behrt.concordance import harrell_c
from behrt.config import UserError
from behrt.floor import codes_are_unchanged, emission_of_tokens, is_known, states_at_the_end
from behrt.labels import read_labels
from behrt.outcomes import MODEL_FILE, OUTCOMES, OutcomeModel, load_outcome_model
from behrt.population import Population
from behrt.sequences import PreparedData, open_prepared
from behrt.vocabulary import FIRST_CODE, UNK

ROWS_AT_ONCE = 128
"""Bounds the memory: the widest array is [tokens of these rows, states]."""
MOST_PAIRED = 4_000
"""Expected C-indices of more patients are taken over so many, evenly spaced: arrays are [these, these]."""
NODES = 64
"""Of a Gauss-Legendre quadrature, exact for exponentials over some years."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The best that can be reached on the labels of one split.

    Attributes:
        outcome: `disease`, `readmission` or `survival`
        metric: `auroc`, or `c_index` (Harrell's)
        reached: by the exact risk on the labels as they were drawn
        expected: of the exact risk, over repeated draws of the same patients' outcomes
        bound: no score of the same records has a higher expectation; of `auroc`, the same as `expected`
        patients: rows of the split that have a label
        prevalence: share of them whose outcome is true (survival: whose death was seen)

    A metric without any comparable pair is NaN.
    """

    outcome: str
    metric: Literal["auroc", "c_index"]
    reached: float
    expected: float
    bound: float
    patients: int
    prevalence: float


def has_ceiling(data: PreparedData, labels: Path) -> bool:
    """Whether the ceiling is known: the labels are a simulated cohort's, and the records its, with unchanged codes."""
    return (
        labels.stem in OUTCOMES
        and (labels.parent / MODEL_FILE).is_file()
        and is_known(data.folder, data.info["options"])
    )


def ceiling(prepared: Path, labels: Path, *, split: str = "held_out") -> Ceiling:
    """The best that any model can reach on the labels of a split.

    Args:
        prepared: folder of the prepared cohort.
        labels: `disease.parquet`, `readmission.parquet` or `survival.parquet` of its `labels` folder.

    Raises:
        UserError: what is missing, damaged, or of no simulated cohort.
    """
    data = open_prepared(prepared)
    model = load_outcome_model(labels.parent)
    rows, states = exact_states(data, outcome_labels(labels), split=split)
    if states.shape[1:] != model.disease.shape:
        raise UserError(f"{labels}: of another structure than {prepared}; name the labels of this cohort")
    return ceiling_of(labels.stem, model, states, rows)


def ceiling_of(outcome: str, model: OutcomeModel, states: NDArray[np.float64], rows: pl.DataFrame) -> Ceiling:
    """The same from P(state | record), [rows, profiles, stages], of labels in memory."""
    risk = exact_risk(outcome, model, states)
    happened = rows["boolean_value"].to_numpy()
    expected = expected_metric(outcome, model, states, risk)
    if outcome == "survival":
        reached = harrell_c(happened, rows["float_value"].to_numpy(), risk)
        bound = bound_of_c_index(first_seen(model, states[evenly(len(rows))]))
    else:
        reached, bound = auroc(happened.astype(np.float64), 1.0 - happened, risk), expected
    return Ceiling(
        outcome=outcome,
        metric="c_index" if outcome == "survival" else "auroc",
        reached=reached,
        expected=expected,
        bound=bound,
        patients=len(rows),
        prevalence=float(happened.mean()),
    )


def expected_metric(
    outcome: str, model: OutcomeModel, states: NDArray[np.float64], score: NDArray[np.float64]
) -> float:
    """AUROC or C-index of any score, [rows], in expectation over the outcomes: without the chance of one draw of them.

    That of `exact_risk` is the ceiling; a model's share of it above 0.5 has hardly any sampling error.
    """
    if outcome == "survival":
        some = evenly(len(score))
        return expected_c_index(first_seen(model, states[some]), score[some])
    risk = exact_risk(outcome, model, states)
    return auroc(risk, 1 - risk, score)


def evenly(rows: int) -> NDArray[np.int64]:
    """Places of at most `MOST_PAIRED` of so many rows."""
    return np.unique(np.linspace(0, rows - 1, min(rows, MOST_PAIRED)).astype(np.int64))


# --- exact predictions


def outcome_labels(path: Path) -> pl.DataFrame:
    """A label file of a simulated cohort: `subject_id`, `prediction_time`, `boolean_value`, of survival `float_value`.

    Raises:
        UserError: missing, damaged, or another file.
    """
    if path.stem not in OUTCOMES:
        raise UserError(f"{path}: no outcome of a simulated cohort; expected one of {', '.join(OUTCOMES)}.parquet")
    labels, expected = read_labels(path), "survival" if path.stem == "survival" else "binary"
    if labels.kind != expected:
        raise UserError(f"{path}: holds {labels.kind} labels, expected {expected} ones; simulate the cohort again")
    return labels.table


def exact_states(data: PreparedData, rows: pl.DataFrame, *, split: str) -> tuple[pl.DataFrame, NDArray[np.float64]]:
    """The rows whose subjects are in the split, in their order, and what the record tells of the state at each.

    Args:
        rows: `subject_id` and `prediction_time`, other columns are kept; tokens up to and including it are used.

    Returns:
        The rows, and float64 [rows, profiles, stages] P(profile, stage of the last visit | codes so far).

    Raises:
        UserError: no row is of the split, one is not at the end of a visit, or the records are not a simulated cohort's
            with its codes unchanged.
    """
    hidden = load_cohort(data.folder)
    if not codes_are_unchanged(data.info["options"]):
        raise UserError(f"{data.folder}: prepared with other codes than were simulated; prepare without such options")
    patients = data.split(split)
    places = pl.DataFrame({"subject_id": patients.subject_ids(), "place": np.arange(len(patients))})
    rows = rows.join(places, on="subject_id", how="inner", maintain_order="left")
    if rows.is_empty():
        raise UserError(f"{data.folder}: no label is of a patient of its {split} split; name the labels of this cohort")
    evidence = log_emission(hidden, data.vocabulary.tokens)
    wanted = list(zip(rows["place"].to_list(), rows["prediction_time"].to_numpy(), strict=True))
    blocks = []
    for first in range(0, len(wanted), ROWS_AT_ONCE):
        codes, visits = [], []
        for place, time in wanted[first : first + ROWS_AT_ONCE]:
            own, _, own_visits = patients.sequence(place)
            times = patients.times(place)
            count = int((times <= time).sum())  # times ascend
            goes_on = count < len(times) and own_visits[count] == own_visits[count - 1]
            if not count or times[count - 1] != time or goes_on:
                raise UserError(f"{data.folder}: a label is not at the end of a visit; name the labels of this cohort")
            codes.append(own[:count])
            visits.append(own_visits[:count])
        offsets = np.cumsum([0, *map(len, codes)])
        states = states_at_the_end(hidden, evidence, np.concatenate(codes), np.concatenate(visits), offsets)
        if not states.any(axis=(1, 2)).all():
            raise UserError(
                f"{data.folder}: has codes that the simulated cohort never has; prepare it without adding any"
            )
        blocks.append(states)
    return rows.drop("place"), np.concatenate(blocks)


def log_emission(hidden: Population, tokens: tuple[str, ...]) -> NDArray[np.float64]:
    """[vocab_size, states] ln P(token | state) of uncorrupted tokens; special tokens but `[UNK]` say nothing: 0."""
    emission, unknown = emission_of_tokens(hidden, tokens)
    probability = np.ones((len(tokens), len(emission)))
    probability[UNK] = unknown
    probability[FIRST_CODE:] = emission.T[FIRST_CODE:]
    with np.errstate(divide="ignore"):
        return np.log(probability)


def exact_risk(outcome: str, model: OutcomeModel, states: NDArray[np.float64]) -> NDArray[np.float64]:
    """[rows] P(outcome | record), of survival P(death within a year | record), from P(state | record)."""
    tables = {"disease": model.disease, "readmission": model.readmission, "survival": 1 - np.exp(-model.hazard)}
    risk: NDArray[np.float64] = np.einsum("rps,ps->r", states, tables[outcome])
    return risk


# --- metrics; scores are compared in pairs


def first_seen(model: OutcomeModel, states: NDArray[np.float64]) -> NDArray[np.float64]:
    """[rows, rows] A: the probability that the row's death is seen, before the column's and its follow-up's end."""
    shortest, longest = model.follow_up
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    spans = [(0.0, shortest), (shortest, longest)]  # G is smooth in each
    times = np.concatenate([low + (high - low) * (nodes + 1) / 2 for low, high in spans])
    weights = np.concatenate([(high - low) / 2 * weights for low, high in spans])
    followed = np.minimum(1, (longest - times) / (longest - shortest))  # G
    hazard = model.hazard.ravel()
    alive = np.exp(-hazard[:, None] * times)  # [states, times]
    pairs = (hazard[:, None] * alive * (weights * followed**2)) @ alive.T  # [states, states]
    flat = states.reshape(len(states), -1)
    return np.asarray(flat @ pairs @ flat.T)


def auroc(positive: NDArray[np.float64], negative: NDArray[np.float64], score: NDArray[np.float64]) -> float:
    """AUROC where each row is positive and negative with these weights; 1 and 0 of a label, or p and 1 - p.

    A row is not compared with itself. NaN where there is no pair.

    >>> label = np.array([0.0, 1.0, 0.0, 1.0])
    >>> auroc(label, 1 - label, np.array([0.1, 0.4, 0.4, 0.8]))
    0.875
    """
    _, group = np.unique(score, return_inverse=True)
    positives, negatives = np.bincount(group, positive), np.bincount(group, negative)
    below = np.cumsum(negatives) - negatives
    itself = float((positive * negative).sum())
    pairs = float(positives.sum() * negatives.sum()) - itself
    if pairs <= 0:
        return float("nan")
    return (float((positives * (below + negatives / 2)).sum()) - itself / 2) / pairs


def expected_c_index(first: NDArray[np.float64], risk: NDArray[np.float64]) -> float:
    """C of a score, [rows], in expectation over the outcomes; `first` as of `first_seen`."""
    order = np.sign(risk[:, None] - risk)
    pairs = first.sum() - np.trace(first)
    return float((first * (1 + order) / 2).sum() - np.trace(first) / 2) / float(pairs) if pairs > 0 else float("nan")


def bound_of_c_index(first: NDArray[np.float64]) -> float:
    """What no score exceeds in expectation: every pair decided for the one that is more likely seen first."""
    pairs = first.sum() - np.trace(first)
    best = np.maximum(first, first.T).sum() - np.trace(first)
    return float(best / 2 / pairs) if pairs > 0 else float("nan")
