"""What recordings sound like: a channel that is silent or too loud, two that are the same, Moshi's words on the user's.

Each of these trains something else than its user means, without an error: Moshi learns to answer itself, or silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ttt.words import first_few
from ttt_moshi.audio import AudioInfo, read_audio, read_wholly
from ttt_moshi.interleave import MAIN_SPEAKER, Word

EQUAL: Final = "both channels are equal, so that the user's channel is Moshi's voice"
SCALED: Final = "one channel is the other at another level, or inverted, so that the user's channel is Moshi's voice"
SILENT: Final = "both channels are silent"
LOUD: Final = "the sound is far beyond full scale, as if its floats were made of integers"
NO_VOICE: Final = "the channel that is read is silent"
NO_MOSHI: Final = "Moshi's channel, the left one, is silent"
NO_USER: Final = "the user's channel, the right one, is silent"
SWAPPED: Final = f"words of {MAIN_SPEAKER} are on the right channel, the user's, while the left is silent"
_ONE_VOICE: Final = (
    "write the user's voice to the right channel, or silence; mono speech is read with data.format: audio"
)
_WAYS_OUT: Final = {
    EQUAL: _ONE_VOICE,
    SCALED: _ONE_VOICE,
    SILENT: "leave them out",
    LOUD: "divide the samples, so that they lie in -1 to 1",
    NO_VOICE: "read another with channel, or leave them out",
    NO_MOSHI: "write Moshi's voice to the left channel, or leave them out",
    NO_USER: "right if nobody is to be heard",
    SWAPPED: "swap the channels: ffmpeg -i IN -af 'channelmap=1|0' OUT",
}
_FRAMES_A_SECOND: Final = 12.5
_INAUDIBLE: Final = 1e-7  # mean square of a frame: −70 dB of full scale
_LOUD: Final = 10.0  # likewise, +10 dB; a file of integers has at most 1
_SAME: Final = 1e-4  # of the energy of both channels: −40 dB, which an encoder may add
_LOUDER: Final = 100.0  # 20 dB, as between a voice and what a microphone picks up of the other
_MOST_WHOLE_SEC: Final = 5 * 3600.0
"""Seconds of compressed sound that are decoded before a run starts: it takes about 2 s an hour."""
_MOST_IN_PART: Final = 50
"""Recordings that are heard in part before a run starts."""
_SPANS: Final = 6
_SPAN_SEC: Final = 2.0


@dataclass
class Heard:
    """The energies of a recording in frames of 80 ms, as far as it was heard."""

    frames: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Mean squares of the left and the right channel, by the number of the frame."""
    difference: float = 0.0
    """Energy of the difference of both channels, summed over all samples."""
    energies: tuple[float, float] = (0.0, 0.0)
    """Of the left channel and the right, likewise."""
    product: float = 0.0
    """Of both channels, summed over all samples."""

    def add(self, sound: Tensor, begin: int, rate: int) -> None:
        """Hear samples `[2, N]` that begin at a sample."""
        self.difference += float((sound[0] - sound[1]).square().sum(dtype=torch.float64))
        left, right = sound.square().sum(1, dtype=torch.float64).tolist()
        self.energies = (self.energies[0] + left, self.energies[1] + right)
        self.product += float((sound[0] * sound[1]).sum(dtype=torch.float64))
        size = max(1, round(rate / _FRAMES_A_SECOND))
        whole = sound[:, : sound.shape[1] // size * size].unfold(1, size, size).square().mean(2)
        first = round(begin / size)
        for number, (left, right) in enumerate(whole.t().tolist(), first):
            self.frames[number] = (left, right)

    def verdict(self, words: Sequence[Word]) -> str | None:
        """What is odd about the recording, one of the sentences above; None if nothing is.

        Args:
            words: of its transcript.
        """
        left, right = (max((both[side] for both in self.frames.values()), default=0.0) for side in (0, 1))
        if max(left, right) < _INAUDIBLE:
            return SILENT if self.frames else None
        if max(left, right) > _LOUD:
            return LOUD
        if self.difference <= _SAME * sum(self.energies):
            return EQUAL
        if min(left, right) >= _INAUDIBLE and self._scaled():
            return SCALED
        if self._swapped(words):
            return SWAPPED
        if left < _INAUDIBLE:
            return NO_MOSHI
        return NO_USER if right < _INAUDIBLE else None

    def verdict_on_one(self) -> str | None:
        """The same of a recording of which one voice is read, so that both channels here are that one."""
        loudest = max((left for left, _ in self.frames.values()), default=1.0)
        if loudest < _INAUDIBLE:
            return NO_VOICE
        return LOUD if loudest > _LOUD else None

    def _scaled(self) -> bool:
        """Whether one channel is the other times a number: what is left of it without that is inaudible beside it."""
        left, right = self.energies
        return left * right - self.product**2 <= _SAME * left * right

    def _swapped(self, words: Sequence[Word]) -> bool:
        """Whether Moshi's words are loud on the right and silent on the left."""
        left = right = 0.0
        for word in words:
            if word.speaker == MAIN_SPEAKER:
                for number in range(int(word.start * _FRAMES_A_SECOND), int(word.end * _FRAMES_A_SECOND) + 1):
                    both = self.frames.get(number, (0.0, 0.0))
                    left, right = left + both[0], right + both[1]
        return right > _INAUDIBLE and left * _LOUDER < right


Voice = Callable[[Tensor], Tensor]
"""Takes of the sound `[channels, N]` what is heard: two channels, or one `[1, N]`."""


def heard_wholly(audio: Path, info: AudioInfo, voice: Voice | None = None) -> Heard:
    """Hear all of a recording.

    Args:
        audio: its file.
        info: about it.
        voice: what of it is heard; None hears both channels.

    Raises:
        UnreadableAudioError: it is not whole.
    """
    heard, begin = Heard(), 0
    for piece in read_wholly(audio, info):
        heard.add(_both(piece, voice), begin, info.sample_rate)
        begin += piece.shape[1]
    return heard


def heard_in_part(audio: Path, info: AudioInfo, voice: Voice | None = None) -> Heard:
    """Hear a few seconds of a recording in several places.

    Args:
        audio: its file.
        info: about it.
        voice: what of it is heard; None hears both channels.

    Raises:
        UnreadableAudioError: they cannot be decoded.
    """
    heard = Heard()
    for begin, end in _spans(info):
        heard.add(_both(read_audio(audio, info, begin, end), voice), begin, info.sample_rate)
    return heard


def _both(sound: Tensor, voice: Voice | None) -> Tensor:
    """What is heard, `[2, N]`; one voice is on both."""
    return sound if voice is None else voice(sound).expand(2, -1)


def _spans(info: AudioInfo) -> Iterator[tuple[int, int]]:
    """Six spans of two seconds, evenly over a recording, from the beginnings of frames; or all of a short one."""
    size = max(1, round(info.sample_rate / _FRAMES_A_SECOND))
    length = round(_SPAN_SEC * info.sample_rate)
    if info.samples <= _SPANS * length:
        yield 0, info.samples
        return
    for number in range(_SPANS):
        begin = (info.samples - length) * number // (_SPANS - 1) // size * size
        yield begin, begin + length


class Listening:
    """Hears recordings one after another: wholly, if they are compressed and few, or if it is asked for; else in part.

    Args:
        wholly: whether to hear all of each.
        voice: what is read of a recording without transcript, if that is one voice; None compares Moshi and the user.
    """

    def __init__(self, wholly: bool, *, voice: Voice | None = None) -> None:
        self._wholly = wholly
        self._voice = voice
        self._decoded = self._unheard = 0.0  # seconds
        self._ends_only = 0
        self._in_part = 0
        self._count = 0
        self._verdicts: list[tuple[str, str]] = []

    def listen(self, audio: Path, info: AudioInfo, words: Sequence[Word]) -> None:
        """Hear a recording.

        Raises:
            UnreadableAudioError: it is not whole.
        """
        if self._is_heard_wholly(info):
            self._decoded += info.seconds
            self._judge(heard_wholly(audio, info, self._voice), audio, words)
            return
        if info.compressed:
            self._ends_only += 1
            self._unheard += info.seconds
        if self._in_part < _MOST_IN_PART:
            self._in_part += 1
            self._judge(heard_in_part(audio, info, self._voice), audio, words)

    def _is_heard_wholly(self, info: AudioInfo) -> bool:
        return self._wholly or (info.compressed and self._decoded + info.seconds <= _MOST_WHOLE_SEC)

    def _judge(self, heard: Heard, audio: Path, words: Sequence[Word]) -> None:
        self._count += 1
        verdict = heard.verdict(words) if self._voice is None else heard.verdict_on_one()
        if verdict is not None:
            self._verdicts.append((verdict, audio.name))

    def told(self) -> list[str]:
        """Sentences about what is odd, and about what was not decoded."""
        told = sentences(self._verdicts, self._count, wholly=not self._in_part)
        if self._ends_only:
            told.append(
                f"{self._ends_only} compressed recordings ({self._unheard / 3600:.1f} h) were decoded at their ends "
                f"only; `ttt check CONFIG --data` decodes all of them"
            )
        return told


def sentences(verdicts: Sequence[tuple[str, str]], count: int, *, wholly: bool) -> list[str]:
    """What is odd about recordings, a sentence for each kind.

    Args:
        verdicts: what is odd, and about which recording.
        count: of the recordings that were heard.
        wholly: whether each was heard from its beginning to its end.
    """
    told = []
    for kind, way_out in _WAYS_OUT.items():
        names = [name for verdict, name in verdicts if verdict == kind]
        if names:
            among = f"{len(names)} of {count} recordings" + ("" if wholly else " heard in part")
            told.append(f"in {among}, {kind}: {first_few(names)}; {way_out}")
    return told
