"""Forward of one chunk of mini-batches: the keys one mini-batch after the other, then all queries at once.

Shape letters and symbols: see `ttt.ops.fused`. Numbers in parentheses are the equations of `docs/backward.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ttt.ops.fused.layout import Block, Common, Dims, Kept, by_step

# GELU in its tanh form is x σ(2u) with 2u = x (SLOPE + CUBIC x²): one sigmoid, which is cheaper than one tanh.
_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBIC = _SLOPE * 0.044715

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


# --- elementwise functions, and what forward and backward share ---


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


def through_norm(d: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """`ι Π(d)`: the gradient `d` taken back through the normalisation of `x`, given its `μ` and `ι`."""
    return _layer_norm_backward(d, x, (x.shape[-1],), mean, inverse, None, None, (True, False, False))[0]


# --- room and views ---


class Scratch:
    """Scratch memory of forward, which chunks of mini-batches use in turn."""

    def __init__(self, dims: Dims, chunk: int, like: Tensor) -> None:
        hidden = dims.widths[1:-1]

        def room(width: int, rows: int = dims.size) -> Tensor:
            return like.new_empty((chunk, dims.pairs, rows, width))

        self.first_MPSO = room(dims.widths[1], 2 * dims.size)
        """The first layer's outputs for keys and queries."""
        self.outputs_MPCO = [room(width) for width in hidden[1:]]
        """The outputs of the later hidden layers: for the keys, then for the queries."""
        self.squared_MPCO = [room(width) for width in hidden]
        self.gates_MPCO = [room(width) for width in hidden]
        self.pulled_MPCO = [room(width) for width in hidden]
        """`D_l`"""


class ForwardViews:
    """Views of the tensors that forward of a chunk reads and writes.

    Making a view takes as long as a small product. So the views are made once for each place of a chunk in a group, and
    the next group, which is laid out in the same memory, uses them again. If every mini-batch has memory of its own,
    each chunk has its own views.

    A name ends in the shape of one tensor. `_PCO` and the like are lists by mini-batch, inside a list by layer if each
    layer has one; `_MPCO` is the whole chunk, and `_RCO` the same as one batch of R = M·P matrices.
    """

    def __init__(self, dims: Dims, block: Block, kept: Kept, scratch: Scratch) -> None:
        self.steps = len(block.rate_MPC1)
        self.kept = kept
        self._view_steps(dims.size, block, kept, scratch)
        self._view_chunk(dims.size, block, kept, scratch)

    def _view_steps(self, size: int, block: Block, kept: Kept, scratch: Scratch) -> None:
        """Make the views for the loop over mini-batches; `later` lists begin at the second layer."""
        steps = self.steps
        first_MPSO = scratch.first_MPSO[:steps]
        self.stacked_PSJ, self.first_PSO = block.stacked_MPSJ.unbind(0), first_MPSO.unbind(0)
        self.anchors_PCF, self.pushes_PC1 = block.anchor_MPCF.unbind(0), block.push_MPC1.unbind(0)
        self.weights_PJO = by_step(kept.weights_MPJO)
        self.later_weights_POI = by_step([x[:, :, :-1].mT for x in kept.weights_MPJO[1:]])
        keys_MPCJ = [x[:, :, :size] for x in kept.inputs_MPSJ]
        self.later_keys_PCJ = by_step(keys_MPCJ)
        # The left factor of (8): pushed keys for the first layer, and each later layer's inputs.
        self.updates_PJC = by_step([x.mT for x in (block.pushed_keys_MPCJ, *keys_MPCJ)])
        self.outputs_PCO = by_step([first_MPSO[:, :, :size], *(x[:steps] for x in scratch.outputs_MPCO)])
        self.values_PCO = by_step([x[..., :-1] for x in keys_MPCJ])
        self.squared_PCO, self.gates_PCO, self.pulled_PCO = (
            by_step([x[:steps] for x in room])
            for room in (scratch.squared_MPCO, scratch.gates_MPCO, scratch.pulled_MPCO)
        )
        self.slopes_PCO, self.errors_PCO = by_step(kept.slopes_MPCO), by_step(kept.errors_MPCO)
        self.output_PCF, self.means_PC1, self.inverses_PC1 = by_step(
            [kept.output_MPCF, kept.mean_MPC1, kept.inverse_MPC1]
        )

    def _view_chunk(self, size: int, block: Block, kept: Kept, scratch: Scratch) -> None:
        """Make the views for the whole chunk: what GELU left behind, and what the queries need."""
        steps = self.steps
        stacks_MPSJ = [block.stacked_MPSJ, *kept.inputs_MPSJ]
        self.squared_MPCO, self.gates_MPCO, self.pulled_MPCO = (
            [x[:steps] for x in room] for room in (scratch.squared_MPCO, scratch.gates_MPCO, scratch.pulled_MPCO)
        )
        self.query_values_MPCO = [x[:, :, size:, :-1] for x in kept.inputs_MPSJ]
        # `y_l`. Products are fast only into contiguous rows, and the first layer's rows alternate with those of the
        # keys. So they are summed in the memory of `pulled`, which is not read any more.
        self.answered_MPCO = [
            *(x[:steps] for x in (*scratch.pulled_MPCO[:1], *scratch.outputs_MPCO)), kept.answer_MPCF
        ]  # fmt: skip
        self.answered_RCO = [x.flatten(0, 1) for x in self.answered_MPCO]
        self.queries_RCJ = [x[:, :, size:].flatten(0, 1) for x in stacks_MPSJ]
        self.keys_RJC = [x[:, :, :size].flatten(0, 1).mT for x in stacks_MPSJ]
        self.attention_RCC = [x.flatten(0, 1) for x in kept.attention_MPCC]
        self.coefficient_RCC = block.coefficient_MPCC.flatten(0, 1)
        self.first_queries_RCO = scratch.first_MPSO[:steps][:, :, size:].flatten(0, 1)
        self.later_weights_RJO = [x.flatten(0, 1) for x in kept.weights_MPJO[1:]]
        self.errors_RCO = [x.flatten(0, 1) for x in kept.errors_MPCO]


# --- arithmetic ---


def forward_chunk(common: Common, views: ForwardViews, following_PJO: list[Tensor] | None, *, keep: bool) -> Tensor:
    """Answer the queries of a chunk; the weights that open it are already in its memory.

    Args:
        common: what all chunks share.
        views: the chunk's tokens, and the memory for what backward needs.
        following_PJO: receives the weights after the chunk, or the sums of a mini-batch that stays open; None if they
            are not needed.
        keep: whether to write what backward reads.

    Returns:
        `LN(y) [M,P,C,F]`.
    """
    for n in range(views.steps):
        _keys_forward(common, views, n)
        _errors(common, views, n, keep=keep)
        if n + 1 < views.steps:
            _update(common, views, n, [w[n + 1] for w in views.weights_PJO])
    if keep:
        _bends(views)
    normed_MPCF = _queries(common, views, keep=keep)
    # Only after the queries: these weights may overwrite the chunk's first.
    if following_PJO is not None:
        _update(common, views, views.steps - 1, following_PJO)
    return normed_MPCF


def _keys_forward(common: Common, views: ForwardViews, n: int) -> None:
    """Run a mini-batch's keys through the inner model, (1) to (3), and its queries through the first product."""
    products, weights_PJO, last = common.products, views.weights_PJO, common.dims.depth - 1
    products.of(views.stacked_PSJ[n], weights_PJO[0][n], views.first_PSO[n])  # (1), and the first part of (10)
    for layer in range(last):
        z, value, squared, gate = (
            views.outputs_PCO[layer][n], views.values_PCO[layer][n], views.squared_PCO[layer][n],
            views.gates_PCO[layer][n],
        )  # fmt: skip
        if layer:
            products.of(views.later_keys_PCJ[layer - 1][n], weights_PJO[layer][n], z)
        _gelu(z, value, squared, gate)
        _gelu_slope(value, squared, gate, views.slopes_PCO[layer][n])
    if last:
        products.of(views.later_keys_PCJ[-1][n], weights_PJO[-1][n], views.output_PCF[n])
    else:
        views.output_PCF[n].copy_(views.outputs_PCO[0][n])


def _errors(common: Common, views: ForwardViews, n: int, *, keep: bool) -> None:
    """The errors `E` of a mini-batch's inner loss at every layer, from the last to the first, (5) to (7)."""
    constants, errors_PCO, z_PCF = common.constants, views.errors_PCO, views.output_PCF[n]
    unit, mean, inverse = torch.native_layer_norm(z_PCF, (z_PCF.shape[-1],), None, None, common.eps)
    # r = γ² x̂ + γ (β − t); E is r taken back through the norm.
    r_PCF = torch.addcmul(views.anchors_PCF[n], constants.gamma_squared_P1F, unit)
    errors_PCO[-1][n].copy_(through_norm(r_PCF, z_PCF, mean, inverse))
    if keep:
        views.means_PC1[n].copy_(mean)
        views.inverses_PC1[n].copy_(inverse)
    for layer in range(common.dims.depth - 2, -1, -1):
        pulled = views.pulled_PCO[layer][n]
        common.products.of(errors_PCO[layer + 1][n], views.later_weights_POI[layer][n], pulled)  # (7)
        torch.mul(pulled, views.slopes_PCO[layer][n], out=errors_PCO[layer][n])


def _update(common: Common, views: ForwardViews, n: int, targets_PJO: Sequence[Tensor]) -> None:
    """The update of a mini-batch (8): the weights that open the next, or the sums of one that stays open."""
    for layer, target in enumerate(targets_PJO):
        left, right = views.updates_PJC[layer][n], views.errors_PCO[layer][n]
        if layer:
            right = right * views.pushes_PC1[n]
        if common.closes:
            common.products.add_outer(views.weights_PJO[layer][n], left, right, target)
        elif common.gradients_PJO is not None:
            common.products.add_outer(common.gradients_PJO[layer], left, right, target)
        else:
            common.products.of(left, right, target)


def _bends(views: ForwardViews) -> None:
    """`D_l ⊙ φ''(Z_l)` for all keys of a chunk (4); backward reads it."""
    kept = views.kept
    for layer, bend in enumerate(kept.bends_MPCO):
        _gelu_bend(views.gates_MPCO[layer], kept.slopes_MPCO[layer], views.squared_MPCO[layer], bend)
        bend.mul_(views.pulled_MPCO[layer])


def _queries(common: Common, views: ForwardViews, *, keep: bool) -> Tensor:
    """The rest of the queries of a whole chunk: (9), the rest of (10), (11). Returns `LN(y)`."""
    constants, products, kept, depth = common.constants, common.products, views.kept, common.dims.depth
    for layer in range(depth):
        x, y = views.queries_RCJ[layer], views.answered_RCO[layer]
        seen = products.of(x, views.keys_RJC[layer], views.attention_RCC[layer])
        seen = seen * views.coefficient_RCC
        if layer:
            products.of(x, views.later_weights_RJO[layer - 1], y)
            products.add(y, seen, views.errors_RCO[layer])
        else:
            products.add(views.first_queries_RCO, seen, views.errors_RCO[layer], y)
        if common.gradients_PJO is not None:
            y.addcmul_(products.of(x, common.gradients_PJO[layer]), constants.neg_scale_PC1)
        if layer + 1 < depth:
            value, squared, gate = (
                views.query_values_MPCO[layer], views.squared_MPCO[layer], views.gates_MPCO[layer]
            )  # fmt: skip
            _gelu(views.answered_MPCO[layer], value, squared, gate)
            if keep:
                _gelu_slope(value, squared, gate, kept.query_slopes_MPCO[layer])
    answer_MPCF = kept.answer_MPCF
    unit, mean, inverse = torch.native_layer_norm(answer_MPCF, (answer_MPCF.shape[-1],), None, None, common.eps)
    if keep:
        kept.query_mean_MPC1.copy_(mean)
        kept.query_inverse_MPC1.copy_(inverse)
    return unit.mul_(constants.gamma_P1F).add_(constants.beta_P1F)
