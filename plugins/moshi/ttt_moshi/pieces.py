"""What windows are made of: the sound of a span of a recording, or its codes, and the words of its transcript.

All that reads files of recordings is here, and holds nothing on a device, so that worker processes may do it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ttt.errors import EnvironmentProblem
from ttt_moshi.audio import UnreadableAudioError, read_audio, resample
from ttt_moshi.interleave import Word
from ttt_moshi.recordings import Recording, read_transcript
from ttt_moshi.sources import SpeechSource
from ttt_moshi.transcripts import BrokenTranscriptError

if TYPE_CHECKING:
    from ttt_moshi.encoding import Encoding


class Place(NamedTuple):
    """Where a window is."""

    number: int
    """Of its recording."""
    window: int
    """Of that recording's windows, from 0."""
    start: float
    """Seconds in the recording."""
    end: float
    """The same; it may be past the recording's."""


class Piece(NamedTuple):
    """What a window is made of."""

    audio: Tensor
    """Sound `[channels, S]` float32 at the codec's rate; or its codes `[channels · codebooks, T]` int64."""
    words: list[Word]
    """Of the whole recording, in order of time; none of a recording without transcript."""


class Pieces(Protocol):
    """The piece of each window."""

    def __getitem__(self, index: int) -> Piece: ...


@dataclass(frozen=True)
class Spans:
    """Recordings, cut into windows of `duration_sec`."""

    recordings: tuple[Recording, ...]
    sources: tuple[SpeechSource, ...]
    """Of each recording."""
    files: tuple[range, ...]
    """The windows of each recording."""
    duration_sec: float

    def locate(self, index: int) -> Place:
        """Where a window is."""
        if not 0 <= index < self.files[-1].stop:
            raise IndexError(f"window {index} of {self.files[-1].stop}")
        number = bisect_right(self.files, index, key=lambda windows: windows.start) - 1
        window = index - self.files[number].start
        return Place(number, window, window * self.duration_sec, (window + 1) * self.duration_sec)

    def names(self) -> list[str]:
        """A name for each recording: its file's, with its folder's if others are called the same, or its path."""
        files = [recording.audio for recording in self.recordings]
        names = [file.name for file in files]
        for longer in (lambda file: f"{file.parent.name}/{file.name}", str):
            taken = Counter(names)
            names = [name if taken[name] == 1 else longer(file) for name, file in zip(names, files, strict=True)]
        return names


class SoundPieces:
    """The sound of each window, and its words.

    Args:
        spans: which windows there are.
        sample_rate: of the sound, the codec's.
    """

    def __init__(self, spans: Spans, sample_rate: int) -> None:
        self.spans = spans
        self._sample_rate = sample_rate
        self._transcript: tuple[Path, list[Word]] | None = None

    def __getitem__(self, index: int) -> Piece:
        """The piece of a window.

        Raises:
            EnvironmentProblem: its audio cannot be decoded, or a file has changed.
        """
        place = self.spans.locate(index)
        return Piece(self.sound(place), self.words_of(place.number))

    def sound(self, place: Place) -> Tensor:
        """The sound of a window.

        Raises:
            EnvironmentProblem: it cannot be decoded.
        """
        recording, source = self.spans.recordings[place.number], self.spans.sources[place.number]
        rate = recording.info.sample_rate
        begin, stop = round(place.start * rate), min(round(place.end * rate), recording.info.samples)
        try:
            sound = read_audio(recording.audio, recording.info, begin, stop)
        except UnreadableAudioError as error:
            raise self._broken(place.number, error) from None
        return resample(sound if source.transcribed else source.voice(sound), rate, self._sample_rate)

    def words_of(self, number: int) -> list[Word]:
        """The transcript of a recording, cached, since windows of a file are often read one after another.

        Raises:
            EnvironmentProblem: it cannot be read.
        """
        recording = self.spans.recordings[number]
        if not self.spans.sources[number].transcribed:
            return []
        if self._transcript is None or self._transcript[0] != recording.transcript:
            try:
                self._transcript = recording.transcript, read_transcript(recording)
            except BrokenTranscriptError as error:
                raise self._broken(number, error) from None
        return self._transcript[1]

    def _broken(self, number: int, error: Exception) -> EnvironmentProblem:
        recording, source = self.spans.recordings[number], self.spans.sources[number]
        return EnvironmentProblem(f"{source.field}: {recording.place}: {recording.audio}: {error}")


class EncodedPieces:
    """The codes of each window, encoded by itself, and its words.

    Args:
        sounds: the sound.
        codec: encodes it.
        device: the codec's.
        most_frames: T of a window.
    """

    def __init__(self, sounds: SoundPieces, codec: Encoding, device: torch.device, most_frames: int) -> None:
        self._sounds = sounds
        self._codec = codec
        self._device = device
        self._most_frames = most_frames

    def __getitem__(self, index: int) -> Piece:
        """The piece of a window."""
        return self.encoded(self._sounds[index])

    def sound_codes(self, index: int) -> Tensor:
        """The codes alone of a window, `[channels · codebooks, T]`."""
        return self._codes(self._sounds.sound(self._sounds.spans.locate(index)))

    def encoded(self, piece: Piece) -> Piece:
        """A piece with the codes of its sound."""
        return Piece(self._codes(piece.audio), piece.words)

    def _codes(self, sound: Tensor) -> Tensor:
        from ttt_moshi.encoding import encode_window

        sound = sound.to(self._device)
        with torch.no_grad():
            codes = encode_window(self._codec, sound[:, None]).cpu()[..., : self._most_frames]
        return codes.flatten(0, 1)
