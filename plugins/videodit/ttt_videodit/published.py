"""Lines of TTT-Video's data files, recognised if they are given in place of this project's, and the way out.

Its index names `.pt` files: `vid_emb`, mean and log variance of the latents, and `text_chunk_emb`, a text for each 3 s.
They are not read. Beside them an index here has, for every segment, the latent frame that a video beginning there would
begin with, which theirs do not hold; and its texts may end in scene tokens that only its own T5 knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_TORCH: Final = (b"PK\x03\x04", b"\x80\x02")
_TEXT: Final = re.compile(r"text_\d+")
LISTED: Final = '{"path": "a.mp4", "captions": ["…", "…"]}, a caption for each 3 s'


def told_line(entry: Mapping[str, Any]) -> str | None:
    """What a line of another kind of TTT-Video's is, and the way from it to this project's; None if it is not one."""
    if "vid_emb" in entry or "text_chunk_emb" in entry:
        return (
            "a line of TTT-Video's index, whose .pt files lack what windows inside a video begin with; list the videos "
            f"themselves as {LISTED}, name that list in data.videos and run ttt precompute"
        )
    if "scene_start" in entry or "scene_end" in entry or any(_TEXT.fullmatch(key) for key in entry):
        return (
            f"a line of TTT-Video's captions, which names no video; list the videos as {LISTED}: text_0, text_1, … of "
            "that line in their order"
        )
    captions = [value for value in entry.values() if isinstance(value, Mapping) and {"text", "mp4"} <= value.keys()]
    if captions:
        return f"TTT-Video's table of captions, one for each piece of 3 s; list whole videos as {LISTED}"
    return None


def told_start(line: bytes) -> str | None:
    """The same for a line that is not text."""
    if line.startswith(_TORCH):
        return "a file of torch.save, such as TTT-Video's latents and texts, and no list; name a .jsonl"
    return None
