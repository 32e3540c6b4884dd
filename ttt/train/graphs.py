"""`train.cuda_graphs`: the inner learning of a run's TTT layers as CUDA graphs, where its shapes repeat.

A TTT layer launches some hundred kernels for a window, most of them in its scan, and with few streams a GPU waits for
them. `ttt.ops.replay` says what is recorded, and why nothing outside of a scan notices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from ttt.config.schema import TrainConfig
from ttt.ops.cuda_graphs import CudaGraphs
from ttt.ops.replay import Recorder, Replays, replaying

RECORDERS: dict[str, Callable[[], Recorder]] = {"cuda": CudaGraphs}
"""What records, by type of device; the tests add one for the CPU."""


@contextlib.contextmanager
def cuda_graphs(train: TrainConfig, device: torch.device, tell: Callable[[str], object]) -> Iterator[Replays | None]:
    """A context in which scans are recorded and replayed, if the config wants it and the device can.

    Args:
        train: the `train` section.
        device: of the run.
        tell: is told if a scan cannot be recorded; the run goes on without graphs then.
    """
    recorder = RECORDERS.get(device.type)
    if recorder is None or train.cuda_graphs == "off":
        yield None
        return
    replays = Replays(recorder(), tell)
    with replaying(replays):
        yield replays
