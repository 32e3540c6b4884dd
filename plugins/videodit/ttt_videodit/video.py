"""Videos as files: an mp4, and one picture that shows what is in it."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from numpy.typing import NDArray

from ttt.errors import EnvironmentProblem
from ttt.files import replaced_file, sync, temporary_beside, write_bytes, writing
from ttt_videodit.geometry import FRAMES_PER_SECOND

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Frames = NDArray[np.uint8]
"""Frames of a video, `[F,H,W,3]`, red, green and blue from 0 to 255."""

INK = "#303030"
"""The colour of words in pictures."""
_FAINT = "#808080"
_MOST_LINES = 8
_QUALITY = "18"
"""x264's constant rate factor: visually almost lossless."""


def write_video(path: Path, frames: Frames, *, frames_per_second: int = FRAMES_PER_SECOND, comment: str = "") -> None:
    """Write an mp4 (H.264, 4:2:0) whole or not at all.

    Args:
        path: ends in `.mp4`; its folder is made if need be.
        frames: `[F,H,W,3]`, of even height and width, as 4:2:0 needs.
        frames_per_second: at which it plays.
        comment: text for the file's metadata.

    Raises:
        EnvironmentProblem: the place cannot be written, the disk is full, or PyAV was built without an H.264 encoder.
    """
    codec = next((name for name in ("libx264", "libopenh264") if name in av.codecs_available), None)
    if codec is None:
        raise EnvironmentProblem(
            f"{path}: this PyAV ({av.__version__}) has no H.264 encoder; install the wheel from PyPI: pip install av"
        )
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        target = replaced_file(path)
        temporary = temporary_beside(target)
        try:
            with av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container:
                container.metadata["comment"] = comment
                stream = container.add_stream(codec, rate=frames_per_second)
                assert isinstance(stream, av.VideoStream)
                stream.height, stream.width = frames.shape[1:3]
                stream.pix_fmt = "yuv420p"
                if codec == "libx264":
                    stream.options = {"crf": _QUALITY}
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
                container.mux(stream.encode(None))
            sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn errors of the system and of FFmpeg while a video is written into one sentence."""
    try:
        with writing(path):
            yield
    except av.FFmpegError as error:  # `writing` reports the errors that are OSErrors
        raise EnvironmentProblem(f"{path}: cannot be written: {error}") from error


def write_contact_sheet(
    path: Path,
    frames: Frames,
    prompts: Sequence[str],
    *,
    frames_per_second: int = FRAMES_PER_SECOND,
    columns: int = 6,
    title: str = "",
) -> None:
    """Write a picture with one row for each segment: its prompt, and frames at even distances, with their times.

    Args:
        path: a `.png`.
        frames: the video, `[F,H,W,3]`.
        prompts: one for each segment.
        frames_per_second: at which the video plays.
        columns: frames in a row.
        title: a line over it all.

    Raises:
        EnvironmentProblem: the place cannot be written, or the disk is full.
    """
    content = io.BytesIO()
    contact_sheet(frames, prompts, frames_per_second=frames_per_second, columns=columns, title=title).savefig(
        content, format="png"
    )
    write_bytes(path, content.getvalue())


def contact_sheet(
    frames: Frames, prompts: Sequence[str], *, frames_per_second: int, columns: int, title: str
) -> Figure:
    """The picture that `write_contact_sheet` writes."""
    height, width = frames.shape[1:3]
    picture_width = 11.0  # inches
    cell = picture_width / columns
    headings = [_heading(number, prompt) for number, prompt in enumerate(prompts, start=1)]
    above_and_below = [0.22 * (heading.count("\n") + 1) + 0.3 for heading in headings]
    figure = new_figure(picture_width, len(prompts) * cell * height / width + sum(above_and_below) + 0.4)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    rows = figure.subplots(len(prompts), 1, squeeze=False).flat
    # Segments begin at even distances, each at the frame that it shares with the one before.
    bounds = np.linspace(0, len(frames) - 1, len(prompts) + 1)
    for axes, heading, start, end in zip(rows, headings, bounds[:-1], bounds[1:], strict=True):
        chosen = np.linspace(start, end, columns, endpoint=False).round().astype(int)
        centres = draw_strip(axes, frames[chosen], heading)
        axes.set_xticks(centres, [f"{frame / frames_per_second:.2f} s" for frame in chosen], fontsize=8, color=_FAINT)
    return figure


def draw_strip(axes: Axes, frames: Frames, heading: str) -> list[float]:
    """Draw frames side by side under a heading; returns the x of their middles."""
    count, height, width = frames.shape[:3]
    step = width + max(1, width // 40)
    strip = np.full((height, count * step - (step - width), 3), 255, dtype=np.uint8)
    for place, frame in enumerate(frames):
        strip[:, place * step : place * step + width] = frame
    axes.imshow(strip, interpolation="nearest" if width <= 128 else "auto")  # small frames: pixels, not a blur
    axes.set_title(heading, loc="left", fontsize=9, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return [place * step + width / 2 for place in range(count)]


def _heading(number: int, prompt: str) -> str:
    """A segment's prompt on as many lines as it needs, up to a few; a `$` does not begin mathematics."""
    text = f"segment {number}: {' '.join(prompt.split())}"
    lines = textwrap.wrap(text, 150, max_lines=_MOST_LINES, placeholder=" …")
    return "\n".join(lines).replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, without a window and without global state of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure
