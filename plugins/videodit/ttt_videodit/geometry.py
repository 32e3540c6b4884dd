"""The frames, segments and tokens of a video: plain arithmetic, without torch.

A segment is about 3 s of video with its own text. In latent frames, segment i of a video covers
`attn_length·i … attn_length·(i+1)` and so shares one frame (`prefix_temporal_length`) with each neighbour. The first
latent frame of the video is the one that CogVideoX's VAE encodes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

SEGMENT_SEC = 3
"""Length of a segment in the words of the literature; 48 of its frames play in 3.0 s."""
FRAMES_PER_SECOND = 16
"""The frame rate at which TTT-Video trained and sampled CogVideoX."""
TEMPORAL_COMPRESSION = 4
"""Pixel frames that a latent frame stands for; the first latent frame stands for one."""
SPATIAL_COMPRESSION = 8
"""Pixels of height and of width that one latent pixel stands for."""
PATCH_SIZE = 2
"""Latent pixels of height and of width in one token."""
LATENT_CHANNELS = 16
"""Channels of a latent pixel."""


@dataclass(frozen=True)
class Segments:
    """How latent frames are cut into segments.

    Source: TTT-Video (arXiv 2504.05298), section 3.2; `attn_length` and `prefix_temporal_length` of its code.
    """

    attn_length: int = 12
    """Latent frames from the start of one segment to that of the next."""
    prefix_temporal_length: int = 1
    """Latent frames that a segment shares with the next one; the whole video has as many more."""

    @property
    def length(self) -> int:
        """Latent frames of a segment, including the frames shared with the next one."""
        return self.attn_length + self.prefix_temporal_length

    def frames(self, count: int) -> int:
        """Latent frames of a video of `count` segments."""
        return self.attn_length * count + self.prefix_temporal_length

    def frames_added(self, count: int) -> list[int]:
        """Latent frames that each of `count` segments adds to a video; the first has those beyond whole segments."""
        return [self.length] + [self.attn_length] * (count - 1)

    def count(self, frames: int) -> int:
        """Segments of a video of `frames` latent frames.

        Raises:
            ValueError: no number of segments has so many.
        """
        count, rest = divmod(frames - self.prefix_temporal_length, self.attn_length)
        if rest or count < 1:
            raise ValueError(
                f"{frames} latent frames are not a whole number of segments: 1, 2 and 3 segments have "
                f"{self.frames(1)}, {self.frames(2)} and {self.frames(3)}"
            )
        return count


def segments_in(duration_sec: int) -> int:
    """Segments of a video of so many seconds."""
    return duration_sec // SEGMENT_SEC


def pixel_frames(latent_frames: int) -> int:
    """Frames of video that so many latent frames stand for."""
    return 1 + TEMPORAL_COMPRESSION * (latent_frames - 1)


def tokens_per_frame(height: int, width: int) -> int:
    """Tokens of one latent frame of a video of so many pixels."""
    side = SPATIAL_COMPRESSION * PATCH_SIZE
    return (height // side) * (width // side)
