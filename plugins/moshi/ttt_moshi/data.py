"""Windows of Moshi's 17 streams from speech: dialogues in moshi-finetune's format, or one voice without transcripts.

A `.jsonl` file names recordings, one `{"path": …, "duration": seconds}` on each line, with paths relative to its
folder. A dialogue is stereo: Moshi on the left, the user on the right. Beside `a.wav` is `a.json` with `alignments:
[[word, [start, end], "SPEAKER_MAIN"], …]`; this label marks Moshi's own words. `ttt_moshi.sources` has the rest.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt.errors import EnvironmentProblem, UsageError
from ttt.plugins import SourceFiles
from ttt_moshi import demo
from ttt_moshi.audio import UnreadableAudioError, read_audio, resample
from ttt_moshi.codec import DemoCodec
from ttt_moshi.encoding import encode_window
from ttt_moshi.interleave import Word, frames_in, text_stream, words_between
from ttt_moshi.model_config import ModelConfig
from ttt_moshi.options import NO_TRANSCRIPT, NOTHING, MoshiData, MoshiOptions, reads_with_the_demos
from ttt_moshi.recordings import Recording, read_transcript
from ttt_moshi.sources import SpeechSource, sources_of_split
from ttt_moshi.transcripts import BrokenTranscriptError
from ttt_moshi.weights import checkpoint_info, load_mimi, load_tokenizer, model_config

MOST_KEPT: Final = 1 << 30
"""Bytes of codes that windows keep, those of 350 hours of Moshi; what is older is encoded again."""


class TextPadding(NamedTuple):
    """What the text stream holds while no word is said."""

    padding: int
    """`LMModel.text_padding_token_id`."""
    end: int
    """`LMModel.end_of_text_padding_id`, in the frame before a word."""


MOSHI_PADDING: Final = TextPadding(3, 0)
"""Of Moshi as it was published, and of the demo."""


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
    then kept (4 bytes a code: an hour of Moshi is 3 MB), up to 1 GiB. T is `ceil(duration_sec * frame_rate)` for every
    window. The last window of a recording is filled with -1, which the model reads as no input and the loss ignores. A
    rest shorter than a frame is left out.

    The constructor checks everything that needs no decoding of all audio: every line, header and transcript.

    Of speech without transcripts, Moshi's audio is the voice, the user's is digital silence, and the text stream holds
    `NO_TRANSCRIPT`, which the model reads as padding.

    Args:
        source: a `.jsonl` file, or a folder with such files at any depth; or several sources.
        codec: encodes the audio streams, on `device`.
        tokenizer: encodes the text stream.
        duration_sec: length of a window in seconds.
        device: the codec's device.
        padding: what the text stream holds while no word is said; Moshi's by default.
        field: the config key of `source`, with which messages begin, if that is a path.

    Raises:
        EnvironmentProblem: data is missing or broken; the message names file and line.
        UsageError: a window would be shorter than one frame.
    """

    def __init__(
        self,
        source: str | Path | Sequence[SpeechSource],
        *,
        codec: Codec,
        tokenizer: Tokenizer,
        duration_sec: float,
        device: torch.device | str = "cpu",
        padding: TextPadding = MOSHI_PADDING,
        field: str = "data.train_data",
    ) -> None:
        if duration_sec * codec.frame_rate < 1:
            raise UsageError(
                f"data.duration_sec: {duration_sec:g} s is shorter than a frame ({1 / codec.frame_rate:g} s)"
            )
        self.frames = frames_in(duration_sec, codec.frame_rate)
        """T, frames of a window."""
        self._codec = codec
        self._tokenizer = tokenizer
        self._device = torch.device(device)
        self._duration = duration_sec
        self._padding = padding
        frame = 1 / codec.frame_rate
        named = [SpeechSource(str(source), field)] if isinstance(source, str | Path) else list(source)
        self._recordings: list[Recording] = []
        self._source_of: list[SpeechSource] = []
        self.sources: list[SourceFiles] = []
        """Which recordings are of which source."""
        notes: list[str] = []
        for each in named:
            found = each.recordings(frame_sec=frame, notes=notes)
            first = len(self._recordings)
            self._recordings += found
            self._source_of += [each] * len(found)
            self.sources.append(SourceFiles(each.path, range(first, first + len(found)), each.weight))
        self.notice: str | None = "\n".join((*filter(None, (getattr(codec, "stand_in", None),)), *notes)) or None
        """What the user must know of these data: that a substitute codec made the codes, what is not read or is odd."""
        ranges = []
        start = 0
        for recording in self._recordings:
            # every full window, and one more for a rest of at least a frame
            whole = max(0.0, recording.info.seconds - frame)
            ranges.append(range(start, start := start + 1 + math.floor(whole / duration_sec)))
        self._files = tuple(ranges)
        self._names = _distinct_names([recording.audio for recording in self._recordings])
        self._silence: Tensor | None = None
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
            codes = self._encode(*self._locate(index)).int()
            while self._codes and (len(self._codes) + 1) * codes.nbytes > MOST_KEPT:
                del self._codes[next(iter(self._codes))]
            self._codes[index] = codes
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
        number, start, end = self._locate(index)
        return f"{self._names[number]}, {start:.1f}-{min(end, self._recordings[number].info.seconds):.1f} s"

    # --- a window ---

    def _locate(self, index: int) -> tuple[int, float, float]:
        """The recording of a window, and its start and end there in seconds; the end may be past the recording's."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        number = bisect_right(self._files, index, key=lambda windows: windows.start) - 1
        place = index - self._files[number].start
        return number, place * self._duration, (place + 1) * self._duration

    def _encode(self, number: int, start: float, end: float) -> Tensor:
        recording, source = self._recordings[number], self._source_of[number]
        rate = recording.info.sample_rate
        begin, stop = round(start * rate), min(round(end * rate), recording.info.samples)
        try:
            sound = read_audio(recording.audio, recording.info, begin, stop)
            words = self._words(recording) if source.transcribed else []
        except (UnreadableAudioError, BrokenTranscriptError) as error:
            raise EnvironmentProblem(f"{source.field}: {recording.place}: {recording.audio}: {error}") from None
        if not source.transcribed:
            sound = source.voice(sound)
        sound = resample(sound, rate, self._codec.sample_rate).to(self._device)
        with torch.no_grad():
            audio = encode_window(self._codec, sound[:, None]).cpu()[..., : self.frames].flatten(0, 1)
        if not source.transcribed:
            return self._padded(self._without_transcript(audio))
        text = text_stream(
            words_between(words, start, end),
            self._tokenizer.encode,
            frames=audio.shape[-1],
            frame_rate=self._codec.frame_rate,
            padding_id=self._padding.padding,
            end_of_padding_id=self._padding.end,
        )
        return self._padded(torch.cat([torch.tensor(text)[None], audio]))

    def _padded(self, codes: Tensor) -> Tensor:
        return F.pad(codes, (0, self.frames - codes.shape[-1]), value=NOTHING)

    def _without_transcript(self, voice: Tensor) -> Tensor:
        """The streams of a voice `[K, t]` whose user is silent: `[1 + 2·K, t]`."""
        if self._silence is None:
            silence = torch.zeros(1, 1, self.frames * self._codec.frame_size, device=self._device)
            with torch.no_grad():  # codes depend on nothing later, so of a shorter window they are the first ones
                self._silence = encode_window(self._codec, silence).cpu()[0]
        frames = voice.shape[-1]
        return torch.cat([torch.full((1, frames), NO_TRANSCRIPT), voice, self._silence[:, :frames]])

    def _words(self, recording: Recording) -> list[Word]:
        """The transcript of a recording, cached, since windows of a file are often read one after another."""
        if self._transcript is None or self._transcript[0] != recording.transcript:
            self._transcript = recording.transcript, read_transcript(recording)
        return self._transcript[1]


def _distinct_names(files: Sequence[Path]) -> list[str]:
    """A name for each file: its own, with its folder's if others are called the same, or its path."""
    names = [file.name for file in files]
    for longer in (lambda file: f"{file.parent.name}/{file.name}", str):
        taken = Counter(names)
        names = [name if taken[name] == 1 else longer(file) for name, file in zip(names, files, strict=True)]
    return names


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
    if data.train_data is None and not own and (split != "eval" or data.eval_data is None):
        raise UsageError(
            "data.train_data: the preset 7b has no data of its own; name a .jsonl file in moshi-finetune's format"
        )
    codec, _ = load_codec(options, device)
    tokenizer = load_tokenizer(options)
    windows = SpeechWindows(
        sources_of_split(data, split),
        codec=codec,
        tokenizer=tokenizer,
        duration_sec=data.duration_sec,
        device=device,
        padding=text_padding(options),
    )
    if not own:
        told = (windows.notice, unused_entries(codec, tokenizer, model_config(options)))
        windows.notice = "\n".join(filter(None, told)) or None
    return windows


def unused_entries(codec: Any, tokenizer: Any, config: ModelConfig) -> str | None:
    """A note that a codec or tokenizer has fewer entries than the model reads: it may be another model's."""
    told = [
        f"the {what} has {count} {entries}, but the model reads {most}"
        for what, count, entries, most in (
            ("tokenizer", tokenizer.vocab_size(), "tokens", config.text_card),
            ("codec", codec.cardinality, "codes a codebook", config.card),
        )
        if count < most
    ]
    return (
        f"{'; '.join(told)}: was the model trained with {'another' if len(told) == 1 else 'others'}?" if told else None
    )


def text_padding(options: MoshiOptions) -> TextPadding:
    """The padding of the model that the options build, as its config.json has it.

    Raises:
        EnvironmentProblem: that cannot be had.
    """
    config = model_config(options)
    return TextPadding(config.existing_text_padding_id, config.existing_text_end_padding_id)


def load_codec(options: MoshiOptions, device: torch.device | str) -> tuple[Codec, Path]:
    """The codec for the model that the options build, frozen, and the file that it is read from.

    Raises:
        EnvironmentProblem: it cannot be had, or is broken.
    """
    if not reads_with_the_demos(options):
        return load_mimi(options, device=device), Path(checkpoint_info(options).mimi_weights)
    demo.require_whole()
    codec, config = DemoCodec.load(device=device), model_config(options)
    if codec.num_codebooks != config.codebooks or codec.cardinality > config.card:
        raise EnvironmentProblem(
            f"the demo's codec, which stands in here, makes {codec.num_codebooks} codebooks of {codec.cardinality} "
            f"entries, but this model reads {config.codebooks} of {config.card}",
            key="backbone.mimi_path",
            fix="write mimi_path and tokenizer_path of the model",
        )
    return codec, demo.CODEC
