"""Which symptoms do parameters, settings, records and machine show?

None of them needs an epoch. Each predicate returns what it saw, or None; `setup_rules.py` says what follows from it.
"""

from __future__ import annotations

import math
import re

from behrt.doctor.facts import RunFacts
from behrt.doctor.readings import FEW_PATIENTS, accuracy_interval, has_beaten_counting, last_accuracies, numbers
from behrt.doctor.rule import Severity, Symptom
from behrt.metrics import WORTH_HAVING

MOST_TRAINABLE = 50.0
LEAST_OF_PRETRAINED, MOST_OF_PRETRAINED = 2.0, 10.0
"""Percent of the parameters that LoRA trains on a pre-trained base."""
MANY_BATCHES = 200
BATCH_ON_GPU, BATCH_ON_CPU = 128, 16
"""Batch sizes that the guide recommends: large model on an A40, small model on an M1."""
SLOW_EPOCH_SECONDS = 600.0
TRUNCATED = 0.05
UNKNOWN = 0.10
FULL_MEMORY = 0.9
HOPELESS_MEMORY = 1.5
"""The estimate is good to a factor of 1.5: a run that needs more than this multiple of the memory cannot succeed."""
NEVER_CALLED = re.compile(r"self_attn\.out_proj$")
"""`nn.MultiheadAttention` reads the weight of this layer and never calls it."""


def out_of_memory(facts: RunFacts) -> Symptom | None:
    if facts.out_of_memory:
        return Symptom(numbers(memory_available=facts.memory_available, batch_size=facts.batch_size), "error")
    needed, available = facts.memory_needed, facts.memory_available
    if needed is None or available is None or needed <= FULL_MEMORY * available:
        return None
    severity: Severity = "error" if needed > HOPELESS_MEMORY * available else "warning"
    evidence = numbers(memory_needed_gib=needed / 2**30, memory_available_gib=available / 2**30)
    return Symptom({**evidence, **numbers(batch_size=facts.batch_size)}, severity)


def uses_lora(facts: RunFacts) -> bool | None:
    """Whether the run has adapters; None where nothing tells."""
    if facts.use_lora is not None:
        return facts.use_lora
    return None if facts.lora_parameters is None else facts.lora_parameters > 0


def too_many_trainable(facts: RunFacts) -> Symptom | None:
    percent = facts.trainable_percent
    assert percent is not None
    # Where nothing tells whether LoRA was asked for, a part that is frozen says so.
    lora = uses_lora(facts)
    asked_for_lora = percent < 100 if lora is None else lora
    if not asked_for_lora or percent <= MOST_TRAINABLE:
        return None
    return Symptom(
        numbers(
            trainable_percent=percent,
            trainable=facts.trainable_parameters,
            total=facts.total_parameters,
            lora=facts.lora_parameters,
            embeddings_trainable=facts.embeddings_trainable,
            encoder_trainable=facts.encoder_trainable,
            head_trainable=facts.head_trainable,
        )
    )


def trainable_outside_range(facts: RunFacts) -> Symptom | None:
    percent = facts.trainable_percent
    assert percent is not None
    if not uses_lora(facts) or not facts.pretrained or LEAST_OF_PRETRAINED <= percent <= MOST_OF_PRETRAINED:
        return None
    if percent > MOST_TRAINABLE:
        return None  # too_many_trainable says more
    return Symptom(numbers(trainable_percent=percent, expected="2 to 10"))


def frozen_random_embeddings(facts: RunFacts) -> Symptom | None:
    if facts.train_embeddings is not False:
        return None
    if not facts.pretrained:
        return Symptom(numbers(embeddings_trainable=0, base="random"))
    return _new_codes(facts)


def frozen_random_head(facts: RunFacts) -> Symptom | None:
    if facts.train_head is not False:
        return None
    if not facts.pretrained:
        return Symptom(numbers(head_trainable=0, base="random"))
    return _new_codes(facts)


def _new_codes(facts: RunFacts) -> Symptom | None:
    """Codes that the pre-trained run did not know stay random where their table is frozen."""
    if not facts.new_codes:
        return None
    return Symptom(numbers(new_codes=facts.new_codes, shared_codes=facts.shared_codes, base="pre-trained"), "warning")


def lora_on_random_encoder(facts: RunFacts) -> Symptom | None:
    if not uses_lora(facts) or facts.pretrained or facts.freeze_base is False:
        return None
    return Symptom(numbers(base="random", lora_rank=facts.lora_rank))


def silent_adapters(facts: RunFacts) -> Symptom | None:
    silent = facts.silent_adapters
    assert silent is not None
    if not silent:
        return None
    adapters = None if facts.adapted_layers is None else len(facts.adapted_layers)
    return Symptom(numbers(silent=len(silent), adapters=adapters, first=silent[0]))


def adapters_on_wrong_layers(facts: RunFacts) -> Symptom | None:
    layers = facts.adapted_layers
    assert layers is not None
    misplaced = facts.misplaced_adapters or ()
    never_called = [name for name in layers if NEVER_CALLED.search(name)]
    if facts.use_lora and not layers:
        return Symptom(numbers(adapters=0), "error")
    if misplaced or facts.missing_adapters:
        return Symptom(
            numbers(adapters=len(layers), missing=facts.missing_adapters, misplaced=len(misplaced) or None), "error"
        )
    if never_called:
        return Symptom(numbers(adapters=len(layers), on_out_proj=len(never_called), first=never_called[0]))
    return None


def gradient_not_finite(facts: RunFacts) -> Symptom | None:
    names = facts.gradient_not_finite
    assert names is not None
    return Symptom(numbers(parameters=len(names), first=names[0], first_loss=facts.first_loss)) if names else None


def without_gradient(facts: RunFacts) -> Symptom | None:
    names = facts.without_gradient
    assert names is not None
    return Symptom(numbers(parameters=len(names), first=names[0])) if names else None


def weak_regularisation(facts: RunFacts) -> Symptom | None:
    if facts.model_size != "large":
        return None
    weak_dropout = facts.dropout is not None and facts.dropout < 0.2
    if not weak_dropout and facts.weight_decay != 0:
        return None
    return Symptom(numbers(model_size="large", dropout=facts.dropout, weight_decay=facts.weight_decay))


def nothing_to_learn(facts: RunFacts) -> Symptom | None:
    low, high = facts.cooccurrence_gain_low, facts.cooccurrence_gain_high
    assert low is not None
    assert high is not None
    if low > 0 or high >= WORTH_HAVING or has_beaten_counting(facts):
        return None
    return Symptom(
        numbers(
            gain=facts.cooccurrence_gain,
            gain_low=low,
            gain_high=high,
            unigram_loss=facts.unigram_loss,
            chance_loss=facts.chance_loss,
        )
    )


def small_validation_set(facts: RunFacts) -> Symptom | None:
    patients = facts.val_patients
    assert patients is not None
    if patients >= FEW_PATIENTS:
        return None
    accuracies = last_accuracies(facts)
    accuracy = accuracies[1] if accuracies else facts.unigram_accuracy
    scored = facts.val_scored or patients
    interval = None if accuracy is None or math.isnan(accuracy) else accuracy_interval(accuracy, scored)
    return Symptom(
        numbers(
            val_patients=patients,
            expected=FEW_PATIENTS,
            scored_codes=facts.val_scored,
            val_accuracy=accuracy if accuracies else None,
            unigram_accuracy=None if accuracies else accuracy,
            accuracy_low=interval[0] if interval else None,
            accuracy_high=interval[1] if interval else None,
        )
    )


def truncation(facts: RunFacts) -> Symptom | None:
    assert facts.truncated_share is not None
    if facts.truncated_share <= TRUNCATED:
        return None
    return Symptom(numbers(lost_percent=100 * facts.truncated_share, max_position=facts.max_position))


def too_many_unknown(facts: RunFacts) -> Symptom | None:
    assert facts.unk_share is not None
    return Symptom(numbers(unknown_percent=100 * facts.unk_share)) if facts.unk_share > UNKNOWN else None


def subject_overlap(facts: RunFacts) -> Symptom | None:
    shared = facts.shared_subjects
    return Symptom(numbers(shared_patients=shared, val_patients=facts.val_patients)) if shared else None


def training_masks_fixed(facts: RunFacts) -> Symptom | None:
    return Symptom({"masks": "the same in every epoch"}) if facts.training_masks_change is False else None


def validation_masks_change(facts: RunFacts) -> Symptom | None:
    return Symptom({"masks": "drawn anew"}) if facts.validation_masks_fixed is False else None


def recommended_batch_size(facts: RunFacts) -> int:
    """Of the guide: for an A40 with a large model, and for an M1, as which a CPU counts here."""
    return BATCH_ON_CPU if facts.device in ("cpu", "mps") else BATCH_ON_GPU


def too_many_small_batches(facts: RunFacts) -> Symptom | None:
    batches, size = facts.steps_per_epoch, facts.batch_size
    assert batches is not None
    recommended = recommended_batch_size(facts)
    if batches < MANY_BATCHES or (size is not None and size >= recommended):
        return None
    return Symptom(numbers(train_batches=batches, batch_size=size, device=facts.device))


def slow_epochs(facts: RunFacts) -> Symptom | None:
    if facts.device == "cpu":
        return None
    seconds = facts.get("epoch_seconds")
    measured = None if seconds is None or not len(seconds.finite) else float(seconds.finite.values[-1])
    expected = facts.epoch_seconds_predicted if measured is None else measured
    if expected is None or expected <= SLOW_EPOCH_SECONDS:
        return None
    return Symptom(numbers(epoch_minutes=expected / 60, device=facts.device, batch_size=facts.batch_size))
