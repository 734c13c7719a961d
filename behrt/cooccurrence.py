"""Is there anything to learn in these records: does a token's context tell more of it than its frequency does?

Measured before training, in seconds, by counting. The predictor of a code that is shown as `[MASK]` is a mixture

    q(x)  =  w_0 p(x)  +  Σ_v Σ_κ  w_{v,κ} · mean over the contexts c of view v of  (n_v(c, x) + κ p(x)) / (n_v(c) + κ)

of the training frequencies p and of what the token's contexts say: each a conditional distribution, shrunk towards p
with the weight of κ tokens (Dirichlet smoothing). The views are what a model sees: the patient's other codes, the other
codes of the visit, the codes right before and right after, the age. `n_v(c, x)` counts the training tokens x that have
c as a context in view v, `n_v(c)` is its sum over x. Special tokens, and scored ones whatever they are shown as, are no
contexts.

The weights w sum to 1 and are fitted by expectation-maximisation, a concave problem, on training patients that are left
out of the counts (cross-fitting). w_0 = 1 is the unigram itself: where contexts say nothing, nothing is lost. A mixture
needs no sum over the vocabulary, only the probability of the truth, which makes it fast at 30,000 codes.

Wherever codes depend on a context of some view the mixture gains, given enough patients. It is blind to codes that
depend on several others together while no single one of them shows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import stdtrit

from behrt.batches import FlatSequences, MaskedSequences
from behrt.masking import FIXED_SEED, Stream, mask_tokens, stream
from behrt.metrics import WORTH_HAVING, unigram
from behrt.vocabulary import FIRST_CODE, MASK

Verdict = Literal["learnable", "nothing", "undecided"]
View = Literal["patient", "visit", "before", "after", "age"]

FEWEST_PATIENTS = 50
"""Of the evidence, for an upper limit: fewer show so little of what stands together that finding none is no proof."""

BAGS: tuple[View, ...] = ("patient", "visit")
"""Views with several contexts a token; the others have one at most."""

FOLDS = 5
STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""The κ of the mixture: from counts that are believed to counts that hardly move p."""
AGE_BINS = 22
"""Five years each, as in the model: 0 to 4, …, 100 and above; the last is an unknown age."""

EVIDENCE_PATIENTS = 200
"""With fewer validation patients that have a masked code, training patients (cross-fitted) join the evidence."""
TUNING_TOKENS = 100_000
"""Tokens of training patients that the weights are fitted on, special ones included."""
MOST_DRAWS = 8
"""Draws of masks for the same training patient, where patients are few: two thirds of the tokens are asked for."""
TRAINING_TOKENS = 2_000_000
"""Tokens of training patients that are counted; of more, a random part of the patients. Bounds memory and time."""
VALIDATION_TOKENS = 250_000
"""Tokens of validation patients that are predicted; of more, a random part of the patients."""
PAIRS_AT_MOST = 20_000_000
"""Pairs of tokens that are counted for one view; of more, a random part of the patients. Bounds memory and time."""
TARGETS_AT_ONCE = 4_096
THREADS = 2
"""That count at once; most of it happens where numpy and scipy let go of the interpreter. Each holds a fold's pairs."""

STEPS = 200
"""Of expectation-maximisation."""
FIRST_WEIGHT = 0.9
"""Of the unigram, where the fit begins: contexts must earn their weight."""
SHARES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Weights of a conditional distribution alone beside the unigram, tried for the highest gain that may yet be there."""


class Draw(IntEnum):
    """What is drawn from the streams of the training sample."""

    FOLDS = 1
    COUNTED = 2
    TUNED_ON = 3
    PREDICTED = 4
    LOOKED_AT = 5


@dataclass(frozen=True, kw_only=True)
class Cooccurrence:
    """What contexts tell of masked codes, beyond their frequency. Losses are in nats per token shown as `[MASK]`.

    Attributes:
        masked_loss: of the mixture, on the validation masks.
        unigram_masked_loss: of the training frequencies, on the validation masks.
        gain: what the mixture gains on the unigram over the evidence, every token weighing the same. The evidence is
            the validation patients, and then `gain` is the difference of the two losses; with fewer than
            `EVIDENCE_PATIENTS` of them it is training patients as well, predicted from other training patients only.
        low: lower 97.5% confidence limit of the gain (t, clustered by patient: the tokens of one are correlated).
        high: highest of the upper 97.5% confidence limits of the gains of several mixtures: the fitted one, and each
            conditional distribution alone beside the unigram. On little evidence the fit may choose the unigram, and
            its gain is then zero for certain; `high` tells what may be there all the same. None with fewer than
            `FEWEST_PATIENTS` patients.
        patients, tokens: of the evidence.

    None where nothing is masked; limits also where only one patient has a masked code.
    """

    masked_loss: float | None
    unigram_masked_loss: float | None
    gain: float | None
    low: float | None
    high: float | None
    patients: int
    tokens: int

    @property
    def verdict(self) -> Verdict:
        """`learnable`: some gain is certain. `nothing`: a gain worth having is excluded. Else `undecided`.

        It speaks of these records: what so many patients do not show, more of them may.
        """
        if self.low is not None and self.low > 0:
            return "learnable"
        return "nothing" if self.high is not None and self.high < WORTH_HAVING else "undecided"


class Table:
    """`n_v(c, x)` of one view, for looking up many pairs at once.

    Attributes:
        totals: float64 [contexts] `n_v(c)`.
    """

    def __init__(self, counted: Any) -> None:
        """Args: sparse [contexts, codes] matrix in canonical CSR form."""
        contexts = np.repeat(np.arange(counted.shape[0]), np.diff(counted.indptr))
        self._pairs = contexts * counted.shape[1] + counted.indices  # ascending
        self._counts = counted.data
        self.totals = np.asarray(counted.sum(axis=1, dtype=np.float64)).ravel()

    def __call__(self, wanted: NDArray[np.int64]) -> NDArray[np.float32] | float:
        """float32 [pairs] `n_v(c, x)` of each pair, given as c times the number of codes plus x, in ascending order."""
        if not len(self._pairs):
            return 0.0
        places = np.searchsorted(self._pairs[:-1], wanted)
        return np.where(self._pairs[places] == wanted, self._counts[places], np.float32(0))


def looked_up(
    tables: Sequence[Table], contexts: NDArray[np.int32], codes: NDArray[np.int32], ordinary: int
) -> NDArray[np.float64]:
    """float64 [pairs] `n_v(c, x)` of each pair, summed over tables of the same view with so many ordinary codes."""
    wanted = contexts.astype(np.int64) * ordinary + codes
    order = np.argsort(wanted)  # neighbours are searched in the same part of the memory
    wanted = wanted[order]
    found = np.zeros(len(wanted))
    for table in tables:
        found += table(wanted)
    in_their_order = np.empty_like(found)
    in_their_order[order] = found
    return in_their_order


@dataclass(frozen=True)
class Counts:
    """Training tokens of some patients, counted.

    Attributes:
        codes: int32 [ordinary tokens] their ids.
        tables: of each view.
    """

    codes: NDArray[np.int32]
    tables: dict[View, Table]


@dataclass(frozen=True)
class Evidence:
    """Tokens shown as `[MASK]`, and what each part of the mixture says of them.

    Attributes:
        unigram: float64 [tokens] p(truth).
        ratios: float64 [tokens, parts] probability of the truth over p(truth); the first part is p itself: 1.
        patients: int64 [tokens] whose they are.
        folds: int64 [tokens] that were left out of the counts; -1 for validation patients.
    """

    unigram: NDArray[np.float64]
    ratios: NDArray[np.float64]
    patients: NDArray[np.int64]
    folds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.patients)

    @classmethod
    def together(cls, parts: Sequence[Evidence]) -> Evidence:
        return cls(
            np.concatenate([part.unigram for part in parts]),
            np.concatenate([part.ratios for part in parts]),
            np.concatenate([part.patients for part in parts]),
            np.concatenate([part.folds for part in parts]),
        )


def measure_cooccurrence(training: FlatSequences, validation: MaskedSequences, vocab_size: int) -> Cooccurrence:
    """How much contexts gain on the unigram where `[MASK]` is shown.

    Args:
        training: training patients, cut as the run cuts them; of many, `random_part` says which are enough.
        validation: the validation patients under their masks; nothing is fitted on them.
        vocab_size: number of tokens, the special ones included.
    """
    folds = stream(FIXED_SEED, Stream.TRAINING_SAMPLE, Draw.FOLDS).permutation(len(training)) % FOLDS
    with ThreadPoolExecutor(THREADS) as threads:
        of_folds = (take(training, np.flatnonzero(folds == fold)) for fold in range(FOLDS))
        counts = list(threads.map(partial(count, vocab_size=vocab_size), of_folds))
        fitted_on = threads.submit(cross_fitted, training, folds, counts, vocab_size)
        held_out = evidence_of(some_patients(validation), counts, unigram(training.codes, vocab_size))
        tuning = fitted_on.result()

    weights = fit_weights(tuning.ratios)
    evidence, gains = held_out, np.log(held_out.ratios @ weights)
    masked_loss, unigram_masked_loss = mean(-np.log(held_out.unigram) - gains), mean(-np.log(held_out.unigram))
    if len(np.unique(held_out.patients)) < EVIDENCE_PATIENTS:
        evidence = Evidence.together([held_out, replace(tuning, patients=len(validation.sequences) + tuning.patients)])
        gains = np.concatenate([gains, cross_fitted_gains(tuning)])

    gain, half = clustered_interval(gains, evidence.patients)
    patients = len(np.unique(evidence.patients))
    return Cooccurrence(
        masked_loss=known(masked_loss),
        unigram_masked_loss=known(unigram_masked_loss),
        gain=known(gain),
        low=known(gain - half),
        high=known(max(gain + half, highest_limit(evidence))) if patients >= FEWEST_PATIENTS else None,
        patients=patients,
        tokens=len(evidence),
    )


def cross_fitted(
    training: FlatSequences, folds: NDArray[np.int64], counts: Sequence[Counts], vocab_size: int
) -> Evidence:
    """Masked training patients, each predicted from the counts of the other folds.

    Args:
        folds: int64 [patients].
        counts: of each fold.
    """
    order = stream(FIXED_SEED, Stream.TRAINING_SAMPLE, Draw.TUNED_ON).permutation(len(training))
    lengths = np.cumsum(np.diff(training.offsets)[order])
    chosen = order[: max(1, int((lengths <= TUNING_TOKENS).sum()))]
    draws = int(np.clip(TUNING_TOKENS // lengths[-1], 1, MOST_DRAWS))
    parts = []
    for fold in range(FOLDS):
        patients = np.repeat(np.sort(chosen[folds[chosen] == fold]), draws)
        sequences = take(training, patients)
        masks = stream(FIXED_SEED, Stream.TRAINING_SAMPLE_MASKS, 1 + fold)
        masked = MaskedSequences(sequences, *mask_tokens(sequences.codes, vocab_size=vocab_size, generator=masks))
        others = [counts[other] for other in range(FOLDS) if other != fold]
        frequencies = unigram(np.concatenate([other.codes for other in others]), vocab_size)
        found = evidence_of(masked, others, frequencies)
        parts.append(Evidence(found.unigram, found.ratios, patients[found.patients], np.full(len(found), fold)))
    return Evidence.together(parts)


def cross_fitted_gains(tuning: Evidence) -> NDArray[np.float64]:
    """[tokens] gain of each training token, with weights that were fitted on the other folds."""
    gains = np.zeros(len(tuning))
    for fold in range(FOLDS):
        own = tuning.folds == fold
        gains[own] = np.log(tuning.ratios[own] @ fit_weights(tuning.ratios[~own]))
    return gains


def fit_weights(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights under which the mixture is likeliest, float64 [parts]; the unigram alone where there are no tokens."""
    weights: NDArray[np.float64] = np.eye(ratios.shape[1])[0]
    if not len(ratios):
        return weights
    weights[1:] = (1 - FIRST_WEIGHT) / (len(weights) - 1)
    weights[0] = FIRST_WEIGHT
    for _ in range(STEPS):
        weights *= (1 / (ratios @ weights)) @ ratios / len(ratios)
    return weights


def highest_limit(evidence: Evidence) -> float:
    """Highest upper limit of the gain over mixtures of the unigram and one conditional distribution."""
    limits = []
    for share in SHARES:
        for part in evidence.ratios.T[1:]:
            gain, half = clustered_interval(np.log1p(share * (part - 1)), evidence.patients)
            limits.append(gain + half)
    return max(limits)


def clustered_interval(values: NDArray[np.float64], clusters: NDArray[np.int64]) -> tuple[float, float]:
    """Mean of values that are correlated inside their cluster, and half the width of its 95% confidence interval.

    A ratio of sums over clusters (Cochran, Sampling Techniques, 1977, chapter 6) with a t quantile. The mean of no
    values is NaN, and so is the width over fewer than two clusters.

    Args:
        clusters: int64 [values], not negative.
    """
    centre = mean(values)
    sizes = np.bincount(clusters)
    sums = np.bincount(clusters, weights=values)
    number = int((sizes > 0).sum())
    if number < 2:
        return centre, math.nan
    spread = float(((sums - centre * sizes) ** 2).sum()) * number / (number - 1)
    return centre, float(stdtrit(number - 1, 0.975)) * math.sqrt(spread) / len(values)


def count(sequences: FlatSequences, vocab_size: int) -> Counts:
    """Counts which codes have which contexts."""
    codes, ordinary = sequences.codes - FIRST_CODE, vocab_size - FIRST_CODE
    is_code = codes >= 0
    tables: dict[View, Table] = {}
    for view in get_args(View):
        if view in BAGS:
            table = count_pairs(sequences, units_of(sequences, view), ordinary)
        else:
            contexts = single_contexts(sequences, codes, view)
            table = crosstab(contexts, codes, is_code & (contexts >= 0), (contexts_of(view, ordinary), ordinary))
        tables[view] = Table(table)
    return Counts(sequences.codes[is_code], tables)


def count_pairs(sequences: FlatSequences, units: NDArray[np.int64], ordinary: int) -> Any:
    """`n(c, x)`, sparse [codes, codes]: tokens x with c at another token of their unit.

    Args:
        units: int64 [tokens] number of the patient or visit.
    """
    codes = sequences.codes - FIRST_CODE
    is_code = codes >= 0
    sizes = np.bincount(units[is_code], minlength=int(units.max(initial=-1)) + 1)
    patients = units_of(sequences, "patient")
    pairs = np.bincount(patients, weights=np.where(is_code, sizes[units], 0), minlength=len(sequences))
    order = stream(FIXED_SEED, Stream.TRAINING_SAMPLE, Draw.COUNTED).permutation(len(sequences))
    counted = np.zeros(len(sequences), np.bool_)
    counted[order] = np.cumsum(pairs[order]) <= PAIRS_AT_MOST / FOLDS
    tokens = crosstab(units, codes, is_code & counted[patients], (len(sizes), ordinary))
    present = tokens.copy()
    present.data[:] = 1
    # a code that stands once in its unit is no context of itself
    alone = np.bincount(tokens.indices[tokens.data == 1], minlength=ordinary).astype(np.float32)
    table = (present.T @ tokens - sparse.diags(alone)).tocsr()
    table.sort_indices()
    return table


def evidence_of(masked: MaskedSequences, counts: Sequence[Counts], log_frequencies: NDArray[np.float64]) -> Evidence:
    """What every part of the mixture says of the tokens shown as `[MASK]`.

    Args:
        counts: are added up.
        log_frequencies: float64 [vocab_size] ln p, of `unigram`.
    """
    sequences = masked.sequences
    visible = np.where(masked.scored, -1, masked.shown - FIRST_CODE)  # [tokens], negative where there is no context
    targets = np.flatnonzero(masked.scored & (masked.shown == MASK))
    truths = sequences.codes[targets] - FIRST_CODE
    frequencies = np.exp(log_frequencies[FIRST_CODE:])
    ratios = np.ones((len(targets), 1 + len(get_args(View)) * len(STRENGTHS)))
    for number, view in enumerate(get_args(View)):
        tables = [part.tables[view] for part in counts]
        totals = np.sum([table.totals for table in tables], axis=0)
        columns = slice(1 + number * len(STRENGTHS), 1 + (number + 1) * len(STRENGTHS))
        for block, rows, contexts in contexts_of_targets(sequences, visible, targets, view, len(frequencies)):
            x = truths[block][rows]
            together = looked_up(tables, contexts, x, len(frequencies))
            found = np.bincount(rows, minlength=len(truths[block]))
            for column, strength in zip(range(columns.start, columns.stop), STRENGTHS, strict=True):
                said = (together / frequencies[x] + strength) / (totals[contexts] + strength)
                total = np.bincount(rows, weights=said, minlength=len(found))
                ratios[block, column] = np.where(found > 0, total / np.maximum(found, 1), 1)
    patients = units_of(sequences, "patient")[targets]
    return Evidence(frequencies[truths], ratios, patients, np.full(len(targets), -1))


def contexts_of_targets(
    sequences: FlatSequences, visible: NDArray[np.int32], targets: NDArray[np.int64], view: View, ordinary: int
) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.int32]]]:
    """The distinct contexts of each target, some targets at a time.

    Args:
        visible: int32 [tokens] codes from 0, negative where none is to be seen.
        targets: int64 [targets] tokens to predict.

    Yields:
        Which targets, and pairs: int64 the target's number among these, int32 the context.
    """
    if view in BAGS:
        units, contexts = units_of(sequences, view), visible
    else:
        units, contexts = np.arange(len(visible)), single_contexts(sequences, visible, view)
    shape = (int(units.max(initial=-1)) + 1, contexts_of(view, ordinary))
    seen = crosstab(units, contexts, contexts >= 0, shape)
    for first in range(0, len(targets), TARGETS_AT_ONCE):
        block = slice(first, min(first + TARGETS_AT_ONCE, len(targets)))
        chosen = seen[units[targets[block]]]
        yield block, np.repeat(np.arange(chosen.shape[0]), np.diff(chosen.indptr)), chosen.indices


def units_of(sequences: FlatSequences, view: View) -> NDArray[np.int64]:
    """int64 [tokens] number of each token's patient, or of its visit among those of all patients."""
    begins = np.zeros(len(sequences.codes), np.bool_)
    begins[sequences.offsets[:-1]] = True
    if view == "visit":
        begins[1:] |= np.diff(sequences.visits) != 0
    return np.cumsum(begins) - 1


def single_contexts(sequences: FlatSequences, codes: NDArray[np.int32], view: View) -> NDArray[np.int32]:
    """int32 [tokens] the one context of each token, negative where there is none.

    Args:
        codes: int32 [tokens] from 0, negative at special tokens, which stand between visits and between patients.
    """
    if view == "age":
        bins = np.clip(np.nan_to_num(sequences.ages) // 5, 0, AGE_BINS - 2).astype(np.int32)
        return np.where(np.isnan(sequences.ages), np.int32(AGE_BINS - 1), bins)
    contexts = np.full_like(codes, -1)
    if view == "before":
        contexts[1:] = codes[:-1]
    else:
        contexts[:-1] = codes[1:]
    return contexts


def contexts_of(view: View, ordinary: int) -> int:
    """How many different contexts a view has."""
    return AGE_BINS if view == "age" else ordinary


def crosstab(
    rows: NDArray[np.integer[Any]],
    columns: NDArray[np.integer[Any]],
    chosen: NDArray[np.bool_],
    shape: tuple[int, int],
) -> Any:
    """How often row and column come together among the chosen entries, sparse float32."""
    table = sparse.csr_matrix((np.ones(int(chosen.sum()), np.float32), (rows[chosen], columns[chosen])), shape=shape)
    table.sum_duplicates()
    return table


def take(sequences: FlatSequences, patients: NDArray[np.int64]) -> FlatSequences:
    """The sequences of these patients, in this order; a patient may be named twice."""
    index, offsets = tokens_of(sequences, patients)
    return FlatSequences(sequences.codes[index], sequences.ages[index], sequences.visits[index], offsets)


def tokens_of(sequences: FlatSequences, patients: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which tokens these patients have, int64 [tokens], and where each patient begins among them, [patients + 1]."""
    lengths = np.diff(sequences.offsets)[patients]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(offsets[-1]) + np.repeat(sequences.offsets[patients] - offsets[:-1], lengths), offsets


def some_patients(masked: MaskedSequences) -> MaskedSequences:
    """All patients, or a random part that has no more than `VALIDATION_TOKENS`."""
    patients = random_part(np.diff(masked.sequences.offsets), VALIDATION_TOKENS, Draw.PREDICTED)
    index, _ = tokens_of(masked.sequences, patients)
    return MaskedSequences(take(masked.sequences, patients), masked.shown[index], masked.scored[index])


def random_part(lengths: NDArray[np.int64], most: int, draw: Draw) -> NDArray[np.int64]:
    """Indices, rising, of as many random patients as have no more than `most` tokens together, and of one at least."""
    order = stream(FIXED_SEED, Stream.TRAINING_SAMPLE, draw).permutation(len(lengths))
    return np.sort(order[: max(1, int((np.cumsum(lengths[order]) <= most).sum()))])


def mean(values: NDArray[np.float64]) -> float:
    """NaN of no values."""
    return float(values.mean()) if len(values) else math.nan


def known(value: float) -> float | None:
    """None for NaN; else to nine decimals, so that a sum of floating-point numbers that is zero but for rounding is."""
    return round(value, 9) + 0.0 if math.isfinite(value) else None
