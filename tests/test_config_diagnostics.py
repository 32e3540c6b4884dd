"""How findings look: text for people, in a log and on a terminal, and JSON."""

from __future__ import annotations

import json
import re

import pytest

from ttt.check.catalogue import CODES, DECLARED, PREFIX
from ttt.check.codes import TTT101
from ttt.check.render import render_json, render_text
from ttt.config.findings import (
    Blame,
    Code,
    Family,
    Finding,
    Place,
    Severity,
    blames_environment,
    has_errors,
    summary,
)


def _finding(**changes: object) -> Finding:
    fields = {
        "code": "TTT101",
        "declared": TTT101,
        "severity": Severity.ERROR,
        "path": "ttt.layrs",
        "message": "unknown key `layrs` in `ttt`",
        "fix": "write `layers`",
        "value": "layrs",
        "replacement": None,
        "moves_to": None,
        "place": Place("a/c.yaml", 12, 3, "  layrs: all", 5),
    }
    return Finding(**{**fields, **changes})  # type: ignore[arg-type]


def test_text_has_place_code_message_line_caret_and_fix() -> None:
    assert render_text([_finding()]) == (
        "a/c.yaml:12:3  error TTT101  unknown key `layrs` in `ttt`\n"
        "   12 |   layrs: all\n"
        "      |   ^^^^^\n"
        "    fix: write `layers`"
    )


def test_what_is_not_in_a_file_is_not_quoted() -> None:
    assert render_text([_finding(place=Place("--set ttt.layrs=all"), fix="")]) == (
        "--set ttt.layrs=all  error TTT101  unknown key `layrs` in `ttt`"
    )


def test_colour_changes_no_letter() -> None:
    painted = render_text([_finding(), _finding(severity=Severity.NOTE)], color=True)
    assert "\x1b[" in painted
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == render_text([_finding(), _finding(severity=Severity.NOTE)])


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("color", [False, True])
def test_nothing_is_wider_than_the_terminal(width: int, color: bool) -> None:
    long = "every carry is kept and every inner step still runs twice, which is the worst of both " * 3
    findings = [
        _finding(message=long.strip(), fix=long.strip()),
        _finding(place=Place("a/rather/long/path/to/the/config.yaml", 1, 300, "x" * 400, 50)),
        _finding(place=Place("c.yaml", 1, 1, "y" * 400)),
    ]
    text = re.sub(r"\x1b\[[0-9;]*m", "", render_text(findings, color=color, width=width))
    assert max(map(len, text.splitlines())) <= width
    unwrapped = " ".join(text.split())
    assert unwrapped.count("the worst of both") == 6


def test_a_long_line_is_cut_around_the_caret() -> None:
    line = "a" * 200 + "KEY" + "b" * 200
    quoted, caret = render_text([_finding(place=Place("c.yaml", 1, 201, line, 3))]).splitlines()[1:3]
    start = caret.index("^")
    assert quoted[start : start + 3] == "KEY"
    assert caret.count("^") == 3
    assert quoted.count("…") == 2


def test_carets_stand_under_wide_letters_and_tabs() -> None:
    quoted, caret = render_text([_finding(place=Place("c.yaml", 1, 6, "\t音声:\tx", 1))]).splitlines()[1:3]
    assert "音声" in quoted
    # the two letters take two columns each
    assert caret.index("^") == quoted.index("x") + 2


def test_nothing_steers_the_terminal() -> None:
    text = render_text(
        [_finding(message="a \x1b[2J b\nc", fix="\x07", place=Place("\x1b]0;x\x07.yaml", 1, 1, "\x1b[31m\x00"))]
    )
    assert not any(character in text for character in "\x1b\x07\x00")
    assert len(text.splitlines()) == 4


def test_json_is_plain_data() -> None:
    findings = [_finding(), _finding(place=Place("--set x=1"), value=3.5)]
    first, second = json.loads(render_json(findings))
    assert first == {
        "code": "TTT101",
        "title": "unknown key",
        "severity": "error",
        "file": "a/c.yaml",
        "line": 12,
        "column": 3,
        "path": "ttt.layrs",
        "message": "unknown key `layrs` in `ttt`",
        "fix": "write `layers`",
        "value": "layrs",
        "replacement": None,
        "moves_to": None,
    }
    assert (second["file"], second["line"], second["value"]) == ("--set x=1", None, 3.5)
    assert json.loads(render_json([])) == []


def test_summary_counts_by_severity() -> None:
    error, warning, note = (_finding(severity=severity) for severity in Severity)
    assert summary([warning, error, error, note]) == "2 errors, 1 warning, 1 note"
    assert summary([]) == "no findings"
    assert has_errors([warning, error])
    assert not has_errors([warning, note])


def test_codes_are_stable_in_form() -> None:
    assert all(re.fullmatch(r"TTT\d{3}", code) and title for code, title in CODES.items())
    assert len(set(CODES.values())) == len(CODES)
    assert {code.number for code in DECLARED.values()} == set(CODES)
    assert all(code.number.startswith(code.family.prefix) for code in DECLARED.values() if code.family)
    assert all(code.family is not None and code.number.startswith(PREFIX) for code in DECLARED.values())
    assert {code.family for code in DECLARED.values()} == set(Family)


def test_which_codes_blame_the_machine_and_which_training_alone_minds() -> None:
    def numbers(*blames: Blame) -> set[str]:
        return {number for number, code in DECLARED.items() if code.blames in blames and code.family is not Family.LAWS}

    assert numbers(Blame.MACHINE) == {
        *("TTT403", "TTT501", "TTT504", "TTT505", "TTT506", "TTT508", "TTT509", "TTT520", "TTT521", "TTT522", "TTT725"),
        *("TTT601", "TTT603", "TTT604", "TTT605", "TTT607", "TTT608", "TTT610"),
    }
    assert numbers(Blame.EITHER) == {"TTT401", "TTT402", "TTT404"}
    assert numbers(Blame.PLUGIN) == {"TTT802", "TTT803"}
    of_training = {code.family for code in DECLARED.values() if code.of_training}
    assert of_training == {*(Family.CHECKPOINTING, Family.MEMORY, Family.DATA, Family.ENVIRONMENT, Family.OPTIMISATION)}
    others = {number for number, code in DECLARED.items() if code.of_training != (code.family in of_training)}
    lora = {"TTT721", "TTT722", "TTT723", "TTT724", "TTT727"}
    assert others == {"TTT515", *lora}  # what nothing reads, or cannot be, whatever the config is for


def test_a_finding_has_what_its_code_says() -> None:
    code = Code("TOY101", "a toy", Severity.WARNING, blames=Blame.MACHINE, of_training=True)
    finding = code.at("train.lr", "it is toyish", "write 1", value=2, replacement="1")
    assert (finding.code, finding.severity, finding.path, finding.fix) == (
        "TOY101",
        Severity.WARNING,
        "train.lr",
        "write 1",
    )
    assert (finding.title, finding.blames, finding.only_for_training) == ("a toy", Blame.MACHINE, True)
    assert blames_environment(finding)
    assert code.at("", "worse", severity=Severity.ERROR).severity is Severity.ERROR
    plain = Finding(code="TOY101", severity=Severity.NOTE, path="", message="m")
    assert (plain.title, plain.blames, plain.only_for_training) == ("", Blame.CONFIG, False)
    said = Finding(code="TOY1", severity=Severity.NOTE, path="", message="m", of_environment=True, of_training=True)
    assert (said.blames, said.only_for_training) == (Blame.MACHINE, True)


@pytest.mark.parametrize(("number", "title"), [("TOY 1", "a"), ("", "a"), ("TOY1", ""), ("É1", "a"), ("T" * 41, "a")])
def test_a_code_that_cannot_be_shown_is_refused(number: str, title: str) -> None:
    with pytest.raises(ValueError, match=r"is no code|has no title"):
        Code(number, title, Severity.NOTE)
