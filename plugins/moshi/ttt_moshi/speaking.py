"""Moshi listens to a recording and speaks: kyutai's `LMGen`, frame by frame, as their `moshi.run_inference` drives it.

The user's frame t and Moshi's frame t sound at the same time, as in training. kyutai's model reads its first token in
place of the first frame, so that frame is given to it twice. What it says is as long as what it hears.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models import LMGen, LMModel
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from ttt_moshi.repetition import SpokenWord
from ttt_moshi.streaming import codec_streaming


@dataclass(frozen=True)
class SpokenFrame:
    """What Moshi says in a frame, and what it hears in it. All on the CPU."""

    text: int
    """Its text token."""
    codes: Tensor
    """Its codes, `[K]` int64."""
    sound: Tensor
    """Its sound, `[frame_size]` float32."""
    heard: Tensor
    """The user's sound, `[frame_size]` float32."""


def spoken(model: LMModel, codec: Any, frames: Iterable[Tensor], **sampling: Any) -> Iterator[SpokenFrame]:
    """What Moshi says while it hears frames, one for each. Memory does not grow with their number.

    Fast weights and attention start fresh, and carry on to the last frame. Random draws are those of PyTorch's global
    generator of the model's device. Their number does not depend on what is said: with the same seed, two models that
    differ, or one with open and closed gates, draw the same noise at the same frame.

    Args:
        model: in eval mode, not streaming.
        codec: kyutai's Mimi or the demo's codec, on the model's device, not streaming.
        frames: the user's sound, `[1, 1, frame_size]` each.
        sampling: keyword arguments of `LMGen`: `temp`, `temp_text`, `top_k`, `top_k_text`, …
    """
    generator = LMGen(model, **sampling)
    late = _Late(max(0, generator.max_delay - 1), codec.frame_size)
    with torch.no_grad(), generator.streaming(1), codec_streaming(codec, 1):
        first = True
        for frame in late.followed(frames):
            codes = codec.encode(frame.to(model.device))
            if first:  # the model reads its initial tokens in place of the first frame it is given
                generator.step(codes)
                first = False
            tokens = generator.step(codes)
            if tokens is not None:
                sound = codec.decode(tokens[:, 1:])
                text, *_ = said = tokens[0, :, 0].cpu()
                yield SpokenFrame(int(text), said[1:], sound[0, 0].float().cpu(), late.heard.pop(0)[0, 0])


class _Late:
    """Frames, and as many of silence after them as a model with longer delays than Moshi's is late.

    Args:
        steps: how many; of Moshi none.
        frame_size: samples of a frame.
    """

    def __init__(self, steps: int, frame_size: int) -> None:
        self._steps = steps
        self._frame_size = frame_size
        self.heard: list[Tensor] = []
        """The frames that were heard and not answered yet."""

    def followed(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        for frame in frames:
            self.heard.append(frame)
            yield frame
        for _ in range(self._steps):
            yield torch.zeros(1, 1, self._frame_size)


class WordReader:
    """Puts text tokens together to words with their times.

    Args:
        tokenizer: SentencePiece.
        padding: tokens that stand where no text is said.
        frame_rate: frames a second.
    """

    def __init__(self, tokenizer: SentencePieceProcessor, padding: frozenset[int], *, frame_rate: float) -> None:
        self._tokenizer = tokenizer
        self._padding = padding
        self._frame_sec = 1 / frame_rate
        self._open: list[int] = []
        self._span = (0, 0)
        self._frame = 0
        self._words: list[SpokenWord] = []
        self.is_padding: list[bool] = []
        """Of each frame, whether it has no text."""

    def read(self, token: int) -> str:
        """Take the next frame's token; the text that it adds, "" for none."""
        frame, self._frame = self._frame, self._frame + 1
        silent = token in self._padding or self._is_no_text(token)
        self.is_padding.append(silent)
        if silent:
            return ""
        piece = str(self._tokenizer.id_to_piece(token))
        if piece.startswith("▁"):
            self._close()
        if not self._open:
            self._span = (frame, frame)
        self._open.append(token)
        self._span = (self._span[0], frame)
        return piece.replace("▁", " ")

    def words(self) -> list[SpokenWord]:
        """The words so far."""
        self._close()
        return self._words

    def _is_no_text(self, token: int) -> bool:
        """Whether the tokenizer has no text for a token, such as its end of a sentence."""
        known = 0 <= token < self._tokenizer.get_piece_size()
        return not known or self._tokenizer.is_control(token) or self._tokenizer.is_unknown(token)

    def _close(self) -> None:
        text = self._tokenizer.decode(self._open).strip() if self._open else ""
        if text:
            start, end = (round(frame * self._frame_sec, 3) for frame in (self._span[0], self._span[1] + 1))
            self._words.append(SpokenWord(text, start, end))
        self._open = []
