"""Every code is explained, and its own configs prove it: the bad one triggers it alone, the good one nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_distributions import TOY, importable, install

from ttt.amounts import parse_bytes
from ttt.check import check_config
from ttt.check.catalogue import CODES, DECLARED, explanations
from ttt.check.explain import catalogue, explain, page
from ttt.config import Explanation, Finding
from ttt.config.findings import Family
from ttt.errors import UsageError
from ttt_cli.check_files import _read_data

ROOT = Path(__file__).parent.parent
EXPLANATIONS = {code: entry for code, entry in explanations().items() if DECLARED[code].family is not Family.LAWS}
"""All but those of the laws, whose pairs are no configs."""
FAILING = (
    "from toy_config import *\n"
    "class Failing(ToyBackbone):\n"
    "    name = 'failing'\n"
    "    def facts(self, config):\n        raise RuntimeError('out of order')\n"
    "@hookimpl\ndef ttt_backbone():\n    return Failing()\n"
)
LACKING = {"TTT607": "trackio"}
"""Packages that nobody has while the bad config is checked."""
PLUGINS = {
    "TTT107": ("toy", TOY),
    "TTT802": ("broken", "import a_package_that_nobody_has\n"),
    "TTT803": ("failing", FAILING),
}


@contextlib.contextmanager
def _installed(code: str, folder: Path) -> Iterator[None]:
    if code not in PLUGINS:
        yield
        return
    name, source = PLUGINS[code]
    install(folder, name, f"{name}_plugin", source)
    with importable(folder):
        yield


def _findings(content: bytes, options: tuple[str, ...]) -> tuple[Finding, ...]:
    cost, data = "--cost" in options, "--data" in options
    options = tuple(option for option in options if option not in ("--cost", "--data"))
    named = dict(zip(options[::2], options[1::2], strict=True))
    memory = parse_bytes(named["--memory"]) if "--memory" in named else None
    overrides = [named["--set"]] if "--set" in named else []
    devices = int(named["--devices"]) if "--devices" in named else None
    asked = {"memory": memory, "devices": devices, "cost": cost}
    checked = check_config("config.yaml", text=content, overrides=overrides, **asked)
    return (*checked.findings, *(_read_data(checked, show=False) if data else ()))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _write(entry: Explanation) -> None:
    for name, text in entry.files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")


def test_every_code_is_explained_once() -> None:
    assert list(explanations()) == list(CODES)
    assert all(bool(entry.fix) == (code not in EXPLANATIONS) for code, entry in explanations().items())
    assert {code for code, entry in EXPLANATIONS.items() if entry.needs} == set(PLUGINS)


@pytest.mark.parametrize("code", EXPLANATIONS)
def test_the_bad_config_triggers_its_code_alone(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EXPLANATIONS[code]
    for variable in entry.environment:
        monkeypatch.setenv(*variable.split("=", 1))
    if code in LACKING:
        monkeypatch.setitem(sys.modules, LACKING[code], None)
    _write(entry)
    with _installed(code, tmp_path):
        found = _findings(entry.bad_bytes or entry.bad.encode(), entry.options)
    findings = [finding for finding in found if finding.code == code or finding.code != "TTT405"]
    assert [(finding.code, finding.severity.value) for finding in findings] == [(code, entry.severity)]
    (finding,) = findings
    assert finding.declared is DECLARED[code]
    assert finding.place is not None
    assert not finding.message.endswith(".")
    assert finding.fix or code in ("TTT106", "TTT405")


@pytest.mark.parametrize("code", EXPLANATIONS)
def test_the_good_config_triggers_nothing(code: str, tmp_path: Path) -> None:
    entry = EXPLANATIONS[code]
    _write(entry)
    with _installed(code, tmp_path):
        assert _findings(entry.good.encode(), entry.options if entry.good_options is None else entry.good_options) == ()


@pytest.mark.parametrize("code", CODES)
def test_explain_says_what_why_how_and_who(code: str) -> None:
    text = explain(code.lower())
    entry = explanations()[code]
    assert text.splitlines()[0].startswith(f"{code}  ")
    assert CODES[code] in text.splitlines()[0]
    unwrapped = " ".join(text.split())
    for part in (entry.what, entry.why, entry.source, "bad:", "good:"):
        assert " ".join(part.split()) in unwrapped
    assert code in catalogue()
    prose = [line for line in text.splitlines() if not line.startswith("    ")]
    assert all(len(line) <= 80 for line in prose), code


_EXPLAINED = (
    "from toy_config import *\n"
    "from ttt.config import Explanation\n"
    "class Explaining(ToyBackbone):\n"
    "    name = 'explaining'\n"
    "    def explanations(self):\n"
    "        {body}\n"
    "@hookimpl\ndef ttt_backbone():\n    return Explaining()\n"
)


def test_a_plugin_explains_its_own_codes(tmp_path: Path) -> None:
    entry = "Explanation('note', 'What it is.', 'Why it is.', 'a: 1', 'a: 2', 'somebody', title='of its own')"
    source = _EXPLAINED.replace("{body}", f"return {{'OWN101': {entry}}}")
    install(tmp_path, "explaining", "explaining_plugin", source)
    with importable(tmp_path):
        assert explain("own101").startswith("OWN101  note  of its own\n\nWhat it is.\n\nWhy it is.\n\nbad:\n    a: 1")
        assert "The plugin explaining\n  OWN101  note     of its own" in catalogue()


def test_a_plugin_that_fails_when_it_explains_spoils_nothing(tmp_path: Path) -> None:
    source = _EXPLAINED.replace("{body}", "raise RuntimeError('out of order')")
    install(tmp_path, "explaining", "explaining_plugin", source)
    with importable(tmp_path):
        assert "TTT101" in catalogue()
        with pytest.raises(UsageError, match="no rule has the code 'OWN101'"):
            explain("own101")


def test_an_unknown_code_is_a_sentence() -> None:
    with pytest.raises(UsageError, match="did you mean TTT204"):
        explain("TT204")
    with pytest.raises(UsageError, match="no rule has the code 'E501'"):
        explain("E501")


def test_the_page_in_docs_is_current() -> None:
    written = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    assert written == page(), "run: make rules"
