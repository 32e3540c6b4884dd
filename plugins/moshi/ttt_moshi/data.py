"""Windows of Moshi's 17 streams from two-channel speech in moshi-finetune's format.

A `.jsonl` file names recordings, one `{"path": …, "duration": seconds}` on each line, with paths relative to its
folder. A recording is stereo: Moshi on the left, the user on the right. Beside `a.wav` is `a.json` with `alignments:
[[word, [start, end], "SPEAKER_MAIN"], …]`; this label marks Moshi's own words.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.nn import functional as F

from ttt.errors import EnvironmentProblem, UsageError
from ttt.reading import read_file, unreadable
from ttt.words import first_line
from ttt_moshi import demo
from ttt_moshi.audio import UnreadableAudioError, read_audio, resample
from ttt_moshi.codec import DemoCodec
from ttt_moshi.encoding import encode_window
from ttt_moshi.interleave import Word, frames_in, text_stream, words_between
from ttt_moshi.options import NOTHING, TEXT_PADDING, MoshiData, MoshiOptions
from ttt_moshi.recordings import BrokenTranscriptError, Recording, read_recordings, read_transcript

if TYPE_CHECKING:
    from moshi.models.loaders import CheckpointInfo

END_OF_TEXT_PADDING: Final = 0
"""`LMModel.end_of_text_padding_id`."""

_MAX_TOKENIZER: Final = 64 << 20  # bytes; kyutai's has 0.5 MB


class Codec(Protocol):
    """What the windows need of a codec; kyutai's `MimiModel` and `DemoCodec` have it."""

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        ...

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        ...

    @property
    def frame_size(self) -> int:
        """Samples of a frame."""
        ...

    @property
    def num_codebooks(self) -> int:
        """Codes per frame and channel."""
        ...

    def encode(self, wav: Tensor, /) -> Tensor:
        """Codes `[B, num_codebooks, T]` of sound `[B, 1, samples]`."""
        ...


class Tokenizer(Protocol):
    """What the windows need of a text tokenizer; SentencePiece has it."""

    def encode(self, text: str, /) -> list[int]:
        """A word's tokens."""
        ...


class SpeechWindows:
    """Windows of `duration_sec` of each recording: codes `[1 + 2·codebooks, T]`, text, Moshi's audio, the user's.

    Windows follow one another from the start of the recording. Each is encoded by itself when it is first read, and
    then kept (4 bytes a code: an hour of Moshi is 3 MB). T is `ceil(duration_sec * frame_rate)` for every window. The
    last window of a recording is filled with -1, which the model reads as no input and the loss ignores. A rest
    shorter than a frame is left out.

    The constructor checks everything that needs no decoding of all audio: every line, header and transcript.

    Args:
        source: a `.jsonl` file, or a folder with such files at any depth.
        codec: encodes the audio streams, on `device`.
        tokenizer: encodes the text stream.
        duration_sec: length of a window in seconds.
        device: the codec's device.
        field: the config key of `source`, with which messages begin.

    Raises:
        EnvironmentProblem: data is missing or broken; the message names file and line.
        UsageError: a window would be shorter than one frame.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        codec: Codec,
        tokenizer: Tokenizer,
        duration_sec: float,
        device: torch.device | str = "cpu",
        field: str = "data.train_data",
    ) -> None:
        if duration_sec * codec.frame_rate < 1:
            raise UsageError(
                f"data.duration_sec: {duration_sec:g} s is shorter than a frame ({1 / codec.frame_rate:g} s)"
            )
        self.notice: str | None = getattr(codec, "stand_in", None)
        """A note for the user about these codes, if a substitute codec made them."""
        self.frames = frames_in(duration_sec, codec.frame_rate)
        """T, frames of a window."""
        self._codec = codec
        self._tokenizer = tokenizer
        self._device = torch.device(device)
        self._duration = duration_sec
        self._field = field
        self._recordings = read_recordings(Path(source), frame_sec=1 / codec.frame_rate, field=field)
        ranges = []
        start = 0
        for recording in self._recordings:
            # every full window, and one more for a rest of at least a frame
            whole = max(0.0, recording.info.seconds - 1 / codec.frame_rate)
            ranges.append(range(start, start := start + 1 + math.floor(whole / duration_sec)))
        self._files = tuple(ranges)
        self._codes: dict[int, Tensor] = {}
        self._transcript: tuple[Path, list[Word]] | None = None

    # --- WindowDataset ---

    def __len__(self) -> int:
        """Number of windows."""
        return self._files[-1].stop

    def __getitem__(self, index: int) -> Tensor:
        """One window's codes, `[1 + 2·codebooks, T]` int64 on the CPU.

        Raises:
            EnvironmentProblem: the window's audio cannot be decoded, or a file has changed.
        """
        if index not in self._codes:
            self._codes[index] = self._encode(*self._locate(index)).int()
        return self._codes[index].long()

    def collate(self, samples: Sequence[Tensor]) -> Tensor:
        """Windows to a batch, `[B, 1 + 2·codebooks, T]`."""
        return torch.stack(list(samples))

    @property
    def files(self) -> Sequence[range]:
        """The windows of each recording."""
        return self._files

    def describe(self, index: int) -> str:
        """A window in the user's words, "dialogue.flac, 15.0-30.0 s"."""
        recording, start, end = self._locate(index)
        return f"{recording.audio.name}, {start:.1f}-{min(end, recording.info.seconds):.1f} s"

    # --- a window ---

    def _locate(self, index: int) -> tuple[Recording, float, float]:
        """The recording of a window, and its start and end there in seconds; the end may be past the recording's."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        number = bisect_right(self._files, index, key=lambda windows: windows.start) - 1
        recording, place = self._recordings[number], index - self._files[number].start
        return recording, place * self._duration, (place + 1) * self._duration

    def _encode(self, recording: Recording, start: float, end: float) -> Tensor:
        rate = recording.info.sample_rate
        begin, stop = round(start * rate), min(round(end * rate), recording.info.samples)
        try:
            sound = read_audio(recording.audio, recording.info, begin, stop)
            words = self._words(recording)
        except (UnreadableAudioError, BrokenTranscriptError) as error:
            raise EnvironmentProblem(f"{self._field}: {recording.place}: {recording.audio}: {error}") from None
        sound = resample(sound, rate, self._codec.sample_rate).to(self._device)
        with torch.no_grad():
            audio = encode_window(self._codec, sound[:, None]).cpu()[..., : self.frames]
        text = text_stream(
            words_between(words, start, end),
            self._tokenizer.encode,
            frames=audio.shape[-1],
            frame_rate=self._codec.frame_rate,
            padding_id=TEXT_PADDING,
            end_of_padding_id=END_OF_TEXT_PADDING,
        )
        codes = torch.cat([torch.tensor(text)[None], audio.flatten(0, 1)])
        return F.pad(codes, (0, self.frames - codes.shape[-1]), value=NOTHING)

    def _words(self, recording: Recording) -> list[Word]:
        """The transcript of a recording, cached, since windows of a file are often read one after another."""
        if self._transcript is None or self._transcript[0] != recording.transcript:
            self._transcript = recording.transcript, read_transcript(recording)
        return self._transcript[1]


# --- the plugin's datasets ---


def speech_windows(options: MoshiOptions, data: MoshiData, *, split: str, device: torch.device | str) -> SpeechWindows:
    """The windows of a split, `train` or `eval`, encoded for the model that the options build.

    The preset `demo` has its own codec and tokenizer and, if the config names no data, its own dialogue with a held-out
    part for `eval`. `7b` with `random_weights` uses the same if no codec is named: speed and memory do not depend on
    the codes. In all other cases, `eval` is the training data if the config names no held-out data.

    Raises:
        EnvironmentProblem: data, codec or tokenizer cannot be loaded.
        UsageError: the config names no data, and the preset has none of its own.
    """
    own = reads_with_the_demos(options)
    field, source = "data.train_data", data.train_data
    if split == "eval" and data.eval_data is not None:
        field, source = "data.eval_data", data.eval_data
    if source is None:
        if not own:
            raise UsageError(
                "data.train_data: the preset 7b has no data of its own; name a .jsonl file in moshi-finetune's format"
            )
        source = str(demo.EVAL_DATA if split == "eval" else demo.TRAIN_DATA)
    codec, _ = load_codec(options, device)
    tokenizer = load_tokenizer(demo.TOKENIZER if own else _checkpoint(options).tokenizer)
    return SpeechWindows(
        source, codec=codec, tokenizer=tokenizer, duration_sec=data.duration_sec, device=device, field=field
    )


def load_tokenizer(path: str | Path) -> SentencePieceProcessor:
    """Read a SentencePiece model.

    Raises:
        EnvironmentProblem: it is missing, or is not a SentencePiece model.
    """
    try:
        return SentencePieceProcessor(model_proto=read_file(path, limit=_MAX_TOKENIZER))
    except (OSError, RuntimeError) as error:
        reason = unreadable(error) if isinstance(error, OSError) else "it is not a SentencePiece model"
        raise EnvironmentProblem(f"{path}: cannot be read as a text tokenizer: {reason}") from None


def reads_with_the_demos(options: MoshiOptions) -> bool:
    """Whether the demo's codec and tokenizer are used: by the demo, and by random weights if none are named."""
    unnamed = None in (options.mimi_path, options.tokenizer_path)
    return options.preset == "demo" or (options.random_weights and unnamed)


def load_codec(options: MoshiOptions, device: torch.device | str) -> tuple[Codec, Path]:
    """The codec for the model that the options build, frozen, and the file that it is read from.

    Raises:
        EnvironmentProblem: it cannot be had, or is broken.
    """
    if reads_with_the_demos(options):
        demo.require_whole()
        return DemoCodec.load(device=device), demo.CODEC
    info = _checkpoint(options)
    if not str(info.mimi_weights).endswith((".safetensors", ".sft", ".sfts")):
        raise EnvironmentProblem(
            f"backbone.mimi_path: {info.mimi_weights} is not a safetensors file; pickles are refused"
        )
    try:
        mimi = info.get_mimi(device=device)
    except Exception as error:  # safetensors, torch and the file system raise errors of many kinds
        reason = first_line(error)
        raise EnvironmentProblem(f"{info.mimi_weights}: cannot be loaded as Mimi weights: {reason}") from error
    return mimi.requires_grad_(False).eval(), Path(info.mimi_weights)


def _checkpoint(options: MoshiOptions) -> CheckpointInfo:
    from ttt_moshi.model import checkpoint_info

    return checkpoint_info(options)
