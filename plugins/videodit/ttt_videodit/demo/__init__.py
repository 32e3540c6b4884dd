"""The demo's data: a real clip, what is to be seen in it, and the codec fitted on it. `NOTICE.md` says whence."""

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
"""`ttt_videodit.codec.DemoCodec`, fitted on what trains."""

TEXT_DIM: Final = 32
"""E, width of a text token."""
SIDE: Final = 64
"""Height and width of the squares, pixels; the clip is scaled to 128 × 72, and 4 rows are cut off above and below."""
FIRST_FRAME: Final = 20
"""Where training begins: its 97th frame, with which the third segment begins, is then the clip's other scene."""
HELD_OUT: Final = 141
"""From which frame on nothing is trained on."""
HELD_OUT_FRAMES: Final = 49
"""How many those are: a segment of 3 s."""
FRAMES: Final = 145
"""Frames of a square, 9 s: 37 latent frames, 3 segments."""

SHA256: Final = {
    "city.mp4": "1411369991d55e6f836e24b381535a5cd95dc9f891f53fa7e889e87b2fcd5e1c",
    "captions.json": "2cdf2564d065efa789f28aa22043de79edb360b6c367d3cbd975edf33e481510",
}
"""Of the files that carry no checksum themselves; `sha256sum` tells that of one made anew."""

require_whole: Final = PackagedFiles(FOLDER, SHA256, distribution="ttt-videodit").require_whole
"""See that these files are those that were shipped, once in a process."""
