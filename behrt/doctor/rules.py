"""Which rules are there?"""

from __future__ import annotations

from behrt.doctor.curve_rules import CURVE_RULES
from behrt.doctor.rule import Rule
from behrt.doctor.setup_rules import SETUP_RULES

RULES: tuple[Rule, ...] = (*CURVE_RULES, *SETUP_RULES)

TASK_RULES = tuple(
    rule
    for rule in RULES
    if rule.id
    in (
        "not_finite", "diverged", "overfitting", "no_early_stopping", "patience_spent", "silent_adapters",
        "adapters_on_wrong_layers", "no_gradient", "gradient_not_finite", "out_of_memory",
    )
)  # fmt: skip
"""Those that hold whatever is predicted. The others speak of codes: a task whose loss hardly falls may still be learned
as well as it can be."""
