"""Which codes mean one thing, as a disease?

A file of code sets is YAML: a name, and a list of codes, or of what codes begin with before `*`.

    heart_failure: [ICD9CM//428*, ICD9CM//40201, ICD10CM//I50*]

Coding systems have other names in other data sets: `ICD9CM//`, `ICD10CM//`, `ICD9Proc//` and `ICD10PCS//` stand for all
of theirs (`SYSTEMS`), and dots inside these codes do not count, neither in the file nor in the records.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl
import yaml

from behrt.config import UserError, refuse_what_is_no_file

SYSTEMS = {
    "ICD9CM": ("ICD9CM", "DX//ICD9CM", "DIAGNOSIS//ICD//9"),
    "ICD10CM": ("ICD10CM", "DX//ICD10CM", "DIAGNOSIS//ICD//10"),
    "ICD9Proc": ("ICD9Proc", "PROC//ICD9PCS", "PROCEDURE//ICD//9"),
    "ICD10PCS": ("ICD10PCS", "PROC//ICD10PCS", "PROCEDURE//ICD//10"),
}
"""What stands before a code: in these files, and in records of MIMIC-IV's own tables, of SynPUF, of MIMIC as MEDS."""

_SYSTEM_OF = {f"{called}//": f"{name}//" for name, names in SYSTEMS.items() for called in names}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,59}")


class CodeSets(Mapping[str, tuple[str, ...]]):
    """Code sets by name, in the order of the file.

    >>> sets = CodeSets({"diabetes": ("ICD9CM//250*",), "either": ("ICD10CM//E11.9", "ICD9CM//250*")})
    >>> sets.names_of("DX//ICD9CM//25000"), sets.names_of("ICD10CM//E119"), sets.names_of("ICD10CM//E1191")
    (('diabetes', 'either'), ('either',), ())
    """

    def __init__(self, sets: Mapping[str, tuple[str, ...]]) -> None:
        self._sets = dict(sets)
        self._codes: dict[str, list[str]] = {}
        self._prefixes: dict[str, list[str]] = {}
        for name, patterns in self._sets.items():
            for pattern in patterns:
                is_prefix = pattern.endswith("*")
                found = self._prefixes if is_prefix else self._codes
                names = found.setdefault(_canonical(pattern.removesuffix("*")), [])
                if name not in names:
                    names.append(name)
        self._lengths = sorted({len(prefix) for prefix in self._prefixes})

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self._sets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def only(self, names: tuple[str, ...], where: str) -> CodeSets:
        """Those with these names. Raises `UserError` for a name that there is not."""
        for name in names:
            if name not in self._sets:
                raise UserError(f"{where}: no code set {name!r}; it has {', '.join(self._sets)}")
        return CodeSets({name: patterns for name, patterns in self._sets.items() if name in names})

    def names_of(self, code: str) -> tuple[str, ...]:
        """The names of the sets that a code belongs to, in their order."""
        found: set[str] = set()
        for written in {code, _canonical(code)}:  # as it is, too: a prefix may end above the system, as `DIAGNOSIS//*`
            found.update(self._codes.get(written, ()))
            for length in self._lengths:
                if length > len(written):
                    break
                found.update(self._prefixes.get(written[:length], ()))
        return tuple(name for name in self._sets if name in found) if found else ()

    def occurrences(self, events: pl.DataFrame) -> pl.DataFrame:
        """`subject_id`, `time` and `name` of each event in a set, an event in two sets twice; distinct, sorted.

        Args:
            events: with `subject_id`, `time`, `code`.
        """
        found = self.coded(events).select("subject_id", "time", "name")
        return found.unique().sort("subject_id", "time", "name")

    def coded(self, events: pl.DataFrame) -> pl.DataFrame:
        """The events in a set, with the `name` of the set, an event in two sets twice."""
        of_code = [(code, name) for code in events["code"].unique().to_list() for name in self.names_of(code)]
        table = pl.DataFrame(of_code, schema={"code": pl.String, "name": pl.String}, orient="row")
        return events.join(table, on="code", how="inner", maintain_order="left_right")


def _canonical(code: str) -> str:
    """The code under the system's first name and without dots; of another system, as it is."""
    for called, name in _SYSTEM_OF.items():
        if code.startswith(called):
            return name + code[len(called) :].replace(".", "")
    return code


def read_code_sets(path: Path) -> CodeSets:
    """The code sets of a YAML file.

    Raises:
        UserError: names file and line, but quotes no line: it might be a table of records.
    """
    refuse_what_is_no_file(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected code sets in YAML") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise UserError(f"{path}{line}: is no YAML; expected `name: [code, prefix*, …]`") from None
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise UserError(f"{path}: expected code sets, `name: [code, prefix*, …]`, one a line")
    sets: dict[str, tuple[str, ...]] = {}
    for key, value in root.value:
        where = f"{path}, line {key.start_mark.line + 1}"
        if not (isinstance(key, yaml.ScalarNode) and _NAME.fullmatch(key.value)):
            raise UserError(f"{where}: the name of a code set is a letter, then letters, digits and _, at most 60")
        if key.value in sets:
            raise UserError(f"{where}: a second code set {key.value!r}; join the two")
        if not isinstance(value, yaml.SequenceNode) or not value.value:
            raise UserError(f"{where}: {key.value}: expected a list of codes, [code, prefix*, …]")
        sets[key.value] = tuple(_pattern(node, f"{path}, line {node.start_mark.line + 1}") for node in value.value)
    return CodeSets(sets)


def _pattern(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{where}: expected a code, found a list or a mapping; lists of codes do not nest")
    if node.tag != "tag:yaml.org,2002:str":
        raise UserError(f"{where}: expected a code, found a number or another value; put it into quotes")
    text = str(node.value).strip()
    if not text.removesuffix("*"):
        raise UserError(f"{where}: expected a code or prefix*, found none")
    if "*" in text[:-1]:
        raise UserError(f"{where}: * stands at the end of a prefix; a pattern with * elsewhere is not known")
    return text
