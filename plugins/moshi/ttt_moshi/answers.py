"""Answers to recordings, written piece by piece: the sound, and beside it the text, its times and its repetition."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from moshi.models import LMModel
from rich.console import Console

from ttt.amounts import show_bytes
from ttt.errors import UsageError
from ttt.files import require_space, write_json
from ttt.plugins import AnswerRequest
from ttt.printable import say
from ttt.progress import Steps
from ttt.words import duration_in_words
from ttt_moshi import __version__
from ttt_moshi.data import load_codec
from ttt_moshi.options import MoshiOptions, MoshiRun, reads_with_the_demos
from ttt_moshi.repetition import Minute, by_minute, loop_warning, table
from ttt_moshi.request import text_file
from ttt_moshi.speaking import SpokenFrame, WordReader, spoken
from ttt_moshi.user_audio import UserAudio, channel_of, hear, inspect
from ttt_moshi.wav import MOST_BYTES, WavWriter, wav_bytes
from ttt_moshi.weights import checkpoint_info, load_tokenizer

_ARGUMENTS: Final = {
    "temperature": "temp",
    "text_temperature": "temp_text",
    "top_k": "top_k",
    "text_top_k": "top_k_text",
}
"""The names of a request's numbers in `LMGen`."""
_TOLD_WORDS: Final = 12


def check(request: AnswerRequest, options: MoshiOptions) -> None:
    """Refuse a recording that cannot be heard, or whose answer does not fit.

    Raises:
        UsageError: the answer is longer than a WAV file can be, or random weights have no codec.
        EnvironmentProblem: the recording is missing or broken, or the disk is too small.
    """
    if options.random_weights and reads_with_the_demos(options):
        raise UsageError(
            "backbone.random_weights: random weights of Moshi's size have no voice, and the demo's codec does not know "
            "their codes; name mimi_path and tokenizer_path, or sample the preset demo"
        )
    info = inspect(request.audio)
    # the largest rate of both codecs; only Mimi's own file says more
    needed = wav_bytes(round((info.seconds + request.seconds) * 24_000), channels=2 if request.stereo else 1)
    if needed > MOST_BYTES:
        raise UsageError(
            f"{request.audio}: an answer of {duration_in_words(info.seconds + request.seconds)} takes "
            f"{show_bytes(needed)}, more than a WAV file can hold ({show_bytes(MOST_BYTES)}); cut the recording"
        )
    require_space(request.out, needed, what="the answer")


class Answerer:
    """Answers one recording after another.

    Args:
        model: adapted, in eval mode.
        config: of its run.
        console: where to report.

    Raises:
        EnvironmentProblem: codec or tokenizer cannot be had.
    """

    def __init__(self, model: LMModel, config: MoshiRun, *, console: Console) -> None:
        self._model = model
        self._console = console
        self._codec: Any = load_codec(config.backbone, model.device)[0]
        self._tokenizer = load_tokenizer(config.backbone)
        self._defaults = _generation_defaults(config.backbone)
        self._told = False

    def __call__(self, request: AnswerRequest) -> list[Path]:
        """Answer a recording; returns the sound's file and the text's."""
        heard, told = self._heard(request)
        say(self._console, f"{request.audio}: {duration_in_words(heard.info.seconds)}; {told}")
        if not self._told and (notice := getattr(self._codec, "stand_in_voice", None)):
            self._told = True
            say(self._console, f"note: {notice}")
        sampling = self._sampling(request)
        answer = self._written(request, heard, sampling)
        text = text_file(request.out)
        write_json(text, {**answer.record(), "made_from": _made_from(request, heard, sampling)})
        answer.tell(self._console)
        return [request.out, text]

    def _heard(self, request: AnswerRequest) -> tuple[UserAudio, str]:
        heard = hear(request.audio, self._codec, channel=request.user_channel, silence_sec=request.seconds)
        return heard, channel_of(heard.info, request.user_channel)[1]

    def _sampling(self, request: AnswerRequest) -> dict[str, Any]:
        """The arguments of `LMGen`: the request's, else those of the model's config.json, else kyutai's."""
        asked = {name: getattr(request, key) for key, name in _ARGUMENTS.items()}
        return {**self._defaults, **{name: value for name, value in asked.items() if value is not None}}

    def _written(self, request: AnswerRequest, heard: UserAudio, sampling: dict[str, Any]) -> _Answer:
        padding = frozenset({self._model.text_padding_token_id, self._model.end_of_text_padding_id})
        answer = _Answer(WordReader(self._tokenizer, padding, frame_rate=self._codec.frame_rate), heard)
        channels = 2 if request.stereo else 1
        with (
            WavWriter(request.out, sample_rate=heard.sample_rate, channels=channels) as file,
            Steps(self._console, "answer", total=heard.num_frames, tenths=True, rated="frame") as steps,
        ):
            for frame in spoken(self._model, self._codec, heard.frames(), **sampling):
                file.write(_channels(frame, stereo=request.stereo))
                answer.add(frame)
                steps.advance()
        return answer


def _channels(frame: SpokenFrame, *, stereo: bool) -> Any:
    """The samples of a frame, `[1 or 2, frame_size]`: Moshi's, or the user's on the left and Moshi's on the right."""
    sound = torch.stack([frame.heard, frame.sound]) if stereo else frame.sound[None]
    return sound.numpy().astype(np.float32, copy=False)


class _Answer:
    """What was said so far, without its sound."""

    def __init__(self, reader: WordReader, heard: UserAudio) -> None:
        self._reader = reader
        self._frame_sec = heard.frame_size / heard.sample_rate
        self._semantic: list[int] = []
        self._started = time.monotonic()

    def add(self, frame: SpokenFrame) -> None:
        self._reader.read(frame.text)
        self._semantic.append(int(frame.codes[0]))

    def minutes(self) -> list[Minute]:
        return by_minute(self._reader.words(), self._reader.is_padding, self._semantic, frame_rate=1 / self._frame_sec)

    def record(self) -> dict[str, Any]:
        """The content of the text's file."""
        words, minutes = self._reader.words(), self.minutes()
        return {
            "seconds": round(len(self._semantic) * self._frame_sec, 3),
            "text": " ".join(word.word for word in words),
            "words": [asdict(word) for word in words],
            "minutes": [{**asdict(minute), "loops": minute.loops} for minute in minutes],
            "warning": loop_warning(minutes),
        }

    def tell(self, console: Console) -> None:
        """Print the text, its repetition by minute, and how long it took."""
        said, seconds = self._reader.words(), len(self._semantic) * self._frame_sec
        shown = " ".join(word.word for word in said[:_TOLD_WORDS]) + " …" * (len(said) > _TOLD_WORDS)
        say(console, f"said {len(said)} {'word' if len(said) == 1 else 'words'}{f': {shown}' if said else ''}")
        minutes = self.minutes()
        for line in table(minutes):
            say(console, line)
        warning = loop_warning(minutes)
        if warning is not None:
            say(console, f"warning: {warning}")
        took = time.monotonic() - self._started
        say(
            console,
            f"answered {seconds:.1f} s in {took:.1f} s: real-time factor {took / seconds:.2f} (below 1 is faster than "
            f"it sounds)",
        )


def _made_from(request: AnswerRequest, heard: UserAudio, sampling: dict[str, Any]) -> dict[str, Any]:
    asked = {key: value for key, value in asdict(request).items() if key not in {"out", *_ARGUMENTS}}
    return {
        **asked,
        "audio": str(request.audio),
        "user_channel": heard.channel if heard.info.channels > 1 else None,
        "sampling": sampling,
        "ttt_moshi_version": __version__,
    }


def _generation_defaults(options: MoshiOptions) -> dict[str, Any]:
    """The arguments of `LMGen` in the model's config.json; kyutai's own defaults for what it leaves out."""
    kyutais = {"temp": 0.8, "temp_text": 0.7, "top_k": 250, "top_k_text": 25}
    if reads_with_the_demos(options):
        return kyutais
    return {**kyutais, **checkpoint_info(options).lm_gen_config}
