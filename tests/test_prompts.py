"""Prompts of the command line and of files: one for each segment, and every mistake at its place."""

from __future__ import annotations

import json
import os
from dataclasses import replace
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
    assert read_prompts(file) == (Prompts(prompts, negative, file),)


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
        (["a cat", ["a dog"]], "prompts.json: entry 1 is not a list, though others are"),
        ([["a cat"], ["a dog", ""]], "prompts.json: sample 2: segment 2: its text is empty"),
        ([["a cat"], []], "prompts.json: sample 2: has no prompts"),
        ([[["a cat"]], ["a dog"]], r'sample 1: segment 1 is \["a cat"\]'),
        (
            [{"text": "a", "requires_scene_transition": None}],
            "`requires_scene_transition` must be true or false, not n",
        ),
        (
            [{"text": "a", "requires_scene_transition": "no"}],
            '`requires_scene_transition` must be true or false, not "n',
        ),
        ('[{"text": "a", "text": "b"}]', "prompts.json: the key 'text' stands twice in one segment"),
        ('["a"]\n["b"]', r"prompts.json:2:1: is not JSON: something follows its end; .* is a .jsonl"),
        ('["a\\ud800"]', "segment 1: its text holds U\\+D800"),
        ([{"text": "a", "neg_text": "x" * 10_001}], "segment 1: its neg_text has 10,001 characters"),
        ([], "has no prompts"),
        ([[]], "has no prompts"),
        ({"text": "a cat"}, "has no prompts"),
        ('["a cat",\n "a dog"', r"prompts.json:2:9: is not JSON"),
        ('["a cat", NaN]', "is not JSON that can be read"),
        ("[" * 100_000, "is not JSON that can be read"),
        (b'["\xff"]', "it is not text in UTF-8"),
        ('["a"]'.encode("utf-16"), "it is text in UTF-16; save it as UTF-8: iconv -f UTF-16"),
        (b" " * (MAX_BYTES + 1), "larger than 16 MiB"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_told_at_its_place(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_prompts(written(tmp_path, content))


SCENES = [
    [
        {"text": "a mouse", "requires_scene_transition": False, "neg_text": "fog"},
        {"text": "it leaps", "requires_scene_transition": True, "neg_text": None},
    ],
    [{"text": "a cat"}, {"text": "it sleeps", "requires_scene_transition": False}],
    ["ein Hund\u2028zwei"],
]
"""Videos as TTT-Video's `inputs/example-9s.json` has them, and shorter ones."""


def of_scenes(file: str, *places: str) -> tuple[Prompts, ...]:
    first, second, third = (f"{file}{place}" for place in places)
    return (
        Prompts(("a mouse", "it leaps"), ("fog", ""), first, (False, True)),
        Prompts(("a cat", "it sleeps"), (), second),
        Prompts(("ein Hund\u2028zwei",), (), third),
    )


def test_many_samples_of_one_file(tmp_path: Path) -> None:
    """In a `.json` and, a line each, in a `.jsonl`: with blank lines, a byte order mark, either end of line."""
    file = written(tmp_path, SCENES)
    assert read_prompts(file) == of_scenes(file, ": sample 1", ": sample 2", ": sample 3")
    lines = [json.dumps(each, ensure_ascii=False) for each in SCENES]
    for end, start in (("\n", ""), ("\r\n", "\ufeff"), ("\n\n  \n", "\n")):
        file = str(tmp_path / "prompts.JSONL")
        Path(file).write_bytes((start + end.join(lines) + end).encode())
        numbers = [1 + bool(start == "\n") + len(end.split("\n")[1:]) * number for number in range(3)]
        assert read_prompts(file) == of_scenes(file, *(f":{number}" for number in numbers))
    Path(file).write_text('"one text"\n{"text": "one scene"}')
    assert [each.prompts for each in read_prompts(file)] == [("one text",), ("one scene",)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('["a"]\n["b", ""]\n', r"prompts.jsonl:2: segment 2: its text is empty"),
        ('["a"]\n\n["b"\n', r"prompts.jsonl:3:5: is not JSON"),
        ('[\n["a"]\n]', r"prompts.jsonl:1:2: is not JSON"),
        ('[["a"], ["b"]]', r"prompts.jsonl:1: is a list of samples; in a .jsonl each has a line of its own"),
        ('["a"]\n7', r"prompts.jsonl:2: segment 1 is 7"),
        ('["a"]\nnull', r"prompts.jsonl:2: segment 1 of 1 is missing"),
        ('["a"]\n[]', r"prompts.jsonl:2: has no prompts"),
        ("\n \r\n", r"prompts.jsonl: has no prompts"),
        (b'["a"]\n["\xff"]', r"prompts.jsonl: it is not text in UTF-8: byte 9, in line 2"),
    ],
)
def test_a_mistake_is_told_at_its_line(tmp_path: Path, content: Any, words: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=words):
        read_prompts(str(file))


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        read_prompts(written(tmp_path, [["a", ""], ["b"], [{"neg_text": "x"}, {"txt": "y"}]]))
    assert refused.value.message.endswith("prompts.json: 3 segments cannot be used:")
    assert [detail.split(": ", 1)[1][: len("sample 1: segment 2")] for detail in refused.value.details] == [
        "sample 1: segment 2",
        "sample 3: segment 1",
        "sample 3: segment 2",
    ]


def test_a_stream_is_read_by_its_content() -> None:
    """A pipe that a shell hands over has no name that says what is in it."""
    for content, count in (('["a", "b"]', 1), ('["a"]\n["b"]\n', 2), ('[["a"],\n["b"]]', 2)):
        reading, writing = os.pipe()
        os.write(writing, content.encode())
        os.close(writing)
        try:
            assert len(read_prompts(f"/dev/fd/{reading}")) == count
        finally:
            os.close(reading)


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
    scenes = Prompts(("a", "b"), (), "p.json", (True, True))
    assert for_segments(scenes, count=2, seconds=6)[0].new_scenes == (False, True), "no scene is before the first"
    assert for_segments(replace(scenes, new_scenes=(True, False)), count=2, seconds=6)[0].new_scenes == ()
    assert for_segments(Prompts(("a",), (), "p.json", (True,)), count=2, seconds=6)[0].new_scenes == ()
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
