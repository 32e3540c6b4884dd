"""Mini-batches of a linear or MLP inner model as one differentiable operation, its backward derived by hand.

Between forward and backward it holds its inputs and the weights that open each group of mini-batches, nothing else; in
backward each group runs once more and is walked back. `docs/backward.md` derives every line; numbers in parentheses
are its equations. `ttt.ops.scan` over `ttt.ops.mlp` computes the same through autograd and is the oracle of the tests.

Two things keep the loop over mini-batches short. Biases ride along as a last row of their weights, `W̃ = (W; b)`, and
as a last column of ones of what a layer is given, `X̃ = (X, 1)`: every product that a bias needs is part of one that is
there anyway. And only what the carry touches is in the loop, the keys' way forward and what their update gives back,
and the queries' first product, which is one with the keys'. The rest of the queries and all that depends on tokens
alone run for a chunk of mini-batches at a time.

Shapes: `P` stands for batch times heads, so that every product is one batched matrix product; `M` for the mini-batches
of a chunk. Layers of the inner model count from 0 here, so that layer l has weights `W̃_l [P,in+1,out]`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from ttt.ops.norm import is_constant, is_zero

Weights = tuple[Tensor, ...]

# GELU in its tanh form is x σ(2u) with 2u = x (SLOPE + CUBIC x²): one sigmoid, which is cheaper than one tanh.
_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBIC = _SLOPE * 0.044715
BLOCK = 16
"""Mini-batches whose tokens are laid out at a time where no group says how many."""
_CHUNK_NUMBERS = 1 << 20
"""Numbers of a chunk's keys where the inner model is widest, on a CPU."""
_CHUNK_WEIGHTS = 1 << 20
"""Numbers of a chunk's weights on a CPU, where they need not be kept."""

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


# --- what is laid out once ---


class _Dims(NamedTuple):
    """Shapes of a problem."""

    steps: int
    batch: int
    heads: int
    size: int
    widths: tuple[int, ...]
    """What the inner model is given and gives: `F, …, F`."""

    @property
    def pairs(self) -> int:
        return self.batch * self.heads

    @property
    def depth(self) -> int:
        return len(self.widths) - 1

    def chunk(self, device: torch.device, most: int, *, keep: bool) -> int:
        """How many mini-batches run the part that the carry does not touch at a time.

        On a CPU so many that calls cost little beside their arithmetic, and no more; where weights need not be kept,
        theirs are bounded too, and one mini-batch at a time moves them in place.
        """
        if device.type != "cpu":
            return most
        chunk = _CHUNK_NUMBERS // (self.pairs * self.size * max(self.widths))
        if not keep:
            weights = sum(a * b for a, b in itertools.pairwise(self.widths))
            chunk = min(chunk, _CHUNK_WEIGHTS // (self.pairs * weights))
        return max(1, min(most, chunk))


class _Constants(NamedTuple):
    """What every mini-batch reads, one row for each of P."""

    gamma: Tensor
    """`[P,1,F]`"""
    beta: Tensor
    gamma_squared: Tensor
    neg_scale: Tensor
    """`−s [P,C,1]`"""
    pushes: Tensor
    """What an update is multiplied with, `[N,P,1,1]`: `−s_C` where a mini-batch closes, 0 where it does not."""


class _Block(NamedTuple):
    """Tokens of consecutive mini-batches, laid out for the products; all `[n,P,…]`."""

    stacked: Tensor
    """`(K̃; Q̃)`, `[n,P,2C,F+1]`"""
    rate: Tensor
    """`η [n,P,C,1]`"""
    offset: Tensor
    """`β − target`, `[n,P,C,F]`"""
    anchor: Tensor
    """`γ (β − target)`"""
    push: Tensor
    """`−s_C η`, `[n,P,C,1]`"""
    pushed_keys: Tensor
    """`−s_C η K̃`, `[n,P,C,F+1]`"""
    coefficient: Tensor
    """`−s ηᵀ ⊙ mask`, `[n,P,C,C]`"""

    @classmethod
    def room(cls, dims: _Dims, steps: int, like: Tensor) -> _Block:
        """Room for some mini-batches; the last column of keys and queries is 1."""
        size, width = dims.size, dims.widths[0]

        def room(rows: int, columns: int) -> Tensor:
            return like.new_empty((steps, dims.pairs, rows, columns))

        stacked = room(2 * size, width + 1)
        stacked[..., width] = 1
        narrow, column = (size, width), (size, 1)
        return cls(
            stacked, room(*column), room(*narrow), room(*narrow), room(*column), room(size, width + 1), room(size, size)
        )

    def part(self, start: int, stop: int) -> _Block:
        """Some of the mini-batches."""
        return _Block(*(x[start:stop] for x in self))


class _Kept(NamedTuple):
    """What backward needs of mini-batches besides their tokens; all `[n,P,…]`, in order of layers."""

    weights: list[Tensor]
    """`W̃_l`, which opened them."""
    inputs: list[Tensor]
    """`(X̃_l; x̃_l) [n,P,2C,in+1]` for l ≥ 1: what keys and queries give the layers after the first."""
    slopes: list[Tensor]
    """`φ'(Z_l)` of hidden layers, `[n,P,C,out]`."""
    bends: list[Tensor]
    """`D_l ⊙ φ''(Z_l)` of hidden layers, where `D_l = E_{l+1} W_{l+1}ᵀ`."""
    query_slopes: list[Tensor]
    """`φ'(y_l)` of hidden layers."""
    errors: list[Tensor]
    """`E_l = ∂ℓ/∂Z_l`, `[n,P,C,out]`."""
    attention: list[Tensor]
    """`x̃_l X̃_lᵀ`, `[n,P,C,C]`."""
    output: Tensor
    """`Z` of the last layer, `[n,P,C,F]`."""
    answer: Tensor
    """`y` of the last layer."""
    moments: list[Tensor]
    """Mean and `1/σ` of `output`, then of `answer`, `[n,P,C,1]`."""

    def flat(self) -> list[Tensor]:
        return [
            *self.weights, *self.inputs, *self.slopes, *self.bends, *self.query_slopes, *self.errors, *self.attention,
            self.output, self.answer, *self.moments,
        ]  # fmt: skip

    @classmethod
    def of(cls, tensors: Sequence[Tensor], depth: int) -> _Kept:
        """The inverse of `flat`."""
        found = iter(tensors)

        def some(count: int) -> list[Tensor]:
            return list(itertools.islice(found, count))

        hidden = depth - 1
        lists = some(depth), some(hidden), some(hidden), some(hidden), some(hidden), some(depth), some(depth)
        return cls(*lists, next(found), next(found), list(found))

    def part(self, start: int, stop: int) -> _Kept:
        """Of some of the mini-batches."""
        return _Kept.of([x[start:stop] for x in self.flat()], len(self.weights))


def _dims(q: Tensor, weights: Sequence[Tensor]) -> _Dims:
    batch, heads, steps, size, width = q.shape
    return _Dims(steps, batch, heads, size, (width, *(w.shape[-1] for w in weights[::2])))


def _allocate(dims: _Dims, steps: int, like: Tensor) -> _Kept:
    """Room for what some mini-batches keep; the last column of what layers are given is 1."""
    pairs, size, depth = dims.pairs, dims.size, dims.depth
    hidden = dims.widths[1:-1]

    def room(rows: int, columns: int) -> Tensor:
        return like.new_empty((steps, pairs, rows, columns))

    kept = _Kept(
        weights=[room(fan_in + 1, fan_out) for fan_in, fan_out in itertools.pairwise(dims.widths)],
        inputs=[room(2 * size, width + 1) for width in hidden],
        slopes=[room(size, width) for width in hidden],
        bends=[room(size, width) for width in hidden],
        query_slopes=[room(size, width) for width in hidden],
        errors=[room(size, width) for width in dims.widths[1:]],
        attention=[room(size, size) for _ in range(depth)],
        output=room(size, dims.widths[-1]),
        answer=room(size, dims.widths[-1]),
        moments=[room(size, 1) for _ in range(4)],
    )
    for x in kept.inputs:
        x[..., -1] = 1
    return kept


def _constants(
    dims: _Dims, gamma: Tensor, beta: Tensor, scale: Tensor, last: Tensor | None, like: Tensor
) -> _Constants:
    def per_pair(x: Tensor) -> Tensor:
        return x.expand(dims.batch, dims.heads, 1, dims.widths[0]).reshape(dims.pairs, 1, -1)

    shape = dims.batch, dims.heads
    if last is None:
        pushes = like.new_ones((dims.steps, dims.pairs, 1, 1))
    else:
        pushes = -last[:, :, None].expand(dims.steps, *shape).reshape(dims.steps, dims.pairs, 1, 1)
    wide = per_pair(gamma)
    steps = scale[:, None].expand(*shape, dims.size).reshape(dims.pairs, dims.size, 1)
    return _Constants(wide, per_pair(beta), wide.square(), steps.neg(), pushes)


def _lay_out(
    dims: _Dims,
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    constants: _Constants,
    start: int,
    room: _Block,
    mask: bool,
) -> None:
    """Lay out the tokens of as many mini-batches from `start` on as there is room for."""
    stop, size, width = start + len(room.rate), dims.size, dims.widths[0]
    q, k, target, rate = (x[:, :, start:stop].movedim(2, 0) for x in tokens)
    by_head = _Block(*(x.unflatten(1, (dims.batch, dims.heads)) for x in room))
    by_head.stacked[..., :size, :width] = k
    by_head.stacked[..., size:, :width] = q
    by_head.rate.copy_(rate)
    torch.sub(constants.beta.unflatten(0, (dims.batch, dims.heads)), target, out=by_head.offset)
    torch.mul(room.offset, constants.gamma, out=room.anchor)
    torch.mul(room.rate, constants.pushes[start:stop], out=room.push)
    torch.mul(room.stacked[:, :, :size], room.push, out=room.pushed_keys)
    torch.mul(constants.neg_scale, room.rate.mT, out=room.coefficient)
    if mask:
        room.coefficient.tril_()


def _joined(dims: _Dims, weights: Sequence[Tensor]) -> list[Tensor]:
    """`W̃ [P,in+1,out]` of `W [B,H,in,out]` and `b [B,H,1,out]`."""
    return [
        torch.cat((weights[index], weights[index + 1]), -2).reshape(dims.pairs, -1, weights[index].shape[-1])
        for index in range(0, len(weights), 2)
    ]


def _parted(dims: _Dims, joined: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_joined`, each in memory of its own."""
    found = []
    for whole in joined:
        whole = whole.view(dims.batch, dims.heads, *whole.shape[1:])
        found += [part.clone(memory_format=torch.contiguous_format) for part in (whole[:, :, :-1], whole[:, :, -1:])]
    return found


# --- elementwise ---


def _gelu(z: Tensor, value: Tensor, squared: Tensor, gate: Tensor) -> None:
    """`φ(z) = z σ(2u)` into `value`; leaves `z²` and `σ(2u)` behind (2)."""
    torch.mul(z, z, out=squared)
    torch.mul(z, _SLOPE, out=gate)
    gate.addcmul_(squared, z, value=_CUBIC).sigmoid_()
    torch.mul(z, gate, out=value)


def _gelu_slope(value: Tensor, squared: Tensor, gate: Tensor, slope: Tensor) -> None:
    """`φ'(z) = σ + φ (1 − σ) p` into `slope`, with `p = (2u)'` left in place of `z²` (3)."""
    squared.mul_(3 * _CUBIC).add_(_SLOPE)
    torch.addcmul(value, value, gate, value=-1, out=slope)
    slope.mul_(squared).add_(gate)


def _gelu_bend(gate: Tensor, slope: Tensor, p: Tensor, bend: Tensor) -> None:
    """`φ''(z) = σ (1 − σ) (4p − 2a) + (φ' − σ) p (1 − 2σ)` into `bend`, `a = p(0)` (4)."""
    torch.mul(p, 4, out=bend)
    bend.sub_(2 * _SLOPE)
    spread = torch.addcmul(gate, gate, gate, value=-1)
    bend.mul_(spread)
    torch.sub(slope, gate, out=spread)
    spread.mul_(p)
    bend.add_(spread)
    bend.addcmul_(spread, gate, value=-2)


def _add_outer(base: Tensor, columns: Tensor, rows: Tensor, out: Tensor) -> None:
    """`base + columns rows`, `[P,a,C]` and `[P,C,b]`, into `out`, which may be `base`."""
    count = rows.shape[-2]
    if count == 1:  # bound by memory: one pass over the weights
        torch.addcmul(base, columns, rows, out=out)
    elif count == 2:
        torch.addcmul(base, columns[..., :1], rows[:, :1], out=out)
        out.addcmul_(columns[..., 1:], rows[:, 1:])
    elif out is base:
        base.baddbmm_(columns, rows)
    else:
        torch.baddbmm(base, columns, rows, out=out)


# --- forward ---


class _Scratch:
    """Room that one chunk of mini-batches after the other uses."""

    def __init__(self, dims: _Dims, chunk: int, like: Tensor) -> None:
        hidden = dims.widths[1:-1]

        def room(width: int, rows: int = dims.size) -> Tensor:
            return like.new_empty((chunk, dims.pairs, rows, width))

        self.first = room(dims.widths[1], 2 * dims.size)
        """What the first layer makes of keys and queries."""
        self.outputs = [room(width) for width in hidden[1:]]
        """What the hidden layers after it make of the keys, then of the queries."""
        self.squared = [room(width) for width in hidden]
        self.gates = [room(width) for width in hidden]
        self.pulled = [room(width) for width in hidden]


def _each(tensors: Iterable[Tensor]) -> list[tuple[Tensor, ...]]:
    """Of every tensor, its mini-batches."""
    return [x.unbind(0) for x in tensors]


class _ForwardViews:
    """What a chunk of mini-batches reads and writes on its way forward.

    A view costs as much time as a small product. So they are made once for each place that chunks have in a group, and
    the next group, laid out in the same room, finds them there. Where every mini-batch has room of its own, each chunk
    has its views.
    """

    def __init__(self, dims: _Dims, block: _Block, kept: _Kept, scratch: _Scratch) -> None:
        steps, size = len(block.rate), dims.size
        self.steps = steps
        stacks = [block.stacked, *kept.inputs]
        first = scratch.first[:steps]

        # Lists by mini-batch; where each layer has one, lists of those. `later` ones begin at the second layer.
        self.stacked, self.first = block.stacked.unbind(0), first.unbind(0)
        self.anchors, self.pushes = block.anchor.unbind(0), block.push.unbind(0)
        self.weights = _each(kept.weights)
        self.later_weights_T = _each(x[:, :, :-1].mT for x in kept.weights[1:])
        self.later_keys = _each(x[:, :, :size] for x in kept.inputs)
        # The left side of (8): pushed keys, and what they give the layers after the first.
        self.updates = _each(x.mT for x in (block.pushed_keys, *(x[:, :, :size] for x in kept.inputs)))
        self.outputs = _each((first[:, :, :size], *(x[:steps] for x in scratch.outputs)))
        self.values = _each(x[:, :, :size, :-1] for x in kept.inputs)
        self.squared, self.gates, self.pulled = (
            _each(x[:steps] for x in room) for room in (scratch.squared, scratch.gates, scratch.pulled)
        )
        self.slopes, self.errors = _each(kept.slopes), _each(kept.errors)
        self.output, self.means, self.inverses = _each((kept.output, *kept.moments[:2]))

        # The whole chunk: what GELU left behind, and what the queries need.
        self.kept = kept
        self.all_squared, self.all_gates, self.all_pulled = (
            [x[:steps] for x in room] for room in (scratch.squared, scratch.gates, scratch.pulled)
        )
        self.query_values = [x[:, :, size:, :-1] for x in kept.inputs]
        # What the layers give the queries. Products are fast only into rows that lie together, and the first layer's
        # have the keys' between them: they are added up where `pulled` is read no more.
        self.answered = [*(x[:steps] for x in (*scratch.pulled[:1], *scratch.outputs)), kept.answer]
        # The same as batches of M P matrices.
        self.queries = [x[:, :, size:].flatten(0, 1) for x in stacks]
        self.all_keys_T = [x[:, :, :size].flatten(0, 1).mT for x in stacks]
        self.attention = [x.flatten(0, 1) for x in kept.attention]
        self.coefficient = block.coefficient.flatten(0, 1)
        self.first_queries = first[:, :, size:].flatten(0, 1)
        self.products = [x.flatten(0, 1) for x in self.answered]
        self.all_later_weights = [x.flatten(0, 1) for x in kept.weights[1:]]
        self.all_errors = [x.flatten(0, 1) for x in kept.errors]


def _forward_chunk(
    dims: _Dims,
    constants: _Constants,
    views: _ForwardViews,
    following: list[Tensor] | None,
    gradients: list[Tensor] | None,
    *,
    closes: bool,
    eps: float,
    keep: bool,
) -> Tensor:
    """Answers `LN(y) [M,P,C,F]` of a chunk whose first weights are in its room, and what the next one opens with.

    Args:
        dims: shapes.
        constants: see there.
        views: the chunk's tokens, and where it writes what backward needs.
        following: where the weights after the chunk go, or None where nobody asks.
        gradients: `G`, where the chunk is a mini-batch that was open before.
        closes: whether weights move; else the chunk is one mini-batch and its summed gradients go to `following`.
        eps: of the layer norm.
        keep: whether what backward reads is written down.
    """
    steps, depth, width = views.steps, dims.depth, dims.widths[-1]
    kept, weights, errors = views.kept, views.weights, views.errors

    def update(n: int, targets: Sequence[Tensor]) -> None:
        for layer, target in enumerate(targets):
            left, right = views.updates[layer][n], errors[layer][n]
            if layer:
                right = right * views.pushes[n]
            if closes:
                _add_outer(weights[layer][n], left, right, target)  # (8)
            elif gradients is not None:
                _add_outer(gradients[layer], left, right, target)
            else:
                torch.bmm(left, right, out=target)

    for n in range(steps):
        torch.bmm(views.stacked[n], weights[0][n], out=views.first[n])  # (1), and the first part of (10)
        for layer in range(depth - 1):
            z, value, squared, gate, slope = (
                views.outputs[layer][n], views.values[layer][n], views.squared[layer][n], views.gates[layer][n],
                views.slopes[layer][n],
            )  # fmt: skip
            if layer:
                torch.bmm(views.later_keys[layer - 1][n], weights[layer][n], out=z)
            _gelu(z, value, squared, gate)
            _gelu_slope(value, squared, gate, slope)
        z = views.output[n]
        if depth > 1:
            torch.bmm(views.later_keys[-1][n], weights[-1][n], out=z)
        else:
            z.copy_(views.outputs[0][n])
        unit, mean, inverse = torch.native_layer_norm(z, (width,), None, None, eps)
        # (5), (6): a = γ (γ x̂ + β − target), and E its way back through the norm.
        a = torch.addcmul(views.anchors[n], constants.gamma_squared, unit)
        error = _layer_norm_backward(a, z, (width,), mean, inverse, None, None, (True, False, False))[0]
        errors[-1][n].copy_(error)
        if keep:
            views.means[n].copy_(mean)
            views.inverses[n].copy_(inverse)
        for layer in range(depth - 2, -1, -1):
            torch.bmm(errors[layer + 1][n], views.later_weights_T[layer][n], out=views.pulled[layer][n])  # (7)
            torch.mul(views.pulled[layer][n], views.slopes[layer][n], out=errors[layer][n])
        if n + 1 < steps:
            update(n, [w[n + 1] for w in weights])

    if keep:
        for layer in range(depth - 1):
            bend = kept.bends[layer]
            _gelu_bend(views.all_gates[layer], kept.slopes[layer], views.all_squared[layer], bend)
            bend.mul_(views.all_pulled[layer])

    # What is left of the queries of all mini-batches of the chunk: (9), the rest of (10), (11).
    for layer in range(depth):
        x, y = views.queries[layer], views.products[layer]
        seen = torch.bmm(x, views.all_keys_T[layer], out=views.attention[layer])
        seen = seen * views.coefficient
        if layer:
            torch.bmm(x, views.all_later_weights[layer - 1], out=y)
            y.baddbmm_(seen, views.all_errors[layer])
        else:
            torch.baddbmm(views.first_queries, seen, views.all_errors[layer], out=y)
        if gradients is not None:
            y.addcmul_(torch.bmm(x, gradients[layer]), constants.neg_scale)
        if layer + 1 < depth:
            value, squared, gate = views.query_values[layer], views.all_squared[layer], views.all_gates[layer]
            _gelu(views.answered[layer], value, squared, gate)
            if keep:
                _gelu_slope(value, squared, gate, kept.query_slopes[layer])
    unit, mean, inverse = torch.native_layer_norm(kept.answer, (width,), None, None, eps)
    if keep:
        kept.moments[2].copy_(mean)
        kept.moments[3].copy_(inverse)
    # After the queries: these weights may take the place of the chunk's first.
    if following is not None:
        update(steps - 1, following)
    return unit.mul_(constants.gamma).add_(constants.beta)


# --- backward ---


class _Sums:
    """Gradients that add up over mini-batches."""

    def __init__(self, dims: _Dims, d_next: list[Tensor], *, closes: bool, found_open: bool) -> None:
        def zeros(*shape: int) -> Tensor:
            return d_next[0].new_zeros((dims.pairs, *shape))

        self.next = d_next
        """Of what a mini-batch hands on: the weights that open the next, or the summed gradients of an open one."""
        self.first_next_T = d_next[0].mT
        self.later_next_T = [x[:, :-1].mT for x in d_next[1:]]
        self.weights = d_next if closes else [torch.zeros_like(x) for x in d_next]
        """Of the weights; where mini-batches close, the same tensors: `W' = W − …` hands its gradient through (12)."""
        self.gradients = [x.clone() for x in d_next] if found_open else []
        """Of the gradients that an open mini-batch had summed before."""
        self.gamma = zeros(1, dims.widths[0])
        self.beta = zeros(1, dims.widths[0])
        self.scale = zeros(dims.size, 1)


class _TokenGradients(NamedTuple):
    """Gradients of a chunk's tokens `[M,P,C,F]`, rates `[M,P,C,1]` and pushes `[M,P,1,1]`, until the next chunk."""

    q: Tensor
    k: Tensor
    target: Tensor
    rate: Tensor
    pushes: Tensor


def _sum_rows(x: Tensor) -> Tensor:
    """`[M,P,C,F]` to `[P,1,F]`."""
    return x.sum((0, 2)).unsqueeze(1)


class _BackwardScratch:
    """Room that one chunk after the other uses on its way back: that of its way forward, and more.

    All of a group has gone forward before any of it goes back, and what goes back reads only what was kept.
    """

    def __init__(self, dims: _Dims, chunk: int, forward: _Scratch) -> None:
        size, width, like = dims.size, dims.widths[0], forward.first

        def room(*shape: int) -> Tensor:
            return like.new_empty((chunk, dims.pairs, *shape))

        self.d_outputs = [forward.first, *(room(2 * size, fan_out) for fan_out in dims.widths[2:])]
        """`(dZ_l; dy_l)`: rows of the keys and of the queries together, as what the layers are given is kept."""
        self.d_errors = [*forward.squared, room(size, width)]
        self.d_inputs = [room(size, width), *forward.gates]
        self.seen_by_next = [*forward.pulled, room(size, width)]
        self.reached = room(size, width + 1)
        self.d_slopes = room(size, width)
        self.pushed_errors = [room(size, fan_out) for fan_out in dims.widths[2:]]
        self.pair, self.along = room(size, 2, width), room(size, 2)
        self.unit, self.slope, self.turned_error, self.turned_unit = (room(size, width) for _ in range(4))
        self.d_stack = room(2 * size, width)
        # A last column of zeros, where the bias of the next layer would be.
        self.d_pulled = [like.new_zeros((dims.pairs, size, hidden + 1)) for hidden in dims.widths[1:-1]]


class _BackwardViews:
    """What a chunk of mini-batches reads and writes on its way back; made as `_ForwardViews` are."""

    def __init__(self, dims: _Dims, block: _Block, kept: _Kept, scratch: _BackwardScratch) -> None:
        steps, size = len(block.rate), dims.size
        self.steps, self.block, self.kept = steps, block, kept
        stacks = [block.stacked, *kept.inputs]

        def of_chunk(rooms: Iterable[Tensor]) -> list[Tensor]:
            return [x[:steps] for x in rooms]

        # The whole chunk.
        self.d_outputs, self.d_errors, self.d_inputs = (
            of_chunk(rooms) for rooms in (scratch.d_outputs, scratch.d_errors, scratch.d_inputs)
        )
        self.seen_by_next, self.pushed_errors = of_chunk(scratch.seen_by_next), of_chunk(scratch.pushed_errors)
        self.reached, self.d_slopes, self.pair, along = of_chunk(
            (scratch.reached, scratch.d_slopes, scratch.pair, scratch.along)
        )
        self.unit, self.slope, self.d_stack = of_chunk((scratch.unit, scratch.slope, scratch.d_stack))
        self.turned_error, self.turned_unit = of_chunk((scratch.turned_error, scratch.turned_unit))
        self.d_answered = [x[:, :, size:] for x in self.d_outputs]
        # The same as batches of M P matrices.
        self.queries = [x[:, :, size:].flatten(0, 1) for x in stacks]
        self.all_keys = [x[:, :, :size, :-1].flatten(0, 1) for x in stacks]
        self.all_errors, self.attention = ([x.flatten(0, 1) for x in room] for room in (kept.errors, kept.attention))
        self.all_weights_T = [x[:, :, :-1].flatten(0, 1).mT for x in kept.weights]
        self.coefficient = block.coefficient.flatten(0, 1)

        # Lists by mini-batch, as in `_ForwardViews`.
        self.later_weights = _each(x[:, :, :-1] for x in kept.weights[1:])
        self.later_weights_T = _each(x[:, :, :-1].mT for x in kept.weights[1:])
        self.keys = _each(x[:, :, :size] for x in stacks)
        self.stacks_T = _each(x.mT for x in stacks)
        self.errors, self.slopes, self.bends = _each(kept.errors), _each(kept.slopes), _each(kept.bends)
        self.d_errors_at, self.d_outputs_at = _each(self.d_errors), _each(self.d_outputs)
        self.later_d_inputs_at = _each(self.d_inputs[1:])
        self.d_keys_at = _each(x[:, :, :size] for x in self.d_outputs)
        self.seen_at, self.pushed_at = _each(self.seen_by_next), _each(self.pushed_errors)
        self.reached_at, self.d_slopes_at, self.pushes = _each((self.reached, self.d_slopes, block.push))
        self.output, self.means, self.inverses = _each((kept.output, *kept.moments[:2]))
        # `(x̂; E)` of each token as a matrix of its own, and what each of the two has in common with the token's dE.
        self.pairs, self.along = self.pair.flatten(1, 2).unbind(0), along.unsqueeze(-1).flatten(1, 2).unbind(0)
        self.along_unit, self.along_error = along[..., :1].unbind(0), along[..., 1:].unbind(0)
        self.turned_errors, self.turned_units = _each((self.turned_error, self.turned_unit))
        self.d_pulled_rows = [x[..., :-1] for x in scratch.d_pulled]
        self.d_pulled_T = [x.mT for x in scratch.d_pulled]


def _backward_chunk(
    dims: _Dims,
    constants: _Constants,
    views: _BackwardViews,
    d_answers: Tensor,
    sums: _Sums,
    gradients: list[Tensor] | None,
    mask: bool,
) -> _TokenGradients:
    """One chunk's way back: the queries of all its mini-batches, then the keys from the last to the first.

    Args:
        dims: shapes.
        constants: see there.
        views: the chunk's tokens, what forward left, and room.
        d_answers: of `q + LN(y)`, `[M,P,C,F]`.
        sums: of what comes after the chunk; of the chunk and what comes after it when this returns.
        gradients: `G` of a mini-batch that was open before.
        mask: whether the update is causal.
    """
    depth, size, width, steps = dims.depth, dims.size, dims.widths[-1], views.steps
    block, kept, gamma = views.block, views.kept, constants.gamma
    d_outputs, d_errors, d_inputs = views.d_outputs, views.d_errors, views.d_inputs

    def through_norm(d: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        return _layer_norm_backward(d, x, (width,), mean, inverse, None, None, (True, False, False))[0]

    def per_step(x: Tensor) -> Tensor:
        return x.unflatten(0, (steps, dims.pairs))

    # --- the queries, which no carry touches: (13) to (17) ---
    mean, inverse = kept.moments[2:]
    sums.beta += _sum_rows(d_answers)
    unit, slope = views.unit, views.slope
    sums.gamma += _sum_rows(torch.sub(kept.answer, mean, out=unit).mul_(inverse).mul_(d_answers))
    # A constant vector gets no gradient (`ttt.ops.norm`): with 1/σ = 0 nothing comes through its norm.
    followed = inverse.masked_fill(is_constant(kept.answer), 0)
    d_y = through_norm(torch.mul(d_answers, gamma, out=slope), kept.answer, mean, followed)
    views.d_answered[-1].copy_(d_y)
    d_y = d_y.flatten(0, 1)
    coefficient = views.coefficient
    d_coefficient = torch.zeros_like(coefficient)
    for layer in range(depth - 1, -1, -1):
        x, seen = views.queries[layer], views.attention[layer]
        d_seen = torch.bmm(d_y, views.all_errors[layer].mT)
        d_coefficient.addcmul_(d_seen, seen)
        d_seen.mul_(coefficient)
        torch.bmm((seen * coefficient).mT, d_y, out=d_errors[layer].flatten(0, 1))
        torch.bmm(d_seen.mT, x[..., :-1], out=d_inputs[layer].flatten(0, 1))
        d_x = torch.bmm(d_seen, views.all_keys[layer])
        if gradients is not None:  # one mini-batch: y has − s x̃ G in addition
            d_step = d_y * constants.neg_scale
            sums.scale -= (d_y * torch.bmm(x, gradients[layer])).sum(-1, keepdim=True)
            sums.gradients[layer].baddbmm_(x.mT, d_step)
            d_x.baddbmm_(d_step, gradients[layer][:, :-1].mT)
        if layer:
            d_x.baddbmm_(d_y, views.all_weights_T[layer])
            d_y = views.d_answered[layer - 1]
            torch.mul(per_step(d_x), kept.query_slopes[layer - 1], out=d_y)
            d_y = d_y.flatten(0, 1)
    d_query = per_step(d_x).add_(d_answers)
    if mask:
        d_coefficient.tril_()
    # coefficient = − s ηᵀ
    d_coefficient = per_step(d_coefficient)
    sums.scale -= (d_coefficient @ block.rate).sum(0)
    d_rate = d_coefficient.mT @ constants.neg_scale

    # --- the keys ---
    # What the way back through E needs of the norm, (20): constant in the loop.
    mean, inverse = kept.moments[:2]
    torch.sub(kept.output, mean, out=unit).mul_(inverse)
    torch.addcmul(block.anchor, constants.gamma_squared, unit, out=slope)
    constant = is_constant(kept.output)
    followed = inverse.masked_fill(constant, 0)
    teaching_at = inverse.masked_fill(constant & is_zero(kept.errors[-1]), 0).unbind(0)
    to_slopes = slope.mul_(unit).mean(-1, keepdim=True).mul_(followed).neg_().unbind(0)
    views.pair[..., 0, :], views.pair[..., 1, :] = unit, kept.errors[-1]
    share = followed * (-1 / width)
    followed_at = followed.unbind(0)
    torch.mul(kept.errors[-1], share, out=views.turned_error)
    torch.mul(unit, share, out=views.turned_unit)
    for error, pushed in zip(kept.errors[1:], views.pushed_errors, strict=True):
        torch.mul(error, block.push, out=pushed)

    for n in range(steps - 1, -1, -1):
        # (18): what the update gives back to errors and inputs.
        for layer in range(depth):
            seen = torch.bmm(views.keys[layer][n], sums.next[layer], out=views.seen_at[layer][n])
            views.d_errors_at[layer][n].addcmul_(seen, views.pushes[n])
            if layer:
                views.later_d_inputs_at[layer - 1][n].baddbmm_(
                    views.pushed_at[layer - 1][n], sums.later_next_T[layer - 1]
                )
            else:
                torch.bmm(views.errors[0][n], sums.first_next_T, out=views.reached_at[n])
        # (19): the errors' way back, from the first layer up.
        d_error = views.d_errors_at[0][n]
        d_hidden = []
        for layer in range(depth - 1):
            torch.mul(d_error, views.slopes[layer][n], out=views.d_pulled_rows[layer])
            d_hidden.append(d_error.mul_(views.bends[layer][n]))
            d_error = views.d_errors_at[layer + 1][n]
            d_error.baddbmm_(views.d_pulled_rows[layer], views.later_weights[layer][n])
        # (20)
        output, mean = views.output[n], views.means[n]
        d_slope = through_norm(d_error, output, mean, teaching_at[n])
        views.d_slopes_at[n].copy_(d_slope)
        d_z = through_norm(d_slope * constants.gamma_squared, output, mean, followed_at[n])
        d_z.addcmul_(d_slope, to_slopes[n])
        torch.bmm(views.pairs[n], d_error.view(-1, width, 1), out=views.along[n])
        d_z.addcmul_(views.turned_errors[n], views.along_unit[n]).addcmul_(views.turned_units[n], views.along_error[n])
        # (21): the keys' way back.
        views.d_keys_at[-1][n].copy_(d_z)
        for layer in range(depth - 1, 0, -1):
            d_x = views.later_d_inputs_at[layer - 1][n]
            d_x.baddbmm_(views.d_keys_at[layer][n], views.later_weights_T[layer - 1][n])
            torch.addcmul(d_hidden[layer - 1], d_x, views.slopes[layer - 1][n], out=views.d_keys_at[layer - 1][n])
        # (22): all that the mini-batch gives to its weights.
        for layer in range(depth):
            total = sums.weights[layer]
            _add_outer(total, views.stacks_T[layer][n], views.d_outputs_at[layer][n], total)
            if layer:
                _add_outer(total, views.d_pulled_T[layer - 1], views.errors[layer][n], total)

    # --- what is left of the tokens: (23) to (25) ---
    d_stack, reached = views.d_stack, views.reached
    torch.bmm(d_outputs[0].flatten(0, 1), views.all_weights_T[0], out=d_stack.flatten(0, 1))
    d_query += d_stack[:, :, size:]
    d_key = d_inputs[0].addcmul_(reached[..., :-1], block.push).add_(d_stack[:, :, :size])
    d_push = reached.mul_(block.stacked[:, :, :size]).sum(-1, keepdim=True)
    for seen, error in zip(views.seen_by_next[1:], kept.errors[1:], strict=True):
        d_push += (seen * error).sum(-1, keepdim=True)
    d_rate += d_push * constants.pushes
    d_pushes = (d_push * block.rate).sum(-2, keepdim=True)
    # a = γ² x̂ + γ (β − target)
    sums.gamma += _sum_rows(unit.mul_(2 * gamma).add_(block.offset).mul_(views.d_slopes))
    d_target = views.d_slopes.mul_(-gamma)
    sums.beta -= _sum_rows(d_target)
    return _TokenGradients(d_query, d_key, d_target, d_rate, d_pushes)


# --- the operation ---

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor target, Tensor rate, Tensor gamma, Tensor beta, Tensor scale, Tensor? last, "
    "Tensor[] weights, Tensor[] gradients, bool causal, float eps, int group_size, bool keep) "
    "-> (Tensor, Tensor[], Tensor[])"
)
_BACKWARD_SCHEMA = (
    "(Tensor d_answers, Tensor[] d_following, Tensor q, Tensor k, Tensor target, Tensor rate, Tensor gamma, "
    "Tensor beta, Tensor scale, Tensor? last, Tensor[] weights, Tensor[] gradients, Tensor[] kept, bool causal, "
    "float eps, int group_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[], Tensor[])"
)


def _token_room(like: Tensor) -> Tensor:
    """Room of the shape `[B,H,N,C,F]` in the order of a sequence, `[B,N,C,H,F]`."""
    batch, heads, steps, size, width = like.shape
    return like.new_empty((batch, steps, size, heads, width)).permute(0, 3, 1, 2, 4)


def _kept_shapes(dims: _Dims, group_size: int, like: Tensor) -> list[Tensor]:
    """Room for what the operation keeps: all of every mini-batch, or the weights that open groups after the first."""
    if not group_size:
        return _allocate(dims, dims.steps, like).flat()
    groups = -(-dims.steps // group_size)
    return [
        like.new_empty((groups - 1, dims.pairs, fan_in + 1, fan_out))
        for fan_in, fan_out in itertools.pairwise(dims.widths)
    ]


# Defined by its parts: `custom_op` would import the compiler, some seconds, at the first call.
library.define("ttt::minibatches", _SCHEMA)
library.define("ttt::minibatches_backward", _BACKWARD_SCHEMA)


@library.impl("ttt::minibatches", "default")
def _run(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rate: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
    last: Tensor | None,
    weights: list[Tensor],
    gradients: list[Tensor],
    causal: bool,
    eps: float,
    group_size: int,
    keep: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    with _plain_types(q):
        dims = _dims(q, weights)
        constants = _constants(dims, gamma, beta, scale, last, q)
        answers = _token_room(q)
        shown = answers.permute(2, 0, 1, 3, 4)
        queries = q.movedim(2, 0)
        opened = _joined(dims, gradients) if gradients else None
        everything = keep and not group_size
        saved = _kept_shapes(dims, group_size, q) if keep else []
        block_size = min(group_size or BLOCK, dims.steps)
        chunk = dims.chunk(q.device, block_size, keep=everything)
        scratch = _Scratch(dims, chunk, q)
        block = _Block.room(dims, block_size, q)
        kept = _Kept.of(saved, dims.depth) if everything else _allocate(dims, chunk, q)
        carry = _joined(dims, weights)
        following = [torch.empty_like(x) for x in carry]
        for x, w in zip(kept.weights, carry, strict=True):
            x[0] = w

        def views_at(a: int, b: int, row: int) -> _ForwardViews:
            return _ForwardViews(dims, block.part(a, b), kept.part(row, row + b - a), scratch)

        # Where everything is kept no place comes up twice.
        views_of = views_at if everything else functools.cache(views_at)
        for start in range(0, dims.steps, block_size):
            stop = min(start + block_size, dims.steps)
            if keep and group_size and start:
                for x, w in zip(saved, kept.weights, strict=True):
                    x[start // group_size - 1] = w[0]
            _lay_out(dims, (q, k, target, rate), constants, start, block.part(0, stop - start), causal)
            for a in range(start, stop, chunk):
                b = min(a + chunk, stop)
                views = views_of(a - start, b - start, a if everything else 0)
                if last is None or b == dims.steps:
                    to = following
                elif everything:
                    to = [w[b] for w in kept.weights]
                else:
                    to = [w[0] for w in views.weights]
                normed = _forward_chunk(
                    dims, constants, views, to, opened, closes=last is not None, eps=eps, keep=everything
                )
                torch.add(queries[a:b], normed.unflatten(1, (dims.batch, dims.heads)), out=shown[a:b])
        return answers, _parted(dims, following), saved


@library.register_fake("ttt::minibatches")
def _(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rate: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
    last: Tensor | None,
    weights: list[Tensor],
    gradients: list[Tensor],
    causal: bool,
    eps: float,
    group_size: int,
    keep: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    held = _kept_shapes(_dims(q, weights), group_size, q) if keep else []
    return _token_room(q), [w.new_empty(w.shape) for w in weights], held


@library.impl("ttt::minibatches_backward", "default")
def _run_backward(
    d_answers: Tensor,
    d_following: list[Tensor],
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rate: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
    last: Tensor | None,
    weights: list[Tensor],
    gradients: list[Tensor],
    saved: list[Tensor],
    causal: bool,
    eps: float,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    with _plain_types(q):
        dims = _dims(q, weights)
        shape = dims.batch, dims.heads
        constants = _constants(dims, gamma, beta, scale, last, q)
        opened = _joined(dims, gradients) if gradients else None
        following = _joined(dims, d_following)
        sums = _Sums(dims, following, closes=last is not None, found_open=bool(gradients))
        d_tokens = _token_room(q), _token_room(k), _token_room(target), _token_room(rate)
        shown = [x.permute(2, 0, 1, 3, 4) for x in d_tokens]
        d_pushes = torch.empty_like(constants.pushes)
        d_answers = d_answers.movedim(2, 0)
        block_size = min(group_size or BLOCK, dims.steps)
        chunk = dims.chunk(q.device, block_size, keep=True)
        scratch = _Scratch(dims, chunk, q)
        scratch_back = _BackwardScratch(dims, chunk, scratch)
        block = _Block.room(dims, block_size, q)
        kept = _allocate(dims, block_size, q) if group_size else _Kept.of(saved, dims.depth)

        @functools.cache
        def views_of(a: int, b: int) -> _ForwardViews:
            return _ForwardViews(dims, block.part(a, b), kept.part(a, b), scratch)

        def views_back_at(a: int, b: int, row: int) -> _BackwardViews:
            return _BackwardViews(dims, block.part(a, b), kept.part(row, row + b - a), scratch_back)

        views_back_of = functools.cache(views_back_at) if group_size else views_back_at
        for start in range((dims.steps - 1) // block_size * block_size, -1, -block_size):
            stop = min(start + block_size, dims.steps)
            _lay_out(dims, (q, k, target, rate), constants, start, block.part(0, stop - start), causal)
            chunks = [(a, min(a + chunk, stop)) for a in range(start, stop, chunk)]
            if group_size:
                opening = [x[start // group_size - 1] for x in saved] if start else _joined(dims, weights)
                for x, w in zip(kept.weights, opening, strict=True):
                    x[0] = w
                for a, b in chunks:
                    views = views_of(a - start, b - start)
                    to = [w[b - start] for w in kept.weights] if b < stop else None
                    _forward_chunk(dims, constants, views, to, opened, closes=last is not None, eps=eps, keep=True)
            for a, b in reversed(chunks):
                views_back = views_back_of(a - start, b - start, a - start if group_size else a)
                found = _backward_chunk(
                    dims,
                    constants._replace(pushes=constants.pushes[a:b]),
                    views_back,
                    d_answers[a:b].reshape(b - a, dims.pairs, dims.size, -1),
                    sums,
                    opened,
                    causal,
                )
                for whole, part in zip(shown, found[:4], strict=True):
                    whole[a:b] = part.unflatten(1, shape)
                d_pushes[a:b] = found.pushes
        d_gamma, d_beta = (
            x.view(*shape, 1, -1).sum_to_size(norm.shape) for x, norm in ((sums.gamma, gamma), (sums.beta, beta))
        )
        d_scale = sums.scale.view(*shape, -1).sum(1).sum_to_size(scale.shape)
        d_last = -d_pushes.view(dims.steps, *shape).sum(2)
        d_last = d_last.sum_to_size(last.shape) if last is not None else d_last
        return (
            *d_tokens, d_gamma, d_beta, d_scale, d_last, _parted(dims, sums.weights), _parted(dims, sums.gradients)
        )  # fmt: skip


@library.register_fake("ttt::minibatches_backward")
def _(
    d_answers: Tensor,
    d_following: list[Tensor],
    q: Tensor,
    k: Tensor,
    target: Tensor,
    rate: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
    last: Tensor | None,
    weights: list[Tensor],
    gradients: list[Tensor],
    kept: list[Tensor],
    causal: bool,
    eps: float,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    d_tokens = _token_room(q), _token_room(k), _token_room(target), _token_room(rate)
    d_last = q.new_empty((q.shape[2], q.shape[0]) if last is None else last.shape)
    return (
        *d_tokens,
        like(gamma),
        like(beta),
        like(scale),
        d_last,
        [like(w) for w in weights],
        [like(g) for g in gradients],
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    q, k, target, rate, gamma, beta, scale, last, weights, gradients, causal, eps, group_size, _ = inputs
    kept = output[2]
    ctx.save_for_backward(q, k, target, rate, gamma, beta, scale, last, *weights, *gradients, *kept)
    ctx.counts = len(weights), len(gradients), len(kept)
    ctx.settings = causal, eps, group_size
    # What is kept gets no gradient, and need not be filled with zeros to say so.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_answers: Tensor | None, d_following: list[Tensor | None], _: Any) -> tuple[Any, ...]:
    q, k, target, rate, gamma, beta, scale, last, *rest = ctx.saved_tensors
    counted = iter(rest)
    weights, gradients, kept = (list(itertools.islice(counted, count)) for count in ctx.counts)
    *d_inputs, d_last, d_weights, d_gradients = torch.ops.ttt.minibatches_backward(
        torch.zeros_like(q) if d_answers is None else d_answers,
        [torch.zeros_like(w) if d is None else d for d, w in zip(d_following, weights, strict=True)],
        q, k, target, rate, gamma, beta, scale, last, weights, gradients, kept, *ctx.settings,
    )  # fmt: skip
    return (*d_inputs, None if last is None else d_last, d_weights, d_gradients, None, None, None, None)


def _no_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "the fused scan has no second derivative; set TTT_OPS=generic and scan_checkpoint_group_size: 0 for one"
    )


library.register_autograd("ttt::minibatches", _backward, setup_context=_save)
library.register_autograd("ttt::minibatches_backward", _no_second_derivative)


def _plain_types(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast off: a backward pass may be called where it is on, and fast weights stay in their own type."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def fused_scan(
    weights: Weights,
    q_BHNCF: Tensor,
    k_BHNCF: Tensor,
    target_BHNCF: Tensor,
    rate_BHNC1: Tensor,
    gamma_H1F: Tensor,
    beta_H1F: Tensor,
    scale_C: Tensor,
    last_NB: Tensor,
    *,
    causal: bool,
    eps: float,
    group_size: int,
) -> tuple[Tensor, Weights]:
    """Answer N closed mini-batches, each learning for the next: `W_{n+1} = W_n − s_C G_n`.

    Args:
        weights: `(W1, b1, …)` that open the first, `W [B,H,in,out]` and `b [B,H,1,out]`.
        q_BHNCF: queries; keys, targets `v − k` and rates `η` likewise.
        k_BHNCF: see above.
        target_BHNCF: see above.
        rate_BHNC1: see above.
        gamma_H1F: scale of the inner layer norm.
        beta_H1F: shift of the inner layer norm.
        scale_C: `s`, step size by position.
        last_NB: `s_C` for each mini-batch and row, or one for all `[1,1]`; 0 where a row's mini-batch moves nothing.
        causal: whether a token learns only from those up to itself.
        eps: of the layer norm.
        group_size: mini-batches that backward recomputes at a time; 0, or at least N, keeps everything.

    Returns:
        `z [B,H,N,C,F]` and the weights after the last mini-batch.

    Raises:
        RuntimeError: in backward, where a gradient of a gradient is asked for.
    """
    inputs = (q_BHNCF, k_BHNCF, target_BHNCF, rate_BHNC1, gamma_H1F, beta_H1F, scale_C[None], last_NB)
    steps = q_BHNCF.shape[2]
    z, following, _ = torch.ops.ttt.minibatches(
        *inputs,
        list(weights),
        [],
        causal,
        eps,
        0 if group_size >= steps else group_size,
        _wants_gradient(inputs, weights),
    )
    return z, tuple(following)


def fused_minibatch(
    weights: Weights,
    gradients: Weights | None,
    q_BHCF: Tensor,
    k_BHCF: Tensor,
    target_BHCF: Tensor,
    rate_BHC1: Tensor,
    gamma_H1F: Tensor,
    beta_H1F: Tensor,
    scale_BC: Tensor,
    *,
    causal: bool,
    eps: float,
) -> tuple[Tensor, Weights]:
    """Answer the queries of one mini-batch that may be open on either side: `ttt.ops.mlp.mlp_minibatch`, fused.

    Arguments and results are those of `mlp_minibatch`, but for the step sizes, `[B,C]` or `[1,C]`.
    """
    tokens = tuple(x.unsqueeze(2) for x in (q_BHCF, k_BHCF, target_BHCF, rate_BHC1))
    inputs = (*tokens, gamma_H1F, beta_H1F, scale_BC)
    before = list(gradients or ())
    keep = _wants_gradient(inputs, (*weights, *before))
    z, summed, _ = torch.ops.ttt.minibatches(*inputs, None, list(weights), before, causal, eps, 0, keep)
    return z.squeeze(2), tuple(summed)


def _wants_gradient(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *weights))
