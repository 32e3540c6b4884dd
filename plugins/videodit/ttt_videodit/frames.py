"""Video files in, pictures out: at the model's frame rate, scaled and cropped to its size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import av.error
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ttt.reading import require_file
from ttt_videodit.geometry import FRAMES_PER_SECOND

Picture = npt.NDArray[np.uint8]
"""`[H,W,3]`, red, green, blue."""

_FORMATS: Final = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,obu,ivf,ogg,flv,live_flv,asf,"
    "gif,mxf,nut,yuv4mpegpipe,dv,vc1,wtv,rm,apng,swf,amv,nsv"
)
"""The formats that FFmpeg may try: video, but no playlists, which could lead it to other files and hosts."""
_NO_VIDEO: Final = (av.error.InvalidDataError, av.error.ArgumentError)
_MAX_PIXELS: Final = 1 << 27
"""Of a frame, before and after scaling; 16K video has 133 million."""
_SEEK_SEC: Final = 2  # nearer to the start, decoding up to there is as quick


class UnreadableVideoError(ValueError):
    """A file is not video, is damaged or too short; the message says why, but does not name the file."""


@dataclass(frozen=True)
class VideoInfo:
    """The facts in a video file's header."""

    seconds: float | None
    """Length; None if the header does not say."""


def inspect_video(path: Path) -> VideoInfo:
    """Read a file's header.

    Raises:
        UnreadableVideoError: it is not video.
    """
    with _opened(path) as (container, stream):
        if stream.duration is not None and stream.time_base is not None:
            return VideoInfo(float(stream.duration * stream.time_base))
        return VideoInfo(None if container.duration is None else container.duration / 1_000_000)


def read_frames(path: Path, *, start_sec: float, count: int, height: int, width: int) -> Iterator[Picture]:
    """Pictures of a video at 16 a second: for each time `start_sec + i / 16`, the frame that is shown at that time.

    The time of the last picture may be 1/16 s past the end; then the last frame is used again: a video of 9 s has 144
    frames of 1/16 s, and its latents stand for 145.

    Args:
        path: the file.
        start_sec: time of the first picture.
        count: how many pictures.
        height: height of the pictures; frames are scaled to cover them, then cropped equally on both sides.
        width: width of the pictures.

    Raises:
        UnreadableVideoError: the file cannot be decoded, or ends too early.
    """
    start, step = Fraction(start_sec).limit_denominator(1_000_000), Fraction(1, FRAMES_PER_SECOND)
    given, end = 0, Fraction(0)
    with _opened(path) as (container, stream):
        shown: Any = None
        for time, frame in _timed_frames(container, stream, start):
            if shown is not None and start + given * step < time:
                picture = _picture(shown, stream, height, width)
                while given < count and start + given * step < time:
                    yield picture
                    given += 1
            if given == count:
                return
            shown, end = frame, time + _duration(frame, stream)
        if shown is not None:
            picture = _picture(shown, stream, height, width)
            while given < count and start + given * step < end + step:
                yield picture
                given += 1
    if given < count:
        seconds = (count - 1) / FRAMES_PER_SECOND
        raise UnreadableVideoError(
            f"ends after {float(end):.2f} s, but {seconds:g} s from {start_sec:g} s on are asked for"
        )


def read_every_frame(path: Path, *, height: int, width: int) -> Iterator[Picture]:
    """Every picture of a video, whenever it is shown; see `read_frames`."""
    with _opened(path) as (container, stream):
        for _, frame in _timed_frames(container, stream, Fraction(0)):
            yield _picture(frame, stream, height, width)


def to_tensor(pictures: Iterable[Picture]) -> Tensor:
    """Pictures as the encoders take them: `[F,3,H,W]` float32 with values −1 … 1."""
    return torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2).float() / 127.5 - 1


def _require_size(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > _MAX_PIXELS:
        raise UnreadableVideoError(f"has frames of {width} × {height} pixels, which cannot be read")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A context with an open container and its video stream; it turns the libraries' errors into sentences."""
    try:
        require_file(path)
        # an absolute path, because FFmpeg reads a name such as `concat:a` as a protocol
        with av.open(
            str(path.absolute()), container_options={"format_whitelist": _FORMATS}, metadata_errors="replace"
        ) as container:
            if not container.streams.video:
                raise UnreadableVideoError("holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UnreadableVideoError("is of a codec that this FFmpeg cannot decode")
            _require_size(stream.width, stream.height)
            stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}
            yield container, stream
    except UnreadableVideoError:
        raise
    # ArithmeticError and MemoryError: headers with false times and sizes
    except (av.error.FFmpegError, OSError, ValueError, EOFError, ArithmeticError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        kind = "; it is not a video, or a damaged one" if isinstance(error, _NO_VIDEO) else ""
        raise UnreadableVideoError(f"cannot be decoded: {reason}{kind}") from None


def _timed_frames(container: Any, stream: Any, start: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """The frames from `start` on, and one before if there is one, with their times from the start of the video."""
    stream.thread_type = "AUTO"
    origin, base = stream.start_time, stream.time_base
    if not base:
        raise UnreadableVideoError("its frames have no times; remux it, as ffmpeg -i IN -c copy OUT.mp4 does")
    if origin is not None and start > _SEEK_SEC:
        # seek to the key frame before; if the file's index is wrong, read from the start
        container.seek(origin + int(start / base), stream=stream)
        first = next(container.decode(stream), None)
        late = first is None or first.pts is None or (first.pts - origin) * base > start
        container.seek(origin if late else origin + int(start / base), stream=stream)
    for frame in container.decode(stream):
        if frame.pts is None:
            raise UnreadableVideoError("its frames have no times; remux it, as ffmpeg -i IN -c copy OUT.mp4 does")
        origin = frame.pts if origin is None else origin
        time = (frame.pts - origin) * base
        if getattr(frame, "is_corrupt", False):
            raise UnreadableVideoError(f"the frame at {float(time):.2f} s is damaged")
        yield time, frame


def _duration(frame: Any, stream: Any) -> Fraction:
    """How long a frame is shown, seconds."""
    length = getattr(frame, "duration", None)
    if length:
        return Fraction(length * stream.time_base)
    rate = stream.average_rate or stream.guessed_rate
    return 1 / Fraction(rate) if rate else Fraction(0)


def _picture(frame: Any, stream: Any, height: int, width: int) -> Picture:
    """A frame as shown, upright and with square pixels, scaled to cover `height × width` and cropped to it."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    if turns % 2:
        height, width = width, height
    _require_size(frame.width, frame.height)
    seen = frame.width * float(stream.sample_aspect_ratio or 1)
    scale = max(height / frame.height, width / seen)
    scaled_height = max(height, math.floor(frame.height * scale + 0.5))
    scaled_width = max(width, math.floor(seen * scale + 0.5))
    if scaled_height * scaled_width > _MAX_PIXELS:
        raise UnreadableVideoError(
            f"has frames of {frame.width} × {frame.height} pixels, each {stream.sample_aspect_ratio or 1} as wide as "
            f"high, which cover {width} × {height} only if they are scaled to {scaled_width} × {scaled_height}"
        )
    pixels = frame.reformat(
        width=scaled_width, height=scaled_height, format="rgb24", interpolation="BICUBIC"
    ).to_ndarray()
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    cropped = pixels[top : top + height, left : left + width]
    return np.ascontiguousarray(np.rot90(cropped, turns))
