"""Against which numbers is a masked-code loss or accuracy read?

Pure functions. Losses are in nats per scored token, accuracies shares from 0 to 1. Three lines on the same scale: what
guessing reaches (`chance_loss`), what counting codes reaches (`unigram`), what the best model reaches (`floor.py`);
`closed_gap` places a model between the last two. `copying_loss` is what counting reaches that knows the corruption.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from behrt.config import SHOWN_AS_MASK, SHOWN_AS_RANDOM
from behrt.vocabulary import FIRST_CODE, MASK

WORTH_HAVING = 0.02
"""Nats per `[MASK]` token. A smaller gain lowers the perplexity by less than 2%, which nobody trains a model for. On
random codes the upper limit of what other codes tell is below it from about 100 patients on (docs/doctor.md)."""


def chance_loss(vocab_size: int) -> float:
    """Loss of guessing uniformly over the vocabulary: ln(vocab_size), as in the troubleshooting guide.

    >>> round(chance_loss(1000), 1)
    6.9
    """
    assert vocab_size > 0
    return math.log(vocab_size)


def unigram(train_codes: NDArray[np.int32], vocab_size: int) -> NDArray[np.float64]:
    """Log-probability of each token by its count in the training tokens, add-one smoothed over the ordinary codes.

    Args:
        train_codes: int32 token ids of any shape; special ones are not counted.
        vocab_size: number of tokens, the special ones included.

    Returns:
        float64 [vocab_size], -inf at special tokens.

    >>> np.exp(unigram(np.array([2, 5, 5, 6, 3], dtype=np.int32), 8))
    array([0. , 0. , 0. , 0. , 0. , 0.5 , 0.33333333, 0.16666667])
    """
    assert train_codes.max(initial=0) < vocab_size
    return unigram_of_counts(np.bincount(train_codes.ravel(), minlength=vocab_size))


def unigram_of_counts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same from how often each token was counted, int64 [vocab_size]; special ones do not matter."""
    vocab_size = len(counts)
    assert vocab_size > FIRST_CODE
    smoothed = counts[FIRST_CODE:] + 1.0
    log_probabilities = np.full(vocab_size, -np.inf)
    log_probabilities[FIRST_CODE:] = np.log(smoothed / smoothed.sum())
    return log_probabilities


def unigram_loss_and_accuracy(log_probabilities: NDArray[np.float64], labels: NDArray[np.int32]) -> tuple[float, float]:
    """Loss and accuracy of predicting the same distribution at every scored position.

    Args:
        log_probabilities: float64 [vocab_size], of `unigram`.
        labels: int32 ids of the scored tokens, ordinary codes.

    Returns:
        (NaN, NaN) where nothing is scored.

    >>> uniform = unigram(np.array([], dtype=np.int32), 9)
    >>> unigram_loss_and_accuracy(uniform, np.array([5, 6], dtype=np.int32)) == (math.log(4), 0.5)
    True
    """
    if not labels.size:
        return math.nan, math.nan
    assert (labels >= FIRST_CODE).all(), "a special token is scored"
    accuracy = float((labels == log_probabilities.argmax()).mean())
    return -float(log_probabilities[labels].mean()), accuracy


def copying_loss(log_probabilities: NDArray[np.float64], labels: NDArray[np.int32], shown: NDArray[np.int32]) -> float:
    """Loss of the best predictor that knows only the frequencies p and the corruption; who learns more is below it.

    Where a code y is shown at a scored position, the truth x is y more often than p says, because a selected code is
    shown as itself with share s and as one of the R ordinary codes with share r / R each:

        q(x)  =  p(x) (s · 1[x = y] + r / R)  /  (s · p(y) + r / R)

    At `[MASK]` it is p. A model that copies is therefore below the unigram loss even on random codes.

    Args:
        log_probabilities: float64 [vocab_size], of `unigram`.
        labels: int32 ids of the scored tokens, ordinary codes.
        shown: int32, as long: ids that are shown in their place, `[MASK]` or ordinary codes.

    Returns:
        NaN where nothing is scored.

    >>> uniform = unigram(np.array([], dtype=np.int32), 9)
    >>> at_mask, as_itself = np.array([4], dtype=np.int32), np.array([5], dtype=np.int32)
    >>> [round(math.exp(-copying_loss(uniform, as_itself, shown)), 6) for shown in (at_mask, as_itself)]
    [0.25, 0.625]
    """
    if not labels.size:
        return math.nan
    assert labels.shape == shown.shape
    assert (labels >= FIRST_CODE).all(), "a special token is scored"
    assert ((shown == MASK) | (shown >= FIRST_CODE)).all(), "a scored token is shown as a special one"
    as_itself = 1 - SHOWN_AS_MASK - SHOWN_AS_RANDOM
    as_each = SHOWN_AS_RANDOM / (len(log_probabilities) - FIRST_CODE)
    copied = shown != MASK
    y = shown[copied]
    log_q = log_probabilities[labels]
    log_q[copied] += np.log(as_itself * (labels[copied] == y) + as_each)
    log_q[copied] -= np.log(as_itself * np.exp(log_probabilities[y]) + as_each)
    return -float(log_q.mean())


def closed_gap(loss: float, unigram_loss: float, floor_loss: float) -> float:
    """Share of the way from counting codes (0) to the best possible prediction (1); negative is worse than counting.

    NaN where there is no gap to close.

    >>> closed_gap(4.0, unigram_loss=6.0, floor_loss=3.5)
    0.8
    """
    gap = unigram_loss - floor_loss
    return (unigram_loss - loss) / gap if gap > 0 else math.nan


def wilson_interval(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of an accuracy (Wilson, 1927); 95% with the default `z`.

    Unlike the normal interval it stays inside 0 to 1 and holds for few hits. (0, 1) where nothing was counted.

    >>> [round(bound, 4) for bound in wilson_interval(5, 100)]
    [0.0215, 0.1118]
    """
    assert 0 <= hits <= total
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
