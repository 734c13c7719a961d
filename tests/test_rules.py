"""Does every rule fire on its symptom, and stay silent beside it?"""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from behrt.config import SECTION_OF
from behrt.doctor.curves import Curve
from behrt.doctor.diagnosis import diagnose
from behrt.doctor.explain import explain, rule_rows, rules_page
from behrt.doctor.facts import FACT_NAMES, RunFacts
from behrt.doctor.remedies import Remedy
from behrt.doctor.rule import Rule
from behrt.doctor.rules import RULES
from behrt.history import EPOCH_FIGURES

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """Facts and curves in which a rule fires, and what makes it silent."""

    facts: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    silent_facts: dict[str, Any] = field(default_factory=dict)
    silent_curves: dict[str, list[float]] = field(default_factory=dict)


FALLING = [7.0, 6.5, 6.1, 5.8, 5.6, 5.5]
RISING = [6.9, 6.6, 6.4, 6.5, 6.7, 6.9]
FLAT = [6.91, 6.90, 6.91, 6.90, 6.91, 6.90]
SLOW = [6.90, 6.87, 6.84, 6.81, 6.78, 6.75]

CASES = {
    "not_finite": Case(curves={"train_loss": [7.0, NAN]}, silent_curves={"train_loss": [7.0, 6.9]}),
    "diverged": Case(curves={"train_loss": [7.0, 9.0, 9.5, 9.1, 9.2]}, silent_curves={"train_loss": FALLING}),
    "stuck_at_chance": Case(curves={"val_loss": FLAT}, silent_curves={"val_loss": FALLING}),
    "overfitting": Case(
        curves={"train_loss": FALLING, "val_loss": RISING}, silent_curves={"train_loss": FALLING, "val_loss": FALLING}
    ),
    "widening_gap": Case(
        curves={"train_loss": [7.0, 6.5, 6.0, 5.5, 5.0, 4.5], "val_loss": FLAT},
        silent_curves={"train_loss": [7.0, 6.5, 6.0, 5.5, 5.0, 4.5], "val_loss": [6.9, 6.5, 6.1, 5.8, 5.5, 5.3]},
    ),
    "accuracy_gap": Case(
        curves={"train_accuracy": [0.5], "val_accuracy": [0.29]},
        silent_curves={"train_accuracy": [0.5], "val_accuracy": [0.31]},
    ),
    "low_val_accuracy": Case(
        curves={"train_accuracy": [0.10], "val_accuracy": [0.019]},
        silent_curves={"train_accuracy": [0.10], "val_accuracy": [0.021]},
    ),
    "underfitting": Case(curves={"val_loss": SLOW}, silent_curves={"val_loss": FALLING}),
    "healthy": Case(curves={"val_loss": FALLING}, silent_curves={"val_loss": FLAT}),
    "learning_rate_too_high": Case(facts={"lr": 0.01}, silent_facts={"lr": 0.003}),
    "learning_rate_too_low": Case(
        curves={"train_loss": [7.00, 6.99, 6.98, 6.97, 6.96, 6.95]}, silent_curves={"train_loss": SLOW}
    ),
    "slow_convergence": Case(
        curves={"val_loss": SLOW}, silent_curves={"val_loss": [6.9, 6.7, 6.68, 6.68, 6.68, 6.68]}
    ),
    "loss_spikes": Case(
        curves={"train_loss": [7.0, 6.5, 9.0, 6.1, 5.9, 5.8]}, silent_curves={"train_loss": FALLING}
    ),
    "too_little_to_judge": Case(curves={"train_loss": FALLING}, silent_curves={"val_loss": FALLING}),
    "noisy_validation": Case(
        curves={"val_loss": FLAT}, silent_curves={"val_loss": FLAT}, silent_facts={"val_patients": 500}
    ),
    "no_early_stopping": Case(facts={"early_stopping_patience": 0}, silent_facts={"early_stopping_patience": 1}),
    "patience_spent": Case(
        facts={"stopped_early": True}, curves={"val_loss": RISING}, silent_facts={"stopped_early": False},
        silent_curves={"val_loss": RISING},
    ),
    "too_many_trainable": Case(
        facts={"use_lora": True, "trainable_percent": 50.1}, silent_facts={"use_lora": True, "trainable_percent": 49.9}
    ),
    "trainable_outside_range": Case(
        facts={"use_lora": True, "pretrained": True, "trainable_percent": 10.1},
        silent_facts={"use_lora": True, "pretrained": True, "trainable_percent": 9.9},
    ),
    "frozen_random_embeddings": Case(
        facts={"train_embeddings": False, "pretrained": False},
        silent_facts={"train_embeddings": False, "pretrained": True},
    ),
    "frozen_random_head": Case(
        facts={"train_head": False, "pretrained": False}, silent_facts={"train_head": False, "pretrained": True}
    ),
    "lora_on_random_encoder": Case(
        facts={"use_lora": True, "pretrained": False}, silent_facts={"use_lora": True, "pretrained": True}
    ),
    "silent_adapters": Case(facts={"silent_adapters": ("layers.0.query",)}, silent_facts={"silent_adapters": ()}),
    "adapters_on_wrong_layers": Case(
        facts={"adapted_layers": ("encoder.layers.0.self_attn.out_proj",)},
        silent_facts={"adapted_layers": ("encoder.layers.0.attention.output",), "missing_adapters": 0},
    ),
    "no_gradient": Case(facts={"without_gradient": ("head.decoder.bias",)}, silent_facts={"without_gradient": ()}),
    "gradient_not_finite": Case(
        facts={"gradient_not_finite": ("head.decoder.bias",)}, silent_facts={"gradient_not_finite": ()}
    ),
    "weak_regularisation": Case(
        facts={"model_size": "large", "dropout": 0.1}, silent_facts={"model_size": "large", "dropout": 0.2}
    ),
    "nothing_to_learn": Case(
        facts={"cooccurrence_gain_low": -0.001, "cooccurrence_gain_high": 0.019},
        silent_facts={"cooccurrence_gain_low": -0.001, "cooccurrence_gain_high": 0.021},
    ),
    "small_validation_set": Case(facts={"val_patients": 499}, silent_facts={"val_patients": 500}),
    "truncation": Case(facts={"truncated_share": 0.051}, silent_facts={"truncated_share": 0.049}),
    "too_many_unknown": Case(facts={"unk_share": 0.11}, silent_facts={"unk_share": 0.09}),
    "subject_overlap": Case(facts={"shared_subjects": 1}, silent_facts={"shared_subjects": 0}),
    "training_masks_fixed": Case(facts={"training_masks_change": False}, silent_facts={"training_masks_change": True}),
    "validation_masks_change": Case(
        facts={"validation_masks_fixed": False}, silent_facts={"validation_masks_fixed": True}
    ),
    "too_many_small_batches": Case(
        facts={"steps_per_epoch": 200, "batch_size": 64}, silent_facts={"steps_per_epoch": 200, "batch_size": 128}
    ),
    "slow_epochs": Case(
        facts={"device": "cuda"}, curves={"epoch_seconds": [601.0]}, silent_facts={"device": "cpu"},
        silent_curves={"epoch_seconds": [601.0]},
    ),
    "out_of_memory": Case(
        facts={"memory_needed": 95, "memory_available": 100},
        silent_facts={"memory_needed": 85, "memory_available": 100},
    ),
}  # fmt: skip

BY_ID = {rule.id: rule for rule in RULES}


def remedies_in_general(rule: Rule) -> list[str]:
    """The remedies of a rule for a run of which nothing is known."""
    return [text for remedy in rule.remedies if (text := remedy.text(RunFacts())) is not None]


def rules_found(facts: dict[str, Any], curves: dict[str, list[float]]) -> set[str]:
    drawn = {name: Curve.of(enumerate(values, 1)) for name, values in curves.items()}
    return {finding.rule for finding in diagnose(RunFacts(curves=drawn, finished=True, **facts)).findings}


def test_every_rule_has_a_case_and_a_name_of_its_own() -> None:
    assert list(CASES) == [rule.id for rule in RULES]
    assert len(BY_ID) == len(RULES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_fires_on_its_symptom(name: str) -> None:
    assert name in rules_found(CASES[name].facts, CASES[name].curves)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_silent_without_its_symptom(name: str) -> None:
    case = CASES[name]
    assert name not in rules_found(case.silent_facts, case.silent_curves)
    drawn = {name: Curve.of(enumerate(values, 1)) for name, values in case.silent_curves.items()}
    silent = diagnose(RunFacts(curves=drawn, finished=True, **case.silent_facts))
    assert name not in {skipped.rule for skipped in silent.not_checked}  # it was checked, and found nothing


def test_the_rounding_of_sums_is_no_jitter() -> None:
    jitter = [1, -1, 1, -1, 1, -1]
    for size, fires in ((3e-3, True), (3e-6, False)):
        found = rules_found({"val_patients": 30}, {"val_loss": [6.0 + size * sign for sign in jitter]})
        assert ("noisy_validation" in found) is fires


@pytest.mark.parametrize("name", CASES)
def test_a_rule_without_its_facts_is_listed_as_not_checked(name: str) -> None:
    diagnosis = diagnose(RunFacts())
    expected = bool(BY_ID[name].needs)
    assert (name in {skipped.rule for skipped in diagnosis.not_checked}) is expected
    assert diagnosis.findings == ()


def test_rules_name_facts_and_settings_that_exist() -> None:
    for rule in RULES:
        for need in rule.needs:
            assert set(need.split("|")) <= FACT_NAMES | set(EPOCH_FIGURES), rule.id
        for remedy in rule.remedies:
            if isinstance(remedy, Remedy):
                assert remedy.setting in SECTION_OF, rule.id
                assert remedy.setting in FACT_NAMES, rule.id


def test_every_remedy_is_a_flag_that_the_train_command_takes() -> None:
    from behrt.cli import train

    flags = {name for option in train.params for name in (*option.opts, *option.secondary_opts)}
    for rule in RULES:
        for text in remedies_in_general(rule):
            if text.startswith("--"):
                assert re.match(r"--[a-z-]+", text)[0] in flags | {"--split"}, (rule.id, text)


def test_a_remedy_that_is_in_force_already_goes_one_step_further_or_is_left_out() -> None:
    overfitted = {"train_loss": FALLING, "val_loss": RISING}
    drawn = {name: Curve.of(enumerate(values, 1)) for name, values in overfitted.items()}
    facts = RunFacts(
        curves=drawn, dropout=0.3, weight_decay=0.1, early_stopping_patience=5, use_lora=False, model_size="small",
        num_patients=20_000,
    )  # fmt: skip
    assert diagnose(facts).findings[0].remedies == ("--dropout 0.3 → 0.4", "train on more patients")


def test_patients_are_no_flag_where_records_are_prepared() -> None:
    remedies = diagnose(RunFacts(val_patients=10, data="data/mine")).findings[0].remedies
    assert not any(text.startswith("--num-patients") for text in remedies)
    assert remedies


def test_no_remedy_is_a_flag_that_the_run_could_not_take() -> None:
    overfitted = {name: Curve.of(enumerate(v, 1)) for name, v in {"train_loss": FALLING, "val_loss": RISING}.items()}
    pretrained = diagnose(RunFacts(curves=overfitted, pretrained=True, model_size="large")).findings[0].remedies
    assert not any(text.startswith("--model-size") for text in pretrained)  # the shape is that of --init-from
    some = diagnose(RunFacts(curves=overfitted, max_patients=500, num_patients=5000)).findings[0].remedies
    assert "--max-patients 500 → 1000" in some
    assert not any(text.startswith("--num-patients") for text in some)
    full = diagnose(RunFacts(out_of_memory=True, batch_size=32, accumulation_steps=32)).findings[0].remedies
    assert full[0] == "--batch-size 32 → 16"
    assert not any(text.startswith("--accumulation-steps") for text in full)


def test_an_m1_is_not_told_the_batch_size_of_an_a40() -> None:
    assert "too_many_small_batches" not in rules_found({"steps_per_epoch": 250, "batch_size": 16, "device": "mps"}, {})
    found = diagnose(RunFacts(steps_per_epoch=250, batch_size=8, device="mps")).findings
    assert found[0].remedies == ("--batch-size 8 → 16",)


def test_an_explanation_says_when_why_and_what_helps() -> None:
    for rule in RULES:
        text = explain(rule)
        assert rule.id in text
        assert rule.title in text
        assert "- When: " in text
        assert "- Source: " in text
        assert all(remedy in text for remedy in remedies_in_general(rule))


def test_the_list_and_the_page_hold_every_rule_errors_first() -> None:
    rows = rule_rows()
    assert len(rows) == len(RULES)
    severities = [row.split()[1] for row in rows]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    page = rules_page()
    assert all(f"### {rule.id}\n" in page for rule in RULES)


def test_lora_alone_decides_whether_a_large_trainable_share_is_a_finding() -> None:
    assert "too_many_trainable" not in rules_found({"use_lora": False, "trainable_percent": 92.3}, {})
    assert "too_many_trainable" in rules_found({"trainable_percent": 92.3}, {})
    assert "too_many_trainable" not in rules_found({"trainable_percent": 100.0}, {})


def test_a_frozen_table_that_lacks_some_codes_of_a_pretrained_run_is_a_warning() -> None:
    facts = RunFacts(train_embeddings=False, train_head=True, pretrained=True, new_codes=3, shared_codes=900)
    (finding,) = [found for found in diagnose(facts).findings if found.rule == "frozen_random_embeddings"]
    assert (finding.severity, finding.evidence["new_codes"]) == ("warning", 3)


def test_before_the_first_epoch_a_model_that_cannot_learn_is_called_unlearnable() -> None:
    frozen = {"train_embeddings": False, "pretrained": False}
    assert diagnose(RunFacts(**frozen)).verdict == "unlearnable"
    curve = Curve.of(enumerate(FLAT, 1))
    assert diagnose(RunFacts(**frozen, curves={"val_loss": curve}, finished=True)).verdict == "stuck_at_chance"
