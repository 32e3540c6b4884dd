"""Sound files in, tensors out: what is in a file, a span of it, another sample rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sphn
import torch
from torch import Tensor
from torch.nn import functional as F

# What an encoder may have dropped from or padded to the end of a file: mp3 and Vorbis do, by some frames of theirs.
_LENIENCY_SEC = 0.25


class UnreadableAudioError(ValueError):
    """A file that is not sound, or not whole; the message says why, and does not name the file."""


@dataclass(frozen=True)
class AudioInfo:
    """What a sound file's header says."""

    channels: int
    sample_rate: int
    """Samples a second."""
    samples: int
    """Samples of each channel."""

    @property
    def seconds(self) -> float:
        """Length."""
        return self.samples / self.sample_rate


def inspect_audio(path: Path) -> AudioInfo:
    """Read a file's header, and try its end, where a file that was cut short gives itself away.

    Raises:
        UnreadableAudioError: it is not sound, or not whole.
    """
    reader = _decode(path, sphn.FileReader, str(path))
    rate = int(reader.sample_rate)
    info = AudioInfo(channels=int(reader.channels), sample_rate=rate, samples=round(reader.duration_sec * rate))
    if info.samples:
        tail = min(info.samples, max(1, round(_LENIENCY_SEC * rate)))
        _decode(path, reader.decode, *_span(info.samples - tail, info.samples, rate))
    return info


def read_audio(path: Path, info: AudioInfo, begin: int, end: int) -> Tensor:
    """Samples `begin` to `end` of each channel, `[channels, end - begin]` float32.

    Raises:
        UnreadableAudioError: they cannot be decoded.
    """
    reader = _decode(path, sphn.FileReader, str(path))
    sound = torch.from_numpy(_decode(path, reader.decode, *_span(begin, end, info.sample_rate)))
    missing = end - begin - sound.shape[-1]
    if missing > _LENIENCY_SEC * info.sample_rate:
        raise UnreadableAudioError(
            f"breaks off {missing / info.sample_rate:.2f} s before the length that its header gives"
        )
    return F.pad(sound, (0, missing))


def resample(sound: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """Sound `[channels, S]` at another rate, `[channels, ceil(S * target_rate / source_rate)]`, without delay.

    A sinc under a cosine-squared window of 32 zero crossings to each side, cut off just below the lower of the two
    Nyquist frequencies. (`sphn.resample` delays by 10 to 30 ms, which would set sound against words.)
    """
    if source_rate == target_rate:
        return sound
    common = math.gcd(source_rate, target_rate)
    up, down = target_rate // common, source_rate // common
    cutoff = 0.95 * min(1.0, up / down)
    half = math.ceil(32 / cutoff)
    length = -(-sound.shape[-1] * up // down)
    pieces = F.pad(sound, (half, half + 1)).unfold(-1, 2 * half + 1, 1)
    out = sound.new_empty(sound.shape[0], length)
    taps = torch.arange(-half, half + 1, dtype=torch.float64)
    for phase in range(min(up, length)):  # every up-th output sample lies equally between two input samples
        whole, part = divmod(phase * down, up)
        at = taps - part / up
        weights = torch.sinc(cutoff * at) * torch.cos(at * (math.pi / (2 * (half + 1)))).square()
        weights = (weights / weights.sum()).to(sound)
        count = -(-(length - phase) // up)
        out[:, phase::up] = pieces[:, whole::down][:, :count] @ weights
    return out


def _span(begin: int, end: int, rate: int) -> tuple[float, float]:
    """Start and duration in seconds; half a sample more, because the decoder rounds both down."""
    return (begin + 0.5) / rate, (end - begin + 0.5) / rate


def _decode(path: Path, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except BaseException as error:
        # The decoder is Rust: some broken headers make it panic, which is no Exception in Python.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UnreadableAudioError(str(error).removeprefix(f'"{path}": ') or type(error).__name__) from None
