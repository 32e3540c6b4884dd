"""YAML in: values, places, limits, and every way in which a file can be no config."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt.check.reading import read_source
from ttt.config import nodes
from ttt.config.findings import Severity
from ttt.config.nodes import MAX_BYTES, MAX_LEVELS, MAX_VALUES
from ttt.config.scalars import resolve
from ttt.config.source import parse_source
from ttt.errors import EnvironmentProblem


@pytest.fixture(params=["libyaml", "python"], autouse=True)
def _both_parsers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(nodes, "_LOADER", yaml.SafeLoader)
    elif not yaml.__with_libyaml__:
        pytest.skip("PyYAML was built without libyaml")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("1e6", 1e6),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-0.25", -0.25),
        ("16", 16),
        ("+16", 16),
        ("012", 12),
        ("0x1F", 31),
        ("0o17", 15),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # text, whatever YAML 1.1 made of it
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("tRue", "tRue"),
        ("1e", "1e"),
        ("7b", "7b"),
        ("29,30,31", "29,30,31"),
        ("9" * 5000, "9" * 5000),
        # quoted is text
        ("'1e-5'", "1e-5"),
        ('"true"', "true"),
        ("''", ""),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, value: Any) -> None:
    data = parse_source(f"key: {written}\n", file="c.yaml").data
    assert data == {"key": value}
    assert type(data["key"]) is type(value)


def test_not_a_number() -> None:
    assert str(resolve(".nan")) == "nan"


def test_every_key_and_value_has_its_place() -> None:
    source = parse_source(
        "ttt:\n"
        "  layers: [1, 30]\n"
        "  rope: 'none' # so\n"
        "data: {train_data: é.jsonl, eval_data: x}\n"
        "train:\n"
        "  betas:\n"
        "    - 0.9\n"
        "run_dir:\n",
        file="a/c.yaml",
    )
    keys = {path: (at.key.line, at.key.column, at.key.width) for path, at in source.places.items()}
    values = {path: (at.value.line, at.value.column, at.value.width) for path, at in source.places.items()}
    assert keys["ttt",] == (1, 1, 3)
    assert keys["ttt", "layers"] == (2, 3, 6)
    assert values["ttt", "layers", 1] == (2, 15, 2)
    assert values["ttt", "rope"] == (3, 9, 6)
    assert values["data", "train_data"] == (4, 20, 7)
    assert keys["data", "eval_data"] == (4, 29, 9)
    assert values["train", "betas", 0] == (7, 7, 3)
    assert source.place(("ttt", "rope")).text == "  rope: 'none' # so"
    assert str(source.place(("ttt", "layers", 1))) == "a/c.yaml:2:15"
    # a value elsewhere than its key, or none at all, is placed at the key; what is not written, at its section
    assert source.place(("train", "betas")).line == 6
    assert str(source.place(("run_dir",))) == "a/c.yaml:8:1"
    assert str(source.place(("train", "lr"))) == "a/c.yaml:5:1"
    assert str(source.place(("eval", "eval_freq"))) == "a/c.yaml:1:1"
    assert source.written(("ttt", "layers", 0))
    assert not source.written(("ttt", "causal"))


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_lines_are_counted_as_editors_do(line_break: str) -> None:
    source = parse_source(line_break.join(["a: 1", "", "b:", "  c: 2"]), file="c.yaml")
    place = source.place(("b", "c"))
    assert (place.line, place.column, place.text) == (4, 6, "  c: 2")


def test_an_alias_repeats_a_value_and_shares_nothing() -> None:
    source = parse_source("a: &x [1, {b: 2}]\nc: *x\n", file="c.yaml")
    assert source.data["c"] == [1, {"b": 2}]
    assert source.data["c"] is not source.data["a"]
    assert source.data["c"][1] is not source.data["a"][1]
    assert source.place(("c", 1, "b")).line == 1


BAD = [
    ("a: [1, 2\nb: 3\n", "TTT001", 1, 4, "never closed"),
    ("a: {b: 1\n", "TTT001", 1, 4, "`{`"),
    ("a: 'x\nb: 2\n", "TTT001", 1, 4, "quotation mark"),
    ("a: 1\n b: 2\n", "TTT001", 2, 3, "indented deeper"),
    ("a: b: c\n", "TTT001", 1, 5, "second `:`"),
    ("a:\n\tb: 1\n", "TTT001", 2, 1, "a tab"),
    ("a: @x\n", "TTT001", 1, 4, "'@'"),
    ("a: 1\nbroken\nb: 2\n", "TTT001", 2, 1, "without a `:`"),
    ("- a\nb: 1\n", "TTT001", 2, 1, "does not continue"),
    ('a: "\\q"\n', "TTT001", 1, None, "escape"),
    ("a: *\n", "TTT001", 1, 4, "no name follows"),
    ("a: 1\n...\nb: 2\n", "TTT001", 3, 1, "end of the document"),
    ("%YAML 3.0\n---\na: 1\n", "TTT001", 1, 1, "incompatible"),
    ("", "TTT003", 1, 1, "empty"),
    ("# nothing yet\n", "TTT003", 1, 1, "empty"),
    ("---\n", "TTT003", 1, 1, "empty"),
    ("- a\n- b\n", "TTT004", 1, 1, "list"),
    ("layers:all\n", "TTT004", 1, 1, "text"),
    (b"a: 1 #" + b"x" * MAX_BYTES, "TTT005", 1, 1, "larger than 1 MiB"),
    ("a: " + "[" * MAX_LEVELS, "TTT006", 1, 35, "32 levels"),
    ("a: [" + "1," * MAX_VALUES + "]", "TTT007", 1, None, "10,000 values"),
    (b"a: 1\nb: \xff\xfe\n", "TTT008", 2, 4, "0xff"),
    ("a: é\n".encode("latin-1"), "TTT008", 1, 4, "0xe9"),
    ("a: 1\n".encode("utf-16"), "TTT008", 1, 1, "UTF-16"),
    ("a: 1\n".encode("utf-32"), "TTT008", 1, 1, "UTF-32"),
    ("a: \ud800\n", "TTT008", 1, 4, "0xed"),
    (b"a: 1\nb: \0\n", "TTT009", 2, 4, "NUL"),
    ("a: \x1b[31m\n", "TTT009", 1, 4, "U+001B"),
    ("a: \uffff\n", "TTT009", 1, 4, "U+FFFF"),
    (b"PK\x03\x04\0\0", "TTT008", 1, 1, "a zip archive"),
    (b"\x1f\x8b\x08\0", "TTT008", 1, 1, "compressed with gzip"),
    ("a: 1\n".encode("utf-16-le"), "TTT008", 1, 1, "UTF-16"),
    (b"version https://git-lfs\nsize 130\n", "TTT008", 1, 1, "a git-lfs pointer to a file of 130 bytes"),
    ("a: !!python/object/apply:os.system [ls]\n", "TTT010", 1, 4, "!!python/object/apply:os.system"),
    ("a: !!str 1\n", "TTT010", 1, 4, "!!str"),
    ("a: !local 1\n", "TTT010", 1, 4, "!local"),
    ("? [1, 2]\n: 3\n", "TTT011", 1, 3, "a key is a word"),
    ("? {a: 1}\n: 3\n", "TTT011", 1, 3, "a key is a word"),
    ("!!str a: 3\n", "TTT011", 1, 1, "a key is a word"),
    ("a: &x {b: 1}\nc:\n  <<: *x\n", "TTT011", 3, 3, "`<<`"),
    ("a: 1\n---\nb: 2\n", "TTT012", 2, 1, "second document"),
    ("a: &x [1, *x]\n", "TTT013", 1, 11, "without end"),
    ("a: *nobody\n", "TTT013", 1, 4, "no `&nobody`"),
]


@pytest.mark.parametrize(("content", "code", "line", "column", "words"), BAD)
def test_what_is_no_config_is_one_clear_finding(
    content: str | bytes, code: str, line: int, column: int | None, words: str
) -> None:
    source = parse_source(content, file="c.yaml")
    assert not source.complete
    assert source.data == {}
    (finding,) = source.findings
    assert finding.code == code
    assert finding.severity is Severity.ERROR
    assert words in finding.message
    assert finding.fix
    assert finding.place is not None
    assert finding.place.line == line
    assert column is None or finding.place.column == column


def test_duplicate_keys_are_found_at_every_level_and_the_first_counts() -> None:
    source = parse_source("a: 1\nttt:\n  x: 1\n  x: 2\n  x: 3\na: 4\n", file="c.yaml")
    assert source.complete
    assert source.data == {"a": 1, "ttt": {"x": 1}}
    found = [(finding.code, finding.path, str(finding.place)) for finding in source.findings]
    assert found == [
        ("TTT002", "ttt.x", "c.yaml:4:3"),
        ("TTT002", "ttt.x", "c.yaml:5:3"),
        ("TTT002", "a", "c.yaml:6:1"),
    ]
    assert "line 1" in source.findings[2].message


def test_limits_are_reached_and_not_passed() -> None:
    assert parse_source("a: " + "[" * (MAX_LEVELS - 1) + "]" * (MAX_LEVELS - 1), file="c").complete
    assert parse_source("a: [" + ",".join("1" * (MAX_VALUES - 2)) + "]", file="c").complete
    assert not parse_source("a: [" + ",".join("1" * (MAX_VALUES - 1)) + "]", file="c").complete
    assert parse_source(b"a: 1 #" + b"x" * (MAX_BYTES - 6), file="c").complete


BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    "content",
    [
        BOMB,
        "[" * 500_000,
        "a: " + "{b: " * 100_000,
        "- " * 400_000,
        "a: [" + "1, " * 300_000,
        "a: &x [*x, *x, *x]\n" * 1000,
        "\0" * MAX_BYTES,
        b"\xff" * MAX_BYTES,
        "!!a " * 200_000,
        "\n" * (MAX_BYTES - 1) + "[",
        "? " * 300_000,
        "&a " * 300_000,
    ],
)
def test_hostile_files_cost_little(content: str | bytes) -> None:
    start = time.process_time()
    source = parse_source(content, file="c.yaml")
    elapsed = time.process_time() - start
    assert not source.complete
    assert len(source.findings) == 1
    limit = 1.0 if nodes._LOADER is not yaml.SafeLoader else 10.0
    assert elapsed < limit  # seconds, on a slow machine; without the bounds most take minutes or all memory


def test_a_file_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    for name, content in {"plain.yaml": b"a: 1\n", "marked.yaml": b"\xef\xbb\xbfa: 1\n"}.items():
        (tmp_path / name).write_bytes(content)
        source = read_source(tmp_path / name)
        assert source.data == {"a": 1}
        assert str(source.place(("a",))) == f"{tmp_path / name}:1:4"


def test_a_file_that_cannot_be_read_is_an_environment_problem(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="no such file"):
        read_source(tmp_path / "nowhere.yaml")
    with pytest.raises(EnvironmentProblem, match="a folder"):
        read_source(tmp_path)
    with pytest.raises(EnvironmentProblem, match="cannot be read"):
        read_source("a\0b")


def test_overrides_win_over_the_file_and_carry_their_own_place() -> None:
    source = parse_source("ttt:\n  layers: [1, 2]\n  rope: none\n", file="c.yaml").with_overrides(
        ["ttt.layers=[3]", "train.lr=1e-3", "run_dir=x=y", "train.lr=1e-4", "data.train_data=", "a.b.c={d: [1]}"]
    )
    assert source.findings == ()
    assert source.data == {
        "ttt": {"layers": [3], "rope": "none"},
        "train": {"lr": 1e-4},
        "run_dir": "x=y",
        "data": {"train_data": None},
        "a": {"b": {"c": {"d": [1]}}},
    }
    assert str(source.place(("ttt", "layers", 0))) == "--set ttt.layers=[3]"
    assert not source.written(("ttt", "layers", 1))
    assert str(source.place(("ttt", "rope"))) == "c.yaml:3:9"
    assert str(source.place(("train", "lr"))) == "--set train.lr=1e-4"
    assert str(source.place(("a", "b", "c", "d", 0))) == "--set a.b.c={d: [1]}"
    assert source.place(("train", "lr")).line is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lr", "`section.key=value`"),
        ("=3", "`section.key=value`"),
        ("train..lr=3", "`section.key=value`"),
        ("", "`section.key=value`"),
        ("ttt.rope.x=1", "`ttt.rope` is a value"),
        ("ttt.layers=[1", "never closed"),
        ("ttt.layers={a: 1, a: 2}", "written twice"),
        ("ttt.layers=!!str 1", "the tag"),
        ("ttt.layers=*x", "no `&x`"),
        ("ttt.layers=\0", "NUL"),
    ],
)
def test_an_override_that_cannot_be_applied_is_a_finding(override: str, words: str) -> None:
    source = parse_source("ttt:\n  rope: none\n", file="c.yaml").with_overrides([override])
    (finding,) = source.findings
    assert finding.code == "TTT108"
    assert words in finding.message
    assert str(finding.place) == f"--set {override}"
    assert source.data == {"ttt": {"rope": "none"}}


@settings(deadline=None)
@given(st.one_of(st.text(), st.binary(), st.text(alphabet="ab:-[]{}&*!#'\"|> \n\t?,%@")))
def test_no_text_and_no_bytes_raise(content: str | bytes) -> None:
    source = parse_source(content, file="c.yaml")
    assert source.complete or len(source.findings) == 1
    for located in source.places.values():
        assert located.value.line is not None
        assert located.value.line >= 1
