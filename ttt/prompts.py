"""What a sample is asked to show: a prompt for each of its segments, from the command line or from a JSON file.

A file is a list with an entry for each segment: a text, or an object with `text` and, where it has something to avoid,
`neg_text`. A list with one such list inside, as TTT-Video's prompt files have one for each video, is the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ttt.errors import EnvironmentProblem, UsageError
from ttt.reading import read_start, unreadable, wrong_with

MAX_BYTES = 1 << 20
"""Of a prompt file."""
_KEYS = ("text", "neg_text")
_FORMAT = (
    'a prompt file is a list such as ["a cat", {"text": "a dog", "neg_text": "blurred"}], one entry for each segment'
)


@dataclass(frozen=True)
class Prompts:
    """Prompts in order of the segments."""

    prompts: tuple[str, ...]
    """One for each segment, or one for all."""
    negative: tuple[str, ...]
    """As many, or one for all, or none; an empty text for a segment without."""
    source: str
    """Who gave them, in the user's words."""


def given_prompts(prompts: Sequence[str], negative: Sequence[str] = ()) -> Prompts:
    """Prompts of the command line.

    Raises:
        UsageError: one is empty; the message says which.
    """
    for option, texts in (("--prompt", prompts), ("--negative-prompt", negative)):
        for number, text in enumerate(texts, 1):
            wrong = wrong_with(text)
            if wrong is not None:
                raise UsageError(f"{option}: the text for segment {number} {wrong}; write what it is about")
    return Prompts(tuple(prompts), tuple(negative), "--prompt")


def read_prompts(file: str) -> Prompts:
    """Prompts of a JSON file.

    Raises:
        EnvironmentProblem: there is no such file, or it cannot be read.
        UsageError: it holds something else, or a segment has no text; the message names the place.
    """
    try:
        content = read_start(file, MAX_BYTES + 1)
    except OSError as error:
        raise EnvironmentProblem(f"{file}: the prompts cannot be read: {unreadable(error)}") from None
    entries = _entries(content, file)
    prompts, negative = [], []
    for number, entry in enumerate(entries, 1):
        text, avoided = _segment(entry, f"{file}: segment {number}", len(entries))
        prompts.append(text)
        negative.append(avoided)
    return Prompts(tuple(prompts), tuple(negative) if any(negative) else (), file)


def for_segments(given: Prompts, *, count: int, seconds: float) -> tuple[Prompts, str | None]:
    """A prompt for each segment of a sample.

    Args:
        given: the prompts.
        count: of the segments.
        seconds: that they are together.

    Returns:
        As many as there are segments, and what a user must know of how they were spread.

    Raises:
        UsageError: they are neither as many as the segments nor one; the message says how many are wanted.
    """
    if len(given.prompts) not in (1, count):
        raise UsageError(f"{given.source}: {_miscounted(len(given.prompts), count, seconds, 'prompts')}")
    if len(given.negative) not in (0, 1, count):
        raise UsageError(f"--negative-prompt: {_miscounted(len(given.negative), count, seconds, 'negative prompts')}")
    told = f"one prompt for all {count} segments" if len(given.prompts) < count else None
    prompts, negative = (texts * count if len(texts) == 1 else texts for texts in (given.prompts, given.negative))
    return Prompts(prompts, negative, given.source), told


def _miscounted(given: int, count: int, seconds: float, what: str) -> str:
    segments = f"{seconds:g} s are {count} {'segment' if count == 1 else 'segments'}"
    missing = f": segment {given + 1} has none" if given < count else ""
    how = "write one" if count == 1 else f"write {count}, or one for all"
    return f"{segments}, but there are {given} {what}{missing}; {how}"


def _entries(content: bytes, file: str) -> list[Any]:
    """What the file says of each segment."""
    if len(content) > MAX_BYTES:
        raise UsageError(f"{file}: larger than {MAX_BYTES >> 20} MiB; {_FORMAT}")
    try:
        entries = json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise UsageError(f"{file}: is no UTF-8 text; {_FORMAT}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{file}:{error.lineno}:{error.colno}: is no JSON: {error.msg}; {_FORMAT}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{file}: is no JSON that can be read; {_FORMAT}") from None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{file}: has no prompts; {_FORMAT}")
    videos = sum(isinstance(entry, list) for entry in entries)
    if videos > 1:
        raise UsageError(f"{file}: has prompts for {videos} videos; write those of one, and sample the others after it")
    if videos and len(entries) == 1:
        entries = entries[0]
        if not entries:
            raise UsageError(f"{file}: has no prompts; {_FORMAT}")
    return list(entries)


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _segment(entry: Any, place: str, count: int) -> tuple[str, str]:
    """Text and negative text of a segment; empty where it has nothing to avoid."""
    if isinstance(entry, str):
        entry = {"text": entry}
    if entry is None:
        raise UsageError(f"{place} of {count} is missing; write a prompt for each segment")
    if not isinstance(entry, dict):
        raise UsageError(f"{place} is {json.dumps(entry)[:40]}; {_FORMAT}")
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        raise UsageError(f"{place}: unknown key {unknown[0]!r}; a segment has `text` and `neg_text`")
    text, avoided = entry.get("text"), entry.get("neg_text")
    for key, value in (("text", text), ("neg_text", avoided)):
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{place}: `{key}` must be text, not {json.dumps(value)[:40]}")
    if text is None:
        raise UsageError(f"{place} has no `text`; write what it shows")
    wrong = wrong_with(text)
    if wrong is not None:
        raise UsageError(f"{place}: its text {wrong}; write what it shows")
    avoided = (avoided or "").strip()
    wrong = wrong_with(avoided) if avoided else None
    if wrong is not None:
        raise UsageError(f"{place}: its neg_text {wrong}; write what to avoid")
    return text, avoided
