"""How likely Moshi finds what it reads: cross-entropy for each frame of its text stream and of its own codebooks.

kyutai's model reads codes step by step. A stream with delay d is at frame t in step t + d, and the input of a step is
what the step before predicts. So frame t of a delayed stream is predicted only if frame t + d is there too: of the last
frames the model says nothing about such streams, as `LMModel.forward` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from moshi.models import LMModel
from torch import Tensor
from torch.nn import functional as F

from ttt.errors import UsageError
from ttt.plugins import Scores
from ttt_moshi.heads import hidden_states, logits_of, some_steps
from ttt_moshi.model import MoshiTTT
from ttt_moshi.options import PIECE
from ttt_moshi.streaming import exact_streaming


@torch.no_grad()
def score(model: LMModel, clips: Tensor) -> Scores:
    """The scores of clips `[B,17,T]`, `[B,9,T]`: text, then Moshi's own codebooks.

    A frame that is -1 in all streams is the padding of a shorter clip, and what would be predicted there is left out.
    So is what cannot be predicted before the clip ends, as if it were the longest of its batch.

    Raises:
        UsageError: these are not codes of the model.
    """
    reading = _Reading(model, len(clips))
    reading.require_codes(clips)
    return _joined([reading.read(clips), reading.finish()])


@contextmanager
def score_stream(model: LMModel, *, batch_size: int) -> Iterator[MoshiScoreStream]:
    """The same for streams that are read in pieces. The memory that this takes does not grow with them.

    Raises:
        UsageError: the model is streaming already.
    """
    with exact_streaming(model, batch_size, longest=PIECE):
        stream = MoshiScoreStream(model, batch_size)
        try:
            yield stream
        finally:
            stream.close()


class MoshiScoreStream:
    """Scores of streams `[B,17,t]` that are read piece after piece by a model in `exact_streaming`.

    The last frame is held back until the next one is read: one step later the model predicts its acoustic codes.
    """

    def __init__(self, model: LMModel, batch_size: int) -> None:
        self._model = model
        self._reading: _Reading | None = _Reading(model, batch_size)

    @torch.no_grad()
    def read(self, piece: Tensor) -> Scores:
        """Read the next frames `[B,17,t]`, t >= 0.

        Raises:
            UsageError: these are not codes of the model and of as many streams, or the streams have ended.
        """
        reading = self._open()
        reading.require_codes(piece)
        return _joined([reading.read(part) for part in piece.split(PIECE, dim=2)])

    @torch.no_grad()
    def finish(self) -> Scores:
        """End the streams; the scores that were held back.

        Raises:
            UsageError: the streams have ended.
        """
        rest = self._open().finish()
        self.close()
        return rest

    @torch.no_grad()
    def learn_anew(self) -> None:
        """Start the fast weights of all streams anew: for every frame not read yet. Attention keeps what it has seen.

        Raises:
            UsageError: the streams have ended.
        """
        self._open()
        for module in self._model.modules():
            if isinstance(module, MoshiTTT) and module._streaming_state is not None:
                state = module._streaming_state
                state.reset(torch.ones_like(state.exec_mask))

    def close(self) -> None:
        """End the streams and forget what was held back."""
        self._reading = None

    def _open(self) -> _Reading:
        if self._reading is None:
            raise UsageError("these streams have ended; open another `score_stream` to read on")
        return self._reading


class _Reading:
    """Reads codes `[B,17,t]` in pieces: gives them kyutai's delays, and takes the delays from the scores again."""

    def __init__(self, model: LMModel, batch_size: int) -> None:
        self._model = model
        self._delays: list[int] = list(model.delays)
        self._scored = 1 + model.dep_q
        self._initial = model._get_initial_token().expand(batch_size, -1, -1)
        self._before = self._initial.expand(-1, -1, max(self._delays))  # codes that some streams have still to read
        self._input = self._initial  # what the next step reads
        self._steps = 0
        empty = torch.zeros(batch_size, self._scored, 0, device=model.device)
        self._nll = empty.to(torch.promote_types(model.dtype, torch.float32))
        self._mask = empty.bool()

    def read(self, codes: Tensor) -> Scores:
        """The scores of the frames that are complete now."""
        if codes.shape[2]:
            self._predict(codes)
        return self._take(max(0, self._nll.shape[2] - self._latest))

    def finish(self) -> Scores:
        """The scores of the last frames: no step predicts their delayed codes."""
        self._nll = F.pad(self._nll, (0, self._latest))
        self._mask = F.pad(self._mask, (0, self._latest))
        return self._take(min(self._steps, self._latest))

    @property
    def _latest(self) -> int:
        """Steps after which every scored code of a frame is predicted."""
        return max(self._delays[: self._scored])

    def _predict(self, codes: Tensor) -> None:
        """Run the steps that the codes allow, one for each frame, and keep their scores by step."""
        joined = torch.cat([self._before, codes], 2)
        steps, start = codes.shape[2], self._before.shape[2]
        delayed = [joined[:, k, start - delay :][:, :steps] for k, delay in enumerate(self._delays)]
        targets = torch.stack(delayed, 1)
        inputs = torch.cat([self._input, targets[:, :, :-1]], 2)
        nll = _losses(self._model, hidden_states(self._model, inputs), targets)
        mask = self._predicted(codes, targets)
        self._nll = torch.cat([self._nll, torch.where(mask, nll, 0)], 2)
        self._mask = torch.cat([self._mask, mask], 2)
        self._before, self._input = joined[:, :, steps:], targets[:, :, -1:]
        self._steps += steps

    def _predicted(self, codes: Tensor, targets: Tensor) -> Tensor:
        """Which of the steps' predictions are of something that the clips hold, `[B,K,t]`."""
        step = torch.arange(self._steps, self._steps + codes.shape[2], device=codes.device)
        delays = torch.tensor(self._delays[: self._scored], device=codes.device)
        nothing = self._model.zero_token_id
        there = (codes != nothing).any(1, keepdim=True)  # else the clip has ended
        return there & (targets[:, : self._scored] != nothing) & (step >= delays[:, None])

    def _take(self, frames: int) -> Scores:
        """Take the first frames from what is kept by step."""
        taken = []
        for kept in (self._nll, self._mask):
            lines = [kept[:, k, delay : delay + frames] for k, delay in enumerate(self._delays[: self._scored])]
            taken.append(torch.stack(lines, 1))
        self._nll, self._mask = self._nll[:, :, frames:], self._mask[:, :, frames:]
        return Scores(*taken)

    def require_codes(self, codes: Tensor) -> None:
        """Refuse what are no codes of the model."""
        rows, streams = self._initial.shape[0], len(self._delays)
        if codes.dim() != 3 or codes.shape[:2] != (rows, streams) or codes.is_floating_point():
            raise UsageError(f"{rows} streams of codes are [{rows}, {streams}, T] integers, not {list(codes.shape)}")
        for name, part, size in (
            ("text tokens", codes[:, :1], self._model.text_card),
            ("audio codes", codes[:, 1:], self._model.card),
        ):
            if part.numel() and not -1 <= int(part.min()) <= int(part.max()) < size:
                raise UsageError(
                    f"{name} of this model are 0 to {size - 1}, or -1 for nothing, but these are {int(part.min())} to "
                    f"{int(part.max())}; were they made by another codec?"
                )


def _joined(scores: list[Scores]) -> Scores:
    return Scores(torch.cat([part.nll for part in scores], 2), torch.cat([part.mask for part in scores], 2))


def _losses(model: LMModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of targets `[B,17,t]` given the output `[B,t,D]` before each, `[B,K,t]`; some frames at a time."""
    return torch.cat([_losses_of_logits(model, *part) for part in some_steps(hidden, targets)], 2)


def _losses_of_logits(model: LMModel, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = logits_of(model, hidden, targets)
    text = _cross_entropy(logits.text, targets[:, :1])
    return torch.cat([text, _cross_entropy(logits.audio, targets[:, 1 : 1 + model.dep_q])], 1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`[B,K,t,card]` against `[B,K,t]`, where a target that is no code counts as code 0: it is masked later."""
    codes = torch.where((targets >= 0) & (targets < logits.shape[-1]), targets, 0)
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise.flatten(0, 2), codes.flatten(), reduction="none").view(targets.shape)
