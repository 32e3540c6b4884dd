"""What decides how a scan runs, in plain numbers: read without torch, by `ttt.costs` and `ttt check` too."""

from __future__ import annotations

VARIABLE = "TTT_OPS"
"""The environment variable that forces an implementation."""
SMALL = 1 << 17
"""Numbers of the widest tensor of one mini-batch below which, on a CPU, a call costs more than its arithmetic."""
BLOCK = 16
"""Mini-batches whose tokens are laid out at a time where no group says how many."""
