"""Do `behrt` and the guide's recipe do the same work: same tokens, same scored tokens, same losses?

Both start from the same weights, in fp32 and without dropout, and are trained by the same loop and optimizer on the
same patients, windows and masks. What differs is what is timed: packed rows, and a head at scored tokens alone.
"""

from __future__ import annotations

from typing import Any

import peers
import torch
from contenders import FirstSteps, own_batches, padded_batches
from torch import nn

from behrt.config import ExperimentSettings
from behrt.pretrain import build_model, masked_lm_loss
from behrt.records import Records
from behrt.trainer import LossSums, Trainer

TOLERANCE = 1e-4
"""Relative: fp32 rounds at 6e-8, sums of thousands of terms in another order at some 1e-6, and steps add it up."""


def equal_work(settings: ExperimentSettings, records: Records, *, steps: int) -> dict[str, Any]:
    """Losses of `steps` steps of both.

    Args:
        settings: without dropout, in fp32, everything trained.

    Returns:
        `tokens`, `scored` and `losses` (means) of each step, by contender, and the largest relative difference.
    """
    assert settings.model.dropout == 0
    assert settings.training.precision == "fp32"
    assert not settings.adaptation.use_lora
    model, _, _ = build_model(settings, records)
    guide = peers.copy_of_behrt(model, model.config)
    padded = padded_batches(settings, records, full_length=True)
    found = {
        "behrt": _trained(model, masked_lm_loss, own_batches(settings, records), settings, steps),
        "guide": _trained(guide, peers.guide_sums, padded, settings, steps),
    }
    losses = zip(found["behrt"]["losses"], found["guide"]["losses"], strict=True)
    return {
        "steps": steps,
        "same_tokens": found["behrt"]["tokens"] == found["guide"]["tokens"],
        "same_scored": found["behrt"]["scored"] == found["guide"]["scored"],
        "largest_difference": max(abs(own - other) / own for own, other in losses),
        "tolerance": TOLERANCE,
        **found,
    }


def is_equal(found: dict[str, Any]) -> bool:
    return bool(found["same_tokens"] and found["same_scored"] and found["largest_difference"] <= found["tolerance"])


def _trained(
    model: nn.Module, sums: Any, source: Any, settings: ExperimentSettings, steps: int
) -> dict[str, list[Any]]:
    """Tokens, scored tokens and mean loss of the first steps."""
    first, losses = FirstSteps(source), []
    first.steps_per_epoch = steps

    def noted(model: nn.Module, batch: Any) -> LossSums:
        found: LossSums = sums(model, batch)
        if model.training:
            losses.append(found.loss.item())
        return found

    few = next(source.epoch(0))[:1]
    trainer: Trainer[Any] = Trainer(
        model,
        noted,
        steps=first,
        train_evaluation=few,
        validation=few,
        settings=settings.training.model_copy(update={"epochs": 1}),
        device=torch.device("cpu"),
    )
    next(trainer.epochs())
    scored = [batch.num_scored for batch in first.given]
    return {
        "tokens": [batch.num_tokens for batch in first.given],
        "scored": scored,
        "losses": [loss / number for loss, number in zip(losses, scored, strict=True)],
    }
