"""Reading numbers of a device on the host, without waiting for it before it is necessary."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor to the host, which begins at once and is waited for when its numbers are asked for.

    `float(tensor)` waits until the device has done all that was asked of it, and meanwhile asks it nothing more. One
    such wait for each number would leave a GPU idle again and again.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._copied = tensor.detach(), None
        if tensor.device.type != "cpu":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor.detach(), non_blocking=True)
            self._copied = torch.Event(tensor.device)
            self._copied.record()

    def numbers(self) -> list[float]:
        """The numbers of a tensor `[N]`; waits until the copy has arrived."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        found: list[float] = self._host.tolist()
        return found
