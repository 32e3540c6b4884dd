"""What the codes of this plugin mean, for `ttt check --explain`; the tests run every pair of configs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from ttt.config import Explanation

_DEMO = "backbone: {name: videodit}\n"
_OWN_DATA = _DEMO + "data: {train_data: train.jsonl, eval_data: eval.jsonl}\n"
_PRETRAINED = _OWN_DATA.replace("videodit", "videodit, preset: 5b, pretrained: .").replace(
    "data: {", "data: {height: 64, width: 64, text_length: 8, "
)
_SMALL_2B = '{"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}\n'
_READER = "`ttt_videodit.index`"


def _safetensors(**shapes: tuple[int, ...]) -> str:
    """A file of zeros, as text: its header's length, the header, the zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header)
    while any(byte > 127 for byte in len(text).to_bytes(8, "little")):
        text += " "
    return len(text).to_bytes(8, "little").decode("ascii") + text + "\0" * end


def _line(video: str = "a.mp4", *, latents: str = "a.safetensors", segments: int = 1, **other: object) -> str:
    texts = [{"caption": "waves", "text": "waves.safetensors"}] * segments
    entry = {"video": video, "start_sec": 0, "latents": latents, "frames": 13, "height": 64, "width": 64}
    return json.dumps({**entry, "text_length": 8, "segments": texts, **other}) + "\n"


def _latents(segments: int) -> str:
    frames, picture = 12 * segments + 1, (16, 8, 8)
    first = (segments, *picture)
    return _safetensors(mean=(frames, *picture), std=(frames, *picture), start_mean=first, start_std=first)


def explanations() -> Mapping[str, Explanation]:
    """What each code of these rules means, with configs that trigger it and some that do not."""
    files = {
        "train.jsonl": _line(),
        "eval.jsonl": _line("b.mp4"),
        "a.safetensors": _latents(1),
        "waves.safetensors": _safetensors(text=(8, 32)),
    }
    three = _line("c.mp4", latents="c.safetensors", segments=3, frames=37)

    def own_data(title: str, what: str, why: str, *lines: str, **more: str) -> Explanation:
        bad = _OWN_DATA.replace("train.jsonl", "other.jsonl")
        return Explanation(
            "error", what, why, bad, _OWN_DATA, _READER, {**files, "other.jsonl": "".join(lines), **more}, title=title
        )

    return {
        "VDT501": own_data(
            "lines that are not of an index",
            "A line of the data is not JSON object with the keys of an index of encoded videos.",
            "The run reads every line before its first step, and stops.",
            '{"path": "a.mp4", "captions": ["waves"]}\n',
        ),
        "VDT502": own_data(
            "latents or texts that are not there",
            "A line names a file of latents, or of a text's embedding, that does not exist.",
            "The run stops before its first step; or files were moved without their index.",
            _line(latents="moved.safetensors"),
        ),
        "VDT503": own_data(
            "damaged latents or texts",
            "A file that a line names is no safetensors file, is cut short, or lacks its tensors.",
            "A copy that was interrupted leaves such files; the run stops before its first step.",
            _line(latents="cut.safetensors"),
            **{"cut.safetensors": files["a.safetensors"][:1000]},
        ),
        "VDT504": own_data(
            "latents of another size",
            "Videos were encoded with another height, width, text_length or cut than the config's.",
            "Windows of a batch must be of one size, and the positions of the model's tokens hang on it.",
            _line(height=480, width=720),
        ),
        "VDT505": own_data(
            "a segment without a text",
            "An encoded video has more, or fewer, texts than segments of 3 s.",
            "Attention runs on each segment with its own text, so each needs one.",
            _line(frames=37, segments=2),
        ),
        "VDT506": Explanation(
            "error",
            "No video of the data is as long as a window, or there is none at all.",
            "A window is not filled up with anything: there is nothing to read.",
            _DEMO + "data: {train_data: train.jsonl, eval_data: long.jsonl, duration_sec: 9}\n",
            _DEMO + "data: {train_data: three.jsonl, eval_data: long.jsonl, duration_sec: 9}\n",
            _READER,
            {**files, "three.jsonl": three, "long.jsonl": three, "c.safetensors": _latents(3)},
            title="no video as long as a window",
        ),
        "VDT507": Explanation(
            "note",
            "Some videos are shorter than a window, or have segments left over at their end.",
            "They are not read, so the data are fewer than they look.",
            _DEMO + "data: {train_data: both.jsonl, eval_data: long.jsonl, duration_sec: 9}\n",
            _DEMO + "data: {train_data: both.jsonl, eval_data: long.jsonl, duration_sec: 3}\n",
            _READER,
            {**files, "both.jsonl": files["train.jsonl"] + three, "long.jsonl": three, "c.safetensors": _latents(3)},
            title="videos shorter than a window",
        ),
        "VDT508": Explanation(
            "error",
            "No training data are named, and the preset has none of that kind of its own.",
            "The demo's clip lasts 9 s at 64 × 64; 5b has no data of its own.",
            _DEMO + "data: {duration_sec: 18}\n",
            _DEMO + "data: {duration_sec: 9}\n",
            "`ttt_videodit/demo/NOTICE.md`",
            title="no data for the run",
        ),
        "VDT509": Explanation(
            "warning",
            "A list of videos for ttt precompute has lines that it cannot use: no JSON, a caption or a file missing.",
            "It stops before it encodes anything, however long the list.",
            _DEMO + "data: {train_data: train.jsonl, eval_data: eval.jsonl, videos: videos.jsonl}\n",
            _OWN_DATA,
            _READER,
            {**files, "videos.jsonl": '{"path": "a.mp4", "captions": ["waves", ""]}\n', "a.mp4": "video\n"},
            title="videos that cannot be listed",
        ),
        "VDT601": Explanation(
            "error",
            "`backbone.pretrained` names another of CogVideoX's releases: 2b, 1.5, or one for images to video.",
            "Their positions, patches or inputs are others than those of the model that segments are cut for, so that "
            "they would not load, or mean something else. The folder's config.json says so, or the repository's name.",
            _PRETRAINED,
            _OWN_DATA,
            "`ttt_videodit.variants`",
            {**files, "config.json": _SMALL_2B},
            title="weights of another CogVideoX",
        ),
    }
