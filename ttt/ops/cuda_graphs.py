"""The recorder of CUDA: a call as a `torch.cuda.CUDAGraph`. No GPU has run it yet.

What is recorded here reads and writes fixed memory, and whoever replays it copies arguments in and results out at once
(`ttt.ops.replay`). So graphs may share one pool of memory: what one leaves there, nobody reads after another has run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt.ops.replay import Replay, UnusableDeviceError

WARM_UP = 2
"""Calls on the stream that records, before it does: libraries make handles and workspaces for each stream."""


class CudaGraphs:
    """Records on the device that is current when it is made."""

    def __init__(self) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._aside = torch.cuda.Stream()
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._used = torch.cuda.Event()
        self._user: torch.cuda.Stream | None = None
        """The stream of the last use."""

    def records(self, device: torch.device) -> bool:
        """On its device, unless somebody else records there: what runs then is part of that recording."""
        return (
            device == self._device
            and torch.cuda.current_device() == device.index
            and not torch.cuda.is_current_stream_capturing()
        )

    @contextlib.contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        """Recordings share memory, so a stream waits for the last use on another one."""
        stream = torch.cuda.current_stream()
        if self._user is not None and self._user != stream:
            stream.wait_event(self._used)
        yield
        self._used.record(stream)
        self._user = stream

    def record(self, function: Callable[[], Sequence[Tensor]], device: torch.device) -> tuple[Replay, Sequence[Tensor]]:
        """Warm up and record on a stream of its own; see `ttt.ops.replay.Recorder`."""
        current = torch.cuda.current_stream()
        self._aside.wait_stream(current)
        with torch.cuda.stream(self._aside):
            for _ in range(WARM_UP):
                function()
        current.wait_stream(self._aside)
        graph = torch.cuda.CUDAGraph()
        cause: Exception | None = None
        try:
            # The outer context, since a capture that cannot be ended leaves its stream as the current one. Other
            # threads may go on: those that load data, write checkpoints, or watch over NCCL.
            with (
                torch.cuda.stream(self._aside),
                torch.cuda.graph(graph, pool=self._pool, stream=self._aside, capture_error_mode="thread_local"),
            ):
                try:
                    results = function()
                except Exception as error:
                    cause = error  # to end the capture would raise another error, of what this one has left
                    raise
        except Exception as error:
            cause = cause or error
            self._left(cause)
            raise cause from None
        finally:
            del cause  # it would keep this frame, and all tensors in it, until garbage is collected
        return graph.replay, results

    def _left(self, cause: Exception) -> None:
        """Leave a capture that may not have been ended, and see whether the device still works.

        Raises:
            UnusableDeviceError: it does not.
        """
        # The allocator would wait for the end for ever, and keep what other streams have used.
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with contextlib.suppress(RuntimeError):  # it has been ended
                end(self._device.index, self._pool)
        try:
            _draw(self._device)
        except Exception as error:
            told = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
            what = f"a CUDA graph could not be recorded ({told}), and the device cannot be used since"
            raise UnusableDeviceError(what) from error


def _draw(device: torch.device) -> None:
    """Launch a kernel, wait for it, and use the generator of random numbers, which a capture can leave unusable."""
    state = torch.cuda.get_rng_state(device)
    torch.rand(1, device=device).item()
    torch.cuda.set_rng_state(state, device)
