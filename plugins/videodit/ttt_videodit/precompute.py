"""`ttt precompute`: video files and captions to latents, text embeddings and an index of them, resumable.

Each list of videos, `data.videos` and `data.eval_videos`, becomes the index that `data.train_data` and
`data.eval_data` name, with its files in the folder `latents` beside it. A file is written whole or not at all, and
named after what it was made from: whatever a killed run left is found and used by the next, and indexes beside each
other, such as the stages of a curriculum, share their latents.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from torch import Tensor

from ttt.errors import EnvironmentProblem, UnreadableError, UsageError
from ttt.files import (
    require_space,
    verify_tensors,
    write_tensors,
)
from ttt.plugins import Part
from ttt.printable import say
from ttt.progress import Steps
from ttt.train.setup import choose_device, threads
from ttt.words import duration_in_words, first_few
from ttt_videodit.encoders import VideoEncoder, encode_video, load_text_encoder, load_video_encoder
from ttt_videodit.frames import UnreadableVideoError, read_frames
from ttt_videodit.geometry import (
    FRAMES_PER_SECOND,
    TEMPORAL_COMPRESSION,
)
from ttt_videodit.index import (
    VIDEO_EXAMPLE,
    EncodedVideo,
    ListedVideo,
)
from ttt_videodit.jobs import Job, frames_of
from ttt_videodit.options import VideoDiTOptions, VideoDiTRun
from ttt_videodit.scenes import NO_SCENES, names_scenes

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Scaled latents need more digits than bfloat16 has; float16 is as small and rounds them less.
_STORED: Final = {torch.float32: torch.float32, torch.bfloat16: torch.float16}
_SOURCES: Final = (("videos", "train_data"), ("eval_videos", "eval_data"))
_HEADER: Final = "ttt_videodit.precompute"


def precompute(config: VideoDiTRun, *, console: Console) -> None:
    """Encode the videos that the config lists and write the indexes that it trains on.

    Videos that an earlier run has encoded are not encoded again, even if it was killed; nor is a text that another
    segment has. If a video cannot be decoded, everything else is done, and it is told at the end.

    Args:
        config: resolved; `data.videos` and `data.eval_videos` say from what, `data.train_data` and `data.eval_data`
            where to, `backbone` by which encoders, `train.device`, `train.param_dtype` and `train.cpu_threads` how.
        console: where to report.

    Raises:
        UsageError: the config names no list or no index, or another process is making the index.
        EnvironmentProblem: a list is wrong, with its file and line, before anything is done; encoders cannot be had;
            the disk or the memory is full; or, after all the rest is done, videos could not be decoded.
    """
    options, data = config.backbone, config.data
    part = Part.of_launch()
    jobs = [
        Job.of(options, data, source, target, part) for source, target in _SOURCES if getattr(data, source) is not None
    ]
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
            require_space(
                jobs[0].folder,
                _STORED[dtype].itemsize * sum(job.numbers_to_write() for job in jobs),
                what="what the videos become",
            )
            with _memory_errors():
                to_do = [(job, video) for job in jobs for video in job.to_do()]
                own = _own_texts(jobs, part)
                _encode_texts(to_do, options, console, device=device, dtype=dtype, texts=own)
                failed, waiting = _encode_videos(to_do, options, console, device=device, dtype=dtype)
                if waiting:  # for texts of other parts
                    _encode_texts(waiting, options, console, device=device, dtype=dtype)
                for job, video in waiting:
                    job.append(video)
        for job in jobs:
            job.finish()
            say(console, f"{job.index}: {len(job.done)} of {len(job.videos)} videos{part.in_words()}")
    if failed:
        raise EnvironmentProblem.about(
            failed,
            "videos could not be encoded; the rest is done. Mend them, or take their lines out, and run the same "
            "command again",
        )


def _is_whole(path: Path, console: Console) -> bool:
    """Whether a file is there and whole; if it is damaged, say so and remove it, to be made anew."""
    if not path.is_file():
        return False
    try:
        verify_tensors(path)
    except UnreadableError:  # its content may be whole
        raise
    except EnvironmentProblem as problem:
        say(console, f"{problem}: it is made anew")
        path.unlink(missing_ok=True)
        return False
    return True


# --- the work ---


def _own_texts(jobs: Sequence[Job], part: Part) -> set[Path] | None:
    """The texts that this process makes, each of them the part of its first video; None for all."""
    if part.size == 1:
        return None
    owners: dict[Path, int] = {}
    for job in jobs:
        for number, video in enumerate(job.videos):
            for segment in job.plan(video).segments:
                owners.setdefault(segment.text, number % part.size)
    return {text for text, owner in owners.items() if owner == part.rank}


def _encode_texts(
    to_do: Sequence[tuple[Job, ListedVideo]],
    options: VideoDiTOptions,
    console: Console,
    *,
    device: torch.device,
    dtype: torch.dtype,
    texts: Set[Path] | None = None,
) -> None:
    """Make the embeddings that are missing, each once; the encoder is let go before the videos' is loaded.

    Args:
        to_do: videos, and whose they are.
        options: the section `backbone`.
        console: where to report.
        device: of the encoder.
        dtype: of the encoder.
        texts: those to make; None for all.
    """
    places: dict[Path, tuple[str, str]] = {}
    whole: set[Path] = set()
    for job, video in to_do:
        for number, segment in enumerate(job.plan(video).segments, start=1):
            if texts is not None and segment.text not in texts:
                continue
            if segment.text in whole or (segment.text not in places and _is_whole(segment.text, console)):
                whole.add(segment.text)
            else:
                places.setdefault(segment.text, (segment.caption, f"{video.place}, caption {number}"))
    if not places:
        return
    first = to_do[0][0]
    length = first.wanted.text_length
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
            header = {"caption": caption, "text_length": length, "encoder": first.encoders}
            write_tensors(file, {"text": text}, {_HEADER: json.dumps(header)})
            report.advance()


def _encode_videos(
    to_do: Sequence[tuple[Job, ListedVideo]],
    options: VideoDiTOptions,
    console: Console,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[list[str], list[tuple[Job, ListedVideo]]]:
    """Make the latents that are missing, and put each video into its index as soon as its files are there.

    Returns:
        What is wrong with each video that could not be encoded; and those of which texts are missing.
    """
    encoder: VideoEncoder | None = None
    failed, waiting = [], []
    with Steps(console, "frames", total=sum(frames_of(video, job.wanted) for job, video in to_do)) as report:
        for number, (job, video) in enumerate(to_do, start=1):
            plan, count = job.plan(video), frames_of(video, job.wanted)
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
            if all(segment.text.exists() for segment in plan.segments):
                job.append(video)
            else:
                waiting.append((job, video))
    return failed, waiting


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
