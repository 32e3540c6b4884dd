"""The gated residual around a TTT layer, and two contexts for adapters: with gates closed, or with states carried."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ttt.config import TTTConfig
from ttt.layer import Rotary, TTTLayer
from ttt.layer_sharing import held
from ttt.lora import LoraLinear
from ttt.state import TTTState


class Adapted(Protocol):
    """What carrying states needs of a model with adapters; a `ttt.inject.Injection` has it."""

    @property
    def adapters(self) -> Mapping[str, nn.Module]:
        """The adapters by site name."""
        ...


class Gate(nn.Module):
    """`x + tanh(α) ⊙ y` with one α for each channel; if it is closed, or α is 0, it returns x bit for bit.

    Args:
        dim: width D.
        initial_alpha: the initial α of every channel.
        device: of α.
        dtype: of α.
    """

    def __init__(
        self,
        dim: int,
        initial_alpha: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.initial_alpha = initial_alpha
        self.gating_alpha = nn.Parameter(torch.full((dim,), initial_alpha, device=device, dtype=dtype))
        self.closed = False
        """Return x alone; see `gates_closed`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Combine x and y, `[…,D]` each, to `[…,D]` in the type of x; the sum is rounded once."""
        if self.closed:
            return x
        wide = torch.promote_types(x.dtype, self.gating_alpha.dtype)
        return (x.to(wide) + torch.tanh(self.gating_alpha).to(wide) * y.to(wide)).to(x.dtype)

    def extra_repr(self) -> str:
        """Shape for `print(model)`."""
        return f"dim={self.gating_alpha.shape[0]}, initial_alpha={self.initial_alpha}"


@dataclass
class Port:
    """Passes states to and from an adapter that the backbone calls with tokens alone."""

    incoming: TTTState | None = None
    """The state before a forward pass. A pass does not change it, so that a recomputation starts from the same."""
    fresh: Tensor | None = None
    """The streams that start with the layer's own weights instead, `[B]`; None if none does. They are reset inside the
    forward pass: elsewhere a process that has only its part of the parameters has no weights to reset them to."""
    outgoing: TTTState | None = None
    """The detached state after the last forward pass."""


class TTTAdapter(nn.Module):
    """`x + tanh(α) ⊙ TTT(x)`: what is injected into a backbone.

    Args:
        dim: model width D.
        num_heads: heads of the backbone.
        config: the `ttt` section.
        device: of the parameters.
        dtype: of the parameters; float32 keeps small updates that bfloat16 would round away.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        config: TTTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.layer = TTTLayer(dim, num_heads, config, device=device, dtype=dtype)
        self.gate = Gate(dim, config.initial_gating_alpha, device=device, dtype=dtype)
        self.port: Port | None = None

    def adapt(
        self,
        x: Tensor,
        state: TTTState | None = None,
        *,
        rotary: Rotary | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, TTTState]:
        """Adapt tokens `[B,T,D]` from a state of the streams; returns the tokens and the state after them.

        Tokens for which `mask [B,T]` is false are returned as they are, and do not exist for the layer.
        """
        y, state = self.layer(x, state, rotary=rotary, mask=mask)
        out = self.gate(x, y)
        # Not by y = 0 alone: what comes back to such a token may be NaN, and α gets its product with y.
        return out if mask is None else torch.where(mask[..., None], out, x), state

    def forward(self, x: Tensor, *, rotary: Rotary | None = None, mask: Tensor | None = None) -> Tensor:
        """Adapt tokens `[B,T,D]`: from the states of `carried`, or from fresh streams outside of it."""
        if self.gate.closed:
            return x
        # No mask is no argument: a subclass whose `adapt` knows of none fails if one is given, and not before.
        masked = {} if mask is None else {"mask": mask}
        out, state = self.adapt(x, self._incoming(), rotary=rotary, **masked)
        if self.port is not None:
            self.port.outgoing = self._owned(state.detach())
        return out

    def _incoming(self) -> TTTState | None:
        port = self.port
        if port is None or port.incoming is None or port.fresh is None:
            return None if port is None else port.incoming
        return self.layer.reset(port.incoming, port.fresh)

    def _owned(self, state: TTTState) -> TTTState:
        """The state in memory of its own: a view of a parameter is gone when that is given back after the pass."""
        own = {held(parameter).untyped_storage().data_ptr() for parameter in self.layer.parameters()}
        return TTTState.from_tensors(
            {
                name: tensor.clone() if tensor.untyped_storage().data_ptr() in own else tensor
                for name, tensor in state.tensors().items()
            }
        )


@contextlib.contextmanager
def gates_closed(model: nn.Module) -> Iterator[None]:
    """Run the model as if nothing had been injected: inside, every gate returns its first argument, and LoRA is off."""
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    linears = [module for module in model.modules() if isinstance(module, LoraLinear)]
    before = [gate.closed for gate in gates], [linear.lora_off for linear in linears]
    try:
        for gate in gates:
            gate.closed = True
        for linear in linears:
            linear.lora_off = True
        yield
    finally:
        for gate, closed in zip(gates, before[0], strict=True):
            gate.closed = closed
        for linear, off in zip(linears, before[1], strict=True):
            linear.lora_off = off


@dataclass
class Carry:
    """The states after the last forward pass under `carried`."""

    ports: Mapping[str, Port] = field(default_factory=dict)

    @property
    def states(self) -> dict[str, TTTState]:
        """Detached states by site name; a site that no forward pass has reached is left out."""
        return {name: port.outgoing for name, port in self.ports.items() if port.outgoing is not None}


@contextlib.contextmanager
def carried(
    injection: Adapted, states: Mapping[str, TTTState] | None = None, *, fresh: Tensor | None = None
) -> Iterator[Carry]:
    """Start forward passes from the given states, and keep the states after them.

    Every forward pass inside starts from the same states, so a recomputation under activation checkpointing gives
    what the first pass gave. Call `backward` inside as well.

    Args:
        injection: what `ttt.inject.apply` returned.
        states: by site name; a site that is missing starts fresh.
        fresh: streams that start fresh although they have a state, `[B]`; None if none does.

    Raises:
        ValueError: there is no such site, or its adapter carries no state.
    """
    states = states or {}
    unknown = sorted(set(states) - set(injection.adapters))
    if unknown:
        raise ValueError(f"states for {', '.join(unknown)}, but nothing is injected there")
    adapters: dict[str, TTTAdapter] = {}
    for name, adapter in injection.adapters.items():
        if not isinstance(adapter, TTTAdapter):
            raise ValueError(f"the adapter at {name} carries no state from window to window")
        adapters[name] = adapter
    carry = Carry({name: Port(states.get(name), fresh) for name in adapters})
    before = {name: adapter.port for name, adapter in adapters.items()}
    try:
        for name, adapter in adapters.items():
            adapter.port = carry.ports[name]
        yield carry
    finally:
        for name, adapter in adapters.items():
            adapter.port = before[name]
