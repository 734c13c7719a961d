"""What is a rule, and what is a finding?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from behrt.doctor.facts import RunFacts
from behrt.doctor.remedies import Advice, Remedy

Severity = Literal["info", "warning", "error"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")
"""From the mildest on. An error makes learning impossible, or the request meaningless."""

Verdict = Literal[
    "overfitting", "underfitting", "healthy", "stuck_at_chance", "diverged", "unlearnable", "inconclusive"
]

Evidence = Mapping[str, Any]
"""What a rule saw: numbers by name, ready for JSON."""


@dataclass(frozen=True)
class Symptom:
    """What a rule's check returns when it fires.

    Attributes:
        evidence: the numbers.
        severity: where it differs from the rule's own.
    """

    evidence: Evidence
    severity: Severity | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One symptom, how it is seen, and what helps.

    Attributes:
        id: what `--explain` takes.
        severity: of its findings, unless the check says otherwise.
        when: the predicate in words, with its thresholds.
        source: section of the troubleshooting guide, paper, or page of measurements behind it.
        needs: facts and curves without which it cannot be checked.
        check: the predicate; None where the rule does not fire.
        remedies: in order of priority.
        verdict: what a run is called in which it fires; None leaves that to other rules.
        foretells: the same for a run that has not trained an epoch yet; afterwards its curves tell.
    """

    id: str
    title: str
    severity: Severity
    when: str
    source: str
    needs: tuple[str, ...]
    check: Callable[[RunFacts], Symptom | None]
    remedies: tuple[Remedy | Advice, ...] = ()
    verdict: Verdict | None = None
    foretells: Verdict | None = None


@dataclass(frozen=True)
class Finding:
    """A rule that fired on a run."""

    rule: str
    title: str
    severity: Severity
    evidence: Evidence
    remedies: tuple[str, ...]
    verdict: Verdict | None

    def as_dict(self) -> dict[str, Any]:
        """The form of `behrt doctor --json`."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "evidence": dict(self.evidence),
            "remedies": list(self.remedies),
        }


def examine(rule: Rule, facts: RunFacts) -> Finding | None:
    """The finding of one rule whose needs are known; None where it does not fire."""
    symptom = rule.check(facts)
    if symptom is None:
        return None
    texts = [remedy.text(facts) for remedy in rule.remedies]
    return Finding(
        rule=rule.id,
        title=rule.title,
        severity=symptom.severity or rule.severity,
        evidence=symptom.evidence,
        remedies=tuple(text for text in texts if text is not None),
        verdict=rule.verdict if facts.curves else rule.verdict or rule.foretells,
    )
