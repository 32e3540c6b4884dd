"""Writes sound to a WAV file piece by piece, so that memory does not grow with it. Imports no torch."""

from __future__ import annotations

import os
import wave
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ttt.files import writing

_BYTES: Final = 2
"""Of a sample: 16 bits."""
MOST_BYTES: Final = (1 << 32) - (1 << 10)
"""Of the samples in a WAV file, whose header counts them with 32 bits."""


def wav_bytes(samples: int, *, channels: int) -> int:
    """Bytes of a file with so many samples of each channel."""
    return samples * channels * _BYTES + 44


class WavWriter:
    """A WAV file of 16 bits that grows; to be used in a `with` statement.

    Args:
        path: the file; it is replaced.
        sample_rate: samples a second.
        channels: of the sound.
    """

    def __init__(self, path: str | Path, *, sample_rate: int, channels: int = 1) -> None:
        self._path = Path(path)
        self._channels = channels
        with writing(self._path):
            self._file = open(path, "wb")  # noqa: SIM115 - __exit__ closes both
            self._wave = wave.open(self._file, "wb")  # noqa: SIM115
            self._wave.setnchannels(channels)
            self._wave.setsampwidth(_BYTES)
            self._wave.setframerate(sample_rate)

    def write(self, sound: NDArray[np.float32]) -> None:
        """Add samples `[channels, S]`, between -1 and 1; what is louder is clipped.

        Raises:
            EnvironmentProblem: the disk is full.
        """
        assert sound.ndim == 2, sound.shape
        assert len(sound) == self._channels, sound.shape
        whole = np.rint(np.clip(sound, -1, 1) * 32767).astype("<i2")
        with writing(self._path):
            self._wave.writeframesraw(np.ascontiguousarray(whole.T).tobytes())

    def __enter__(self) -> WavWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with writing(self._path):
            try:
                self._wave.close()  # writes the lengths into the header
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
