"""Mini-batches of a linear or MLP inner model as one differentiable operation, its backward derived by hand.

Between forward and backward it holds its inputs and the weights that open each group of mini-batches, nothing else; in
backward each group runs once more and is walked back. `docs/backward.md` derives every line; numbers in parentheses
are its equations. `ttt.ops.scan` over `ttt.ops.mlp` computes the same through autograd and is the oracle of the tests.

Two things keep the loop over mini-batches short. Biases ride along as a last row of their weights, `W̃ = (W; b)`, and
as a last column of ones of what a layer is given, `X̃ = (X, 1)`: every product that a bias needs is part of one that is
there anyway. And only what the carry touches is in the loop: the keys' way forward, and what their update gives back.
The queries and all that depends on tokens alone run for a chunk of mini-batches at a time.

Shapes: `P` stands for batch times heads, so that every product is one batched matrix product; `M` for the mini-batches
of a chunk. Layers of the inner model count from 0 here, so that layer l has weights `W̃_l [P,in+1,out]`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

Weights = tuple[Tensor, ...]

# GELU in its tanh form is x σ(2u) with 2u = x (SLOPE + CUBIC x²): one sigmoid, which is cheaper than one tanh.
_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBIC = _SLOPE * 0.044715
_BLOCK = 16
"""Mini-batches whose tokens are laid out at a time where no group says how many."""
_CHUNK_NUMBERS = 1 << 17
"""Numbers of the widest tensor of a chunk on a CPU."""

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

        On a CPU what a chunk makes should stay in its caches; where weights need not be kept, theirs too, and one
        mini-batch at a time moves them in place.
        """
        if device.type != "cpu":
            return most
        numbers = self.size * max(self.widths)
        if not keep:
            numbers = max(numbers, sum(a * b for a, b in itertools.pairwise(self.widths)) // 2)
        return max(1, min(most, _CHUNK_NUMBERS // (self.pairs * numbers)))


class _Constants(NamedTuple):
    """What every mini-batch reads, one row for each of P."""

    gamma: Tensor
    """`[P,1,F]`"""
    beta: Tensor
    gamma_squared: Tensor
    scale: Tensor
    """`s [P,C,1]`"""
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
    return _Constants(wide, per_pair(beta), wide.square(), steps, pushes)


def _lay_out(
    dims: _Dims, tokens: tuple[Tensor, Tensor, Tensor, Tensor], constants: _Constants, start: int, stop: int, mask: bool
) -> _Block:
    """The tokens of the mini-batches from `start` to `stop`."""
    q, k, target, rate = (x[:, :, start:stop].movedim(2, 0) for x in tokens)
    width = dims.widths[0]
    whole = q.new_empty((stop - start, dims.batch, dims.heads, 2 * dims.size, width + 1))
    whole[..., : dims.size, :width] = k
    whole[..., dims.size :, :width] = q
    whole[..., width] = 1
    stacked = whole.flatten(1, 2)
    rate = rate.reshape(stop - start, dims.pairs, dims.size, 1)
    push = rate * constants.pushes[start:stop]
    coefficient = constants.scale.neg() * rate.mT
    offset = constants.beta - target.reshape(stop - start, dims.pairs, dims.size, width)
    return _Block(
        stacked=stacked,
        rate=rate,
        offset=offset,
        anchor=offset * constants.gamma,
        push=push,
        pushed_keys=stacked[:, :, : dims.size] * push,
        coefficient=coefficient.tril_() if mask else coefficient,
    )


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


def _add_outer(base: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """`base + leftᵀ right` into `out`, which may be `base`."""
    rows = left.shape[-2]
    if rows <= 2:  # of one or two rows it is bound by memory: a pass over the weights for each
        for row in range(rows):
            torch.addcmul(base if row == 0 else out, left[:, row : row + 1].mT, right[:, row : row + 1], out=out)
    elif out is base:
        base.baddbmm_(left.mT, right)
    else:
        torch.baddbmm(base, left.mT, right, out=out)


# --- forward ---


class _Scratch:
    """Room that a chunk of mini-batches uses again and again."""

    def __init__(self, dims: _Dims, chunk: int, like: Tensor) -> None:
        hidden = dims.widths[1:-1]

        def room(width: int) -> Tensor:
            return like.new_empty((chunk, dims.pairs, dims.size, width))

        self.outputs = [room(width) for width in hidden]
        self.squared = [room(width) for width in hidden]
        self.gates = [room(width) for width in hidden]
        self.pulled = [room(width) for width in hidden]


def _forward_chunk(
    dims: _Dims,
    constants: _Constants,
    block: _Block,
    kept: _Kept,
    scratch: _Scratch,
    following: list[Tensor] | None,
    gradients: list[Tensor] | None,
    *,
    closes: bool,
    eps: float,
    keep: bool,
) -> Tensor:
    """Answers `LN(y) [M,P,C,F]` of a chunk whose first weights are in `kept`, and what the next one opens with.

    Args:
        dims: shapes.
        constants: see there.
        block: the chunk's tokens.
        kept: where it writes what backward needs.
        scratch: room.
        following: where the weights after the chunk go, or None where nobody asks.
        gradients: `G`, where the chunk is a mini-batch that was open before.
        closes: whether weights move; else the chunk is one mini-batch and its summed gradients go to `following`.
        eps: of the layer norm.
        keep: whether backward follows.
    """
    depth, size, width = dims.depth, dims.size, dims.widths[-1]
    stacks = [block.stacked, *kept.inputs]
    weights = [x.unbind(0) for x in kept.weights]
    keys = [x[:, :, :size].unbind(0) for x in stacks]
    values = [x[:, :, :size, :-1].unbind(0) for x in kept.inputs]
    errors = [x.unbind(0) for x in kept.errors]
    slopes = [x.unbind(0) for x in kept.slopes]
    outputs = [x.unbind(0) for x in scratch.outputs]
    squares = [x.unbind(0) for x in scratch.squared]
    gates = [x.unbind(0) for x in scratch.gates]
    pulled = [x.unbind(0) for x in scratch.pulled]
    last_outputs, means, inverses = kept.output.unbind(0), kept.moments[0].unbind(0), kept.moments[1].unbind(0)
    anchors, pushes, pushed_keys = block.anchor.unbind(0), block.push.unbind(0), block.pushed_keys.unbind(0)
    steps = len(anchors)

    def update(n: int, targets: Sequence[Tensor]) -> None:
        for layer, target in enumerate(targets):
            left = keys[layer][n] if layer else pushed_keys[n]
            right = errors[layer][n] * pushes[n] if layer else errors[0][n]
            if closes:
                _add_outer(weights[layer][n], left, right, target)  # (8)
            elif gradients is not None:
                _add_outer(gradients[layer], left, right, target)
            else:
                torch.bmm(left.mT, right, out=target)

    for n in range(steps):
        for layer in range(depth - 1):
            z = outputs[layer][n]
            torch.bmm(keys[layer][n], weights[layer][n], out=z)  # (1)
            _gelu(z, values[layer][n], squares[layer][n], gates[layer][n])
            _gelu_slope(values[layer][n], squares[layer][n], gates[layer][n], slopes[layer][n])
        z = torch.bmm(keys[-1][n], weights[-1][n], out=last_outputs[n])
        unit, mean, inverse = torch.native_layer_norm(z, (width,), None, None, eps)
        # (5), (6): a = γ (γ x̂ + β − target), and E its way back through the norm.
        a = torch.addcmul(anchors[n], constants.gamma_squared, unit)
        error = _layer_norm_backward(a, z, (width,), mean, inverse, None, None, (True, False, False))[0]
        errors[-1][n].copy_(error)
        if keep:
            means[n].copy_(mean)
            inverses[n].copy_(inverse)
        for layer in range(depth - 2, -1, -1):
            torch.bmm(errors[layer + 1][n], weights[layer + 1][n][:, :-1].mT, out=pulled[layer][n])  # (7)
            torch.mul(pulled[layer][n], slopes[layer][n], out=errors[layer][n])
        if n + 1 < steps:
            update(n, [w[n + 1] for w in weights])

    if keep:
        for layer in range(depth - 1):
            bend = kept.bends[layer]
            _gelu_bend(scratch.gates[layer][:steps], kept.slopes[layer], scratch.squared[layer][:steps], bend)
            bend.mul_(scratch.pulled[layer][:steps])

    # The queries of all mini-batches of the chunk, (9) to (11).
    for layer in range(depth):
        stack = stacks[layer].flatten(0, 1)
        x = stack[:, size:]
        seen = torch.bmm(x, stack[:, :size].mT, out=kept.attention[layer].flatten(0, 1))
        y = scratch.outputs[layer][:steps].flatten(0, 1) if layer + 1 < depth else kept.answer.flatten(0, 1)
        torch.bmm(x, kept.weights[layer].flatten(0, 1), out=y)
        y.baddbmm_(seen * block.coefficient.flatten(0, 1), kept.errors[layer].flatten(0, 1))
        if gradients is not None:
            y.addcmul_(torch.bmm(x, gradients[layer]), constants.scale, value=-1)
        if layer + 1 < depth:
            y, squared, gate = (
                x[:steps] for x in (scratch.outputs[layer], scratch.squared[layer], scratch.gates[layer])
            )
            value = kept.inputs[layer][:, :, size:, :-1]
            _gelu(y, value, squared, gate)
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
        self.weights = d_next if closes else [torch.zeros_like(x) for x in d_next]
        """Of the weights; where mini-batches close, the same tensors: `W' = W − …` hands its gradient through (12)."""
        self.gradients = [x.clone() for x in d_next] if found_open else []
        """Of the gradients that an open mini-batch had summed before."""
        self.gamma = zeros(1, dims.widths[0])
        self.beta = zeros(1, dims.widths[0])
        self.scale = zeros(dims.size, 1)


class _TokenGradients(NamedTuple):
    """Gradients of a chunk's tokens `[M,P,C,F]`, rates `[M,P,C,1]` and pushes `[M,P,1,1]`."""

    q: Tensor
    k: Tensor
    target: Tensor
    rate: Tensor
    pushes: Tensor


def _sum_rows(x: Tensor) -> Tensor:
    """`[M,P,C,F]` to `[P,1,F]`."""
    return x.sum((0, 2)).unsqueeze(1)


def _backward_chunk(
    dims: _Dims,
    constants: _Constants,
    block: _Block,
    kept: _Kept,
    d_answers: Tensor,
    sums: _Sums,
    gradients: list[Tensor] | None,
    mask: bool,
) -> _TokenGradients:
    """One chunk's way back: the queries of all its mini-batches, then the keys from the last to the first.

    Args:
        dims: shapes.
        constants: see there.
        block: the chunk's tokens.
        kept: what forward left.
        d_answers: of `q + LN(y)`, `[M,P,C,F]`.
        sums: of what comes after the chunk; of the chunk and what comes after it when this returns.
        gradients: `G` of a mini-batch that was open before.
        mask: whether the update is causal.
    """
    depth, size, width = dims.depth, dims.size, dims.widths[-1]
    steps = len(d_answers)
    stacks = [block.stacked, *kept.inputs]
    gamma = constants.gamma

    def through_norm(d: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        return _layer_norm_backward(d, x, (width,), mean, inverse, None, None, (True, False, False))[0]

    def per_step(x: Tensor) -> Tensor:
        return x.unflatten(0, (steps, dims.pairs))

    # --- the queries, which no carry touches: (13) to (17) ---
    mean, inverse = kept.moments[2:]
    sums.beta += _sum_rows(d_answers)
    sums.gamma += _sum_rows((kept.answer - mean).mul_(inverse).mul_(d_answers))
    d_y = through_norm(d_answers * gamma, kept.answer, mean, inverse)
    # Rows of the keys and of the queries together, as the inputs of the layers are kept.
    d_outputs = [d_y.new_empty((steps, dims.pairs, 2 * size, x.shape[-1])) for x in kept.errors]
    d_errors: list[Tensor] = []
    d_inputs: list[Tensor] = []
    coefficient = block.coefficient.flatten(0, 1)
    d_coefficient = torch.zeros_like(coefficient)
    for layer in range(depth - 1, -1, -1):
        d_outputs[layer][:, :, size:] = d_y
        d_y = d_y.flatten(0, 1)
        stack, errors = stacks[layer].flatten(0, 1), kept.errors[layer].flatten(0, 1)
        x, key, seen = stack[:, size:], stack[:, :size, :-1], kept.attention[layer].flatten(0, 1)
        d_seen = torch.bmm(d_y, errors.mT)
        d_coefficient.addcmul_(d_seen, seen)
        d_seen.mul_(coefficient)
        d_errors.append(per_step(torch.bmm((seen * coefficient).mT, d_y)))
        d_inputs.append(per_step(torch.bmm(d_seen.mT, x[..., :-1])))
        d_x = torch.bmm(d_seen, key)
        if gradients is not None:  # one mini-batch: y has − s x̃ G in addition
            d_step = d_y * -constants.scale
            sums.scale -= (d_y * torch.bmm(x, gradients[layer])).sum(-1, keepdim=True)
            sums.gradients[layer].baddbmm_(x.mT, d_step)
            d_x.baddbmm_(d_step, gradients[layer][:, :-1].mT)
        if layer:
            d_x.baddbmm_(d_y, kept.weights[layer].flatten(0, 1)[:, :-1].mT)
            d_y = per_step(d_x).mul_(kept.query_slopes[layer - 1])
    d_query = per_step(d_x).add_(d_answers)
    d_errors.reverse()
    d_inputs.reverse()
    if mask:
        d_coefficient.tril_()
    # coefficient = − s ηᵀ
    d_coefficient = per_step(d_coefficient)
    sums.scale -= (d_coefficient @ block.rate).sum(0)
    d_rate = d_coefficient.mT @ constants.scale.neg()

    # --- the keys ---
    # What the way back through E needs of the norm, (20): constant in the loop.
    mean, inverse = kept.moments[:2]
    unit = (kept.output - mean).mul_(inverse)
    slope = torch.addcmul(block.anchor, constants.gamma_squared, unit)
    to_slope = (slope * unit).mean(-1, keepdim=True).mul_(inverse).neg_()
    pair = torch.stack((unit, kept.errors[-1]), -3)
    turned = torch.stack((kept.errors[-1], unit), -3).mul_(inverse.neg().unsqueeze(-3))
    d_slopes = torch.empty_like(slope)
    seen_by_next = [torch.empty_like(x) for x in kept.errors]
    reached = slope.new_empty((steps, dims.pairs, size, width + 1))
    # A last column of zeros, where the bias of the next layer would be.
    d_pulled = [x.new_zeros((*x.shape[1:-1], x.shape[-1] + 1)) for x in kept.errors[:-1]]
    pushed_errors = [x * block.push for x in kept.errors[1:]]

    weights = [x[:, :, :-1].unbind(0) for x in kept.weights]
    all_stacks = [x.unbind(0) for x in stacks]
    keys = [x[:, :, :size].unbind(0) for x in stacks]
    errors_of = [x.unbind(0) for x in kept.errors]
    pushed = [x.unbind(0) for x in pushed_errors]
    slopes, bends = ([x.unbind(0) for x in tensors] for tensors in (kept.slopes, kept.bends))
    d_errors_of, d_inputs_of = ([x.unbind(0) for x in tensors] for tensors in (d_errors, d_inputs))
    d_outputs_of = [x.unbind(0) for x in d_outputs]
    d_keys_of = [x[:, :, :size].unbind(0) for x in d_outputs]
    seen_of, reached_of = [x.unbind(0) for x in seen_by_next], reached.unbind(0)
    pushes, outputs, means, inverses = (x.unbind(0) for x in (block.push, kept.output, mean, inverse))
    to_slopes, d_slopes_of, pairs, turns = (x.unbind(0) for x in (to_slope, d_slopes, pair, turned))

    for n in range(steps - 1, -1, -1):
        # (18): what the update gives back to errors and inputs.
        for layer in range(depth):
            after = sums.next[layer]
            seen = torch.bmm(keys[layer][n], after, out=seen_of[layer][n])
            d_errors_of[layer][n].addcmul_(seen, pushes[n])
            if layer:
                d_inputs_of[layer][n].baddbmm_(pushed[layer - 1][n], after[:, :-1].mT)
            else:
                torch.bmm(errors_of[0][n], after.mT, out=reached_of[n])
        # (19): the errors' way back, from the first layer up.
        d_error = d_errors_of[0][n]
        d_hidden = []
        for layer in range(depth - 1):
            torch.mul(d_error, slopes[layer][n], out=d_pulled[layer][..., :-1])
            d_hidden.append(d_error.mul_(bends[layer][n]))
            d_error = d_errors_of[layer + 1][n]
            d_error.baddbmm_(d_pulled[layer][..., :-1], weights[layer + 1][n])
        # (20)
        d_slope = through_norm(d_error, outputs[n], means[n], inverses[n])
        d_slopes_of[n].copy_(d_slope)
        d_z = through_norm(d_slope * constants.gamma_squared, outputs[n], means[n], inverses[n])
        d_z.addcmul_(d_slope, to_slopes[n])
        d_z += (pairs[n] * d_error.unsqueeze(-3)).mean(-1, keepdim=True).mul(turns[n]).sum(-3)
        # (21): the keys' way back.
        d_keys_of[-1][n].copy_(d_z)
        for layer in range(depth - 1, 0, -1):
            d_x = d_inputs_of[layer][n]
            d_x.baddbmm_(d_keys_of[layer][n], weights[layer][n].mT)
            torch.addcmul(d_hidden[layer - 1], d_x, slopes[layer - 1][n], out=d_keys_of[layer - 1][n])
        # (22): all that the mini-batch gives to its weights.
        for layer in range(depth):
            total = sums.weights[layer]
            _add_outer(total, all_stacks[layer][n], d_outputs_of[layer][n], total)
            if layer:
                _add_outer(total, d_pulled[layer - 1], errors_of[layer][n], total)

    # --- what is left of the tokens: (23) to (25) ---
    d_stack = torch.bmm(d_outputs[0].flatten(0, 1), kept.weights[0].flatten(0, 1)[:, :-1].mT)
    d_stack = per_step(d_stack)
    d_query += d_stack[:, :, size:]
    d_key = d_inputs[0].add_(d_stack[:, :, :size]).addcmul_(reached[..., :-1], block.push)
    d_push = (reached * block.stacked[:, :, :size]).sum(-1, keepdim=True)
    for seen, error in zip(seen_by_next[1:], kept.errors[1:], strict=True):
        d_push += (seen * error).sum(-1, keepdim=True)
    d_rate += d_push * constants.pushes
    d_pushes = (d_push * block.rate).sum(-2, keepdim=True)
    # a = γ² x̂ + γ (β − target)
    sums.gamma += _sum_rows(unit.mul_(2 * gamma).add_(block.offset).mul_(d_slopes))
    d_target = d_slopes.mul_(-gamma)
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
        held = _kept_shapes(dims, group_size, q) if keep else []
        block_size = group_size or min(_BLOCK, dims.steps)
        chunk = dims.chunk(q.device, block_size, keep=everything)
        scratch = _Scratch(dims, chunk, q)
        kept = _Kept.of(held, dims.depth) if everything else _allocate(dims, chunk, q)
        carry = _joined(dims, weights)
        following = [torch.empty_like(x) for x in carry]
        for x, w in zip(kept.weights, carry, strict=True):
            x[0] = w
        for start in range(0, dims.steps, block_size):
            stop = min(start + block_size, dims.steps)
            if keep and group_size and start:
                for x, w in zip(held, kept.weights, strict=True):
                    x[start // group_size - 1] = w[0]
            block = _lay_out(dims, (q, k, target, rate), constants, start, stop, causal)
            for a in range(start, stop, chunk):
                b = min(a + chunk, stop)
                if last is None or b == dims.steps:
                    to = following
                elif everything:
                    to = [w[b] for w in kept.weights]
                else:
                    to = [w[0] for w in kept.weights]
                part = kept.part(a, b) if everything else kept.part(0, b - a)
                normed = _forward_chunk(
                    dims,
                    constants,
                    block.part(a - start, b - start),
                    part,
                    scratch,
                    to,
                    opened,
                    closes=last is not None,
                    eps=eps,
                    keep=everything,
                )
                torch.add(queries[a:b], normed.unflatten(1, (dims.batch, dims.heads)), out=shown[a:b])
        return answers, _parted(dims, following), held


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
    kept: list[Tensor],
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
        block_size = group_size or min(_BLOCK, dims.steps)
        chunk = dims.chunk(q.device, block_size, keep=True)
        scratch = _Scratch(dims, chunk, q) if group_size else None
        room = _allocate(dims, group_size, q) if group_size else _Kept.of(kept, dims.depth)
        for start in range((dims.steps - 1) // block_size * block_size, -1, -block_size):
            stop = min(start + block_size, dims.steps)
            block = _lay_out(dims, (q, k, target, rate), constants, start, stop, causal)
            parts = [(a, min(a + chunk, stop)) for a in range(start, stop, chunk)]
            offset = start if group_size else 0
            if scratch is not None:
                opening = [x[start // group_size - 1] for x in kept] if start else _joined(dims, weights)
                for x, w in zip(room.weights, opening, strict=True):
                    x[0] = w
                for a, b in parts:
                    to = [w[b - start] for w in room.weights] if b < stop else None
                    _forward_chunk(
                        dims, constants, block.part(a - start, b - start), room.part(a - start, b - start), scratch, to,
                        opened, closes=last is not None, eps=eps, keep=True,
                    )  # fmt: skip
            for a, b in reversed(parts):
                found = _backward_chunk(
                    dims,
                    constants._replace(pushes=constants.pushes[a:b]),
                    block.part(a - start, b - start),
                    room.part(a - offset, b - offset),
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
