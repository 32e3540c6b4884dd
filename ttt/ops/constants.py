"""What the arithmetic shares with the closed forms of its cost: plain values, importable without torch."""

VARIABLE = "TTT_OPS"
"""The environment variable that forces an implementation of the scan."""
SMALL = 1 << 17
"""Numbers of the widest tensor of one mini-batch below which, on a CPU, a call costs more than its arithmetic."""
BLOCK = 16
"""How many mini-batches the fused scan lays out at a time if no group size says so."""
