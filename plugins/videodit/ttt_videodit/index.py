"""The two kinds of `.jsonl` files: lists of videos to encode, and indexes of what was encoded; read without torch.

A list has one video a line, `{"path": "a.mp4", "captions": ["…", "…"], "start_sec": 0}`: a caption for each segment of
3 s from `start_sec` on (0 if it is left out). An index, which `ttt precompute` writes, has one encoded video a line:

    {"video": "a.mp4", "start_sec": 0, "latents": "latents/a-0f3c….safetensors", "frames": 37, "height": 480,
     "width": 720, "text_length": 226, "segments": [{"caption": "…", "text": "latents/text-7b….safetensors",
     "text_sha256": "…"}, …], "latents_sha256": "…", "crc32": "…"}

`frames` are latent frames, `height` and `width` pixels. Paths are relative to the folder of the `.jsonl`. The latents
file holds `mean` and `std` `[frames,16,height/8,width/8]`, and for each segment the latent frame that a video beginning
with it would begin with, `start_mean` and `start_std` `[segments,16,height/8,width/8]`; a text file holds `text`
`[text_length,E]`. `latents_sha256` and `text_sha256` are the checksums in those files' headers, `crc32` is that of
the line (`ttt.checksums`); an index from before there were checksums lacks them and is read too.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ttt import checksums
from ttt.errors import EnvironmentProblem, UnreadableError
from ttt.files import Header, read_header
from ttt.jsonl import number_in, parse_object, path_in, value_in_words
from ttt.printable import shortened
from ttt.reading import other_kind, require_file, unreadable, wrong_with
from ttt_videodit.geometry import (
    LATENT_CHANNELS,
    SPATIAL_COMPRESSION,
)
from ttt_videodit.published import told_line, told_start
from ttt_videodit.wanted import Wanted

VIDEO_EXAMPLE: Final = '{"path": "a.mp4", "captions": ["waves", "a gull"]}'
"""A good line of a list."""

NOT_LISTED: Final = "damaged, or not the file that was listed: its checksum is another; run ttt precompute again"
"""The message for a file whose checksum is not the one in the index."""
_FLOATS: Final = ("F64", "F32", "F16", "BF16")


class LineError(ValueError):
    """A line, or a file that it names, cannot be used: the kind of problem, and a sentence without the place."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        """`line`, `missing`, `damaged`, `shape`, `segments` or `short`."""


@dataclass(frozen=True)
class ListedVideo:
    """A line of a list of videos."""

    place: str
    """File and line."""
    name: str
    """The path as it is written."""
    path: Path
    captions: tuple[str, ...]
    start_sec: float


@dataclass(frozen=True)
class EncodedSegment:
    """A segment of an encoded video."""

    caption: str
    text: Path
    """The file of its embedding."""
    text_sha256: str | None = field(default=None, compare=False)
    """That file's checksum, if it is known."""


@dataclass(frozen=True)
class EncodedVideo:
    """A line of an index."""

    place: str
    """File and line."""
    video: str
    """The video's path in the list that it was made from."""
    start_sec: float
    latents: Path
    frames: int
    """Latent frames."""
    height: int
    width: int
    text_length: int
    segments: tuple[EncodedSegment, ...]
    latents_sha256: str | None = field(default=None, compare=False)
    """The latents file's checksum, if it is known."""

    @property
    def checksums(self) -> dict[Path, str | None]:
        """The files that the line names, each with its checksum if it is known."""
        texts = {segment.text: segment.text_sha256 for segment in self.segments}
        return {self.latents: self.latents_sha256, **texts}


# --- lines ---


def parse_listed(line: bytes, place: str, folder: Path) -> ListedVideo:
    """Read a line of a list. Only decoding checks whether its file is video.

    Raises:
        LineError: the line is not one of a list, or its file is missing.
    """
    entry = _object(line, f"write {VIDEO_EXAMPLE}")
    unknown = sorted(set(entry) - {"path", "captions", "start_sec"})
    if unknown:
        raise LineError(
            "line", f'unknown key "{shortened(unknown[0], 120)}"; the keys are path, captions and start_sec'
        )
    name = _path(entry, "path")
    captions = entry.get("captions")
    if not isinstance(captions, list) or not captions:
        raise LineError("line", f'"captions" is {value_in_words(entry, "captions")}, not a list with one for each 3 s')
    for number, caption in enumerate(captions, start=1):
        if not isinstance(caption, str) or not caption.strip():
            raise LineError(
                "segments",
                f"caption {number} of {len(captions)} is {shortened(repr(caption), 120)}; each 3 s need a text",
            )
        wrong = wrong_with(caption)
        if wrong is not None:
            raise LineError("segments", f"caption {number} of {len(captions)} {wrong}")
    start = _seconds(entry) if "start_sec" in entry else 0.0
    path = folder / name
    _require_file(path, "paths are relative to the folder of the .jsonl")
    return ListedVideo(place, name, path, tuple(captions), start)


def parse_encoded(line: bytes, place: str, folder: Path) -> EncodedVideo:
    """Read a line of an index, without its files.

    Raises:
        LineError: the line is not one of an index.
    """
    entry = _object(line, "write the index with ttt precompute")
    try:
        checksums.parse_line(line.removeprefix(BOM_UTF8))
    except ValueError as error:
        raise LineError("damaged", f"{error}; delete the line and run ttt precompute again") from None
    latents = folder / _path(entry, "latents")
    sizes = {}
    for key in ("frames", "height", "width", "text_length"):
        value = entry.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise LineError("line", f'"{key}" is {value_in_words(entry, key)}, not a whole number')
        sizes[key] = value
    written = entry.get("segments")
    if not isinstance(written, list) or not written:
        raise LineError(
            "segments", f'"segments" is {value_in_words(entry, "segments")}, not a list with one for each 3 s'
        )
    segments = []
    for number, segment in enumerate(written, start=1):
        text = path_in(segment, "text") if isinstance(segment, dict) else None
        caption = segment.get("caption") if isinstance(segment, dict) else None
        if text is None or not isinstance(caption, str):
            raise LineError(
                "segments", f'segment {number} of {len(written)} is not {{"caption": "…", "text": "….safetensors"}}'
            )
        segments.append(EncodedSegment(caption, folder / text, _checksum(segment, "text_sha256")))
    return EncodedVideo(
        place,
        _path(entry, "video"),
        _seconds(entry),
        latents,
        segments=tuple(segments),
        latents_sha256=_checksum(entry, "latents_sha256"),
        **sizes,
    )


def line_of(video: EncodedVideo, folder: Path) -> str:
    """A video's line in an index in that folder, without a newline."""
    entry = {
        "video": video.video,
        "start_sec": video.start_sec,
        "latents": video.latents.relative_to(folder).as_posix(),
        "frames": video.frames,
        "height": video.height,
        "width": video.width,
        "text_length": video.text_length,
        "segments": [
            {
                "caption": segment.caption,
                "text": segment.text.relative_to(folder).as_posix(),
                **({} if segment.text_sha256 is None else {"text_sha256": segment.text_sha256}),
            }
            for segment in video.segments
        ],
        **({} if video.latents_sha256 is None else {"latents_sha256": video.latents_sha256}),
    }
    return checksums.sealed_line(entry)


def _object(line: bytes, way_out: str) -> dict[str, Any]:
    told = told_start(line)
    if told is not None:
        raise LineError("line", told)
    try:
        entry = parse_object(line, unique_keys=True)
    except ValueError as error:
        raise LineError("line", f"{error}; {way_out}") from None
    told = told_line(entry)
    if told is not None:
        raise LineError("line", told)
    return entry


def _path(entry: Mapping[str, Any], key: str) -> str:
    path = path_in(entry, key)
    if path is None:
        raise LineError("line", f'"{key}" is {value_in_words(entry, key)}, not a path')
    return path


def _seconds(entry: Mapping[str, Any]) -> float:
    seconds = number_in(entry, "start_sec")
    if seconds is None or not 0 <= seconds < 1e9:
        raise LineError("line", f'"start_sec" is {value_in_words(entry, "start_sec")}, not seconds from 0 on')
    return seconds


def _checksum(entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise LineError("line", f'"{key}" is {value_in_words(entry, key)}, not a checksum')
    return value


def _require_file(path: Path, way_out: str) -> None:
    try:
        require_file(path)
    except OSError as error:
        kind = other_kind(path)
        what = f"no file {shortened(str(path), 120)}" if kind is None else f"{path} is {unreadable(error)}"
        raise LineError("missing", f"{what}; {way_out}") from None


# --- what an index names ---


def check_encoded(video: EncodedVideo, wanted: Wanted) -> None:
    """Check by the headers of its files that an encoded video fits a config; no tensor is read.

    Raises:
        LineError: it does not fit, or a file is missing or damaged.
    """
    for name in ("height", "width", "text_length"):
        asked, found = getattr(wanted, name), getattr(video, name)
        if asked != found:
            raise LineError(
                "shape",
                f"was encoded with {name} {found}, but the config asks for {asked}; encode it anew, or write "
                f"data.{name}: {found}",
            )
    try:
        count = wanted.segments.count(video.frames)
    except ValueError as error:
        raise LineError("shape", str(error)) from None
    if count != len(video.segments):
        raise LineError(
            "segments",
            f"{video.frames} latent frames are {count} segments, but {len(video.segments)} "
            f"{'has a text' if len(video.segments) == 1 else 'have texts'}",
        )
    picture = (LATENT_CHANNELS, video.height // SPATIAL_COMPRESSION, video.width // SPATIAL_COMPRESSION)
    _check_tensors(
        video.latents,
        {
            "mean": (video.frames, *picture),
            "std": (video.frames, *picture),
            "start_mean": (count, *picture),
            "start_std": (count, *picture),
        },
        video.latents_sha256,
    )
    for path, checksum in {segment.text: segment.text_sha256 for segment in video.segments}.items():
        _check_tensors(path, {"text": (video.text_length, wanted.text_dim)}, checksum)
    if count < wanted.window:
        raise LineError(
            "short",
            f"lasts {count * wanted.segment_sec:g} s, less than a window of {wanted.window * wanted.segment_sec:g} s",
        )


def _check_tensors(path: Path, shapes: Mapping[str, tuple[int | None, ...]], checksum: str | None) -> None:
    _require_file(path, "run ttt precompute again")
    try:
        header: Header = read_header(path)
    except UnreadableError as error:  # the file's content may still be whole
        raise LineError("damaged", f"{error}; look at that file or disk") from None
    except EnvironmentProblem as error:
        raise LineError("damaged", f"{error}; delete it and run ttt precompute again") from None
    if checksum is not None and header.checksum != checksum:
        raise LineError("damaged", f"{path}: {NOT_LISTED}")
    for name, shape in shapes.items():
        facts = header.tensors.get(name)
        if facts is None or facts.dtype not in _FLOATS:
            what = "it holds none" if facts is None else f"it is of {facts.dtype}"
            raise LineError("damaged", f"{path}: no {name} of floating point: {what}; run ttt precompute again")
        fits = len(facts.shape) == len(shape) and all(
            asked in (None, found) for asked, found in zip(shape, facts.shape, strict=True)
        )
        if not fits:
            asked = ", ".join("E" if extent is None else str(extent) for extent in shape)
            raise LineError("shape", f"{path}: {name} is {list(facts.shape)}, not [{asked}]")


def windows_in(video: EncodedVideo, wanted: Wanted) -> int:
    """How many whole windows a video has; a rest at its end is not read."""
    return len(video.segments) // wanted.window
