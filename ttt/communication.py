"""What a TTT layer sends if several processes share it, in closed form. Imports no torch.

Symbols: B streams, T tokens, D width, H heads, P processes; `wide` bytes are those of float32. A collective is counted
by what each process hands to it, its payload; what it sends of that depends on the collective (`Handed.sent`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ttt.config.schema import TTTConfig
from ttt.costs import WIDE


@dataclass(frozen=True)
class Handed:
    """Bytes that one process hands to collectives, by kind."""

    summed: int = 0
    """To all-reduces: sums that every process gets."""
    gathered: int = 0
    """To all-gathers: its own part of what every process gets."""
    exchanged: int = 0
    """To all-to-alls: a part of it is for each process, its own included."""

    def __add__(self, other: Handed) -> Handed:
        return Handed(self.summed + other.summed, self.gathered + other.gathered, self.exchanged + other.exchanged)

    def __mul__(self, times: int) -> Handed:
        return Handed(times * self.summed, times * self.gathered, times * self.exchanged)

    @property
    def total(self) -> int:
        """All of it."""
        return self.summed + self.gathered + self.exchanged

    def sent(self, processes: int) -> int:
        """Bytes that a process sends in P processes: `2 (P−1)/P` of a sum, `P−1` times its part of what is gathered,
        and `(P−1)/P` of what is exchanged.
        """
        others = processes - 1
        return (2 * self.summed + self.exchanged) * others // processes + self.gathered * others


def heads_forward(*, dim: int, tokens: int, batch_size: int, size: int = WIDE) -> Handed:
    """A forward pass of a layer whose heads are shared out: four numbers of each token for post-norm, and y.

    Args:
        dim: D.
        tokens: T.
        batch_size: B.
        size: bytes of a number of the tokens.
    """
    read = batch_size * tokens
    return Handed(summed=read * dim * size, gathered=4 * read * WIDE)


def heads_backward(config: TTTConfig, *, dim: int, tokens: int, batch_size: int, size: int = WIDE) -> Handed:
    """Its backward pass: two numbers of each token for post-norm, the tokens' gradient, and that of δ."""
    read = batch_size * tokens
    offsets = config.mini_batch_size * WIDE if config.learnable_token_idx else 0
    return Handed(summed=read * dim * size + 2 * read * WIDE + offsets)


def tokens_forward(*, dim: int, num_heads: int, tokens: int, batch_size: int, processes: int) -> Handed:
    """A forward pass of a layer whose tokens are shared out evenly, of which each process knows how many there are.

    Queries, keys, targets and rates go one way, answers the other. Backward hands over as much.

    Args:
        dim: D.
        num_heads: H.
        tokens: T, of all processes.
        batch_size: B.
        processes: P.
    """
    read = batch_size * tokens // processes
    return Handed(exchanged=read * (4 * dim + num_heads) * WIDE)
