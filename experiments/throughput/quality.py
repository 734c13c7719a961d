"""How many seconds of training does it take to close most of the gap between counting codes and the best possible?

The gap lies between the unigram loss and the exact floor of the simulated cohort, both on the validation masks. Every
contender trains a whole epoch at its turn and is then evaluated on the same validation set; evaluations are not on the
clock. A contender leaves when it has closed the share that is asked for, or has used up its seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import click
import peers
import torch
from contenders import Own, Peer, own_batches

from behrt.config import SELECTED_SHARE, ExperimentSettings, TrainingSettings
from behrt.pretrain import EVALUATED_AT_ONCE
from behrt.records import Records
from behrt.trainer import learning_rate_at


@dataclass(frozen=True)
class Recipe:
    """How a peer is trained.

    Attributes:
        kind: `hf` or `guide`.
        adaptation: `full` or `lora`.
        lr: the highest learning rate.
        schedule: `linear` with 5% warm-up, or `constant`.
        mlm_probability: share of the codes that it guesses in training.
        customary: whether this is what its users do, and not something that it is granted beside.
    """

    kind: str
    adaptation: str
    lr: float
    schedule: str
    mlm_probability: float = SELECTED_SHARE
    customary: bool = False


RECIPES = (
    # BERT's pre-training: 1e-4, warmed up, decaying linearly (Devlin et al., 2019, A.2); 5e-5 is for fine-tuning
    Recipe("hf", "lora", 1e-4, "linear", customary=True),
    Recipe("hf", "full", 1e-3, "linear"),
    Recipe("hf", "lora", 3e-3, "linear", mlm_probability=0.4),
    Recipe("guide", "full", 1e-4, "constant", customary=True),  # the guide's starting point
    Recipe("guide", "full", 1e-3, "linear"),
)

PEER_EPOCHS = 40
"""Over which the peers' rates decay: Hugging Face comes to 90% in 32 of them, at 1e-3."""


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
        "adaptation": "lora" if settings.adaptation.use_lora else "full",
        "lr": training.lr,
        "table_rate": training.table_rate,
        "mlm_probability": training.mlm_probability,
        "epochs": training.epochs,
        "schedule": training.schedule,
        "precision": own.precision,
        "customary": False,
    }
    return Course("behrt", about, train)


def peer_course(
    recipe: Recipe, settings: ExperimentSettings, records: Records, device: torch.device, *, precision: str
) -> Course:
    training = TrainingSettings(
        lr=recipe.lr,
        schedule=recipe.schedule,
        warmup_fraction=0.05 if recipe.schedule == "linear" else 0.0,
        mlm_probability=recipe.mlm_probability,
        epochs=PEER_EPOCHS,
        batch_size=settings.training.batch_size,
        seed=settings.training.seed,
    )
    adaptation = settings.adaptation.model_copy(update={"use_lora": recipe.adaptation == "lora"})
    settings = settings.model_copy(update={"training": training, "adaptation": adaptation})
    steps = own_batches(settings, records).steps_per_epoch
    peer = Peer(
        recipe.kind,
        settings,
        records,
        device,
        precision=precision,
        learning_rate=partial(learning_rate_at, total_steps=PEER_EPOCHS * steps, settings=training),
    )
    length = records.max_position if recipe.kind == "guide" else None
    validation = peers.pad_all(records.validation, EVALUATED_AT_ONCE, length)

    def train() -> tuple[float, float]:
        seconds = peer.turn(steps).seconds
        return seconds, peer.evaluate(validation)

    about = {name: value for name, value in asdict(recipe).items() if name != "kind"}
    return Course(recipe.kind, {**about, "epochs": PEER_EPOCHS, "precision": precision}, train)


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
    follow(courses, unigram_loss, floor_loss, share=share, cap=cap)
    return {
        "share": share,
        "cap": cap,
        "batch_size": settings.training.batch_size,
        "unigram_loss": unigram_loss,
        "floor_loss": floor_loss,
        "runs": [
            {"contender": course.name, **course.about, "seconds": course.reached(share), "curve": course.curve}
            for course in courses
        ],
    }


def follow(courses: Sequence[Course], unigram_loss: float, floor_loss: float, *, share: float, cap: float) -> None:
    """An epoch each in turn, until each has closed its share or used up its seconds or epochs."""
    running = list(courses)
    while running:
        for course in list(running):
            closed = course.advance(unigram_loss, floor_loss)
            if closed >= share or course.seconds >= cap or len(course.curve) >= course.about["epochs"]:
                running.remove(course)
                click.echo(f"{course.name}, {course.about}: {closed:.1%} after {course.seconds:.1f} s", err=True)
