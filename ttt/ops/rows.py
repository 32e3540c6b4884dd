"""The tokens of a sequence, and of each row those that count: in order, without the gaps that a mask leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Queries, keys, targets `v − k` `[B,H,T,F]` and rates `η` `[B,H,T,1]` of a sequence."""

    q: Tensor
    k: Tensor
    target: Tensor
    rate: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """Apply the function to each of the four."""
        return Tokens(*(function(x) for x in self))


class Rows(NamedTuple):
    """The counted tokens of each row of a sequence, in order and without gaps."""

    tokens: Tokens
    mask_BT: Tensor | None
    """Which tokens count; None if all do."""
    order_BT: Tensor | None
    """Where the counted tokens stand in the sequence, then where the others do; None if all count."""
    place_BT: Tensor
    """The place of each token among the counted ones, `[B,T]` or `[1,T]`; of one that does not count, any place."""
    length_B: Tensor
    """How many tokens count, `[B]` or `[1]`."""

    @classmethod
    def of(cls, tokens: Tokens, mask_BT: Tensor | None) -> Rows:
        """The rows of a sequence with this mask."""
        length, device = tokens.q.shape[2], tokens.q.device
        if mask_BT is None:
            place_1T = torch.arange(length, device=device)[None]
            return cls(tokens, None, None, place_1T, torch.full((1,), length, device=device))
        order_BT = mask_BT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        place_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
        return cls(tokens, mask_BT, order_BT, place_BT, mask_BT.sum(1))

    def at(self, place_BT: Tensor) -> Tokens:
        """Take tokens by their places `[B,T']`; a place outside the row gives an arbitrary token at zero rate.

        With a mask these tokens are zeros: what is masked may hold NaN, which zero rate does not stop.
        """
        last = self.tokens.q.shape[2] - 1
        inside = ((place_BT >= 0) & (place_BT < self.length_B[:, None]))[:, None, :, None]
        index_BT = place_BT.clamp(0, last)
        if self.order_BT is not None:
            index_BT = self.order_BT.gather(1, index_BT.expand(len(self.order_BT), -1))
        index = index_BT[:, None, :, None]

        def take(x: Tensor) -> Tensor:
            return x.gather(2, index.expand(x.shape[0], x.shape[1], -1, x.shape[3]))

        found = self.tokens.map(take)
        if self.mask_BT is not None:
            return found.map(lambda x: torch.where(inside, x, 0))
        return found._replace(rate=torch.where(inside, found.rate, 0))

    def answers(self, parts: list[Tensor], index_BT: Tensor) -> Tensor:
        """Each token's answer, found at `index` of all parts: `[B,H,T,F]`, zeros for tokens that do not count."""
        z_BHTF = torch.cat(parts, dim=2).gather(2, index_BT[:, None, :, None].expand_as(self.tokens.q))
        return z_BHTF if self.mask_BT is None else torch.where(self.mask_BT[:, None, :, None], z_BHTF, 0)
