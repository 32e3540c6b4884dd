"""Prompts of samples: one for each segment, from the command line or from files.

A `.json` file is a list with an entry for each segment: a text, or an object with `text` and, optionally, `neg_text`
for what to avoid. A list of such lists holds one for each sample; a `.jsonl` file has one on each line. TTT-Video reads
the same formats; its `requires_scene_transition` says that a segment begins a new scene.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ttt.amounts import show_bytes
from ttt.checksums import DuplicateKeyError, no_duplicates
from ttt.errors import EnvironmentProblem, UsageError
from ttt.jsonl import numbered_lines
from ttt.printable import shortened
from ttt.reading import as_text, is_stream, read_start, unreadable, wrong_with

MAX_BYTES = 16 << 20
"""The most bytes of a prompt file."""
_KEYS = ("text", "neg_text", "requires_scene_transition")
_FORMAT = (
    'a prompt file is a list such as ["a cat", {"text": "a dog", "neg_text": "blurred"}], one entry for each segment; '
    "or a list of such lists, one for each sample, which in a .jsonl stand on a line each"
)


@dataclass(frozen=True)
class Prompts:
    """The prompts of one sample, in order of its segments."""

    prompts: tuple[str, ...]
    """One for each segment, or one for all."""
    negative: tuple[str, ...]
    """Negative prompts: one for each segment, one for all, or none; empty text for a segment without one."""
    source: str
    """Where they come from, for messages."""
    new_scenes: tuple[bool, ...] = ()
    """For each of `prompts`, whether it begins a new scene; empty if the prompts do not say."""


def given_prompts(prompts: Sequence[str], negative: Sequence[str] = ()) -> Prompts:
    """The prompts of the command line.

    Raises:
        UsageError: a prompt is empty; the message says which.
    """
    for option, texts in (("--prompt", prompts), ("--negative-prompt", negative)):
        for number, text in enumerate(texts, 1):
            wrong = wrong_with(text)
            if wrong is not None:
                raise UsageError(f"{option}: the text for segment {number} {wrong}; write what it is about")
    return Prompts(tuple(prompts), tuple(negative), "--prompt")


def read_prompts(file: str) -> tuple[Prompts, ...]:
    """The prompts of each sample in a file.

    Raises:
        EnvironmentProblem: the file does not exist or cannot be read.
        UsageError: it does not hold prompts, or a segment has no text; the message names each place.
    """
    try:
        content = read_start(file, MAX_BYTES + 1)
    except OSError as error:
        raise EnvironmentProblem(f"{file}: the prompts cannot be read: {unreadable(error)}") from None
    read: list[Prompts] = []
    problems: list[str] = []
    for place, entries in _samples(_text(content, file), file):
        try:
            read.append(_sample(entries, place))
        except UsageError as error:
            problems += error.details or (error.message,)
    if problems:
        raise UsageError.about(problems, "segments cannot be used", where="" if len(problems) == 1 else file)
    return tuple(read)


def for_segments(given: Prompts, *, count: int, seconds: float) -> tuple[Prompts, str | None]:
    """Assign a prompt to each segment of a sample.

    Args:
        given: the sample's prompts.
        count: how many segments it has.
        seconds: its length.

    Returns:
        A prompt for each segment; and a note for the user if one prompt is used for several segments.

    Raises:
        UsageError: the prompts are neither one nor as many as the segments; the message says how many are needed.
    """
    if len(given.prompts) not in (1, count):
        raise UsageError(f"{given.source}: {_miscounted(len(given.prompts), count, seconds, 'prompts')}")
    if len(given.negative) not in (0, 1, count):
        raise UsageError(f"--negative-prompt: {_miscounted(len(given.negative), count, seconds, 'negative prompts')}")
    told = f"one prompt for all {count} segments" if len(given.prompts) < count else None
    prompts, negative = (texts * count if len(texts) == 1 else texts for texts in (given.prompts, given.negative))
    # the first segment never changes the scene, since none precedes it; one prompt for all is one scene
    new_scenes = (False, *given.new_scenes[1:]) if any(given.new_scenes[1:]) else ()
    return replace(given, prompts=prompts, negative=negative, new_scenes=new_scenes), told


def _miscounted(given: int, count: int, seconds: float, what: str) -> str:
    segments = f"{seconds:g} s are {count} {'segment' if count == 1 else 'segments'}"
    missing = f": segment {given + 1} has none" if given < count else ""
    how = "write one" if count == 1 else f"write {count}, or one for all"
    return f"{segments}, but there are {given} {what}{missing}; {how}"


# --- files ---


def _text(content: bytes, file: str) -> str:
    if len(content) > MAX_BYTES:
        raise UsageError(f"{file}: larger than {show_bytes(MAX_BYTES)}; {_FORMAT}")
    try:
        return as_text(content, file)
    except OSError as error:
        raise UsageError(f"{file}: {unreadable(error)}; {_FORMAT}") from None


def _samples(text: str, file: str) -> Iterator[tuple[str, list[Any]]]:
    """For each sample its place in the file, and the entries of its segments."""
    if file.lower().endswith(".jsonl"):
        yield from _lines(text, file)
        return
    try:
        entries = _parsed(text, file)
    except UsageError:
        if not is_stream(file) or not _is_jsonl(text):  # a stream's name does not say which of the two formats it is
            raise
        yield from _lines(text, file)
        return
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{file}: has no prompts; {_FORMAT}")
    lists = sum(isinstance(entry, list) for entry in entries)
    if not lists:
        yield file, entries
    elif lists < len(entries):
        strange = next(number for number, entry in enumerate(entries, 1) if not isinstance(entry, list))
        raise UsageError(
            f"{file}: entry {strange} is not a list, though others are; write a list of segments for each sample"
        )
    else:
        for number, entry in enumerate(entries, 1):
            yield file if lists == 1 else f"{file}: sample {number}", entry


def _lines(text: str, file: str) -> Iterator[tuple[str, list[Any]]]:
    """For each line that is not blank its place in the file, and the entries of its segments."""
    empty = True
    for number, line in numbered_lines(text):
        empty = False
        entries = _parsed(line, file, line=number)
        if isinstance(entries, list) and entries and all(isinstance(entry, list) for entry in entries):
            raise UsageError(
                f"{file}:{number}: is a list of samples; in a .jsonl each has a line of its own, or name it .json"
            )
        yield f"{file}:{number}", entries if isinstance(entries, list) else [entries]
    if empty:
        raise UsageError(f"{file}: has no prompts; {_FORMAT}")


def _is_jsonl(text: str) -> bool:
    """Whether the first line that is not blank is JSON by itself."""
    try:
        json.loads(next(line for _, line in numbered_lines(text)))
    except (ValueError, RecursionError, StopIteration):
        return False
    return True


def _parsed(text: str, file: str, *, line: int | None = None) -> Any:
    """Parse the JSON of a file, or of one of its lines."""
    place = file if line is None else f"{file}:{line}"
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        place = f"{file}:{line or error.lineno}:{error.colno}"
        if line is None and error.msg == "Extra data":
            raise UsageError(
                f"{place}: is not JSON: something follows its end; a file with a sample on each line is a .jsonl"
            ) from None
        raise UsageError(f"{place}: is not JSON: {error.msg}; {_FORMAT}") from None
    except DuplicateKeyError as error:
        raise UsageError(f"{place}: the key {error.key!r} stands twice in one segment; leave one out") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{place}: is not JSON that can be read; {_FORMAT}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


# --- segments ---


def _sample(entries: list[Any], place: str) -> Prompts:
    """The prompts of one sample.

    Raises:
        UsageError: segments are wrong; the message has a line for each.
    """
    if not entries:
        raise UsageError(f"{place}: has no prompts; {_FORMAT}")
    segments, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            segments.append(_segment(entry, f"{place}: segment {number}", len(entries)))
        except UsageError as error:
            problems.append(error.message)
    if problems:
        raise UsageError("", details=problems)
    prompts, negative, new_scenes = zip(*segments, strict=True)
    return Prompts(prompts, negative if any(negative) else (), place, new_scenes if any(new_scenes) else ())


def _segment(entry: Any, place: str, count: int) -> tuple[str, str, bool]:
    """The text of a segment, its negative text (empty if it has none), and whether it begins a new scene."""
    if isinstance(entry, str):
        entry = {"text": entry}
    if entry is None:
        raise UsageError(f"{place} of {count} is missing; write a prompt for each segment")
    if not isinstance(entry, dict):
        raise UsageError(f"{place} is {shortened(json.dumps(entry), 40)}; {_FORMAT}")
    unknown = sorted(set(entry) - set(_KEYS))
    if unknown:
        raise UsageError(
            f"{place}: unknown key {unknown[0]!r}; a segment has `text`, `neg_text` and `requires_scene_transition`"
        )
    text, avoided, new_scene = entry.get("text"), entry.get("neg_text"), entry.get(_KEYS[2], False)
    for key, value in (("text", text), ("neg_text", avoided)):
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{place}: `{key}` must be text, not {shortened(json.dumps(value), 40)}")
    if not isinstance(new_scene, bool):
        raise UsageError(f"{place}: `{_KEYS[2]}` must be true or false, not {shortened(json.dumps(new_scene), 40)}")
    if text is None:
        raise UsageError(f"{place} has no `text`; write what it shows")
    wrong = wrong_with(text)
    if wrong is not None:
        raise UsageError(f"{place}: its text {wrong}; write what it shows")
    avoided = (avoided or "").strip()
    wrong = wrong_with(avoided) if avoided else None
    if wrong is not None:
        raise UsageError(f"{place}: its neg_text {wrong}; write what to avoid")
    return text, avoided, new_scene
