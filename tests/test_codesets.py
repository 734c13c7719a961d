"""Which codes does a code set match, and what is said of a file that is none?"""

import re
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from behrt.config import UserError
from behrt.tasks.codesets import CodeSets, read_code_sets

from .small_records import day, events

SETS = Path(__file__).resolve().parents[1] / "experiments" / "tasks"


@pytest.mark.parametrize(
    "code", ["ICD10CM//I50.9", "ICD10CM//I509", "DIAGNOSIS//ICD//10//I509", "ICD9CM//428", "DX//ICD9CM//428.0"]
)
def test_a_code_is_found_under_every_name_of_its_system(code: str) -> None:
    assert CodeSets({"heart": ("ICD10CM//I50*", "ICD9CM//428*")}).names_of(code) == ("heart",)


@pytest.mark.parametrize(
    "code", ["ICD10CM//I51", "ICD9CM//I509", "ICD10PCS//I509", "DX_ADMIT//ICD9CM//4280", "ICD9CM//042", "I50"]
)
def test_a_code_of_another_system_or_meaning_is_not_found(code: str) -> None:
    assert CodeSets({"heart": ("ICD10CM//I50*", "ICD9CM//428*")}).names_of(code) == ()


def test_a_code_without_a_star_is_itself_alone() -> None:
    sets = CodeSets({"a": ("ICD9CM//496",), "b": ("LAB//50912",)})
    assert sets.names_of("ICD9CM//4960") == ()
    assert sets.names_of("LAB//50912") == ("b",)
    assert sets.names_of("LAB//50912//mg") == ()


def test_dots_inside_icd_codes_do_not_count_on_either_side() -> None:
    sets = CodeSets({"a": ("ICD10CM//E112*", "ICD9CM//250.00")})
    assert sets.names_of("ICD10CM//E11.21") == sets.names_of("DX//ICD9CM//25000") == ("a",)


def test_dots_count_where_the_system_is_not_known() -> None:
    assert CodeSets({"a": ("CONDITION//J44.9",)}).names_of("CONDITION//J449") == ()


letters = st.text("AB1.", max_size=4)


FAMILIES = {"X": ["X"], "Y": ["Y"], "ICD9CM": ["ICD9CM", "DX//ICD9CM", "DIAGNOSIS//ICD//9"],
            "ICD10CM": ["ICD10CM", "DX//ICD10CM", "DIAGNOSIS//ICD//10"]}  # fmt: skip
systems = st.sampled_from([(family, name) for family, names in FAMILIES.items() for name in names])
ABOVE = ["D", "DX//", "DX//ICD9CM", "DIAGNOSIS//", "DIAGNOSIS//ICD//", "ICD", "ICD10CM"]


@given(patterns=st.lists(st.tuples(systems, letters, st.booleans())), system=systems, code=letters)
def test_matching_is_that_of_equality_and_startswith(
    patterns: list[tuple[tuple[str, str], str, bool]], system: tuple[str, str], code: str
) -> None:
    def bare(family: str, text: str) -> str:
        return text.replace(".", "") if family.startswith("ICD") else text

    written = tuple(f"{name}//{text}{'*' if star else ''}" for (_, name), text, star in patterns)
    own = bare(system[0], code)
    expected = any(
        family == system[0] and (own.startswith(bare(family, text)) if star else own == bare(family, text))
        for (family, _), text, star in patterns
    )
    assert CodeSets({"a": written}).names_of(f"{system[1]}//{code}") == (("a",) if expected else ())


@given(prefix=st.sampled_from(ABOVE), system=systems, code=letters)
def test_a_prefix_above_the_system_matches_codes_as_they_are_written_and_by_the_first_name(
    prefix: str, system: tuple[str, str], code: str
) -> None:
    expected = any(f"{name}//{code}".startswith(prefix) for name in (system[1], system[0]))
    assert CodeSets({"a": (f"{prefix}*",)}).names_of(f"{system[1]}//{code}") == (("a",) if expected else ())


def test_occurrences_name_an_event_in_two_sets_twice_and_a_repeated_one_once() -> None:
    sets = CodeSets({"a": ("ICD9CM//428*",), "b": ("ICD9CM//4280",)})
    table = events((1, day(0), "ICD9CM//4280"), (1, day(0), "DX//ICD9CM//428.0"), (1, day(0), "LAB"))
    assert sets.occurrences(table).rows() == [(1, day(0), "a"), (1, day(0), "b")]


def read(tmp_path: Path, text: str) -> CodeSets:
    (tmp_path / "sets.yaml").write_text(text)
    return read_code_sets(tmp_path / "sets.yaml")


def test_a_file_is_read_in_its_order(tmp_path: Path) -> None:
    sets = read(tmp_path, "b: [X//1, 'X//2*']\n\na:\n  - Y//3 # a comment\n")
    assert dict(sets) == {"b": ("X//1", "X//2*"), "a": ("Y//3",)}
    assert list(sets) == ["b", "a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sets.yaml: expected code sets"),
        ("- a\n- b\n", "sets.yaml: expected code sets"),
        ("a: [X//1]\nb: X//1\n", "line 2: b: expected a list of codes"),
        ("a: [X//1]\nb: []\n", "line 2: b: expected a list of codes"),
        ("a:\n  - X//1\n  - 428\n", "line 3: expected a code, found a number"),
        ("a:\n  - X//1\n  - [X//2]\n", "line 3: expected a code, found a list"),
        ("a:\n  - '*'\n", "line 2: expected a code or prefix"),
        ("a:\n  - X//4*8\n", r"line 2: \* stands at the end"),
        ("a: [X//1]\na: [X//2]\n", "line 2: a second code set 'a'"),
        ("a b: [X//1]\n", "line 1: the name of a code set is a letter"),
        ("a: [X//1\nb: [", "line 2: is no YAML"),
        ("a: !!python/object:os.system [x]\n\x00", "is no YAML"),
    ],
)
def test_what_is_no_code_set_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_a_table_of_records_is_refused_and_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, "40000123: 2020-01-01\n40000124,ICD10CM//E119\n")
    assert "4000012" not in str(refused.value)
    assert "E119" not in str(refused.value)


def test_a_name_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="no code set 'c'; it has a"):
        CodeSets({"a": ("X",)}).only(("c",), "sets.yaml")


# The files in experiments/tasks, on records.


def codes_of(folder: Path, prefix: str) -> list[str]:
    scan = pl.scan_parquet(folder / "**" / "*.parquet" if folder.name == "data" else folder / "*.parquet")
    return (
        scan.filter(pl.col("code").str.starts_with(prefix)).select(pl.col("code").unique()).collect()["code"].to_list()
    )


@pytest.mark.parametrize("file", ["chronic_conditions.yaml", "acute_conditions.yaml"])
def test_every_set_matches_codes_of_synpuf_and_of_both_revisions_in_mimic(file: str, test_data: Path) -> None:
    sets = read_code_sets(SETS / file)
    synpuf = codes_of(test_data / "synpuf-meds" / "data", "DX//ICD9CM//")
    mimic = codes_of(test_data / "mimic-iv-demo-meds", "DIAGNOSIS//")
    for codes in (synpuf, mimic):
        assert {name for code in codes for name in sets.names_of(code)} == set(sets)
    revisions = {re.match(r"DIAGNOSIS//ICD//(\d+)", code)[1] for code in mimic if sets.names_of(code)}  # type: ignore[index]
    assert revisions == {"9", "10"}
