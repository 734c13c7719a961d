"""What is known of a run when it is judged?

A record of somebody else's run may hold two loss curves and nothing more; of a run of our own nearly everything is
known. Every fact that is not known is None, and a rule that needs it is listed as not checked.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from behrt.config import FLAGS, SECTION_OF, ExperimentSettings, build_settings, lay_over
from behrt.doctor.curves import Curve
from behrt.metrics import chance_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Everything that rules ask for; None is "not known".

    Attributes:
        curves: by name, of `history.EPOCH_FIGURES` (`train_loss`, `val_accuracy`, `gradient_norm`, …).
        finished: whether the training is over, for whatever reason.
        task: what a fine-tuning predicts; None of a pre-training.
        stopped_early: whether spent patience ended it.

        use_lora … max_position: settings of the run, named as in `config`.
        pretrained: whether the weights came from a trained run (`--init-from`).
        shared_codes, new_codes: codes of the vocabulary that the trained run knew, and that it did not.

        total_parameters … lora_parameters: as `count_parameters` counts them; `trainable_percent` of the total.
        adapted_layers: full names of the layers that have an adapter.
        missing_adapters: targets that were asked for, minus the layers that have an adapter: their number.
        misplaced_adapters: full names of adapted layers that are no target of any name.
        silent_adapters: full names of those whose adapter does not act (`parameters.silent_adapters`).
        without_gradient: full names of trainable parameters that no gradient reaches.
        gradient_not_finite: full names of those whose first gradient is NaN or infinite.
        first_loss: of the first batch before training, in evaluation mode.

        train_patients, val_patients: numbers of patients.
        val_scored: scored tokens of the validation set.
        shared_subjects: patients that are in training and in validation.
        chance_loss, unigram_loss, unigram_accuracy, copying_loss, floor_loss, floor_accuracy: see `history.Baselines`.
        cooccurrence_gain, _low, _high: nats per `[MASK]` by which a patient's other codes beat counting, with its 95%
            confidence interval.
        truncated_share, unk_share: of the training tokens, from 0 to 1.
        training_masks_change: whether two epochs mask differently; validation_masks_fixed: whether they do not.

        device: `cpu`, `cuda` or `mps`.
        steps_per_epoch: optimizer steps.
        epoch_seconds_predicted: from the time of the first batch.
        memory_needed, memory_available: bytes on the device.
        out_of_memory: whether the run ended because memory did not suffice.
    """

    curves: Mapping[str, Curve] = field(default_factory=dict)
    finished: bool | None = None
    task: str | None = None
    stopped_early: bool | None = None

    use_lora: bool | None = None
    lora_rank: int | None = None
    freeze_base: bool | None = None
    lora_targets: tuple[str, ...] | None = None
    train_embeddings: bool | None = None
    train_head: bool | None = None
    model_size: str | None = None
    dropout: float | None = None
    weight_decay: float | None = None
    lr: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    accumulation_steps: int | None = None
    gradient_clip: float | None = None
    early_stopping_patience: int | None = None
    num_patients: int | None = None
    max_patients: int | None = None
    max_position: int | None = None
    data: str | None = None
    structure: str | None = None
    pretrained: bool | None = None
    shared_codes: int | None = None
    new_codes: int | None = None

    total_parameters: int | None = None
    trainable_parameters: int | None = None
    trainable_percent: float | None = None
    lora_parameters: int | None = None
    embeddings_trainable: int | None = None
    encoder_trainable: int | None = None
    head_trainable: int | None = None
    adapted_layers: tuple[str, ...] | None = None
    missing_adapters: int | None = None
    misplaced_adapters: tuple[str, ...] | None = None
    silent_adapters: tuple[str, ...] | None = None
    without_gradient: tuple[str, ...] | None = None
    gradient_not_finite: tuple[str, ...] | None = None
    first_loss: float | None = None

    vocab_size: int | None = None
    train_patients: int | None = None
    val_patients: int | None = None
    val_scored: int | None = None
    shared_subjects: int | None = None
    chance_loss: float | None = None
    unigram_loss: float | None = None
    unigram_accuracy: float | None = None
    copying_loss: float | None = None
    floor_loss: float | None = None
    floor_accuracy: float | None = None
    cooccurrence_gain: float | None = None
    cooccurrence_gain_low: float | None = None
    cooccurrence_gain_high: float | None = None
    truncated_share: float | None = None
    unk_share: float | None = None
    training_masks_change: bool | None = None
    validation_masks_fixed: bool | None = None

    device: str | None = None
    steps_per_epoch: int | None = None
    epoch_seconds_predicted: float | None = None
    memory_needed: int | None = None
    memory_available: int | None = None
    out_of_memory: bool | None = None

    def get(self, name: str) -> Any:
        """A fact or a curve by name; None where it is not known (of a curve: has no point)."""
        if name in FACT_NAMES:
            return getattr(self, name)
        curve = self.curves.get(name)
        return curve if curve is not None and len(curve) else None

    def known(self) -> dict[str, Any]:
        """The known facts without the curves, as `run.json` keeps them."""
        facts = asdict(self, dict_factory=lambda pairs: {key: value for key, value in pairs if key != "curves"})
        return {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()
                if value is not None}  # fmt: skip


FACT_NAMES = frozenset(fact.name for fact in fields(RunFacts)) - {"curves"}
"""Names of the facts that are no curves."""


def facts_from_settings(settings: ExperimentSettings) -> dict[str, Any]:
    """The facts that the settings of a run give; those that say `auto`, or name nothing, are left out."""
    fields_set = settings.model_dump(exclude={"note"})
    flat = {name: value for section in fields_set.values() for name, value in section.items()}
    facts = {name: value for name, value in flat.items() if name in FACT_NAMES and value is not None}
    facts["pretrained"] = settings.adaptation.init_from is not None
    if not isinstance(settings.model.max_position, int):
        del facts["max_position"]
    del facts["device"]  # `auto`, or what was asked for; the run knows what it got
    return facts


def completed(facts: RunFacts) -> RunFacts:
    """With what follows from what is known: chance from the vocabulary, shares from counts, LoRA from its parameters.

    >>> completed(RunFacts(total_parameters=20_366_312, trainable_parameters=18_790_376)).trainable_percent
    92.26...
    """
    derived: dict[str, Any] = {}
    if facts.chance_loss is None and facts.vocab_size:
        derived["chance_loss"] = chance_loss(facts.vocab_size)
    if facts.trainable_percent is None and facts.total_parameters and facts.trainable_parameters is not None:
        derived["trainable_percent"] = 100 * facts.trainable_parameters / facts.total_parameters
    if facts.use_lora is None and facts.lora_parameters is not None:
        derived["use_lora"] = facts.lora_parameters > 0
    return replace(facts, curves=_without_negative_losses(facts.curves), **derived)


def _without_negative_losses(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """The curves but for losses with a value below 0: these are no cross-entropies, and no rule speaks of them."""
    negative = {name for name, curve in curves.items() if name.endswith("_loss") and (curve.finite.values < 0).any()}
    if negative:
        log.warning("%s: below 0, so no cross-entropy; its rules are not checked", ", ".join(sorted(negative)))
    return {name: curve for name, curve in curves.items() if name not in negative}


def with_flags(facts: RunFacts, flags: Mapping[str, Any]) -> RunFacts:
    """With what the user says of the run laid over what its record says.

    Raises:
        UserError: a setting is out of its range.
    """
    settings = {name: value for name, value in flags.items() if name in SECTION_OF}
    valid = facts_from_settings(build_settings(lay_over({}, settings), where=FLAGS))
    told: dict[str, Any] = {name: valid.get(name) for name in settings if name in FACT_NAMES}
    if settings.get("device") != "auto":
        told |= {name: value for name, value in settings.items() if name == "device"}
    if "init_from" in settings:
        told["pretrained"] = True
    counts = {name: value for name, value in flags.items() if name not in SECTION_OF}
    assert counts.keys() <= FACT_NAMES
    return replace(facts, **told, **counts)


LARGEST = 1e15
"""Beyond it a number is no count, loss or size of anything, and shares of it overflow."""


@cache
def _fact_types() -> dict[str, TypeAdapter[Any]]:
    types = get_type_hints(RunFacts)
    adapters = {hint: TypeAdapter(hint) for name, hint in types.items() if name in FACT_NAMES}
    return {name: adapters[types[name]] for name in FACT_NAMES}


def known_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are facts, each in its own type; the rest is not known to us, and left out.

    >>> known_facts({"use_lora": "True", "lr": "1e-4", "max_position": "auto", "colour": "red", "dropout": None})
    {'use_lora': True, 'lr': 0.0001}
    """
    facts = {}
    for name, found in values.items():
        if name in FACT_NAMES:
            try:
                value = _fact_types()[name].validate_python(found)
            except ValidationError:
                continue
            if isinstance(value, (int, float)) and not abs(value) < LARGEST:  # NaN is not below it either
                continue
            if isinstance(value, int) and value < 0:  # all of these are counts
                continue
            if value is not None:
                facts[name] = value
    return facts
