"""Windows of latents and text embeddings: of precomputed videos, or of the demo's clip."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt.config.sources import DataSource, places_of_split
from ttt.errors import EnvironmentProblem, UnreadableError, UsageError
from ttt.files import mapping_errors, verify_tensors
from ttt.jsonl import jsonl_files, read_jsonl
from ttt.plugins import SourceFiles, WindowSource, files_of_sources
from ttt.reading import require_file
from ttt_videodit import demo
from ttt_videodit.clip import CROPS, Split
from ttt_videodit.codec import DemoCodec
from ttt_videodit.index import NOT_LISTED, EncodedVideo, LineError, check_encoded, parse_encoded, windows_in
from ttt_videodit.options import VideoDiTData, VideoDiTOptions
from ttt_videodit.own_videos import demo_video, random_video
from ttt_videodit.wanted import Wanted, demo_segments, missing_data

_RANDOM_NOTICE: Final = (
    "random_weights without data.train_data: latents and texts are random numbers too, so that speed and memory can be "
    "measured; losses mean nothing."
)


class Video(Protocol):
    """A video of latents, and the embeddings of its texts."""

    @property
    def name(self) -> str:
        """The video's name, for messages."""
        ...

    @property
    def place(self) -> str:
        """The file and line that list it."""
        ...

    @property
    def field(self) -> str:
        """The config key of its source, with which messages begin."""
        ...

    @property
    def start_sec(self) -> float:
        """Its start in the file that it was made from."""
        ...

    @property
    def captions(self) -> tuple[str, ...]:
        """The text of each segment."""
        ...

    @property
    def source(self) -> WindowSource:
        """The file that it was made from, and files that decide its content."""
        ...

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Rows of `mean`, `std`, `start_mean` or `start_std`, float32; see `ttt_videodit.index`."""
        ...

    def text(self, segment: int) -> Tensor:
        """A segment's embedding `[L,E]` float32."""
        ...


class LatentWindows:
    """Consecutive windows of `duration_sec` of each video: dicts of `mean`, `std` `[Fr,16,h,w]` and `text` `[S,L,E]`.

    Segments at the end of a video that do not fill a window are not read. If a window does not start its video, its
    first latent frame is the one that the encoder gives for a video that begins there.

    Args:
        videos: each at least as long as a window.
        wanted: the length of a window, and how videos are cut.
        notice: a note for the user about the data.
        sources: which videos are of which source, if there are several.
    """

    def __init__(
        self, videos: Sequence[Video], wanted: Wanted, *, notice: str | None = None, sources: Sequence[SourceFiles] = ()
    ) -> None:
        self.sources = sources
        """Which videos are of which source."""
        self.notice = notice
        """A note for the user about this data, printed when a run starts."""
        self._videos = tuple(videos)
        self._wanted = wanted
        ranges, start = [], 0
        for video in self._videos:
            ranges.append(range(start, start := start + len(video.captions) // wanted.window))
        self._files = tuple(ranges)

    def __len__(self) -> int:
        """Number of windows."""
        return self._files[-1].stop if self._files else 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One window, float32 on the CPU.

        Raises:
            EnvironmentProblem: a file has changed, or holds numbers that are not finite.
        """
        video, first = self._locate(index)
        segments = self._wanted.segments
        start = segments.attn_length * first
        try:
            sample = {}
            for name in ("mean", "std"):
                latents = video.rows(name, start, start + segments.frames(self._wanted.window))
                if first:
                    latents = torch.cat([video.rows(f"start_{name}", first, first + 1), latents[1:]])
                sample[name] = latents
            texts = [video.text(segment) for segment in range(first, first + self._wanted.window)]
            sample["text"] = torch.stack(texts)
        except LineError as error:
            raise EnvironmentProblem(f"{video.field}: {video.place}: {error}") from None
        return sample

    def collate(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Windows to a batch: the same with a leading B."""
        return {name: torch.stack([sample[name] for sample in samples]) for name in ("mean", "std", "text")}

    @property
    def files(self) -> Sequence[range]:
        """The windows of each video."""
        return self._files

    def describe(self, index: int) -> str:
        """A window in the user's words, "city.mp4, 3-6 s"."""
        video, first = self._locate(index)
        start = video.start_sec + first * self._wanted.segment_sec
        return f"{video.name}, {start:g}-{start + self._wanted.window * self._wanted.segment_sec:g} s"

    def source(self, index: int) -> WindowSource:
        """The video that a window is cut from, and files that decide its content."""
        video, _ = self._locate(index)
        return video.source

    def captions(self, index: int) -> tuple[str, ...]:
        """The texts of a window's segments."""
        video, first = self._locate(index)
        return video.captions[first : first + self._wanted.window]

    def _locate(self, index: int) -> tuple[Video, int]:
        """The video of a window, and the window's first segment there."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        number = bisect_right(self._files, index, key=lambda windows: windows.start) - 1
        return self._videos[number], (index - self._files[number].start) * self._wanted.window


def latent_windows(
    options: VideoDiTOptions, data: VideoDiTData, *, split: str, device: torch.device | str
) -> LatentWindows:
    """The windows of a split, `train` or `eval`, for the model that the options build.

    If the config names no data, the preset `demo` uses its own clip of 64 × 64 pixels, with the last 3 s held out, and
    `5b` with `random_weights` uses random latents. In all other cases, `eval` is the training data if the config names
    no held-out data.

    Args:
        options: the section `backbone`.
        data: the section `data`.
        split: which one.
        device: where the model is; windows are on the CPU.

    Raises:
        EnvironmentProblem: data are missing or broken; the message names file and line.
        UsageError: the config names no data, and the preset has none of that kind.
    """
    wanted = Wanted.of(options, data)
    named = places_of_split(data, split)
    if named:
        return _indexed_windows(named, wanted, verify=data.verify)
    missing = missing_data(options, data)
    if missing is not None:
        raise UsageError(f"{missing[0]}: {missing[1]}; {missing[2]}")
    if options.preset == "demo":
        return _demo_windows("eval" if split == "eval" else "train", wanted)
    return LatentWindows([random_video(wanted, split)], wanted, notice=_RANDOM_NOTICE)


# --- precomputed ---


class _IndexedVideo:
    """A line of an index; only the requested tensors of its files are read.

    Args:
        entry: the line.
        field: the config key of its source.
        unverified: files, of other lines too, with the checksums to compare before they are first read.
    """

    def __init__(self, entry: EncodedVideo, field: str, unverified: dict[Path, str | None]) -> None:
        self.field = field
        self.name = Path(entry.video).name
        self.place = entry.place
        self.start_sec = entry.start_sec
        self.captions = tuple(segment.caption for segment in entry.segments)
        self.source = WindowSource(entry.video, _deciding_files(entry))
        self._entry = entry
        self._unverified = unverified

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        self._verify(self._entry.latents)
        return _read_rows(self._entry.latents, name, first, stop)

    def text(self, segment: int) -> Tensor:
        self._verify(self._entry.segments[segment].text)
        return _read_rows(self._entry.segments[segment].text, "text", 0, self._entry.text_length)

    def _verify(self, path: Path) -> None:
        """Compare a file with its checksum, and with that in the index, when it is first read."""
        if path not in self._unverified:
            return
        try:
            found = verify_tensors(path)
        except UnreadableError as error:  # the file's content may still be whole
            raise LineError("damaged", f"{error}; look at that file or disk") from None
        except EnvironmentProblem as error:
            gone = "run" if not path.exists() else "delete it and run"
            raise LineError("damaged", f"{error}; {gone} ttt precompute again") from None
        if self._unverified[path] not in (None, found):
            raise LineError("damaged", f"{path}: {NOT_LISTED}")
        del self._unverified[path]


def _deciding_files(entry: EncodedVideo) -> tuple[Path, ...]:
    """The index, which has the checksums of what it names; and the files of which it has none."""
    index = Path(entry.place.rpartition(":")[0])
    return (index, *(path for path, checksum in entry.checksums.items() if checksum is None))


def _read_rows(path: Path, name: str, first: int, stop: int) -> Tensor:
    try:
        require_file(path)
        with mapping_errors(), safe_open(path, framework="pt") as opened:
            rows: Tensor = opened.get_slice(name)[first:stop]
    except (OSError, SafetensorError) as error:
        raise LineError("damaged", f"{path}: cannot be read: {error}; run ttt precompute again") from None
    if rows.shape[0] != stop - first:
        raise LineError("shape", f"{path}: {name} has changed since the run started")
    rows = rows.float()
    good = rows.isfinite() & (rows >= 0) if name.endswith("std") else rows.isfinite()
    if not bool(good.all()):
        row = first + int(good.flatten(1).all(1).int().argmin())
        kind = "token" if name == "text" else "segment" if name.startswith("start_") else "latent frame"
        value = "negative" if bool(rows.isfinite().all()) else "not finite"
        raise LineError(
            "damaged", f"{path}: {name} is {value} in {kind} {row} (from 0); delete it and run ttt precompute again"
        )
    return rows


def _indexed_windows(named: Mapping[str, DataSource], wanted: Wanted, *, verify: bool) -> LatentWindows:
    videos: list[_IndexedVideo] = []
    counts: list[int] = []
    notices: list[str] = []
    unverified: dict[Path, str | None] = {}
    for field, source in named.items():
        entries, notice = _read_source(Path(source.path), wanted, field)
        counts.append(len(entries))
        notices += filter(None, (notice,))
        for entry in entries if verify else ():
            unverified |= entry.checksums
        videos += [_IndexedVideo(entry, field, unverified) for entry in entries]
    sources = files_of_sources(
        (source.path, source.weight, count) for source, count in zip(named.values(), counts, strict=True)
    )
    return LatentWindows(videos, wanted, notice="\n".join(notices) or None, sources=sources)


def _read_source(source: Path, wanted: Wanted, field: str) -> tuple[list[EncodedVideo], str | None]:
    """The videos of an index, or of a folder of them, that are as long as a window; and what is not read of it.

    Raises:
        EnvironmentProblem: there are none, or some cannot be used; the message names file and line.
    """
    if not source.exists():
        raise EnvironmentProblem(f"{field}: {source} does not exist; `ttt precompute` makes it from data.videos")
    videos: list[EncodedVideo] = []
    problems: list[str] = []
    short = 0
    for file in jsonl_files(source):
        for line in read_jsonl(file):
            try:
                entry = parse_encoded(line.content, line.place, line.folder)
                check_encoded(entry, wanted)
            except LineError as error:
                if error.kind == "short":
                    short += 1
                else:
                    problems.append(f"{line.place}: {error}")
            else:
                videos.append(entry)
    if problems:
        raise EnvironmentProblem.about(problems, "videos cannot be used", where=field)
    seconds = f"{wanted.window * wanted.segment_sec:g} s"
    if not videos:
        why = f"all {short} are shorter than a window of {seconds}" if short else "it lists none; see `ttt precompute`"
        raise EnvironmentProblem(f"{field}: {source}: no videos: {why}")
    left_over = sum(len(video.segments) - wanted.window * windows_in(video, wanted) for video in videos)
    told = []
    if short:
        told.append(f"{short} of {short + len(videos)} videos are shorter than a window of {seconds} and are not read")
    if left_over:
        told.append(
            f"{left_over} of {sum(len(video.segments) for video in videos)} segments, at the ends of videos, fill no "
            f"window of {seconds} and are not read"
        )
    return videos, f"{source}: {'; '.join(told)}" if told else None


# --- the plugin's own ---


def _demo_windows(split: Split, wanted: Wanted) -> LatentWindows:
    """Windows of the clip, encoded as `ttt precompute` would; that takes about a second."""
    count = demo_segments(wanted.segments)
    if split == "eval":  # once through what is held out, if a window is not longer
        once = demo_segments(wanted.segments, demo.HELD_OUT_FRAMES)
        count = once if once >= wanted.window else count
    return LatentWindows(
        [demo_video(split, left, wanted.segments, count, wanted.text_length) for left in CROPS[split]],
        wanted,
        notice=DemoCodec.stand_in,
    )
