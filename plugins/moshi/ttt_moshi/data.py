"""Windows of Moshi's 17 streams from speech: dialogues in moshi-finetune's format, or one voice without transcripts.

A `.jsonl` file names recordings, one `{"path": …, "duration": seconds}` on each line, with paths relative to its
folder. A dialogue is stereo: Moshi on the left, the user on the right. Beside `a.wav` is `a.json` with `alignments:
[[word, [start, end], "SPEAKER_MAIN"], …]`; this label marks Moshi's own words. `ttt_moshi.sources` has the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ttt.errors import EnvironmentProblem, UsageError
from ttt.plugins import SourceFiles, files_of_sources
from ttt_moshi import demo
from ttt_moshi.codec import DemoCodec
from ttt_moshi.codes import codec_identity
from ttt_moshi.encoding import encode_window
from ttt_moshi.interleave import frames_in, text_stream, words_between
from ttt_moshi.model_config import ModelConfig
from ttt_moshi.options import NO_TRANSCRIPT, NOTHING, MoshiData, MoshiOptions, reads_with_the_demos
from ttt_moshi.pieces import EncodedPieces, Piece, Pieces, SoundPieces, Spans
from ttt_moshi.recordings import Recording
from ttt_moshi.sources import SpeechSource, sources_of_split
from ttt_moshi.stored import StoredCodes
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
        codec: encodes the audio streams, on `device`; or the codes that one has made.
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
        codec: Codec | StoredCodes,
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
        self._tokenizer = tokenizer
        self._device = torch.device(device)
        self._padding = padding
        self._frame_rate = codec.frame_rate
        named = [SpeechSource(str(source), field)] if isinstance(source, str | Path) else source
        self._spans, self.sources, notes = cut(named, duration_sec, frame_sec=1 / codec.frame_rate)
        self.notice: str | None = "\n".join((*filter(None, (getattr(codec, "stand_in", None),)), *notes)) or None
        """What the user must know of these data: that a substitute codec made the codes, what is not read or is odd."""
        self._names = self._spans.names()
        self._codes: dict[int, Tensor] = {}
        self._sounds = SoundPieces(self._spans, codec.sample_rate)
        self._encoded: EncodedPieces | None = None
        if isinstance(codec, StoredCodes):
            self._pieces: Pieces = codec.pieces(self._sounds)
            self._silence = codec.silence(self._spans)
        else:
            self._pieces = self._encoded = EncodedPieces(self._sounds, codec, self._device, self.frames)
            alone = not all(source.transcribed for source in self._spans.sources)
            self._silence = codes_of_silence(codec, self._device, self.frames) if alone else None

    # --- WindowDataset ---

    def __len__(self) -> int:
        """Number of windows."""
        return self._spans.files[-1].stop

    def __getitem__(self, index: int) -> Tensor:
        """One window's codes, `[1 + 2·codebooks, T]` int64 on the CPU.

        Raises:
            EnvironmentProblem: the window's audio cannot be decoded, or a file has changed.
        """
        return self._codes[index].long() if index in self._codes else self.finish(index, self._pieces[index])

    def collate(self, samples: Sequence[Tensor]) -> Tensor:
        """Windows to a batch, `[B, 1 + 2·codebooks, T]`."""
        return torch.stack(list(samples))

    @property
    def files(self) -> Sequence[range]:
        """The windows of each recording."""
        return self._spans.files

    def describe(self, index: int) -> str:
        """A window in the user's words, "dialogue.flac, 15.0-30.0 s"."""
        place = self._spans.locate(index)
        end = min(place.end, self._spans.recordings[place.number].info.seconds)
        return f"{self._names[place.number]}, {place.start:.1f}-{end:.1f} s"

    # --- StagedDataset ---

    @property
    def reader(self) -> Pieces:
        """What reads files: codes if there are some; sound on a GPU, which encodes better itself; on a CPU codes."""
        return self._pieces if self._encoded is None or self._device.type == "cpu" else self._sounds

    def kept(self, index: int) -> bool:
        """Whether a window is in memory."""
        return index in self._codes

    def finish(self, index: int, read: Piece) -> Tensor:
        """A window's codes, which are kept from now on."""
        codes = self._window(index, read).int()
        while self._codes and (len(self._codes) + 1) * codes.nbytes > MOST_KEPT:
            del self._codes[next(iter(self._codes))]
        self._codes[index] = codes
        return codes.long()

    # --- a window ---

    def _window(self, index: int, piece: Piece) -> Tensor:
        if self._encoded is not None and piece.audio.is_floating_point():
            piece = self._encoded.encoded(piece)
        place = self._spans.locate(index)
        if not self._spans.sources[place.number].transcribed:
            return self._padded(self._without_transcript(piece.audio))
        text = text_stream(
            words_between(piece.words, place.start, place.end),
            self._tokenizer.encode,
            frames=piece.audio.shape[-1],
            frame_rate=self._frame_rate,
            padding_id=self._padding.padding,
            end_of_padding_id=self._padding.end,
        )
        return self._padded(torch.cat([torch.tensor(text)[None], piece.audio]))

    def _padded(self, codes: Tensor) -> Tensor:
        return F.pad(codes, (0, self.frames - codes.shape[-1]), value=NOTHING)

    def _without_transcript(self, voice: Tensor) -> Tensor:
        """The streams of a voice `[K, t]` whose user is silent: `[1 + 2·K, t]`."""
        assert self._silence is not None
        frames = voice.shape[-1]
        return torch.cat([torch.full((1, frames), NO_TRANSCRIPT), voice, self._silence[:, :frames]])


def codes_of_silence(codec: Codec, device: torch.device, frames: int) -> Tensor:
    """The codes of digital silence, `[codebooks, frames]`. They depend on nothing later: of less they are the first."""
    silence = torch.zeros(1, 1, frames * codec.frame_size, device=device)
    with torch.no_grad():
        return encode_window(codec, silence).cpu()[0]


def cut(
    sources: Sequence[SpeechSource], duration_sec: float, *, frame_sec: float
) -> tuple[Spans, list[SourceFiles], list[str]]:
    """The recordings of sources in windows, which of them are of which source, and what a user must know of them.

    Raises:
        EnvironmentProblem: a recording is missing or broken; the message names file and line.
    """
    recordings: list[Recording] = []
    of: list[SpeechSource] = []
    counts: list[tuple[str, float, int]] = []
    notes: list[str] = []
    for source in sources:
        found = source.recordings(frame_sec=frame_sec, notes=notes)
        counts.append((source.path, source.weight, len(found)))
        recordings += found
        of += [source] * len(found)
    ranges = []
    start = 0
    for recording in recordings:
        # every full window, and one more for a rest of at least a frame
        whole = max(0.0, recording.info.seconds - frame_sec)
        ranges.append(range(start, start := start + 1 + math.floor(whole / duration_sec)))
    return Spans(tuple(recordings), tuple(of), tuple(ranges), duration_sec), files_of_sources(counts), notes


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
    codec = load_codec(options, device)[0] if data.codes is None else stored_codes(options, Path(data.codes))
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


def stored_codes(options: MoshiOptions, folder: Path) -> StoredCodes:
    """The codes in a folder that the codec of the model that the options build has made.

    Raises:
        EnvironmentProblem: the codec's weights cannot be read, by which its codes are known.
    """
    own, config = reads_with_the_demos(options), model_config(options)
    weights = demo.CODEC if own else Path(checkpoint_info(options).mimi_weights)
    identity = codec_identity(config.codebooks, weights, own=own)
    return StoredCodes(folder, identity, config.codebooks, config.card, DemoCodec.stand_in if own else None)


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
