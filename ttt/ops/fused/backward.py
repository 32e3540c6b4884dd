"""Backward of one chunk of mini-batches: all queries at once, then the keys from the last mini-batch to the first.

Shape letters and symbols: see `ttt.ops.fused`. Numbers in parentheses are the equations of `docs/backward.md`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttt.ops.fused.forward import through_norm
from ttt.ops.fused.layout import Common
from ttt.ops.fused.rooms import BackwardViews
from ttt.ops.norm import is_constant, is_zero


class Sums:
    """Gradients that are summed over mini-batches."""

    def __init__(self, common: Common, d_next_PJO: list[Tensor]) -> None:
        dims = common.dims

        def zeros(*shape: int) -> Tensor:
            return d_next_PJO[0].new_zeros((dims.pairs, *shape))

        self.next_PJO = d_next_PJO
        """`dW̃'` of the weights that open the next mini-batch, or `dG̃'` of the sums that an open one passes on."""
        self.first_next_POJ = d_next_PJO[0].mT
        self.later_next_POI = [x[:, :hidden].mT for x, hidden in zip(d_next_PJO[1:], dims.widths[1:], strict=False)]
        self.weights_PJO = d_next_PJO if common.closes else [torch.zeros_like(x) for x in d_next_PJO]
        """`dW̃`. If mini-batches close, these are the tensors of `next_PJO`: `W' = W − …` passes its gradient on."""
        self.gradients_PJO = [] if common.gradients_PJO is None else [x.clone() for x in d_next_PJO]
        """`dG̃` of the sums that an open mini-batch had before."""
        self.gamma_P1F = zeros(1, dims.widths[0])
        self.beta_P1F = zeros(1, dims.widths[0])
        self.scale_PC1 = zeros(dims.size, 1)


class TokenGradients(NamedTuple):
    """Gradients of a chunk's tokens; the next chunk overwrites their memory."""

    q_MPCF: Tensor
    k_MPCF: Tensor
    target_MPCF: Tensor
    rate_MPC1: Tensor
    pushes_MP11: Tensor
    """`dc`"""


# --- arithmetic ---


def backward_chunk(
    common: Common, views: BackwardViews, pushes_MP11: Tensor, d_answers_MPCF: Tensor, sums: Sums
) -> TokenGradients:
    """Run backward of one chunk and return its tokens' gradients.

    Args:
        common: what all chunks share.
        views: the chunk's tokens, the tensors that forward kept, and scratch.
        pushes_MP11: `c` of the chunk's mini-batches.
        d_answers_MPCF: the gradient of `q + LN(y)`.
        sums: the sums over the mini-batches after the chunk; the chunk's own are added.
    """
    d_y_MPCF = _answers_back(common, views, d_answers_MPCF, sums)
    if common.dims.dual:
        d_x_MPCF, d_coefficient_MPCC = _queries_back(common, views, d_y_MPCF, sums)
        d_rate_MPC1 = _coefficient_back(common, views, d_coefficient_MPCC, sums)
    else:
        d_x_MPCF = _queries_back_to_weights_after(common, views, d_y_MPCF)
        d_rate_MPC1 = torch.zeros_like(views.block.rate_MPC1)
    d_query_MPCF = d_x_MPCF.add_(d_answers_MPCF)
    terms = _error_terms(common, views)
    for n in range(views.steps - 1, -1, -1):
        if not common.dims.dual:
            _answering_back(common, views, sums, n)
        _update_back(common, views, sums, n)
        d_hidden_PCO = _errors_back(common, views, terms, n)
        _keys_back(common, views, d_hidden_PCO, n)
        _weights_back(common, views, sums, n)
    return _tokens_back(common, views, pushes_MP11, d_query_MPCF, d_rate_MPC1, sums)


def _answers_back(common: Common, views: BackwardViews, d_answers_MPCF: Tensor, sums: Sums) -> Tensor:
    """Backward of the answers' norm (13): adds to `dβ` and `dγ`, and returns `dy` of the last layer."""
    kept, unit_MPCF = views.kept, views.unit_MPCF
    mean, inverse = kept.query_mean_MPC1, kept.query_inverse_MPC1
    sums.beta_P1F += _sum_rows(d_answers_MPCF)
    torch.sub(kept.answer_MPCF, mean, out=unit_MPCF)
    sums.gamma_P1F += _sum_rows(unit_MPCF.mul_(inverse).mul_(d_answers_MPCF))
    # A constant vector gets no gradient (`ttt.ops.norm`): setting 1/σ = 0 stops it at the norm.
    followed = inverse.masked_fill(is_constant(kept.answer_MPCF), 0)
    d_normed = torch.mul(d_answers_MPCF, common.constants.gamma_P1F, out=views.slope_MPCF)
    d_y_MPCF = through_norm(d_normed, kept.answer_MPCF, mean, followed)
    views.d_answered_MPCO[-1].copy_(d_y_MPCF)
    return d_y_MPCF


def _queries_back(common: Common, views: BackwardViews, d_y_MPCF: Tensor, sums: Sums) -> tuple[Tensor, Tensor]:
    """Backward of queries in dual form from the last layer to the first, (14) to (17); it does not depend on the carry.

    Writes its shares of the keys' gradients, `dE_l` and `dX_l`. Returns `dx_0` without the term `dy_0 W_0ᵀ`, and `dκ`.
    """
    neg_scale_PC1, coefficient_RCC = common.constants.neg_scale_PC1, views.coefficient_RCC
    d_y_RCO = d_y_MPCF.flatten(0, 1)
    d_coefficient_RCC = torch.zeros_like(coefficient_RCC)
    for layer in range(common.dims.depth - 1, -1, -1):
        x_RCJ, seen_RCC = views.queries_RCJ[layer], views.attention_RCC[layer]
        d_seen_RCC = common.products.of(d_y_RCO, views.errors_RCO[layer].mT)  # (14)
        d_coefficient_RCC.addcmul_(d_seen_RCC, seen_RCC)
        d_seen_RCC.mul_(coefficient_RCC)
        d_error_MPCO, d_input_MPCI = views.d_errors_MPCO[layer], views.d_inputs_MPCI[layer]
        common.products.of((seen_RCC * coefficient_RCC).mT, d_y_RCO, d_error_MPCO.flatten(0, 1))  # (15)
        common.products.of(d_seen_RCC.mT, x_RCJ[..., : d_input_MPCI.shape[-1]], d_input_MPCI.flatten(0, 1))  # (16)
        d_x_RCI = common.products.of(d_seen_RCC, views.keys_RCI[layer])
        if common.gradients_PJO is not None:  # one open mini-batch: y also contains − s x̃ G
            gradient_PJO = common.gradients_PJO[layer]
            d_step_RCO = d_y_RCO * neg_scale_PC1
            sums.scale_PC1 -= (d_y_RCO * common.products.of(x_RCJ, gradient_PJO)).sum(-1, keepdim=True)
            common.products.add(sums.gradients_PJO[layer], x_RCJ.mT, d_step_RCO)
            common.products.add(d_x_RCI, d_step_RCO, gradient_PJO[:, : d_x_RCI.shape[-1]].mT)
        if layer:
            common.products.add(d_x_RCI, d_y_RCO, views.answering_ROI[layer])
            d_y_MPCO = views.d_answered_MPCO[layer - 1]
            torch.mul(_by_chunk(views, d_x_RCI), views.kept.query_slopes_MPCO[layer - 1], out=d_y_MPCO)  # (17)
            d_y_RCO = d_y_MPCO.flatten(0, 1)
    return _by_chunk(views, d_x_RCI), _by_chunk(views, d_coefficient_RCC)


def _queries_back_to_weights_after(common: Common, views: BackwardViews, d_y_MPCF: Tensor) -> Tensor:
    """Backward of queries that answer with the weights after their mini-batch, (16') and (17). Returns `dx_0`."""
    d_y_RCO = d_y_MPCF.flatten(0, 1)
    for layer in range(common.dims.depth - 1, -1, -1):
        d_x_RCI = common.products.of(d_y_RCO, views.answering_ROI[layer])  # (16')
        if layer:
            d_y_MPCO = views.d_answered_MPCO[layer - 1]
            torch.mul(_by_chunk(views, d_x_RCI), views.kept.query_slopes_MPCO[layer - 1], out=d_y_MPCO)  # (17)
            d_y_RCO = d_y_MPCO.flatten(0, 1)
    for x in (*views.d_errors_MPCO, *views.d_inputs_MPCI):  # nothing of these comes from the queries
        x.zero_()
    return _by_chunk(views, d_x_RCI)


def _answering_back(common: Common, views: BackwardViews, sums: Sums, n: int) -> None:
    """Add the share of a mini-batch's queries to the gradients of the weights after it (12')."""
    for layer, d_next_PJO in enumerate(sums.next_PJO):
        d_y_PCO = views.d_answered_PCO[layer][n]
        common.products.add_outer(d_next_PJO, views.queries_PJC[layer][n], d_y_PCO, d_next_PJO)


def _coefficient_back(common: Common, views: BackwardViews, d_coefficient_MPCC: Tensor, sums: Sums) -> Tensor:
    """Backward of `κ = −s ηᵀ ⊙ mask` (14): adds to `ds` and returns `dη`."""
    if common.causal:
        d_coefficient_MPCC.tril_()
    # Sums in float32, not products: these are no operands of the inner model.
    sums.scale_PC1 -= (d_coefficient_MPCC * views.block.rate_MPC1.mT).sum((0, -1)).unsqueeze(-1)
    return d_coefficient_MPCC.mul_(common.constants.neg_scale_PC1).sum(-2).unsqueeze(-1)


class _ErrorTerms(NamedTuple):
    """What backward through `E` (20) needs of the norms, one tensor for each mini-batch."""

    teaching_PC1: tuple[Tensor, ...]
    """`ι` as `dr` uses it: 0 for a token whose `Z` is constant and whose error is zero."""
    followed_PC1: tuple[Tensor, ...]
    """`ι` as the rest of `dZ` uses it: 0 for every token whose `Z` is constant."""
    to_slope_PC1: tuple[Tensor, ...]
    """`−ι mean(r x̂)`"""


def _error_terms(common: Common, views: BackwardViews) -> _ErrorTerms:
    """Compute the terms of (20) that do not depend on the carry.

    Writes `x̂`, `(x̂; E)`, both multiplied by `−ι / F`, and `c η E`.
    """
    block, kept, unit_MPCF, slope_MPCF = views.block, views.kept, views.unit_MPCF, views.slope_MPCF
    last_error_MPCF, inverse = kept.errors_MPCO[-1], kept.inverse_MPC1
    torch.sub(kept.output_MPCF, kept.mean_MPC1, out=unit_MPCF).mul_(inverse)
    torch.addcmul(block.anchor_MPCF, common.constants.gamma_squared_P1F, unit_MPCF, out=slope_MPCF)
    constant = is_constant(kept.output_MPCF)
    followed = inverse.masked_fill(constant, 0)
    teaching = inverse.masked_fill(constant & is_zero(last_error_MPCF), 0)
    to_slope = slope_MPCF.mul_(unit_MPCF).mean(-1, keepdim=True).mul_(followed).neg_()
    views.pair_MPC2F[..., 0, :], views.pair_MPC2F[..., 1, :] = unit_MPCF, last_error_MPCF
    share = followed * (-1 / common.dims.widths[-1])
    torch.mul(last_error_MPCF, share, out=views.turned_error_MPCF)
    torch.mul(unit_MPCF, share, out=views.turned_unit_MPCF)
    for error, pushed in zip(kept.errors_MPCO[1:], views.pushed_errors_MPCO, strict=True):
        torch.mul(error, block.push_MPC1, out=pushed)
    return _ErrorTerms(teaching.unbind(0), followed.unbind(0), to_slope.unbind(0))


def _update_back(common: Common, views: BackwardViews, sums: Sums, n: int) -> None:
    """Backward of a mini-batch's update (18): adds to the gradients of its errors and inputs."""
    for layer, d_next_PJO in enumerate(sums.next_PJO):
        seen_PCO = common.products.of(views.keys_PCJ[layer][n], d_next_PJO, views.seen_by_next_PCO[layer][n])
        views.d_errors_PCO[layer][n].addcmul_(seen_PCO, views.pushes_PC1[n])
        if layer:
            common.products.add(
                views.later_d_inputs_PCI[layer - 1][n],
                views.pushed_errors_PCO[layer - 1][n],
                sums.later_next_POI[layer - 1],
            )
        else:
            common.products.of(views.errors_PCO[0][n], sums.first_next_POJ, views.reached_PCJ[n])


def _errors_back(common: Common, views: BackwardViews, terms: _ErrorTerms, n: int) -> list[Tensor]:
    """Backward of a mini-batch's errors, from the first layer to the last (19), then of the inner loss (20).

    Writes `dZ` of the last layer. Returns the part of `dZ_l` that comes through `D_l`, for each hidden layer.
    """
    d_error = views.d_errors_PCO[0][n]
    d_hidden_PCO: list[Tensor] = []
    for layer in range(common.dims.depth - 1):
        torch.mul(d_error, views.slopes_PCO[layer][n], out=views.d_pulled_PCI[layer])
        d_hidden_PCO.append(d_error.mul_(views.bends_PCO[layer][n]))
        d_error = views.d_errors_PCO[layer + 1][n]
        common.products.add(d_error, views.d_pulled_PCI[layer], views.later_weights_PIO[layer][n])
    # (20)
    output_PCF, mean = views.output_PCF[n], views.means_PC1[n]
    d_slope_PCF = through_norm(d_error, output_PCF, mean, terms.teaching_PC1[n])
    views.d_slope_PCF[n].copy_(d_slope_PCF)
    scaled = d_slope_PCF * common.constants.gamma_squared_P1F
    d_z_PCF = through_norm(scaled, output_PCF, mean, terms.followed_PC1[n])
    d_z_PCF.addcmul_(d_slope_PCF, terms.to_slope_PC1[n])
    torch.sum(views.pair_PC2F[n].mul_(views.last_d_error_PC1F[n]), -1, out=views.along_PC2[n])
    d_z_PCF.addcmul_(views.turned_error_PCF[n], views.along_unit_PC1[n])
    torch.addcmul(d_z_PCF, views.turned_unit_PCF[n], views.along_error_PC1[n], out=views.d_keys_PCO[-1][n])
    return d_hidden_PCO


def _keys_back(common: Common, views: BackwardViews, d_hidden_PCO: list[Tensor], n: int) -> None:
    """Backward of a mini-batch's keys, from the last layer to the first (21)."""
    for layer in range(len(d_hidden_PCO), 0, -1):
        d_x_PCI = views.later_d_inputs_PCI[layer - 1][n]
        common.products.add(d_x_PCI, views.d_keys_PCO[layer][n], views.later_weights_POI[layer - 1][n])
        torch.addcmul(
            d_hidden_PCO[layer - 1], d_x_PCI, views.slopes_PCO[layer - 1][n], out=views.d_keys_PCO[layer - 1][n]
        )


def _weights_back(common: Common, views: BackwardViews, sums: Sums, n: int) -> None:
    """Add a mini-batch's share to the gradients of the weights that opened it (22)."""
    for layer, total_PJO in enumerate(sums.weights_PJO):
        common.products.add_outer(total_PJO, views.stacks_PJS[layer][n], views.d_outputs_PSO[layer][n], total_PJO)
        if layer:
            common.products.add_outer(total_PJO, views.d_pulled_PJC[layer - 1], views.errors_PCO[layer][n], total_PJO)


def _tokens_back(
    common: Common,
    views: BackwardViews,
    pushes_MP11: Tensor,
    d_query_MPCF: Tensor,
    d_rate_MPC1: Tensor,
    sums: Sums,
) -> TokenGradients:
    """The rest of the tokens' gradients, (23) to (25); it does not depend on the carry."""
    block, size, gamma_P1F = views.block, common.dims.size, common.constants.gamma_P1F
    d_stack_MPSF, reached_MPCJ = views.d_stack_MPSF, views.reached_MPCJ
    common.products.of(views.d_outputs_MPSO[0].flatten(0, 1), views.first_weights_ROI, d_stack_MPSF.flatten(0, 1))
    if common.dims.dual:
        d_query_MPCF += d_stack_MPSF[:, :, size:]
    d_key_MPCF = views.d_inputs_MPCI[0].addcmul_(reached_MPCJ[..., : common.dims.widths[0]], block.push_MPC1)
    d_key_MPCF.add_(d_stack_MPSF[:, :, :size])
    d_push_MPC1 = reached_MPCJ.mul_(block.stacked_MPSJ[:, :, :size]).sum(-1, keepdim=True)  # (24)
    for seen, error in zip(views.seen_by_next_MPCO[1:], views.kept.errors_MPCO[1:], strict=True):
        d_push_MPC1 += (seen * error).sum(-1, keepdim=True)
    d_rate_MPC1 += d_push_MPC1 * pushes_MP11
    d_pushes_MP11 = (d_push_MPC1 * block.rate_MPC1).sum(-2, keepdim=True)
    # (25), with r = γ² x̂ + γ (β − t)
    r_by_gamma = views.unit_MPCF.mul_(2 * gamma_P1F).add_(block.offset_MPCF)
    sums.gamma_P1F += _sum_rows(r_by_gamma.mul_(views.d_slope_MPCF))
    d_target_MPCF = views.d_slope_MPCF.mul_(-gamma_P1F)
    sums.beta_P1F -= _sum_rows(d_target_MPCF)
    return TokenGradients(d_query_MPCF, d_key_MPCF, d_target_MPCF, d_rate_MPC1, d_pushes_MP11)


def _sum_rows(x_MPCF: Tensor) -> Tensor:
    """The sum over mini-batches and their rows, `[P,1,F]`."""
    return x_MPCF.sum((0, 2)).unsqueeze(1)


def _by_chunk(views: BackwardViews, x_RCO: Tensor) -> Tensor:
    """A batch of R matrices as `[M,P,C,…]`."""
    return x_RCO.unflatten(0, (views.steps, -1))
