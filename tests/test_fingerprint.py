"""The fingerprint of a source: what it sees, and that it can be put together."""

from pathlib import Path

from behrt.fingerprint import fingerprint, reading


def digests(root: Path, read: list[str]) -> list:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    with reading(files, [root / name for name in read], root) as found:
        return found.result()


def written(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_the_fingerprint_sees_names_and_contents_but_not_the_place(tmp_path):
    def of(folder: str, files: dict[str, bytes]) -> str:
        return fingerprint(digests(written(tmp_path / folder, files), list(files)))

    here = of("here", {"data/a": b"12", "b": b"3"})
    assert of("there", {"data/a": b"12", "b": b"3"}) == here
    others = [{"data/c": b"12", "b": b"3"}, {"data/a": b"13", "b": b"3"}, {"data/a": b"1", "b": b"23"}, {"b": b"3"}]
    assert len({here, *(of(f"other{number}", files) for number, files in enumerate(others))}) == 5


def test_files_that_were_read_apart_give_the_fingerprint_of_all(tmp_path):
    root = written(tmp_path, {"a": b"1", "b": b"22", "c": b""})
    whole = digests(root, ["a", "b", "c"])
    one, other = digests(root, ["a"]), digests(root, ["b", "c"])
    assert [file.sha256 is None for file in one] == [False, True, True]
    assert [file.size for file in one] == [1, 2, 0]
    assert fingerprint([one[0], *other[1:]]) == fingerprint(reversed(whole)) == fingerprint(whole)
