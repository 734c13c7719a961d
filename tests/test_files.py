"""Is a file or folder whole or not there, whatever happens while it is written?"""

from pathlib import Path

import pytest

from behrt.files import replacing_file, replacing_folder, write_json, write_text


def write_half(path: Path) -> None:
    path.write_text("half")
    raise RuntimeError("the disk is full")


def test_a_file_is_replaced_only_on_success(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.txt"
    write_text(path, "first")
    with pytest.raises(RuntimeError), replacing_file(path) as beside:
        write_half(beside)
    assert path.read_text() == "first"
    assert [child.name for child in path.parent.iterdir()] == ["a.txt"]


def test_a_folder_is_replaced_whole_and_only_on_success(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for text in ("first", "second"):
        with replacing_folder(path) as beside:
            (beside / text).write_text(text)
    with pytest.raises(RuntimeError), replacing_folder(path) as beside:
        write_half(beside / "third")
    assert [child.name for child in path.iterdir()] == ["second"]
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


def test_a_folder_can_be_its_owners_alone(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "a", mode=0o700):
        pass
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700


def test_json_that_would_not_be_json_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_two_who_write_a_file_at_once_do_not_write_over_each_other(tmp_path: Path) -> None:
    """Though they have one process id, as in two containers over one disk."""
    with replacing_file(tmp_path / "a") as one:
        one.write_text("one")
        with replacing_file(tmp_path / "a") as other:
            other.write_text("other")
        assert (tmp_path / "a").read_text() == "other"
    assert (tmp_path / "a").read_text() == "one"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
