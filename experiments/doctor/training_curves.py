"""What do training curves look like whose fault is known, because it was put in?

A run is gradient descent on a linear teacher-student problem, the smallest model of training that learns, stalls,
memorises and explodes for the same reasons as a network (Advani and Saxe 2017, "High-dimensional dynamics of
generalization error in neural networks", section 2). Patients are drawn, a student of `FEATURES` weights is trained on
them step by step in the eigenbasis of its own data, and each epoch is read out as a masked-code model would be:

- a loss in nats, `chance * error` with `chance = ln(vocabulary)`: predicting nothing has the error 1 and costs a
  uniform guess, the noise of the labels is the floor. Above chance the loss grows with the size of the weights and not
  with its square, as a cross-entropy does with its logits;
- an accuracy that follows the correlation of prediction and target, so that overconfidence costs loss but not accuracy;
- noise where training has it: gradient noise of mini-batches, which acts through the weights and is larger and longer
  lived the larger the rate; masks redrawn by some tools; few validation tokens; running means with dropout.

A kind is a cause (`CAUSES`). Causes are drawn again until the curve without noise shows its kind beyond dispute
(`shows`): in shares of chance, of what is attainable and of the run's own noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Kind = Literal["healthy", "overfitting", "underfitting", "diverging", "flat"]
KINDS: tuple[Kind, ...] = get_args(Kind)
History = dict[str, list[dict[str, float]]]
Array = NDArray[np.float64]

FEATURES = 64
MIN_EPOCHS, MAX_EPOCHS = 5, 100
MAX_STEPS = 1000
MAX_DRAWS = 500


@dataclass(frozen=True, kw_only=True)
class Task:
    """The data, in units in which the error of predicting nothing is 1.

    Attributes:
        learnable: share of the error that the best possible model removes; 0 is random codes.
        reach: share of `learnable` that the student's capacity covers.
        patients: training samples.
        spectrum: exponent of the features' variances, `j ** -spectrum`; 0 makes every direction equally fast.
        signal: exponent of the teacher's share per feature, `j ** -signal`.
    """

    vocab_size: int
    learnable: float
    reach: float
    patients: int
    spectrum: float
    signal: float


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The optimizer.

    Attributes:
        rate: peak learning rate times the largest eigenvalue of the data; plain gradient descent explodes above 2.
        lr: the same rate as a person would have typed it.
        init: error that the random initial weights add.
        jitter: error that gradient noise adds in the long run, per unit of `rate`.
        gain_start, gain_time: curvature relative to its final value, growing from `gain_start` along a logistic curve
            whose middle lies at `gain_time` of the run: lower layers that must be learned first, sharpening.
        bias_first: the steepest direction does not wait for the gain, as the code frequencies do not.
        clip: limit of the gradient's norm, in initial gradient norms.
        overflow: loss in chances beyond which numbers are NaN; infinite under clipping.
    """

    epochs: int
    steps_per_epoch: int
    rate: float
    lr: float
    warmup: float
    decay: Literal["none", "linear", "cosine"]
    init: float
    jitter: float
    gain_start: float = 1.0
    gain_time: float = 0.0
    bias_first: bool = False
    clip: float = math.inf
    overflow: float = math.inf
    spikes: int = 0


@dataclass(frozen=True, kw_only=True)
class Readout:
    """How the run is written down.

    Attributes:
        val_tokens: scored tokens in validation.
        redrawn_masks: masks of validation and training change between epochs.
        running_train: `train_loss` is the mean over the epoch's steps, dropout on; else evaluation mode.
        dropout_cost: share of what was learned that dropout hides.
        accuracy_power, accuracy_top: accuracy is `top * explained ** power`.
        patience: of early stopping; 0 is none.
    """

    val_tokens: int
    redrawn_masks: bool
    running_train: bool
    dropout_cost: float
    accuracy_power: float
    accuracy_top: float
    patience: int = 0
    first_epoch_missing: bool = False


@dataclass(frozen=True, kw_only=True)
class Draw:
    cause: str
    task: Task
    recipe: Recipe
    readout: Readout


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The recorded epochs without noise, in evaluation mode; losses in nats, arrays `[epochs]`.

    A run that explodes amplifies its gradient noise: there, and only there, the gradient noise is part of the truth.

    Attributes:
        chance, floor: ln(vocabulary), and the loss of the best possible model.
        noise_sd: robust standard deviation of recorded minus true validation loss.
    """

    epochs: NDArray[np.int64]
    train_loss: Array
    val_loss: Array
    train_accuracy: Array
    val_accuracy: Array
    chance: float
    floor: float
    noise_sd: float


@dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """A record as a tool would have left it, and what is true of it.

    `history` holds NaN where a number was not finite. `cause` is a key of `CAUSES[kind]`.
    """

    kind: Kind
    seed: int
    cause: str
    history: History
    vocab_size: int
    lr: float
    truth: Truth


def simulate_run(kind: Kind, seed: int) -> SimulatedRun:
    """A run of this kind, the same for the same arguments."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    cause = str(rng.choice(list(CAUSES[kind])))
    for _ in range(MAX_DRAWS):
        draw = draw_run(kind, cause, rng)
        history, truth = record(draw, rng)
        if len(truth.epochs) >= MIN_EPOCHS and shows(kind, truth) and noise_hides_nothing(kind, history, truth):
            return SimulatedRun(
                kind=kind,
                seed=seed,
                cause=draw.cause,
                history=history,
                vocab_size=draw.task.vocab_size,
                lr=draw.recipe.lr,
                truth=truth,
            )
    raise AssertionError(f"no {kind} run in {MAX_DRAWS} draws: {cause} does not cause it")


# Causes


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def draw_run(kind: Kind, cause: str, rng: np.random.Generator) -> Draw:
    """What is common to all runs, changed by the cause."""
    epochs = round(log_uniform(rng, MIN_EPOCHS, MAX_EPOCHS))
    steps = round(log_uniform(rng, 3, min(40, MAX_STEPS / epochs)))
    rate = log_uniform(rng, 0.05, 1.0)
    task = Task(
        vocab_size=round(log_uniform(rng, 200, 30_000)),
        learnable=log_uniform(rng, 0.14, 0.75),
        reach=1.0,
        patients=round(FEATURES * log_uniform(rng, 2, 1000)),
        spectrum=rng.uniform(0.0, 1.5),
        signal=rng.uniform(0.2, 1.5),
    )
    recipe = Recipe(
        epochs=epochs,
        steps_per_epoch=steps,
        rate=rate,
        lr=rate * 10 ** rng.normal(-3.0, 0.3),
        warmup=rng.choice([0.0, rng.uniform(0.01, 0.1)]),
        decay=rng.choice(["none", "linear", "cosine"]),
        init=rng.choice([rng.uniform(0.0, 0.003), rng.uniform(0.0, 0.025)]),
        jitter=log_uniform(rng, 1e-3, 5e-2),
    )
    if rng.random() < 0.35:
        gain_start, gain_time, bias_first = rng.uniform(0.0, 0.3), rng.uniform(0.05, 0.5), bool(rng.random() < 0.5)
        recipe = replace(recipe, gain_start=gain_start, gain_time=gain_time, bias_first=bias_first)
    readout = Readout(
        val_tokens=round(log_uniform(rng, 3_000, 300_000)),
        redrawn_masks=bool(rng.random() < 0.35),
        running_train=bool(rng.random() < 0.5),
        dropout_cost=rng.uniform(0.0, 0.1),
        accuracy_power=rng.uniform(0.9, 2.1),
        accuracy_top=rng.uniform(0.6, 1.0),
        first_epoch_missing=bool(rng.random() < 0.1),
    )
    return CAUSES[kind][cause](Draw(cause=cause, task=task, recipe=recipe, readout=readout), rng)


def with_rate(recipe: Recipe, rate: float) -> Recipe:
    return replace(recipe, rate=rate, lr=recipe.lr * rate / recipe.rate)


def enough_patients(draw: Draw, rng: np.random.Generator) -> Draw:
    recipe = replace(draw.recipe, spikes=int(rng.choice([0, 1, 2], p=[0.85, 0.1, 0.05])))
    patience = int(rng.integers(3, 16)) if rng.random() < 0.3 else 0
    return replace(draw, recipe=recipe, readout=replace(draw.readout, patience=patience))


def few_patients(draw: Draw, rng: np.random.Generator) -> Draw:
    patients = round(FEATURES * log_uniform(rng, 0.5, 4))
    task = replace(draw.task, patients=patients, learnable=rng.uniform(0.1, 0.6))
    return may_stop_early(replace(draw, task=task), rng)


def trained_too_long(draw: Draw, rng: np.random.Generator) -> Draw:
    """Codes that matter are learned first, and chance regularities of the patients after them."""
    spectrum, signal = rng.uniform(0.5, 1.2), rng.uniform(1.0, 2.5)
    task = replace(draw.task, patients=round(FEATURES * log_uniform(rng, 1, 10)), spectrum=spectrum, signal=signal)
    recipe = with_rate(draw.recipe, log_uniform(rng, 0.3, 1.5))
    return may_stop_early(replace(draw, task=task, recipe=recipe), rng)


def random_codes_memorised(draw: Draw, rng: np.random.Generator) -> Draw:
    task = replace(draw.task, patients=round(FEATURES * log_uniform(rng, 0.5, 12)), learnable=0.0)
    recipe = with_rate(draw.recipe, log_uniform(rng, 0.01, 1.0))
    return may_stop_early(replace(draw, task=task, recipe=recipe), rng)


def may_stop_early(draw: Draw, rng: np.random.Generator) -> Draw:
    patience = int(rng.integers(5, 21)) if rng.random() < 0.3 else 0
    return replace(draw, readout=replace(draw.readout, patience=patience))


def rate_too_low(draw: Draw, rng: np.random.Generator) -> Draw:
    steps = draw.recipe.epochs * draw.recipe.steps_per_epoch
    rate = log_uniform(rng, 0.02, 0.6) / steps
    return replace(draw, recipe=replace(draw.recipe, rate=rate, lr=log_uniform(rng, 3e-7, 5e-5)))


def capacity_too_small(draw: Draw, rng: np.random.Generator) -> Draw:
    task = draw.task
    patients = round(FEATURES * log_uniform(rng, 30, 2000))
    return replace(draw, task=replace(task, reach=rng.uniform(0.012, 0.08) / task.learnable, patients=patients))


def rate_too_high(draw: Draw, rng: np.random.Generator) -> Draw:
    """Unstable from the first step, or from where a short warm-up reaches."""
    recipe = with_rate(draw.recipe, 2 + log_uniform(rng, 0.02, 3.0))
    return replace(draw, recipe=breaks(replace(recipe, gain_start=1.0, decay="none"), rng))


def rate_too_high_after_warmup(draw: Draw, rng: np.random.Generator) -> Draw:
    recipe = replace(
        with_rate(draw.recipe, 2 + log_uniform(rng, 0.1, 3.0)), warmup=rng.uniform(0.2, 0.9), gain_start=1.0
    )
    return replace(draw, recipe=breaks(recipe, rng))


def sharpening(draw: Draw, rng: np.random.Generator) -> Draw:
    """Stable at first; the curvature outgrows the rate."""
    recipe = with_rate(draw.recipe, 2 + log_uniform(rng, 0.1, 2.0))
    recipe = replace(recipe, gain_start=rng.uniform(0.05, 0.5), gain_time=rng.uniform(0.1, 0.6), decay="none")
    return replace(draw, recipe=breaks(recipe, rng))


def breaks(recipe: Recipe, rng: np.random.Generator) -> Recipe:
    if rng.random() < 0.7:
        return replace(recipe, clip=log_uniform(rng, 0.2, 10))
    return replace(recipe, overflow=log_uniform(rng, 2, 1e5))


def no_gradient(draw: Draw, rng: np.random.Generator) -> Draw:
    return replace(draw, recipe=replace(draw.recipe, rate=0.0))


def vanishing_rate(draw: Draw, rng: np.random.Generator) -> Draw:
    steps = draw.recipe.epochs * draw.recipe.steps_per_epoch
    rate = log_uniform(rng, 1e-5, 3e-3) / steps
    return replace(draw, recipe=replace(draw.recipe, rate=rate, lr=log_uniform(rng, 1e-9, 3e-7)))


def random_codes(draw: Draw, rng: np.random.Generator) -> Draw:
    """Nothing to learn, and too many patients to memorise."""
    return replace(draw, task=replace(draw.task, learnable=0.0, patients=round(FEATURES * log_uniform(rng, 50, 5000))))


CAUSES: dict[Kind, dict[str, Callable[[Draw, np.random.Generator], Draw]]] = {
    "healthy": {"enough patients": enough_patients},
    "overfitting": {
        "few patients": few_patients,
        "trained too long": trained_too_long,
        "random codes memorised": random_codes_memorised,
    },
    "underfitting": {"rate too low": rate_too_low, "capacity too small": capacity_too_small},
    "diverging": {
        "rate too high": rate_too_high,
        "rate too high after warm-up": rate_too_high_after_warmup,
        "sharpening": sharpening,
    },
    "flat": {"no gradient": no_gradient, "vanishing rate": vanishing_rate, "random codes": random_codes},
}


# Training


@dataclass(frozen=True)
class Problem:
    """Least squares on drawn patients, in the eigenbasis of their covariance.

    Attributes:
        basis, rates: eigenvectors `[features, features]` and eigenvalues `[features]`, the largest rate 1.
        solution: where gradient descent ends, in the basis; `[features]`.
        residual, target: mean squared error there, and mean square of the training targets.
        variances, teacher: of the population, per feature; `[features]`.
    """

    basis: Array
    rates: Array
    solution: Array
    residual: float
    target: float
    variances: Array
    teacher: Array


def draw_problem(task: Task, rng: np.random.Generator) -> Problem:
    """Patients, teacher and label noise; what capacity does not reach counts as noise."""
    order = np.arange(1, FEATURES + 1)
    variances = order**-task.spectrum
    shares = order**-task.signal * rng.standard_normal(FEATURES) ** 2
    signal = task.learnable * task.reach
    teacher = np.sqrt(signal * shares / shares.sum() / variances) * rng.choice([-1, 1], FEATURES)
    inputs, beyond = draw_inputs(task.patients, rng)
    inputs *= np.sqrt(variances)
    targets = inputs @ teacher + np.sqrt(1 - signal) * rng.standard_normal(len(inputs))
    target = float(targets @ targets + (1 - signal) * beyond) / task.patients
    rates, basis = np.linalg.eigh(inputs.T @ inputs / task.patients)
    top = rates[-1]
    # In units of the top eigenvalue: inputs shrink by its root, weights grow by it.
    rates = np.where(rates > 1e-9 * top, rates / top, 0.0)
    slope = basis.T @ (inputs.T @ targets) / task.patients / math.sqrt(top)
    solution = np.divide(slope, rates, out=np.zeros(FEATURES), where=rates > 0)
    return Problem(
        basis=basis,
        rates=rates,
        solution=solution,
        residual=max(target - float(rates @ solution**2), 0.0),
        target=target,
        variances=variances / top,
        teacher=teacher * math.sqrt(top),
    )


def draw_inputs(patients: int, rng: np.random.Generator) -> tuple[Array, float]:
    """Standard normal inputs, and the sum of squares of standard normal label noise that no input explains.

    With more patients than features, the triangular factor R of X = QR stands for X, with the distribution that R has
    (Bartlett 1933): a rotation of the patients changes no error, and what is left of the labels is chi-squared.
    """
    if patients <= FEATURES:
        return rng.standard_normal((patients, FEATURES)), 0.0
    factor = np.triu(rng.standard_normal((FEATURES, FEATURES)), 1)
    np.fill_diagonal(factor, np.sqrt(rng.chisquare(patients - np.arange(FEATURES))))
    return factor, float(rng.chisquare(patients - FEATURES))


def schedule(recipe: Recipe) -> Array:
    """Learning rate of each step relative to its peak; `[steps]`."""
    steps = recipe.epochs * recipe.steps_per_epoch
    warmup = recipe.warmup * steps
    position = np.arange(1, steps + 1)
    rising: Array = np.minimum(position / max(warmup, 1), 1.0)
    done: Array = np.clip((position - warmup) / max(steps - warmup, 1), 0, 1)
    if recipe.decay == "cosine":
        rising *= 0.5 * (1 + np.cos(np.pi * done))
    elif recipe.decay == "linear":
        rising *= 1 - 0.98 * done
    return rising


def gain(recipe: Recipe) -> Array:
    """Curvature of each step relative to its final value; `[steps, features]`."""
    steps = recipe.epochs * recipe.steps_per_epoch
    gains = np.ones((steps, FEATURES))
    if recipe.gain_start < 1.0:
        position = np.arange(1, steps + 1) / steps
        rising = 1 / (1 + np.exp(-4 * (position / recipe.gain_time - 1)))
        gains *= (recipe.gain_start + (1 - recipe.gain_start) * rising)[:, None]
        gains[:, -1] = np.where(recipe.bias_first, 1.0, gains[:, -1])
    return gains


def draw_start(problem: Problem, init: float, rng: np.random.Generator) -> Array:
    """Random weights in the basis, `[features]`, that know nothing of the targets: they cost `init`, no less."""
    weights = rng.standard_normal(FEATURES) / np.sqrt(problem.variances)
    known = np.stack([problem.variances * problem.teacher, problem.basis @ (problem.rates * problem.solution)], axis=1)
    directions = np.linalg.svd(known, full_matrices=False)[0]
    weights -= directions @ (directions.T @ weights)
    weights *= math.sqrt(init / float(problem.variances @ weights**2))
    return problem.basis.T @ weights


def descend(problem: Problem, recipe: Recipe, rng: np.random.Generator) -> Array:
    """Weights after each step in the basis, without and with gradient noise; `[steps, 2, features]`, NaN once lost."""
    steps = recipe.epochs * recipe.steps_per_epoch
    sizes = recipe.rate * schedule(recipe)[:, None] * gain(recipe)
    # The gradient noise of a sample has the covariance of the inputs; its scale makes `jitter` what it says.
    noise = np.zeros((steps, 2, FEATURES))
    scale = np.sqrt(2 * recipe.jitter * problem.rates / problem.rates.sum())
    noise[:, 1] = sizes * scale * rng.standard_normal((steps, FEATURES))
    start = draw_start(problem, recipe.init, rng)
    kicks = draw_kicks(problem, recipe, rng)
    distance = np.tile(start - problem.solution, (2, 1))
    limit = recipe.clip * float(np.linalg.norm(problem.rates * distance[0]))
    weights = np.full((steps, 2, FEATURES), np.nan)
    for step, size in enumerate(sizes):
        gradient = problem.rates * distance
        if recipe.clip < math.inf:
            gradient *= np.minimum(1, limit / (np.linalg.norm(gradient, axis=1, keepdims=True) + 1e-12))
        distance = distance - size * gradient - noise[step]
        if step in kicks:
            distance[1] += kicks[step]
        if np.abs(distance).max() > 1e8:
            break
        weights[step] = distance + problem.solution
    return weights


def draw_kicks(problem: Problem, recipe: Recipe, rng: np.random.Generator) -> dict[int, Array]:
    """Bad batches: a push of the weights along quickly learned directions."""
    kicks = {}
    for _ in range(recipe.spikes):
        direction = np.where(problem.rates > 0.1, rng.standard_normal(FEATURES), 0.0)
        size = log_uniform(rng, 0.02, 0.25) / float(problem.rates @ direction**2)
        step = int(rng.uniform(0.15, 0.75) * recipe.epochs * recipe.steps_per_epoch)
        kicks[step] = direction * math.sqrt(size)
    return kicks


# Reading out


@dataclass(frozen=True)
class Reading:
    """Error, explained share and spread of the predictions on training and validation patients; arrays as the weights'
    leading axes."""

    train_error: Array
    train_explained: Array
    val_error: Array
    val_explained: Array
    spread: Array


def read(problem: Problem, weights: Array) -> Reading:
    """Exact errors of weights `[..., features]` on the drawn patients, relative to predicting nothing, and on the
    population."""
    rates, solution = problem.rates, problem.solution
    train_error = ((weights - solution) ** 2 @ rates + problem.residual) / problem.target
    train_explained = explained((weights * solution) @ rates, weights**2 @ rates) / problem.target
    population = weights @ problem.basis.T
    noise = 1 - float(problem.variances @ problem.teacher**2)
    val_error = (population - problem.teacher) ** 2 @ problem.variances + noise
    spread = population**2 @ problem.variances
    val_explained = explained((population * problem.teacher) @ problem.variances, spread)
    return Reading(train_error, train_explained, val_error, val_explained, np.sqrt(spread))


def explained(covariance: Array, variance: Array) -> Array:
    """Share of the target that the prediction ranks rightly; predictions smaller than a twentieth rank nothing yet."""
    return np.maximum(covariance, 0) ** 2 / (variance + 0.05)


def nats(error: Array, chance: float) -> Array:
    """Loss of an error: linear up to chance, with the root of the error beyond, where logits explode."""
    return chance * np.where(error <= 1, error, 2 * np.sqrt(np.maximum(error, 1)) - 1)


def accuracy(share: Array, draw: Draw) -> Array:
    guess = 1 / draw.task.vocab_size
    right = draw.readout.accuracy_top * np.clip(share, 0, 1) ** draw.readout.accuracy_power
    return np.nan_to_num(guess + (1 - guess) * right, nan=0.0)


def record(draw: Draw, rng: np.random.Generator) -> tuple[History, Truth]:
    """Train, read out, and write down the epochs that a tool would have kept."""
    recipe, readout, chance = draw.recipe, draw.readout, math.log(draw.task.vocab_size)
    problem = draw_problem(draw.task, rng)
    reading = read(problem, descend(problem, recipe, rng))
    lost = np.maximum.accumulate(~(nats(reading.val_error, chance) <= recipe.overflow * chance), axis=0)
    train_steps = np.where(lost, np.nan, nats(reading.train_error, chance))
    val_steps = np.where(lost, np.nan, nats(reading.val_error, chance))

    ends = np.arange(1, recipe.epochs + 1) * recipe.steps_per_epoch - 1
    true = 1 if lost.any() or recipe.clip < math.inf else 0
    spread = 0.2 + 2.5 * np.nan_to_num(np.minimum(reading.spread[ends, 1], 3), nan=3)
    train_accuracy = accuracy(np.where(lost, np.nan, reading.train_explained)[ends], draw)
    val_accuracy = accuracy(np.where(lost, np.nan, reading.val_explained)[ends], draw)

    sampling = spread / math.sqrt(readout.val_tokens)
    easier = 0.5 * rng.standard_normal() * (sampling - sampling.min())
    val_loss = val_steps[ends, 1] + easier + readout.redrawn_masks * 0.5 * sampling * rng.standard_normal(recipe.epochs)
    train_loss = train_steps[ends, 1]
    if readout.running_train:
        running = train_steps[:, 1].reshape(recipe.epochs, -1).mean(axis=1)
        train_loss = running + readout.dropout_cost * np.maximum(chance - running, 0)
        train_loss = train_loss + 0.3 * sampling * rng.standard_normal(recipe.epochs)

    kept = kept_epochs(val_loss, readout, rng)
    columns = {
        "train_loss": train_loss,
        "val_loss": val_loss,
        "train_accuracy": counted(train_accuracy[:, 1], readout, rng),
        "val_accuracy": counted(val_accuracy[:, 1], readout, rng),
        "learning_rate": recipe.lr * schedule(recipe)[ends],
    }
    history = {
        name: [{"epoch": int(index) + 1, "value": float(values[index])} for index in kept]
        for name, values in columns.items()
    }
    truth = Truth(
        epochs=kept + 1,
        train_loss=train_steps[ends, true][kept],
        val_loss=val_steps[ends, true][kept],
        train_accuracy=train_accuracy[:, true][kept],
        val_accuracy=val_accuracy[:, true][kept],
        chance=chance,
        floor=chance * (1 - draw.task.learnable),
        noise_sd=robust_sd((val_loss - val_steps[ends, true])[kept]),
    )
    return history, truth


def counted(share: Array, readout: Readout, rng: np.random.Generator) -> Array:
    """Accuracy over the scored tokens; with fixed masks only those near a tie change sides."""
    sd = np.sqrt(share * (1 - share) / readout.val_tokens) * (1.0 if readout.redrawn_masks else 0.4)
    noisy = share + sd * rng.standard_normal(len(share))
    return np.round(np.clip(noisy, 0, 1) * readout.val_tokens) / readout.val_tokens


def kept_epochs(val_loss: Array, readout: Readout, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of the epochs on record: early stopping, a lost run that somebody ends, a first epoch not written."""
    end = len(val_loss)
    if readout.patience:
        best = np.minimum.accumulate(val_loss)
        since = np.arange(end) - np.array([int(np.argmin(val_loss[: last + 1])) for last in range(end)])
        spent = np.flatnonzero((since >= readout.patience) & np.isfinite(best))
        end = int(spent[0]) + 1 if len(spent) else end
    nan = np.flatnonzero(np.isnan(val_loss))
    if len(nan) and rng.random() < 0.6:
        end = min(end, int(nan[0]) + int(rng.integers(1, 5)))
    first = int(readout.first_epoch_missing)
    return np.arange(first, max(end, min(MIN_EPOCHS + first, len(val_loss))))


def robust_sd(residuals: Array) -> float:
    finite = residuals[np.isfinite(residuals)]
    return float(1.4826 * np.median(np.abs(finite - np.median(finite)))) if len(finite) else math.nan


# What a kind means


def shows(kind: Kind, truth: Truth) -> bool:
    """Whether the curves without noise are this kind beyond dispute."""
    return SHOWS[kind](truth)


def is_healthy(truth: Truth) -> bool:
    """Most of what is attainable is learned, part of it on record, and validation ends at its lowest.

    The accuracies stay within the guide's expectations of each other: its table goes down to half and up to 15 points.
    """
    train, val, chance = truth.train_loss, truth.val_loss, truth.chance
    if not (np.isfinite(val).all() and np.isfinite(train).all()):
        return False
    learned = chance - val[-1]
    return bool(
        learned >= 0.6 * (chance - truth.floor)
        and learned >= 0.12 * chance
        and val[0] - val[-1] >= max(6 * truth.noise_sd, 0.04 * chance)
        and val[-1] - val.min() <= min(max(truth.noise_sd, 0.001 * chance), 0.005 * chance)
        and val.max() <= 1.05 * chance
        and truth.val_accuracy[-1] >= 0.45 * truth.train_accuracy[-1]
        and truth.train_accuracy[-1] - truth.val_accuracy[-1] <= 0.15
    )


def is_overfitting(truth: Truth) -> bool:
    """Validation turned and rose, or never fell, while training went on falling."""
    train, val, chance, sd = truth.train_loss, truth.val_loss, truth.chance, truth.noise_sd
    if not (np.isfinite(val).all() and np.isfinite(train).all()):
        return False
    lowest = int(np.argmin(val))
    rose = (
        val[-1] - val[lowest] >= max(8 * sd, 0.015 * chance, 0.08 * (val[0] - val[lowest]))
        and len(val) - 1 - lowest >= 3
    )
    never_fell = val[0] - val[lowest] <= max(sd, 0.002 * chance) and val[lowest] >= 0.99 * chance
    falls = train[lowest] - train[-1] >= max(8 * sd, 0.03 * chance)
    memorised = never_fell and train[-1] <= 0.95 * chance
    return bool(
        falls
        and (np.diff(train) < 0.001 * chance).all()
        and (rose or memorised)
        and val[0] <= 1.15 * chance
        and val.max() <= 1.6 * chance
    )


def is_underfitting(truth: Truth) -> bool:
    """A small part of what is attainable is learned, visibly, by training and validation together, and slowly.

    A history cannot show what is attainable; so the part is small in shares of chance, too.
    """
    train, val, chance, sd = truth.train_loss, truth.val_loss, truth.chance, truth.noise_sd
    if not (np.isfinite(val).all() and np.isfinite(train).all()):
        return False
    learned = chance - val[-1]
    tail = val[-max(len(val) // 3, 2) :]
    return bool(
        learned <= 0.3 * (chance - truth.floor)
        and max(4 * sd, 0.01 * chance) <= learned <= 0.07 * chance
        and val[0] - val[-1] >= max(4 * sd, 0.008 * chance)
        and val[-1] - val.min() <= 0.001 * chance
        and abs(train[-1] - val[-1]) <= max(0.25 * learned, 0.003 * chance)
        and (tail[0] - tail[-1]) / (len(tail) - 1) <= 0.006 * chance
    )


def is_diverging(truth: Truth) -> bool:
    """Not finite at the end, far above chance for two epochs, or back at chance for three after having learned."""
    train, val, chance = truth.train_loss, truth.val_loss, truth.chance
    if not (np.isfinite(val[-1]) and np.isfinite(train[-1])):
        return True
    higher = np.minimum(train, val) / chance
    fell_back = higher.min() <= 0.88 and (higher[-3:] >= 1.0).all()
    return bool((higher[-2:] >= 1.3).all() or fell_back)


def is_flat(truth: Truth) -> bool:
    """At chance from the first epoch to the last, but for what random weights cost at the start."""
    train, val, chance = truth.train_loss, truth.val_loss, truth.chance
    both = np.stack([train, val]) / chance
    return bool(
        np.isfinite(both).all()
        and both.max() <= 1.03
        and both.min() >= 0.996
        and np.ptp(both, axis=1).max() <= 0.015
        and (both[1, -1] - both[1].min()) <= 0.003
    )


SHOWS: dict[Kind, Callable[[Truth], bool]] = {
    "healthy": is_healthy,
    "overfitting": is_overfitting,
    "underfitting": is_underfitting,
    "diverging": is_diverging,
    "flat": is_flat,
}


def noise_hides_nothing(kind: Kind, history: History, truth: Truth) -> bool:
    """Whether the record ends where the truth does, and what fell in truth does not look like turned."""
    val = np.array([point["value"] for point in history["val_loss"]])
    if kind == "diverging":
        return True
    sd = min(truth.noise_sd, 0.005 * truth.chance)
    ends_true = abs(val[-1] - truth.val_loss[-1]) <= max(5 * sd, 0.01 * truth.chance)
    stays_low = val[-1] - val.min() <= 0.1 * (val[0] - val.min()) + 2 * sd
    return bool(ends_true and (stays_low or kind in ("overfitting", "flat")))
