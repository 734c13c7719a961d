"""Which rules look at parameters, settings, records and machine?

Rules are data: a reader scans this table. What a predicate does exactly stands in `setup_symptoms`; its thresholds are
named there, and shown here.
"""

from __future__ import annotations

from behrt.doctor import readings
from behrt.doctor import setup_symptoms as setup
from behrt.doctor.facts import RunFacts
from behrt.doctor.remedies import (
    Advice,
    Remedy,
    from_random,
    lower_to,
    raise_to,
    set_to,
    simulated,
    smaller_model,
)
from behrt.doctor.rule import Rule
from behrt.metrics import WORTH_HAVING


def encoder_is_frozen(facts: RunFacts) -> bool:
    return facts.freeze_base is True


TRAIN_EMBEDDINGS = Remedy("train_embeddings", set_to(True), "codes must be readable")
TRAIN_HEAD = Remedy("train_head", set_to(True), "codes must be predictable")
START_FROM_A_RUN = Advice("--init-from RUN, to start from a trained model", lambda facts: not facts.pretrained)
LARGER_BATCHES = Remedy(
    "batch_size",
    raise_to(setup.BATCH_ON_GPU, then=256),
    "better use of the GPU",
    lambda facts: setup.recommended_batch_size(facts) == setup.BATCH_ON_GPU,
)
BATCHES_OF_AN_M1 = Remedy(
    "batch_size",
    raise_to(setup.BATCH_ON_CPU),
    "fewer, larger steps",
    lambda facts: setup.recommended_batch_size(facts) == setup.BATCH_ON_CPU,
)

SETUP_RULES: tuple[Rule, ...] = (
    Rule(
        id="too_many_trainable",
        title="Most of the model is trained although LoRA was asked for",
        severity="warning",
        when=f"adapters are there, and more than {setup.MOST_TRAINABLE:.0f}% of the parameters are trainable",
        source="guide, Too Many Trainable Parameters; Check Parameter Counts; LoRA Not Applied Correctly",
        needs=("trainable_percent",),
        check=setup.too_many_trainable,
        remedies=(
            Remedy("freeze_base", lambda current: None if current else True, "only adapters train in the encoder"),
            Remedy(
                "lora_targets",
                lambda current: ("query", "key", "value", "output") if current is None else None,
                "all attention layers",
            ),
            Remedy("train_embeddings", set_to(False), "they are trained already", lambda facts: bool(facts.pretrained)),
            Remedy("train_head", set_to(False), "it is trained already", lambda facts: bool(facts.pretrained)),
            Advice(
                "--no-use-lora: embeddings and head alone are more than half of this model, adapters save little",
                lambda facts: encoder_is_frozen(facts) and not facts.pretrained,
            ),
        ),
    ),
    Rule(
        id="trainable_outside_range",
        title="LoRA on a pre-trained base trains an unusual share",
        severity="warning",
        when=f"adapters on a pre-trained base, and trainable parameters below {setup.LEAST_OF_PRETRAINED:.0f}% "
        f"or above {setup.MOST_OF_PRETRAINED:.0f}%",
        source="guide, Check Parameter Counts: expected ranges",
        needs=("trainable_percent", "pretrained"),
        check=setup.trainable_outside_range,
        remedies=(
            Remedy(
                "train_embeddings",
                set_to(False),
                "they are trained already",
                lambda facts: (facts.trainable_percent or 0) > setup.MOST_OF_PRETRAINED and not facts.new_codes,
            ),
            Remedy(
                "train_head",
                set_to(False),
                "it is trained already",
                lambda facts: (facts.trainable_percent or 0) > setup.MOST_OF_PRETRAINED and not facts.new_codes,
            ),
            Remedy(
                "lora_rank",
                raise_to(32),
                "more trainable parameters",
                lambda facts: (facts.trainable_percent or 0) < setup.LEAST_OF_PRETRAINED,
            ),
            Remedy(
                "lora_rank",
                lambda current: None if current is None or current < 2 else current // 2,
                "fewer trainable parameters",
                lambda facts: (facts.trainable_percent or 0) > setup.MOST_OF_PRETRAINED,
            ),
            Advice(
                "adapt more layers: --lora-targets query,key,value,output,feedforward",
                lambda facts: (facts.trainable_percent or 0) < setup.LEAST_OF_PRETRAINED,
            ),
        ),
    ),
    Rule(
        id="frozen_random_embeddings",
        title="The embeddings are random and frozen",
        severity="error",
        when="they are not trained and no pre-trained run gave them; a warning where it gave all but some codes",
        source="guide, Embeddings and MLM Head Were Frozen (Critical Bug!)",
        needs=("train_embeddings", "pretrained"),
        check=setup.frozen_random_embeddings,
        remedies=(TRAIN_EMBEDDINGS, START_FROM_A_RUN),
        foretells="unlearnable",
    ),
    Rule(
        id="frozen_random_head",
        title="The head is random and frozen",
        severity="error",
        when="it is not trained and no pre-trained run gave it; a warning where it gave all but some codes",
        source="guide, Embeddings and MLM Head Were Frozen (Critical Bug!)",
        needs=("train_head", "pretrained"),
        check=setup.frozen_random_head,
        remedies=(TRAIN_HEAD, START_FROM_A_RUN),
        foretells="unlearnable",
    ),
    Rule(
        id="lora_on_random_encoder",
        title="LoRA adapts an encoder that stays random",
        severity="info",
        when="adapters on a frozen base that no pre-trained run gave; measured on the simulated cohort, this "
        "closes as much of the gap as full training within ten epochs",
        source="docs/learning.md: LoRA on a random base, or everything?",
        needs=("use_lora", "pretrained"),
        check=setup.lora_on_random_encoder,
        remedies=(START_FROM_A_RUN, Advice("--no-use-lora, to train everything")),
    ),
    Rule(
        id="silent_adapters",
        title="Adapters do not act",
        severity="error",
        when="changing an adapter leaves the output as it is, or no gradient reaches it",
        source="Hu et al., 2021; nn.MultiheadAttention reads the weight of its output projection without calling it",
        needs=("silent_adapters",),
        check=setup.silent_adapters,
        remedies=(
            Advice(
                "put adapters on layers whose forward is called; `behrt.apply_lora_to_behrt` does on its own models"
            ),
        ),
        foretells="unlearnable",
    ),
    Rule(
        id="adapters_on_wrong_layers",
        title="Adapters sit on the wrong layers",
        severity="warning",
        when="there are none although LoRA was asked for, or some targets have none, or some sit outside the "
        "encoder's layers (errors); or they sit on `self_attn.out_proj`, which nn.MultiheadAttention never "
        "calls",
        source="guide, LoRA Not Applied Correctly; counts cannot show it",
        needs=("adapted_layers",),
        check=setup.adapters_on_wrong_layers,
        remedies=(
            Remedy("lora_targets", set_to(("query", "key", "value", "output")), "all attention layers"),
            Advice("prove that they act: train with `behrt train --use-lora`, whose pre-flight changes each of them"),
        ),
    ),
    Rule(
        id="no_gradient",
        title="Trainable parameters get no gradient",
        severity="error",
        when="after the first batch a trainable parameter has none, or one of zeros that should not be",
        source="what is counted as trained must be trained",
        needs=("without_gradient",),
        check=setup.without_gradient,
        remedies=(
            Advice("look for `detach`, `no_grad` or an unused module on the way from this parameter to the loss"),
        ),
        foretells="unlearnable",
    ),
    Rule(
        id="gradient_not_finite",
        title="The first gradient is NaN or infinite",
        severity="error",
        when="before the first step, on the first batch, any element of any gradient is not finite",
        source="guide, If Training is Unstable (Loss spikes, NaN)",
        needs=("gradient_not_finite",),
        check=setup.gradient_not_finite,
        remedies=(Advice("look for weights that are not finite: in the run of --init-from, or in own layers"),),
        foretells="unlearnable",
    ),
    Rule(
        id="weak_regularisation",
        title="A large model with weak regularisation",
        severity="warning",
        when="model size large with dropout below 0.2 or without weight decay",
        source="guide, Insufficient Regularization; Summary: How to Fix",
        needs=("model_size", "dropout|weight_decay"),
        check=setup.weak_regularisation,
        remedies=(
            Remedy("dropout", raise_to(0.2), "0.1 is too weak for a large model"),
            Remedy("weight_decay", raise_to(0.01), "penalises large weights"),
            Remedy("early_stopping_patience", lambda current: 10 if not current else None, "stops in time"),
        ),
    ),
    Rule(
        id="nothing_to_learn",
        title="The records hold nothing to learn",
        severity="error",
        when="a patient's other codes predict a masked code no better than counting does: the 95% interval of "
        f"the gain does not lie above 0, and ends below {WORTH_HAVING:g} nats per masked code; and no model has "
        "beaten counting on them",
        source="guide, Synthetic Data Overfitting; checked against the exact floor in docs/doctor.md",
        needs=("cooccurrence_gain_low", "cooccurrence_gain_high"),
        check=setup.nothing_to_learn,
        remedies=(
            Remedy("structure", set_to("hmm"), "a cohort with something to learn", simulated),
            Advice("no flag helps: prepare other records, or coarser codes (`behrt prepare --icd-digits 3`)"),
            Advice(
                "prepare more patients: with a few hundred, a weak tie between codes cannot be told from none",
                lambda facts: (facts.train_patients or 0) < 1000,
            ),
        ),
        verdict="unlearnable",
    ),
    Rule(
        id="small_validation_set",
        title="The validation set is small",
        severity="warning",
        when=f"fewer than {readings.FEW_PATIENTS} patients; evidence: the 95% interval (Wilson, 1927) of the "
        "accuracy over its scored codes, or over its patients where their number is not known",
        source="guide, Validation Set Too Small: Rule of Thumb",
        needs=("val_patients",),
        check=setup.small_validation_set,
        remedies=(
            Remedy("num_patients", raise_to(5000), "a tenth of them validates", simulated),
            Advice(
                "prepare more patients, or, of a source without splits, a larger tuning share: --split 70/20/10",
                lambda facts: not simulated(facts) or (facts.num_patients or 0) >= 5000,
            ),
        ),
    ),
    Rule(
        id="truncation",
        title="Long histories lose tokens",
        severity="warning",
        when=f"more than {setup.TRUNCATED:.0%} of the training tokens lie beyond the longest sequence",
        source="what lies beyond the last position the model never sees; --max-position auto stops at 512",
        needs=("truncated_share",),
        check=setup.truncation,
        remedies=(Remedy("max_position", raise_to(512, then=1024), "room for longer histories"),),
    ),
    Rule(
        id="too_many_unknown",
        title="Many codes are [UNK]",
        severity="warning",
        when=f"more than {setup.UNKNOWN:.0%} of the training tokens",
        source="[UNK] is never scored and carries no meaning",
        needs=("unk_share",),
        check=setup.too_many_unknown,
        remedies=(
            Remedy("num_patients", raise_to(5000, then=10_000), "more codes reach enough patients", simulated),
            Advice("prepare coarser codes: `behrt prepare --icd-digits 3`", lambda facts: not simulated(facts)),
            Advice(
                "prepare more patients, so that more codes reach --min-patients", lambda facts: not simulated(facts)
            ),
        ),
    ),
    Rule(
        id="subject_overlap",
        title="Patients are in training and in validation",
        severity="error",
        when="any: validation then rewards memory",
        source="splits are by patient",
        needs=("shared_subjects",),
        check=setup.subject_overlap,
        remedies=(Advice("prepare the records again: `behrt prepare` splits by patient"),),
    ),
    Rule(
        id="training_masks_fixed",
        title="Training masks do not change between epochs",
        severity="warning",
        when="two epochs mask the same tokens of the same patients",
        source="Liu et al., 2019, RoBERTa: dynamic masking",
        needs=("training_masks_change",),
        check=setup.training_masks_fixed,
        remedies=(Advice("draw the masks anew at every step, as `behrt.masking` does"),),
    ),
    Rule(
        id="validation_masks_change",
        title="Validation masks change between epochs",
        severity="warning",
        when="two drawings of the validation set differ: its losses do not compare",
        source="validation losses are compared across epochs, runs and trials",
        needs=("validation_masks_fixed",),
        check=setup.validation_masks_change,
        remedies=(Advice("draw the validation masks once, from a constant seed"),),
    ),
    Rule(
        id="too_many_small_batches",
        title="An epoch has many small batches",
        severity="warning",
        when=f"{setup.MANY_BATCHES} steps an epoch or more, of fewer than {setup.BATCH_ON_GPU} patients "
        f"({setup.BATCH_ON_CPU} on a CPU or MPS)",
        source="guide, Batch Size Too Small",
        needs=("steps_per_epoch",),
        check=setup.too_many_small_batches,
        remedies=(LARGER_BATCHES, BATCHES_OF_AN_M1),
    ),
    Rule(
        id="slow_epochs",
        title="Epochs are slow",
        severity="warning",
        when=f"more than {setup.SLOW_EPOCH_SECONDS / 60:.0f} minutes an epoch, measured or predicted, on a "
        "device that is no CPU",
        source="guide, Monitor Training Speed: >10 min/epoch on A40",
        needs=("epoch_seconds|epoch_seconds_predicted",),
        check=setup.slow_epochs,
        remedies=(
            LARGER_BATCHES,
            Advice("see that the GPU is the one that computes, with --precision bf16 where it can"),
        ),
    ),
    Rule(
        id="out_of_memory",
        title="Memory does not suffice",
        severity="error",
        when=f"the run ended for want of memory; or the estimate exceeds {setup.FULL_MEMORY:.0%} of what is free "
        f"(a warning), or {setup.HOPELESS_MEMORY:g} times it (an error)",
        source="guide, Monitor Training Speed: OOM errors; Interaction Matrix",
        needs=("out_of_memory|memory_needed",),
        check=setup.out_of_memory,
        remedies=(
            Remedy("batch_size", lambda current: 64 if current is None else max(current // 2, 1), "reduces memory"),
            Remedy(
                "accumulation_steps",
                lambda current: 2 * (current or 1),
                "the same step in smaller parts",
                lambda facts: 2 * (facts.accumulation_steps or 1) <= (facts.batch_size or 64) // 2,
            ),
            Remedy("model_size", smaller_model, "a smaller model", from_random),
            Remedy("max_position", lower_to(256), "shorter histories"),
        ),
    ),
)
