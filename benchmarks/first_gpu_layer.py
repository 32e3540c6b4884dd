"""Stages of `first_gpu.py` that measure: what the card can do at most, and what a layer of Moshi's takes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from kernels_compared import milliseconds
from torch import Tensor

from ttt.check.doctor import forced
from ttt.config import TTTConfig
from ttt.layer import TTTLayer

Keep = Callable[[dict[str, Any]], None]
EXPECTED = {1: (358, 484), 16: (358, 484)}
"""Launches of a layer's forward and backward that were counted before the kernels, by B (docs/ops.md)."""


# --- what the card can do ---


def ceilings(device: str, tiny: bool, keep: Keep) -> None:
    """Bandwidth of a copy, time of a launch, and products by alignment and precision."""
    size = 1 << (12 if tiny else 30)
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source), 20, device)
    found: dict[str, Any] = {"copy_gigabytes_per_second": 2 * size / took / 1e6}
    small, launched = torch.zeros(1, device=device), 10 if tiny else 1000

    def some() -> None:
        for _ in range(launched):
            small.add_(1)

    found["microseconds_per_launch"] = 1e3 * milliseconds(some, 5, device) / launched
    keep(found)
    width = 64 if tiny else 4096
    shapes = {
        f"{width}³": (1, width, width, width),
        f"{width}³, rows {width + 1} apart": (1, width, width, width + 1),
        "keys by W1, B·H 32": (32, 16, 512, 128),
        "keys by (W1; b1), B·H 32": (32, 16, 513, 129),
        "keys by W1, B·H 512": (1 if tiny else 512, 16, 512, 128),
        "keys by (W1; b1), B·H 512": (1 if tiny else 512, 16, 513, 129),
    }
    found["products"] = []
    for name, shape in shapes.items():
        for precision in ("ieee", "tf32", "bf16"):
            found["products"].append({"shape": name, "precision": precision, **_product(shape, precision, device)})
            keep(found)


def _product(shape: tuple[int, int, int, int], precision: str, device: str) -> dict[str, float]:
    """Teraflops of a batched product `[rows,inner] @ [inner,columns]`, as it lies in memory with these columns."""
    batch, rows, columns, inner = shape
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(batch, rows, inner, device=device, dtype=dtype)
    b = torch.randn(batch, inner, columns, device=device, dtype=dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        took = milliseconds(lambda: torch.bmm(a, b), 20, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"milliseconds": took, "teraflops": 2 * batch * rows * columns * inner / took / 1e9}


# --- what a layer takes ---


def layer(device: str, tiny: bool, keep: Keep) -> None:
    """A TTT-MLP layer of Moshi's: launches, time, and memory between the passes, by implementation."""
    dim, heads, size, tokens = (16, 1, 2, 2) if tiny else (4096, 32, 16, 188)
    rows: list[dict[str, Any]] = []
    for batch in (1,) if tiny else (1, 16):
        for implementation in ("fused", "triton"):
            for precision in ("ieee",) if tiny else ("ieee", "tf32", "bf16"):
                row = {"batch": batch, "implementation": implementation, "precision": precision}
                try:
                    row |= _layer(dim, heads, size, tokens, batch, implementation, precision, device)
                except Exception as error:  # the next implementation may run where this one does not
                    row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                rows.append(row)
                keep({"shape": f"D {dim}, H {heads}, C {size}, T {tokens}", "before": EXPECTED, "rows": rows})


def _layer(
    dim: int, heads: int, size: int, tokens: int, batch: int, implementation: str, precision: str, device: str
) -> dict[str, Any]:
    module = TTTLayer(dim, heads, TTTConfig(layer_type="mlp", mini_batch_size=size)).to(device)
    module.precision = precision  # type: ignore[assignment]
    x = torch.randn(batch, tokens, dim, device=device, requires_grad=True)
    inputs = [x, *module.parameters()]

    def forward() -> Tensor:
        return module(x)[0]

    def backward(y: Tensor) -> None:
        torch.autograd.grad(y.sum(), inputs, retain_graph=True)

    with forced(implementation):
        y = forward()
        back = functools.partial(backward, y)
        back()
        found: dict[str, Any] = {
            "forward_launches": launches(forward, device),
            "backward_launches": launches(back, device),
            "inference_ms": milliseconds(torch.no_grad()(forward), 20, device),
            "forward_ms": milliseconds(forward, 20, device),
            "backward_ms": milliseconds(back, 20, device),
        }
        del y, back
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = forward()
            found["held_bytes"] = torch.cuda.memory_allocated() - before
            backward(kept)
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found


def launches(function: Callable[[], Any], device: str) -> int:
    """Kernels that one call starts on the GPU, copies and fills among them; on a CPU, operations of PyTorch's."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, activity.CUDA] if device == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        function()
        if device == "cuda":
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    return sum(event.device_type == wanted for event in profile.events() or ())
