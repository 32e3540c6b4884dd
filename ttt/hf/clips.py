"""Text files as what a model reads and is scored on: tokens `[1,T]`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt.config import RunConfig
from ttt.errors import EnvironmentProblem
from ttt.hf.documents import LARGEST
from ttt.hf.facts import known_config, size_in
from ttt.hf.options import CausalLMOptions
from ttt.hf.tokens import DocumentTokens, load_tokenizer
from ttt.reading import read_text, unreadable

_PIECE = 4096
"""Tokens of a piece."""
_KEPT = 4
"""Texts whose tokens are kept."""


class TextClips:
    """Reads text files; `ttt.plugins.ClipReader` has the methods.

    A text is tokenised whole, since where it may be cut depends on the tokenizer. Its tokens take 8 bytes each.

    Args:
        tokens: what makes them.
        notice: what a user must know.
    """

    def __init__(self, tokens: DocumentTokens, notice: str | None = None) -> None:
        self._tokens = tokens
        self.notice = notice
        self._clip = functools.lru_cache(maxsize=_KEPT)(self._read)

    @classmethod
    def of(cls, config: RunConfig[Any, Any]) -> TextClips:
        """The reader for a config's model.

        Raises:
            EnvironmentProblem: the tokenizer cannot be loaded.
        """
        return cls(DocumentTokens(load_tokenizer(config.backbone), config.data), _longest(config.backbone))

    @property
    def identity(self) -> Mapping[str, str]:
        """What makes the same clip of the same file."""
        return self._tokens.identity

    def positions(self, path: Path) -> int:
        """How many tokens a file has; it is tokenised for that."""
        return self.read(path).shape[1]

    def read(self, path: Path) -> Tensor:
        """A file's tokens, `[1,T]`.

        Raises:
            EnvironmentProblem: it is missing, no text, or empty.
        """
        return self._clip(path)

    def stream(self, path: Path) -> Iterator[Tensor]:
        """The same in pieces."""
        yield from self.read(path).split(_PIECE, 1)

    def _read(self, path: Path) -> Tensor:
        try:
            text = read_text(path, limit=LARGEST, prose=True)
        except OSError as error:
            raise EnvironmentProblem(f"{path}: cannot be read: {unreadable(error)}") from None
        ids = self._tokens.encode(text)
        if not len(ids):
            raise EnvironmentProblem(f"{path}: is empty")
        return torch.from_numpy(ids.astype("int64"))[None]


def _longest(options: CausalLMOptions) -> str | None:
    """What a user must know of long texts."""
    most = size_in(known_config(options), "max_position_embeddings")
    if most is None:
        return None
    return (
        f"the model was made for {most:,} positions; what a text holds beyond them is read at positions that it has "
        f"never seen, or refused if it has learned a vector for each"
    )
