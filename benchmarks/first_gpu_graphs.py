"""The stage of `first_gpu.py` that captures CUDA graphs: of a layer's forward, backward and `step_`, and of `LMGen`'s.

A graph is replayed on other numbers than those it was captured with, and must give what the same calls give without it.
"As in a run" is what `train.cuda_graphs` does to a layer: its scans are graphs, and the rest is called. Where there is
no GPU, the calls run as they are, and the table says that nothing was captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from kernels_compared import milliseconds
from torch import Tensor

from ttt import inject
from ttt.check.doctor import forced
from ttt.config import TrainConfig, TTTConfig
from ttt.layer import TTTLayer
from ttt.ops.replay import CALLS_BEFORE, replaying
from ttt.plugins import get_backbone
from ttt.train.graphs import cuda_graphs

Keep = Callable[[dict[str, Any]], None]


def graphs(device: str, tiny: bool, keep: Keep) -> None:
    """Capture each, replay it, compare, time."""
    rows: list[dict[str, Any]] = []
    trials: dict[str, Callable[[], dict[str, Any]]] = {}
    for implementation in ("fused", "triton"):
        for name, trial in (("forward", _forward), ("forward and backward", _training)):
            trials[f"{implementation}: {name}"] = functools.partial(trial, implementation, device, tiny)
        if device == "cuda" or implementation == "fused":
            trials[f"{implementation}: as in a run"] = functools.partial(_as_in_a_run, implementation, device, tiny)
    trials["step_"] = functools.partial(_step, device, tiny)
    trials["LMGen"] = functools.partial(_generation, device)
    for name, run in trials.items():
        row: dict[str, Any] = {"what": name, "captured": device == "cuda"}
        try:
            row |= run()
        except Exception as error:  # the next one may be captured where this one is not
            row |= {"captured": False, "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        rows.append(row)
        keep({"rows": rows})


def _layer(device: str, tiny: bool) -> tuple[TTTLayer, Tensor]:
    dim, heads, size, tokens = (16, 1, 2, 2) if tiny else (4096, 32, 16, 188)
    layer = TTTLayer(dim, heads, TTTConfig(layer_type="mlp", mini_batch_size=size)).to(device)
    return layer, torch.randn(1, tokens, dim, device=device)


def captured(function: Callable[[], Sequence[Tensor]], device: str) -> tuple[Callable[[], object], Sequence[Tensor]]:
    """A function as a graph: what replays it, and the tensors into which a replay writes.

    Where there is no GPU, the function itself, which writes into the tensors of its first call.
    """
    if device != "cuda":
        results = function()

        def again() -> None:
            for result, value in zip(results, function(), strict=True):
                result.copy_(value)

        return again, results
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # what a first call allocates or compiles must not be captured
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results


def _compared(function: Callable[[], Sequence[Tensor]], x: Tensor, device: str) -> dict[str, Any]:
    """Replay a function of `x` on other tokens, compare with calling it, and time both."""
    replay, results = captured(function, device)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    replay()
    found = [result.clone() for result in results]
    expected = function()
    return {
        "difference": max(map(_distance, found, expected)),
        "called_ms": milliseconds(function, 20, device),
        "replayed_ms": milliseconds(replay, 20, device),
    }


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp_min(1e-30))


def _forward(implementation: str, device: str, tiny: bool) -> dict[str, Any]:
    layer, x = _layer(device, tiny)

    @torch.no_grad()
    def function() -> list[Tensor]:
        y, state = layer(x)
        return [y, *state.weights]

    with forced(implementation):
        return _compared(function, x, device)


def _training(implementation: str, device: str, tiny: bool) -> dict[str, Any]:
    layer, x = _layer(device, tiny)
    x.requires_grad_()
    inputs = [x, *layer.parameters()]

    def function() -> list[Tensor]:
        y = layer(x)[0]
        return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    with forced(implementation):
        return _compared(function, x, device)


def _as_in_a_run(implementation: str, device: str, tiny: bool) -> dict[str, Any]:
    """`train.cuda_graphs`: forward and backward of a layer whose scans are recorded when they have repeated."""
    layer, x = _layer(device, tiny)
    inputs = [x.requires_grad_(), *layer.parameters()]
    told: list[str] = []

    def forward() -> Tensor:
        return layer(x)[0]

    def function() -> list[Tensor]:
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    with forced(implementation), cuda_graphs(TrainConfig(), torch.device(device), told.append) as replays:
        for _ in range(0 if replays is None else CALLS_BEFORE + 1):
            function()
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        found = [result.clone() for result in function()]
        row = {
            "replayed_ms": milliseconds(function, 20, device),
            "replayed_launches": (launched(forward, device), launched(function, device)),
        }
        if told:
            raise RuntimeError(told[0])
        if replays is not None:
            row |= {"recordings": replays.recorded, "recorded_bytes": replays.nbytes}
        with replaying(None):
            row |= {
                "difference": max(map(_distance, found, function())),
                "called_ms": milliseconds(function, 20, device),
                "called_launches": (launched(forward, device), launched(function, device)),
            }
    return row


_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


def launched(function: Callable[[], Any], device: str) -> int | None:
    """How often one call tells the GPU to do something, a whole graph counting once; None where there is no GPU."""
    if device != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        function()
        torch.cuda.synchronize()
    on_the_host = (e for e in profile.events() or () if e.device_type == torch.autograd.DeviceType.CPU)
    return sum(event.name.startswith(_LAUNCHES) for event in on_the_host)


def _step(device: str, tiny: bool) -> dict[str, Any]:
    """`step_` over several mini-batches: one graph for every token of them, and the state at the end."""
    layer, x = _layer(device, tiny)
    tokens = torch.randn(2 * layer.config.mini_batch_size + 1, 1, 1, x.shape[-1], device=device)
    here, state = torch.empty_like(tokens[0]), layer.streaming_state(1)

    @torch.no_grad()
    def function() -> list[Tensor]:
        return [layer.step_(here, state)]

    def read(call: Callable[[], object], results: Sequence[Tensor]) -> list[Tensor]:
        state.take_(layer.streaming_state(1))
        answers = []
        for token in tokens:
            here.copy_(token)
            call()
            answers.append(results[0].clone())
        return [torch.cat(answers), *(value.clone() for value in state.weights)]

    here.copy_(tokens[0])
    replay, results = captured(function, device)
    found = read(replay, results)
    called = torch.empty_like(results[0])
    expected = read(lambda: called.copy_(function()[0]), [called])
    return {
        "difference": max(map(_distance, found, expected)),
        "called_ms": milliseconds(function, 20, device),
        "replayed_ms": milliseconds(replay, 20, device),
    }


def _generation(device: str) -> dict[str, Any]:
    """Kyutai's `LMGen` on Moshi's demo with TTT: its own graph against none, token by token."""
    from moshi.models import LMGen
    from moshi.utils.compile import no_cuda_graph

    moshi = get_backbone("moshi")
    model = moshi.build(moshi.options(preset="demo"), device=torch.device(device), dtype=torch.float32).eval()
    settings = TTTConfig.model_validate({**moshi.ttt_defaults, "layers": "1,2", "mini_batch_size": 4})
    inject.apply(model, moshi.sites(model), settings)
    needed = model.num_codebooks - model.dep_q - 1
    frames = moshi.example_batch(model, batch_size=1, tokens=12, seed=0)[:, -needed:]

    def said() -> Tensor:
        generator = LMGen(model, use_sampling=False)
        with torch.no_grad(), generator.streaming(1):
            steps = [generator.step(frames[:, :, i : i + 1]) for i in range(frames.shape[2])]
        return torch.cat([step for step in steps if step is not None], dim=-1)

    with no_cuda_graph():
        expected = said()
    found = said()
    return {"frames": found.shape[-1], "difference": float((found != expected).float().mean())}
