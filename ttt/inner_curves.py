"""The inner loss of each token while a model reads, in forward passes and in streaming: the curves of a figure."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttt.adapter import Adapted
from ttt.errors import UsageError
from ttt.layer import Reading, TTTLayer
from ttt.state import TTTState


class InnerCurve(NamedTuple):
    """The inner loss of one TTT layer by position: `[S,T]` float32, S streams in the order in which they started.

    A number is NaN where a stream has no such position, skipped the token, or paused, and where a mask leaves the token
    out. `ttt.ops.tracing.InnerTrace` says what the weights are if the update is not causal.

    Source: TTT-LM (arXiv 2407.04620), its figure of the inner loss by token.
    """

    w0: np.ndarray
    """`ℓ(W₀; x_t)`: at the weights with which the stream started, in whatever pieces it is read."""
    before: np.ndarray
    """`ℓ(W_{t−1}; x_t)`: before the token is learned."""
    after: np.ndarray
    """`ℓ(W_t; x_t)`: after it."""


class InnerCurves:
    """Records what each TTT layer's inner loss is, token by token: `with InnerCurves(injection) as recorder: …`.

    It records every call of a layer inside, be it `forward` or `step_`. Where a layer is given a state, the tokens are
    the next positions of the streams before; only at the first call do they start there, and `W₀` are the weights of
    that state. So take a recorder for each batch of streams. Where a layer is given no state, new streams start from
    its own weights: a batch of sequences read whole, or a scan of a layer that reads a sequence in two directions,
    whose positions are then in the order of reading. A stream that is set back to the layer's own weights on the way
    goes on with its positions, and has them for `W₀` from there on.

    With its gate closed a layer is not called, and nothing is recorded. A stream that pauses (`exec_mask` in Moshi)
    has NaN while it does, if it is read token by token; longer pieces are recorded as if all streams read them.

    Recording changes no output. It costs about two more forward passes of the TTT layers, and keeps three float32
    numbers for each token and layer, and one state for each layer.

    Raises:
        UsageError: inside, if a layer is called while gradients are enabled, as a recomputation would be recorded too;
            or if it is given the states of another number of streams than before.
    """

    def __init__(self, injection: Adapted) -> None:
        self._names = {layer: name for name, layer in _layers(injection)}
        self._records = {name: _Record() for name in self._names.values()}

    def __enter__(self) -> InnerCurves:
        for layer in self._names:
            layer.observers.append(self._observe)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for layer in self._names:
            layer.observers.remove(self._observe)

    def curves(self) -> dict[str, InnerCurve]:
        """What was recorded, by site; a site with several layers has a curve for each, by the layer's name.

        A layer that was not called is left out.
        """
        return {name: record.curve() for name, record in self._records.items() if record.batches}

    def _observe(self, layer: TTTLayer, reading: Reading) -> None:
        if torch.is_grad_enabled():
            raise UsageError("inner losses are recorded without gradients; call the model under torch.no_grad()")
        with torch.no_grad():
            self._records[self._names[layer]].read(layer, reading)


def _layers(injection: Adapted) -> Iterator[tuple[str, TTTLayer]]:
    """Every TTT layer with its site's name; with its own name too if its adapter has several."""
    for site, adapter in injection.adapters.items():
        inside = [(name, module) for name, module in adapter.named_modules() if isinstance(module, TTTLayer)]
        for name, layer in inside:
            yield (f"{site}.{name}" if len(inside) > 1 else site), layer


class _Record:
    """What one layer has read."""

    def __init__(self) -> None:
        self.batches: list[_Batch] = []
        self._start: TTTState | None = None
        """`W₀` of the streams that are being read; None for the layer's own weights."""

    def read(self, layer: TTTLayer, reading: Reading) -> None:
        """Measure what a layer is about to read, and take it as the next positions."""
        x, state, rotary, _, mask = reading
        if state is None or not self.batches:
            self.batches.append(_Batch(x.shape[0]))
            self._start = state
        self.batches[-1].require(x.shape[0])
        if self._start is not None and state is not None:
            self._start = _set_back(layer, self._start, state)
        losses = torch.stack(layer.trace(x, state, start=self._start, rotary=rotary, mask=mask))
        self.batches[-1].add(losses)

    def curve(self) -> InnerCurve:
        """All streams, those of each batch after those of the one before."""
        longest = max(batch.length for batch in self.batches)
        return InnerCurve(*np.concatenate([batch.filled(longest) for batch in self.batches], axis=1))


def _set_back(layer: TTTLayer, start: TTTState, state: TTTState) -> TTTState:
    """A copy of `start`, for `step_` may write to it; with the layer's own weights for streams that were set back."""
    return layer.reset(start, _is_anew(layer, state))


def _is_anew(layer: TTTLayer, state: TTTState) -> Tensor:
    """Which streams hold the layer's own weights bit for bit, `[B]`: those that were set back, or learned nothing."""
    own = layer.initial_state(1, dtype=state.weights[0].dtype).weights
    moved = [(w != o).flatten(1).sum(1) for w, o in zip(layer.effective_weights(state), own, strict=True)]
    return layer.sharing.sum_over_heads(torch.stack(moved).sum(0)) == 0


class _Batch:
    """The losses `[3,B,T]` of streams that are read side by side, in memory that grows with T."""

    def __init__(self, streams: int) -> None:
        self.length = 0
        self._losses = np.empty((3, streams, 64), np.float32)

    def require(self, streams: int) -> None:
        """Refuse another number of streams."""
        if streams != self._losses.shape[1]:
            raise UsageError(
                f"a recorder of inner losses was given {self._losses.shape[1]} streams, and then states of {streams}; "
                f"take an InnerCurves for each batch of streams"
            )

    def add(self, losses: Tensor) -> None:
        """Take the losses of the next positions."""
        room, end = self._losses.shape[2], self.length + losses.shape[2]
        if end > room:
            grown = np.empty((*self._losses.shape[:2], max(2 * room, end)), np.float32)
            grown[:, :, : self.length] = self._losses[:, :, : self.length]
            self._losses = grown
        self._losses[:, :, self.length : end] = losses.float().cpu().numpy()
        self.length = end

    def filled(self, length: int) -> np.ndarray:
        """The losses `[3,B,length]`, with NaN after the last position."""
        missing = np.full((*self._losses.shape[:2], length - self.length), np.nan, np.float32)
        return np.concatenate([self._losses[:, :, : self.length], missing], axis=2)
