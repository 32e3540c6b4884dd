"""What happens to gradients when a TTT layer keeps its fast weights on itself, under activation checkpointing.

    python benchmarks/silent_gradients.py            # a Markdown table on standard output

Two ways to keep them, as research code has them: in an attribute that the next forward pass starts from, and written
into the parameters themselves. Beside them this library's layer, whose state comes in and goes out. Each is injected
into the smallest Moshi and compared, in one pass from fresh weights, with the gradients of the pure layer and no
checkpoint. Numbers are the distance of all gradients together, `‖g − g₀‖ / ‖g₀‖`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttt import inject
from ttt.adapter import TTTAdapter
from ttt.config import TTTConfig
from ttt.laws.bench import Bench
from ttt.laws.checks import NESTINGS
from ttt.layer import Rotary
from ttt.plugins import Backbone, Site, get_backbone
from ttt.state import TTTState


class KeptInAttribute(TTTAdapter):
    """Fast weights kept, detached, in an attribute: a recomputation starts where the first pass ended."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.fast: TTTState | None = None

    def forward(self, x: Tensor, *, rotary: Rotary | None = None) -> Tensor:
        out, state = self.adapt(x, self.fast, rotary=rotary)
        self.fast = state.detach()
        return out


class KeptInParameters(TTTAdapter):
    """Fast weights written into the parameters, row 0 for all: even what backward has saved changes."""

    def forward(self, x: Tensor, *, rotary: Rotary | None = None) -> Tensor:
        out, state = self.adapt(x, rotary=rotary)
        for name, weight in zip(self.layer.weight_names, state.weights, strict=True):
            getattr(self.layer, name).data.copy_(weight[0].detach())
        return out


DESIGNS: dict[str, type[TTTAdapter]] = {
    "pure (this library)": TTTAdapter,
    "kept in an attribute": KeptInAttribute,
    "kept in the parameters": KeptInParameters,
}


class BenchOf(Bench):
    """A bench whose adapters are of another class."""

    design: type[TTTAdapter] = TTTAdapter

    def inject(self, model: nn.Module, config: TTTConfig | None = None) -> inject.Injection:
        """TTT of this design in the model."""
        sites: Sequence[Site] = self.backbone.sites(model)
        sites = [dataclasses.replace(site, adapter=self.design) for site in sites]
        return inject.apply(model, sites, config or self.config(), causal=self.backbone.causal, seed=1)


def bench_of(design: type[TTTAdapter], backbone: Backbone, *, tokens: int = 70) -> BenchOf:
    """A bench with that design; 70 tokens are 18 mini-batches, more than one group of 16."""
    bench = BenchOf(backbone, tokens=tokens)
    bench.design = design
    return bench


def gradients(bench: Bench, nesting: str, group_size: int) -> Tensor | str:
    """Every gradient in one vector, or how the pass ended."""
    injection = bench.injected(scan_checkpoint_group_size=group_size)
    batch = bench.batch(injection.model)
    try:
        with bench.wrapped(injection, NESTINGS[nesting]):
            found = bench.gradients(injection.model, batch)
    except torch.utils.checkpoint.CheckpointError:
        return "CheckpointError"
    except RuntimeError as error:
        return f"RuntimeError: {str(error).splitlines()[0]}"
    return torch.cat([value.flatten().double() for name, value in found.items() if name != "outputs"])


def wrong(bench: Bench, nesting: str, group_size: int) -> float | str:
    """How far the gradients are from the right ones, or how the pass ended."""
    right = gradients(bench_of(TTTAdapter, bench.backbone, tokens=bench.tokens), "no checkpoint", 0)
    assert isinstance(right, Tensor)
    found = gradients(bench, nesting, group_size)
    return found if isinstance(found, str) else ((found - right).norm() / right.norm()).item()


def main() -> None:
    """Print the table."""
    groups = (0, 1, 16)
    print("| fast weights | checkpoint around the layer | " + " | ".join(f"group {g}" for g in groups) + " |")
    print("| --- | --- |" + " ---: |" * len(groups))
    for name, design in DESIGNS.items():
        bench = bench_of(design, get_backbone("moshi"))
        for nesting in ("no checkpoint", "reentrant", "non-reentrant"):
            cells = []
            for group_size in groups:
                found = wrong(bench, nesting, group_size)
                if isinstance(found, str):
                    cells.append(f"`{found}`")
                else:
                    cells.append("exact" if found < 1e-5 else f"**{100 * found:.2g} % off**")
            print(f"| {name} | {nesting} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
