"""Sound files to tensors: reads headers and spans of a file, and resamples."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sphn
import torch
from torch import Tensor
from torch.nn import functional as F

from ttt.reading import require_file, unreadable

# What an encoder may have dropped from or padded to the end of a file: mp3 and Vorbis do, by some frames of theirs.
_LENIENCY_SEC = 0.25
_PHASES_AT_ONCE: Final = 320  # of resampling, as from 11,025 to 24,000 samples a second
_RATES: Final = (1_000, 1_000_000)  # samples a second; telephones have 8,000, studios 192,000


class UnreadableAudioError(ValueError):
    """A file is not sound, or not whole; the message says why, but does not name the file."""


@dataclass(frozen=True)
class AudioInfo:
    """The facts in a sound file's header."""

    channels: int
    sample_rate: int
    """Samples a second."""
    samples: int
    """Samples of each channel."""

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.samples / self.sample_rate


def inspect_audio(path: Path) -> AudioInfo:
    """Read a file's header, and decode its end: a file that was cut short fails there.

    Raises:
        UnreadableAudioError: it is not sound, or not whole.
        OSError: it is missing, cannot be read, or is not a file.
    """
    reader = _open(path)
    rate = int(reader.sample_rate)
    if not _RATES[0] <= rate <= _RATES[1]:
        raise UnreadableAudioError(f"its header says {rate} samples a second; sound has {_RATES[0]} to {_RATES[1]}")
    info = AudioInfo(channels=int(reader.channels), sample_rate=rate, samples=round(reader.duration_sec * rate))
    if info.samples:
        tail = min(info.samples, max(1, round(_LENIENCY_SEC * rate)))
        _decode(path, reader.decode, *_span(info.samples - tail, info.samples, rate))
    return info


def read_audio(path: Path, info: AudioInfo, begin: int, end: int) -> Tensor:
    """Samples `begin` to `end` of each channel, `[channels, end - begin]` float32.

    Raises:
        UnreadableAudioError: they cannot be decoded, or are not finite.
    """
    try:
        reader = _open(path)
    except OSError as error:
        raise UnreadableAudioError(unreadable(error)) from None
    sound = torch.from_numpy(_decode(path, reader.decode, *_span(begin, end, info.sample_rate)))
    missing = end - begin - sound.shape[-1]
    if missing > _LENIENCY_SEC * info.sample_rate:
        raise UnreadableAudioError(
            f"breaks off {missing / info.sample_rate:.2f} s before the length that its header gives"
        )
    finite = sound.isfinite().all(0)
    if not bool(finite.all()):
        at = (begin + int(finite.int().argmin())) / info.sample_rate
        raise UnreadableAudioError(f"holds samples that are not finite, the first at {at:.2f} s")
    return F.pad(sound, (0, missing))


def read_resampled(path: Path, info: AudioInfo, target_rate: int, begin: int, end: int) -> Tensor:
    """Samples `begin` to `end` of what `resample` makes of the whole file, `[channels, end - begin]`, rounding aside.

    Only the part of the file that they depend on is read.

    Raises:
        UnreadableAudioError: they cannot be decoded, or are not finite.
    """
    if info.sample_rate == target_rate:
        return read_audio(path, info, begin, end)
    filtering = _Resampling.between(info.sample_rate, target_rate)
    first = begin // filtering.up  # of the outputs that have the place of an input sample, the last not after `begin`
    length = end - first * filtering.up
    start = first * filtering.down - filtering.half
    stop = start + filtering.inputs(length)
    sound = read_audio(path, info, max(start, 0), min(stop, info.samples))
    padded = F.pad(sound, (max(-start, 0), max(stop - info.samples, 0)))
    return filtering(padded, length)[:, begin - first * filtering.up :]


def resample(sound: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """Resample `[channels, S]` to another rate, `[channels, ceil(S * target_rate / source_rate)]`, without delay.

    The filter is a sinc with a cosine-squared window of 32 zero crossings on each side; its cutoff is just below the
    lower of the two Nyquist frequencies. (`sphn.resample` delays by 10 to 30 ms, which would shift it against words.)
    """
    if source_rate == target_rate:
        return sound
    filtering = _Resampling.between(source_rate, target_rate)
    length = resampled_length(sound.shape[-1], source_rate, target_rate)
    return filtering(F.pad(sound, (filtering.half, filtering.half + 1)), length)


def resampled_length(samples: int, source_rate: int, target_rate: int) -> int:
    """Samples that `resample` makes of so many."""
    return -(-samples * target_rate // source_rate)


@dataclass(frozen=True)
class _Resampling:
    """The filter of `resample` for a ratio of rates in its lowest terms."""

    up: int
    down: int

    @classmethod
    def between(cls, source_rate: int, target_rate: int) -> _Resampling:
        common = math.gcd(source_rate, target_rate)
        return cls(target_rate // common, source_rate // common)

    @property
    def cutoff(self) -> float:
        return 0.95 * min(1.0, self.up / self.down)

    @property
    def half(self) -> int:
        """Input samples on each side of an output that it depends on."""
        return math.ceil(32 / self.cutoff)

    def inputs(self, outputs: int) -> int:
        """Input samples that so many outputs depend on, if the first stands at an input sample."""
        return (outputs - 1) * self.down // self.up + 2 * self.half + 1

    def __call__(self, padded: Tensor, length: int) -> Tensor:
        """The first `length` outputs, of input whose sample `half` is the place of the first of them."""
        if self.up <= _PHASES_AT_ONCE:
            return self._at_once(padded, length)
        pieces = padded.unfold(-1, 2 * self.half + 1, 1)
        out = padded.new_empty(padded.shape[0], length)
        for phase in range(min(self.up, length)):  # every up-th output has the same place between two inputs
            whole = phase * self.down // self.up
            count = -(-(length - phase) // self.up)
            out[:, phase :: self.up] = pieces[:, whole :: self.down][:, :count] @ self._weights(phase).to(padded)
        return out

    def _at_once(self, padded: Tensor, length: int) -> Tensor:
        """As one convolution with a channel for each phase: several times faster, but it multiplies with zeros too."""
        rounds = max(1, -(-length // self.up))
        width = self.inputs(self.up)
        kernels = padded.new_zeros(self.up, 1, width)
        for phase in range(self.up):
            whole = phase * self.down // self.up
            kernels[phase, 0, whole : whole + 2 * self.half + 1] = self._weights(phase)
        missing = (rounds - 1) * self.down + width - padded.shape[-1]
        out = F.conv1d(F.pad(padded, (0, max(0, missing)))[:, None], kernels, stride=self.down)
        return out.transpose(1, 2).flatten(1)[:, :length]

    def _weights(self, phase: int) -> Tensor:
        """What an output takes of the inputs around it, if it stands `phase / up` of the way to `down` inputs later."""
        at = torch.arange(-self.half, self.half + 1, dtype=torch.float64) - phase * self.down % self.up / self.up
        weights = torch.sinc(self.cutoff * at) * torch.cos(at * (math.pi / (2 * (self.half + 1)))).square()
        return weights / weights.sum()


def _span(begin: int, end: int, rate: int) -> tuple[float, float]:
    """Start and duration in seconds; half a sample more, because the decoder rounds both down."""
    return (begin + 0.5) / rate, (end - begin + 0.5) / rate


def _open(path: Path) -> Any:
    require_file(path)
    return _decode(path, sphn.FileReader, str(path))


def _decode(path: Path, function: Any, *arguments: Any) -> Any:
    with _held_back() as said:
        try:
            return function(*arguments)
        except BaseException as error:
            # The decoder is Rust: some broken headers make it panic, which is no Exception in Python.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            said.clear()
            reason = str(error).removeprefix(f'"{path}": ') or type(error).__name__
            raise UnreadableAudioError(reason) from None


@contextlib.contextmanager
def _held_back() -> Iterator[list[bool]]:
    """Hold back output to standard error inside, such as the backtrace of a panic in the decoder.

    Yields:
        A list. If it is not empty at the end, the output is written then; else it is dropped.
    """
    wanted = [True]
    try:
        sys.stderr.flush()
        shown = os.dup(2)
    except (AttributeError, OSError, ValueError):  # there is no standard error
        yield wanted
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield wanted
        finally:
            os.dup2(shown, 2)
            os.close(shown)
            held.seek(0)
            if wanted:
                os.write(2, held.read())
