"""Which rules look at the curves of a run?

Rules are data: a reader scans this table. What a predicate does exactly stands in `curve_symptoms`; its thresholds are
named there, and shown here.
"""

from __future__ import annotations

from behrt.doctor import curve_symptoms as curve
from behrt.doctor import readings
from behrt.doctor.remedies import (
    Advice,
    Remedy,
    from_random,
    larger_model,
    lower_to,
    raise_to,
    simulated,
    slow_down,
    smaller_model,
    times,
    with_lora,
)
from behrt.doctor.rule import Rule

HIGHEST_RATE = 3e-3
"""No remedy raises the learning rate beyond what docs/learning.md measured to work; at 0.01 nothing is learned."""


def stop_sooner(current: int | None) -> int | None:
    """The guide's 5; where there is no early stopping at all, its 10."""
    if current == 0:
        return 10
    return 5 if current is None or current > 5 else None


MORE_OF_THE_PATIENTS = Remedy(
    "max_patients", lambda current: None if current is None else 2 * current, "more data generalises better"
)
MORE_PATIENTS = Remedy(
    "num_patients",
    raise_to(10_000, then=20_000),
    "more data generalises better",
    lambda facts: simulated(facts) and facts.max_patients is None,
)
MORE_RECORDS = Advice(
    "train on more patients", lambda facts: not simulated(facts) or (facts.num_patients or 0) >= 20_000
)
REGULARISE = (
    Remedy("dropout", raise_to(0.3, then=0.4), "more regularisation"),
    Remedy("weight_decay", raise_to(0.05, then=0.1), "penalises large weights"),
    Remedy("early_stopping_patience", stop_sooner, "stops sooner"),
    Remedy("lora_rank", lower_to(8, then=4), "less capacity", with_lora),
    Remedy("model_size", smaller_model, "less capacity", from_random),
    MORE_OF_THE_PATIENTS,
    MORE_PATIENTS,
    MORE_RECORDS,
)
LEARN_MORE = (
    Remedy("lr", slow_down, "a rate that can learn", lambda facts: (facts.lr or 0) >= curve.FAILING_RATE),
    Remedy("model_size", larger_model, "more capacity", from_random),
    Remedy("lora_rank", raise_to(32), "more trainable parameters", with_lora),
    Remedy("dropout", lower_to(0.05, then=0.0), "less regularisation"),
    Remedy("epochs", raise_to(200, then=400), "longer training"),
    Remedy("early_stopping_patience", lambda current: None if current == 0 else raise_to(20)(current), "more patience"),
    Remedy("lr", times(5, unknown=5e-4, at_most=HIGHEST_RATE), "faster learning"),
    Remedy(
        "lr",
        times(0.1, unknown=5e-5),
        "finer steps",
        lambda facts: HIGHEST_RATE <= (facts.lr or 0) < curve.FAILING_RATE,
    ),
)
CALM_DOWN = (
    Remedy("lr", slow_down, "smaller steps"),
    Remedy("weight_decay", lower_to(0.001), "less pull on the weights"),
    Remedy("gradient_clip", lower_to(1.0, then=0.5), "bounds a step"),
)

CURVE_RULES: tuple[Rule, ...] = (
    Rule(
        id="not_finite",
        title="A loss is NaN or infinite",
        severity="error",
        when="a loss, or the gradient's norm, is not finite in some epoch",
        source="guide, Monitor Training Speed: Loss = NaN; Learning Rate Too High/Low",
        needs=("train_loss|val_loss",),
        check=curve.not_finite,
        remedies=CALM_DOWN,
        verdict="diverged",
    ),
    Rule(
        id="diverged",
        title="The training loss runs away",
        severity="error",
        when=f"over several epochs ({curve.RECOVERY_EPOCHS} in a run in progress) it lies more than "
        f"{curve.EXPLODED:.0%} above where it began, or above ln(vocabulary) without falling (not known: ln of "
        f"{curve.LARGEST_VOCABULARY:,}); or it has lost more than half of what it had learned; or it is thrown about "
        f"by {curve.ERRATIC:.0%} of its start and not at its lowest",
        source="guide, Learning Rate Too High/Low: exploding",
        needs=("train_loss|val_loss",),
        check=curve.diverged,
        remedies=CALM_DOWN,
        verdict="diverged",
    ),
    Rule(
        id="stuck_at_chance",
        title="The loss stands still where guessing or counting codes would be",
        severity="error",
        when=f"over {readings.FEWEST_EPOCHS} epochs or more, its lowest level lies above or within "
        f"{readings.STANDSTILL:.0%} of ln(vocabulary) ({3 * readings.STANDSTILL:.0%} if it does not move at all, or if "
        f"embeddings and head stay random; {readings.VISIBLE:.1%} if it falls steadily); or within "
        f"{readings.VISIBLE:.1%} of what counting codes reaches, not falling; or, neither known, within "
        f"{readings.STANDSTILL:.0%} of where it began; a warning until {readings.GRACE_EPOCHS} epochs and "
        f"{readings.GRACE_SHARE:.0%} of the planned ones are over",
        source="guide, Embeddings and MLM Head Were Frozen: loss ≈ ln(1000); counting line: docs/learning.md",
        needs=("train_loss|val_loss",),
        check=curve.stuck_at_chance,
        remedies=(
            Remedy("train_embeddings", lambda current: None if current else True, "codes must be readable"),
            Remedy("train_head", lambda current: None if current else True, "codes must be predictable"),
            Remedy("lr", times(10, unknown=1e-3, at_most=HIGHEST_RATE), "larger steps"),
            Advice("look for frozen or silent parameters: the pre-flight of `behrt train` names them"),
            Advice("measure whether the records hold anything to learn (rule nothing_to_learn)"),
        ),
        verdict="stuck_at_chance",
    ),
    Rule(
        id="overfitting",
        title="Validation loss rises while training loss falls",
        severity="warning",
        when=f"validation loss ends above its lowest level by {curve.RISE_OF_LOSS:.1%} of it and three times its "
        f"jitter, and by {curve.RISE_OF_FALL:.0%} of what it had fallen ({curve.RISE_OF_FALL / 2:.0%} if it rises "
        f"steadily for {readings.FEWEST_EPOCHS} epochs), while training loss has lost {curve.MEMORISED / 2:.0%} and "
        "falls on",
        source="guide, Check Loss Curves: Overfitting",
        needs=("val_loss",),
        check=curve.overfitting,
        remedies=REGULARISE,
        verdict="overfitting",
    ),
    Rule(
        id="widening_gap",
        title="Training loss falls away from validation loss",
        severity="warning",
        when=f"training loss has lost {curve.MEMORISED:.0%}, validation loss no longer falls, and the gap between them "
        f"exceeds all that validation loss has fallen and {curve.MEMORISED:.0%} of it, half of that widened since "
        "the middle of the run",
        source="guide, Check Loss Curves: growing gap between train and val",
        needs=("train_loss", "val_loss"),
        check=curve.widening_gap,
        remedies=REGULARISE,
        verdict="overfitting",
    ),
    Rule(
        id="accuracy_gap",
        title="Training accuracy is far above validation accuracy",
        severity="warning",
        when=f"by more than {100 * curve.ACCURACY_GAP:.0f} percentage points, against the upper end of the 95% "
        "interval of validation accuracy where its scored tokens are counted",
        source="guide, Check Accuracy Trends: gap > 20%",
        needs=("train_accuracy", "val_accuracy"),
        check=curve.accuracy_gap,
        remedies=REGULARISE,
        verdict="overfitting",
    ),
    Rule(
        id="low_val_accuracy",
        title="Validation accuracy is a small part of training accuracy",
        severity="warning",
        when=f"below {curve.ACCURACY_SHARE:.0%} of it, even at the upper end of its 95% interval where its scored "
        "tokens are counted, once training accuracy is five times what guessing reaches",
        source="guide, Performance Expectations: val accuracy < 20% of train accuracy",
        needs=("train_accuracy", "val_accuracy"),
        check=curve.low_val_accuracy,
        remedies=REGULARISE,
        verdict="overfitting",
    ),
    Rule(
        id="underfitting",
        title="Little was learned, in training and validation alike",
        severity="warning",
        when=f"validation loss has closed less than {curve.SLOW_CLOSING:.0%} of the gap between counting codes "
        "and the best known loss (the floor, or what co-occurring codes tell); that not known, it is no better "
        f"than counting; that not known either, and weights random, it has lost less than "
        f"{curve.LITTLE_OF_CHANCE:.0%} of ln(vocabulary) or {curve.LITTLE_OF_FIRST:.0%} of its first value and falls "
        f"by less than {curve.FAST:.0%} an epoch; in a run in progress only after its grace",
        source="guide, Check Loss Curves: Underfitting",
        needs=("train_loss|val_loss",),
        check=curve.underfitting,
        remedies=LEARN_MORE,
        verdict="underfitting",
    ),
    Rule(
        id="healthy",
        title="Training and validation loss fall together",
        severity="info",
        when=f"over {readings.FEWEST_EPOCHS} epochs or more, and no rule finds overfitting, underfitting, a "
        "standstill or divergence",
        source="guide, Check Loss Curves: Healthy Training",
        needs=("val_loss",),
        check=curve.healthy,
        verdict="healthy",
    ),
    Rule(
        id="learning_rate_too_high",
        title="The learning rate is too high",
        severity="warning",
        when=f"a loss diverges, is not finite or spikes; or the rate is {curve.FAILING_RATE:g} or more and nothing was "
        "learned with it, or not yet tried",
        source="guide, Learning Rate Too High/Low; docs/learning.md for 0.01",
        needs=("train_loss|val_loss|lr",),
        check=curve.learning_rate_too_high,
        remedies=CALM_DOWN,
    ),
    Rule(
        id="learning_rate_too_low",
        title="The learning rate is too low",
        severity="warning",
        when=f"the training loss falls steadily, but by less than {readings.STANDSTILL:.1%} in "
        f"{readings.FEWEST_EPOCHS} epochs or more; an error once it had {readings.GRACE_EPOCHS} epochs and "
        f"{readings.GRACE_SHARE:.0%} of the planned ones and is still no better than chance",
        source="guide, Learning Rate Too High/Low: loss barely decreasing",
        needs=("train_loss",),
        check=curve.learning_rate_too_low,
        remedies=(
            Remedy("lr", times(10, unknown=1e-3, at_most=HIGHEST_RATE), "larger steps"),
            Remedy("train_embeddings", lambda current: True if current is False else None, "codes must be readable"),
            Remedy("train_head", lambda current: True if current is False else None, "codes must be predictable"),
        ),
        verdict="stuck_at_chance",
    ),
    Rule(
        id="slow_convergence",
        title="The loss falls, but slowly",
        severity="warning",
        when="the run underfits and its validation loss is still falling",
        source="guide, Hyperparameter Interaction Matrix: Slow convergence",
        needs=("train_loss|val_loss",),
        check=curve.slow_convergence,
        remedies=(
            Remedy("lr", times(5, unknown=5e-4, at_most=HIGHEST_RATE), "faster learning"),
            Remedy("epochs", raise_to(200, then=400), "longer training"),
        ),
    ),
    Rule(
        id="loss_spikes",
        title="The loss jumps up and comes back",
        severity="warning",
        when=f"in single epochs, by more than {readings.SPIKE:.0%} of itself and twice the difference between "
        "the epochs before and after",
        source="guide, If Training is Unstable (Loss spikes, NaN)",
        needs=("train_loss|val_loss",),
        check=curve.loss_spikes,
        remedies=CALM_DOWN,
    ),
    Rule(
        id="too_little_to_judge",
        title="Too little is recorded for a verdict",
        severity="info",
        when=f"the losses span fewer than {readings.FEWEST_EPOCHS} epochs, or there is no validation loss",
        source="guide, Check Loss Curves: both losses, over 15 epochs",
        needs=("train_loss|val_loss",),
        check=curve.too_little_to_judge,
        remedies=(Advice("record training and validation loss over more epochs"),),
    ),
    Rule(
        id="noisy_validation",
        title="Validation loss jumps about more than it moves",
        severity="warning",
        when=f"fewer than {readings.FEW_PATIENTS} validation patients (or not known how many), a turn at every "
        "third epoch or more, and neither fall nor rise beyond three times the jitter",
        source="guide, Validation Set Too Small",
        needs=("val_loss",),
        check=curve.noisy_validation,
        remedies=(
            Remedy("num_patients", raise_to(5000, then=10_000), "a larger validation set", simulated),
            Advice(
                "prepare more patients, or, of a source without splits, a larger tuning share: --split 70/20/10",
                lambda facts: not simulated(facts),
            ),
        ),
    ),
    Rule(
        id="no_early_stopping",
        title="Nothing stops a run that has become worse",
        severity="warning",
        when="patience is 0; where the patience is not known, the run overfits and went on for more than 10 epochs",
        source="guide, Insufficient Regularization: no early stopping",
        needs=(),
        check=curve.no_early_stopping,
        remedies=(Remedy("early_stopping_patience", lambda current: 10 if not current else None, "stops in time"),),
    ),
    Rule(
        id="patience_spent",
        title="Early stopping ended the run",
        severity="info",
        when="validation loss had no new best for the epochs of --early-stopping-patience",
        source="guide, How to Diagnose: monitor patience counter",
        needs=("stopped_early", "val_loss"),
        check=curve.patience_spent,
    ),
)
