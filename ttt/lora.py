"""LoRA in a model's linear layers (arXiv 2106.09685): `W x + scaling · B A x`.

A linear layer keeps its place, its parameters and their names: it becomes an instance of a subclass of its own class,
and gets A and B as children `lora_A` and `lora_B`, named as in kyutai's and PEFT's files. What is computed is what
kyutai's `LoRALinear` and PEFT's `Linear` compute. B starts at zero, so an adapted model starts as the plain one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ttt.config.lora import LoraSettings
from ttt.errors import InjectionError
from ttt.parallel.gathering import whole
from ttt.plugins.lora_site import LoraSite


class LoraLinear(nn.Linear):
    """A linear layer with LoRA: a plain one becomes this, one of another class a subclass of both."""

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_scaling: float
    lora_off: bool
    """Compute `W x` alone; see `ttt.adapter.gates_closed`."""

    def forward(self, input: Tensor) -> Tensor:
        """Inputs `[…,in]` to `[…,out]`, in the type of the layer."""
        y = super().forward(input)
        return y if self.lora_off else y + self.lora_B(self.lora_A(input)) * self.lora_scaling

    def extra_repr(self) -> str:
        """Shape and rank for `print(model)`."""
        return f"{super().extra_repr()}, rank={self.lora_A.out_features}, scaling={self.lora_scaling:g}"


_CLASSES: dict[type[nn.Linear], type[LoraLinear]] = {nn.Linear: LoraLinear}


def _with_lora(kind: type[nn.Linear]) -> type[LoraLinear]:
    """What a linear layer of a class becomes."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Lora{kind.__name__}", (LoraLinear, kind), {})
    return _CLASSES[kind]


@dataclass(frozen=True)
class LoraPlan:
    """Where LoRA goes, and with which settings."""

    sites: tuple[LoraSite, ...]
    settings: LoraSettings
    matched_to: int | None = None
    """Parameters that the rank was chosen to come nearest to."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what it adds, by name in the model."""
        rank = self.settings.rank
        return {
            f"{site.path}.{name}.weight": shape
            for site in self.sites
            for name, shape in (
                ("lora_A", (rank, site.linear.in_features)),
                ("lora_B", (site.linear.out_features, rank)),
            )
        }


class Lora:
    """LoRA in a model, and `remove` to take it out again. Nothing changes unless all of the plan is possible.

    Args:
        model: the model of the sites.
        plan: where it goes.
        seed: of the initial values of A, which depend on it and on the layer's place among the sites alone.

    Raises:
        InjectionError: a site is not a linear layer of the model, is there twice, or has LoRA already.
    """

    def __init__(self, model: nn.Module, plan: LoraPlan, *, seed: int = 0) -> None:
        _require_possible(model, plan.sites)
        self.settings = plan.settings
        """Rank, scaling, which linear layers."""
        self.sites = plan.sites
        self.matched_to = plan.matched_to
        """Parameters that the rank was chosen to come nearest to; None if it was given."""
        self._classes: dict[nn.Module, type[nn.Module]] = {}
        generator = torch.Generator().manual_seed((seed * 1_000_003 + 500_009) % (1 << 63))
        try:
            for site in plan.sites:
                self._add(site, generator)
        except BaseException:
            self.remove()
            raise

    def _add(self, site: LoraSite, generator: torch.Generator) -> None:
        linear = site.linear
        factors = _factors(linear, self.settings.rank, generator)
        self._classes[linear] = type(linear)
        for name, factor in zip(("lora_A", "lora_B"), factors, strict=True):
            factor.train(linear.training)
            factor.register_load_state_dict_pre_hook(keep_where_absent)
            linear.add_module(name, factor)
        linear.lora_scaling, linear.lora_off = self.settings.scaling, False  # type: ignore[assignment]
        linear.__class__ = _with_lora(type(linear))
        if site.host is not None and site.host_class is not None and site.host not in self._classes:
            self._classes[site.host] = type(site.host)
            site.host.__class__ = site.host_class

    @property
    def linears(self) -> dict[str, LoraLinear]:
        """The linear layers by their path, in order; empty once removed."""
        return {site.path: site.linear for site in self.sites if isinstance(site.linear, LoraLinear)}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every A and B by its name in the model."""
        return {
            f"{path}.{name}.weight": getattr(linear, name).weight
            for path, linear in self.linears.items()
            for name in ("lora_A", "lora_B")
        }

    @torch.no_grad()
    def shares(self) -> dict[str, float]:
        """How far LoRA has moved each layer: `‖scaling · B A‖ / ‖W‖` (Frobenius) by path."""
        return {path: _share(linear) for path, linear in self.linears.items()}

    def remove(self) -> None:
        """Restore the layers as they were. A second call does nothing."""
        for module, original in self._classes.items():
            module.__class__ = original
            for name in ("lora_A", "lora_B"):
                module._modules.pop(name, None)
            for name in ("lora_scaling", "lora_off"):
                module.__dict__.pop(name, None)
        self._classes = {}


def _factors(linear: nn.Linear, rank: int, generator: torch.Generator) -> tuple[nn.Linear, nn.Linear]:
    """A, drawn on the CPU so that every device has the same values, and B at zero; in the type of the layer."""
    device, dtype = linear.weight.device, linear.weight.dtype
    with torch.device("meta"):  # neither is drawn here
        a, b = nn.Linear(linear.in_features, rank, bias=False), nn.Linear(rank, linear.out_features, bias=False)
    if linear.weight.is_meta:
        return a.to(dtype), b.to(dtype)
    drawn = torch.empty(rank, linear.in_features)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    a.weight = nn.Parameter(drawn.to(device=device, dtype=dtype))
    b.weight = nn.Parameter(torch.zeros(linear.out_features, rank, device=device, dtype=dtype))
    return a, b


def _share(linear: LoraLinear) -> float:
    a, b = whole(linear.lora_A.weight).float(), whole(linear.lora_B.weight).float()
    squared = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)  # ‖B A‖², without making B A
    weight = whole(linear.weight)  # of a large model, a copy in float32 would take hundreds of MiB
    norm = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return float(linear.lora_scaling * squared.sqrt() / torch.where(norm > 0, norm, 1))


def keep_where_absent(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let a state dict of the plain backbone load strictly: give it the module's own values."""
    if not any(name.startswith(prefix) for name in state_dict):
        state_dict.update(module.state_dict(prefix=prefix))


def _require_possible(model: nn.Module, sites: Sequence[LoraSite]) -> None:
    paths = {id(module): path for path, module in model.named_modules()}
    seen: set[int] = set()
    if not sites:
        raise InjectionError("lora.linears names no linear layer of the backbone")
    for site in sites:
        if not isinstance(site.linear, nn.Linear) or paths.get(id(site.linear)) != site.path:
            raise InjectionError(
                f"LoRA at {site.path!r}: the model's linear layer there is not the one that the backbone offers"
            )
        if "forward" in vars(site.linear):
            raise InjectionError(
                f"LoRA at {site.path}: the layer's forward is replaced on the object itself, as offloading does, so "
                f"that LoRA would never be called; add it before that"
            )
        if isinstance(site.linear, LoraLinear) or id(site.linear) in seen:
            raise InjectionError(f"{site.path} has LoRA already; eject the first injection before another")
        seen.add(id(site.linear))
        if site.host is not None and not (site.host_class and issubclass(site.host_class, type(site.host))):
            raise InjectionError(
                f"LoRA at {site.path!r}: its host's class {getattr(site.host_class, '__name__', None)} is not a "
                f"subclass of {type(site.host).__name__}"
            )


def shapes_of(sites: Sequence[LoraSite]) -> Mapping[tuple[int, int], int]:
    """How many linear layers of each input and output width there are."""
    shapes: dict[tuple[int, int], int] = {}
    for site in sites:
        shape = (site.linear.in_features, site.linear.out_features)
        shapes[shape] = shapes.get(shape, 0) + 1
    return shapes
