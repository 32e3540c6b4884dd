"""Evidence that TTT acts: what each layer's inner learning did in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ttt.adapter import Gate
from ttt.inject import Injection
from ttt.layer import TTTLayer
from ttt.parallel.gathering import whole
from ttt.state import TTTState


@dataclass(frozen=True)
class LayerEvidence:
    """What one adapter did in a forward pass."""

    inner_loss_before: float
    """Inner loss at the weights that opened each mini-batch; mean over mini-batches, streams, heads and tokens.

    If a mask leaves tokens out, over those that count, and over the mini-batches that any stream reaches."""
    inner_loss_after: float
    """Inner loss of the same tokens after the mini-batch's step."""
    movement: float
    """`‖W_T − W_0‖ / ‖W_0‖` over all fast weights, mean over streams; the step of an open mini-batch counts. If the
    weights start at zero, it is `‖W_T‖`: finite, and above 0 if they moved."""
    gate: float
    """Mean of `|tanh(α)|` over channels and gates."""
    gate_max: float
    """The largest `|tanh(α)|`."""


class Observation:
    """Watches a forward pass: `with Observation(injection) as evidence: loss = …`, then `evidence.layers()`.

    Forward hooks measure each adapter's first call inside, without gradients; the pass's outputs and gradients do not
    change. It costs about one more forward pass of the TTT layers.
    """

    def __init__(self, injection: Injection) -> None:
        self._adapters = injection.adapters
        self._handles: list[Any] = []
        self._measured: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def __enter__(self) -> Observation:
        for name, adapter in self._adapters.items():
            for module in adapter.modules():
                if isinstance(module, TTTLayer):
                    self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def reached(self) -> frozenset[str]:
        """Names of the sites whose TTT layer was called."""
        return frozenset(self._measured)

    def layers(self, combine: Callable[[Tensor], Tensor] = lambda measured: measured) -> dict[str, LayerEvidence]:
        """The measurements by site name; waits for the device, once.

        Args:
            combine: makes of what was measured here `[L, 3]` (inner losses, movement) that of several processes.
        """
        if not self._measured:
            return {}
        openings = [self._opening(name) for name in self._measured]
        seen = combine(torch.stack([torch.stack(values) for values in self._measured.values()]))
        numbers = torch.cat((seen, torch.stack(openings).to(seen)), 1).tolist()
        return {name: LayerEvidence(*of_layer) for name, of_layer in zip(self._measured, numbers, strict=True)}

    def _opening(self, name: str) -> Tensor:
        """The mean and the largest `|tanh(α)|` of an adapter's gates, `[2]`."""
        gates = [gate for gate in self._adapters[name].modules() if isinstance(gate, Gate)]
        opening = torch.cat([torch.tanh(whole(gate.gating_alpha.detach())).abs() for gate in gates])
        return torch.stack((opening.mean(), opening.max()))

    def _hook(self, name: str) -> Any:
        def measure(layer: nn.Module, args: Any, kwargs: Any, result: tuple[Tensor, TTTState]) -> None:
            if name in self._measured:
                return  # a recomputation, or another direction over the same tokens
            assert isinstance(layer, TTTLayer)
            with torch.no_grad():
                trace = layer.trace_minibatches(*args, **kwargs)
                state = result[1]
                own = layer.initial_state(1, dtype=state.weights[0].dtype).weights
                moved = _norms(layer, [w - o for w, o in zip(layer.effective_weights(state), own, strict=True)])
                start = _norms(layer, own)
                movement = (moved / torch.where(start > 0, start, 1)).mean()
                self._measured[name] = (trace.before.nanmean(), trace.after.nanmean(), movement)

        return measure


def _norms(layer: TTTLayer, weights: Sequence[Tensor]) -> Tensor:
    """The norm over all fast weights of each stream, `[B]`."""
    squares = torch.stack([w.flatten(1).square().sum(1) for w in weights]).sum(0)
    return layer.sharing.sum_over_heads(squares).sqrt()
