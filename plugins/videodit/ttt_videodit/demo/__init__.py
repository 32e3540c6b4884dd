"""The demo's data: a real clip, its captions, and the codec fitted on it; `NOTICE.md` has sources."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ttt.packaged import PackagedFiles

FOLDER: Final = Path(__file__).parent
CLIP: Final = FOLDER / "city.mp4"
"""Towers at night, a time-lapse of 190 frames; the demo plays them at 16 a second."""
CAPTIONS: Final = FOLDER / "captions.json"
"""For each split, `train` and `eval`, and each square by its left edge, a caption for every segment of 3 s."""
CODEC: Final = FOLDER / "codec.safetensors"
"""`ttt_videodit.codec.DemoCodec`, fitted on the training part."""

TEXT_DIM: Final = 32
"""E, width of a text token."""
SIDE: Final = 64
"""Height and width of the squares, pixels; the clip is scaled to 128 × 72, and 4 rows are cut off above and below."""
FIRST_FRAME: Final = 20
"""The first frame of training; so its 97th frame, which starts the third segment, is in the clip's other scene."""
HELD_OUT: Final = 141
"""The first frame that is held out from training."""
HELD_OUT_FRAMES: Final = 49
"""How many frames are held out: a segment of 3 s."""
FRAMES: Final = 145
"""Frames of a square, 9 s: 37 latent frames, 3 segments."""

SHA256: Final = {
    "city.mp4": "1411369991d55e6f836e24b381535a5cd95dc9f891f53fa7e889e87b2fcd5e1c",
    "captions.json": "2cdf2564d065efa789f28aa22043de79edb360b6c367d3cbd975edf33e481510",
}
"""SHA-256 of the files that carry no checksum themselves; `sha256sum` prints it for a file that was made again."""

require_whole: Final = PackagedFiles(FOLDER, SHA256, distribution="ttt-videodit").require_whole
"""Check, once in a process, that these files are as shipped."""
