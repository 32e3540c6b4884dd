"""What the checker promises in numbers: suggestions for misspelt keys, and configs of any kind without a traceback."""

from __future__ import annotations

import os
import random
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from ttt.check import CODES, check_config
from ttt.config import RunConfig
from ttt.config.findings import Severity
from ttt.config.spelling import nearest
from ttt.plugins import get_backbone, run_config_model
from ttt_cli.main import main

MOSHI = get_backbone("moshi")
LETTERS = string.ascii_lowercase + "_"
EXHAUSTIVE = bool(os.environ.get("TTT_EXHAUSTIVE"))
"""Every misspelling and 10,000 configs (some minutes) instead of a part of them."""
GENERATED = 10_000 if EXHAUSTIVE else 200


def _sections() -> Iterator[tuple[str, list[str]]]:
    """Every section with its keys, the plugin's options included; the top level is ''."""
    model = run_config_model(MOSHI)
    yield "", list(model.model_fields)
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield name, list(field.annotation.model_fields)


def _edits(word: str) -> Iterator[str]:
    """Every word one edit away: a letter left out, added, replaced, or two neighbours swapped."""
    for i in range(len(word) + 1):
        before, after = word[:i], word[i:]
        if after:
            yield before + after[1:]
            yield from (before + letter + after[1:] for letter in LETTERS)
        if len(after) > 1:
            yield before + after[1] + after[0] + after[2:]
        yield from (before + letter + after for letter in LETTERS)


def test_misspelt_keys_get_the_right_suggestion_first() -> None:
    """One-edit misspellings of every key, in the section where it stands."""
    right = asked = 0
    draw = random.Random(1)
    for _, keys in _sections():
        for key in keys:
            misspellings = sorted(set(_edits(key)) - set(keys) - {""})
            for misspelt in misspellings if EXHAUSTIVE else draw.sample(misspellings, 25):
                asked += 1
                right += nearest(misspelt, keys) == key
    print(f"{right} of {asked} one-edit misspellings ({right / asked:.2%}) get the right suggestion first")
    assert asked > 1000
    assert right / asked >= 0.95


def test_a_misspelt_key_is_told_so_in_a_config() -> None:
    """The way from a file to the suggestion, for one misspelling of each key."""
    draw = random.Random(0)
    missed = []
    for section, keys in _sections():
        for key in keys:
            others = {name for _, names in _sections() for name in names}
            misspelt = draw.choice(sorted(word for word in set(_edits(key)) - others if len(word) > 1))
            text = f"{section}:\n  {misspelt}: 1\n" if section else f"{misspelt}: 1\n"
            findings = check_config("c.yaml", text=text, backbone="moshi").findings
            fixes = [finding.fix for finding in findings if finding.code in ("TTT101", "TTT105")]
            if not any(f"`{key}`" in fix for fix in fixes):
                missed.append((section, key, misspelt))
    total = sum(len(keys) for _, keys in _sections())
    assert len(missed) <= total * 0.05, missed


# --- configs of any kind ---

VALUES = [
    *("0", "1", "-1", "2", "16", "188", "1e-5", "1e6", "1e400", "0.1", "-0.0", ".inf", ".nan", "9" * 400, "0x10"),
    *("true", "false", "null", "~", "yes", "all", "middle", "none", "linear", "mlp", "lm", "video", "''", '"\\u0000"'),
    *("[]", "{}", "[1, 2]", "[0, 0]", "[[1]]", "{a: 1}", "29,30,31", "'1,2'", "*a", "&a 1", "!!int 1", "!x y", "# "),
    *(
        "nowhere.jsonl",
        "/dev/null",
        "/",
        "~/x",
        "'" + "x" * 300 + "'",
        "é",
        "日本",
        "\u2028",
        "{",
        "]",
        "- 1",
        "| ",
        "a: b",
    ),
    *(
        "cpu",
        "cuda",
        "bfloat16",
        "float32",
        "demo",
        "7b",
        "1048576",
        "64",
        "240",
        "0.08",
        "ttt+attention",
        "1000000000000",
    ),
]


def _mutated(draw: random.Random) -> bytes:
    """A good config with some of its lines changed, left out, doubled, moved, or broken as text."""
    presets = MOSHI.presets()
    lines = presets["7b" if draw.random() < 0.2 else "demo"].splitlines()
    keys = [key for _, names in _sections() for key in names]
    for _ in range(draw.choice([1, 1, 1, 2, 3, 8])):
        place = draw.randrange(len(lines)) if lines else 0
        line = lines[place] if lines else ""
        name, colon, _ = line.partition(":")
        kind = draw.randrange(9)
        if kind <= 2 and colon:
            lines[place] = f"{name}: {draw.choice(VALUES)}"
        elif kind == 3:
            lines.insert(place, f"  {draw.choice(keys)}: {draw.choice(VALUES)}")
        elif kind == 4 and colon:
            word = name.strip() or "x"
            edited = draw.choice(list(_edits(word)))
            lines[place] = line.replace(word, edited, 1)
        elif kind == 5 and lines:
            del lines[place]
        elif kind == 6:
            lines.insert(place, line)
        elif kind == 7:
            lines.insert(place, f"{draw.choice(keys)}: {draw.choice(VALUES)}")
        elif lines:
            lines[place] = draw.choice(["  ", "\t", "-", ""]) + line[draw.randrange(len(line) + 1) :]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if draw.random() < 0.1:
        cut = draw.randrange(len(content) + 1)
        content = content[:cut] + draw.choice([b"\0", b"\xff", b"\xfe\xff", b"\r", b"{", b"\xed\xa0\x80", b""])
    return content


def test_no_config_brings_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = random.Random(20260101)
    runnable = 0
    for number in range(GENERATED):
        content = _mutated(draw)
        memory = draw.choice([None, None, 1, 1 << 28, 80 << 30])
        try:
            checked = check_config("c.yaml", text=content, memory=memory)
            Path("c.yaml").write_bytes(content)
            exit_code = main(["check", "c.yaml"])
        except Exception as error:
            raise AssertionError(f"config {number} brought {error!r}:\n{content!r}") from error
        assert {finding.code for finding in checked.findings} <= {*CODES, *get_backbone("moshi").explanations()}
        assert all(finding.place is not None and finding.message for finding in checked.findings)
        failed = any(finding.severity is Severity.ERROR for finding in checked.findings)
        runnable += not failed
        if memory is None:
            assert exit_code == failed
        assert exit_code in (0, 1)
        if not failed:
            assert isinstance(checked.config, RunConfig)
    assert 0 < runnable < GENERATED  # both kinds are among them
    capsys.readouterr()
    print(f"{GENERATED} configs, {runnable} of them without errors, none with a traceback")
