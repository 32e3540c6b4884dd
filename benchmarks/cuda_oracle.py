"""The layer on a CUDA GPU against the definition on a CPU, in float64: outputs, states and every gradient.

    python benchmarks/cuda_oracle.py                   # a line for each setting; exits with 1 if one is too far
    python benchmarks/cuda_oracle.py --device cpu      # the same program without a GPU

The definition is `ttt/ops/reference.py`, token by token (`TTT_OPS=reference`); the device takes the implementation that
it would take in a run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ttt import TTTConfig, TTTLayer

BOUND = 1e-12
"""Relative to the largest value of each tensor: float64 sums in another order."""
SETTINGS = tuple(itertools.product(("linear", "mlp"), (True, False), (37, 64), (4, 16)))
"""Inner model, whether it is causal, tokens, and tokens of a mini-batch."""


def difference(kind: str, causal: bool, tokens: int, size: int, *, device: str) -> tuple[float, str]:
    """The largest relative difference of a setting, and the tensor that has it."""
    config = TTTConfig(layer_type=kind, causal=causal, mini_batch_size=size, rope="none", learnable_token_idx=causal)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    layer = TTTLayer(24, 3, config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    x = torch.randn(2, tokens, 24, dtype=torch.float64, generator=generator)
    with _implementation("reference"):
        expected = results(layer, x)
    found = results(layer.to(device), x.to(device))
    far = {name: float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()}
    name = max(far, key=lambda each: far[each])
    return far[name], name


def results(layer: TTTLayer, x: Tensor) -> dict[str, Tensor]:
    """Output, last fast weights, and the gradients of tokens and parameters, on the CPU."""
    x = x.detach().requires_grad_()
    y, state = layer(x)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    ends = {f"state {name}": value for name, value in state.tensors().items() if value.requires_grad}
    loss = (y * weights).sum()
    for value in ends.values():
        loss = loss + value.square().sum()
    layer.zero_grad()
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    found = {"y": y, **ends, "gradient of x": x.grad, **gradients}
    return {name: value.detach().cpu() for name, value in found.items() if value is not None}


@contextmanager
def _implementation(name: str) -> Iterator[None]:
    before = os.environ.get("TTT_OPS")
    os.environ["TTT_OPS"] = name
    try:
        yield
    finally:
        os.environ.pop("TTT_OPS")
        if before is not None:
            os.environ["TTT_OPS"] = before


def main() -> None:
    """Compare every setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device, worst = parser.parse_args().device, 0.0
    for kind, causal, tokens, size in SETTINGS:
        far, name = difference(kind, causal, tokens, size, device=device)
        worst = max(worst, far)
        print(f"{kind:6} causal={causal!s:5} T={tokens} mini-batch {size:2}: {far:.1e} ({name})", flush=True)
    print(f"worst {worst:.1e}, bound {BOUND:.0e}")
    sys.exit(not worst <= BOUND)


if __name__ == "__main__":
    main()
