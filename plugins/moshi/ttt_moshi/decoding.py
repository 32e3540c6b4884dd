"""Decoders of sound files: `sphn` for most kinds, `soundfile` for a few others if it is installed.

Both are wrapped so that samples are asked for by number, and that what they raise names what is wrong and the way out.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import sphn
from numpy.typing import NDArray

from ttt.reading import require_file
from ttt_moshi.containers import SoundKind, UnreadableAudioError, convert, sound_kind, wav_length

_NO_KIND: Final = "unsupported feature: core (probe): no suitable format reader found"
_SAID: Final = {
    "no n-frames": "its last page is missing, as if it was cut, so that its length is not known",
    "end of stream": "it ends before its header does, as if it was cut",
    _NO_KIND: "it is no sound file of a known kind",
    "unsupported feature: core (codec):unsupported codec": "its codec is not read",
}
"""What `sphn` says of a file that it cannot open, in other words."""


class Decoder(Protocol):
    """An open sound file."""

    kind: SoundKind
    """What kind of file it is."""
    channels: int
    """How many."""
    rate: int
    """Samples a second."""
    samples: int
    """Samples of each channel, as its header counts them."""

    def read(self, begin: int, end: int) -> NDArray[np.float32]:
        """Samples `begin` to `end` of each channel, `[channels, at most end - begin]`, fewer if there are no more.

        Raises:
            UnreadableAudioError: they cannot be decoded.
        """
        ...


def open_sound(path: Path) -> Decoder:
    """Open a sound file.

    Raises:
        UnreadableAudioError: it is not sound, was cut, or is of a kind that is not read; with the way out.
        OSError: it is missing, cannot be read, or is not a file.
    """
    require_file(path)
    kind = sound_kind(path)
    length = wav_length(path)
    if length is not None:
        length.require_whole()
    return _Sphn(path, kind) if kind.by_sphn else _soundfile(path, kind)


class _Sphn:
    """A file read by `sphn`, which seeks by seconds."""

    def __init__(self, path: Path, kind: SoundKind) -> None:
        self.kind = kind
        self._path = path
        try:
            self._reader = decode(path, sphn.FileReader, str(path))
        except UnreadableAudioError as error:
            told = _SAID.get(str(error), str(error)) if kind.name else _SAID[_NO_KIND]
            raise UnreadableAudioError(f"{told}; {convert(path)}") from None
        self.channels, self.rate = int(self._reader.channels), int(self._reader.sample_rate)
        self.samples = round(self._reader.duration_sec * self.rate)

    def read(self, begin: int, end: int) -> NDArray[np.float32]:
        # half a sample more, because the decoder rounds both down
        start, duration = (begin + 0.5) / self.rate, (end - begin + 0.5) / self.rate
        read: NDArray[np.float32] = decode(self._path, self._reader.decode, start, duration)
        return read


class _SoundFile:
    """A file read by `soundfile`."""

    def __init__(self, path: Path, kind: SoundKind, module: Any) -> None:
        self.kind = kind
        self._path = path
        self._file = decode(path, module.SoundFile, str(path))
        self.channels, self.rate, self.samples = self._file.channels, self._file.samplerate, self._file.frames

    def read(self, begin: int, end: int) -> NDArray[np.float32]:
        decode(self._path, self._file.seek, begin)
        read: NDArray[np.float32] = decode(
            self._path, lambda: self._file.read(end - begin, dtype="float32", always_2d=True)
        )
        return read.T


def _soundfile(path: Path, kind: SoundKind) -> Decoder:
    """A file of a kind that `soundfile` alone reads.

    Raises:
        UnreadableAudioError: it is not installed, or does not read the file.
    """
    try:
        import soundfile
    except (ImportError, OSError):  # the latter of the library that it wraps
        raise UnreadableAudioError(
            f"{kind.name} is read by the package soundfile, which is not installed: pip install soundfile; or "
            f"{convert(path)}"
        ) from None
    try:
        return _SoundFile(path, kind, soundfile)
    except UnreadableAudioError as error:
        raise UnreadableAudioError(f"{kind.name} is not read here ({error}); {convert(path)}") from None


def decode(path: Path, function: Any, *arguments: Any) -> Any:
    """What a function of a decoder gives.

    Raises:
        UnreadableAudioError: it failed.
    """
    with _held_back() as said:
        try:
            return function(*arguments)
        except BaseException as error:
            # One decoder is Rust: some broken headers make it panic, which is no Exception in Python.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            said.clear()
            reason = str(error).removeprefix(f'"{path}": ').removeprefix(f"Error opening {str(path)!r}: ")
            raise UnreadableAudioError(reason.strip(". ") or type(error).__name__) from None


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
