"""Which symptoms do loss and accuracy curves show?

The guide's words ("rising", "slowly", "barely moved") need numbers to become predicates. Falls and rises are read off
levels, means over a few epochs (`curves.movement`), and count from a share of the loss on, so that they mean the same
in any vocabulary: in the guide's excerpts at 1,000 codes a healthy run has lost 7% of its loss after five epochs, an
underfitting one 2.5% after fifteen, and one whose learning rate is too low 0.7% after twenty.

Each predicate returns what it saw, or None. `curve_rules.py` says what follows from it.
"""

from __future__ import annotations

import math

import numpy as np

from behrt.doctor.curves import Curve, Movement, movement, slope
from behrt.doctor.facts import RunFacts
from behrt.doctor.readings import (
    CLEAR,
    FEW_PATIENTS,
    FEWEST_EPOCHS,
    STANDSTILL,
    VISIBLE,
    accuracy_interval,
    began_at_chance,
    best_known_loss,
    both_ends_are_random,
    chance_of,
    closed_share,
    counting_loss,
    epoch_number,
    highest_accuracy,
    is_falling,
    last_accuracies,
    latter_half,
    learned_share,
    losses,
    lowest_accuracy,
    main_loss,
    numbers,
    past_grace,
    spans_enough,
    spikes,
    start_loss,
)
from behrt.doctor.rule import Severity, Symptom

LITTLE_OF_CHANCE, LITTLE_OF_FIRST = 0.09, 0.06
"""A loss that lost less than this share of ln(vocabulary) has learned little; where that is not known, of its first
value, which has the first epoch behind it."""
FAST = 0.01
"""A loss that still falls by this share of itself an epoch is not slow, only young."""
MEMORISED = 0.04
"""A training loss that lost this share of itself has learned something, be it by heart."""
RISE_OF_FALL = 0.10
ROUNDING = 1e-5
"""Share of a loss by which it may differ through the order of its sums alone; smaller steps are no jumps."""
RISE_OF_LOSS = 0.005
"""A validation loss has risen by more than noise and chance of the lowest epoch when both shares are passed."""
EXPLODED = 0.10
"""A training loss that ends this share above where it began is no longer being minimised."""
LARGEST_VOCABULARY = 1_000_000
"""Where the vocabulary is not known, a guess costs no more than ln of this."""
RECOVERY_EPOCHS = 5
"""A run in progress has so many epochs to come back from a jump."""
GONE = 1.5
"""A run that is over at this multiple of where it began ended in an explosion, be it in its last epoch alone."""
ERRATIC = 0.05
"""A loss whose jitter is this share of itself, and that does not fall, is thrown about by its own steps."""
FAILING_RATE = 1e-2
"""At this learning rate full training and LoRA both failed (docs/learning.md)."""
ACCURACY_GAP = 0.20
ACCURACY_SHARE = 0.20
SLOW_CLOSING = 0.25
"""Share of the gap between counting codes and the best possible loss that a trained model has at least closed."""


def not_finite(facts: RunFacts) -> Symptom | None:
    for name in ("train_loss", "val_loss", "train_loss_running", "gradient_norm"):
        curve = facts.get(name)
        if curve is None or np.isfinite(curve.values).all():
            continue
        first = curve.epochs[~np.isfinite(curve.values)][0]
        before = curve.where(curve.epochs < first).finite
        last = float(before.values[-1]) if len(before) else None
        return Symptom(numbers(figure=name, first_epoch=epoch_number(first), last_finite=last))
    return None


def diverged(facts: RunFacts) -> Symptom | None:
    train, val = losses(facts)
    curve = val if train is None else train
    if curve is None or len(curve) < 2:
        return None
    curve = curve.where(~spikes(curve))
    moved = movement(curve)
    top = start_loss(facts, moved)
    # Several epochs, so that a jump at the end is no divergence yet; more of them while it may still come back.
    lasting = min(max(2, moved.width), 3) if facts.finished is not False else RECOVERY_EPOCHS
    lowest_of_tail = float(curve.values[-lasting:].min())
    gone_at_last = bool(facts.finished) and curve.values[-1] > GONE * max(top, moved.start)
    above_start = lowest_of_tail > (1 + EXPLODED) * max(top, moved.start)
    highest_chance = math.log(LARGEST_VOCABULARY) if chance_of(facts) is None else top
    stays_up = spans_enough(curve) and not is_falling(curve, moved) and moved.end > 0.5 * moved.start
    stays_above_chance = stays_up and lowest_of_tail > (1 + EXPLODED) * highest_chance
    exploded = gone_at_last or above_start or stays_above_chance
    halfway = moved.low + max(0.5 * (top - moved.low), MEMORISED * top)
    collapsed = train is not None and spans_enough(curve) and lowest_of_tail > halfway
    thrown_about = moved.noise > ERRATIC * top and moved.rise > ERRATIC * moved.low
    erratic = spans_enough(curve) and thrown_about and not is_falling(curve, moved)
    if not (exploded or collapsed or erratic):
        return None
    return Symptom(
        numbers(
            figure="val_loss" if train is None else "train_loss",
            start=moved.start,
            lowest=moved.low,
            lowest_epoch=epoch_number(moved.low_epoch),
            last=moved.end,
            last_epoch=epoch_number(moved.last_epoch),
        )
    )


def _is_at(chance: float, facts: RunFacts, moved: Movement, *, moves: bool, stands: bool) -> bool:
    """Whether a loss is at ln(vocabulary).

    The less it moves, the farther below it may lie by the luck of its validation set; and no slow fall is a beginning
    where embeddings and head stay random.
    """
    jitters = moved.start - moved.low < max(VISIBLE * moved.start, 5 * moved.noise)
    if both_ends_are_random(facts) or (jitters and not moves):
        share = 3 * STANDSTILL
    else:
        share = VISIBLE if moves and not stands else STANDSTILL
    return moved.low >= (1 - share) * chance


def stuck_at_chance(facts: RunFacts) -> Symptom | None:
    train, val = losses(facts)
    curve = val if val is not None else train
    if curve is None or not spans_enough(curve):
        return None
    moved = movement(curve)
    if diverged(facts) or _memorises(facts) or overfitting(facts) or learning_rate_too_low(facts):
        return None
    chance, counting = chance_of(facts), counting_loss(facts)
    moves = is_falling(curve, moved)
    stands = moved.start - moved.low < STANDSTILL * moved.start
    near: str | None = None
    if chance is not None and _is_at(chance, facts, moved, moves=moves, stands=stands):
        near = "chance"
    elif counting is not None and moved.low >= (1 - VISIBLE) * counting and not moves:
        near = "counting codes"
    elif chance is None and counting is None and stands and began_at_chance(facts, curve):
        near = "where it began"
    if near is None:
        return None
    return Symptom(
        numbers(
            near=near,
            first=moved.start,
            last=moved.end,
            last_epoch=epoch_number(moved.last_epoch),
            chance_loss=facts.chance_loss,
            unigram_loss=facts.unigram_loss,
            copying_loss=facts.copying_loss,
        ),
        "error" if past_grace(facts, moved) else "warning",
    )


def _memorises(facts: RunFacts, share: float = MEMORISED) -> bool:
    """Whether the training loss has lost this share for real, whatever validation does."""
    train, _ = losses(facts)
    if train is None or len(train) < 2:
        return False
    moved = movement(train)
    return moved.fall > max(share * moved.start, 3 * moved.noise)


def _has_risen(facts: RunFacts, curve: Curve, moved: Movement) -> bool:
    """Whether a validation loss has turned, by more than jitter and the luck of its lowest epoch."""
    fall = max(start_loss(facts, moved) - moved.low, 0.0)
    rise = moved.rise if moved.width > 1 else float(curve.values[-2:].min()) - moved.low  # one jump is no turn
    if rise <= max(RISE_OF_LOSS * moved.low, 3 * moved.noise):
        return False
    tail = curve.where(curve.epochs >= moved.low_epoch)
    rate, error = slope(tail)
    steady = rate > CLEAR * error and len(tail) >= FEWEST_EPOCHS
    return rise > (0.5 if steady else 1.0) * RISE_OF_FALL * fall


def overfitting(facts: RunFacts) -> Symptom | None:
    train, val = losses(facts)
    if val is None or len(val) < 3 or not spans_enough(val) or diverged(facts):
        return None
    moved = movement(val)
    if not _has_risen(facts, val, moved):
        return None
    # A validation loss that has turned says half of it: less of a fall in training is enough.
    falls_on = train is None or train.values[-1] < train.at(moved.low_epoch)
    if not falls_on or (train is not None and not _memorises(facts, MEMORISED / 2)):
        return None
    return Symptom(
        numbers(
            lowest_val_loss=moved.low,
            lowest_epoch=epoch_number(moved.low_epoch),
            val_loss=moved.end,
            last_epoch=epoch_number(moved.last_epoch),
            rise=moved.rise,
            train_loss_then=train.at(moved.low_epoch) if train is not None else None,
            train_loss=float(train.values[-1]) if train is not None else None,
        )
    )


def widening_gap(facts: RunFacts) -> Symptom | None:
    train, val = losses(facts)
    if train is None or val is None or not spans_enough(val) or not _memorises(facts) or diverged(facts):
        return None
    moved, trained = movement(val), movement(train)
    middle = (val.epochs[0] + val.epochs[-1]) / 2
    gap, gap_before = moved.end - trained.end, val.at(middle) - train.at(middle)
    fell = max(start_loss(facts, moved) - moved.end, 0.0)
    widens = gap - gap_before > 0.5 * MEMORISED * moved.end
    if is_falling(val, moved) or not widens or gap <= max(fell, MEMORISED * moved.end):
        return None
    return Symptom(
        numbers(train_loss=trained.end, val_loss=moved.end, gap=gap, gap_halfway=gap_before, val_loss_fell_by=fell)
    )


def accuracy_gap(facts: RunFacts) -> Symptom | None:
    accuracies = last_accuracies(facts)
    if accuracies is None:
        return None
    train, val = accuracies
    if lowest_accuracy(facts, train) - highest_accuracy(facts, val) <= ACCURACY_GAP:
        return None
    return Symptom(numbers(train_accuracy=train, val_accuracy=val, gap_points=100 * (train - val)))


def low_val_accuracy(facts: RunFacts) -> Symptom | None:
    accuracies = last_accuracies(facts)
    if accuracies is None:
        return None
    train, val = accuracies
    guessing = 1 / facts.vocab_size if facts.vocab_size else 0.001
    if facts.unigram_accuracy is not None:
        guessing = max(guessing, facts.unigram_accuracy)
    if train < 5 * guessing or highest_accuracy(facts, val) >= ACCURACY_SHARE * lowest_accuracy(facts, train):
        return None
    return Symptom(numbers(train_accuracy=train, val_accuracy=val, share_percent=100 * val / train))


def underfitting(facts: RunFacts) -> Symptom | None:
    symptom, curve = _little_learned(facts), main_loss(facts)
    in_progress = facts.finished is False and curve is not None and not past_grace(facts, movement(curve))
    return None if in_progress else symptom


def _little_learned(facts: RunFacts) -> Symptom | None:
    curve = main_loss(facts)
    others = (stuck_at_chance, diverged, learning_rate_too_low)
    if curve is None or not spans_enough(curve) or _overfits(facts) or any(check(facts) for check in others):
        return None
    moved = movement(curve)
    closed = closed_share(facts, moved)
    counting, best = counting_loss(facts), best_known_loss(facts)
    if closed is not None:
        fires = closed < SLOW_CLOSING
    elif counting is not None and best is not None:
        fires = moved.low > best + VISIBLE * counting
    elif counting is not None:
        fires = moved.low > (1 - VISIBLE) * counting
    else:
        little = LITTLE_OF_FIRST if chance_of(facts) is None else LITTLE_OF_CHANCE
        young = -slope(latter_half(curve))[0] > FAST * moved.low
        fires = not facts.pretrained and learned_share(facts, moved) < little and not young
    if not fires:
        return None
    return Symptom(
        numbers(
            first=moved.start,
            last=moved.end,
            last_epoch=epoch_number(moved.last_epoch),
            fall_percent=100 * learned_share(facts, moved),
            learned_beyond_counting_percent=None if closed is None else 100 * closed,
            copying_loss=facts.copying_loss,
            floor_loss=facts.floor_loss,
        )
    )


def _overfits(facts: RunFacts) -> bool:
    return any(check(facts) for check in (overfitting, widening_gap, accuracy_gap, low_val_accuracy))


def learning_rate_too_low(facts: RunFacts) -> Symptom | None:
    train, val = losses(facts)
    curve = train if train is not None else val
    if curve is None or not spans_enough(curve) or facts.pretrained or both_ends_are_random(facts):
        return None
    moved = movement(curve)
    share = moved.fall / moved.start if moved.start > 0 else 0.0
    chance = chance_of(facts)
    if share >= STANDSTILL or not is_falling(curve, moved) or not began_at_chance(facts, curve):
        return None
    # Above chance a fall is no learning yet, only the logits calming down.
    no_better_than_chance = chance is not None and moved.low >= (1 - VISIBLE) * chance
    severity: Severity | None = "error" if no_better_than_chance and past_grace(facts, moved) else None
    return Symptom(numbers(first=moved.start, last=moved.end, fall_percent=100 * share, lr=facts.lr), severity)


def slow_convergence(facts: RunFacts) -> Symptom | None:
    curve = main_loss(facts)
    if curve is None or not underfitting(facts):
        return None
    moved = movement(curve)
    if not is_falling(curve, moved):
        return None
    rate, _ = slope(curve)
    return Symptom(numbers(fall_per_epoch=-rate, last=moved.end, lr=facts.lr))


def loss_spikes(facts: RunFacts) -> Symptom | None:
    for name in ("train_loss", "train_loss_running", "val_loss"):
        curve = facts.get(name)
        if curve is None or not (found := curve.finite.epochs[spikes(curve.finite)]).size:
            continue
        return Symptom(numbers(figure=name, spikes=len(found), first_epoch=epoch_number(found[0]), lr=facts.lr))
    return None


def learning_rate_too_high(facts: RunFacts) -> Symptom | None:
    for check in (not_finite, diverged, loss_spikes):
        if symptom := check(facts):
            return Symptom({**symptom.evidence, **numbers(lr=facts.lr)})
    learned = main_loss(facts) is not None and not (_little_learned(facts) or stuck_at_chance(facts))
    if facts.lr is not None and facts.lr >= FAILING_RATE and not learned:
        return Symptom(numbers(lr=facts.lr))
    return None


def too_little_to_judge(facts: RunFacts) -> Symptom | None:
    train, val = losses(facts)
    curve = main_loss(facts)
    if curve is None or (spans_enough(curve) and val is not None):
        return None
    span = int(curve.epochs[-1] - curve.epochs[0]) + 1
    missing = "validation loss" if val is None else "training loss" if train is None else None
    return Symptom(numbers(epochs=span, needed=FEWEST_EPOCHS, missing=missing))


def noisy_validation(facts: RunFacts) -> Symptom | None:
    val = facts.get("val_loss")
    val = None if val is None else val.finite
    if val is None or len(val) < 3 or (facts.val_patients or 0) >= FEW_PATIENTS:
        return None
    moved = movement(val)
    steps = np.diff(val.values)
    jump = float(np.abs(steps).mean())
    turns = int((steps[1:] * steps[:-1] < 0).sum())
    moves = max(moved.start - moved.low, moved.rise)
    # Of a handful of values nobody can say what is jitter, unless all of it is tiny.
    noisy = moves < 3 * moved.noise if len(val) >= FEWEST_EPOCHS else moves < min(3 * jump, RISE_OF_LOSS * moved.start)
    if not noisy or turns < (len(steps) - 1) / 3 or jump < ROUNDING * moved.start:
        return None
    return Symptom(numbers(jump=jump, moved_by=moves, turns=turns, epochs=len(val), val_patients=facts.val_patients))


def no_early_stopping(facts: RunFacts) -> Symptom | None:
    if facts.early_stopping_patience == 0:
        return Symptom(numbers(early_stopping_patience=0, epochs=facts.epochs))
    _, val = losses(facts)
    if facts.early_stopping_patience is not None or val is None or not overfitting(facts):
        return None
    best = float(val.epochs[int(val.values.argmin())])
    wasted = float(val.epochs[-1]) - best
    if wasted <= 10:
        return None
    return Symptom(
        numbers(best_epoch=epoch_number(best), last_epoch=epoch_number(float(val.epochs[-1])), wasted_epochs=wasted)
    )


def patience_spent(facts: RunFacts) -> Symptom | None:
    _, val = losses(facts)
    if not facts.stopped_early or val is None:
        return None
    best = int(val.values.argmin())
    return Symptom(
        numbers(
            best_epoch=epoch_number(val.epochs[best]),
            best_val_loss=float(val.values[best]),
            stopped_after=epoch_number(val.epochs[-1]),
            early_stopping_patience=facts.early_stopping_patience,
        )
    )


def healthy(facts: RunFacts) -> Symptom | None:
    curve = main_loss(facts)
    wrong = (not_finite, diverged, stuck_at_chance, learning_rate_too_low, _little_learned)
    if curve is None or not spans_enough(curve) or _overfits(facts) or any(check(facts) for check in wrong):
        return None
    moved = movement(curve)
    closed = closed_share(facts, moved)
    accuracies = last_accuracies(facts)
    interval: tuple[float, float] | None = None
    if accuracies is not None and facts.val_scored:
        interval = accuracy_interval(accuracies[1], facts.val_scored)
    return Symptom(
        numbers(
            first=moved.start,
            lowest=moved.low,
            lowest_epoch=epoch_number(moved.low_epoch),
            last=moved.end,
            learned_beyond_counting_percent=None if closed is None else 100 * closed,
            val_accuracy_low=interval[0] if interval else None,
            val_accuracy_high=interval[1] if interval else None,
        )
    )
