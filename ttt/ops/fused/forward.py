"""Forward of one chunk of mini-batches: the keys one mini-batch after the other, then all queries at once.

Shape letters and symbols: see `ttt.ops.fused`. Numbers in parentheses are the equations of `docs/backward.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ttt.ops.fused.layout import Common
from ttt.ops.fused.rooms import ForwardViews

# GELU in its tanh form is x σ(2u) with 2u = x (SLOPE + CUBIC x²): one sigmoid, which is cheaper than one tanh.
_SLOPE = 2 * math.sqrt(2 / math.pi)
_CUBIC = _SLOPE * 0.044715
# p = a + 3 b z² = TRIPLE (z² + SHIFT): as a sum with a number it takes one pass, and the factor goes into the next.
_TRIPLE = 3 * _CUBIC
_SHIFT = _SLOPE / _TRIPLE

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


# --- elementwise functions, and what forward and backward share ---


def _gelu(z: Tensor, value: Tensor, squared: Tensor, gate: Tensor) -> None:
    """`φ(z) = z σ(2u)` into `value`; leaves `z²` and `σ(2u)` behind (2)."""
    torch.mul(z, z, out=squared)
    torch.mul(z, _SLOPE, out=gate)
    gate.addcmul_(squared, z, value=_CUBIC).sigmoid_()
    torch.mul(z, gate, out=value)


def _gelu_slope(value: Tensor, squared: Tensor, gate: Tensor, slope: Tensor) -> None:
    """`φ'(z) = σ + φ (1 − σ) p` into `slope`, with `p / 3b`, `p = (2u)'`, left in place of `z²` (3)."""
    squared.add_(_SHIFT)
    torch.addcmul(value, value, gate, value=-1, out=slope)
    torch.addcmul(gate, slope, squared, value=_TRIPLE, out=slope)


def _gelu_bend(gate: Tensor, slope: Tensor, p: Tensor, bend: Tensor) -> None:
    """`φ''(z) = σ (1 − σ) (4p − 2a) + (φ' − σ) p (1 − 2σ)` into `bend`, `a = p(0)`, given `p / 3b` (4)."""
    torch.mul(p, 4 * _TRIPLE, out=bend)
    bend.sub_(2 * _SLOPE)
    spread = torch.addcmul(gate, gate, gate, value=-1)
    bend.mul_(spread)
    torch.sub(slope, gate, out=spread)
    spread.addcmul_(spread, gate, value=-2)
    bend.addcmul_(spread, p, value=_TRIPLE)


def through_norm(d: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """`ι Π(d)`: the gradient `d` taken back through the normalisation of `x`, given its `μ` and `ι`."""
    return _layer_norm_backward(d, x, (x.shape[-1],), mean, inverse, None, None, (True, False, False))[0]


# --- arithmetic ---


def forward_chunk(common: Common, views: ForwardViews, following_PJO: list[Tensor] | None, *, keep: bool) -> Tensor:
    """Answer the queries of a chunk; the weights that open it are already in its memory.

    Args:
        common: what all chunks share.
        views: the chunk's tokens, and the memory for what backward needs.
        following_PJO: receives the weights after the chunk, or the sums of a mini-batch that stays open; None if they
            are not needed, or have their place behind the chunk's.
        keep: whether to write what backward reads.

    Returns:
        `LN(y) [M,P,C,F]`.
    """
    dual, last = common.dims.dual, views.steps - 1
    means_PC1, inverses_PC1 = [], []
    for n in range(views.steps):
        _keys_forward(common, views, n)
        mean, inverse = _errors(common, views, n)
        means_PC1.append(mean)
        inverses_PC1.append(inverse)
        if n < last or not dual:
            _update(common, views, n, [w[n + 1] for w in views.weights_PJO])
    if keep:
        torch.stack(means_PC1, out=views.kept.mean_MPC1)
        torch.stack(inverses_PC1, out=views.kept.inverse_MPC1)
        _bends(views)
    normed_MPCF = _queries(common, views, keep=keep)
    # Only after the queries: these weights may overwrite the chunk's first.
    if following_PJO is not None and dual:
        _update(common, views, last, following_PJO)
    elif following_PJO is not None:
        for following, moved in zip(following_PJO, views.weights_PJO, strict=True):
            if following is not moved[-1]:
                following.copy_(moved[-1])
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


def _errors(common: Common, views: ForwardViews, n: int) -> tuple[Tensor, Tensor]:
    """The errors `E` of a mini-batch's inner loss at every layer, from the last to the first, (5) to (7).

    Returns `μ` and `ι` of the last `Z`.
    """
    constants, errors_PCO, z_PCF = common.constants, views.errors_PCO, views.output_PCF[n]
    unit, mean, inverse = torch.native_layer_norm(z_PCF, (z_PCF.shape[-1],), None, None, common.eps)
    # r = γ² x̂ + γ (β − t); E is r taken back through the norm.
    r_PCF = torch.addcmul(views.anchors_PCF[n], constants.gamma_squared_P1F, unit)
    errors_PCO[-1][n].copy_(through_norm(r_PCF, z_PCF, mean, inverse))
    for layer in range(common.dims.depth - 2, -1, -1):
        pulled = views.pulled_PCO[layer][n]
        common.products.of(errors_PCO[layer + 1][n], views.later_weights_POI[layer][n], pulled)  # (7)
        torch.mul(pulled, views.slopes_PCO[layer][n], out=errors_PCO[layer][n])
    return mean, inverse


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
    """The queries of a whole chunk, (9) to (11) or (9') and (11). Returns `LN(y)`."""
    constants, kept, depth = common.constants, views.kept, common.dims.depth
    for layer in range(depth):
        x_RCJ, y_RCO = views.queries_RCJ[layer], views.answered_RCO[layer]
        if common.dims.dual:
            _answer_in_dual_form(common, views, layer, keep=keep)
        else:
            common.products.of(x_RCJ, views.answering_RJO[layer], y_RCO)  # (9')
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


def _answer_in_dual_form(common: Common, views: ForwardViews, layer: int, *, keep: bool) -> None:
    """`y` of a layer: what the queries see of the keys (9), and the rest of (10)."""
    products, x_RCJ, y_RCO = common.products, views.queries_RCJ[layer], views.answered_RCO[layer]
    seen_RCC = products.of(x_RCJ, views.keys_RJC[layer], views.attention_RCC[layer] if keep else None)
    seen_RCC = seen_RCC * views.coefficient_RCC if keep else seen_RCC.mul_(views.coefficient_RCC)
    if layer:
        products.of(x_RCJ, views.answering_RJO[layer], y_RCO)
        products.add(y_RCO, seen_RCC, views.errors_RCO[layer])
    else:
        products.add(views.first_queries_RCO, seen_RCC, views.errors_RCO[layer], y_RCO)
    if common.gradients_PJO is not None:
        y_RCO.addcmul_(products.of(x_RCJ, common.gradients_PJO[layer]), common.constants.neg_scale_PC1)
