"""What may be asked of `ttt sample --audio`, checked without torch: before any model is built."""

from __future__ import annotations

import math
import os
from pathlib import Path

from ttt.errors import UsageError
from ttt.plugins import AnswerRequest

_MOST_SILENCE = 3600.0


def text_file(sound: Path) -> Path:
    """The file of what was said, which is beside the sound."""
    return sound.with_suffix(".json")


def plan(request: AnswerRequest) -> list[Path]:
    """The files of an answer: the sound, and its text.

    Raises:
        UsageError: a number is out of its range, or a file cannot be written so; the message names which.
    """
    if request.out.suffix.lower() != ".wav":
        raise UsageError(f"--out {request.out}: an answer is written as a WAV; write {request.out.with_suffix('.wav')}")
    files = [request.out, text_file(request.out)]
    for file in files:
        if os.path.realpath(file) == os.path.realpath(request.audio):
            raise UsageError(f"--out {request.out}: the answer would replace the recording {request.audio}")
    if not 0 <= request.seconds <= _MOST_SILENCE:
        raise UsageError(
            f"--seconds {request.seconds:g}: the silence after the recording is from 0 to {_MOST_SILENCE:g} s"
        )
    for option, temperature in (
        ("--temperature", request.temperature),
        ("--text-temperature", request.text_temperature),
    ):
        if temperature is not None and not (math.isfinite(temperature) and 0 <= temperature <= 100):
            raise UsageError(f"{option} {temperature:g}: is from 0, the likeliest, to 100; Moshi speaks with about 0.8")
    for option, count in (("--top-k", request.top_k), ("--text-top-k", request.text_top_k)):
        if count is not None and count < 0:
            raise UsageError(f"{option} {count}: is a number of codes, or 0 for all")
    return files
