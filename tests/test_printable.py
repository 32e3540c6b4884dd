"""Names, metadata and words from elsewhere: shown, they steer no terminal and forge no line and no command to a log."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyBackbone

from ttt import inject
from ttt.adapter_file import save_adapter
from ttt.check.render import render_github, render_json, render_text
from ttt.check.sarif import render_sarif
from ttt.config import TTTConfig
from ttt.config.findings import Finding, Place, Severity
from ttt.errors import EnvironmentProblem
from ttt.printable import as_line, json_text, shell_word, shortened
from ttt_cli.main import main
from ttt_cli.terminal import show_warning

NAMES = {
    "a line break": "a\n::error::forged",
    "a carriage return": "a\rerror: forged",
    "an escape sequence": "a\x1b[2J\x1b[31m",
    "a title of the window": "a\x1b]0;forged\x07",
    "C1 control characters": "a\x9b31m\x85::error::forged",
    "a line turned around": "a\u202egnp.yaml",
    "line separators of Unicode": "a\u2028::error::forged\u2029",
    "a command to a log": "::error::forged",
    "a command after spaces": "  ::add-mask::forged",
    "a command of the older kind": "##[error]forged",
    "bytes that are no text": "a\udcff\udc9b31m",
    "rich's own markup": "[bold red]a[red] :bomb:",
}

hostile = st.text(
    st.one_of(
        st.sampled_from("\n\r\t\x1b\x9b\x07\x7f\x85\u2028\u202e\u2066\ufeff:#[%\"'\\ a\udcff"),
        st.characters(),
    ),
    max_size=30,
)


def require_harmless(text: str, *, commands: bool = False) -> None:
    """Refuse output that steers a terminal or, unless it is meant to hold `commands`, a log."""
    for line in text.split("\n"):
        assert line.isprintable(), line.encode("unicode_escape")
        assert "##[" not in line
        assert commands or not line.lstrip().startswith("::")


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_warning_is_one_line_and_no_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_warning(f"{name}: passed over")
    err = capsys.readouterr().err
    require_harmless(err)
    assert err.startswith("warning: ")
    assert err.count("\n") == 1


def test_a_warning_that_nobody_can_read_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            tried.append(text)
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stderr", Gone())
    show_warning("passed over")
    assert tried


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_line_is_one_line_and_no_command(name: str) -> None:
    require_harmless(as_line(name))
    assert "\n" not in as_line(name)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(hostile)
def test_every_rendering_of_a_finding_is_harmless(text: str) -> None:
    place = Place(text, 3, 2, text=text, width=4)
    words = {"path": text, "message": text, "fix": text, "value": text, "replacement": text}
    finding = Finding(code="TTT101", severity=Severity.ERROR, place=place, **words)
    nowhere = Finding(code="XYZ1", severity=Severity.NOTE, place=Place(text), **words)
    both = [finding, nowhere]
    require_harmless(render_text(both))
    require_harmless(render_json(both))
    require_harmless(render_sarif(both, version="0", problems=[text]))
    require_harmless(render_github(both), commands=True)
    assert len(render_github(both).split("\n")) == 2


@settings(derandomize=True, max_examples=200, deadline=None)
@given(hostile)
def test_json_says_what_it_said(text: str) -> None:
    require_harmless(json_text({text: [text]}))
    assert json.loads(json_text({text: [text]})) == {text: [text]}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash to paste into")
def test_a_word_pasted_into_a_shell_is_the_word() -> None:
    names = [name for name in NAMES.values() if "\x9b" not in name] + [
        "it's \\ \t$HOME `x`",
        "é\u0301 \U0001f600",
        "./-x",
    ]
    command = "printf '%s\\0' " + " ".join(shell_word(name.removeprefix("./")) for name in names)
    require_harmless(command)
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    found = subprocess.run(["bash", "-c", command], capture_output=True, check=True, env=environment).stdout
    assert found.split(b"\0")[:-1] == [os.fsencode(name) for name in names]


def test_long_texts_are_marked_where_they_are_cut() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"


def test_only_details_of_an_error_have_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    from ttt_cli.terminal import show_error

    problems = [f"x\n::error::{number}" for number in range(7)]
    error = EnvironmentProblem.about(problems, "files cannot be read", where="data")
    show_error(error)
    shown = capsys.readouterr().err
    assert shown.splitlines() == [
        "error: data: 7 files cannot be read:",
        *(f"  x ::error::{number}" for number in range(5)),
        "  and 2 more",
    ]
    assert str(EnvironmentProblem.about(problems[:1], "files", where="data")) == "data: x\n::error::0"


# --- the command line ---


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(words)
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize("kind", ["a line break", "an escape sequence", "a command to a log", "bytes that are no text"])
def test_names_of_files_and_words_of_the_command_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = NAMES[kind]
    config = f"{name}.yaml"
    Path(config).write_text("backbone: {name: moshi}\nttt: {laiers: [1]}\ntrain: {max_steps: 1}\n", encoding="utf-8")
    mended = Path(f"{name}2.yaml")
    mended.write_text("backbone: {name: moshi}\ntrain: {max_steps: 2}\n", encoding="utf-8")
    fine = "fine.yaml"
    Path(fine).write_text("backbone: {name: moshi}\ntrain: {max_steps: 1}\n")
    for words in (
        ["check", config],
        ["check", config, "missing-" + name],
        ["check", "--fix", config],
        ["check", "--format", "json", config],
        ["check", "--select", name, config],
        ["check", "--explain", name],
        ["check", "--memory", name, config],
        ["check", fine, "--set", f"train.{name}=1"],
        ["check", fine, "--set", name],
        ["check", fine, "--backbone", name],
        ["diff", fine, str(mended)],
        ["diff", config, fine],
        ["train", config],
        ["train", fine, "--resume", "--set", f"run_dir={json.dumps(name)}"],
        ["init", "--backbone", name],
        ["init", "--backbone", "moshi", "--preset", name],
        ["init", "--backbone", "moshi", "--out", config],
        ["import-config", config],
        ["import-config", "missing-" + name],
        ["import-weights", "missing-" + name, "--backbone", "videodit", "--out", name],
        ["precompute", config],
        ["schema", "--backbone", name],
        ["schema", "--out", config],
        ["info", config],
        ["info", "missing-" + name],
        ["doctor", config],
        ["sample", config, "--prompt", name, "--seconds", "3", "--out", name],
        ["sample", fine, "--prompt", name, "--seconds", name, "--out", name],
        [name],
        ["check", f"--{name}", fine],
        ["check", fine, f"-{name}"],
        ["info", fine, name],
        ["plugins", name],
    ):
        shown = run(capsys, *words)
        assert shown, words
        require_harmless(shown)
    require_harmless(run(capsys, "check", "--format", "github", config), commands=True)


def test_info_of_a_strangers_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = ToyBackbone()
    model = backbone.build(backbone.tiny(), device="cpu", dtype=torch.float32)
    injection = inject.apply(model, backbone.sites(model), TTTConfig(layers=(0,)))
    words = {name: list(NAMES.values()) for name in NAMES.values()}
    flood = {f"{number:0200}": "x" * 10_000 for number in range(150)}
    save_adapter(tmp_path, injection, backbone={"name": "toy", **words}, training={**words, **flood})
    shown = run(capsys, "info", str(tmp_path))
    require_harmless(shown)
    assert len(shown) < 1_000_000
    assert "keys more; --json shows all" in shown
    as_json = run(capsys, "info", str(tmp_path), "--json")
    assert all(line.isprintable() for line in as_json.split("\n"))
    assert json.loads(as_json)["training"] == {**words, **flood}
