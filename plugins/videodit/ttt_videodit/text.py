"""The demo's text embedding, which stands in for T5: a fixed vector for every word."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ttt_videodit import demo

_BYTE_DEVIATION: Final = ((256**2 - 1) / 12) ** 0.5  # standard deviation of 0 … 255, each as likely


class DemoTextEncoder:
    """Texts to `[N,L,32]`: for word j of a text the bytes that SHAKE-256 makes of it, at unit variance; then zeros.

    Words that two texts share are the same vectors. A text without words is all zeros, which is also what training
    without text sees.

    Args:
        text_length: L, tokens of a text; further words are cut off.
    """

    def __init__(self, *, text_length: int) -> None:
        self.text_length = text_length
        """L, tokens of a text."""
        self.knows_scenes = True
        """The tokens of `ttt_videodit.scenes` are words like others, and were not in what the demo is trained on."""
        self.text_dim = demo.TEXT_DIM
        """E, width of a token."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[N,L,32]` float32 of N texts."""
        embeddings = torch.zeros(len(texts), self.text_length, self.text_dim)
        for row, text in zip(embeddings, texts, strict=True):
            for token, word in zip(row, _words(text), strict=False):
                digest = hashlib.shake_256(word.encode()).digest(self.text_dim)
                token.copy_((torch.tensor(list(digest)) - 127.5) / _BYTE_DEVIATION)
        return embeddings

    def count(self, text: str) -> int:
        """Tokens of a text, before it is cut off."""
        return len(_words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
