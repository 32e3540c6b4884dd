"""How likely a causal language model finds what it reads: cross-entropy of each token given those before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttt.errors import UsageError
from ttt.hf.options import NOTHING
from ttt.hf.running import PiecewiseReader, learned_positions
from ttt.hf.states import Remembered, StatefulCache
from ttt.plugins.scoring import Scores

PIECE: Final = 256
"""Positions, of all rows together some multiple of it, whose logits are in memory at once."""


@torch.no_grad()
def score(model: nn.Module, clips: Tensor) -> Scores:
    """The scores of clips `[B,1,T]`, `[B,1,T]`; the first token of a clip has none.

    A position of −1 is the padding of a shorter clip, at its end.

    Raises:
        UsageError: these are not tokens of the model, or more than it has positions for.
    """
    with score_stream(model, batch_size=len(clips)) as stream:
        return stream.read(clips)


@contextmanager
def score_stream(model: nn.Module, *, batch_size: int) -> Iterator[TextScoreStream]:
    """The same for streams that are read in pieces.

    What it takes in memory grows with the model's own cache of keys and values, up to where attention ends.
    """
    yield TextScoreStream(model, batch_size)


class TextScoreStream:
    """Scores of streams `[B,1,t]` that are read piece after piece. Nothing is held back."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        config: Any = model.config
        text = config.get_text_config()
        self._vocabulary: int = text.vocab_size
        self._batch_size = batch_size
        self._reader: PiecewiseReader | None = PiecewiseReader(model)
        self._positions = learned_positions(model)
        self._read = 0
        self._there: list[Tensor] = []
        self._expected: Tensor | None = None
        self._empty = torch.zeros(batch_size, 1, 0, device=next(model.parameters()).device)

    @torch.no_grad()
    def read(self, piece: Tensor) -> Scores:
        """Read the next tokens `[B,1,t]`, t >= 0.

        Raises:
            UsageError: these are not tokens of the model, or more than it has positions for; or the streams have ended.
        """
        self._require_tokens(piece)
        parts = [self._scored(part[:, 0]) for part in piece.split(PIECE, 2) if part.shape[2]]
        return _joined(parts) if parts else Scores(self._empty, self._empty.bool())

    def finish(self) -> Scores:
        """End the streams; no scores are held back.

        Raises:
            UsageError: the streams have ended.
        """
        self._open()
        self._reader = None
        return Scores(self._empty, self._empty.bool())

    def learn_anew(self) -> None:
        """Start the fast weights of all streams anew. Attention keeps what it has seen.

        Raises:
            UsageError: the streams have ended.
        """
        cache = self._open().cache
        if isinstance(cache, StatefulCache):
            fresh: Any = None  # what a layer takes for streams that start
            cache.ttt_states = {
                index: Remembered(state=fresh, positions=known.positions) for index, known in cache.ttt_states.items()
            }

    def _scored(self, tokens: Tensor) -> Scores:
        """The scores of the next tokens `[B,t]`."""
        there = tokens != NOTHING
        self._there.append(there)
        mask = torch.cat(self._there, 1)
        logits = self._open().read(tokens.clamp_min(0), None if bool(mask.all()) else mask.long())
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        first = torch.zeros_like(precise[:, :1]) if self._expected is None else self._expected
        predicted = torch.cat([first, precise[:, :-1]], 1)
        nll = F.cross_entropy(predicted.flatten(0, 1), tokens.clamp_min(0).flatten(), reduction="none")
        if self._expected is None:
            there = there & (torch.arange(there.shape[1], device=there.device) > 0)
        self._expected = precise[:, -1:]
        self._read += tokens.shape[1]
        return Scores(torch.where(there, nll.view_as(tokens), 0)[:, None], there[:, None])

    def _open(self) -> PiecewiseReader:
        if self._reader is None:
            raise UsageError("the streams have ended; open another context")
        return self._reader

    def _require_tokens(self, piece: Tensor) -> None:
        if piece.dim() != 3 or piece.shape[:2] != (self._batch_size, 1) or piece.is_floating_point():
            count = self._batch_size
            raise UsageError(f"{count} streams of tokens are [{count}, 1, T] integers, not {[*piece.shape]}")
        if piece.numel() and not NOTHING <= int(piece.min()) <= int(piece.max()) < self._vocabulary:
            raise UsageError(
                f"tokens of this model are 0 to {self._vocabulary - 1}, or −1 for none, and these are "
                f"{int(piece.min())} to {int(piece.max())}; were they made by another tokenizer?"
            )
        if self._positions is not None and self._read + piece.shape[2] > self._positions:
            raise UsageError(
                f"the model has learned {self._positions:,} positions, and the stream is longer; read at most so many"
            )


def _joined(parts: list[Scores]) -> Scores:
    return Scores(torch.cat([part.nll for part in parts], 2), torch.cat([part.mask for part in parts], 2))
