"""How is a loss curve read, and against which lines?

What all predicates over curves share: which curve counts, whether it is long enough to be judged, whether it falls, and
what its level is compared with.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from behrt.doctor.curves import Curve, Movement, movement, slope
from behrt.doctor.facts import RunFacts
from behrt.metrics import wilson_interval

FEWEST_EPOCHS = 5
"""A run is judged by its curves when they span this many epochs."""
VISIBLE = 0.004
"""A steady fall of this share of the loss is a fall all the same: slow, but no standstill."""
STANDSTILL = 0.01
"""A loss that lost less than this share of itself has not moved."""
SMALLEST_VOCABULARY = 50
"""Of codes that anybody trains a model on."""
SPIKE = 0.05
"""A jump of this share of the loss, gone again at the next epoch, is a spike."""
CLEAR = 4.0
"""Standard errors that a trend must exceed."""
GRACE_EPOCHS, GRACE_SHARE = 10, 0.3
"""A run may stand still for so many epochs, and this share of the planned ones, before it counts as lost."""
FEW_PATIENTS = 500
"""The guide's smallest validation set."""


def losses(facts: RunFacts) -> tuple[Curve | None, Curve | None]:
    """The finite parts of `train_loss` and `val_loss`; None where there is none."""
    train, val = (facts.get(name) for name in ("train_loss", "val_loss"))
    train, val = (None if curve is None or not len(curve.finite) else curve.finite for curve in (train, val))
    return train, val


def main_loss(facts: RunFacts) -> Curve | None:
    """Validation loss, or training loss where validation is missing."""
    train, val = losses(facts)
    return train if val is None else val


def spans_enough(curve: Curve | None) -> bool:
    """Whether the curve is long enough to be judged."""
    return curve is not None and len(curve) > 1 and curve.epochs[-1] - curve.epochs[0] + 1 >= FEWEST_EPOCHS


def chance_of(facts: RunFacts) -> float | None:
    """ln(vocabulary), where it is known and the weights began at random."""
    return None if facts.pretrained else facts.chance_loss


def start_loss(facts: RunFacts, moved: Movement) -> float:
    """Loss before any training: chance where it is known, else the first value."""
    chance = chance_of(facts)
    return moved.start if chance is None else chance


def both_ends_are_random(facts: RunFacts) -> bool:
    """Whether neither embeddings nor head are trained, on weights that began at random."""
    return not facts.pretrained and facts.train_embeddings is False and facts.train_head is False


def learned_share(facts: RunFacts, moved: Movement) -> float:
    """Share of the loss before training that the lowest level has lost."""
    start = start_loss(facts, moved)
    return (start - moved.low) / start if start > 0 else 0.0


def spikes(curve: Curve) -> NDArray[np.bool_]:
    """Where a loss jumps up by far more than its neighbours differ, and is back at the next value; bool [n].

    Jumps at every fourth value or more are no exceptions, and none of them counts.
    """
    found = np.zeros(len(curve), np.bool_)
    if len(curve) >= 3:
        before, there, after = curve.values[:-2], curve.values[1:-1], curve.values[2:]
        height = there - np.maximum(before, after)  # [n - 2]
        found[1:-1] = height > np.maximum(SPIKE * np.minimum(before, after), 2 * np.abs(before - after))
    return found if 4 * found.sum() <= len(found) else np.zeros(len(curve), np.bool_)


def began_at_chance(facts: RunFacts, curve: Curve) -> bool:
    """Whether a loss that hardly moved may be that of a guess.

    It is no guess below chance or counting; where neither is known, if the record begins in mid-run, or below ln(50):
    no vocabulary of codes is that small.
    """
    lines = [line for line in (chance_of(facts), counting_loss(facts)) if line is not None]
    if lines:
        return float(curve.values.min()) >= (1 - STANDSTILL) * min(lines)
    from_the_start = curve.epochs[0] <= max(2, 0.1 * curve.epochs[-1])
    return not facts.pretrained and from_the_start and curve.values[0] >= math.log(SMALLEST_VOCABULARY)


def counting_loss(facts: RunFacts) -> float | None:
    """What counting codes reaches, with the copying that the masks allow where that is known and helps."""
    known = [loss for loss in (facts.unigram_loss, facts.copying_loss) if loss is not None]
    return min(known, default=None)


def has_beaten_counting(facts: RunFacts) -> bool:
    """Whether the validation loss lies visibly below what counting codes reaches: there was something to learn."""
    _, val = losses(facts)
    counting = counting_loss(facts)
    return val is not None and counting is not None and movement(val).low < (1 - VISIBLE) * counting


def best_known_loss(facts: RunFacts) -> float | None:
    """What can be reached: the floor, or what a table of co-occurring codes reaches at the masked four fifths."""
    counting = counting_loss(facts)
    if facts.floor_loss is not None:
        return facts.floor_loss
    if facts.cooccurrence_gain is None or counting is None or facts.cooccurrence_gain <= 0:
        return None
    return counting - 0.8 * facts.cooccurrence_gain


def closed_share(facts: RunFacts, moved: Movement) -> float | None:
    """Share of the gap between counting and the best known loss that the lowest level closes."""
    counting, best = counting_loss(facts), best_known_loss(facts)
    if counting is None or best is None or counting - best < VISIBLE * counting:
        return None
    return (counting - moved.low) / (counting - best)


def past_grace(facts: RunFacts, moved: Movement) -> bool:
    """Whether a run that does not move has had its time."""
    grace = max(GRACE_EPOCHS, math.ceil(GRACE_SHARE * (facts.epochs or 0)))
    return bool(facts.finished) or moved.count >= grace


def latter_half(curve: Curve) -> Curve:
    """The points of the latter half of the epochs; the whole curve where these are fewer than three."""
    late = curve.where(curve.epochs >= (curve.epochs[0] + curve.epochs[-1]) / 2)
    return late if len(late) >= 3 else curve


def is_falling(curve: Curve, moved: Movement) -> bool:
    """Whether the second half falls steadily, by more than noise."""
    rate, error = slope(latter_half(curve))
    whole_rate, whole_error = slope(curve)
    fell = moved.fall > max(VISIBLE * abs(moved.start), 3 * moved.noise)
    return fell and rate < 0 and rate <= -CLEAR / 2 * error and whole_rate <= -CLEAR * whole_error


def accuracy_interval(accuracy: float, scored: int) -> tuple[float, float]:
    """95% confidence interval of an accuracy over so many scored tokens, or patients (Wilson, 1927)."""
    return wilson_interval(round(accuracy * scored), scored)


def lowest_accuracy(facts: RunFacts, train_accuracy: float) -> float:
    """Lower end of the training accuracy's interval: it is measured on about as many tokens as validation."""
    return accuracy_interval(train_accuracy, facts.val_scored)[0] if facts.val_scored else train_accuracy


def highest_accuracy(facts: RunFacts, val_accuracy: float) -> float:
    """Upper end of the validation accuracy's interval; the accuracy itself where its scored tokens are not counted."""
    return accuracy_interval(val_accuracy, facts.val_scored)[1] if facts.val_scored else val_accuracy


def numbers(**values: Any) -> dict[str, Any]:
    """Evidence: numbers to four places, unknown ones left out."""
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in values.items()
        if value is not None
    }


def epoch_number(epoch: float) -> int | float:
    return int(epoch) if float(epoch).is_integer() else round(float(epoch), 2)


def last_accuracies(facts: RunFacts) -> tuple[float, float] | None:
    """Training and validation accuracy of the last epochs; None where one of them is not finite."""
    curves = [facts.get(name) for name in ("train_accuracy", "val_accuracy")]
    known = [curve.finite for curve in curves if curve is not None and len(curve.finite)]
    if len(known) < 2:
        return None
    train, val = (movement(curve).end for curve in known)
    return train, val
