"""What kind of sound file something is, and whether a WAV file is whole: by its first bytes, without a decoder.

A WAV file says in its header how many bytes of sound it holds. A copy that broke off keeps the header, so the two are
compared; that costs nothing, however long the file is. This module imports no torch.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from ttt.files import RECORDINGS, kind_of_content
from ttt.foreign import ENOUGH
from ttt.reading import open_file

_ADPCM: Final = (0x02, 0x11)
_PLAIN: Final = (0x01, 0x03, 0x06, 0x07, 0xFFFE)
"""Formats of a WAV file in which each sample stands for itself: PCM, float, A-law, µ-law, extensible."""
_UNKNOWN: Final = (range(1), range(0x7FFFF000, 0x80000000), range(0xFFFFFF00, 0x100000000))
"""Lengths that programs write which do not know it yet, since they write to a pipe."""
_W64: Final = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_M4A: Final = "M4A (AAC or ALAC)"
_MOST_CHUNKS: Final = 1000


class UnreadableAudioError(ValueError):
    """A file is not sound, or not whole; the message says why, but does not name the file."""


@dataclass(frozen=True)
class SoundKind:
    """A kind of sound file."""

    name: str
    """In words, as "Opus"."""
    lossless: bool = False
    """Whether its header counts the samples exactly, and every one of them stands in the file."""
    compressed: bool = True
    """Whether its samples do not stand in it one by one, so that some may be missing in the middle."""
    by_sphn: bool = True
    """Whether `sphn`, which reads most kinds, reads it and can begin anywhere in it."""


def sound_kind(path: Path) -> SoundKind:
    """What kind of sound file a file is.

    Raises:
        UnreadableAudioError: it is none, but empty or something that is recognised, such as compressed or a web page.
        OSError: it is missing, cannot be read, or is not a file.
    """
    with open_file(path) as file:
        start = file.read(ENOUGH)
    if not start:
        raise UnreadableAudioError("it is empty; copy or download it again, or leave it out")
    kind = kind_of_content(start, len(start), path)
    if kind is not None and kind.name not in RECORDINGS:
        raise UnreadableAudioError(f"it is {kind}")
    return _UNKNOWN_KIND if kind is None else _sound_kind(kind.name, start)


def _sound_kind(name: str, start: bytes) -> SoundKind:
    if name == "WAV file":
        return _wav_kind(start)
    if name == "Ogg file":
        return _ogg_kind(start)
    if name == "AIFF file":
        by_sphn = start[8:12] == b"AIFF" or b"sowt" in start[12:]
        return SoundKind("AIFF", lossless=True, compressed=False, by_sphn=by_sphn)
    return _KINDS.get(name, _UNKNOWN_KIND)


_UNKNOWN_KIND: Final = SoundKind("")
_KINDS: Final = {
    "FLAC file": SoundKind("FLAC", lossless=True),
    "CAF file": SoundKind("CAF", lossless=True, compressed=False),
    "RF64 file": SoundKind("RF64", lossless=True, compressed=False, by_sphn=False),
    "Wave64 file": SoundKind("Wave64", lossless=True, compressed=False, by_sphn=False),
    "Sun audio file": SoundKind("Sun/NeXT audio", lossless=True, compressed=False, by_sphn=False),
    "MP4 file": SoundKind(_M4A, by_sphn=False),
    "Matroska file": SoundKind("WebM or Matroska"),
}
"""By the names of `ttt.files.FileKind`."""


def _wav_kind(start: bytes) -> SoundKind:
    place = start.find(b"fmt ")
    form = int.from_bytes(start[place + 8 : place + 10], "little") if place > 0 else 1
    if form in _PLAIN or place < 0:
        return SoundKind("WAV", lossless=True, compressed=False)
    name = "WAV in ADPCM" if form in _ADPCM else f"WAV in the format 0x{form:04x}"
    return SoundKind(name, by_sphn=False)


def _ogg_kind(start: bytes) -> SoundKind:
    if b"OpusHead" in start:
        return SoundKind("Opus", by_sphn=False)
    return SoundKind("Ogg FLAC", lossless=True) if b"\x7fFLAC" in start else SoundKind("Ogg")


def require_readable(path: Path) -> None:
    """Refuse, without a decoder, a file that was cut, is no sound, or is of a kind that nothing here reads.

    Raises:
        UnreadableAudioError: the message says what it is, and the way out.
        OSError: it is missing, cannot be read, or is not a file.
    """
    kind, length = sound_kind(path), wav_length(path)
    if length is not None:
        length.require_whole()
    if kind.name == _M4A:
        raise UnreadableAudioError(f"{kind.name} is not read; {convert(path)}")


def convert(path: Path) -> str:
    """The way out of a kind of file that is not read: the command that makes another of it."""
    out = path.with_suffix(".wav" if path.suffix.lower() != ".wav" else ".flac")
    return f"convert it: ffmpeg -i {path.name} {out.name}"


# --- WAV files ---


@dataclass(frozen=True)
class WavLength:
    """How long the sound of a WAV file is, by its header and by its size."""

    promised: int
    """Bytes of sound that the header counts."""
    there: int
    """Bytes between the beginning of the sound and the end of the file."""
    bytes_a_second: int
    """As the header says; 0 if it does not."""

    def require_whole(self) -> None:
        """Refuse a file that was cut, or whose header does not count its sound.

        Raises:
            UnreadableAudioError: naming what is there and what was promised.
        """
        tolerated = max(self.bytes_a_second // 100, 16)
        if any(self.promised in unknown for unknown in _UNKNOWN) and abs(self.there - self.promised) > tolerated:
            raise UnreadableAudioError(
                f"its header does not say how long it is, as if written to a pipe, though {self.there:,} bytes of "
                f"sound follow; write it anew: ffmpeg -i IN.wav OUT.wav"
            )
        if self.there < self.promised - tolerated:
            raise UnreadableAudioError(
                f"it was cut: it holds {self._of(self.there)} of the {self._of(self.promised)} of sound that its "
                f"header counts; copy or download it again, or leave it out"
            )

    def _of(self, count: int) -> str:
        told = f"{count:,} bytes"
        return f"{count / self.bytes_a_second:.2f} s ({told})" if self.bytes_a_second else told


def wav_length(path: Path) -> WavLength | None:
    """The lengths of a WAV, RF64 or Wave64 file; None of anything else, or if its header cannot be followed.

    Raises:
        OSError: it is missing, cannot be read, or is not a file.
    """
    with open_file(path) as file:
        start = file.read(12)
        try:
            if start[:4] in (b"RIFF", b"RF64", b"BW64") and start[8:12] == b"WAVE":
                return _riff_length(file)
            if _W64.startswith(start):
                file.seek(40)
                return _w64_length(file)
        except struct.error:  # the file ends inside its header
            return None
    return None


def _riff_length(file: BinaryIO) -> WavLength | None:
    size_of_file = os.fstat(file.fileno()).st_size
    large, rate = 0, 0
    for _ in range(_MOST_CHUNKS):
        name, size = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            promised = large if large and size == 0xFFFFFFFF else size
            return WavLength(promised, size_of_file - file.tell(), rate)
        content = file.read(min(size, 28))
        if name == b"ds64":
            large = int(struct.unpack_from("<Q", content, 8)[0])
        elif name == b"fmt ":
            rate = int(struct.unpack_from("<I", content, 8)[0])
        file.seek(size - len(content) + size % 2, os.SEEK_CUR)
    return None


def _w64_length(file: BinaryIO) -> WavLength | None:
    size_of_file = os.fstat(file.fileno()).st_size
    rate = 0
    for _ in range(_MOST_CHUNKS):
        name, size = struct.unpack("<16sQ", file.read(24))
        if name[:4] == b"data":
            return WavLength(size - 24, size_of_file - file.tell(), rate)
        content = file.read(min(max(size - 24, 0), 16))
        if name[:4] == b"fmt ":
            rate = int(struct.unpack_from("<I", content, 8)[0])
        file.seek((size + 7) // 8 * 8 - 24 - len(content), os.SEEK_CUR)
    return None
