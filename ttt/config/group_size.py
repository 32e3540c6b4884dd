"""What a `scan_checkpoint_group_size` costs, in words and in a config's own numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_EXAMPLE_TOKENS = 188


def scan_steps(tokens: int, mini_batch_size: int) -> int:
    """The number of full mini-batches in a sequence, `T // C`. A last, open one is computed outside the scan."""
    return tokens // mini_batch_size


def checkpoint_groups(tokens: int, mini_batch_size: int, group_size: int) -> int:
    """The number of checkpoints that the scan makes over a sequence: `ceil(N / g)`, or 0 if it keeps everything."""
    steps = scan_steps(tokens, mini_batch_size)
    return 0 if group_size == 0 or group_size >= steps else -(-steps // group_size)


class GroupSizeCost(NamedTuple):
    """What a group size costs beyond the usual, and what to do about it."""

    message: str
    """What happens, in this config's numbers."""
    fix: str
    """What to write instead, as `write 16`, and that gradients do not depend on it."""

    def __str__(self) -> str:
        """Message and fix as two sentences."""
        return f"{self.message}. {self.fix[:1].upper()}{self.fix[1:]}"


def cost_of_groups_of_one(
    group_size: int, mini_batch_size: int, *, tokens: int | None = None, window: str | None = None
) -> GroupSizeCost | None:
    """What one checkpoint per mini-batch costs; None for other group sizes, and if there is only one mini-batch.

    Args:
        group_size: `scan_checkpoint_group_size`, mini-batches per checkpoint.
        mini_batch_size: `C`, tokens.
        tokens: length of a sequence. If None, 15 s of speech (188 tokens) are the example.
        window: that length in the user's words, as "15 s of audio".
    """
    example = tokens if tokens is not None else _EXAMPLE_TOKENS
    steps = scan_steps(example, mini_batch_size)
    if group_size != 1 or steps < 2:
        return None
    name = window or (f"A sequence of {tokens} tokens" if tokens is not None else "15 s at 12.5 tokens a second")
    at_16 = checkpoint_groups(example, mini_batch_size, 16)
    against = f"{at_16} at 16" if at_16 else "none at 16, which keeps everything"
    return GroupSizeCost(
        f"scan_checkpoint_group_size: 1 makes one checkpoint per mini-batch: every carry is kept, as with 0, and "
        f"every inner step still runs twice. {name} at mini_batch_size: {mini_batch_size} is {steps} of them, "
        f"against {against}",
        "write 16, as the literature trained with, or 0 to keep everything and run every step once. (Memory and time "
        "are at stake; gradients are the same for every value.)",
    )


def cost_of_nesting(
    group_size: int, mini_batch_size: int, *, scans: Sequence[int], tokens: int | None = None
) -> GroupSizeCost | None:
    """What checkpoints of the scan inside other checkpoints cost; None if they are not nested.

    Args:
        group_size: `scan_checkpoint_group_size`, mini-batches per checkpoint.
        mini_batch_size: `C`, tokens.
        scans: for each scan of a layer in a forward pass, the number of activation checkpoints around it.
        tokens: length of a sequence. If None, 15 s of speech (188 tokens) are the example.
    """
    example = tokens if tokens is not None else _EXAMPLE_TOKENS
    if not (any(scans) and checkpoint_groups(example, mini_batch_size, group_size)):
        return None
    several = f" in a layer's {len(scans)} scans" if len(scans) > 1 else ""
    return GroupSizeCost(
        f"activation checkpointing around scan_checkpoint_group_size: {group_size} nests checkpoints in "
        f"checkpoints: every inner step runs forward {times_in_words([2 + level for level in scans])}{several}, "
        f"once more for each level",
        f"write scan_checkpoint_group_size: 0 if one layer's scan fits in memory (then it runs "
        f"{times_in_words([1 + level for level in scans])}). (With pure layers no nesting can change a gradient.)",
    )


def times_in_words(counts: Sequence[int]) -> str:
    """How often something is done: `once`, `twice`, `3 times`; `4 and 3 times` for different counts."""
    distinct = list(counts[:1]) if len(set(counts)) == 1 else list(counts)
    if len(distinct) == 1 and distinct[0] in (1, 2):
        return "once" if distinct[0] == 1 else "twice"
    *most, last = map(str, distinct)
    return f"{', '.join(most)} and {last} times" if most else f"{last} times"
