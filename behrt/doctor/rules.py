"""Which rules are there?"""

from __future__ import annotations

from behrt.doctor.curve_rules import CURVE_RULES
from behrt.doctor.rule import Rule
from behrt.doctor.setup_rules import SETUP_RULES

RULES: tuple[Rule, ...] = (*CURVE_RULES, *SETUP_RULES)
