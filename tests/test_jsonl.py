"""Lists in `.jsonl` files: their lines with places, the first of them, and what stands under their keys."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import pytest

from ttt.errors import EnvironmentProblem
from ttt.jsonl import (
    Line,
    jsonl_files,
    number_in,
    parse_object,
    path_in,
    read_excerpt,
    read_jsonl,
    value_in_words,
)
from ttt.packaged import PackagedFiles, packaged_presets


def test_lines_have_places(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}\n\n  \r\n{"b": 2}\r\n')
    first, second = read_jsonl(file)
    assert first == Line(file, 1, b'{"a": 1}')
    assert (second.number, second.content) == (4, b'{"b": 2}')
    assert (second.place, second.short_place, second.folder) == (f"{file}:4", "a.jsonl:4", tmp_path)
    assert [line.number for line in read_jsonl(file, most_bytes=20)] == [1]
    with pytest.raises(EnvironmentProblem, match=r"none\.jsonl: cannot be read: No such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_a_folder_means_the_lists_in_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.jsonl", "b/a.jsonl", "b/a.json"):
        (tmp_path / name).write_text("{}\n")
    assert jsonl_files(tmp_path) == [tmp_path / "b" / "a.jsonl", tmp_path / "c.jsonl"]
    assert jsonl_files(tmp_path / "c.jsonl") == [tmp_path / "c.jsonl"]


def excerpt(source: str | Path, lines: int, count: int) -> tuple[list[int], bool] | None:
    found = read_excerpt(source, most_lines=lines, most_bytes=count)
    return None if found is None else ([line.number for line in found.lines], found.complete)


def test_the_first_lines_of_lists(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(b"1234567\n" * 3)
    assert excerpt(tmp_path, 6, 48) == ([1, 2, 3, 1, 2, 3], True)
    assert excerpt(tmp_path, 5, 48) == ([1, 2, 3, 1, 2], False)
    assert excerpt(tmp_path, 3, 48) == ([1, 2, 3], False)
    assert excerpt(tmp_path, 6, 47) == ([1, 2, 3, 1, 2], False)
    assert excerpt(tmp_path, 6, 24) == ([1, 2, 3], False)
    assert excerpt(str(tmp_path / "a.jsonl"), 3, 24) == ([1, 2, 3], True)


@pytest.mark.parametrize("name", ["none.jsonl", "a\0b"])
def test_no_lists_are_no_excerpt(name: str, tmp_path: Path) -> None:
    assert excerpt(f"{tmp_path}/{name}", 10, 4 << 20) is None


def test_a_folder_without_lists_has_no_lines(tmp_path: Path) -> None:
    assert excerpt(tmp_path, 10, 4 << 20) == ([], True)


def test_a_line_that_is_too_long_breaks_its_list_off_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + b"x" * (2 << 20))
    (tmp_path / "b.jsonl").write_bytes(b"{}\n")
    read = read_excerpt(tmp_path, most_lines=10, most_bytes=8 << 20)
    assert read is not None
    assert [line.short_place for line in read.lines] == ["a.jsonl:1", "b.jsonl:1"]
    assert not read.complete
    assert read.broken_off == {tmp_path / "a.jsonl": "line 2 is longer than 1 MiB"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", r"^no JSON \(Expecting property name .*\)$"),
        (
            b'{"a": "\xff"}',
            r"^no JSON \(byte 8, 0xff, is not UTF-8; save the file as UTF-8, from Latin-1 by iconv .*\)$",
        ),
        (b"[" * 100_000, r"^no JSON \("),
        (b'{"a": ' + b"1" * 5000 + b"}", r"^no JSON \("),
        (b"[1]", "^not an object$"),
    ],
)
def test_a_line_that_is_no_object(line: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_object(line)


def test_a_key_that_stands_twice() -> None:
    assert parse_object(codecs.BOM_UTF8 + b'{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match=r"no JSON \(a key stands twice\)"):
        parse_object(b'{"a": 1, "a": 2}', unique_keys=True)


@pytest.mark.parametrize("value", [None, "", 3, "a\0b", ["a"]])
def test_what_is_no_path(value: Any) -> None:
    assert path_in({"path": value}, "path") is None
    assert path_in({"path": "a.wav"}, "path") == "a.wav"
    assert path_in({}, "path") is None


@pytest.mark.parametrize("value", [None, True, "3", float("nan"), float("-inf"), 10**400])
def test_what_is_no_number(value: Any) -> None:
    assert number_in({"duration": value}, "duration") is None
    assert number_in({"duration": -3}, "duration") == -3.0
    assert number_in({}, "duration") is None


def test_a_value_in_words() -> None:
    assert value_in_words({"a": "b"}, "a") == "'b'"
    assert value_in_words({"a": "b"}, "c") == "missing"
    assert len(value_in_words({"a": "b" * 1000}, "a")) == 120


def test_what_a_package_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my_package"
    (folder / "presets").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "presets" / "demo.yaml").write_text("# für alle\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packaged_presets("my_package", ["demo"]) == {"demo": "# für alle\n"}
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    (folder / "a.txt").write_text("test")
    files = PackagedFiles(folder, {"a.txt": digest}, distribution="my-package")
    files.require_whole()
    (folder / "a.txt").write_text("tesT")
    files.require_whole()  # looked at once in a process
    (folder / "b.txt").write_text("tesT")
    with pytest.raises(EnvironmentProblem, match=r"b\.txt: damaged: .*; reinstall my-package$"):
        PackagedFiles(folder, {"b.txt": digest}, distribution="my-package").require_whole()
