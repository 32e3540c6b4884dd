"""What a capture that fails leaves behind: the recorder of CUDA, and the real `torch.cuda.graph`, on a played device.

PyTorch ends a capture when its context is left. Where CUDA refuses that, since an operation was not permitted, PyTorch
raises what CUDA says of the end, keeps the capturing stream as the current one, and its allocator goes on capturing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ttt.ops import cuda_graphs
from ttt.ops.cuda_graphs import CudaGraphs
from ttt.ops.replay import Replays, UnusableDeviceError, replayed, replaying


class Stream:
    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...


class Event:
    def record(self, stream: Stream) -> None: ...


class Device:
    """One with streams, which captures, and ends a capture in which something failed if `ends`."""

    def __init__(self, patch: pytest.MonkeyPatch, *, ends: bool) -> None:
        self.current = self.first = Stream()
        self.capturing = self.allocator_captures = self.failed = False
        self.ends = ends
        self.draws = 0
        for name, value in {
            **{"Stream": Stream, "Event": Event, "stream": self.stream, "CUDAGraph": lambda: self},
            **{"current_stream": lambda: self.current, "current_device": lambda: 0},
            **{"graph_pool_handle": lambda: (0, 1), "synchronize": lambda: None, "empty_cache": lambda: None},
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocation, raising=False)
        patch.setattr(cuda_graphs, "_draw", self.draw)
        patch.setattr(CudaGraphs, "records", lambda recorder, device: not self.capturing)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def capture_begin(self, *pool: object, **options: object) -> None:
        self.capturing = self.allocator_captures = True

    def capture_end(self) -> None:
        self.capturing = False
        if self.failed and not self.ends:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.allocator_captures = False

    def end_allocation(self, index: int, pool: object) -> None:
        if not self.allocator_captures:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.allocator_captures = False

    def draw(self, device: torch.device) -> None:
        self.draws += 1

    def replay(self) -> None: ...


def _doubled(device: Device) -> list[list[float]]:
    """Six numbers, doubled by what cannot be captured."""

    def doubled(x: Tensor) -> tuple[Tensor]:
        if device.capturing:
            device.failed = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return (x * 2,)

    return [replayed("doubled", doubled, torch.full((2,), float(n)))[0].tolist() for n in range(6)]


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_fails_leaves_all_as_it_was(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    device = Device(monkeypatch, ends=ends)
    replays = Replays(CudaGraphs(), told.append)
    with replaying(replays):
        assert _doubled(device) == [[2.0 * n] * 2 for n in range(6)]
    assert told == [
        "WARNING: doubled cannot be recorded as a CUDA graph (RuntimeError: CUDA error: operation not permitted when "
        "stream is capturing); the run goes on without CUDA graphs"
    ]
    assert device.failed
    assert device.current is device.first
    assert not device.allocator_captures
    assert device.draws == 1
    assert (replays.recorded, replays.replayed, replays.nbytes) == (0, 0, 0)


def test_a_device_that_is_lost_is_told_with_the_first_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    told: list[str] = []
    device = Device(monkeypatch, ends=False)
    monkeypatch.setattr(cuda_graphs, "_draw", lost)
    with replaying(Replays(CudaGraphs(), told.append)), pytest.raises(UnusableDeviceError) as raised:
        _doubled(device)
    assert "operation not permitted when stream is capturing), and the device cannot be used since" in str(raised.value)
    assert told == []
    assert device.current is device.first


def test_what_fails_before_a_capture_is_an_ordinary_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    device = Device(monkeypatch, ends=True)
    warm_ups: list[Stream] = []

    def too_large(x: Tensor) -> tuple[Tensor]:
        if device.current is not device.first:
            warm_ups.append(device.current)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (x * 2,)

    with replaying(Replays(CudaGraphs(), told.append)):
        for n in range(6):
            assert replayed("too large", too_large, torch.ones(2) * n)[0].tolist() == [2.0 * n] * 2
    assert ["OutOfMemoryError: CUDA out of memory" in line for line in told] == [True]
    assert device.current is device.first
    assert len(warm_ups) == 1
    assert device.draws == 0
