"""Can a model learn from its own first batch, and what will that cost?

Everything that can be found out before the first step: which trained parameters no gradient reaches, which adapters do
not act or sit in the wrong place, whether two epochs mask differently, how much memory a step needs, and how long an
epoch takes. It finds facts; `rules` judge them. Weights, gradients, modes, optimizer and every random state are left as
they were.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from behrt.batches import PackedBatch
from behrt.config import AdaptationSettings
from behrt.devices import is_out_of_memory, seconds_when_done
from behrt.doctor.masks import masks_change
from behrt.doctor.memory import Keeping, Kept, memory_available, memory_needed
from behrt.lora import LAYERS_OF_TARGET, Adapter, LoRALinear, adapted_layers
from behrt.model import BEHRT, Attention
from behrt.optimizer import AdamW
from behrt.parameters import count_parameters, silent_adapters
from behrt.trainer import LossSums, StepSource

Loss = Callable[[nn.Module, PackedBatch], LossSums]
Step = list[PackedBatch]

STEPS_SAMPLED = 16
"""Steps that are drawn to know how large steps are."""
EPOCHS_SEARCHED = 20
"""Epochs in which a step that scores any token is looked for: tiny cohorts may have none in their first."""
SECONDS_TIMED = 0.1
"""Passes over the first step are repeated for so long, and the median counts; a slow step is timed once."""
TOKENS_OF_ONE_PATIENT = 8
"""Enough to see adapters act, few enough to run the model once for every adapter."""

OPTIMIZER_SAMPLE = 1 << 22
"""Elements that the optimizer is timed on."""


def probe(
    model: nn.Module,
    loss: Loss,
    *,
    steps: StepSource[PackedBatch],
    train_evaluation: Sequence[PackedBatch],
    validation: Sequence[PackedBatch],
    adaptation: AdaptationSettings,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    ranks: int = 1,
) -> dict[str, Any]:
    """Facts about a run before its first step, named as in `RunFacts`; None is "could not be found out".

    One row of the first step goes first: it warms the machine up and says whether the step fits. If not, the row
    has to stand for the step. All in all this takes two training steps, or a fifth of a second where they are small.

    Args:
        model: on `device`, its adapters inserted and its trainability set.
        loss, steps, train_evaluation, validation, precision: what `Trainer` will be given.
        adaptation: what was asked for.
        ranks: processes that train together; `steps` are the share of this one.
    """
    with untouched(model, device):
        counts = count_parameters(model)
        missing, misplaced = adapter_places(model, adaptation)
        facts: dict[str, Any] = {
            "total_parameters": counts["total"],
            "trainable_parameters": counts["trainable"],
            "trainable_percent": counts["trainable_percent"],
            "lora_parameters": counts["lora"],
            "embeddings_trainable": counts["embeddings_trainable"],
            "encoder_trainable": counts["encoder_trainable"],
            "head_trainable": counts["head_trainable"],
            "adapted_layers": tuple(adapted_layers(model)),
            "missing_adapters": missing,
            "misplaced_adapters": misplaced,
            "training_masks_change": masks_change(steps.epoch(1), steps.epoch(2)),
            "device": device.type,
            "steps_per_epoch": steps.steps_per_epoch,
            "memory_available": memory_of_one(memory_available(model, device), device, ranks),
        }
        step = first_scored_step(steps)
        if step is None:
            return facts
        load = Load.of(steps, itertools.islice(itertools.chain(train_evaluation, validation), 0, None, ranks))
        silent = _silent_adapters(model, step, device)
        row = gradient_pass(model, loss, one_row(step), device=device, precision=precision)
        needed = partial(
            memory_needed,
            model,
            largest_size=load.largest_size,
            largest_evaluated=load.largest_evaluated,
            device=device,
            ranks=ranks,
        )
        available = facts["memory_available"]
        fits = available is None or needed(row.kept) <= available
        whole = whole_step(model, loss, step, device=device, precision=precision) if fits else None
        seen = whole or row
        return {
            **facts,
            "silent_adapters": silent,
            "first_loss": seen.loss,
            "without_gradient": without_gradient(model, seen),
            "gradient_not_finite": tuple(sorted(seen.not_finite)),
            "memory_needed": needed(seen.kept),
            "epoch_seconds_predicted": epoch_seconds(seen, load, optimizer_seconds(model, device)),
            "out_of_memory": True if fits and whole is None else None,
        }


def memory_of_one(available: int | None, device: torch.device, ranks: int) -> int | None:
    """Bytes that are there for one of so many ranks: on the CPU all of them share the machine's."""
    return available if available is None or device.type != "cpu" else available // ranks


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; modes and all global random states are as before afterwards, whatever happened."""
    modes = {module: module.training for module in model.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


# Adapters


def adapter_places(model: nn.Module, adaptation: AdaptationSettings) -> tuple[int, tuple[str, ...]]:
    """How many of the layers asked for lack an adapter, and which adapters sit on no layer that a target names."""
    targets = adaptation.lora_targets if adaptation.use_lora else ()
    asked = {layer for target in targets for layer in LAYERS_OF_TARGET[target]}
    known = {layer for layers in LAYERS_OF_TARGET.values() for layer in layers}
    encoders = {f"{name}.encoder.".lstrip("."): m.encoder for name, m in model.named_modules() if isinstance(m, BEHRT)}
    adapted = adapted_layers(model)
    # names below the encoder; a layer that is wrapped in another module keeps the target's name in its path
    inside = {
        name: set(name.removeprefix(prefix).split("."))
        for name in adapted
        for prefix in encoders
        if name.startswith(prefix)
    }
    expected = len(asked) * sum(len(encoder.layers) for encoder in encoders.values())
    missing = expected - sum(bool(path & asked) for path in inside.values())
    return max(0, missing), tuple(name for name in adapted if not inside.get(name, set()) & known)


def one_patient(step: Step) -> dict[str, Tensor] | None:
    """The first tokens of the first patient with two or more, as arguments of a model, each [1, tokens]."""
    for batch in step:
        for row, segments in enumerate(batch.segments):
            tokens = (segments == 0).nonzero().flatten()[:TOKENS_OF_ONE_PATIENT]
            if len(tokens) > 1:
                return {name: getattr(batch, name)[row, tokens][None] for name in ("codes", "ages", "visits")}
    return None


def _silent_adapters(model: nn.Module, step: Step, device: torch.device) -> tuple[str, ...] | None:
    inputs = one_patient(step)
    if inputs is None:
        return None
    return tuple(silent_adapters(model, {name: value.to(device) for name, value in inputs.items()}))


# The gradients of the first step


@dataclass(frozen=True)
class StepPass:
    """What one forward and backward pass over a step showed.

    Attributes:
        loss: mean over the scored tokens, in nats.
        reached, zero, not_finite: names of the trained parameters whose gradient has an element that is not 0; that is
            0 throughout (in no graph at all: in neither); that has a NaN or infinite element.
        size: tokens of the step, padding included.
        seconds: of the whole pass; `forward_seconds` of its forward part.
        kept: what its largest micro-batch keeps for backward.
    """

    loss: float
    reached: frozenset[str]
    zero: frozenset[str]
    not_finite: frozenset[str]
    size: int
    seconds: float
    forward_seconds: float
    kept: Kept


def first_scored_step(steps: StepSource[PackedBatch]) -> Step | None:
    """The first step that scores a token; None where no epoch that was searched has one."""
    for epoch in range(1, EPOCHS_SEARCHED + 1):
        for step in steps.epoch(epoch):
            if any(batch.num_scored for batch in step):
                return step
    return None


def one_row(step: Step) -> Step:
    """The first row of the step that scores a token, as a step of its own."""
    batch = next(batch for batch in step if batch.num_scored)
    row = int(batch.scored.any(dim=1).nonzero()[0])
    return [PackedBatch(**{field.name: getattr(batch, field.name)[row : row + 1] for field in fields(batch)})]


def gradient_pass(
    model: nn.Module, loss: Loss, step: Step, *, device: torch.device, precision: torch.dtype
) -> StepPass:
    """The gradients of one step as the trainer takes them, but in the model's present mode and into no `.grad`."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    scored = max(1, sum(batch.num_scored for batch in step))
    reached: set[str] = set()
    zero: set[str] = set()
    not_finite: set[str] = set()
    kept: list[Kept] = []
    total_loss = forward_seconds = seconds = 0.0
    for batch in step:
        started = seconds_when_done(device)
        keeping = Keeping(model)
        with keeping.watch(), _autocast(device, precision):
            sums = loss(model, batch.to(device))
        forward_seconds += seconds_when_done(device) - started
        gradients: Sequence[Tensor | None] = [None] * len(trained)
        if trained and sums.loss.requires_grad:
            gradients = torch.autograd.grad(sums.loss / scored, list(trained.values()), allow_unused=True)
        seconds += seconds_when_done(device) - started
        total_loss += sums.loss.item()
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                (reached if bool(gradient.any()) else zero).add(name)
                if not bool(gradient.isfinite().all()):
                    not_finite.add(name)
        kept.append(keeping.kept(_size(batch)))
    return StepPass(
        loss=total_loss / scored,
        reached=frozenset(reached),
        zero=frozenset(zero - reached),
        not_finite=frozenset(not_finite),
        size=sum(_size(batch) for batch in step),
        seconds=seconds,
        forward_seconds=forward_seconds,
        kept=max(kept, key=lambda micro: micro.size),
    )


def without_gradient(model: nn.Module, seen: StepPass) -> tuple[str, ...]:
    """Names of the trained parameters that no gradient reaches, those left out whose gradient is 0 by right.

    By right 0 are: A of an adapter whose B is still 0 but trained; and biases of key projections, which add the same to
    every score of a softmax. Neither excuses a parameter that the loss does not depend on at all. Where the loss
    itself is 0, nothing is left to learn and every gradient is 0 by right.
    """
    excused = _zero_by_right(model)
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and name not in seen.reached
        and not (name in seen.zero and (id(parameter) in excused or seen.loss == 0))
    )


def _zero_by_right(model: nn.Module) -> set[int]:
    """Identities of the parameters whose gradient may be 0 in a sound model."""
    excused = set()
    for module in model.modules():
        if isinstance(module, Attention):
            key = module.key.base if isinstance(module.key, LoRALinear) else module.key
            excused.add(id(getattr(key, "bias", None)))
        elif isinstance(module, Adapter) and module.B.requires_grad and not bool(module.B.any()):
            excused.add(id(module.A))
    return excused


def whole_step(
    model: nn.Module, loss: Loss, step: Step, *, device: torch.device, precision: torch.dtype
) -> StepPass | None:
    """The pass over a whole step whose time is the median; None where memory runs out over it.

    A step of the CPU that takes longer than `SECONDS_TIMED` is taken once; an accelerator's first is not counted, since
    it loads kernels.
    """
    unusual = 0 if device.type == "cpu" else 1
    passes: list[StepPass] = []
    try:
        while len(passes) <= unusual or sum(done.seconds for done in passes) < SECONDS_TIMED:
            passes.append(gradient_pass(model, loss, step, device=device, precision=precision))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    usual = sorted(passes[unusual:], key=lambda done: done.seconds)
    return usual[(len(usual) - 1) // 2]


# Time


@dataclass(frozen=True)
class Load:
    """How much an epoch has to compute.

    Attributes:
        steps: optimizer steps.
        step_size: tokens of a step, padding included, on average over the steps sampled.
        largest_size: tokens of the largest micro-batch among them.
        draw_seconds: to draw one step.
        evaluation_size: tokens that are evaluated after the epoch; `largest_evaluated` in one batch.
    """

    steps: int
    step_size: float
    largest_size: int
    draw_seconds: float
    evaluation_size: int
    largest_evaluated: int

    @classmethod
    def of(cls, steps: StepSource[PackedBatch], evaluated: Iterable[PackedBatch]) -> Load:
        sizes = [_size(batch) for batch in evaluated]
        started = time.perf_counter()
        sample = list(itertools.islice(steps.epoch(1), STEPS_SAMPLED))
        return cls(
            steps=steps.steps_per_epoch,
            step_size=statistics.fmean(sum(_size(batch) for batch in step) for step in sample),
            largest_size=max(_size(batch) for step in sample for batch in step),
            draw_seconds=(time.perf_counter() - started) / len(sample),
            evaluation_size=sum(sizes),
            largest_evaluated=max(sizes, default=0),
        )


def epoch_seconds(seen: StepPass, load: Load, optimizer: float) -> float:
    """An epoch's predicted time: its steps, of which `optimizer` seconds each go to the update, and two evaluations."""
    step = load.draw_seconds + seen.seconds / seen.size * load.step_size + optimizer
    return load.steps * step + seen.forward_seconds / seen.size * load.evaluation_size


def optimizer_seconds(model: nn.Module, device: torch.device) -> float:
    """Time to clip and apply the gradients of one step, measured on a tensor of zeros."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not trained:
        return 0.0
    stand_in = nn.Parameter(torch.zeros(min(trained, OPTIMIZER_SAMPLE), device=device))
    stand_in.grad = torch.zeros_like(stand_in)
    optimizer = AdamW([stand_in], fused=True)
    for _ in range(2):  # the first step allocates the optimizer's state
        started = seconds_when_done(device)
        nn.utils.clip_grad_norm_([stand_in], 1.0)
        optimizer.step()
        seconds = seconds_when_done(device) - started
    return seconds * trained / stand_in.numel()


# What the parts above share


def _size(batch: PackedBatch) -> int:
    """Tokens that the encoder computes."""
    return batch.num_tokens


def _autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if precision is torch.float32 else torch.autocast(device.type, dtype=precision)
