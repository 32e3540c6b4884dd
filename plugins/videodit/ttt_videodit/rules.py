"""What `ttt check` finds in Video-DiT's data (VDT5xx) and weights (VDT6xx), without torch or a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from ttt.config import Blame, Code, Finding, Severity
from ttt.config.sources import DATA_KEYS, places_of
from ttt.errors import EnvironmentProblem
from ttt.jsonl import Line, read_excerpt, read_jsonl
from ttt.plugins import rule
from ttt.words import first_few
from ttt_videodit.index import VIDEO_EXAMPLE, LineError, check_encoded, parse_encoded, parse_listed, windows_in
from ttt_videodit.options import VideoDiTRun
from ttt_videodit.variants import WAY_OUT, wrong_source
from ttt_videodit.wanted import Wanted, missing_data

_code = partial(Code, of_training=True, home=__name__)
_data = partial(_code, blames=Blame.MACHINE)
VDT501 = _data("VDT501", "lines that are not of an index", Severity.ERROR)
VDT502 = _data("VDT502", "latents or texts that are not there", Severity.ERROR)
VDT503 = _data("VDT503", "damaged latents or texts", Severity.ERROR)
VDT504 = _data("VDT504", "latents of another size", Severity.ERROR)
VDT505 = _data("VDT505", "a segment without a text", Severity.ERROR)
VDT506 = _data("VDT506", "no video as long as a window", Severity.ERROR)
VDT507 = _code("VDT507", "videos shorter than a window", Severity.NOTE)
VDT508 = _code("VDT508", "no data for the run", Severity.ERROR)
VDT509 = _code("VDT509", "videos that cannot be listed", Severity.WARNING)
# Not told if nothing is trained: building the model tells the same.
VDT601 = _code("VDT601", "weights of another CogVideoX", Severity.ERROR)

# A check is instant: what lies beyond is left to the run, which reads all of it before its first step.
_MOST_BYTES: Final = 4 << 20
_MOST_LINES: Final = 200

_PROBLEMS: Final = {
    "line": (VDT501, "the line is not one of an index", "write the index with ttt precompute"),
    "missing": (VDT502, "a file is missing", "run ttt precompute again; it makes what is missing"),
    "damaged": (VDT503, "a file is damaged or something else", "delete it and run ttt precompute again"),
    "shape": (VDT504, "their size is not the config's", "write the config that they were encoded with"),
    "segments": (VDT505, "a segment has no text", "write a caption for every 3 s and run ttt precompute"),
}
"""For each kind of `LineError`: the code, why videos cannot be used, and the way out."""


@dataclass
class _Index:
    """What the lines of an index are."""

    count: int = 0
    """Lines read."""
    complete: bool = True
    """Whether they are all."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """By kind: places, and what is wrong there."""
    short: list[str] = field(default_factory=list)
    """Videos shorter than a window."""
    left_over: int = 0
    """Segments at the ends of videos that fill no window."""
    good: int = 0
    """Videos that can be read."""


@rule(VDT508)
def data_is_there(config: VideoDiTRun) -> list[Finding]:
    """If a config names no training data, its preset has some of that kind."""
    missing = missing_data(config.backbone, config.data)
    if missing is None:
        return []
    path, why, way_out = missing
    return [VDT508.at(path, why, way_out)]


@rule(VDT501, VDT502, VDT503, VDT504, VDT505, VDT506, VDT507)
def videos_can_be_read(config: VideoDiTRun) -> list[Finding]:
    """Every line of an index is a video that training can read, and they fill windows."""
    data = config.data
    wanted = Wanted.of(config.backbone, data)
    findings: list[Finding] = []
    for key in DATA_KEYS:
        for place, source in places_of(data, key).items():
            index = _read_index(source.path, wanted)
            if index is not None:
                findings += _findings(index, place, wanted)
    return findings


@rule(VDT509)
def videos_can_be_listed(config: VideoDiTRun) -> list[Finding]:
    """Every line of a list is a video that `ttt precompute` can start with."""
    findings = []
    for key in ("videos", "eval_videos"):
        source = getattr(config.data, key)
        if source is None:
            continue
        path = Path(source)
        problems: list[str] = []
        count = 0
        try:
            for line in read_jsonl(path, most_bytes=_MOST_BYTES):
                count += 1
                try:
                    parse_listed(line.content, line.place, line.folder)
                except LineError as error:
                    problems.append(f"{line.short_place} ({error})")
        except (EnvironmentProblem, ValueError) as error:
            findings.append(_list_finding(key, f"{error}{_of_ttt_video(source)}", 1))
            continue
        if problems or not count:
            lines = f"{len(problems)} of {count} lines cannot be used: {first_few(problems)}"
            findings.append(_list_finding(key, lines if count else f"{source} lists no videos", len(problems)))
    return findings


def _list_finding(key: str, what: str, count: int) -> Finding:
    message = f"{what}; ttt precompute stops before it begins"
    return VDT509.at(f"data.{key}", message, f"write lines such as {VIDEO_EXAMPLE}", value=count)


@rule(VDT601)
def weights_are_of_the_model(config: VideoDiTRun) -> list[Finding]:
    """What `backbone.pretrained` names is CogVideoX 5B, not another of its releases."""
    source = config.backbone.pretrained
    wrong = None if source is None else wrong_source(source)
    if wrong is None:
        return []
    return [VDT601.at("backbone.pretrained", f"{source} {wrong}", WAY_OUT, value=source)]


RULES = (weights_are_of_the_model, data_is_there, videos_can_be_read, videos_can_be_listed)


# --- the index ---


def _of_ttt_video(file: str | Path) -> str:
    """What a file of another kind than a list is in TTT-Video, as the rest of a sentence."""
    return "; TTT-Video's latents and texts are such files, so name a .jsonl" if str(file).endswith(".pt") else ""


def _read_index(source: str, wanted: Wanted) -> _Index | None:
    """The lines; None if there is no such file, which one of the core's rules reports."""
    read = read_excerpt(source, most_lines=_MOST_LINES, most_bytes=_MOST_BYTES)
    if read is None:
        return None
    unreadable = {**read.broken_off, **read.foreign}
    index = _Index(count=len(read.lines) + len(unreadable), complete=read.complete)
    if unreadable:
        index.problems["line"] = [
            f"{file}: cannot be read: {why}{_of_ttt_video(file)}" for file, why in unreadable.items()
        ]
    try:
        for line in read.lines:
            _sort_in(index, line, wanted)
    except (OSError, ValueError, EnvironmentProblem):  # what a line names cannot be looked at
        return None
    return index


def _sort_in(index: _Index, line: Line, wanted: Wanted) -> None:
    try:
        video = parse_encoded(line.content, line.place, line.folder)
        check_encoded(video, wanted)
    except LineError as error:
        if error.kind == "short":
            index.short.append(line.short_place)
        else:
            index.problems.setdefault(error.kind, []).append(f"{line.short_place} ({error})")
    else:
        index.good += 1
        index.left_over += len(video.segments) - wanted.window * windows_in(video, wanted)


def _findings(index: _Index, path: str, wanted: Wanted) -> Iterator[Finding]:
    seconds = f"{wanted.window * wanted.segment_sec:g} s"
    among = f"of {index.count}" + ("" if index.complete else " (the first that were read)")
    for kind, (code, words, fix) in _PROBLEMS.items():
        problems = index.problems.get(kind)
        if problems:
            yield code.at(
                path,
                message=(
                    f"{len(problems)} {among} videos cannot be used, {words}: {first_few(problems)}; the run stops "
                    f"before its first step"
                ),
                fix=fix,
                value=len(problems),
            )
    if not index.count or (index.short and not index.good and not index.problems):
        what = (
            f"all {index.count} videos are shorter than a window of {seconds}" if index.count else "it lists no video"
        )
        yield VDT506.at(
            path,
            message=f"{what}, so there is nothing to read; the run stops before its first step",
            fix="write a smaller data.duration_sec, or encode longer videos" if index.count else "run ttt precompute",
            value=len(index.short),
        )
    elif index.short or index.left_over:
        told = []
        if index.short:
            are = "is" if len(index.short) == 1 else "are"
            told.append(
                f"{len(index.short)} {among} videos {are} shorter than a window of {seconds}: {first_few(index.short)}"
            )
        if index.left_over:
            told.append(f"{index.left_over} segments at the ends of videos fill no window of {seconds}")
        yield VDT507.at(
            path,
            message=f"{'; '.join(told)}; they are not read",
            fix="write a data.duration_sec that divides the videos, if they matter",
            value=len(index.short) + index.left_over,
        )
