"""`train.cuda_graphs`: the inner learning of a run's TTT layers as CUDA graphs, where its shapes repeat.

A TTT layer launches some hundred kernels for a window, most of them in its scan, and with few streams a GPU waits for
them. `ttt.ops.replay` says what is recorded, and why nothing outside of a scan notices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ttt.config.schema import TrainConfig, TTTConfig
from ttt.errors import EnvironmentProblem, PluginError
from ttt.layer import TTTLayer
from ttt.ops.cuda_graphs import CudaGraphs
from ttt.ops.replay import CALLS_BEFORE, Recorder, Replays, UnusableDeviceError, replaying

RECORDERS: dict[str, Callable[[], Recorder]] = {"cuda": CudaGraphs}
"""What records, by type of device; the tests add one for the CPU."""

_TOLERANCE = 1e-5
"""Largest difference of what is replayed, relative to the largest number; they are expected to be equal."""


@contextlib.contextmanager
def cuda_graphs(train: TrainConfig, device: torch.device, tell: Callable[[str], object]) -> Iterator[Replays | None]:
    """A context in which scans are recorded and replayed, if the config wants it and the device can.

    Args:
        train: the `train` section.
        device: of the run.
        tell: is told if a scan cannot be recorded; the run goes on without graphs then.

    Raises:
        EnvironmentProblem: a scan could not be recorded, and the device cannot be used since.
    """
    recorder = RECORDERS.get(device.type)
    if recorder is None or train.cuda_graphs == "off":
        yield None
        return
    replays = Replays(recorder(), tell)
    try:
        with replaying(replays):
            yield replays
    except Exception as raised:
        # scans run inside the plugin's `loss`, so their errors arrive as errors of the plugin
        error = raised.__cause__ if isinstance(raised, PluginError) else raised
        if not isinstance(error, UnusableDeviceError):
            raise
        fix = "write train.cuda_graphs: off"
        raise EnvironmentProblem(str(error), key="train.cuda_graphs", fix=fix) from error


def why_not_recorded(device: torch.device) -> str | None:
    """Record a small scan on a device, replay it on other tokens, and compare it with the scan itself.

    Returns:
        What is wrong, in one line; None if nothing is, or nothing is recorded on such a device.
    """
    told: list[str] = []
    config = TTTConfig(layer_type="mlp", mini_batch_size=4, scan_checkpoint_group_size=2)
    layer = TTTLayer(32, 2, config, device=device)

    def passes(x: Tensor) -> tuple[Tensor, ...]:
        y, _ = layer(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), [*layer.parameters()])

    on_it = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_it, cuda_graphs(TrainConfig(), device, told.append) as replays:
        if replays is None:
            return None
        for number in range(CALLS_BEFORE + 2):
            x = torch.randn(2, 23, 32, generator=torch.Generator().manual_seed(number)).to(device)
            found = passes(x)
            with replaying(None):
                expected = passes(x)
            far = max(((f - e).abs().max() / e.abs().max()).item() for f, e in zip(found, expected, strict=True))
            if not told and not far <= _TOLERANCE:
                return f"what is replayed is {far:.1e} away from what is called"
    return told[0] if told else None
