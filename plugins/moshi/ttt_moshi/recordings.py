"""Reads the recordings of an index in moshi-finetune's format: its lines, audio headers and transcripts.

A `.jsonl` file names recordings, one `{"path": …, "duration": seconds}` on each line, with paths relative to its
folder. Beside `a.wav` is `a.json` with `alignments: [[word, [start, end], "SPEAKER_MAIN"], …]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ttt.errors import EnvironmentProblem
from ttt.jsonl import Line, jsonl_files, number_in, parse_object, path_in, read_jsonl, value_in_words
from ttt.printable import shortened
from ttt.reading import unreadable
from ttt.words import first_few
from ttt_moshi.audio import AudioInfo, UnreadableAudioError, inspect_audio
from ttt_moshi.containers import wav_length
from ttt_moshi.hearing import Listening
from ttt_moshi.interleave import MAIN_SPEAKER, Word
from ttt_moshi.options import RECORDING_EXAMPLE
from ttt_moshi.transcripts import BrokenTranscriptError, Transcript, Unread

_TOLERANCE_SEC: Final = 0.5


class BadLineError(ValueError):
    """A line of an index cannot be used."""


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


def read_recordings(
    source: Path,
    *,
    frame_sec: float,
    field: str,
    notes: list[str] | None = None,
    wholly: bool = False,
    counted: Callable[[Iterable[Line]], Iterable[Line]] = iter,
) -> list[Recording]:
    """The recordings of every index under `source`: each line, header, end of audio and transcript.

    What is compressed is decoded wholly, if it is no more than five hours in all. Of the rest, the size of a file
    shows whether it is whole, or its end was decoded.

    Args:
        source: a `.jsonl` file, or a folder with such files at any depth.
        frame_sec: length of the codec's frame in seconds; a shorter recording is refused.
        field: the config key of `source`, with which messages begin.
        notes: where sentences are put about what trains, but hardly as it was meant.
        wholly: decode everything, whatever it takes.
        counted: tells how far the lines are.

    Raises:
        EnvironmentProblem: a recording is missing or broken; the message names file and line.
    """
    indexes = _index_files(source, field)
    recordings: list[Recording] = []
    problems: list[str] = []
    speakers: set[str] = set()
    unread = Unread()
    listening = Listening(wholly)
    for line in counted(lines_of(indexes, problems)):
        try:
            recording = read_line(line, frame_sec)
            transcript = Transcript.read(recording.transcript, recording.info.seconds)
            listening.listen(recording.audio, recording.info, transcript.words)
        except (BadLineError, BrokenTranscriptError) as error:
            problems.append(f"{line.place}: {error}")
        except UnreadableAudioError as error:
            problems.append(f"{line.place}: {recording.audio}: cannot be decoded: {error}")
        else:
            speakers |= transcript.speakers
            unread.add(transcript, recording.info.seconds)
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
    if notes is not None:
        notes += [f"{field}: {told}" for told in (*unread.told(), *listening.told())]
    return recordings


def lines_of(indexes: Sequence[Path], problems: list[str]) -> Iterator[Line]:
    """The lines of all indexes. What is wrong with an index itself is added to `problems`."""
    for index in indexes:
        try:
            yield from read_jsonl(index)
        except EnvironmentProblem as problem:
            problems.append(problem.message)


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
            f'{audio}: "duration" is {duration:g}, but the audio lasts {info.seconds:.2f} s{_uncounted(audio)}; '
            f"correct the line, or the file that it names"
        )
    return Recording(line.place, audio, info)


def _uncounted(audio: Path) -> str:
    """What follows the sound that a WAV file's header counts, in words; empty if it is little."""
    length = wav_length(audio)
    more = 0 if length is None else length.there - length.promised
    if length is None or more <= _TOLERANCE_SEC * max(length.bytes_a_second, 1):
        return ""
    return f" by its header, and {more:,} bytes follow that it does not count"


def read_transcript(recording: Recording) -> list[Word]:
    """The words of a recording that windows read, in order of time.

    Raises:
        BrokenTranscriptError: they cannot be read.
    """
    return Transcript.read(recording.transcript, recording.info.seconds).words
