"""Prompts of the command line and of files: one for each segment, and every mistake at its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ttt.errors import EnvironmentProblem, UsageError
from ttt.prompts import MAX_BYTES, Prompts, for_segments, given_prompts, read_prompts


def written(tmp_path: Path, content: Any) -> str:
    file = tmp_path / "prompts.json"
    data = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content))
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(file)


@pytest.mark.parametrize(
    ("content", "prompts", "negative"),
    [
        (["a cat", "a dog"], ("a cat", "a dog"), ()),
        ([{"text": "a cat"}, "a dog"], ("a cat", "a dog"), ()),
        ([{"text": "a cat", "neg_text": "fog"}, {"text": "a dog"}], ("a cat", "a dog"), ("fog", "")),
        ([{"text": "a cat", "neg_text": None}], ("a cat",), ()),
        ([[{"text": "a cat", "neg_text": "fog"}, {"text": "ein Äffchen"}]], ("a cat", "ein Äffchen"), ("fog", "")),
        ('\ufeff["a cat"]', ("a cat",), ()),
    ],
)
def test_lists_of_texts_and_of_objects(
    tmp_path: Path, content: Any, prompts: tuple[str, ...], negative: tuple[str, ...]
) -> None:
    file = written(tmp_path, content)
    assert read_prompts(file) == Prompts(prompts, negative, file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (["a cat", None, "a dog"], "prompts.json: segment 2 of 3 is missing"),
        (["a cat", ""], "prompts.json: segment 2: its text is empty"),
        (["a cat", {"text": " \n"}], "prompts.json: segment 2: its text is empty"),
        ([{"neg_text": "fog"}], "prompts.json: segment 1 has no `text`"),
        ([[{"text": "a cat"}, {}]], "prompts.json: segment 2 has no `text`"),
        ([{"text": "a cat", "negtext": "fog"}], "segment 1: unknown key 'negtext'"),
        ([{"text": 3}], "segment 1: `text` must be text, not 3"),
        ([{"text": "a cat", "neg_text": ["fog"]}], r'segment 1: `neg_text` must be text, not \["fog"\]'),
        (["a cat", 7], "segment 2 is 7; a prompt file is a list such as"),
        ([["a cat"], ["a dog"]], "has prompts for 2 videos"),
        (["a cat", ["a dog"]], r'segment 2 is \["a dog"\]'),
        ([], "has no prompts"),
        ([[]], "has no prompts"),
        ({"text": "a cat"}, "has no prompts"),
        ('["a cat",\n "a dog"', r"prompts.json:2:9: is no JSON"),
        ('["a cat", NaN]', "is no JSON that can be read"),
        ("[" * 100_000, "is no JSON that can be read"),
        (b'["\xff"]', "is no UTF-8 text"),
        (b" " * (MAX_BYTES + 1), "larger than 1 MiB"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_told_at_its_place(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_prompts(written(tmp_path, content))


def test_a_file_that_cannot_be_read_is_the_machines_matter(tmp_path: Path) -> None:
    for file in (tmp_path / "none.json", tmp_path, "a\0b"):
        with pytest.raises(EnvironmentProblem, match="the prompts cannot be read"):
            read_prompts(str(file))


def test_as_many_as_segments_or_one_for_all() -> None:
    given = given_prompts(["a", "b", "c"], ["x"])
    assert for_segments(given, count=3, seconds=9) == (Prompts(("a", "b", "c"), ("x", "x", "x"), "--prompt"), None)
    spread, told = for_segments(given_prompts(["a"], ["x", "y"]), count=2, seconds=6)
    assert (spread.prompts, spread.negative) == (("a", "a"), ("x", "y"))
    assert told == "one prompt for all 2 segments"
    assert for_segments(given_prompts(["a"]), count=1, seconds=3) == (Prompts(("a",), (), "--prompt"), None)


@pytest.mark.parametrize(
    ("prompts", "negative", "count", "words"),
    [
        (2, 0, 3, "--prompt: 9 s are 3 segments, but there are 2 prompts: segment 3 has none; write 3, or one for all"),
        (4, 0, 3, "--prompt: 9 s are 3 segments, but there are 4 prompts; write 3, or one for all"),
        (2, 0, 1, "--prompt: 3 s are 1 segment, but there are 2 prompts; write one"),
        (3, 2, 3, "--negative-prompt: 9 s are 3 segments, but there are 2 negative prompts: segment 3 has none"),
    ],
)
def test_too_few_and_too_many_are_counted(prompts: int, negative: int, count: int, words: str) -> None:
    given = given_prompts(["a"] * prompts, ["x"] * negative)
    with pytest.raises(UsageError) as refused:
        for_segments(given, count=count, seconds=3 * count)
    assert words in str(refused.value)


def test_an_empty_text_is_named_by_its_number() -> None:
    with pytest.raises(UsageError, match="--prompt: the text for segment 2 is empty"):
        given_prompts(["a", " "])
    with pytest.raises(UsageError, match="--negative-prompt: the text for segment 1 is empty"):
        given_prompts(["a"], [""])
