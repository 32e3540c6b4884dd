"""Tensor parallelism of TTT layers: heads are shared out among the processes of a group, which read the same tokens.

Fast weights, inner norms, learned rates and the projections to q, k, v go by head, so that the inner learning needs no
communication. What a forward pass sends, `B·T` tokens of width D in P processes:

- post-norm is over all heads: each process gathers four numbers of each token (mean, squares, least, most), `4·B·T`
  from every other one. To gather z itself would take `B·T·D/P`.
- `o_proj` is row-wise: the processes' parts of y are summed, an all-reduce of `B·T·D`.

Backward sums two numbers of each token for the norm, and the gradient of the tokens: one all-reduce of `B·T·D` for q,
k, v and the rates together. So the projections are not PyTorch's `ColwiseParallel`, which would make one each.

Parameters become DTensors, which the optimizer, `fully_shard` and checkpoints know. Two stay plain tensors, whole in
every process: the bias of `o_proj`, whose gradient each process has in full, and `learnable_token_idx`, to which each
adds its heads' part; they are summed within backward. So no gradient needs to be summed over the group afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from ttt.errors import ConfigError
from ttt.inject import Injection
from ttt.layer import TTTLayer
from ttt.layer_sharing import Projection, Sharing, held
from ttt.ops.norm import is_constant
from ttt.parallel.gradients import TENSOR
from ttt.parallel.layout import NO_HEADS, uneven_heads
from ttt.parallel.world import World
from ttt.state import TTTState


def shard_heads(layer: TTTLayer, mesh: DeviceMesh) -> TTTLayer:
    """Turn a whole layer, with the same values in every process, into this process's part of it: `H/P` of its heads.

    It is called as before, with the same tokens in every process of the group, and gives the whole layer's answers and
    gradients there. States hold this process's heads; see `shard_state` and `gather_state`.

    Args:
        layer: changed in place; its parameters are replaced.
        mesh: of one dimension, P processes. With P = 1 nothing changes.

    Returns:
        The layer itself.

    Raises:
        ValueError: the heads do not divide by P, or the layer is shared out already.
    """
    if mesh.ndim != 1:
        raise ValueError(f"heads are shared out over a mesh of one dimension, not of {mesh.ndim}")
    processes = mesh.size()
    if processes == 1:
        return layer
    if (problem := uneven_heads(layer.num_heads, processes)) is not None:
        raise ValueError(f"{problem}; write a ttt.num_heads that divides, or another train.parallel.tensor")
    if type(layer.sharing) is not Sharing:
        raise ValueError("the layer is shared out among processes already")
    by_head = _ByHead()
    plan: dict[str, ParallelStyle] = {"q_proj": by_head, "k_proj": by_head, "v_proj": by_head, "post_norm": by_head}
    parallelize_module(layer, mesh, {**plan, "o_proj": _Rows()})
    for name in (*layer.weight_names, *_OF_HEADS):
        _share_out(layer, name, mesh, dim=0)
    layer.sharing = SharedHeads(mesh, layer.num_heads)
    return layer


def shard_injection(injection: Injection, mesh: DeviceMesh) -> None:
    """`shard_heads` for every TTT layer of the adapters.

    Raises:
        ConfigError: there is no TTT layer, or the heads of one do not divide by P; no layer is changed.
    """
    layers = [module for adapter in injection.adapters.values() for module in adapter.modules()]
    of_ttt = [layer for layer in layers if isinstance(layer, TTTLayer)]
    if not of_ttt:
        raise ConfigError(f"train.parallel.tensor: {NO_HEADS}; write 1")
    for layer in of_ttt:
        if (problem := uneven_heads(layer.num_heads, mesh.size())) is not None:
            raise ConfigError(f"train.parallel.tensor: {problem}; write a number that divides {layer.num_heads}")
    for layer in of_ttt:
        shard_heads(layer, mesh)


_OF_HEADS = ("ttt_norm_weight", "ttt_norm_bias", "learnable_ttt_lr_weight", "learnable_ttt_lr_bias")


def _share_out(module: nn.Module, name: str, mesh: DeviceMesh, *, dim: int) -> None:
    """Replace a parameter by this process's part of it, in memory of its own."""
    whole = getattr(module, name)
    part = whole.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()]
    shared = DTensor.from_local(part.clone(memory_format=torch.contiguous_format), mesh, [Shard(dim)], run_check=False)
    module.register_parameter(name, nn.Parameter(shared, requires_grad=whole.requires_grad))


class _ByHead(ParallelStyle):
    """Rows of a weight and its bias by head; the tokens that it reads have entered the layer already."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, _ in list(module.named_parameters()):
            _share_out(module, name, device_mesh, dim=0)
        return module


class _Rows(ParallelStyle):
    """Columns of a weight by head, whose products are summed before the bias is added."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Projection)
        _share_out(module, "weight", device_mesh, dim=1)
        module.__class__ = _RowProjection
        module.mesh = device_mesh  # type: ignore[assignment]
        return module


class _RowProjection(Projection):
    """A projection of which each process has some columns."""

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        """Map this process's columns of `[…,in]` to `[…,out]`, and sum over the processes."""
        y = summed(nn.functional.linear(x, held(self.weight).to(x.dtype)), self.mesh)
        return y if self.bias is None else y + self.bias.to(x.dtype)


def read_by_all(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor that every process has, to be read by each for a part of the whole: its gradients are summed."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of what the processes have, in each of them; backward gives each the gradient of the sum."""
    part = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    return part.redistribute(placements=[Replicate()]).to_local()


class Group(Sharing):
    """A layer of which each process of a group scans `H/P` heads.

    Args:
        mesh: of one dimension, P processes.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what the processes have; has no gradient."""
        total = x.detach().clone()
        dist.all_reduce(total, group=self.mesh.get_group())
        return total

    def sum_over_heads(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        return self.sum(x)

    def mean_over_heads(self, x: Tensor) -> Tensor:
        """Take the mean over the processes, which have equally many heads."""
        return self.sum(x) / self.mesh.size()


class SharedHeads(Group):
    """Every process of a group has all tokens and `H/P` of the heads.

    Args:
        mesh: of one dimension, P processes.
        heads: H.
    """

    def __init__(self, mesh: DeviceMesh, heads: int) -> None:
        super().__init__(mesh)
        self._heads = heads

    def entering(self, x: Tensor) -> Tensor:
        """Sum the gradients of what every process reads for its heads."""
        return read_by_all(x, self.mesh)

    def angles(self, x: Tensor) -> Tensor:
        """Take the angles of this process's heads, if each head has its own."""
        if x.dim() > 2 and x.shape[-3] == self._heads > 1:
            return read_by_all(x, self.mesh).chunk(self.mesh.size(), dim=-3)[self.mesh.get_local_rank()]
        return read_by_all(x, self.mesh)

    def layer_norm(self, z: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
        """Normalise over the heads of all processes."""
        normalised: Tensor = _Normalise.apply(z, self.mesh, eps)
        return normalised * gamma + beta


class _Normalise(torch.autograd.Function):
    """`(z − μ) / √(σ² + ε)` of tokens whose width is shared out; as `ttt.ops.norm.outer_layer_norm` without γ and β.

    A constant token gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, mesh: DeviceMesh, eps: float) -> Tensor:
        width = z.shape[-1]
        mean_BT1 = z.mean(dim=-1, keepdim=True)
        squares_BT1 = (z - mean_BT1).square().sum(dim=-1, keepdim=True)
        own = torch.cat((mean_BT1, squares_BT1, *z.aminmax(dim=-1, keepdim=True)), dim=-1)
        of_all = own.new_empty(mesh.size(), *own.shape)
        dist.all_gather(list(of_all.unbind(0)), own, mesh.get_group())
        means, squares, least, most = (x.unsqueeze(-1) for x in of_all.unbind(-1))
        mean = means.mean(0)
        # Chan's sum of squares about the common mean: no difference of large numbers
        variance = (squares.sum(0) + width * (means - mean).square().sum(0)) / (width * mesh.size())
        scale = torch.rsqrt(variance + eps)
        normalised = (z - mean) * scale
        constant = is_constant(torch.cat((least.amin(0), most.amax(0)), dim=-1))
        ctx.save_for_backward(normalised, scale.masked_fill(constant, 0))
        ctx.mesh = mesh
        return normalised

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        normalised, scale = ctx.saved_tensors
        own = torch.stack((gradient.mean(dim=-1), (gradient * normalised).mean(dim=-1)), dim=-1)
        dist.all_reduce(own, group=ctx.mesh.get_group())
        first, second = (own / ctx.mesh.size()).unsqueeze(-2).unbind(-1)
        return (gradient - first - normalised * second) * scale, None, None


# --- states and tensors ---


def shard_state(state: TTTState, mesh: DeviceMesh) -> TTTState:
    """This process's heads of a whole state, in memory of their own."""
    return _by_name(state, lambda x: x.chunk(mesh.size(), dim=1)[mesh.get_local_rank()].clone())


def gather_state(state: TTTState, mesh: DeviceMesh) -> TTTState:
    """The whole state of which each process of a group has its heads; has no gradient. Every process calls it."""

    def gathered(x: Tensor) -> Tensor:
        parts = x.new_empty(mesh.size(), *x.shape)
        dist.all_gather(list(parts.unbind(0)), x.detach().contiguous(), mesh.get_group())
        return torch.cat(parts.unbind(0), dim=1)

    return _by_name(state, gathered)


def own_states(states: Mapping[str, TTTState], world: World) -> dict[str, TTTState]:
    """This process's heads of whole states by site; the states themselves if heads are not shared out."""
    if world.mesh is None or world.tensor == 1:
        return dict(states)
    return {site: shard_state(state, world.mesh[TENSOR]) for site, state in states.items()}


def whole_states(states: Mapping[str, TTTState], world: World) -> dict[str, TTTState]:
    """The inverse of `own_states`; every process calls it."""
    if world.mesh is None or world.tensor == 1:
        return dict(states)
    return {site: gather_state(state, world.mesh[TENSOR]) for site, state in states.items()}


def _by_name(state: TTTState, function: Any) -> TTTState:
    """Apply a function to the tensors of a state that have heads."""
    found: Mapping[str, Tensor] = state.tensors()
    return TTTState.from_tensors({name: function(x) if x.dim() == 4 else x for name, x in found.items()})
