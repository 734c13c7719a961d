"""What is wrong with a run, what helps, and what could not be checked?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from behrt.doctor.facts import RunFacts, completed
from behrt.doctor.rule import SEVERITIES, Finding, Rule, Severity, Verdict, examine
from behrt.doctor.rules import RULES, TASK_RULES

VERDICTS: tuple[Verdict, ...] = (
    "diverged",
    "unlearnable",
    "stuck_at_chance",
    "overfitting",
    "underfitting",
    "healthy",
    "inconclusive",
)
"""What names a run when several findings would: the cause before its consequences."""


@dataclass(frozen=True)
class NotChecked:
    """A rule that could not be checked, and the facts that it lacks."""

    rule: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """All that the rules say of a run.

    Attributes:
        verdict: one word for the run.
        findings: what gives the verdict first, then by severity.
        not_checked: rules whose facts are not known.
    """

    verdict: Verdict
    findings: tuple[Finding, ...]
    not_checked: tuple[NotChecked, ...]

    @property
    def severity(self) -> Severity:
        """That of the worst finding; `info` where there is none."""
        return max((finding.severity for finding in self.findings), key=SEVERITIES.index, default="info")

    def of_severity(self, severity: Severity) -> list[Finding]:
        """The findings of exactly that severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    def as_dict(self) -> dict[str, Any]:
        """The form of `behrt doctor --json` and `diagnosis.json`."""
        return {
            "verdict": self.verdict,
            "findings": [finding.as_dict() for finding in self.findings],
            "not_checked": [{"rule": skipped.rule, "missing": list(skipped.missing)} for skipped in self.not_checked],
        }


def missing_facts(rule: Rule, facts: RunFacts) -> tuple[str, ...]:
    """What a rule needs and is not known; `a|b` needs one of the two."""
    return tuple(
        need.replace("|", " or ")
        for need in rule.needs
        if all(facts.get(name) is None for name in need.split("|"))
    )  # fmt: skip


def diagnose(facts: RunFacts) -> Diagnosis:
    """Checks every rule whose facts are known.

    >>> from behrt.doctor.curves import Curve
    >>> losses = {"train_loss": [7.0, 6.5, 6.0, 5.5], "val_loss": [6.95, 6.48, 6.55, 6.8]}
    >>> curves = {name: Curve.of(zip((1, 5, 10, 15), values)) for name, values in losses.items()}
    >>> diagnosis = diagnose(RunFacts(curves=curves, dropout=0.1))
    >>> diagnosis.verdict, diagnosis.findings[0].remedies[0]
    ('overfitting', '--dropout 0.1 → 0.3')
    """
    facts = completed(facts)
    findings, not_checked = [], []
    for rule in RULES if facts.task is None else TASK_RULES:
        if missing := missing_facts(rule, facts):
            not_checked.append(NotChecked(rule.id, missing))
        elif finding := examine(rule, facts):
            findings.append(finding)
    named = {finding.verdict for finding in findings}
    verdict: Verdict = next((verdict for verdict in VERDICTS if verdict in named), "inconclusive")
    findings.sort(key=lambda finding: (finding.verdict != verdict, -SEVERITIES.index(finding.severity)))
    return Diagnosis(verdict, tuple(findings), tuple(not_checked))


def evidence_text(evidence: Mapping[str, Any]) -> str:
    """Evidence for people.

    >>> evidence_text({"val_loss": 6.8, "near": "chance", "fall_percent": 2.41})
    'val loss 6.8, near chance, fall 2.4%'
    """
    return ", ".join(
        f"{name.removesuffix('_percent').replace('_', ' ')} {value:.1f}%"
        if name.endswith("_percent") and isinstance(value, float)
        else f"{name.replace('_', ' ')} {_shown(value)}"
        for name, value in evidence.items()
    )


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(diagnosis: Diagnosis) -> str:
    """`diagnosis.md`."""
    lines = [f"# Diagnosis: {diagnosis.verdict}", ""]
    if not diagnosis.findings:
        lines += ["Nothing found.", ""]
    for finding in diagnosis.findings:
        lines += [
            f"## {finding.title}",
            "",
            f"`{finding.rule}` ({finding.severity}): {evidence_text(finding.evidence)}.",
            "",
        ]
        lines += [
            f"{number}. {f'`{text}`' if text.startswith('--') else text}"
            for number, text in enumerate(finding.remedies, 1)
        ]
        lines += [""] if finding.remedies else []
    if diagnosis.not_checked:
        lines += ["## Not checked", ""]
        lines += [f"- `{skipped.rule}`: not known: {', '.join(skipped.missing)}" for skipped in diagnosis.not_checked]
        lines.append("")
    return "\n".join(lines)
