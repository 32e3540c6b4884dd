"""`ttt precompute`: video files and captions to latents, text embeddings and an index of them, resumable.

Each list of videos, `data.videos` and `data.eval_videos`, becomes the index that `data.train_data` and
`data.eval_data` name, with its files in the folder `latents` beside it. A file is written whole or not at all, and
named after what it was made from: whatever a killed run left is found and used by the next, and indexes beside each
other, of the stages of a curriculum say, share their latents.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from torch import Tensor

from ttt.errors import EnvironmentProblem, UnreadableError, UsageError
from ttt.files import (
    TEMPORARY,
    lock,
    read_header,
    replaced_file,
    require_space,
    verify_tensors,
    write_bytes,
    write_tensors,
    writing,
)
from ttt.jsonl import read_jsonl
from ttt.printable import say
from ttt.progress import Steps
from ttt.reading import open_file, other_kind
from ttt.train.setup import choose_device, threads
from ttt.words import duration_in_words, first_few
from ttt_videodit.encoders import VideoEncoder, encode_video, encoders_of, load_text_encoder, load_video_encoder
from ttt_videodit.frames import UnreadableVideoError, inspect_video, read_frames
from ttt_videodit.geometry import (
    FRAMES_PER_SECOND,
    LATENT_CHANNELS,
    SPATIAL_COMPRESSION,
    TEMPORAL_COMPRESSION,
    pixel_frames,
)
from ttt_videodit.index import (
    VIDEO_EXAMPLE,
    EncodedSegment,
    EncodedVideo,
    LineError,
    ListedVideo,
    Wanted,
    line_of,
    parse_encoded,
    parse_listed,
)
from ttt_videodit.options import VideoDiTData, VideoDiTOptions, VideoDiTRun
from ttt_videodit.scenes import NO_SCENES, names_scenes

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Scaled, what the VAE says in bfloat16 is no bfloat16 any more; float16 is as small and rounds it less.
_STORED: Final = {torch.float32: torch.float32, torch.bfloat16: torch.float16}
_SOURCES: Final = (("videos", "train_data"), ("eval_videos", "eval_data"))
_HEADER: Final = "ttt_videodit.precompute"
_LENIENCY_SEC: Final = 0.1  # a header's length is rounded, or that of the sound


def precompute(config: VideoDiTRun, *, console: Console) -> None:
    """Encode the videos that the config lists and write the indexes that it trains on.

    Videos that an earlier run has encoded are not encoded again, even if it was killed; nor is a text that another
    segment has. A video that cannot be decoded is told at the end, and everything else is done.

    Args:
        config: resolved; `data.videos` and `data.eval_videos` say from what, `data.train_data` and `data.eval_data`
            where to, `backbone` by which encoders, `train.device`, `train.param_dtype` and `train.cpu_threads` how.
        console: where to report.

    Raises:
        UsageError: the config names no list or no index, or another process is at it.
        EnvironmentProblem: a list is wrong, with its file and line, before anything is done; encoders cannot be had;
            the disk or the memory is full; or, after all the rest is done, videos could not be decoded.
    """
    options, data = config.backbone, config.data
    jobs = [_Job.of(options, data, source, target) for source, target in _SOURCES if getattr(data, source) is not None]
    if not jobs:
        raise UsageError(f"data.videos: null; name a .jsonl file with lines such as {VIDEO_EXAMPLE}")
    if len({job.index.resolve() for job in jobs}) < len(jobs):
        raise UsageError(f"data.eval_data: {data.eval_data} is data.train_data too; name another index")
    device = choose_device(config.train.device)
    dtype = torch.float32 if options.preset == "demo" else _DTYPES[config.train.param_dtype]
    with contextlib.ExitStack() as stack:
        for job in jobs:
            stack.enter_context(job.held())
        stack.enter_context(threads(config.train.cpu_threads))
        failed: list[str] = []
        if any(job.to_do() for job in jobs):
            require_space(jobs[0].folder, sum(job.bytes_to_write(dtype) for job in jobs), what="what the videos become")
            with _memory_errors():
                _encode_texts(jobs, options, console, device=device, dtype=dtype)
                failed = _encode_videos(jobs, options, console, device=device, dtype=dtype)
        for job in jobs:
            job.finish()
            say(console, f"{job.index}: {len(job.done)} of {len(job.videos)} videos")
    if failed:
        raise EnvironmentProblem.about(
            failed,
            "videos could not be encoded; the rest is done. Mend them, or take their lines out, and run the same "
            "command again",
        )


@dataclass
class _Job:
    """A list of videos on its way to an index."""

    videos: tuple[ListedVideo, ...]
    index: Path
    wanted: Wanted
    encoders: str
    others: list[EncodedVideo] = field(default_factory=list)
    """Videos of the index that the list does not name; they stay."""
    done: dict[ListedVideo, EncodedVideo] = field(default_factory=dict)
    """Those of the list that are in the index."""

    @classmethod
    def of(cls, options: VideoDiTOptions, data: VideoDiTData, source: str, target: str) -> _Job:
        """Read a list.

        Raises:
            UsageError: there is no index to write.
            EnvironmentProblem: the list is wrong, with file and line.
        """
        written = getattr(data, target)
        if written is None or not written.endswith(".jsonl"):
            raise UsageError(
                f"data.{target}: {'null' if written is None else written}; name the .jsonl index that data.{source} is "
                f"to become"
            )
        replaced_file(Path(written))
        wanted = Wanted.of(options, data)
        videos = _read_list(Path(getattr(data, source)), wanted, f"data.{source}")
        return cls(videos, Path(written), wanted, encoders_of(options))

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.index.parent / "latents"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from this index, and see what is done."""
        name = self.folder / f".{self.index.name}.lock"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            replaced_file(name)
            file = name.open("a")
        with file, _beside_others(self.folder):
            try:
                lock(file, name)
            except UsageError:
                raise UsageError(f"{self.index}: another process is making it; wait for it") from None
            for left in self.index.parent.glob(f"{TEMPORARY}????????-{glob.escape(self.index.name)}"):
                left.unlink(missing_ok=True)
            self._read_index()
            yield

    def _read_index(self) -> None:
        """Sort the lines of the index: done, of other lists, or made from what is no more and so to be made anew."""
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
            file.seek(max(0, os.fstat(file.fileno()).st_size - 1))
            return file.read() == b"\n"

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
        """The line that a video will have, place aside; its files are named after what they are made from."""
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
        """What an embedding is made from; scene tokens, which were read as text once, say so."""
        as_tokens = ("scene tokens",) if names_scenes(caption) else ()
        return (caption, self.wanted.text_length, self.encoders, *as_tokens)

    def to_do(self) -> list[ListedVideo]:
        """The videos that are not in the index yet."""
        return [video for video in self.videos if video not in self.done]

    def bytes_to_write(self, dtype: torch.dtype) -> int:
        """Size of the latents that are missing."""
        wanted = self.wanted
        pixels = wanted.height * wanted.width // SPATIAL_COMPRESSION**2
        rows = sum(
            2 * (plan.frames + len(plan.segments)) for plan in map(self.plan, self.to_do()) if not plan.latents.exists()
        )
        return rows * LATENT_CHANNELS * pixels * _STORED[dtype].itemsize

    def append(self, video: ListedVideo) -> None:
        """Put a video whose files are there into the index."""
        entry = _with_checksums(self.plan(video))
        with writing(self.index), self.index.open("ab") as file:
            file.write(f"{line_of(entry, self.index.parent)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.done[video] = entry

    def finish(self) -> None:
        """Bring the index into the order of the list, after the videos of others."""
        self._write([*self.others, *(self.done[video] for video in self.videos if video in self.done)])

    def _write(self, entries: Sequence[EncodedVideo]) -> None:
        content = "".join(f"{line_of(entry, self.index.parent)}\n" for entry in entries).encode()
        if not self.index.exists() or self.index.stat().st_size != len(content) or self.index.read_bytes() != content:
            write_bytes(self.index, content)

    @staticmethod
    def _as_listed(entry: EncodedVideo) -> bool:
        """Whether the files that a line names are there, with the checksums that it says."""
        return all(
            path.is_file() and (checksum is None or _checksum_of(path) == checksum)
            for path, checksum in entry.checksums.items()
        )


@contextlib.contextmanager
def _beside_others(folder: Path) -> Iterator[None]:
    """Work in a folder, others too; where nobody does, first clear away what killed processes left half written."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with replaced_file(folder / ".lock").open("a") as file:
        with contextlib.suppress(OSError):  # others are at work, or the file system has no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # safetensors names what it is writing `.tmp` and six letters; here only what is ours was written so
            for left in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(".tmp??????")):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _with_checksums(entry: EncodedVideo) -> EncodedVideo:
    """The line with the checksums of the files that it names."""
    segments = tuple(replace(each, text_sha256=read_header(each.text).checksum) for each in entry.segments)
    return replace(entry, segments=segments, latents_sha256=read_header(entry.latents).checksum)


def _checksum_of(path: Path) -> str | None:
    """What a file's header says; None where it has none, or is damaged."""
    try:
        return read_header(path).checksum
    except UnreadableError:
        raise
    except EnvironmentProblem:
        return None


def _is_whole(path: Path, console: Console) -> bool:
    """Whether a file is there and is what was written; one that is damaged is told and removed, to be made anew."""
    if not path.is_file():
        return False
    try:
        verify_tensors(path)
    except UnreadableError:  # what is in it may be whole
        raise
    except EnvironmentProblem as problem:
        say(console, f"{problem}: it is made anew")
        path.unlink(missing_ok=True)
        return False
    return True


def _digest(*origin: object) -> str:
    """A short name for what a file is made from."""
    return hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]


# --- the list ---


def _read_list(source: Path, wanted: Wanted, name: str) -> tuple[ListedVideo, ...]:
    """The videos of a list.

    Raises:
        EnvironmentProblem: a line is wrong, or there is none.
    """
    kind = other_kind(source)
    if kind is not None or not source.is_file():
        what = f"is {kind}, not a file" if kind else "is no file"
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
    """Hold the captions against the length that the file's header says, where it says one.

    Raises:
        LineError: there are too many.
    """
    try:
        seconds = inspect_video(video.path).seconds
    except UnreadableVideoError:  # told with those that fail further on
        return
    needed = _pixel_frames(video, wanted) / FRAMES_PER_SECOND - 2 / FRAMES_PER_SECOND  # the last picture may be held
    if seconds is not None and video.start_sec + needed > seconds + _LENIENCY_SEC:
        count, length = len(video.captions), wanted.segment_sec
        room = max(0, int((seconds - video.start_sec + _LENIENCY_SEC) / length))
        raise LineError(
            "short",
            f"{count} {'caption' if count == 1 else 'captions'} for {length:g} s each from {video.start_sec:g} s on, "
            f"but {video.path} lasts {seconds:.2f} s; " + (f"write {room}" if room else "leave it out"),
        )


def _pixel_frames(video: ListedVideo, wanted: Wanted) -> int:
    return pixel_frames(wanted.segments.frames(len(video.captions)))


# --- the work ---


def _encode_texts(
    jobs: Sequence[_Job], options: VideoDiTOptions, console: Console, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Make the embeddings that are missing, each once; the encoder is let go before the videos' is loaded."""
    places: dict[Path, tuple[str, str]] = {}
    whole: set[Path] = set()
    for job in jobs:
        for video in job.to_do():
            for number, segment in enumerate(job.plan(video).segments, start=1):
                if segment.text in whole or (segment.text not in places and _is_whole(segment.text, console)):
                    whole.add(segment.text)
                else:
                    places.setdefault(segment.text, (segment.caption, f"{video.place}, caption {number}"))
    if not places:
        return
    length = jobs[0].wanted.text_length
    encoder = load_text_encoder(options, text_length=length, device=device, dtype=dtype)
    if not encoder.knows_scenes and any(names_scenes(caption) for caption, _ in places.values()):
        say(console, f"captions: {NO_SCENES}: they are read as text")
    cut = [place for caption, place in places.values() if encoder.count(caption) > length]
    if cut:
        say(console, f"captions of more than {length} tokens, cut off there: {first_few(cut, separator='; ')}")
    with Steps(console, "texts", total=len(places)) as report:
        for file, (caption, place) in places.items():
            (text,) = encoder([caption])
            if not bool(text.isfinite().all()):
                raise EnvironmentProblem(f"{place}: T5 gave numbers that are not finite; check its weights")
            header = {"caption": caption, "text_length": length, "encoder": jobs[0].encoders}
            write_tensors(file, {"text": text}, {_HEADER: json.dumps(header)})
            report.advance()


def _encode_videos(
    jobs: Sequence[_Job], options: VideoDiTOptions, console: Console, *, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Make the latents that are missing, and put each video into its index as soon as its files are there.

    Returns:
        What is wrong with those that could not be encoded.
    """
    to_do = [(job, video) for job in jobs for video in job.to_do()]
    encoder: VideoEncoder | None = None
    failed = []
    with Steps(console, "frames", total=sum(_pixel_frames(video, job.wanted) for job, video in to_do)) as report:
        for number, (job, video) in enumerate(to_do, start=1):
            plan, count = job.plan(video), _pixel_frames(video, job.wanted)
            if _is_whole(plan.latents, console):  # a run was killed before it came to the index
                report.advance(count)
            else:
                encoder = encoder or load_video_encoder(options, device=device, dtype=dtype)
                started = time.monotonic()
                pictures = read_frames(
                    video.path,
                    start_sec=video.start_sec,
                    count=count,
                    height=job.wanted.height,
                    width=job.wanted.width,
                )
                step = job.wanted.segments.attn_length * TEMPORAL_COMPRESSION
                starts = range(0, step * len(video.captions), step)
                before = report.completed
                try:
                    tensors = encode_video(report.counted(pictures), frames=count, starts=starts, encoder=encoder)
                    _write_latents(plan, tensors, job.encoders, _STORED[dtype])
                except UnreadableVideoError as error:
                    failed.append(f"{video.place}: {video.path}: {error}")
                    report.advance(before + count - report.completed)
                    continue
                spent = duration_in_words(time.monotonic() - started)
                report.line(f"{number}/{len(to_do)}  {video.name}  {count} frames in {spent}")
            job.append(video)
    return failed


def _write_latents(plan: EncodedVideo, tensors: dict[str, Tensor], encoders: str, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UnreadableVideoError(f"{name} of its latents is not finite; try train.param_dtype: float32")
    header = {
        "video": plan.video,
        "start_sec": plan.start_sec,
        "height": plan.height,
        "width": plan.width,
        "frames_per_second": FRAMES_PER_SECOND,
        "encoder": encoders,
    }
    write_tensors(plan.latents, tensors, {_HEADER: json.dumps(header)})


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise EnvironmentProblem(
            "out of memory while encoding: write train.param_dtype: bfloat16, train.device: cpu, or smaller "
            "data.height and data.width; what was encoded so far is kept"
        ) from error
