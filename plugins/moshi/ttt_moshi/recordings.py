"""Reads the recordings of an index in moshi-finetune's format: its lines, audio headers and transcripts.

A `.jsonl` file names recordings, one `{"path": …, "duration": seconds}` on each line, with paths relative to its
folder. Beside `a.wav` is `a.json` with `alignments: [[word, [start, end], "SPEAKER_MAIN"], …]`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ttt.errors import EnvironmentProblem
from ttt.jsonl import Line, jsonl_files, number_in, parse_object, path_in, read_jsonl, value_in_words
from ttt.printable import shortened
from ttt.reading import MAX_JSON, read_file, unreadable
from ttt.words import first_few
from ttt_moshi.audio import AudioInfo, UnreadableAudioError, inspect_audio
from ttt_moshi.interleave import MAIN_SPEAKER, Word, read_alignments
from ttt_moshi.options import RECORDING_EXAMPLE

_TOLERANCE_SEC: Final = 0.5


class BadLineError(ValueError):
    """A line of an index cannot be used."""


class BrokenTranscriptError(ValueError):
    """A recording's alignments cannot be read."""


@dataclass(frozen=True)
class Recording:
    """One line of a `.jsonl` file, with the header of its audio."""

    place: str
    """The file and line that name it."""
    audio: Path
    info: AudioInfo

    @property
    def transcript(self) -> Path:
        """The file with its words, beside the audio."""
        return self.audio.with_suffix(".json")


def read_recordings(source: Path, *, frame_sec: float, field: str) -> list[Recording]:
    """The recordings of every index under `source`, checked as far as possible without decoding.

    Args:
        source: a `.jsonl` file, or a folder with such files at any depth.
        frame_sec: length of the codec's frame in seconds; a shorter recording is refused.
        field: the config key of `source`, with which messages begin.

    Raises:
        EnvironmentProblem: a recording is missing or broken; the message names file and line.
    """
    indexes = _index_files(source, field)
    recordings: list[Recording] = []
    problems: list[str] = []
    speakers: Counter[str] = Counter()
    for index in indexes:
        for line in read_jsonl(index):
            try:
                recording = read_line(line, frame_sec)
                speakers.update(word.speaker for word in read_transcript(recording))
            except (BadLineError, BrokenTranscriptError) as error:
                problems.append(f"{line.place}: {error}")
            else:
                recordings.append(recording)
    if not recordings and not problems:
        problems.append(f"{first_few(indexes)}: no recordings; write lines such as {RECORDING_EXAMPLE}")
    if not problems and speakers and MAIN_SPEAKER not in speakers:
        problems.append(
            f"{first_few(indexes)}: no word is Moshi's: the transcripts' speakers are "
            f"{first_few(sorted(speakers))}; label the words of the left channel {MAIN_SPEAKER}"
        )
    if problems:
        raise EnvironmentProblem.about(problems, "recordings cannot be used", where=field)
    return recordings


def _index_files(source: Path, field: str) -> list[Path]:
    """The `.jsonl` files under `source`.

    Raises:
        EnvironmentProblem: there are none.
    """
    if source.is_dir():
        found = jsonl_files(source)
        if not found:
            raise EnvironmentProblem(
                f"{field}: {source} holds no .jsonl file; write one with lines such as {RECORDING_EXAMPLE}"
            )
        return found
    if not source.exists():
        written = str(source)
        if "," in written or written.rpartition(":")[0].endswith("jsonl"):
            raise EnvironmentProblem(
                f"{field}: {written} is not a file; write several files and their weights as a list, "
                f"[{{path: a.jsonl, weight: 2}}, {{path: b.jsonl, weight: 1}}]"
            )
        raise EnvironmentProblem(f"{field}: {written} does not exist; name a .jsonl file or a folder of them")
    return [source]


def read_line(line: Line, frame_sec: float, *, stereo: bool = True) -> Recording:
    """Check one line of an index and the audio that it names; `stereo` says whether that must have two channels."""
    try:
        entry = parse_object(line.content)
    except ValueError as error:
        raise BadLineError(f"{error}; write {RECORDING_EXAMPLE}") from None
    path, duration = path_in(entry, "path"), number_in(entry, "duration")
    if path is None:
        raise BadLineError(f'"path" is {value_in_words(entry, "path")}; write {RECORDING_EXAMPLE}')
    if duration is None or not 0 < duration < 1e9:
        raise BadLineError(f'"duration" is {value_in_words(entry, "duration")}, not seconds; write {RECORDING_EXAMPLE}')
    audio = line.folder / path
    try:
        info = inspect_audio(audio)
    except FileNotFoundError:
        raise BadLineError(f"no file {audio}; paths are relative to the folder of the .jsonl file") from None
    except OSError as error:
        raise BadLineError(f"{shortened(str(audio), 120)}: cannot be read: {unreadable(error)}") from None
    except UnreadableAudioError as error:
        raise BadLineError(f"{audio}: cannot be decoded: {error}") from None
    if stereo and info.channels != 2:
        channels = "mono" if info.channels == 1 else f"{info.channels} channels"
        raise BadLineError(f"{audio}: {channels}; Moshi needs two channels: left its own voice, right the user's")
    if info.seconds < frame_sec:
        raise BadLineError(f"{audio}: {info.seconds:.3f} s are less than one frame ({frame_sec:g} s); leave it out")
    if abs(info.seconds - duration) > _TOLERANCE_SEC:
        raise BadLineError(
            f'{audio}: "duration" is {duration:g}, but the audio lasts {info.seconds:.2f} s; correct the line, or '
            f"the file that it names"
        )
    return Recording(line.place, audio, info)


def read_transcript(recording: Recording) -> list[Word]:
    """The words of a recording in order of time."""
    file = recording.transcript
    try:
        words = read_alignments(json.loads(read_file(file, limit=MAX_JSON).decode("utf-8-sig")))
    except FileNotFoundError:
        raise BrokenTranscriptError(
            f'no file {file}; write its words beside the audio as {{"alignments": [["hello", [0.5, 0.9], '
            f'"{MAIN_SPEAKER}"]]}}, or as moshi-finetune\'s annotate.py does'
        ) from None
    except OSError as error:
        raise BrokenTranscriptError(f"{file}: cannot be read: {unreadable(error)}") from None
    except (ValueError, RecursionError) as error:
        raise BrokenTranscriptError(f"{file}: {shortened(str(error), 120)}") from None
    if words and words[-1].start > recording.info.seconds + _TOLERANCE_SEC:
        raise BrokenTranscriptError(
            f"{file}: {words[-1].text!r} starts at {words[-1].start:g} s, but the audio lasts "
            f"{recording.info.seconds:.2f} s; times are in seconds"
        )
    return words
