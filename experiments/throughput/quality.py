"""How many seconds of training does it take to close most of the gap between counting codes and the best possible?

The gap lies between the unigram loss and the exact floor of the simulated cohort, both on the validation masks. Every
contender trains a whole epoch at its turn and is then evaluated on the same validation set; evaluations are not on the
clock. A contender leaves when it has closed the share that is asked for, or has used up its seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import peers
import torch
from contenders import Own, Peer, own_batches

from behrt.config import ExperimentSettings, TrainingSettings
from behrt.pretrain import EVALUATED_AT_ONCE
from behrt.records import Records
from behrt.trainer import learning_rate_at


@dataclass(frozen=True)
class Recipe:
    """How a peer is trained.

    Attributes:
        kind: `hf` or `guide`.
        lr: the highest learning rate.
        schedule: `linear` with 5% warm-up, or `constant`.
        customary: whether this is what its users do, and not a rate that it is granted beside.
    """

    kind: str
    lr: float
    schedule: str
    customary: bool


RECIPES = (
    # BERT's pre-training: 1e-4, warmed up, decaying linearly (Devlin et al., 2019, A.2); 5e-5 is for fine-tuning
    Recipe("hf", 1e-4, "linear", customary=True),
    Recipe("hf", 3e-4, "linear", customary=False),
    Recipe("hf", 1e-3, "linear", customary=False),
    Recipe("guide", 1e-4, "constant", customary=True),  # the guide's starting point
    Recipe("guide", 1e-3, "linear", customary=False),
)


class Course:
    """One contender on its way: seconds of training and closed share, after each epoch."""

    def __init__(self, name: str, about: dict[str, Any], train: Callable[[], tuple[float, float]]) -> None:
        self.name, self.about, self._train = name, about, train
        self.seconds = 0.0
        self.curve: list[tuple[float, float]] = []

    def advance(self, unigram_loss: float, floor_loss: float) -> float:
        """Trains an epoch; the share that is closed then."""
        seconds, val_loss = self._train()
        self.seconds += seconds
        closed = (unigram_loss - val_loss) / (unigram_loss - floor_loss)
        self.curve.append((round(self.seconds, 2), round(closed, 5)))
        return closed

    def reached(self, share: float) -> float | None:
        """Seconds until so much was closed; None where it never was."""
        return next((seconds for seconds, closed in self.curve if closed >= share), None)


def faster_precision(settings: ExperimentSettings, records: Records, device: torch.device) -> str:
    """In which precision Hugging Face trains faster here, of five steps each after two to warm up."""
    seconds = {}
    for precision in ("bf16", "fp32"):
        peer = Peer("hf", settings, records, device, precision=precision)
        peer.turn(2)
        seconds[precision] = peer.turn(5).seconds
    return min(seconds, key=lambda precision: seconds[precision])


def own_course(settings: ExperimentSettings, records: Records, device: torch.device) -> Course:
    own = Own(settings, records, device, validation=records.validation.packed(EVALUATED_AT_ONCE, records.row_length))
    steps = own_batches(settings, records).steps_per_epoch

    def train() -> tuple[float, float]:
        seconds = own.turn(steps).seconds
        return seconds, own.val_loss

    training = settings.training
    about = {
        "lr": training.lr,
        "table_rate": training.table_rate,
        "schedule": training.schedule,
        "precision": own.precision,
        "customary": True,
    }
    return Course("behrt", about, train)


def peer_course(
    recipe: Recipe, settings: ExperimentSettings, records: Records, device: torch.device, *, precision: str
) -> Course:
    steps = own_batches(settings, records).steps_per_epoch
    schedule = TrainingSettings(
        lr=recipe.lr, schedule=recipe.schedule, warmup_fraction=0.05 if recipe.schedule == "linear" else 0.0
    )
    peer = Peer(
        recipe.kind,
        settings,
        records,
        device,
        precision=precision,
        learning_rate=partial(learning_rate_at, total_steps=settings.training.epochs * steps, settings=schedule),
    )
    length = records.max_position if recipe.kind == "guide" else None
    validation = peers.pad_all(records.validation, EVALUATED_AT_ONCE, length)

    def train() -> tuple[float, float]:
        seconds = peer.turn(steps).seconds
        return seconds, peer.evaluate(validation)

    about = {"lr": recipe.lr, "schedule": recipe.schedule, "precision": precision, "customary": recipe.customary}
    return Course(recipe.kind, about, train)


def time_to_quality(
    settings: ExperimentSettings,
    records: Records,
    device: torch.device,
    *,
    share: float,
    cap: float,
    names: Collection[str],
) -> dict[str, Any]:
    """Trains `behrt` and the peers, an epoch each in turn.

    Args:
        share: of the gap that is to be closed.
        cap: seconds of training after which a contender is given up.
        names: of the contenders that are trained: `behrt`, `hf`, `guide`.
    """
    baselines = records.baselines(len(records.data.vocabulary))
    unigram_loss, floor_loss = baselines.unigram_loss, baselines.floor_loss
    assert floor_loss is not None, "only a simulated cohort has a known floor"
    precisions = {"guide": "fp32"}
    if "hf" in names:
        precisions["hf"] = faster_precision(settings, records, device)
    courses = [own_course(settings, records, device)] if "behrt" in names else []
    courses += [
        peer_course(recipe, settings, records, device, precision=precisions[recipe.kind])
        for recipe in RECIPES
        if recipe.kind in names
    ]
    follow(courses, unigram_loss, floor_loss, share=share, cap=cap, epochs=settings.training.epochs)
    return {
        "share": share,
        "cap": cap,
        "epochs": settings.training.epochs,
        "batch_size": settings.training.batch_size,
        "unigram_loss": unigram_loss,
        "floor_loss": floor_loss,
        "runs": [
            {"contender": course.name, **course.about, "seconds": course.reached(share), "curve": course.curve}
            for course in courses
        ],
    }


def follow(
    courses: Sequence[Course], unigram_loss: float, floor_loss: float, *, share: float, cap: float, epochs: int
) -> None:
    """An epoch each in turn, until each has closed its share or used up its seconds or epochs."""
    running = list(courses)
    while running:
        for course in list(running):
            closed = course.advance(unigram_loss, floor_loss)
            if closed >= share or course.seconds >= cap or len(course.curve) >= epochs:
                running.remove(course)
                click.echo(f"{course.name}, {course.about}: {closed:.1%} after {course.seconds:.1f} s", err=True)
