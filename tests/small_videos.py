"""Small video files, without loss, whose frames say which they are."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt


def numbered(count: int, *, height: int = 32, width: int = 32) -> npt.NDArray[np.uint8]:
    """Frames `[F,H,W,3]`, each of one grey: its number."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return frames


def noisy(count: int, *, height: int = 32, width: int = 32, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Frames `[F,H,W,3]` of noise that differ in every pixel."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_lossless(
    path: Path,
    frames: npt.NDArray[np.uint8],
    *,
    frames_per_second: int | Fraction = 16,
    pixel_aspect: Fraction | None = None,
    turned: int | None = None,
) -> Path:
    """Write frames `[F,H,W,3]` as PNGs in a .mov, bit for bit."""
    with av.open(str(path), "w", format="mov") as container:
        stream = container.add_stream("png", rate=frames_per_second)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if turned is not None:
            stream.set_display_rotation(turned)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    return path
