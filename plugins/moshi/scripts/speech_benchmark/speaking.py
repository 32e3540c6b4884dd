"""espeak-ng: texts and phonemes to sound, at the rate that is wanted, trimmed and equally loud."""

from __future__ import annotations

import io
import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soundfile

COMMAND = "espeak-ng"
LANGUAGE = "en-us"
VOICES = ("en-us+m3", "en-us+f2", "en-us+m7", "en-us+f5")
LOUDNESS_DB = -26.0
"""RMS of every clip, in decibels relative to full scale: low enough that no peak is cut."""
MARGIN_SEC = 0.02
"""What is kept before and after the part that sounds."""
THRESHOLD_DB = -50.0
"""A sample this far below the loudest one counts as silence."""


class NoSpeechError(SystemExit):
    """espeak-ng is missing or failed."""


@dataclass(frozen=True)
class Speaker:
    """A voice at a speed."""

    voice: str
    words_per_minute: int
    rate: int
    """Samples a second of what it says."""

    def say(self, text: str) -> np.ndarray:
        """The sound of a text, or of phonemes in double brackets: `[samples]` float32, trimmed and equally loud."""
        wav = _espeak("-v", self.voice, "-s", str(self.words_per_minute), "--stdout", text)
        sound, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
        return equally_loud(trimmed(resampled(sound, rate, self.rate), self.rate))


def version() -> str:
    """espeak-ng's version, as `1.51`."""
    return _espeak("--version").decode().split(":")[1].split()[0]


def phones_of(text: str) -> tuple[str, ...]:
    """A word's phonemes in `LANGUAGE`."""
    said = _espeak("-q", "-x", "-v", LANGUAGE, "--sep=_", text).decode().strip()
    return tuple(said.split("_"))


def spelled(phones: Sequence[str]) -> str:
    """Phonemes as espeak-ng takes them for a text."""
    return f"[[{'|'.join(phones)}]]"


def resampled(sound: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """A whole utterance at another rate, by cutting its spectrum: quick, and all that is below half the rate stays."""
    common = math.gcd(source_rate, target_rate)
    up, down = target_rate // common, source_rate // common
    blocks = -(-(len(sound) + source_rate // 20) // down)  # silence at the end keeps it from running into the start
    blocks += blocks % 2
    spectrum = np.fft.rfft(sound, blocks * down)[: blocks * up // 2]
    out = np.fft.irfft(spectrum, blocks * up) * (up / down)
    return out[: -(-len(sound) * up // down)].astype(np.float32)


def trimmed(sound: np.ndarray, rate: int) -> np.ndarray:
    """A sound without the silence around it, but for `MARGIN_SEC`."""
    loud = np.flatnonzero(np.abs(sound) > np.abs(sound).max() * 10 ** (THRESHOLD_DB / 20))
    margin = round(MARGIN_SEC * rate)
    return sound[max(0, int(loud[0]) - margin) : int(loud[-1]) + 1 + margin]


def equally_loud(sound: np.ndarray) -> np.ndarray:
    """A sound at `LOUDNESS_DB`."""
    level = float(np.sqrt(np.mean(np.square(sound, dtype=np.float64))))
    scaled = sound * np.float32(10 ** (LOUDNESS_DB / 20) / level)
    if np.abs(scaled).max() >= 1:
        raise ValueError(f"a peak is cut at {LOUDNESS_DB} dB; lower LOUDNESS_DB")
    return scaled


def _espeak(*arguments: str) -> bytes:
    if shutil.which(COMMAND) is None:
        raise NoSpeechError(
            f"{COMMAND} is not installed. It is free software: `apt-get install espeak-ng` on Debian and Ubuntu, "
            f"`dnf install espeak-ng` on Fedora, `brew install espeak-ng` on macOS."
        )
    done = subprocess.run([COMMAND, *arguments], capture_output=True, timeout=120, check=False)
    if done.returncode:
        raise NoSpeechError(f"{COMMAND} {' '.join(arguments)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
