"""Constants that the arithmetic shares with the closed forms of its cost; importable without torch."""

from typing import Literal

VARIABLE = "TTT_OPS"
"""The environment variable that forces an implementation of the scan."""
SMALL = 1 << 17
"""On a CPU, a call costs more than its arithmetic if the widest tensor of a mini-batch has fewer numbers than this."""
BLOCK = 16
"""How many mini-batches the fused scan lays out at a time if the group size does not say."""
ALIGNED = 4
"""Rows of the fused scan have a multiple of so many numbers: 16 bytes of float32, as a GPU's products read them."""
MOST_BYTES_OF_ONE = 512 << 20
"""The most bytes that the arguments and results of a recorded call have. They are copied once more: for as many, 0.3 ms
of an H100, as long as 80 launches take, of the hundreds that are spared. Larger calls are not bound by launches."""
MOST_BYTES_RECORDED = 2 << 30
"""The most bytes of memory that all recordings of a run have for arguments and results."""

Precision = Literal["ieee", "tf32", "bf16"]
"""In what the operands of the inner model's products are multiplied: whole float32 numbers, or rounded ones."""


def aligned_for(device_type: str) -> int:
    """The same for a kind of device: a CPU's products gain nothing by it, and would only multiply the zeros."""
    return 1 if device_type == "cpu" else ALIGNED
