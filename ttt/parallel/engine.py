"""How the loss of a run is computed by several processes: whole copies (DDP) or split parameters (FSDP2).

`Engine.loss` runs the backbone's loss inside the module that PyTorch wraps, so that its hooks see every parameter that
the loss uses, whatever methods of the model the backbone calls. Gradients are sums over the processes that read
different rows: the loss of each is already its part of the mean over all of them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ttt.parallel.world import World

_HALF = (torch.bfloat16, torch.float16)


def splits_parameters(world: World) -> bool:
    """Whether FSDP2 runs the model: also for whole copies whose heads are shared out, which DDP does not know."""
    return world.shard > 1 or (world.tensor > 1 and world.data_size > 1)


class LossModule(nn.Module):
    """The model and its loss as one module, for what wraps modules."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> tuple[Tensor, Tensor | None, Any]:
        """The loss of a batch and its means, as tensors that wrappers find, and the whole `LossOutput`."""
        output = self._loss(self.model, batch)
        return output.loss, getattr(output, "means", None), output


class Engine:
    """The loss of a model, computed as the layout of the processes says.

    Args:
        model: the model, with its adapters; `requires_grad` of its parameters is as it stays. If parameters are split,
            they are replaced: read them from the model again.
        loss: the loss of the model and a batch.
        world: the processes.
        units: modules whose parameters are gathered together while they run, inner ones before outer ones; they are
            called as modules. What no unit has is gathered for the whole loss.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Any],
        world: World,
        units: Sequence[nn.Module] = (),
    ) -> None:
        self._world = world
        self._module: Any = LossModule(model, loss)
        self._sharded = splits_parameters(world)
        self.used_in: Mapping[str, torch.dtype] = {}
        """Trained parameters that are used in half precision, but kept in float32 because they are split: the types."""
        if self._sharded:
            self.used_in = _shard(self._module, units, world)
        elif world.data_size > 1:
            self._module = _replicated(self._module, world)

    @property
    def is_sharded(self) -> bool:
        """Whether this process has only its part of each parameter."""
        return self._sharded

    def loss(self, batch: Any) -> Any:
        """The backbone's `LossOutput` of this process's rows."""
        loss, means, output = self._module(batch)
        changed = {"loss": loss} if means is None else {"loss": loss, "means": means}
        return output if loss is output.loss else replace(output, **changed)

    @contextlib.contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a batch; gradients are summed over the processes after the `last`.

        Gradients in half precision are summed after each, since the optimiser takes them over after each.
        """
        if isinstance(self._module, DistributedDataParallel):
            around: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if _has_half(self._module):
                around = _none_of_before(self._module)
            elif not last:
                around = self._module.no_sync()
            with around:
                yield
            return
        if self._sharded:
            self._module.set_requires_gradient_sync(last)
        yield

    def unsplit(self) -> None:
        """Gather what no unit has, for somebody who calls the model and not its loss; until `settle`."""
        if self._sharded:
            self._module.unshard()

    def settle(self) -> None:
        """Give each process its part of the parameters alone, as after a backward pass; after an evaluation, say."""
        if self._sharded:
            for module in _split_modules(self._module):
                module.reshard()


def _has_half(module: nn.Module) -> bool:
    return any(parameter.requires_grad and parameter.dtype in _HALF for parameter in module.parameters())


@contextlib.contextmanager
def _none_of_before(module: nn.Module) -> Iterator[None]:
    """A context in which no parameter has a gradient of an earlier pass; at its end they are added.

    They are sums over the processes already. Summed once more, they would count once for each process.
    """
    before = {parameter: parameter.grad for parameter in module.parameters() if parameter.grad is not None}
    for parameter in before:
        parameter.grad = None
    yield
    for parameter, gradient in before.items():
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)
"""DDP's argument that copies the first process's buffers before each pass. torch 2.11 has it under another name."""


def _replicated(module: nn.Module, world: World) -> DistributedDataParallel:
    """DDP, whose gradients are sums.

    Which parameters get a gradient hangs on the step and, with carried states, on the rows of a process: W and b get
    one where a file starts. So DDP looks for those that were not used.
    """
    options: dict[str, Any] = {_SYNC_BUFFERS: False}
    wrapped = DistributedDataParallel(
        module,
        process_group=world.data_group,
        find_unused_parameters=True,
        **options,
    )
    wrapped.register_comm_hook(world.data_group, _summed)
    return wrapped


def _summed(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum of a bucket of gradients over the processes; DDP's own hook takes the mean."""
    done = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
    return done.then(lambda future: future.value()[0])


# DDP compares the annotations themselves, and here they are text
_summed.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


def _split_modules(root: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _shard(root: LossModule, units: Sequence[nn.Module], world: World) -> dict[str, torch.dtype]:
    """Split the parameters of the units, and what is left in the root, with FSDP2.

    Returns:
        The names of trained parameters that were in half precision, with their types; they are in float32 now.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    assert world.mesh is not None
    mesh = world.mesh["shard"] if world.replicate == 1 else world.mesh["replicate", "shard"]
    half = _to_float32(root)
    used_in = {name: half[value] for name, value in root.model.named_parameters() if value in half}
    taken: set[nn.Parameter] = set()
    for unit in (*units, root):
        _make_room_for_fsdp(unit)
        unit.register_forward_hook(_no_views)  # before the hook of FSDP2, which comes after it
        own = [parameter for parameter in unit.parameters() if parameter not in taken]
        dtypes = {half[parameter] for parameter in own if parameter in half}
        policy = MixedPrecisionPolicy(
            param_dtype=dtypes.pop() if dtypes else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if not any(parameter in half for parameter in own):
            policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        taken.update(own)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        taken.update(unit.parameters())
    for module in _split_modules(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return used_in


def _no_views(module: nn.Module, given: Any, output: Any) -> Any:
    """The output of a unit, in which no tensor is a view.

    An operation in place on a view drops the hook by which FSDP2 gathers parameters for backward: gradients would be
    wrong, or missing.
    """
    if isinstance(output, Tensor):
        return output.clone() if output.requires_grad and output._is_view() else output
    if type(output) in (tuple, list):
        return type(output)(_no_views(module, given, entry) for entry in output)
    return output


def _to_float32(root: nn.Module) -> dict[nn.Parameter, torch.dtype]:
    """Keep trained parameters that are in half precision in float32; returns in which type each is used.

    So small updates are not rounded away, and the optimiser needs no copies of its own.
    """
    used = {}
    for parameter in root.parameters():
        if parameter.requires_grad and parameter.dtype in _HALF:
            used[parameter] = parameter.dtype
            parameter.data = parameter.data.float()
    return used


def _make_room_for_fsdp(module: nn.Module) -> None:
    """Let `fully_shard` change the class of a module whose first base is not an `nn.Module`.

    It makes a class of the bases `(FSDPModule, cls)` and assigns it. Python allows that only if the memory layouts of
    both classes come from the same base. The layout of `class StreamingModule(abc.ABC, nn.Module)`, as kyutai's are, is
    derived from `ABC`, that of the new class from `FSDPModule`: "object layout differs". A class of the bases
    `(cls, FSDPModule)` has the layout of `cls`. FSDP2 keeps the classes that it has made, so such a class is put there
    before it looks.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fully_shard as made

    cls = type(module)
    if cls in made.cls_to_fsdp_cls or issubclass(cls, FSDPModule):
        return
    usual = type(f"FSDP{cls.__name__}", (FSDPModule, cls), {})
    if _can_become(cls, usual):
        return
    added = {"__deepcopy__": made._unimplemented_deepcopy, "__new__": FSDPModule.__new__, "_orig_cls_mro_index": 1}
    made.cls_to_fsdp_cls[cls] = type(f"FSDP{cls.__name__}", (cls, FSDPModule), added)


def _can_become(cls: type, other: type) -> bool:
    """Whether objects of a class can be given another class."""
    probe: Any = object.__new__(cls)
    try:
        probe.__class__ = other
    except TypeError:
        return False
    return True
