"""What does a rule say to a person?

For `behrt doctor --list` and `--explain`, and the page of rules in `docs/`.
"""

from __future__ import annotations

from behrt.config import UserError, nearest
from behrt.doctor.facts import RunFacts
from behrt.doctor.remedies import Remedy
from behrt.doctor.rule import SEVERITIES, Rule
from behrt.doctor.rules import RULES

NOTHING_KNOWN = RunFacts()

INTRODUCTION = """# The rules of the doctor

Written by `python experiments/doctor/measure.py report`; `behrt doctor --list` and `--explain RULE` print the same.
An *error* makes learning impossible or the request meaningless: the pre-flight refuses to train, and a run in progress
is ended. *Guide* is the troubleshooting guide that the project began with."""


def rule_named(name: str) -> Rule:
    """The rule of that id. Raises `UserError`, with the nearest one, where there is none."""
    by_id = {rule.id: rule for rule in RULES}
    if name not in by_id:
        raise UserError(f"--explain: no rule {name!r}{nearest(name, list(by_id))}")
    return by_id[name]


def explain(rule: Rule) -> str:
    """All that a rule says, as Markdown."""
    lines = [f"### {rule.id}", "", f"**{rule.title}** ({rule.severity})", ""]
    lines += [
        f"- When: {rule.when}.",
        f"- Needs: {', '.join(need.replace('|', ' or ') for need in rule.needs) or '—'}.",
    ]
    if rule.verdict is not None:
        lines.append(f"- Verdict: `{rule.verdict}`.")
    if rule.foretells is not None:
        lines.append(f"- Verdict before the first epoch: `{rule.foretells}`.")
    lines.append(f"- Source: {rule.source}.")
    helpful = [(remedy, text) for remedy in rule.remedies if (text := remedy.text(NOTHING_KNOWN)) is not None]
    if helpful:
        lines.append("- What helps, in this order:")
    for number, (remedy, text) in enumerate(helpful, 1):
        lines.append(f"  {number}. " + (f"`{text}`: {remedy.why}" if isinstance(remedy, Remedy) else text))
    return "\n".join(lines)


def rule_rows() -> list[str]:
    """A line a rule, the most severe first: id, severity, title."""
    width = max(len(rule.id) for rule in RULES)
    return [f"{rule.id:<{width}}  {rule.severity:<7}  {rule.title}" for rule in by_severity()]


def by_severity() -> list[Rule]:
    """All rules, the most severe first."""
    return sorted(RULES, key=lambda rule: -SEVERITIES.index(rule.severity))


def rules_page() -> str:
    """`docs/rules.md`: every rule, the most severe first."""
    ordered = by_severity()
    table = ["| rule | severity | what it means |", "|---|---|---|"]
    table += [f"| [{rule.id}](#{rule.id}) | {rule.severity} | {rule.title} |" for rule in ordered]
    return "\n\n".join([INTRODUCTION, "\n".join(table), *map(explain, ordered)]) + "\n"
