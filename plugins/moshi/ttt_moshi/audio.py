"""Sound files to tensors: reads headers and spans of a file, and resamples."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt.errors import EnvironmentProblem
from ttt.reading import unreadable
from ttt_moshi.containers import UnreadableAudioError
from ttt_moshi.decoding import Decoder, open_sound
from ttt_moshi.options import Channel

__all__ = [
    "AudioInfo",
    "UnreadableAudioError",
    "inspect_audio",
    "read_audio",
    "read_resampled",
    "read_wholly",
    "resample",
    "resampled_length",
]

# What an encoder may have dropped from or padded to the end of a file: mp3 and Vorbis do, by some frames of theirs.
_LENIENCY_SEC: Final = 0.25
_LENIENCY_LOSSLESS_SEC: Final = 0.01
_TAIL_SEC: Final = 1.0
_PIECE_SEC: Final = 30
_MOST_AT_ONCE: Final = 1 << 27  # samples of all channels together: 47 minutes of stereo at 24 kHz
_AGAIN: Final = "copy or download it again, or leave it out"
_PHASES_AT_ONCE: Final = 320  # of resampling, as from 11,025 to 24,000 samples a second
_RATES: Final = (1_000, 1_000_000)  # samples a second; telephones have 8,000, studios 192,000


@dataclass(frozen=True)
class AudioInfo:
    """The facts in a sound file's header."""

    channels: int
    sample_rate: int
    """Samples a second."""
    samples: int
    """Samples of each channel."""
    leniency: int = 0
    """How many of them may be missing at the end: an encoder may have dropped or padded some."""
    compressed: bool = False
    """Whether only decoding all of it shows that nothing in the middle is missing."""

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
    sound = open_sound(path)
    if not _RATES[0] <= sound.rate <= _RATES[1]:
        raise UnreadableAudioError(
            f"its header says {sound.rate} samples a second; sound has {_RATES[0]} to {_RATES[1]}"
        )
    info = AudioInfo(sound.channels, sound.rate, sound.samples, _leniency(sound), sound.kind.compressed)
    if info.samples:
        _require_end(sound, info)
    return info


@contextlib.contextmanager
def naming_sound(path: Path) -> Iterator[None]:
    """A context in which an error of a sound file becomes one that names the file.

    Raises:
        EnvironmentProblem: it is missing, broken, or no sound.
    """
    try:
        yield
    except UnreadableAudioError as error:
        raise EnvironmentProblem(f"{path}: cannot be read as sound: {error}") from None
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be read as sound: {unreadable(error)}") from None


def one_channel(sound: Tensor, channel: Channel | None) -> Tensor:
    """One channel of sound `[channels, S]`, or their mean, `[1, S]`; None is the left."""
    if len(sound) == 1 or channel == "mean":
        return sound.mean(0, keepdim=True)
    number = 1 if channel == "right" else 0
    return sound[number : number + 1]


def read_audio(path: Path, info: AudioInfo, begin: int, end: int) -> Tensor:
    """Samples `begin` to `end` of each channel, `[channels, end - begin]` float32.

    At the end of a file that an encoder made, up to a quarter of a second may be missing, which is read as silence.

    Raises:
        UnreadableAudioError: they cannot be decoded, are fewer, or are not finite.
    """
    try:
        decoder = open_sound(path)
    except OSError as error:
        raise UnreadableAudioError(unreadable(error)) from None
    return _samples(decoder, info, begin, end)


def read_wholly(path: Path, info: AudioInfo) -> Iterator[Tensor]:
    """All of a file in pieces of half a minute, `[channels, samples]` float32.

    It is decoded at once, because a decoder passes over what it cannot read: if it begins anew for each piece, only the
    last one shows that something is missing. More than half a GiB of samples is decoded in parts of that size.

    Raises:
        UnreadableAudioError: a part of it cannot be decoded, is missing, or is not finite; the message says where.
    """
    try:
        decoder = open_sound(path)
    except OSError as error:
        raise UnreadableAudioError(unreadable(error)) from None
    for begin in range(0, info.samples, size := _MOST_AT_ONCE // max(info.channels, 1)):
        sound = _samples(decoder, info, begin, min(begin + size, info.samples))
        yield from sound.split(_PIECE_SEC * info.sample_rate, 1)


def _samples(decoder: Decoder, info: AudioInfo, begin: int, end: int) -> Tensor:
    rate, wanted = info.sample_rate, end - begin
    try:
        sound = torch.from_numpy(decoder.read(begin, end))
    except UnreadableAudioError as error:
        raise UnreadableAudioError(f"breaks off: {_share(decoder, info)} ({error}); {_AGAIN}") from None
    missing = wanted - sound.shape[-1]
    lenient = info.leniency if end + info.leniency >= info.samples else 0
    if missing > lenient:
        raise UnreadableAudioError(
            f"breaks off: of the {wanted / rate:.2f} s from {begin / rate:.2f} s on, {sound.shape[-1] / rate:.2f} s "
            f"({sound.shape[-1]:,} of {wanted:,} samples) can be decoded, so it is damaged there; {_AGAIN}"
        )
    finite = sound.isfinite().all(0)
    if not bool(finite.all()):
        at = (begin + int(finite.int().argmin())) / rate
        raise UnreadableAudioError(f"holds samples that are not finite, the first at {at:.2f} s")
    return F.pad(sound, (0, missing))


def _leniency(sound: Decoder) -> int:
    return round((_LENIENCY_LOSSLESS_SEC if sound.kind.lossless else _LENIENCY_SEC) * sound.rate)


def _require_end(sound: Decoder, info: AudioInfo) -> None:
    """Decode the end of a file.

    Raises:
        UnreadableAudioError: it is not there; the message says how much is.
    """
    tail = min(info.samples, round(_TAIL_SEC * info.sample_rate))
    with contextlib.suppress(UnreadableAudioError):
        if tail - sound.read(info.samples - tail, info.samples).shape[-1] <= info.leniency:
            return
    raise UnreadableAudioError(f"it was cut, or is damaged: {_share(sound, info)}; {_AGAIN}")


def _share(sound: Decoder, info: AudioInfo) -> str:
    """How much of a file can be decoded, in words."""
    there, rate = _decodable(sound, info), info.sample_rate
    return (
        f"{there / rate:.2f} s ({there:,} samples) of the {info.seconds:.2f} s ({info.samples:,}) that its header "
        f"gives can be decoded"
    )


def _decodable(sound: Decoder, info: AudioInfo) -> int:
    """How many samples can be decoded, up to the first that cannot, to a second."""
    there = _whole_pieces(sound, info, 0, size=_PIECE_SEC * info.sample_rate)
    return _whole_pieces(sound, info, there, size=info.sample_rate)


def _whole_pieces(sound: Decoder, info: AudioInfo, there: int, *, size: int) -> int:
    """Where the first piece begins that cannot be decoded, or all of it where it breaks off, if pieces are short."""
    while there < info.samples:
        wanted = min(size, info.samples - there)
        try:
            read = sound.read(there, there + wanted).shape[-1]
        except UnreadableAudioError:
            return there
        if read < wanted:
            return there + read if size == info.sample_rate else there
        there += wanted
    return there


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
