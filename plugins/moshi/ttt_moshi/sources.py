"""Sources of speech: dialogues with transcripts, and speech of one voice without, from lists or folders of sound files.

Speech without transcripts is named by a `.jsonl` file of `{"path": …, "duration": seconds}`, by a folder with such
files, or by a folder of sound files at any depth, as Libri-Light has them: `speaker/book/chapter.flac`. Nothing but the
sound is read; what lies beside it (Libri-Light's `.json`) is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt.config.sources import DataSource, places_of_split
from ttt.errors import EnvironmentProblem
from ttt.jsonl import jsonl_files, read_jsonl
from ttt.reading import unreadable
from ttt_moshi import demo
from ttt_moshi.audio import UnreadableAudioError, inspect_audio, one_channel
from ttt_moshi.hearing import Listening
from ttt_moshi.options import FRAME_RATE, RECORDING_EXAMPLE, SOUND_FILES, Channel, MoshiData
from ttt_moshi.recordings import BadLineError, Recording, lines_of, read_line, read_recordings


@dataclass(frozen=True)
class SpeechSource:
    """One source of speech."""

    path: str
    """A `.jsonl` file, or a folder."""
    field: str = "data.train_data"
    """The config key that names it, with which messages begin."""
    weight: float = 1.0
    """Its share of what training reads, of the sum of all weights."""
    transcribed: bool = True
    """Whether it is stereo dialogues with transcripts; else one voice without."""
    channel: Channel | None = None
    """The channel of that voice in a recording with several; None refuses such recordings."""

    @classmethod
    def of(cls, source: DataSource, data: MoshiData, field: str) -> SpeechSource:
        """What a source of a config is, with what it takes from the section."""
        transcribed = data.format_of(source) == "transcribed"
        channel = None if transcribed else data.channel_of(source)
        return cls(source.path, field, source.weight, transcribed, channel)

    def recordings(
        self,
        *,
        frame_sec: float,
        notes: list[str] | None = None,
        wholly: bool = False,
        counted: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> list[Recording]:
        """Its recordings, checked; `ttt_moshi.recordings.read_recordings` says how far.

        Args:
            frame_sec: length of the codec's frame in seconds; a shorter recording is refused.
            notes: where sentences are put about what trains, but hardly as it was meant.
            wholly: decode everything, whatever it takes.
            counted: tells how far they are.

        Raises:
            EnvironmentProblem: a recording is missing or broken; the message names file and line.
        """
        if self.transcribed:
            return read_recordings(
                Path(self.path), frame_sec=frame_sec, field=self.field, notes=notes, wholly=wholly, counted=counted
            )
        found: list[Recording] = []
        problems: list[str] = []
        listening = Listening(wholly, voice=self.voice)
        for place, read in counted(self._named(frame_sec)):
            if isinstance(read, str):
                problems.append(f"{place}: {read}")
            elif (wrong := self._wrong_channels(read) or _broken(listening, read)) is not None:
                problems.append(f"{_at(place, read.audio)}: {wrong}")
            else:
                found.append(read)
        if not found and not problems:
            problems.append(f"{self.path}: no recordings; write lines such as {RECORDING_EXAMPLE}")
        if problems:
            raise EnvironmentProblem.about(problems, "recordings cannot be used", where=self.field)
        if notes is not None:
            notes += [f"{self.field}: {told}" for told in listening.told()]
        return found

    def count(self) -> int:
        """How many recordings it names, as far as its lists can be read."""
        source = Path(self.path)
        indexes = jsonl_files(source)
        if not indexes:
            return 0 if self.transcribed else len(sound_files(source))
        return sum(1 for _ in lines_of(indexes, [])) if source.exists() else 0

    def voice(self, sound: Tensor) -> Tensor:
        """The voice in the sound `[channels, S]` of a recording without transcript, `[1, S]`."""
        return one_channel(sound, self.channel)

    def _wrong_channels(self, recording: Recording) -> str | None:
        channels = recording.info.channels
        if channels > 2 and self.channel in ("left", "right"):
            return f"{channels} channels have no left and right; write channel: mean"
        if channels > 1 and self.channel is None:
            return (
                f"{'stereo' if channels == 2 else f'{channels} channels'}; write data.channel: left "
                f"or right for the channel that is Moshi's voice, or mean"
            )
        return None

    def _named(self, frame_sec: float) -> Iterator[tuple[str, Recording | str]]:
        """The place of each recording with what was read there, or what is wrong with it."""
        source = Path(self.path)
        if not source.exists():
            raise EnvironmentProblem(f"{self.field}: {source} does not exist; name a .jsonl file or a folder")
        indexes = jsonl_files(source)
        for index in indexes:
            for line in read_jsonl(index):
                try:
                    yield line.place, read_line(line, frame_sec, stereo=False)
                except BadLineError as error:
                    yield line.place, str(error)
        for file in () if indexes else sound_files(source):
            yield str(file), _read_file(file, frame_sec)


def sources_of_split(data: MoshiData, split: str) -> list[SpeechSource]:
    """The sources of a split, `train` or `eval`: those that the config names, else the demo's own.

    If the config names data for training alone, `eval` is these.
    """
    own = data.source(str(demo.EVAL_DATA if split == "eval" else demo.TRAIN_DATA))
    named = places_of_split(data, split) or {"data.train_data": own}
    return [SpeechSource.of(source, data, field) for field, source in named.items()]


def sound_files(folder: Path) -> list[Path]:
    """The sound files in a folder at any depth, by their endings; `chapter_2` comes before `chapter_10`."""
    found = (file for file in folder.rglob("*") if file.suffix.lower() in SOUND_FILES and file.name[0] != ".")
    return sorted((file for file in found if file.is_file()), key=_in_order)


def _in_order(file: Path) -> tuple[tuple[str | int, ...], ...]:
    """A key in which numbers in names are compared as numbers. Texts and numbers take turns, so they never meet."""
    return tuple(
        tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)) for name in file.parts
    )


def _broken(listening: Listening, recording: Recording) -> str | None:
    """What is wrong with a recording that is decoded; None if nothing is."""
    try:
        listening.listen(recording.audio, recording.info, ())
    except UnreadableAudioError as error:
        return f"cannot be decoded: {error}"
    return None


def _at(place: str, audio: Path) -> str:
    """Where a recording is: its line and its file, or its file alone if no line names it."""
    return place if place == str(audio) else f"{place}: {audio}"


def measure(file: Path) -> float:
    """Length of a sound file in seconds.

    Raises:
        EnvironmentProblem: it cannot be decoded, or is shorter than a frame; the message names it.
    """
    read = _read_file(file, 1 / FRAME_RATE)
    if isinstance(read, str):
        raise EnvironmentProblem(f"{file}: {read}")
    return read.info.seconds


def _read_file(file: Path, frame_sec: float) -> Recording | str:
    """A sound file as a recording, or what is wrong with it."""
    try:
        info = inspect_audio(file)
    except OSError as error:
        return f"cannot be read: {unreadable(error)}"
    except UnreadableAudioError as error:
        return f"cannot be decoded: {error}"
    if info.seconds < frame_sec:
        return f"{info.seconds:.3f} s are less than one frame ({frame_sec:g} s); move it elsewhere"
    return Recording(str(file), file, info)
