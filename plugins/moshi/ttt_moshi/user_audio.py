"""A recording as Moshi hears its user: frames of one channel at the codec's rate, read in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt.errors import EnvironmentProblem
from ttt_moshi.audio import AudioInfo, inspect_audio, naming_sound, one_channel, read_resampled, resampled_length
from ttt_moshi.options import PIECE, Channel


@dataclass(frozen=True)
class UserAudio:
    """A recording and which of its channels is the user.

    Args:
        path: of any rate and length.
        info: its header.
        channel: the user's; of a recording with one channel that one.
        sample_rate: of the codec.
        frame_size: of the codec, in samples.
        silence_sec: what is heard after it.
    """

    path: Path
    info: AudioInfo
    channel: Channel
    sample_rate: int
    frame_size: int
    silence_sec: float = 0.0

    @property
    def samples(self) -> int:
        """Samples of the recording at the codec's rate."""
        return resampled_length(self.info.samples, self.info.sample_rate, self.sample_rate)

    @property
    def num_frames(self) -> int:
        """Frames that are heard, the silence after it included; the last one is filled with silence."""
        return -(-(self.samples + round(self.silence_sec * self.sample_rate)) // self.frame_size)

    def frames(self) -> Iterator[Tensor]:
        """The frames in order, `[1, 1, frame_size]` float32 on the CPU. Memory does not grow with the recording.

        Raises:
            EnvironmentProblem: it cannot be decoded.
        """
        for first in range(0, self.num_frames, PIECE):
            last = min(first + PIECE, self.num_frames)
            sound = self._between(first * self.frame_size, last * self.frame_size)
            yield from sound[None, None].split(self.frame_size, 2)

    def _between(self, begin: int, end: int) -> Tensor:
        """The user's samples from one to another; silence after the recording's end."""
        stop = min(end, self.samples)
        if stop <= begin:
            return torch.zeros(end - begin)
        with naming_sound(self.path):
            channels = read_resampled(self.path, self.info, self.sample_rate, begin, stop)
        return F.pad(one_channel(channels, self.channel)[0], (0, end - stop))


def inspect(path: Path) -> AudioInfo:
    """The header of a recording that Moshi can hear.

    Raises:
        EnvironmentProblem: it is missing, broken or empty.
    """
    with naming_sound(path):
        info = inspect_audio(path)
    if not info.samples:
        raise EnvironmentProblem(f"{path}: holds no sound; name another recording with --audio")
    return info


def hear(path: str | Path, codec: Any, *, channel: Channel | None = None, silence_sec: float = 0.0) -> UserAudio:
    """A recording as a codec's user.

    Args:
        path: of the recording.
        codec: kyutai's Mimi, or the demo's codec.
        channel: which channel is the user; None is the only one, or the left.
        silence_sec: what is heard after it.

    Raises:
        EnvironmentProblem: it is missing, broken or empty.
    """
    info = inspect(Path(path))
    chosen, _ = channel_of(info, channel)
    return UserAudio(Path(path), info, chosen, codec.sample_rate, codec.frame_size, silence_sec)


def channel_of(info: AudioInfo, wanted: Channel | None) -> tuple[Channel, str]:
    """Which channel is the user's, and how to say it."""
    if info.channels == 1:
        return "left", "its one channel is the user"
    if wanted is not None:
        told = "the mean of its channels is the user" if wanted == "mean" else f"its {wanted} channel is the user"
        return wanted, f"{told} (of {info.channels})"
    return "left", (
        f"its left channel is the user, as moshi.run_inference has it (of {info.channels}); training data have the "
        f"user on the right: --user-channel right"
    )
