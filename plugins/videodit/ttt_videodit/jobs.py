"""The job of encoding a list of videos into an index, or a part of it; other processes are kept from the same part.

Processes that make the parts of a list write the same index, one at a time.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ttt.errors import EnvironmentProblem, UnreadableError, UsageError
from ttt.files import TEMPORARY, beside_others, lock, read_header, replaced_file, waiting_lock, write_bytes, writing
from ttt.jsonl import read_jsonl
from ttt.plugins import Part
from ttt.reading import open_file, other_kind
from ttt_videodit.encoders import encoders_of
from ttt_videodit.frames import UnreadableVideoError, inspect_video
from ttt_videodit.geometry import FRAMES_PER_SECOND, LATENT_CHANNELS, SPATIAL_COMPRESSION, pixel_frames
from ttt_videodit.index import (
    VIDEO_EXAMPLE,
    EncodedSegment,
    EncodedVideo,
    LineError,
    ListedVideo,
    line_of,
    parse_encoded,
    parse_listed,
)
from ttt_videodit.options import VideoDiTData, VideoDiTOptions
from ttt_videodit.scenes import names_scenes
from ttt_videodit.wanted import Wanted

_LENIENCY_SEC: Final = 0.1  # a header's length is rounded, or that of the sound


@dataclass
class Job:
    """Encoding a list of videos into an index."""

    videos: tuple[ListedVideo, ...]
    index: Path
    wanted: Wanted
    encoders: str
    part: Part = field(default_factory=Part)
    """Which of the videos this process encodes."""
    others: list[EncodedVideo] = field(default_factory=list)
    """Videos of the index that the list does not name; they stay."""
    done: dict[ListedVideo, EncodedVideo] = field(default_factory=dict)
    """Videos of the list that are in the index."""

    @classmethod
    def of(cls, options: VideoDiTOptions, data: VideoDiTData, source: str, target: str, part: Part) -> Job:
        """Read a list.

        Raises:
            UsageError: there is no index to write.
            EnvironmentProblem: the list is wrong, with file and line.
        """
        written = getattr(data, target)
        if not isinstance(written, str) or not written.endswith(".jsonl"):
            told = written if isinstance(written, str) else "null" if written is None else "a list"
            raise UsageError(f"data.{target}: {told}; name the .jsonl index that data.{source} is to become")
        replaced_file(Path(written))
        wanted = Wanted.of(options, data)
        videos = _read_list(Path(getattr(data, source)), wanted, f"data.{source}")
        return cls(videos, Path(written), wanted, encoders_of(options), part)

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.index.parent / "latents"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from the same part of the index, and find out what is done."""
        part = "" if self.part.size == 1 else f".{self.part.rank}-of-{self.part.size}"
        name = self.folder / f".{self.index.name}{part}.lock"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            replaced_file(name)
            file = name.open("a")
        with file, beside_others(self.folder):
            try:
                lock(file, name)
            except UsageError:
                told = f"{self.index}: another process is making it{self.part.in_words()}; wait for it"
                raise UsageError(told) from None
            with self._alone():
                for left in self.index.parent.glob(f"{TEMPORARY}????????-{glob.escape(self.index.name)}"):
                    left.unlink(missing_ok=True)
                self._read_index()
            yield

    def _alone(self) -> AbstractContextManager[None]:
        """A context in which no other process writes the index."""
        return waiting_lock(self.folder / f".{self.index.name}.writing.lock")

    def _read_index(self) -> None:
        """Sort the lines of the index: done, of other lists, or to be made again because a file has changed."""
        self.others, self.done = [], {}
        if not self.index.exists():
            return
        whole = self._ends_with_a_line()
        lines = list(read_jsonl(self.index))
        planned = {(video.name, video.start_sec): video for video in self.videos}
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                entry = parse_encoded(line.content, line.place, line.folder)
            except LineError as error:
                if number == len(lines) and not whole:  # a killed run wrote half of it
                    continue
                raise EnvironmentProblem(f"{line.place}: {error}; or write a new index: name another file") from None
            self._require_same_settings(entry)
            video = planned.get((entry.video, entry.start_sec))
            if video is None:
                self.others.append(entry)
            elif replace(entry, place="") == self.plan(video) and self._as_listed(entry):
                self.done[video] = entry
            else:
                continue
            kept.append(entry)
        if len(kept) < len(lines) or not whole:
            self._write(kept)

    def _ends_with_a_line(self) -> bool:
        with open_file(self.index) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - 1))
            return size == 0 or file.read() == b"\n"

    def _require_same_settings(self, entry: EncodedVideo) -> None:
        wanted = self.wanted
        found = (entry.height, entry.width, entry.text_length, entry.frames)
        asked = (wanted.height, wanted.width, wanted.text_length, wanted.segments.frames(len(entry.segments)))
        for name, before, now in zip(("height", "width", "text_length", "latent frames"), found, asked, strict=True):
            if before != now:
                raise UsageError(
                    f"{entry.place}: {entry.video} was encoded with {name} {before}, but the config asks for {now}; "
                    f"name another index, or write the settings of the one that is there"
                )

    def plan(self, video: ListedVideo) -> EncodedVideo:
        """The line that a video will have, without its place; its files are named after their inputs."""
        wanted = self.wanted
        file = video.path.stat()
        origin = [video.name, file.st_size, file.st_mtime_ns, video.start_sec, len(video.captions)]
        settings = [wanted.segments.attn_length, wanted.segments.prefix_temporal_length, wanted.height, wanted.width]
        return EncodedVideo(
            "",
            video.name,
            video.start_sec,
            self.folder / f"{video.path.stem}-{_digest(*origin, *settings, self.encoders)}.safetensors",
            wanted.segments.frames(len(video.captions)),
            wanted.height,
            wanted.width,
            wanted.text_length,
            tuple(
                EncodedSegment(
                    caption,
                    self.folder / f"text-{_digest(*self._text_origin(caption))}.safetensors",
                )
                for caption in video.captions
            ),
        )

    def _text_origin(self, caption: str) -> tuple[object, ...]:
        """The inputs of an embedding; scene tokens are part of them, since an earlier version read them as text."""
        as_tokens = ("scene tokens",) if names_scenes(caption) else ()
        return (caption, self.wanted.text_length, self.encoders, *as_tokens)

    @property
    def own(self) -> list[ListedVideo]:
        """The videos of this process's part."""
        return self.part.of(self.videos)

    def to_do(self) -> list[ListedVideo]:
        """Those of them that are not in the index yet."""
        return [video for video in self.own if video not in self.done]

    def numbers_to_write(self) -> int:
        """How many numbers the missing latents have."""
        wanted = self.wanted
        pixels = wanted.height * wanted.width // SPATIAL_COMPRESSION**2
        rows = sum(
            2 * (plan.frames + len(plan.segments)) for plan in map(self.plan, self.to_do()) if not plan.latents.exists()
        )
        return rows * LATENT_CHANNELS * pixels

    def append(self, video: ListedVideo) -> None:
        """Add a video whose files exist to the index."""
        entry = _with_checksums(self.plan(video))
        with writing(self.index), self._alone(), self.index.open("ab") as file:
            if not self._ends_with_a_line():  # another process was killed while it wrote its line
                file.truncate(self.index.read_bytes().rfind(b"\n") + 1)
            file.write(f"{line_of(entry, self.index.parent)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.done[video] = entry

    def finish(self) -> None:
        """Sort the index: first the videos of other lists, then this list's in its order."""
        with self._alone():
            if self.part.size > 1:  # others have added theirs
                self._read_index()
            self._sort()

    def _sort(self) -> None:
        self._write([*self.others, *(self.done[video] for video in self.videos if video in self.done)])

    def _write(self, entries: Sequence[EncodedVideo]) -> None:
        content = "".join(f"{line_of(entry, self.index.parent)}\n" for entry in entries).encode()
        if not self.index.exists() or self.index.stat().st_size != len(content) or self.index.read_bytes() != content:
            write_bytes(self.index, content)

    @staticmethod
    def _as_listed(entry: EncodedVideo) -> bool:
        """Whether the files that a line names exist and have its checksums."""
        return all(
            path.is_file() and (checksum is None or _checksum_of(path) == checksum)
            for path, checksum in entry.checksums.items()
        )


def _with_checksums(entry: EncodedVideo) -> EncodedVideo:
    """The line with the checksums of the files that it names."""
    segments = tuple(replace(each, text_sha256=read_header(each.text).checksum) for each in entry.segments)
    return replace(entry, segments=segments, latents_sha256=read_header(entry.latents).checksum)


def _checksum_of(path: Path) -> str | None:
    """The checksum in a file's header; None if it has none, or the file is damaged."""
    try:
        return read_header(path).checksum
    except UnreadableError:
        raise
    except EnvironmentProblem:
        return None


def _digest(*origin: object) -> str:
    """A short name for a file's inputs."""
    return hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]


# --- the list ---


def _read_list(source: Path, wanted: Wanted, name: str) -> tuple[ListedVideo, ...]:
    """The videos of a list.

    Raises:
        EnvironmentProblem: a line is wrong, or there is none.
    """
    kind = other_kind(source)
    if kind is not None or not source.is_file():
        what = f"is {kind}, not a file" if kind else "is not a file"
        raise EnvironmentProblem(f"{name}: {source} {what}; name a .jsonl with lines such as {VIDEO_EXAMPLE}")
    videos: dict[tuple[str, float], ListedVideo] = {}
    problems = []
    for line in read_jsonl(source):
        try:
            video = parse_listed(line.content, line.place, line.folder)
            twin = videos.setdefault((video.name, video.start_sec), video)
            if twin is not video:
                raise LineError("line", f"the same video from the same start_sec as in {twin.place}; leave one out")
            _check_length(video, wanted)
        except LineError as error:
            problems.append(f"{line.place}: {error}")
    if problems:
        raise EnvironmentProblem.about(problems, "lines cannot be used", where=str(name))
    if not videos:
        raise EnvironmentProblem(f"{name}: {source}: no videos; write lines such as {VIDEO_EXAMPLE}")
    return tuple(videos.values())


def _check_length(video: ListedVideo, wanted: Wanted) -> None:
    """Compare the captions with the length in the file's header, if it gives one.

    Raises:
        LineError: there are too many.
    """
    try:
        seconds = inspect_video(video.path).seconds
    except UnreadableVideoError:  # reported later, with the videos that cannot be decoded
        return
    needed = frames_of(video, wanted) / FRAMES_PER_SECOND - 2 / FRAMES_PER_SECOND  # the last picture may be held
    if seconds is not None and video.start_sec + needed > seconds + _LENIENCY_SEC:
        count, length = len(video.captions), wanted.segment_sec
        room = max(0, int((seconds - video.start_sec + _LENIENCY_SEC) / length))
        raise LineError(
            "short",
            f"{count} {'caption' if count == 1 else 'captions'} for {length:g} s each from {video.start_sec:g} s on, "
            f"but {video.path} lasts {seconds:.2f} s; " + (f"write {room}" if room else "leave it out"),
        )


def frames_of(video: ListedVideo, wanted: Wanted) -> int:
    """Frames of video that a line's captions stand for."""
    return pixel_frames(wanted.segments.frames(len(video.captions)))
