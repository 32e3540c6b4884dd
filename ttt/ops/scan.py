"""A scan over the leading axis of a pytree that recomputes groups of steps in backward.

It is one differentiable operation: it always saves its inputs and the carry that opens each group. So an enclosing
checkpoint, of any kind and at any depth, sees the same tensors saved in forward and in recomputation. A group is
recomputed under the autocast state of its forward.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ttt.ops.autocast import AutocastState

Carry = TypeVar("Carry")
Flat = tuple[Any, ...]


def scan(
    step: Callable[..., tuple[Carry, Any]],
    carry: Carry,
    xs: Any,
    *,
    consts: Sequence[Any] = (),
    group_size: int = 0,
) -> tuple[Carry, Any]:
    """Run `carry, y = step(carry, x, *consts)` over the leading axis of `xs` and stack the `y`, like `jax.lax.scan`.

    Differentiable in `carry`, `xs` and `consts`. With `group_size` g it keeps the carry that opens every group of g
    steps, and runs each group again in backward. Between forward and backward it holds the inputs and
    `ceil(N/g) − 1` carries; backward adds the activations of one group. If g is 0 or at least the number of steps,
    everything is kept and nothing runs twice. If no gradient is needed, nothing is kept. The result does not depend
    on g.

    Args:
        step: a pure function of its arguments. It must give the same result when it runs again, must not write to its
            arguments, and must take every tensor that needs a gradient as an argument, not from a closure.
        carry: a pytree of tensors; `step` returns one of the same structure, shapes and types. Any pytree may be None
            if it is empty, as in `return carry, None`.
        xs: a pytree of tensors `[N, …]`, N ≥ 1.
        consts: pytrees of tensors that every step reads.
        group_size: g, from 0. N need not be a multiple of it.

    Returns:
        The last carry, and the pytree of the `y`, each tensor with a leading axis of length N.

    Raises:
        ValueError: `xs` has no steps, or its tensors have leading axes of different lengths; `group_size` is negative;
            `step` changes the structure, a shape or a type of the carry or the `y`, or writes to an argument in place.
        TypeError: a leaf of a pytree is not a tensor, or `step` does not return a pair.
        RuntimeError: in backward, if `step` closes over a tensor that needs a gradient, which would be lost, or if a
            second derivative is asked for (write `group_size=0` for one).
    """
    if not isinstance(consts, (tuple, list)):  # iterating a tensor would take it apart
        raise TypeError(f"scan: consts is a {type(consts).__name__}; write a tuple, as consts=(tensor,)")
    xs_leaves, xs_form = _flatten(xs, "xs")
    carry_leaves, carry_form = _flatten(carry, "carry")
    const_leaves, const_form = _flatten(tuple(consts), "consts")
    group_size = operator.index(group_size)
    lengths = {leaf.shape[0] if leaf.dim() else 0 for leaf in xs_leaves}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"scan: every tensor of xs needs the same leading axis, of 1 or more; got {sorted(lengths)}")
    if group_size < 0:
        raise ValueError(f"scan: group_size is {group_size}; it counts steps, from 0")
    length = lengths.pop()
    program = _Program(step, carry_form, xs_form, const_form, group_size, length)
    leaves = (*carry_leaves, *xs_leaves, *const_leaves)
    keeps_everything = group_size == 0 or group_size >= length
    needs_gradient = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    if keeps_everything or not needs_gradient:
        final, stacked = program.run(carry_leaves, xs_leaves, const_leaves)
    else:
        program.autocast = AutocastState(next(leaf for leaf in leaves if leaf.requires_grad).device.type)
        out = _GroupedScan.apply(program, len(carry_leaves), len(xs_leaves), *leaves)
        final, stacked = out[: len(carry_leaves)], out[len(carry_leaves) :]
    assert program.y_form is not None
    return carry_form.unflatten(final), program.y_form.unflatten(stacked)


class _Form(NamedTuple):
    """The structure of a pytree, without its tensors."""

    spec: pytree.TreeSpec
    filled: tuple[bool, ...]
    """Which leaves are tensors; the others are None."""

    def unflatten(self, tensors: Sequence[Tensor]) -> Any:
        waiting = iter(tensors)
        return pytree.tree_unflatten([next(waiting) if there else None for there in self.filled], self.spec)


def _flatten(tree: Any, what: str) -> tuple[Flat, _Form]:
    leaves, spec = pytree.tree_flatten(tree)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, Tensor):
            raise TypeError(
                f"scan: {what} holds a {type(leaf).__name__}; its leaves are tensors (wrap a number in torch.tensor, "
                f"register a class of your own with torch.utils._pytree)"
            )
    tensors = tuple(leaf for leaf in leaves if leaf is not None)
    return tensors, _Form(spec, tuple(leaf is not None for leaf in leaves))


class _Program:
    """A scan without its tensors: the step, its settings and the structure of its arguments."""

    def __init__(
        self,
        step: Callable[..., tuple[Any, Any]],
        carry_form: _Form,
        xs_form: _Form,
        const_form: _Form,
        group_size: int,
        length: int,
    ) -> None:
        self.step = step
        self.carry_form = carry_form
        self.xs_form = xs_form
        self.const_form = const_form
        self.group_size = group_size
        self.length = length
        self.y_form: _Form | None = None
        self.y_kinds: list[tuple[torch.Size, torch.dtype]] = []
        self.autocast: AutocastState | None = None

    def one_step(self, carry: Flat, x: Flat, consts: Any) -> tuple[Flat, Flat]:
        """Call `step` on a flat carry, and check that the carry and the `y` keep their form."""
        pair = self.step(self.carry_form.unflatten(carry), self.xs_form.unflatten(x), *consts)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"scan: step returns a pair (carry, y), not a {type(pair).__name__}")
        new_leaves, new_form = _flatten(pair[0], "the carry that step returned")
        if new_form != self.carry_form:
            raise ValueError(
                f"scan: step returned a carry of another structure: {new_form.spec}, not {self.carry_form.spec}"
            )
        for old, new in zip(carry, new_leaves, strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                raise ValueError(
                    f"scan: step turned a carry of shape {tuple(old.shape)}, {old.dtype} into {tuple(new.shape)}, "
                    f"{new.dtype}; a carry keeps its shape and type"
                )
        y_leaves, y_form = _flatten(pair[1], "the y that step returned")
        kinds = [(y.shape, y.dtype) for y in y_leaves]
        if self.y_form is None:
            self.y_form, self.y_kinds = y_form, kinds
        elif y_form != self.y_form or kinds != self.y_kinds:
            raise ValueError("scan: step returned a y of another structure, shape or type than the first step's")
        return new_leaves, y_leaves

    def steps(self, carry: Flat, xs: Flat, consts: Flat) -> tuple[Flat, list[Flat]]:
        """Run every step over the leading axis of `xs`."""
        # unbind, not indexing: its backward is one stack, while indexing would fill a zero tensor for each step.
        columns = [x.unbind(0) for x in xs]
        const_trees = self.const_form.unflatten(consts)
        ys = []
        for x in zip(*columns, strict=True):
            carry, y = self.one_step(carry, x, const_trees)
            ys.append(y)
        return carry, ys

    def run(self, carry: Flat, xs: Flat, consts: Flat) -> tuple[Flat, Flat]:
        """Run every step in plain operations, which autograd records."""
        carry, ys = self.steps(carry, xs, consts)
        return carry, tuple(torch.stack(parts) for parts in zip(*ys, strict=True))

    def groups(self) -> list[tuple[int, int]]:
        return [(i, min(i + self.group_size, self.length)) for i in range(0, self.length, self.group_size)]


class _GroupedScan(torch.autograd.Function):
    """A scan that saves its inputs and the carry that opens each group after the first, and recomputes by group."""

    @staticmethod
    def forward(ctx: Any, program: _Program, carries: int, columns: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        initial = leaves[:carries]
        xs, consts = leaves[carries : carries + columns], leaves[carries + columns :]
        carry: Flat = initial
        kept: list[Tensor] = []
        versions = _versions(leaves)
        stacked: list[Tensor] = []
        assert program.autocast is not None
        with program.autocast.restored():
            for start, stop in program.groups():
                if start:
                    kept += carry
                    versions += _versions(carry)
                carry, ys = program.steps(carry, tuple(x[start:stop] for x in xs), consts)
                if not stacked:
                    stacked = [y.new_empty((program.length, *y.shape)) for y in ys[0]]
                for index, y in enumerate(ys, start):
                    for whole, part in zip(stacked, y, strict=True):
                        whole[index] = part
                del ys
        # Recomputing from overwritten tensors would silently give wrong gradients.
        if _versions((*leaves, *kept)) != versions:
            raise ValueError("scan: step wrote to one of its arguments in place; write to a copy, or to what it made")
        # A step may return an input or a view of one; autograd needs a tensor of its own.
        own = [new.clone() if new._is_view() or any(new is leaf for leaf in leaves) else new for new in carry]
        outputs = [*own, *stacked]
        ctx.save_for_backward(*leaves, *kept)
        ctx.program, ctx.carries, ctx.columns, ctx.leaves = program, carries, columns, len(leaves)
        ctx.mark_non_differentiable(*(out for out in outputs if not _differentiable(out)))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Not `once_differentiable`: autograd drops its error if only the inputs' gradients are asked for.
            raise RuntimeError("scan: a group that is recomputed has no second derivative; write group_size=0 for one")
        program: _Program = ctx.program
        saved: Flat = ctx.saved_tensors
        leaves, kept = saved[: ctx.leaves], saved[ctx.leaves :]
        initial = leaves[: ctx.carries]
        xs = leaves[ctx.carries : ctx.carries + ctx.columns]
        consts = leaves[ctx.carries + ctx.columns :]
        wanted = ctx.needs_input_grad[3:]
        xs_wanted = wanted[ctx.carries : ctx.carries + ctx.columns]
        consts_wanted = wanted[ctx.carries + ctx.columns :]

        carry_gradients: list[Tensor | None] = list(output_gradients[: ctx.carries])
        y_gradients = output_gradients[ctx.carries :]
        x_gradients = [torch.zeros_like(x) if want else None for x, want in zip(xs, xs_wanted, strict=True)]
        const_gradients: list[Tensor | None] = [None] * len(consts)

        groups = program.groups()
        for number in range(len(groups) - 1, -1, -1):
            start, stop = groups[number]
            opening = kept[(number - 1) * ctx.carries : number * ctx.carries] if number else initial
            # Every later carry depends on what precedes it and needs its gradient; the first only if it is asked for.
            carry_in = [
                _leaf(x, _differentiable(x) and (number > 0 or want))
                for x, want in zip(opening, wanted[: ctx.carries], strict=True)
            ]
            x_in = [_leaf(x[start:stop], want) for x, want in zip(xs, xs_wanted, strict=True)]
            const_in = [_leaf(x, want) for x, want in zip(consts, consts_wanted, strict=True)]
            with torch.enable_grad(), program.autocast.restored():  # type: ignore[union-attr]
                carry_out, ys = program.steps(tuple(carry_in), tuple(x_in), tuple(const_in))
            inputs = [x for x in (*carry_in, *x_in, *const_in) if x.requires_grad]
            outputs: list[Tensor] = []
            gradients: list[Tensor] = []
            for out, gradient in zip(carry_out, carry_gradients, strict=True):
                if gradient is not None and out.requires_grad:
                    outputs.append(out)
                    gradients.append(gradient)
            for index, y in enumerate(ys, start):
                for out, gradient in zip(y, y_gradients, strict=True):
                    if gradient is not None and out.requires_grad:
                        outputs.append(out)
                        gradients.append(gradient[index])
            if number == len(groups) - 1:
                _refuse_closures(outputs, inputs)
            found = iter(
                torch.autograd.grad(outputs, inputs, gradients, allow_unused=True) if outputs else [None] * len(inputs)
            )
            carry_gradients = [next(found) if x.requires_grad else None for x in carry_in]
            for whole, x in zip(x_gradients, x_in, strict=True):
                if x.requires_grad and (part := next(found)) is not None:
                    assert whole is not None
                    whole[start:stop] = part
            for index, x in enumerate(const_in):
                if x.requires_grad and (part := next(found)) is not None:
                    total = const_gradients[index]
                    const_gradients[index] = part if total is None else total + part
        return (None, None, None, *carry_gradients, *x_gradients, *const_gradients)


def _differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was written to, by autograd's own count, which views share."""
    return [0 if x.is_inference() else x._version for x in tensors]


def _leaf(x: Tensor, wants_gradient: bool) -> Tensor:
    return x.detach().requires_grad_(wants_gradient)


def _refuse_closures(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Raise if the graph of a group reaches a leaf that is not one of its inputs: its gradient would be lost."""
    own = {id(x) for x in inputs}
    waiting = [out.grad_fn for out in outputs if out.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)  # of an AccumulateGrad node
        if variable is not None and id(variable) not in own:
            raise RuntimeError(
                f"scan: step reaches a tensor of shape {tuple(variable.shape)} that requires a gradient, or one "
                f"computed from it, without taking it as an argument; its gradient would be lost. Pass it in consts."
            )
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                waiting.append(parent)
