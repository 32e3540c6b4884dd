"""An evaluation that reads training data is found under any name, and one that does not is left alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from ttt.check import check_config
from ttt.check.overlap import overlap
from ttt.config import Severity
from ttt.config.findings import Finding


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "data/deep", "data2", "other"):
        Path(folder).mkdir()
    _write("data/train.jsonl", "a", "b")
    _write("data/held_out.jsonl", "c")
    _write("data/deep/copy.jsonl", "a", "c")
    _write("data2/train.jsonl", "d", "e")
    Path("link.jsonl").symlink_to("data/train.jsonl")
    Path("linked").symlink_to("data", target_is_directory=True)
    os.link("data/train.jsonl", "data2/hard.jsonl")


def _write(name: str, *recordings: str) -> None:
    """A list of recordings beside it, each with its transcript."""
    folder = Path(name).parent
    for recording in recordings:
        sound = Path(f"{recording}.wav")
        sound.touch()
        sound.with_suffix(".json").write_text('{"alignments": []}')
    lines = [{"path": os.path.relpath(f"{recording}.wav", folder), "duration": 60.0} for recording in recordings]
    Path(name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def _found(train: str, evaluated: str) -> Sequence[Finding]:
    text = f"backbone: {{name: moshi}}\ndata: {{train_data: {train}, eval_data: {evaluated}}}\n"
    return [finding for finding in check_config("c.yaml", text=text).findings if finding.code == "TTT502"]


@pytest.mark.parametrize(
    ("train", "evaluated", "words"),
    [
        ("data/train.jsonl", "data/train.jsonl", "'data/train.jsonl' is training data"),
        ("data/train.jsonl", "./data/../data/train.jsonl", "is 'data/train.jsonl', which is training data"),
        ("data/train.jsonl", "link.jsonl", "is 'data/train.jsonl', which is training data"),
        ("link.jsonl", "linked/train.jsonl", "is 'link.jsonl', which is training data"),
        ("data/train.jsonl", "data2/hard.jsonl", "is 'data/train.jsonl', which is training data"),
        ("data", "data/train.jsonl", "lies in 'data', which is training data"),
        ("linked", "data/deep/copy.jsonl", "lies in 'linked', which is training data"),
        ("data/train.jsonl", "data", "holds 'data/train.jsonl', which is training data"),
        ("[{path: data2/train.jsonl}, {path: data/train.jsonl, weight: 2}]", "link.jsonl", "which is training data"),
        ("gone.jsonl", "./gone.jsonl", "which is training data"),
        ("data/train.jsonl", "data/deep/copy.jsonl", "1 of 2 recordings of the held-out data is training data"),
    ],
)
def test_an_evaluation_on_training_data_is_found_under_any_name(train: str, evaluated: str, words: str) -> None:
    (finding,) = _found(train, evaluated)
    assert (finding.severity, finding.path) == (Severity.WARNING, "data.eval_data")
    assert words in finding.message
    assert finding.message.endswith("so the evaluation does not tell learning from memorising")


def test_the_source_of_several_that_is_training_data_is_named() -> None:
    (finding,) = _found("data/train.jsonl", "[{path: data2/train.jsonl}, {path: link.jsonl}]")
    assert finding.path == "data.eval_data.1.path"


@pytest.mark.parametrize(
    ("train", "evaluated"),
    [
        ("data/train.jsonl", "data/held_out.jsonl"),
        ("data/train.jsonl", "data2/train.jsonl"),  # the same name elsewhere
        ("data2", "data/held_out.jsonl"),
        ("data", "data2/train.jsonl"),  # a name that begins alike
        ("null", "data/train.jsonl"),
        ("gone.jsonl", "nowhere.jsonl"),
        ("[{path: data2/train.jsonl}, {path: data/train.jsonl}]", "data/held_out.jsonl"),
    ],
)
def test_held_out_data_are_left_alone(train: str, evaluated: str) -> None:
    if train == "data2":
        Path("data2/hard.jsonl").unlink()
    if train == "data":
        Path("data2/hard.jsonl").unlink()
    assert _found(train, evaluated) == []


def test_a_name_that_no_file_can_have_is_only_itself() -> None:
    assert overlap("a\0b", ["a\0b"]) == "is"
    assert overlap("a\0b", ["a", "a\0c"]) is None
