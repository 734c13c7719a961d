"""Which head suits an encoder best while that stays as it is?

A linear probe: the loss of the task over the vectors of the training examples, and a penalty on the squared weights.
That is convex, so that its minimum depends on no seed, rate or order; the penalty is the one of a grid with which the
tuning examples are predicted best. Fine-tuning begins there (Kumar et al., 2022, "Fine-Tuning can Distort Pretrained
Features and Underperform Out-of-Distribution"): from a head that knows nothing, the first steps would bend the encoder
to whatever the head happens to be.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from behrt.tasks.examples import Examples
from behrt.tasks.finetuned import TaskDescription

PENALTIES = tuple(10 ** (1 - half / 2) for half in range(11))
"""On the squared weights of standardised vectors, beside the mean loss of a label: from 10 to 1e-4, strong ones first,
since each fit begins where the one before ended."""
ITERATIONS = 200
LEAST_SPREAD = 1e-6
"""Of a vector's number: below, it is the same for all patients but for rounding, and weighs nothing."""


class Probe(NamedTuple):
    """A linear head, float32 [outputs, features] and [outputs], its penalty, and its mean loss on tuning labels."""

    weight: Tensor
    bias: Tensor
    penalty: float
    tuning_loss: float


def fit_probe(
    task: TaskDescription, training: tuple[Tensor, Examples], tuning: tuple[Tensor, Examples], first_scores: list[float]
) -> Probe:
    """The linear head that predicts the tuning examples best, of those that fit the training examples.

    Args:
        training, tuning: vectors, float [rows, features], and whose they are.
        first_scores: where the bias begins, [outputs].
    """
    vectors, targets, days = _tensors(*training)
    held_vectors, held_targets, held_days = _tensors(*tuning)
    center, spread = vectors.mean(dim=0), vectors.std(dim=0, unbiased=False)
    scale = torch.where(spread > LEAST_SPREAD, 1 / spread, 0.0)
    inputs, held_inputs = (vectors - center) * scale, (held_vectors - center) * scale
    known, held_known = (int((~torch.isnan(labels)).sum()) for labels in (targets, held_targets))
    weight = torch.zeros(task.outputs, vectors.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(first_scores, dtype=torch.float64, requires_grad=True)

    def held_loss() -> float:
        with torch.no_grad():
            return task.summed_loss(held_inputs @ weight.T + bias, held_targets, held_days).item() / held_known

    # where nothing in the vectors helps on tuning labels, the same for everybody
    best = Probe(weight.detach().float(), bias.detach().float(), math.inf, held_loss())
    for penalty in PENALTIES:
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=ITERATIONS,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-5,
            tolerance_change=1e-7,
        )

        def closure(optimizer: torch.optim.LBFGS = optimizer, penalty: float = penalty) -> float:
            optimizer.zero_grad()
            loss = task.summed_loss(inputs @ weight.T + bias, targets, days) / known
            whole = loss + penalty * weight.square().sum()
            whole.backward()  # type: ignore[no-untyped-call]
            return whole.item()

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        if (held := held_loss()) < best.tuning_loss:
            own = weight.detach() * scale
            best = Probe(own.float(), (bias.detach() - own @ center).float(), penalty, held)
    return best


def _tensors(vectors: Tensor, examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
    days = torch.zeros(0) if examples.days is None else torch.from_numpy(examples.days)
    return vectors.double(), torch.from_numpy(examples.targets).double(), days.double()
