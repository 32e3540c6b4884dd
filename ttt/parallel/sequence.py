"""Sequence parallelism of TTT layers, as Ulysses does it for attention: tokens outside, heads around the scan.

Each process of a group has some of the tokens of every stream, one after the other by rank, and all parameters. It
projects its own tokens; an all-to-all gives it all tokens of `H/P` heads, which the inner learning scans; another gives
its own tokens the answers of all heads, for post-norm and `o_proj`. So what a model keeps of a block between forward
and backward, its input above all, is of `T/P` tokens.

What a forward pass sends from each process: `(P−1)/P` of its own `q, k, v − k` and rates, `B·T/P·(3D + H)` numbers, and
`(P−1)/P` of its answers, `B·T/P·D`. Backward sends as much the other way.

Every parameter's gradient is the part that this process's tokens and heads give. They are summed over the group as over
processes that read different rows: by DDP or `fully_shard` over both, or by `sum_gradients`.

Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from ttt.layer import TTTLayer
from ttt.layer_sharing import Sharing
from ttt.ops.rows import Tokens
from ttt.parallel.heads import Group
from ttt.parallel.layout import uneven_heads


def shard_tokens(layer: TTTLayer, mesh: DeviceMesh, *, lengths: Sequence[int] | None = None) -> TTTLayer:
    """Let a layer read tokens that are shared out among the processes of a group.

    Each process then calls it with its own tokens, their mask and rotary angles, and gets their answers. States hold
    `H/P` heads, and so does the state after (`ttt.parallel.heads.shard_state`, `gather_state`).

    Args:
        layer: changed in place; its parameters stay, with the same values in every process.
        mesh: of one dimension, P processes. With P = 1 nothing changes.
        lengths: how many tokens of each stream each process has; None asks at every call, which waits for the device.

    Returns:
        The layer itself.

    Raises:
        ValueError: the heads do not divide by P, or the layer is shared out already.
    """
    if mesh.ndim != 1:
        raise ValueError(f"tokens are shared out over a mesh of one dimension, not of {mesh.ndim}")
    if mesh.size() == 1:
        return layer
    if (problem := uneven_heads(layer.num_heads, mesh.size())) is not None:
        raise ValueError(f"{problem}, as they are around the scan; write a ttt.num_heads that divides")
    if type(layer.sharing) is not Sharing:
        raise ValueError("the layer is shared out among processes already")
    layer.sharing = SharedTokens(mesh, lengths)
    return layer


def backward(layer: TTTLayer) -> TTTLayer:
    """The same layer, with the same parameters and hooks, reading all processes' tokens from the last to the first.

    Tokens, masks and angles go in, and answers come out, in the order in which the process has them.

    Raises:
        ValueError: the layer's tokens are not shared out.
    """
    if not isinstance(layer.sharing, SharedTokens):
        raise ValueError("the layer's tokens are not shared out; flip them instead")
    other = copy.copy(layer)
    other.sharing = SharedTokens(layer.sharing.mesh, layer.sharing.given, backward=not layer.sharing.backward)
    return other


def own_tokens(x: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """This process's tokens of a tensor that has all, in parts as equal as can be: the first ones have one more."""
    return x.tensor_split(mesh.size(), dim)[mesh.get_local_rank()]


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Sum the gradients of parameters that every process has whole, each from its own tokens; once after backward.

    A parameter that some process has no gradient for gets none there if none has one.
    """
    parameters = list(parameters)
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    there = there.to(parameters[0].device)
    dist.all_reduce(there, group=mesh.get_group())
    for parameter, count in zip(parameters, there.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=mesh.get_group())


class SharedTokens(Group):
    """Every process of a group has some of the tokens, and `H/P` of the heads around the scan.

    Args:
        mesh: of one dimension, P processes.
        lengths: how many tokens each has; None asks at every call.
        backward: read the tokens from the last to the first.
    """

    def __init__(self, mesh: DeviceMesh, lengths: Sequence[int] | None = None, *, backward: bool = False) -> None:
        super().__init__(mesh)
        self.given = None if lengths is None else list(lengths)
        self.backward = backward
        self._lengths = self.given or []

    def reading(self, x: Tensor) -> None:
        """Learn how many tokens each process has.

        Raises:
            ValueError: in every process, if one has none; or in this one, if it has others than were given.
        """
        count = x.shape[1]
        if self.given is None:
            own = torch.tensor([count], device=x.device)
            counts = own.new_empty(self.mesh.size())
            dist.all_gather(list(counts.split(1)), own, self.mesh.get_group())
            self._lengths = counts.tolist()
        if 0 in self._lengths:
            raise ValueError(
                f"{sum(self._lengths)} tokens in {self.mesh.size()} processes leave some without any; share a sequence "
                f"out among as many processes as it has tokens, or fewer"
            )
        if count != self._lengths[self.mesh.get_local_rank()]:
            raise ValueError(f"this process was to have {self._lengths} tokens by rank, and was given {count}")

    def tokens(self, count: int) -> int:
        """How many tokens all processes have."""
        return sum(self._lengths)

    def all_tokens(self, x: Tensor) -> Tensor:
        """Gather values of tokens, and put them in reading order."""
        widest = max(self._lengths)
        own = nn.functional.pad(x.to(torch.uint8) if x.dtype == torch.bool else x, (0, widest - x.shape[-1]))
        parts = own.new_empty(self.mesh.size(), *own.shape)
        dist.all_gather(list(parts.unbind(0)), own.contiguous(), self.mesh.get_group())
        every = torch.cat([part[..., :length] for part, length in zip(parts, self._lengths, strict=True)], dim=-1)
        return self._turned(every, -1).to(x.dtype)

    def own_tokens(self, x: Tensor) -> Tensor:
        """Take the values of this process's tokens."""
        return self._turned(x, -1).split(self._lengths, -1)[self.mesh.get_local_rank()]

    def heads(self, x: Tensor) -> Tensor:
        """Take the heads that this process scans."""
        return x.chunk(self.mesh.size())[self.mesh.get_local_rank()]

    def to_heads(self, tokens: Tokens) -> Tokens:
        """Exchange tokens for heads: one all-to-all of all four."""
        sizes = [x.shape[-1] for x in tokens]
        own_BHTK = torch.cat(tokens, dim=-1)
        batch, heads, count, width = own_BHTK.shape
        sent = own_BHTK.unflatten(1, (self.mesh.size(), -1)).movedim(1, 0)
        column = batch * heads // self.mesh.size() * width
        received = [column * length for length in self._lengths]
        parts = self._exchanged(sent.flatten(), [column * count] * self.mesh.size(), received).split(received)
        every = torch.cat([x.view(batch, -1, n, width) for x, n in zip(parts, self._lengths, strict=True)], dim=2)
        return Tokens(*self._turned(every, 2).split(sizes, dim=-1))

    def to_tokens(self, z_BHTF: Tensor) -> Tensor:
        """Exchange heads for tokens."""
        parts = [x.flatten() for x in self._turned(z_BHTF, 2).split(self._lengths, dim=2)]
        own = parts[self.mesh.get_local_rank()].numel()
        received = self._exchanged(torch.cat(parts), [x.numel() for x in parts], [own] * self.mesh.size())
        batch, heads, _, width = z_BHTF.shape
        return received.view(self.mesh.size(), batch, heads, -1, width).movedim(0, 1).flatten(1, 2)

    def sum_over_tokens(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        return self.sum(x)

    def require_step(self) -> None:
        """Refuse: a single token cannot be shared out."""
        raise ValueError(
            "tokens that are shared out among processes cannot be read one by one; share out heads instead"
        )

    def _exchanged(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """An all-to-all of numbers."""
        return collectives.all_to_all_single_autograd(x.contiguous(), received, sent, self.mesh.get_group())

    def _turned(self, x: Tensor, dim: int) -> Tensor:
        """Between the order of the processes and the reading order."""
        return x.flip(dim) if self.backward else x
