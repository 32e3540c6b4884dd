"""`ttt precompute`: recordings to codes, once and for all runs; resumable, and by several processes side by side.

Every recording that `data.train_data` and `data.eval_data` name becomes a file in the folder `data.codes`
(`ttt_moshi.codes`), written whole or not at all and named after what it was made from. So whatever a killed process
left is found and used by the next, and several processes need not know of each other: each does its part of the list.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import beside_others, lock, replaced_file, require_space, write_tensors, writing
from ttt.plugins import Part
from ttt.printable import say
from ttt.progress import Steps
from ttt.train.setup import choose_device, memory_errors, threads
from ttt.words import duration_in_words
from ttt_moshi.codes import CodeFile
from ttt_moshi.data import Codec, codes_of_silence, cut, load_codec, stored_codes
from ttt_moshi.interleave import frames_in
from ttt_moshi.options import FRAME_RATE, MoshiRun
from ttt_moshi.pieces import EncodedPieces, SoundPieces, Spans
from ttt_moshi.sources import SpeechSource, sources_of_split
from ttt_moshi.stored import StoredCodes

_BYTES = 2
"""Of a code."""
_LESS_MEMORY = ("train.device: cpu", "a smaller data.duration_sec")


@dataclass(frozen=True)
class _Job:
    """A recording to encode."""

    number: int
    """Of its recording in the spans."""
    place: str
    file: CodeFile


def precompute(config: MoshiRun, *, console: Console) -> None:
    """Encode the recordings that the config names into the folder `data.codes`.

    Recordings that an earlier process has encoded are not encoded again. If one cannot be decoded, all others are done,
    and it is told at the end.

    Args:
        config: resolved; `data` says what and where to, `backbone` by which codec, `train.device` and
            `train.cpu_threads` how.
        console: where to report.

    Raises:
        UsageError: the config names no folder, or another process is making the same part.
        EnvironmentProblem: a recording or the codec is missing or broken, or the disk is full.
    """
    if config.data.codes is None:
        raise UsageError("null; name the folder that the codes are to be written to", key="data.codes")
    part, device = Part.of_launch(), choose_device(config.train.device)
    stored = stored_codes(config.backbone, Path(config.data.codes))
    spans, _, notes = cut(_sources(config), config.data.duration_sec, frame_sec=1 / FRAME_RATE)
    for note in notes if part.rank == 0 else ():
        say(console, note)
    jobs = part.of(_jobs(spans, stored))
    with ExitStack() as stack:
        stack.enter_context(_held(stored.folder, part))
        stack.enter_context(threads(config.train.cpu_threads))
        stack.enter_context(memory_errors(_LESS_MEMORY))
        to_do = [job for job in jobs if not job.file.is_current()]
        silence = stored.silence_of(spans)
        missing = silence if part.rank == 0 and silence is not None and not silence.exists() else None
        failed: list[str] = []
        if to_do or missing is not None:
            seconds = sum(spans.recordings[job.number].info.seconds for job in to_do)
            needed = round(seconds * FRAME_RATE) * 2 * stored.num_codebooks * _BYTES
            require_space(stored.folder, needed, what="the codes")
            codec, _ = load_codec(config.backbone, device)
            if missing is not None:
                frames = frames_in(config.data.duration_sec, codec.frame_rate)
                write_tensors(missing, {"codes": codes_of_silence(codec, device, frames).short()}, {})
            failed = _encode(to_do, spans, codec, device, console)
    say(console, f"{stored.folder}: {len(jobs) - len(failed)} of {len(jobs)} recordings{part.in_words()}")
    if failed:
        raise EnvironmentProblem.about(
            failed,
            "recordings could not be encoded; the rest is done. Mend them, or take their lines out, and run the same "
            "command again",
        )


def _sources(config: MoshiRun) -> list[SpeechSource]:
    """The sources of both splits, each once."""
    sources: dict[tuple[object, ...], SpeechSource] = {}
    for split in ("train", "eval"):
        for each in sources_of_split(config.data, split):
            sources.setdefault((each.path, each.transcribed, each.channel), each)
    return list(sources.values())


def _jobs(spans: Spans, stored: StoredCodes) -> list[_Job]:
    """A job for each content, in the order of the recordings; the same sound under two names is encoded once."""
    jobs: dict[Path, _Job] = {}
    for number, recording in enumerate(spans.recordings):
        file = stored.file(spans, number)
        jobs.setdefault(file.path, _Job(number, recording.place, file))
    return list(jobs.values())


@contextmanager
def _held(folder: Path, part: Part) -> Iterator[None]:
    """Lock a part of the folder against other processes that make the same."""
    name = folder / f".{part.rank}-of-{part.size}.lock"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replaced_file(name)
        file = name.open("a")
    with file, beside_others(folder):
        try:
            lock(file, name)
        except UsageError:
            raise UsageError(f"{folder}: another process is making the same codes{part.in_words()}") from None
        yield


def _encode(jobs: Sequence[_Job], spans: Spans, codec: Codec, device: torch.device, console: Console) -> list[str]:
    """Encode recordings; returns what is wrong with those that could not be."""
    most = frames_in(spans.duration_sec, codec.frame_rate)
    pieces = EncodedPieces(SoundPieces(spans, codec.sample_rate), codec, device, most)
    failed = []
    with Steps(console, "windows", total=sum(len(spans.files[job.number]) for job in jobs)) as report:
        for count, job in enumerate(jobs, start=1):
            windows, started, before = spans.files[job.number], time.monotonic(), report.completed
            try:
                codes = [pieces.sound_codes(window) for window in report.counted(windows)]
                frames = torch.tensor([each.shape[-1] for each in codes], dtype=torch.int32)
                header = job.file.header()
            except EnvironmentProblem as error:
                failed.append(str(error))
                report.advance(before + len(windows) - report.completed)
                continue
            write_tensors(job.file.path, {"codes": torch.cat(codes, -1).short(), "frames": frames}, header)
            spent = duration_in_words(time.monotonic() - started)
            report.line(f"{count}/{len(jobs)}  {job.file.audio.name}  {len(windows)} windows in {spent}")
    return failed
